"""How a run is asked to stop: the first signal is a request, a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class StopRequest:
    """Whether and by which signal the run was asked to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __call__(self) -> str | None:
        """Return the signal's name, or None."""
        return self.signal_name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn stop signals into a request while inside; outside the main thread, where Python allows none, do nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    came = list[int]()

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in came:  # safe at any moment: checkpoints appear whole or not at all
            signal.default_int_handler(number, frame)
        came.append(number)  # others come in pairs: a system that ends sends SIGTERM and SIGHUP
        request.signal_name = request.signal_name or signal.Signals(number).name

    heard = [number for number in numbers if not _is_nohup(number)]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_nohup(number: int) -> bool:
    """Whether this is the hang-up that `nohup` has asked to ignore."""
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN


def exit_code(signal_name: str) -> int:
    """Return the exit code of a process that a signal stopped: 128 + its number."""
    return 128 + int(signal.Signals[signal_name])
