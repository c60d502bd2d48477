"""Watching over what was started: passing signals on, ending the others when one has died, its words last."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, NamedTuple

import psutil

from lmscripts.cluster.agent import SIGNALS, SUPERVISED, VERDICT

_STOPPED_EARLY = 75
_PATIENCE = 5  # seconds in which the other nodes may end by themselves when one has died
_TO_SAVE = 120  # likewise when one has stopped early after saving
_UNTIL_KILLED = 35  # seconds from SIGTERM on; torch gives the processes of a node 30


def run_node(command: Sequence[str], environment: Mapping[str, str], *, alone: bool, from_stdin: bool) -> int:
    """Start the agent of a node and wait for it; signals go to the processes that it started.

    Args:
        command: the agent.
        environment: its environment.
        alone: it becomes the one process that there is.
        from_stdin: signals come as lines of standard input, whose end means SIGTERM.

    Returns:
        The exit code, 128 and a signal's number where it was ended by one.
    """
    supervised = {SUPERVISED: "1"} if from_stdin else {}
    stdin = subprocess.DEVNULL if from_stdin else None
    child = subprocess.Popen(command, env={**environment, **supervised}, stdin=stdin, start_new_session=True)
    ended_by: list[int] = []

    def pass_on(number: int, frame: Any = None) -> None:
        with suppress(psutil.Error, ProcessLookupError):
            if alone:
                child.send_signal(number)
            elif not _signal_children(psutil.Process(child.pid), number):
                ended_by.append(number)
                child.kill()

    _listen(pass_on)
    if from_stdin:
        threading.Thread(target=_read_signals, args=(pass_on,), daemon=True).start()
    code = child.wait()
    if alone and code < 0:  # of itself it could say nothing
        sys.stderr.write(f"error: process 0 was ended by {signal.Signals(-code).name}\n")
    return 128 + ended_by[0] if ended_by else _as_exit(code)


def _as_exit(code: int) -> int:
    return code if code >= 0 else 128 - code


def _listen(pass_on: Any) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup SIGHUP stays ignored
            signal.signal(number, pass_on)


def _signal_children(process: psutil.Process, number: int) -> bool:
    """Whether there were processes to send a signal to; none is started meanwhile."""
    process.suspend()
    children = process.children()
    for child in children:
        with suppress(psutil.Error):
            child.send_signal(number)
    process.resume()
    return bool(children)


def _read_signals(pass_on: Any) -> None:
    for line in sys.stdin:
        pass_on(signal.Signals[line.strip()])
    pass_on(signal.SIGTERM)


class NodeCommand(NamedTuple):
    """A node to start.

    Attributes:
        name: for the lines that it writes; empty leaves them as they are.
        words: its command; it reads signals from its standard input.
        folder: where it starts; None for here.
    """

    name: str
    words: Sequence[str]
    folder: str | None = None


class _Node:
    """A node that was started, and how it ended."""

    def __init__(self, node: NodeCommand) -> None:
        self.process = subprocess.Popen(
            node.words,
            cwd=node.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.prefix = f"[{node.name}] ".encode() if node.name else b""
        self.name, self.end = node.name, dict[str, Any]()
        pairs = ((self.process.stdout, sys.stdout.buffer), (self.process.stderr, sys.stderr.buffer))
        self.readers = [threading.Thread(target=self._copy, args=pair, daemon=True) for pair in pairs]
        for reader in self.readers:
            reader.start()

    def _copy(self, source: IO[bytes], target: IO[bytes]) -> None:
        for line in source:
            if line.startswith(VERDICT.encode()):
                self.end = json.loads(line.removeprefix(VERDICT.encode()))
                continue
            with suppress(BrokenPipeError):  # the work goes on where nobody reads any more
                target.write(self.prefix + line)
                target.flush()

    def send(self, number: int) -> None:
        with suppress(OSError, ValueError):
            self.process.stdin.write(f"{signal.Signals(number).name}\n".encode())  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]


def run_nodes(commands: Sequence[NodeCommand]) -> int:
    """Start nodes and wait for all; when one has died the others end, and its words come last.

    Returns:
        The exit code of the process that ended first with one, 0 where none did.
    """
    nodes = [_Node(command) for command in commands]

    def pass_on(number: int, frame: Any = None) -> None:
        for node in nodes:
            node.send(number)

    _listen(pass_on)
    failed: list[_Node] = []
    next_signal, at = [signal.SIGTERM, signal.SIGKILL], float("inf")
    while running := [node for node in nodes if node.process.poll() is None]:
        failed += [node for node in nodes if node.process.poll() and node not in failed]
        if failed and at == float("inf") and next_signal:
            at = time.monotonic() + (_TO_SAVE if failed[0].process.returncode == _STOPPED_EARLY else _PATIENCE)
        if time.monotonic() > at:
            number = next_signal.pop(0)
            for node in running:
                node.send(number)
            at = time.monotonic() + _UNTIL_KILLED if next_signal else float("inf")
        time.sleep(0.05)
    failed += [node for node in nodes if node.process.poll() and node not in failed]
    for reader in (reader for node in nodes for reader in node.readers):
        reader.join(timeout=5)
    if not failed:
        return 0
    first = next((node for node in failed if node.end and not node.end.get("of_another")), failed[0])
    code = int(first.end.get("code", _as_exit(first.process.returncode)))
    if code != _STOPPED_EARLY and (first.end or len(nodes) > 1):
        sentence = first.end.get("sentence") or f"{first.name or 'node 0'} ended with exit code {code}"
        sys.stderr.write(f"error: {sentence}\n")
        sys.stderr.flush()
    return code
