"""GPT-2's own weights by name, through `huggingface_hub`: its cache, its way to go on with half a file, its progress."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from firstwords import reading, store
from firstwords.errors import DataError, NoInputError, Notify

# Repository and revision of each name; a revision is a commit, and its files never change.
NAMES = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
PRESETS = ("gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m")  # of the same sizes
# Nats per token on the chapter's story, training and held-out part, and how the story's prompt goes on, by the chapter's
# code and its exercise 5.5 (rasbt/LLMs-from-scratch, ch05): what a right import comes to.
PUBLISHED = {"gpt2": (3.7547, 3.5596, " forward"), "gpt2-xl": (3.3046, 3.1195, "")}
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def meant(name: str) -> str:
    """Return advice for the preset of one of GPT-2's sizes, whose weights have another name; else empty."""
    by_preset = dict(zip(PRESETS, NAMES, strict=True))
    return f"that is a preset, its weights are called {by_preset[name]}" if name in by_preset else ""


def fetch(name: str, record: Path, notice: Notify) -> Path:
    """Return the folder of the hub's cache that holds a model, fetching what is not there.

    Args:
        name: One of `NAMES`.
        record: A JSON file of the SHA-256 of each file, written at its first use and compared ever after.
        notice: Told that something is fetched.

    Raises:
        NoInputError: It is not there and cannot be fetched; says which files to bring.
        DataError: A file is not the one that was fetched first.
    """
    repository, revision = NAMES[name]
    bring = f"bring {', '.join(FILES)} of {repository} (revision {revision[:12]}) in a folder, and name that folder"
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        why, do = "huggingface_hub is not installed", f"pip install 'firstwords[hub]', or {bring}"
        raise NoInputError("cannot be fetched", where=name, why=why, do=do) from error
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES), local_files_only=True))
        missing = _missing(folder)
    except OSError:  # nothing of it is in the cache
        missing = list(FILES)
    if missing:
        notice(f"fetching {', '.join(missing)} of {repository}")
        try:
            _require_name(constants.ENDPOINT)
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
            missing, why = _missing(folder), ""
        except Exception as error:  # whatever the network, the proxy or the hub's library comes to
            why = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        if missing:
            raise NoInputError("cannot be fetched", where=name, why=why or f"{missing[0]} is not there", do=bring)
    _require_unchanged(name, folder, record)
    return folder


def _require_name(address: str) -> None:
    """Raise an OSError where the name in an address is not known: the hub's library would ask again for half a minute."""
    host = urlsplit(address).hostname
    if not urllib.request.getproxies():  # which know names that this machine does not
        socket.getaddrinfo(host, None)


def _missing(folder: Path) -> list[str]:
    return [file for file in FILES if not (folder / file).is_file()]


def _require_unchanged(name: str, folder: Path, record: Path) -> None:
    known = reading.read_json(record) if record.is_file() else {}
    hashes = {file: store.file_sha256(folder / file) for file in FILES}
    before = known.get(name)
    if before is None:
        store.make_folder(record.parent)
        store.write(record, store.canonical_json({**known, name: hashes}))
    elif before != hashes:
        changed = ", ".join(file for file in FILES if before.get(file) != hashes[file])
        why = f"the SHA-256 of {changed} is not the one of its first use, which {record} holds"
        raise DataError("changed since it was first used", where=str(folder), why=why, do="remove it; it is fetched again")
