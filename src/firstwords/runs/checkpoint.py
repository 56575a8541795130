"""Named tensors and JSON <-> a published, verified folder; which of them stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from firstwords import reading, store
from firstwords.errors import DataError, FirstwordsError, NoInputError
from firstwords.runs import tensor_file
from firstwords.runs.tensor_file import safetensors_bytes

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
TOKENIZER, CONFIG = "tokenizer.json", "config.json"
PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    manifest: store.Json

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.manifest["step"])

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights' file: equal for equal weights."""
        return str(self.manifest["files"][MODEL]["sha256"])

    def json(self, name: str) -> store.Json:
        """Return one of its JSON files.

        Raises:
            DataError: It is no JSON object, or one made to do harm.
        """
        return reading.read_json(self.folder / name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one of its files, memory-mapped.

        Raises:
            DataError: It is no proper safetensors file.
        """
        return tensor_file.load(self.folder / name)


def save(
    parent: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    jsons: Mapping[str, Mapping[str, Any]],
    tokenizer_json: bytes,
) -> Checkpoint:
    """Publish `parent/step-<step>` and return it, verified; one that is there already is returned as it is.

    Args:
        parent: The run's folder of checkpoints.
        step: Updates done.
        model: The weights.
        optimizer: The optimizers' tensors.
        jsons: File name to content, for `state.json` and `config.json`.
        tokenizer_json: The tokenizer's own file.

    Raises:
        StorageError: It could not be written; nothing appears.
    """
    folder = folder_of(parent, step)
    if folder.exists():
        return Checkpoint(folder, store.verify(folder))
    files = {
        MODEL: safetensors_bytes(model),
        OPTIMIZER: safetensors_bytes(optimizer),
        TOKENIZER: [tokenizer_json],
        **{name: [store.canonical_json(value)] for name, value in jsons.items()},
    }
    return Checkpoint(folder, store.publish(folder, files, lambda: {"kind": "checkpoint", "step": step}))


def folder_of(parent: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, whether it is there or not."""
    return parent / f"{PREFIX}{step:08d}"


def existing(parent: Path) -> list[Path]:
    """Return the folders of checkpoints, oldest first, by number."""
    folders = [path for path in parent.glob(PREFIX + "*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(folders, key=step_of)


def newest(parent: Path, notice: Callable[[str], None], *, aside: bool) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None where there is no checkpoint at all.

    Args:
        parent: The run's folder of checkpoints.
        notice: Told of each damaged one.
        aside: Set damaged ones aside (only under the run's lock).

    Raises:
        DataError: There are checkpoints, and every one is damaged.
    """
    refused: dict[Path, str] = {}
    for folder in reversed(existing(parent)):
        try:
            found = Checkpoint(folder, store.verify(folder))
        except DataError as error:
            refused[folder] = str(error)
            continue
        for damaged, reason in refused.items():
            notice(f"{reason}; " + (f"set aside as {store.set_aside(damaged).name}" if aside else "an older one is used"))
        return found
    if refused:
        why, do = "; ".join(refused.values()), "begin a new run with another --out"
        raise DataError("every checkpoint is damaged", where=str(parent), why=why, do=do)
    return None


def weights_sha256(parent: Path, step: int) -> str:
    """Return the SHA-256 of a step's weights as its manifest has it.

    Raises:
        DataError: There is no such checkpoint, or its manifest is damaged.
    """
    return Checkpoint(parent, store.read_manifest(folder_of(parent, step))).weights_sha256


def best(parent: Path, notice: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint that speaks for a run: the best, or the newest where that is damaged or none is known.

    Raises:
        DataError: There are checkpoints, and every one is damaged.
    """
    found = newest(parent, notice, aside=False)
    best_step = None if found is None else found.json(STATE).get("best_step")
    if found is None or best_step == found.step or not isinstance(best_step, int):
        return found
    try:
        return at_step(parent, best_step)
    except FirstwordsError as error:
        notice(f"{error}; using step {found.step} instead of the best")
        return found


def at_step(parent: Path, step: int) -> Checkpoint:
    """Return the verified checkpoint of a step.

    Raises:
        NoInputError: There is none.
        DataError: It is damaged.
    """
    folder = folder_of(parent, step)
    if not folder.is_dir():
        raise NoInputError("no such checkpoint", where=str(folder))
    return Checkpoint(folder, store.verify(folder))


def rotate(parent: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` whole checkpoints and the best. Call it only after the newest was read back.

    What is kept is verified first, so that a damaged one does not count; nothing is removed while fewer are whole.
    """
    folders = existing(parent)
    if len(folders) <= keep:
        return
    whole = 1  # the newest
    for place, folder in reversed(list(enumerate(folders[:-1]))):
        if whole >= keep:
            for old in folders[: place + 1]:
                if step_of(old) != best_step:
                    store.remove_folder(old)
            return
        whole += _is_whole(folder)


def _is_whole(folder: Path) -> bool:
    try:
        store.verify(folder)
    except DataError:
        return False
    return True


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix(PREFIX))
