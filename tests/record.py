"""What the reliability tests proved, counted by the tests themselves and written down as a table."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
import torch

from rows import ROWS

# Every technique there is; one that no test reports on is written down as not run.
TECHNIQUES = {
    "K1": "a run is killed (SIGKILL) at random moments, half of them inside saves, and restarted until it is done: "
    "weights, losses, best step and schedule are those of a run that never stopped",
    "K2": "a save is killed at each of its system calls",
    "K3": "a save, with its rotation, is killed at each line of Python of `store` and `checkpoint`",
    "K5": "a resume (clearing up, falling back, setting aside) is killed at each of its system calls and lines",
    "K9": "negative control: one registered piece of state is not restored, and the comparison of K1 must notice",
    "R3": "a checkpoint is cut at every byte and has every byte flipped: found, and the checkpoint before is used",
    "R4": "power loss: every prefix of a run's disk operations, with those that no sync covers lost, torn or reordered",
    "R5": "each disk operation of a save fails, with each error, once and for ever: the checkpoint before stays",
    "R5-tmpfs": "a disk of 2 MB fills up while a run saves and is freed again: the run goes on and saves again",
    "R6": f"wrong inputs of {len(ROWS)} kinds: the exit code, the four parts of the message, no traceback",
    "R7": "hostile files: no code run, nothing written elsewhere, bounded memory and time",
    "R11": "NaN and Inf injected into a step: noticed before the update, weights unchanged",
}
LIMITS = """\
## What this does not say

- SIGKILL leaves what the system had taken over for writing. Only R4 speaks of power loss, and it is a model: disks that
  honour `fsync`, and a file system that may lose or reorder everything that was not synced.
- Bit-exact resume holds for one machine: the same PyTorch, NumPy, processor, threads, precision and device. A resume says
  which of them changed.
- A manifest's SHA-256 finds accidents, not an attacker who writes a new manifest.
- The guarded child lowers the risk of a pickled file from a stranger; safetensors have none of it.
- Network file systems rename and lock by other rules; Windows and macOS were not tried.
"""


@dataclass
class Row:
    """The outcome of one technique."""

    cases: int = 0
    failed: int = 0
    details: list[str] = field(default_factory=list)
    passed_kinds: set[int] = field(default_factory=set)
    failed_kinds: set[int] = field(default_factory=set)
    not_run: list[str] = field(default_factory=list)

    def all_details(self) -> list[str]:
        """Return what the tests noted, and how many kinds went well."""
        kinds = len(self.passed_kinds - self.failed_kinds)
        return sorted(self.details) + ([f"{kinds} kinds went well"] if kinds or self.failed_kinds else [])


@dataclass
class Record:
    """What is known so far, by technique."""

    rows: dict[str, Row] = field(default_factory=dict)

    def take(self, report: pytest.TestReport) -> None:
        """Count one report of a test that is marked with a technique."""
        told: dict[str, list[object]] = {"technique": [], "proved": [], "row": []}
        for name, value in report.user_properties:
            told.get(name, []).append(value)
        if not told["technique"] or (report.when != "call" and report.passed):
            return
        row = self.rows.setdefault(str(told["technique"][0]), Row())
        kinds = {int(str(number)) for number in told["row"]}
        if report.failed:
            row.failed += 1
            row.failed_kinds |= kinds
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            row.not_run.append(str(reason).removeprefix("Skipped: "))
        elif kinds:
            row.cases += 1
            row.passed_kinds |= kinds
        for proved in told["proved"]:
            assert isinstance(proved, dict)
            row.cases += int(proved["cases"])
            if proved["detail"] and proved["detail"] not in row.details:
                row.details.append(proved["detail"])

    def lines(self) -> list[str]:
        """Return the table of what was done."""
        table = ["| | what is done | cases | failed tests | |", "|---|---|---|---|---|"]
        for name, row in sorted(self.rows.items(), key=lambda item: list(TECHNIQUES).index(item[0])):
            details = "; ".join(row.all_details())
            table.append(f"| {name} | {TECHNIQUES[name]} | {row.cases:,} | {row.failed} | {details} |")
        return table

    def not_run(self) -> list[str]:
        """Return what was not done, and why."""
        absent = [f"- {name}: not part of this run" for name in TECHNIQUES if name not in self.rows]
        skipped = [f"- {name}: {reason}" for name, row in self.rows.items() for reason in sorted(set(row.not_run))]
        return absent + skipped or ["- nothing"]

    def page(self) -> str:
        """Return the whole document."""
        commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
        changed = (
            " with uncommitted changes"
            if _git("status", "--porcelain", "--untracked-files=no", "--", "src", "tests")
            else ""
        )
        machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
        made = f"Commit {commit}{changed}, {datetime.now(UTC):%Y-%m-%d}, {machine}, Python {platform.python_version()}"
        head = ["# Reliability: what was tried", "", "Written by `make reliability`; no figure here was typed by hand.", ""]
        return "\n".join(
            [
                *head,
                f"{made}, PyTorch {torch.__version__}.",
                "",
                *self.lines(),
                "",
                "Not run:",
                "",
                *self.not_run(),
                "",
                LIMITS,
            ]
        )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
