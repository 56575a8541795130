"""Named tensors in a folder as Hugging Face's libraries make it: one safetensors file, or several and an index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from firstwords import reading
from firstwords.errors import DataError, NoInputError
from firstwords.runs import tensor_file
from firstwords.runs.tensor_file import Described

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """Tensors whose files were checked and are not read yet."""

    where: str
    described: dict[str, Described]  # by name
    files: dict[Path, tuple[str, ...]]  # each with the names that are taken from it

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each name with its tensor, memory-mapped, file by file: only one file is open at a time."""
        for file, names in self.files.items():
            held = tensor_file.load(file)
            for name in names:
                yield name, held.pop(name)


def find(source: Path) -> Weights:
    """Return the weights in a safetensors file or a folder of them, having checked every header and every path.

    Raises:
        NoInputError: There is nothing of that name.
        DataError: No safetensors in it; an index that names files outside the folder or tensors that its files do not have.
    """
    if not source.exists():
        raise NoInputError("there is nothing", where=str(source), do="check the name")
    if not source.is_dir():
        return _weights(source, {source: None})
    if (source / WHOLE).exists():
        return _weights(source, {_inside(source, WHOLE): None})
    if (source / INDEX).exists():
        return _weights(source, _shards(source))
    do = "convert what is there to safetensors" if any(source.glob("*.bin")) else "check the name"
    raise DataError(f"holds neither {WHOLE} nor {INDEX}", where=str(source), do=do)


def _weights(source: Path, files: dict[Path, list[str] | None]) -> Weights:
    """Return the weights in `files`; a file without names gives all that it has."""
    described: dict[str, Described] = {}
    taken: dict[Path, tuple[str, ...]] = {}
    for file, wanted in files.items():
        header = tensor_file.header(file)
        names = tuple(header if wanted is None else wanted)
        if missing := [name for name in names if name not in header]:
            raise DataError(f"has no tensor {missing[0][:80]!r}, which the index looks for in it", where=str(file))
        described |= {name: header[name] for name in names}
        taken[file] = names
    return Weights(str(source), described, taken)


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    index = _inside(folder, INDEX)
    names = reading.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise DataError("does not say which tensor is in which file", where=str(index))
    reading.require_plain_names(set(names.values()), str(index))
    shards: dict[str, list[str]] = {}
    for name, file in names.items():
        shards.setdefault(file, []).append(name)
    return {_inside(folder, file): wanted for file, wanted in shards.items()}


def _inside(folder: Path, name: str) -> Path:
    """Return the real place of a file, which must not lie outside the folder.

    The cache of `huggingface_hub` keeps a model as `snapshots/<revision>/`, full of links to files in `blobs/` beside it:
    those two belong together.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        place = (home / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise DataError("cannot be read", where=str(folder / name), why=str(error)) from error
    if not any(place.is_relative_to(allowed) for allowed in homes):
        raise DataError("is a link that leads out of its folder", where=str(folder / name), do="put the file itself there")
    return place
