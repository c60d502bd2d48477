"""Peers: what ended one process is said by all of them, and none is left behind.

A thread in each process of a world keeps in touch over the store by which the processes found each other: it shows
that its process lives, looks whether the next one does, and hears what ended another. A process that is stopped as a
whole shows nothing and cannot end itself; a clock of the system, which the thread winds, kills it.
"""

from __future__ import annotations

import atexit
import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from lmscripts import errors
from lmscripts.errors import shortened

_EVERY, _HURRIED = 1.0, 0.2  # seconds between two signs of life
_GONE = 4.0  # seconds without a sign of life, where a connection broke as well
_GRACE = (2.0, 7.0)  # seconds that a process which waits for others gets to end by itself, before and after it was told
_LEFT = b"left"
# What gloo, NCCL and the store say where a peer or the way to it has gone; all else is a fault of the program.
_OF_NETWORK = ("gloo", "nccl", "tcpstore", "socket")
_LOST = (
    "connection closed by peer", "connection reset by peer", "connection refused", "connection was likely closed",
    "broken pipe", "socket closed", "timed out", "timeout", "remote process exited", "failed to recv",
)  # fmt: skip

# What this process can say of its work: how many steps are done, and the last checkpoint.
progress: dict[str, str] = {}


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that another process is gone or silent."""
    text = str(error).lower()
    of_network = isinstance(error, dist.DistError) or any(name in text for name in _OF_NETWORK)
    return isinstance(error, RuntimeError) and of_network and any(words in text for words in _LOST)


def watch(names: Sequence[str], timeout_seconds: int) -> None:
    """Keep in touch with the other processes from here on; each process of a world calls it.

    Args:
        names: of all processes, in words, by rank.
        timeout_seconds: how long a process may be silent.
    """
    if len(names) > 1:
        errors.peers = _Peers(names, timeout_seconds)


class _Peers:
    """The other processes, as `lmscripts.errors` asks for them."""

    def __init__(self, names: Sequence[str], timeout_seconds: int) -> None:
        self._names, self._rank, self._timeout = names, dist.get_rank(), timeout_seconds
        # A connection of its own: a thread that waits for an answer keeps the others from asking.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=5))
        self._own = self._cause = ""  # what ended this process, and what ended the first of all
        self._broken: BaseException | None = None  # what this process was told in place of an answer
        self._leaves = self._alone = False
        self._passes = 0
        self._wake, self._heard = threading.Event(), threading.Event()
        self._wind = _killing_clock(timeout_seconds + 5)
        threading.Thread(target=self._keep_in_touch, name="peers", daemon=True).start()
        atexit.register(self.leave)

    # ---- asked by the process itself; the store, which may never answer, is left to the thread -----------------------

    def explain(self, error: BaseException) -> str | None:
        """What an exchange failed of and the way out, in a sentence; None for a fault of the program."""
        if not is_lost(error):
            return None
        self._wind()
        self._broken = error
        self._wake.set()
        if self._alone or not self._heard.wait(2 * _GONE):
            self._cause = f"the other processes cannot be reached any more{_when()} ({shortened(error)})"
        return self._sentence()

    def tell(self, sentence: str) -> None:
        """Let the others know what ends this process."""
        self._own = f"{self._names[self._rank]} ended: {sentence}"
        self._show()

    def leave(self) -> None:
        """Let the others know that this process ends."""
        self._leaves = True
        self._show()

    def _show(self) -> None:
        """Wait, not for long, until the thread has made a whole pass."""
        until, deadline = self._passes + 2, time.monotonic() + 2
        while self._passes < until and not self._alone and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.01)

    def _sentence(self) -> str:
        return f"{self._cause}; {progress.get('way out', 'mend that and start it again')}"

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _keep_in_touch(self) -> None:
        watched = (self._rank + 1) % len(self._names)
        sign, since, broken_since = b"", time.monotonic(), float("inf")
        with suppress(RuntimeError):  # the store is gone with the process that kept it
            while True:
                self._wind()
                trouble, seen = self._pass(watched)
                now = time.monotonic()
                broken_since = min(broken_since, now) if trouble else float("inf")
                if seen != sign or (seen == _LEFT and not trouble):
                    sign, since = seen, now
                if now - since > (_GONE if trouble else self._timeout):
                    self._declare(self._silent(watched, seen, now - since))
                elif self._broken and now - broken_since > 1.5 * _GONE:
                    self._declare(self._late())
                self._passes += 1
                self._wake.wait(_HURRIED if trouble else _EVERY)
                self._wake.clear()
        self._alone = True
        while True:
            self._wind()
            time.sleep(_EVERY)

    def _pass(self, watched: int) -> tuple[bool, bytes]:
        """Say and hear what there is; whether a connection broke anywhere, and the sign of life of the next process."""
        store, self._number = self._store, self._passes
        store.set(f"life/{self._rank}", _LEFT if self._leaves else str(self._passes))
        if self._broken:
            store.set(f"broken/{self._rank}", "1")
            store.set("broken", "1")
        if self._own:
            self._declare(self._own)
        if store.check(["cause"]):
            self._cause = self._cause or store.get("cause").decode()
            self._heard.set()
            self._end_others()
        seen = store.get(f"life/{watched}") if store.check([f"life/{watched}"]) else b""
        return store.check(["broken"]), seen

    def _declare(self, cause: str) -> None:
        """What ended the world; the first that is said stands."""
        self._store.compare_set("cause", "", cause)

    def _silent(self, rank: int, seen: bytes, seconds: float) -> str:
        if seen == _LEFT:
            return f"{self._names[rank]} ended before the others{_when()}: it says why itself"
        if seconds > 2 * _GONE:
            reason = "it was stopped, or its machine hangs or cannot be reached"
            return f"{self._names[rank]} has given no sign of life for {seconds:.0f} s{_when()}: {reason}"
        return f"{self._names[rank]} is gone{_when()}: it was killed, by hand or because memory ran out, or crashed"

    def _late(self) -> str:
        """All live: who works at something else, while the others have waited in vain?"""
        late = [name for rank, name in enumerate(self._names) if not self._store.check([f"broken/{rank}"])]
        if late and "timed out" in str(self._broken).lower():
            return f"{', '.join(late)} kept the others waiting for more than {self._timeout} s (--timeout){_when()}"
        return f"a connection between the processes broke{_when()} ({shortened(self._broken or ValueError())})"

    def _end_others(self) -> None:
        """End this process where it goes on waiting for one that has gone."""
        if not (self._own or self._leaves):
            time.sleep(_GRACE[0])
            errors.say(self._sentence())
        time.sleep(_GRACE[1])
        errors.leave(errors.WRONG)


def _when() -> str:
    return f" after step {progress['step']}" if "step" in progress else ""


def _killing_clock(seconds: int) -> Callable[[], object]:
    """Gives what winds a clock that kills this process when it was not wound for so long, also while it is stopped."""
    libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
    event = (ctypes.c_int * 16)(0, 0, signal.SIGKILL)  # struct sigevent, of kind SIGEV_SIGNAL
    if sys.platform != "linux" or libc.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(timer)) != 0:
        return lambda: None
    left = (ctypes.c_long * 4)(0, 0, seconds, 0)  # struct itimerspec: once
    return lambda: libc.timer_settime(timer, 0, left, None)
