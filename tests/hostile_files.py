"""Files made to do harm, written down as what makes them. Each entry yields (door, path, exit codes that are right).

The corpus holds what was reported against other programs; a number behind CVE is the report that an entry is made after.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firstwords import store
from firstwords.config import ModelConfig
from firstwords.model.gpt import GPTModel
from firstwords.runs import checkpoint, tensor_file
from firstwords.text.tokenizer import byte_tokenizer

Case = tuple[str, Path]
Entry = Callable[[Path], Iterator[Case]]
ENTRIES: dict[str, Entry] = {}
TB = 1 << 40
SHAPE = {"vocab_size": 257, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0}
NASTY_JSON = {
    "nested": "[" * 100_000 + "]" * 100_000,
    "nested objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": "1" + "0" * 400,
    "infinite": "1e400",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "surrogate": '"\\ud800"',
}


def entry(make: Entry) -> Entry:
    ENTRIES[make.__name__] = make
    return make


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made_of = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.made_of


class Stored:
    """Pickled as the persistent id that torch.save writes for a storage."""

    def __init__(self, numbers: int, kind: Any = torch.FloatStorage, key: str = "0") -> None:
        self.id = ("storage", kind, key, "cpu", numbers)


def pickled(value: Any, protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, one: Any) -> Any:
            return one.id if isinstance(one, Stored) else None

    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def canary(place: Path) -> Path:
    """Where a payload leaves its sign; outside what a reader may write to."""
    return place.parent / f"canary-{place.name}"


def system(place: Path) -> Call:
    return Call(os.system, f"echo > {canary(place)}")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def archive(path: Path, data: bytes, storage: bytes = b"\0" * 16, more: dict[str, bytes] | None = None) -> Path:
    """Write what torch.save would, around any pickle."""
    members = {"data.pkl": data, "byteorder": b"little", "data/0": storage, "version": b"3\n"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
        for name, content in (more or {}).items():
            file.writestr(name, content)
    return path


def tensor(size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), offset: int = 0, numbers: int = 4) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, Stored(numbers), offset, size, stride, False, OrderedDict())


def sparse_file(path: Path, size: int = TB, head: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def safetensors(path: Path, header: Any, body: bytes = b"\0" * 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write(path, struct.pack("<Q", len(text) if length is None else length) + text + body)


def one(shape: Any = (4,), begin: int = 0, end: int = 16, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def make_checkpoint(parent: Path, config: dict[str, Any] | None = None) -> Path:
    """Publish a checkpoint of a small model, with any configuration beside it."""
    parent.mkdir(parents=True, exist_ok=True)
    model = GPTModel(ModelConfig(**SHAPE))
    jsons = {"state.json": {"step": 1, "best_step": 1}, "config.json": config or {"model": SHAPE, "precision": "float32"}}
    return checkpoint.save(parent, 1, model.tensors(), {}, jsons, byte_tokenizer().json, run={}).folder


def seal(folder: Path) -> Path:
    """Write a manifest that fits whatever is in the folder: an attacker can."""
    manifest = json.loads((folder / store.MANIFEST).read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": store.sha256(data)}
    return seal_manifest(folder, manifest)


def seal_manifest(folder: Path, manifest: dict[str, Any]) -> Path:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    write(folder / store.MANIFEST, store.canonical_json({**rest, "sha256": store.sha256(store.canonical_json(rest))}))
    return folder


def altered(parent: Path, name: str, data: bytes) -> Path:
    folder = make_checkpoint(parent)
    write(folder / name, data)
    return seal(folder)


def verb(place: Path, *words: str) -> Path:
    """Say which command the door `verb` gives; PATH stands for the file."""
    (place / "verb.txt").write_text("\n".join(words))
    return place


# Pickles


@entry
def pickle_os_system(place: Path) -> Iterator[Case]:
    yield "pickled", write(place / "bare.pt", pickled(system(place)))
    yield "pickled", archive(place / "zip.pt", pickled({"model": system(place)}))


@entry
def pickle_eval(place: Path) -> Iterator[Case]:
    code = f"open({str(canary(place))!r}, 'w')"
    yield "pickled", archive(place / "eval.pt", pickled(Call(eval, code)))
    yield "pickled", write(place / "eval.bin", pickled(Call(eval, code)))


@entry
def pickle_exec(place: Path) -> Iterator[Case]:
    yield "pickled", archive(place / "exec.pt", pickled(Call(exec, f"open({str(canary(place))!r}, 'w')")))


@entry
def pickle_in_a_persistent_id(place: Path) -> Iterator[Case]:
    inner = Stored(4)
    inner.id = ("storage", torch.FloatStorage, system(place), "cpu", 4)  # type: ignore[assignment]
    yield "pickled", archive(place / "id.pt", pickled({"w": inner}))


@entry
def pickle_protocol_0(place: Path) -> Iterator[Case]:
    text = f"cos\nsystem\n(S'echo > {canary(place)}'\ntR.".encode()
    yield "pickled", write(place / "zero.pt", text)
    yield "pickled", archive(place / "zero-zip.pt", text)


@entry
def pickle_protocol_5(place: Path) -> Iterator[Case]:
    data = pickle.dumps([pickle.PickleBuffer(bytearray(9)), system(place)], protocol=5)
    yield "pickled", write(place / "five.pt", data)
    yield "pickled", archive(place / "five-zip.pt", data)


@entry
def pickle_global_from_the_memo(place: Path) -> Iterator[Case]:
    def short(text: str) -> bytes:
        return b"\x8c" + bytes([len(text)]) + text.encode()

    command = f"echo > {canary(place)}".encode()
    data = b"\x80\x04" + short("system") + b"\x940" + short("os") + b"h\x00\x93"
    data += b"X" + struct.pack("<I", len(command)) + command + b"\x85R."
    yield "pickled", write(place / "memo.pt", data)
    yield "pickled", archive(place / "memo-zip.pt", data)


@entry
def pickle_like_torchscript(place: Path) -> Iterator[Case]:
    more = {"archive/constants.pkl": pickled(system(place)), "archive/code/__torch__.py": b"def forward(self): pass\n"}
    yield "pickled", archive(place / "script.pt", pickled({"w": tensor()}), more=more)


@entry
def pickle_in_a_tar(place: Path) -> Iterator[Case]:
    yield "pickled", tar(place / "old.pt", {"sys_info": pickled({}), "pickle": pickled(system(place))})


def tar(path: Path, members: dict[str, bytes], links: dict[str, tuple[bytes, str]] | None = None) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for name, (kind, to) in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, to
            file.addfile(info)
    return path


@entry
def pickle_as_distributed_metadata(place: Path) -> Iterator[Case]:
    (place / "dcp").mkdir()
    path = write(place / "dcp" / ".metadata", pickled(system(place), protocol=4))
    yield "folder", place / "dcp"
    yield "pickled", path


@entry
def pickle_as_a_tokenizer(place: Path) -> Iterator[Case]:
    path = write(place / "meta.pkl", pickled(system(place)))
    yield "tokenizer", path
    (place / "text.txt").write_text("a text")
    verb(place, "train", "text.txt", "--tokenizer", "PATH", "--steps", "1")
    yield "verb", path


@entry
def pickle_as_optimizer_and_random_state(place: Path) -> Iterator[Case]:
    """CVE-2026-1839."""
    state = {"numpy": Call(np.random.__RandomState_ctor), "python": system(place)}
    yield "pickled", archive(place / "rng_state.pth", pickled(state))
    yield "pickled", archive(place / "optimizer.pt", pickled({"state": {}, "param_groups": [system(place)]}))


@entry
def pickle_in_a_numpy_array(place: Path) -> Iterator[Case]:
    array = np.array([system(place)], dtype=object)
    np.save(place / "array.npy", array, allow_pickle=True)
    np.savez(place / "array.npz", array=array)
    verb(place, "train", "PATH", "--steps", "1")
    for name in ("array.npy", "array.npz"):
        yield "pickled", place / name
        yield "verb", place / name


# What weights_only alone once let through


@entry
def weights_only_tar(place: Path) -> Iterator[Case]:
    """CVE-2025-32434: the tar format was read with another unpickler."""
    members = {"sys_info": pickled({"protocol_version": 1000}), "storages": pickled(1), "tensors": pickled(0)}
    yield "pickled", tar(place / "tar.pt", {**members, "pickle": pickled(system(place))})


@entry
def weights_only_wrong_types(place: Path) -> Iterator[Case]:
    """CVE-2026-24747: operations on values of the wrong type, and storages of another size than they say."""
    bodies = {
        "setitem": b"]K\x00K\x01s.",
        "append": b"}K\x01a.",
        "setitems": pickled(tensor())[2:-1] + b"(K\x00K\x01u.",
        "build": pickled(tensor())[2:-1] + b"(K\x01K\x02t" + b"b.",
        "underflow": b"RRR.",
        "memo": b"h\x63.",
        "endless": b"(" * 100_000,
    }
    for name, body in bodies.items():
        yield "pickled", archive(place / f"{name}.pt", b"\x80\x02" + body)
    yield "pickled", archive(place / "short.pt", pickled({"w": tensor((400,), numbers=400)}))
    yield "pickled", archive(place / "beyond.pt", pickled({"w": tensor(offset=1 << 40)}))
    yield "pickled", archive(place / "odd.pt", pickled({"w": tensor()}), storage=b"\0" * 15)


@entry
def weights_only_sparse(place: Path) -> Iterator[Case]:
    """CVE-2025-62164: indices far outside the shape."""
    sparse = torch.sparse_coo_tensor(torch.tensor([[10**9]]), torch.ones(1), (2,), check_invariants=False)
    torch.save({"w": sparse}, place / "sparse.pt")
    yield "pickled", place / "sparse.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.save({"w": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}, place / "quantised.pt")
    yield "pickled", place / "quantised.pt"


@entry
def weights_only_huge_storage(place: Path) -> Iterator[Case]:
    yield "pickled", archive(place / "huge.pt", pickled({"w": tensor((10**12,), numbers=10**12)}))
    yield "pickled", archive(place / "overflow.pt", pickled({"w": tensor((2**40, 2**40), (2**40, 1), numbers=2**62)}))


@entry
def weights_only_abused_names(place: Path) -> Iterator[Case]:
    """Names that PyTorch allows."""
    yield "pickled", archive(place / "alloc.pt", pickled({"w": Call(torch.FloatStorage, 10**11)}))
    yield "pickled", archive(place / "shown.pt", pickled({"w": tensor((10**12,), (0,))}))
    yield "pickled", archive(place / "type.pt", pickled({"w": Call(torch._tensor._rebuild_from_type_v2, print, int, (), 0)}))
    yield "pickled", archive(place / "negative.pt", pickled({"w": tensor((-1,), (-4,))}))
    deep = b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."  # a key that is tuples in tuples, whose hash goes down all of them
    yield "pickled", archive(place / "deep.pt", deep)


# Configuration


@entry
def config_with_class_names(place: Path) -> Iterator[Case]:
    """CVE-2026-58659: a name in a configuration is imported and called."""
    evil = {"_target_": "os.system", "_args_": [f"echo > {canary(place)}"]}
    for number, key in enumerate(("_target_", "_instantiator", "auto_map", "class_path")):
        given = {"model": {**SHAPE, key: "os.system"}, "precision": "float32", **evil}
        yield "model", make_checkpoint(place / str(number), given)
    text = f'"_instantiator" = "os.system"\n_target_ = "os.system"\n_args_ = ["echo > {canary(place)}"]\n'
    verb(place, "train", "--config", "PATH", "--steps", "1")
    yield "verb", write(place / "config.toml", text.encode())
    write(place / "evil.json", json.dumps(evil).encode())


@entry
def config_in_python(place: Path) -> Iterator[Case]:
    verb(place, "train", "--config", "PATH", "--steps", "1")
    yield "verb", write(place / "config.py", f"open({str(canary(place))!r}, 'w')\n".encode())


@entry
def config_in_yaml(place: Path) -> Iterator[Case]:
    verb(place, "train", "--config", "PATH", "--steps", "1")
    yield "verb", write(place / "c.yaml", f'!!python/object/apply:os.system ["echo > {canary(place)}"]\n'.encode())


def nasty_jsons(place: Path, values: dict[str, str]) -> Iterator[Case]:
    """Every JSON file that the program reads, with each value in it."""
    for number, value in enumerate(values.values()):
        data = f'{{"a": {value}}}'.encode()
        for name in ("state.json", "config.json", "tokenizer.json"):
            yield "info" if name == "state.json" else "model", altered(place / f"{number}-{name}", name, data)
        folder = make_checkpoint(place / f"{number}-manifest")
        write(folder / store.MANIFEST, data)
        yield "manifest", folder
        (index := place / f"{number}-index").mkdir()
        write(index / "model.safetensors.index.json", data)
        yield "folder", index
        yield "safetensors", safetensors(place / f"{number}.safetensors", data)


@entry
def config_of_nested_json(place: Path) -> Iterator[Case]:
    yield from nasty_jsons(place, {name: value for name, value in NASTY_JSON.items() if "nested" in name})
    verb(place, "train", "--config", "PATH", "--steps", "1")
    yield "verb", write(place / "nested.toml", b"a = " + b"[" * 100_000)
    yield "verb", write(place / "dots.toml", b"a." * 100_000 + b"a = 1")


@entry
def config_of_impossible_numbers(place: Path) -> Iterator[Case]:
    twice = {"twice": '1, "a": 2'}
    yield from nasty_jsons(place, {name: value for name, value in {**NASTY_JSON, **twice}.items() if "nested" not in name})
    verb(place, "train", "--config", "PATH")
    for number, value in enumerate(("1" + "0" * 400, "1" + "0" * 5000, "nan", "-inf", "1e400")):
        yield "verb", write(place / f"{number}.toml", f"steps = {value}\n[optim]\npeak_lr = {value}\n".encode())


# safetensors


def header_length(length: int) -> Entry:
    def make(place: Path) -> Iterator[Case]:
        yield "safetensors", safetensors(place / "file.safetensors", {"w": one()}, length=length)

    return make


ENTRIES |= {
    f"safetensors_header_of_{length}_bytes": header_length(length) for length in (2**63 - 1, 2**64 - 1, 0, 100_000_001)
}


@entry
def safetensors_header_of_100_mb(place: Path) -> Iterator[Case]:
    spaces = b'{"w":' + b" " * (100_000_000 - 6) + b"}"
    yield "safetensors", safetensors(place / "spaces.safetensors", spaces)
    yield "safetensors", safetensors(place / "lists.safetensors", b'{"w":[' + b"[],"[:3] * 5_000_000 + b"[]]}")


def headers(**made: Any) -> Entry:
    def make(place: Path) -> Iterator[Case]:
        for name, header in made.items():
            yield "safetensors", safetensors(place / f"{name}.safetensors", header)

    return make


ENTRIES |= {
    "safetensors_overlap": headers(a={"v": one((3,), 0, 12), "w": one((3,), 4, 16)}, b={"v": one(), "w": one()}),
    "safetensors_hole": headers(a={"v": one((1,), 0, 4), "w": one((2,), 8, 16)}, b={"w": one((3,), 4, 16)}),
    "safetensors_begin_after_end": headers(a={"w": one((4,), 16, 0)}, b={"w": one((0,), 16, 8), "v": one()}),
    "safetensors_overflow": headers(a={"w": one((2**32, 2**32))}, b={"w": one((2**62, 4, 2))}, c={"w": one((9,) * 9999)}),
    "safetensors_negative": headers(a={"w": one((-4,))}, b={"w": one((-2, -2))}, c={"w": one((4,), -16, 0)}),
    "safetensors_unknown_dtype": headers(
        a={"w": one(dtype="F33")}, b={"w": one(dtype="O")}, c={"w": {**one(), "dtype": ["F32"]}}, d={"w": one((True, 4))}
    ),
    "safetensors_key_twice": headers(
        a=b'{"w":%b,"w":%b}' % ((json.dumps(one()).encode(),) * 2), b=b'{"w":{"dtype":"F32","dtype":"F16"}}'
    ),
    "safetensors_not_utf_8": headers(a=b'{"\xff\xfe":%b}' % json.dumps(one()).encode(), b=b"\xff" * 64, c=b"[]", d=b" {}"),
    "safetensors_names": headers(
        a={"../w": one()},
        b={"/etc/w": one()},
        c={"w\0": one()},
        d={"\x1b[2Jw": one()},
        e={"w" * 1_000_000: one()},
        f={"": one()},
    ),
}


@entry
def safetensors_with_a_zip_behind(place: Path) -> Iterator[Case]:
    hidden = archive(place / "hidden.zip", pickled(system(place))).read_bytes()
    yield "safetensors", safetensors(place / "both.safetensors", {"w": one()}, b"\0" * 16 + hidden)
    yield "pickled", place / "both.safetensors"


@entry
def safetensors_that_are_not_finite(place: Path) -> Iterator[Case]:
    """Proper by the format; `verify` of a run tells of them."""
    folder = make_checkpoint(place / "run" / "checkpoints")
    tensors = {name: value.clone() for name, value in tensor_file.load(folder / checkpoint.MODEL).items()}
    tensors["tok_emb.weight"][0, 0], tensors["tok_emb.weight"][1, 1] = float("nan"), float("inf")
    write(folder / checkpoint.MODEL, b"".join(tensor_file.safetensors_bytes(tensors)))
    seal(folder)
    (place / "run" / "config.toml").write_text("")
    verb(place, "verify", "PATH")
    yield "verb", place / "run"


# Archives and paths


@entry
def paths_in_a_zip(place: Path) -> Iterator[Case]:
    evil = f"../../../../{canary(place).name}"
    yield "pickled", archive(place / "slip.pt", pickled({"w": tensor()}), more={evil: b"x"})
    yield "pickled", archive(place / "absolute.pt", pickled({"w": tensor()}), more={str(canary(place)): b"x"})


@entry
def paths_in_a_tar(place: Path) -> Iterator[Case]:
    up = f"../../../../{canary(place).name}"
    yield "pickled", tar(place / "up.pt", {up: b"x"})
    yield "pickled", tar(place / "absolute.pt", {str(canary(place)): b"x"})
    yield "pickled", tar(place / "symbolic.pt", {}, {"link": (tarfile.SYMTYPE, str(place.parent))})
    yield "pickled", tar(place / "hard.pt", {}, {"link": (tarfile.LNKTYPE, "/etc/passwd")})


def sharded(folder: Path, names: dict[str, str]) -> Path:
    folder.mkdir()
    write(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": names}).encode())
    return folder


@entry
def paths_in_an_index(place: Path) -> Iterator[Case]:
    outside = safetensors(place / "outside.safetensors", {"w": one()})
    for number, name in enumerate(
        ("../outside.safetensors", "../../../etc/passwd", str(outside), "a/../../x", "..", "", "a\0b")
    ):
        yield "folder", sharded(place / f"index-{number}", {"w": name})
    folder = sharded(place / "link", {"w": "shard.safetensors"})
    (folder / "shard.safetensors").symlink_to(outside)
    yield "folder", folder
    (folder := place / "whole").mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    yield "folder", folder
    folder = sharded(place / "circle", {"w": "shard.safetensors"})
    (folder / "shard.safetensors").symlink_to(folder / "shard.safetensors")
    yield "folder", folder
    folder = sharded(place / "missing", {"w": "shard.safetensors", "v": "shard.safetensors"})
    safetensors(folder / "shard.safetensors", {"w": one()})
    yield "folder", folder


@entry
def paths_to_what_is_no_file(place: Path) -> Iterator[Case]:
    folder = sharded(place / "fifo", {"w": "shard.safetensors"})
    os.mkfifo(folder / "shard.safetensors")
    yield "folder", folder
    yield "safetensors", folder / "shard.safetensors"
    yield "pickled", folder / "shard.safetensors"
    folder = sharded(place / "device", {"w": "shard.safetensors"})
    (folder / "shard.safetensors").symlink_to("/dev/zero")
    yield "folder", folder
    yield "safetensors", Path("/dev/zero")
    yield "pickled", Path("/dev/zero")
    (folder := place / "index").mkdir()
    os.mkfifo(folder / "model.safetensors.index.json")
    yield "folder", folder
    yield "tokenizer", Path("/dev/zero")
    folder = make_checkpoint(place / "manifest")
    (folder / store.MANIFEST).unlink()
    os.mkfifo(folder / store.MANIFEST)
    yield "manifest", folder
    verb(place, "train", "--config", "PATH")
    os.mkfifo(place / "config.toml")
    yield "verb", place / "config.toml"


@entry
def paths_in_a_manifest(place: Path) -> Iterator[Case]:
    secret = write(place / "secret", b"x")
    record = {"bytes": 1, "sha256": store.sha256(b"x")}
    for number, name in enumerate(("../../secret", str(secret), "..", "a\0", "\ud800")):
        folder = make_checkpoint(place / str(number))
        manifest = json.loads((folder / store.MANIFEST).read_text())
        manifest["files"][name] = record
        yield "manifest", seal_manifest(folder, manifest)
    for number, wrong in enumerate((None, 3, [], {"bytes": "1"}, {"bytes": 1, "sha256": None})):
        folder = make_checkpoint(place / f"record-{number}")
        manifest = json.loads((folder / store.MANIFEST).read_text())
        manifest["files"]["state.json"] = wrong
        yield "manifest", seal_manifest(folder, manifest)


@entry
def paths_that_differ_in_case(place: Path) -> Iterator[Case]:
    folder = make_checkpoint(place / "manifest")
    manifest = json.loads((folder / store.MANIFEST).read_text())
    write(folder / "MODEL.safetensors", b"x")
    manifest["files"]["MODEL.safetensors"] = {"bytes": 1, "sha256": store.sha256(b"x")}
    yield "manifest", seal_manifest(folder, manifest)
    folder = sharded(place / "index", {"v": "a.safetensors", "w": "A.safetensors"})
    for name, file in (("v", "a"), ("w", "A")):
        safetensors(folder / f"{file}.safetensors", {name: one()})
    yield "folder", folder


# Bombs


def two_archives(data: bytes) -> bytes:
    """Put a second list of members before the end, so that two readers can see two archives."""
    first = data.index(b"PK\x01\x02")
    directory, end = data[first:-22], data[-22:]
    return data[:first] + directory + directory.replace(b"data/0", b"data/1") + end


@entry
def bomb_of_zeros(place: Path) -> Iterator[Case]:
    path = place / "zeros.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("archive/data.pkl", pickled({"w": tensor((1 << 26,), numbers=1 << 26)}))
        file.writestr("archive/data/0", bytes(1 << 28))
    yield "pickled", path
    data = archive(place / "stored.zip", pickled({"w": tensor((10**10,), numbers=10**10)})).read_bytes()
    yield (
        "pickled",
        write(place / "claims.pt", data.replace(struct.pack("<II", 16, 16), struct.pack("<II", 0xF0000000, 0xF0000000))),
    )
    yield "pickled", write(place / "two.pt", two_archives(data))
    with zipfile.ZipFile(path := place / "many.pt", "w") as file:
        for number in range(70_000):
            file.writestr(f"archive/data/{number}", b"")
    yield "pickled", path


@entry
def bomb_of_a_terabyte(place: Path) -> Iterator[Case]:
    proper = json.dumps({"w": one((TB // 4,), 0, TB)}).encode()
    head = struct.pack("<Q", len(proper)) + proper
    yield "safetensors", sparse_file(place / "honest.safetensors", len(head) + TB, head)
    yield "safetensors", sparse_file(place / "nothing.safetensors")
    yield "pickled", sparse_file(place / "zip.pt", head=b"PK\x03\x04")
    yield "tokenizer", sparse_file(place / "tokenizer.json")
    verb(place, "train", "--config", "PATH")
    yield "verb", sparse_file(place / "config.toml")
    for name in ("manifest.json", "state.json", "config.json", "tokenizer.json"):
        folder = make_checkpoint(place / f"of-{name}")
        sparse_file(folder / name)
        yield "manifest", folder
    run = make_checkpoint(place / "run" / "checkpoints").parent.parent
    (run / "config.toml").write_text("")
    sparse_file(run / "corpus.json")
    yield "json", run / "corpus.json"


@entry
def bomb_of_layers(place: Path) -> Iterator[Case]:
    for number, more in enumerate(
        (
            {"n_layers": 10**9},
            {"n_layers": 16384, "emb_dim": 2**20},
            {"vocab_size": 2**31},
            {"n_layers": "x"},
            {"n_layers": None},
        )
    ):
        yield "model", make_checkpoint(place / str(number), {"model": {**SHAPE, **more}, "precision": "float32"})
    yield "model", make_checkpoint(place / "none", {"model": None, "precision": "float32"})
    yield "model", make_checkpoint(place / "precision", {"model": SHAPE, "precision": ["float32"]})
