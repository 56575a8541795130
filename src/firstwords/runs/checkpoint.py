"""Named tensors and JSON <-> a published, verified folder; which of them stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from firstwords import reading, store
from firstwords.errors import DataError, FirstwordsError, NoInputError, Notify
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

    @property
    def continuable(self) -> bool:
        """Whether training can go on from here; a best one that was copied before it was saved has its weights only."""
        return OPTIMIZER in self.manifest["files"]

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
    optimizer: Mapping[str, Tensor] | None,
    jsons: Mapping[str, Mapping[str, Any]],
    tokenizer_json: bytes,
    run: Mapping[str, str],
) -> Checkpoint:
    """Publish `parent/step-<step>` and return it, verified.

    One of this run that is there already is returned as it is; a damaged one makes room, set aside, and so does one of
    weights only.

    Args:
        parent: The run's folder of checkpoints.
        step: Updates done.
        model: The weights.
        optimizer: The optimizers' tensors; None: only the weights are kept.
        jsons: File name to content, for `state.json` and `config.json`.
        tokenizer_json: The tokenizer's own file.
        run: The hashes that tell this run from others.

    Raises:
        StorageError, PermissionDeniedError: It could not be written; nothing appears.
        DataError: What was read back is not what was written.
    """
    folder = folder_of(parent, step)
    if store.exists(folder):
        try:
            found = _of_run(folder, run)
        except DataError:
            store.set_aside(folder)
        else:
            if found.continuable or optimizer is None:
                return found
            store.remove_folder(folder)
    files = {
        MODEL: safetensors_bytes(model),
        **({} if optimizer is None else {OPTIMIZER: safetensors_bytes(optimizer)}),
        TOKENIZER: [tokenizer_json],
        **{name: [store.canonical_json(value)] for name, value in jsons.items()},
    }
    return Checkpoint(folder, store.publish(folder, files, lambda: {"kind": "checkpoint", "step": step, "run": run}))


def publish(folder: Path, model: Mapping[str, Tensor], shape: Mapping[str, Any], tokenizer_json: bytes) -> Checkpoint:
    """Publish a checkpoint folder of weights alone, of no run, and return it, verified.

    Raises:
        CannotCreateError: The folder exists.
        StorageError, PermissionDeniedError: It could not be written; nothing appears.
    """
    files = {
        MODEL: safetensors_bytes(model),
        TOKENIZER: [tokenizer_json],
        STATE: [store.canonical_json({"step": 0})],
        CONFIG: [store.canonical_json({"model": shape, "precision": "float32"})],
    }
    return Checkpoint(folder, store.publish(folder, files, lambda: {"kind": "checkpoint", "step": 0, "run": {}}))


def folder_of(parent: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, whether it is there or not."""
    return parent / f"{PREFIX}{step:08d}"


def existing(parent: Path) -> list[Path]:
    """Return the folders of checkpoints, oldest first, by number."""
    folders = store.folders(parent, PREFIX)
    return sorted((path for path in folders if path.name.removeprefix(PREFIX).isdecimal()), key=step_of)


def unverified(folder: Path) -> Checkpoint:
    """Return a checkpoint by its manifest alone; its files are not read.

    Raises:
        DataError: There is no manifest, it is damaged, or no checkpoint's.
    """
    return of_manifest(folder, store.read_manifest(folder))


def verified(folder: Path) -> Checkpoint:
    """Return a checkpoint of a run after reading all of it.

    Raises:
        DataError: It is damaged, or not that of the step in its name: saves and resumes go by the name.
    """
    found = of_manifest(folder, store.verify(folder, from_disk=True))
    if found.step != step_of(folder):
        what, why = "is not the checkpoint that its name says", f"it is that of step {found.step}"
        raise DataError(what, where=str(folder), why=why, do="remove it, or give it its own name again")
    return found


def of_manifest(folder: Path, manifest: store.Json) -> Checkpoint:
    """Return what a verified manifest is the manifest of.

    Raises:
        DataError: It is no checkpoint's.
    """
    match manifest:
        case {"step": int(step), "files": {**files}} if step >= 0 and {MODEL, TOKENIZER, STATE, CONFIG} <= files.keys():
            return Checkpoint(folder, manifest)
    raise DataError("is no checkpoint", where=str(folder), why=f"{store.MANIFEST} lacks a step, or files that one has")


def has_begun(parent: Path) -> bool:
    """Return whether a run has a checkpoint to go on from, by their manifests; one that cannot be read counts as one."""
    for folder in existing(parent):
        try:
            if unverified(folder).continuable:
                return True
        except FirstwordsError:
            return True
    return False


def newest(
    parent: Path,
    notice: Notify,
    run: Mapping[str, str] | None = None,
    *,
    repeats: Callable[[Checkpoint], bool] = lambda _: False,
) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None where there is no checkpoint at all.

    Args:
        parent: The run's folder of checkpoints.
        notice: Told of each one that is passed over.
        run: The hashes of the run that goes on from here, whose lock the caller holds: checkpoints of another run and
            damaged ones are set aside, and newer ones of weights only too, or removed where none is damaged and the run
            `repeats`. None: any one's weights will do, and nothing is touched.
        repeats: Whether the run comes from a checkpoint to the same weights again; asked before anything is touched.

    Raises:
        DataError: There are checkpoints, and none is whole and of this run; nothing is touched.
        FirstwordsError: As `repeats`; nothing is touched.
    """
    refused: dict[Path, DataError] = {}
    weights_only = list[Path]()
    for folder in reversed(existing(parent)):
        try:
            found = _of_run(folder, run)
        except DataError as error:
            refused[folder] = error
            continue
        if run is not None and not found.continuable:
            weights_only.append(folder)
            continue
        keep = not repeats(found) or bool(refused)
        for damaged, reason in refused.items():
            notice(f"{reason}; " + (f"set aside as {store.set_aside(damaged).name}" if run else "an older one is used"))
        _clear(weights_only, notice, keep=keep)
        return found
    if refused:
        why, newest_refused = "; ".join(map(str, refused.values())), next(iter(refused.values()))
        do = newest_refused.do or "begin a new run with another --out"
        raise DataError("every checkpoint is damaged or of another run", where=str(parent), why=why, do=do)
    _clear(weights_only, notice, keep=True)
    return None


def _clear(weights_only: list[Path], notice: Notify, *, keep: bool) -> None:
    """Make room for what a run that goes on from before these checkpoints of weights only will save.

    A kill or a divergence came between each and the save that it belongs to, and it will be made again. To `keep` where
    what came after it is damaged, or the run goes another way: that may be the best that is left of hours.
    """
    for folder in weights_only:
        if keep:
            kept = store.set_aside(folder, "kept").name
            notice(f"{folder.name} has weights alone, from after where the run goes on: kept as {kept}")
        else:
            store.remove_folder(folder)


def _of_run(folder: Path, run: Mapping[str, str] | None) -> Checkpoint:
    """Return a verified checkpoint.

    Raises:
        DataError: As for `verified`, or it was made by another run than `run`.
    """
    found = verified(folder)
    manifest = found.manifest
    if run is not None and manifest.get("run") != run:
        theirs = manifest["run"] if isinstance(manifest.get("run"), dict) else {}
        other = ", ".join(name for name, value in run.items() if theirs.get(name) != value)
        raise DataError("was made by another run", where=str(folder), why=f"its {other} is not this run's")
    kept = manifest["files"].get(TOKENIZER, {}).get("sha256")
    if run is not None and kept != run.get("tokenizer_sha256", kept):
        why = f"its SHA-256 is {kept}, the run's is {run['tokenizer_sha256']}"
        raise DataError("is not the run's tokenizer", where=str(folder / TOKENIZER), why=why)
    return found


def weights_sha256(parent: Path, step: int) -> str:
    """Return the SHA-256 of a step's weights as its manifest has it.

    Raises:
        DataError: There is no such checkpoint, or its manifest is damaged.
    """
    return unverified(folder_of(parent, step)).weights_sha256


def best(parent: Path, notice: Notify) -> Checkpoint | None:
    """Return the checkpoint that speaks for a run: the best, or the newest where that is damaged or none is known.

    Raises:
        DataError: There are checkpoints, and every one is damaged.
    """
    found = newest(parent, notice)
    state = {} if found is None else found.json(STATE)
    best_step = state.get("best_step")
    if found is None or not isinstance(best_step, int):
        return found
    step = speaking_step(found.step, best_step, state.get("judged_step"))
    if step == found.step:
        if step != best_step:
            notice(f"the run was not judged since it began; using step {step}")
        return found
    try:
        return at_step(parent, step)
    except FirstwordsError as error:
        notice(f"{error}; using step {found.step} instead of the best")
        return found


def speaking_step(newest: int, best: int | None, judged: int | None) -> int:
    """Return the step whose weights speak for a run: the best one's, or the newest one's where none is known to be best.

    Args:
        newest: The step of the newest checkpoint.
        best: Of the best evaluation. The beginning is only where a later one was worse.
        judged: Of the last evaluation.
    """
    return newest if best is None or (best == 0 and not judged) else best


def at_step(parent: Path, step: int) -> Checkpoint:
    """Return the verified checkpoint of a step.

    Raises:
        NoInputError: There is none.
        DataError: As for `verified`.
    """
    folder = folder_of(parent, step)
    if not folder.is_dir():
        raise NoInputError("no such checkpoint", where=str(folder))
    return verified(folder)


def rotate(saved: Checkpoint, keep: int, best_step: int | None, whole: set[Path] | None = None) -> None:
    """Remove all but `saved`, the newest `keep - 1` whole ones before it, and the best; only checkpoints of its run.

    What is kept is verified first, so that a damaged one does not count; nothing is removed while fewer are whole.
    `saved` itself was read back when it was published.

    Args:
        saved: The newest.
        keep: How many whole ones stay.
        best_step: Of the one that stays wherever it is.
        whole: What the run that goes on has found whole before: it is not read again, and what is found now joins it.
    """
    whole = set() if whole is None else whole
    whole.add(saved.folder)
    others = [folder for folder in reversed(existing(saved.folder.parent)) if folder != saved.folder]
    if len(others) < keep:
        return
    kept = 1
    for folder in others:
        if kept < keep:
            if folder in whole or _is_whole(folder, saved.manifest["run"]):
                whole.add(folder)
                kept += 1
        elif step_of(folder) != best_step and _run_of(folder) == saved.manifest["run"]:
            store.remove_folder(folder)
            whole.discard(folder)


def _is_whole(folder: Path, run: Mapping[str, str]) -> bool:
    try:
        return _of_run(folder, run).continuable
    except DataError:
        return False


def _run_of(folder: Path) -> Mapping[str, str] | None:
    """Return the hashes of the run that made a checkpoint; None where its manifest does not tell."""
    try:
        run: Mapping[str, str] | None = store.read_manifest(folder).get("run")
    except DataError:
        return None
    return run


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix(PREFIX))
