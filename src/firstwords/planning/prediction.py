"""How good will it be? Held-out bits per byte as a range, from the text and the plan, by a law fitted to our own runs.

The law has the form that is known of large models, a floor and two powers, one of what is learnt from, one of the size, of
which the greater decides:

    bits per byte = h'^g * (e + ((a d^-b)^(1/b) + (n (N / 10^6)^-m)^(1/b))^b) * u^(-r sqrt(c)) * exp(-i - t)
    h' = h min(1, U / 2^21)^s,    d = D' / 10^6,    u = min(D, U) / 10^6
    D' = U + U R* (1 - exp(-(E - 1) / R*))    for E = D / U > 1 epochs, else D

h is the text's own difficulty (`planning.difficulty`), which seems larger where less than two megabytes could be seen;
what a small text lacks is in D' already. c is the share of its passages that stood somewhere before, to the letter: the
more of such a text is read, the more of the rest is known, and no more where it is read again; that term is our own, as
is the last: i counts where a model begins with heads that copy (`model.induction`), t where its table begins with what
stands beside each token (`model.neighbours`) and, as the model has a head of its own, louder; one that is the head too
gains little. N parameters, D bytes of text learnt from, repetitions included, U bytes of the training text: bytes, so
that the law does not depend on how a tokenizer counts. The two powers: Kaplan et al. 2020 (arXiv:2001.08361, eq. 1.5); the
floor: Hoffmann et al. 2022 (arXiv:2203.15556, eq. 2), whose plain sum of the powers promises a small model too much of a
long run. That a text read again and again is worth ever less: Muennighoff et al. 2023 (arXiv:2305.16264, eq. 5). The
coefficients are those of small models in minutes, fitted by benchmarks/prediction.py to runs of this program;
`prediction.json` holds them, with their date.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firstwords import reading

LAW = Path(__file__).with_name("prediction.json")
MILLION = 1e6
ENOUGH_BYTES = 1 << 21  # of a text, to see how hard it is
MOST_BYTES = 1e13  # no plan is looked for beyond
# Of a text that the law is fitted to: what consists of copies follows another law. Of the texts that were tried, the one
# with the most has 0.39 in one sample of it and 0.43 in another; the next, generated code with 0.45, comes to a third of
# what is foretold.
MOST_REPEATED = 0.44
UNTRIED = 3.0  # factors of e for which what is unlike in kind counts


@dataclass(frozen=True)
class Situation:
    """What a prediction depends on."""

    difficulty: float  # bits a byte
    text_bytes: float  # of the training text: U
    read_bytes: float  # learnt from, repetitions included: D
    parameters: float  # N
    repeated: float = 0.0  # share of the text: c
    induction_heads: bool = False  # whether the model begins with them
    table_from_text: bool = False  # and with such a table, beside a head of its own

    @property
    def epochs(self) -> float:
        """How often the text is read."""
        return self.read_bytes / max(1.0, self.text_bytes)


@dataclass(frozen=True)
class Prediction:
    """Held-out bits per byte, four times of five from low to high; and in what the plan lies beyond all that was tried."""

    low: float
    mid: float
    high: float
    beyond: tuple[str, ...] = ()

    def at_most(self, bits: float) -> Prediction:
        """Return the range without what is above so many bits per byte."""
        return replace(self, low=min(self.low, bits), mid=min(self.mid, bits), high=min(self.high, bits))

    @property
    def range(self) -> list[float]:
        """Low, mid and high, as JSON has them."""
        return [round(bits, 3) for bits in (self.low, self.mid, self.high)]


@dataclass(frozen=True)
class Law:
    """The coefficients, named as in the formula, how far runs lay from them, and where they were."""

    g: float
    e: float
    a: float
    b: float
    n: float
    m: float
    s: float
    repeats: float  # R*
    r: float
    i: float
    t: float
    spread: float  # four of five runs lay within a factor of exp(+-spread), each text predicted without its own runs
    tried: Mapping[str, tuple[float, float]]  # the least and the most of each of a situation's numbers
    widening: float  # added to the spread for each factor of e beyond what was tried

    def bits(self, at: Situation) -> float:
        """Return what is most likely."""
        learnt = effective_bytes(at.read_bytes, at.text_bytes, self.repeats) / MILLION
        powers = self.a * learnt**-self.b, self.n * (at.parameters / MILLION) ** -self.m
        gap = sum(power ** (1 / self.b) for power in powers) ** self.b
        difficulty = at.difficulty * min(1.0, at.text_bytes / ENOUGH_BYTES) ** self.s
        begun = self.i * at.induction_heads + self.t * at.table_from_text
        read = min(at.read_bytes, at.text_bytes) / MILLION
        known = read ** (-self.r * math.sqrt(at.repeated)) * math.exp(-begun)
        return float(difficulty**self.g * (self.e + gap) * known)

    def predict(self, at: Situation, untried: tuple[str, ...] = ()) -> Prediction:
        """Return the range; it is wider for what lies beyond all that was tried, and says so.

        Args:
            at: The situation.
            untried: What else is unlike all that was tried.
        """
        outside = {name: self._outside(name, value) for name, value in numbers(at).items()}
        spread = self.spread + self.widening * (sum(map(abs, outside.values())) + UNTRIED * len(untried))
        bits = self.bits(at)
        beyond = tuple(BEYOND_PHRASES[name][by > 0] for name, by in outside.items() if by)
        return Prediction(bits * math.exp(-spread), bits, bits * math.exp(spread), (*beyond, *untried))

    def _outside(self, name: str, value: float) -> float:
        """Return by how many factors of e a number is above (or, negative, below) what was tried."""
        least, most = self.tried[name]
        return math.log(max(value, 1e-9) / min(max(value, least), most))

    def text_for(self, bits: float, at: Situation) -> float | None:
        """Return from how many bytes a model must learn to be as good as that, most likely; None: from no number."""
        low, high = 1.0, MOST_BYTES

        def reached(read_bytes: float) -> bool:
            return self.bits(replace(at, read_bytes=read_bytes)) <= bits

        if not reached(high):
            return None
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high


# What is said of a number below, or above, what was tried.
SHORTER_RUN = "a shorter run than any that was tried"
BEYOND_PHRASES = {
    "difficulty": ("a text as easy as none that was tried", "a text as hard as none that was tried"),
    "text_bytes": ("a smaller text than any that was tried", "a larger text than any that was tried"),
    "read_bytes": (SHORTER_RUN, "a longer run than any that was tried"),
    "parameters": ("a smaller model than any that was tried", "a larger model than any that was tried"),
    "epochs": ("", "a text read more often than any that was tried"),
}


def numbers(at: Situation) -> dict[str, float]:
    """Return the numbers of a situation by which it is within what was tried, or not; less than one epoch is one."""
    return {
        "difficulty": at.difficulty,
        "text_bytes": at.text_bytes,
        "read_bytes": at.read_bytes,
        "parameters": at.parameters,
        "epochs": max(1.0, at.epochs),
    }


def effective_bytes(read_bytes: float, text_bytes: float, repeats: float) -> float:
    """Return how many bytes, each read for the first time, those of a text that is read again and again are worth."""
    again = read_bytes / text_bytes - 1
    return read_bytes if again <= 0 else text_bytes * (1 + repeats * -math.expm1(-again / repeats))


@functools.cache
def law() -> Law:
    """Return the law that comes with the package."""
    found: dict[str, Any] = json.loads(reading.read_bytes(LAW))
    tried = {name: (float(least), float(most)) for name, (least, most) in found["tried"].items()}
    return Law(**found["coefficients"], spread=found["spread"], widening=found["widening"], tried=tried)
