"""Peers: how the loss of another process shows, what is left of the work, and the end of a process that was stopped."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time

from lmscripts.errors import WRITER

# What gloo, NCCL and the launcher's store say where another process or the way to it has gone.
_OF_NETWORK = ("gloo", "nccl", "tcpstore", "socket")
_LOST = (
    "connection closed by peer", "connection reset by peer", "connection refused", "connection was likely closed",
    "broken pipe", "socket closed", "timed out", "timeout", "remote process exited", "failed to recv",
)  # fmt: skip

# How far this process is, for sentences: `step` that is done, `checkpoint` that is whole.
progress: dict[str, object] = {}


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that another process is gone or silent; all else may be a fault of the program."""
    text = str(error).lower()
    of_network = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    of_network |= any(name in text for name in _OF_NETWORK)
    return isinstance(error, RuntimeError) and of_network and any(words in text for words in _LOST)


def loss(what: str, why: str = "") -> str:
    """A sentence on the loss of a process, where it finds this one, and how to go on."""
    step = f" after step {progress['step']:,}" if "step" in progress else ""
    way_out = "mend that and start again"
    if "checkpoint" in progress:
        way_out = f"the last checkpoint is {progress['checkpoint']}: go on with --do_continue"
    return f"{what}{step}{why and f': {why}'}; {way_out}"


class Clock:
    """Kills this process where it is stopped as a whole, which can then neither work nor end, as others cannot tell it.

    The system keeps the clock; a thread winds it, which stops with the process.
    """

    def __init__(self, seconds: int) -> None:
        """Begin; the process may be stopped for so many seconds."""
        self._libc, self._timer, self._seconds = ctypes.CDLL(None), ctypes.c_void_p(), seconds
        self._is_ending = False
        event = (ctypes.c_int * 16)(0, 0, signal.SIGKILL)  # struct sigevent of kind SIGEV_SIGNAL
        if sys.platform == "linux":
            self._libc.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(self._timer))
            threading.Thread(target=self._wind, daemon=True).start()

    def _wind(self) -> None:
        while True:
            is_last = self._is_ending and not _is_writing()
            self._set()
            if is_last:
                return
            time.sleep(1)

    def _set(self) -> None:
        self._libc.timer_settime(self._timer, 0, (ctypes.c_long * 4)(0, 0, self._seconds, 0), None)  # struct itimerspec

    def end_within(self, seconds: int) -> None:
        """This process is about to end; where that hangs, it is killed, but not while it writes a checkpoint."""
        self._seconds, self._is_ending = seconds, True
        if sys.platform == "linux":
            self._set()


def _is_writing() -> bool:
    return any(thread.name == WRITER for thread in threading.enumerate())
