"""Is what is on disk whole, and does training it again give the same?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from firstwords import resolve
from firstwords.config import RunConfig, run_config
from firstwords.errors import ConfigError, DataError, FirstwordsError
from firstwords.model.gpt import load_weights
from firstwords.planning import machine, process
from firstwords.runs import checkpoint, tensor_file
from firstwords.runs.folder import RunFolder
from firstwords.text import corpus as corpora
from firstwords.training import state as states
from firstwords.training.loop import forward_of, train_step
from firstwords.training.optim import learning_rate
from firstwords.training.state import TrainState


@dataclass(frozen=True)
class FolderCheck:
    """One folder on disk, and what is wrong with it."""

    name: str
    step: int | None  # of a checkpoint
    ok: bool
    problem: str = ""


@dataclass(frozen=True)
class Replay:
    """Steps that were trained again from a checkpoint, and the first difference to what the run recorded."""

    from_step: int
    to_step: int
    ok: bool
    problem: str = ""


@dataclass(frozen=True)
class Verdict:
    """Everything that was looked at."""

    checkpoints: tuple[FolderCheck, ...]
    corpus: FolderCheck
    replay: Replay | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        parts = (*self.checkpoints, self.corpus, *(() if self.replay is None else (self.replay,)))
        return all(part.ok for part in parts)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of the command line's contract."""
        return {"ok": self.ok, **asdict(self)}


def verify(run: RunFolder, replay_steps: int | None = None) -> Verdict:
    """Return what is whole and what is not: every checkpoint, the prepared text, and a replay where one is wanted.

    Args:
        run: Only read.
        replay_steps: So many steps are trained again from the newest checkpoint that has as many recorded after it.

    Raises:
        ConfigError: No checkpoint has so many recorded steps after it.
        DataError: The run's configuration, journal or prepared text cannot be read for the replay.
    """
    process.flush_denormals()
    found = [(folder, _checkpoint(folder)) for folder in checkpoint.existing(run.checkpoints)]
    checkpoints = tuple(one for folder, one in found if one.ok or folder.is_dir())  # a run that goes on removes old ones
    if not checkpoints and run.was_saved:
        problem = f"{run.checkpoints}: the run was saved, and none of its checkpoints is there"
        checkpoints = (FolderCheck(run.checkpoints.name, None, ok=False, problem=problem),)
    whole = [folder for folder, one in found if one.ok]
    return Verdict(checkpoints, _corpus(run), None if replay_steps is None else _replay(run, replay_steps, whole))


def _checkpoint(folder: Path) -> FolderCheck:
    step = checkpoint.step_of(folder)
    try:
        tensors = checkpoint.verified(folder).tensors(checkpoint.MODEL)
    except DataError as error:
        return FolderCheck(folder.name, step, ok=False, problem=str(error))
    if wrong := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        return FolderCheck(folder.name, step, ok=False, problem=f"{folder}: {wrong[0]!r} holds numbers that are not finite")
    return FolderCheck(folder.name, step, ok=True)


def _corpus(run: RunFolder) -> FolderCheck:
    try:
        folder = run.recorded_corpus()
        if folder is None:
            raise DataError("no prepared text is recorded", where=str(run.corpus))
        corpora.load(folder)
    except FirstwordsError as error:
        return FolderCheck(run.corpus.name, None, ok=False, problem=str(error))
    return FolderCheck(folder.name, None, ok=True)


def _replay(run: RunFolder, n_steps: int, whole: Sequence[Path]) -> Replay:
    """Train `n_steps` again from a checkpoint and compare each loss and gradient, and weights where both are on disk.

    Equal means equal to the last bit, which holds on the machine and with the threads of the run.

    Args:
        run: Only read.
        n_steps: At least 1.
        whole: Its checkpoints that are not damaged, oldest first.
    """
    config = run_config(run.recorded_config())
    last = max((step for step, _ in run.metrics.of_steps("step")), default=0)
    continuable = [folder for folder in whole if _is_a_start(folder)]
    if not continuable:
        return Replay(0, 0, ok=False, problem="no checkpoint to start from is whole")
    starts = [folder for folder in continuable if checkpoint.step_of(folder) + n_steps <= last]
    if n_steps < 1 or not starts:
        most = last - min(map(checkpoint.step_of, continuable))
        do = f"allowed: from 1 to {most}" if most > 0 else "no step is recorded after a checkpoint"
        raise ConfigError(f"{n_steps} steps cannot be replayed", where="--replay", do=do)
    start = starts[-1]
    later = [_fingerprint(folder) for folder in continuable if checkpoint.step_of(folder) > checkpoint.step_of(start)]
    began = later[0] if later else {}  # how the steps after it were computed; it may itself be from before a resume
    left_a_gpu = config.on_cpu and began.get("device", "cpu") != "cpu"  # a CPU may not even compute what was decided for it
    ways = ["threads", *([] if left_a_gpu else ["precision", "compile", "micro_batch_size"])]
    config = replace(config, **{way: began[way] for way in ways if way in began})
    try:
        machine.device(config.device)
    except ConfigError as error:
        do = "replay it where it was trained"
        raise ConfigError(error.what, where="--replay", why=error.why, do=do) from error
    with process.threads(config.threads):
        state = _state_at(start, config)
        try:
            found = _compare(state, config, run, state.step + n_steps, set(map(checkpoint.step_of, whole)))
        except RuntimeError as error:
            if config.compile != "on":
                raise
            why, do = str(error).strip().partition("\n")[0], "replay it where it was trained"
            raise ConfigError("its steps were compiled, which fails here", where="--replay", why=why, do=do) from error
        here = machine.fingerprint(torch.device(config.device), config.precision, config.compile)
        here["micro_batch_size"] = config.micro_batch_size
    otherwise = dict.fromkeys(filter(None, (machine.differences(began, one) for one in (*later, here))))
    if found.ok or not otherwise:
        return found
    return replace(found, problem=f"{found.problem}; it was computed otherwise: {'; '.join(otherwise)}")


def _is_a_start(folder: Path) -> bool:
    try:
        return checkpoint.unverified(folder).continuable
    except DataError:  # a run that goes on has removed it meanwhile
        return False


def _fingerprint(folder: Path) -> dict[str, Any]:
    """Return all that the bits of a run depended on when a whole checkpoint was made."""
    found = checkpoint.unverified(folder).json(checkpoint.STATE).get("fingerprint")
    return found if isinstance(found, dict) else {}


def _state_at(folder: Path, config: RunConfig) -> TrainState:
    found = checkpoint.unverified(folder)
    state = states.new_state(config.model, config.optim, config.seed, config.device, machine.DTYPES[config.precision])
    load_weights(state.model, found.tensors(checkpoint.MODEL).items(), str(folder))
    states.load_optimizer_tensors(state, found.tensors(checkpoint.OPTIMIZER))
    states.load_scalars(state, found.json(checkpoint.STATE))
    return state


def _plans(run: RunFolder) -> dict[int, int | None]:
    """Return how long the run was to be, from each step on at which that changed; None: not known yet."""
    lines = run.metrics.of_steps("plan", "resume", "start")
    return {step: line["total_steps"] for step, line in lines if isinstance(line.get("total_steps", ""), int | None)}


def _rollbacks(run: RunFolder, steps: range) -> dict[int, list[int]]:
    """Return the first and the last batch that were left out, from each of the steps on at which that was."""
    found = {}
    for step, line in run.metrics.of_steps("rollback"):
        match line:
            case {"first_batch": int(first), "last_batch": int(last)}:
                found[step] = [first, last]
            case _ if step in steps:
                what, do = "a roll-back does not say which batches it left out", "replay steps after it"
                raise DataError(what, where=str(run.metrics.path), do=do)
    return found


def _compare(state: TrainState, config: RunConfig, run: RunFolder, end: int, saved: set[int]) -> Replay:
    """Train to the step `end` and return the first difference to the journal's lines or to a checkpoint of those saved."""
    replayed = range(state.step + 1, end + 1)
    recorded = {step: line for step, line in run.metrics.of_steps("step") if step in replayed}
    plans, rollbacks = _plans(run), _rollbacks(run, range(state.step, end))
    folder = run.recorded_corpus()
    if folder is None:
        raise DataError("no prepared text is recorded", where=str(run.corpus))
    batches, fit_config = (
        states.without_skipped(resolve.batches(config, corpora.load(folder)), state),
        resolve.fit_config(config),
    )
    start, forward = state.step, forward_of(state.model, compiled=fit_config.compiled)
    while state.step < end:
        state.total_steps = plans.get(state.step, state.total_steps)
        state.skipped += [rollbacks[state.step]] if state.step in rollbacks else []
        lr = learning_rate(state.step, config.optim, state.total_steps)
        figures = train_step(state, batches(state.step), fit_config, lr, forward)
        state.step += 1
        line = recorded.get(state.step)
        if line is None:
            raise DataError(f"step {state.step} is not in it", where=str(run.metrics.path), do="replay fewer steps")
        wanted = line.get("nats_per_token"), line.get("grad_norm")
        if figures != wanted:
            problem = f"step {state.step}: loss and gradient norm are {figures}, recorded are {wanted}"
            problem += "" if config.on_cpu else "; on a GPU the last bits of a step may differ each time"
            return Replay(start, state.step, ok=False, problem=problem)
        if state.step in saved and _weights_sha256(state) != checkpoint.weights_sha256(run.checkpoints, state.step):
            return Replay(start, state.step, ok=False, problem=f"step {state.step}: other weights than its checkpoint's")
    return Replay(start, end, ok=True)


def _weights_sha256(state: TrainState) -> str:
    digest = hashlib.sha256()
    for piece in tensor_file.safetensors_bytes(state.model.tensors()):
        digest.update(piece)
    return digest.hexdigest()
