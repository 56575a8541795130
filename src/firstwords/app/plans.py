"""A plan in words: what could be trained, what is expected of a run, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from firstwords.app.words import count, duration

if TYPE_CHECKING:
    from firstwords.planning.plan import Candidate, Plan
    from firstwords.recorder import TrainResult

RISKS = {"low": "hardly", "some": "in part", "high": "likely"}  # will the text be learnt by heart?


def text_lines(found: Plan) -> list[str]:
    """Return the lines that say what the text is and what the machine has."""
    text, free = found.text, found.machine.get("free_bytes")
    documents = count(text["n_documents"], "document")
    repeated = f"{text['repeated']:.0%} of it repeats what stood before"
    scripts = ", ".join(f"{name} {share:.0%}" for name, share in text["scripts"].items()) or "no letters"
    tokens = ", ".join(f"{n_tokens:,} ({name})" for name, n_tokens in text["tokens"].items())
    memory = "" if free is None else f", {free / 1e9:.1f} GB of memory free"
    return [
        f"text      {text['n_bytes']:,} bytes in {documents}; {scripts}; {repeated}",
        f"tokens    about {tokens}",
        f"machine   {count(found.machine['threads'], 'thread')}, {found.machine['precision']}{memory}",
    ]


def row(candidate: Candidate, *, with_time: bool) -> tuple[str, ...]:
    """Return a candidate's cells: its speed, or with a target its time."""
    memory = "" if candidate.memory_bytes is None else f"{candidate.memory_bytes / 1e9:.1f} GB"
    expected = candidate.expected if candidate.has_time else None
    return (
        f"{candidate.preset} {candidate.tokenizer}",
        str(candidate.batch_size),
        memory + ("" if candidate.fits else " !"),
        duration(candidate.elapsed_s) if with_time else f"{candidate.tokens_per_s:,.0f}" if candidate.has_time else "",
        f"{candidate.steps:,}" if candidate.has_time else "none",
        f"{candidate.epochs:.1f}" if candidate.has_time else "",
        "" if expected is None else f"{expected.low:.2f}-{expected.high:.2f}" + ("*" if expected.beyond else " "),
        RISKS[candidate.by_heart] if candidate.has_time else "",
    )


def taken(found: Plan) -> str:
    """Return which candidate is recommended."""
    best = found.recommended
    return "none of them" if best is None else f"{best.tokenizer}, {best.preset}, batch {best.batch_size}"


def command(found: Plan, best: Candidate, text: Sequence[str], encoding: str | None) -> list[str]:
    """Return the command that trains what is recommended; without a target, a run takes the same by itself."""
    flags = {"--for": time_flag(best.elapsed_s), "--encoding": encoding, "--preset": best.preset if found.target else None}
    given = [part for name, value in flags.items() if value is not None for part in (name, value)]
    return ["firstwords", "train", *text, *given]


def expectation(predicted: Mapping[str, Any] | None) -> list[str]:
    """Return the line that says what is expected of a run."""
    if predicted is None:
        return []
    bits = predicted["bits_per_byte"]
    good = "" if bits is None else f", {bits[0]:.2f} to {bits[2]:.2f} bits per byte held out"
    memory = "" if predicted["memory_bytes"] is None else f", {predicted['memory_bytes'] / 1e9:.1f} GB of memory"
    rough = " (rough: " + "; ".join(predicted["beyond"]) + ")" if predicted["beyond"] else ""
    steps, took = count(predicted["steps"], "step"), duration(predicted["elapsed_s"])
    return [f"plan   about {steps}, {predicted['epochs']:.1f} epochs, {took}{memory}{good}{rough}"]


def comparison(result: TrainResult, predicted: Mapping[str, Any]) -> str:
    """Return what was predicted against what came of it."""
    bits, memory = predicted["bits_per_byte"], result.memory_bytes
    parts = [
        f"{count(predicted['steps'], 'step')} (came to {result.steps:,})",
        f"{duration(predicted['elapsed_s'])} ({duration(result.elapsed_s)})",
    ]
    if predicted["memory_bytes"] is not None:
        parts.append(f"{predicted['memory_bytes'] / 1e9:.2f} GB" + ("" if memory is None else f" ({memory / 1e9:.2f})"))
    if bits is not None and result.bits_per_byte is not None:
        came, (low, _, high) = result.bits_per_byte, bits
        missed = "" if low <= came <= high else ", better than that" if came < low else ", worse than that"
        parts.append(f"{low:.2f} to {high:.2f} bits per byte ({came:.3f}{missed})")
    return ", ".join(parts)


def time_flag(seconds: float) -> str:
    """Return a time as the command line takes it: `90s`, `3m`."""
    whole = max(1, math.ceil(seconds))
    return f"{whole // 60}m" if whole % 60 == 0 else f"{whole}s"
