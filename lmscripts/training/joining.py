"""Joining: the processes of a run find each other before any input is read, and what one finds wrong ends them all.

They meet at the key-value store of their launcher, by no collective operation: so one may read or tokenise for hours
while the others wait, and none waits for a dead one longer than the timeout.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import metadata
from itertools import groupby, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml

from lmscripts.cluster.announced import NODES, WORLD_SIZE, announced_nodes
from lmscripts.errors import AllAgree, OfAnother, UserError, end_with, sentence_of, shortened
from lmscripts.files import file_sha256
from lmscripts.options.checks import duration_text
from lmscripts.options.yaml_text import shown
from lmscripts.training import peers
from lmscripts.training.sharding import refuse_others

_TICK = 0.5  # seconds between two looks of the watching thread
_GRACE = 8  # seconds that others get to hear of a problem, and then to end by themselves
_GONE = 4  # seconds without a sign of life after which a process is gone, where an exchange with it failed as well
_CLOCKS = 60  # seconds that the clocks of two machines may differ
_OF_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what `accelerate launch` and torchrun set


class _Ended(BaseException):
    """Another process has told why all end; not an Exception, which what is going on might swallow."""


class World:
    """The processes that met.

    Attributes:
        rank: of this process.
        hosts: name of the machine of each process.
        machines: of each process, the same text for those of one machine only.
        timeout: seconds that a process may keep the others waiting.
        notices: sentences for the user.
        hint: what may help where the inputs of another machine than the main one's are no good.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: int) -> None:
        """Begin to watch."""
        self.rank, self.hosts, self.machines, self.notices = rank, [""] * size, [""] * size, list[str]()
        self.timeout, self.hint = timeout, ""
        self._store, self._size, self._rounds = store, size, 0
        self._told, self._is_ending, self._over = "", False, threading.Event()
        self._failed: tuple[BaseException, float] | None = None  # an exchange, and when
        self._heard, self._clock = threading.Event(), peers.Clock(timeout + 5)
        self._earlier = signal.signal(signal.SIGUSR2, self._interrupt)
        threading.Thread(target=self._watch, daemon=True).start()

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """What all processes give, as JSON, by rank; all call it, however long the others take as long as they live.

        Raises:
            UserError: the others exchange something else, as their options differ.
        """
        self._rounds += 1
        keys = [f"{self._rounds}/{rank}" for rank in range(self._size)]
        self._store.set(keys[self.rank], json.dumps([what, value]))
        while not self._store.check(keys):
            time.sleep(0.05)
        everyone = [json.loads(self._store.get(key)) for key in keys]
        check_same("what is done next", [each[0] for each in everyone], "start every machine with the same options")
        return [each[1] for each in everyone]

    def silent(self, seconds: float) -> list[int]:
        """Ranks of which nothing was heard for so many seconds, in which this process itself was not stopped."""
        return [rank for rank, (_, ticks) in enumerate(self._beats) if ticks * _TICK > seconds and rank != self.rank]

    def _watch(self) -> None:
        """Show that this process lives, look whether the others do, and whether one has told a problem."""
        self._beats, number = [("", 0)] * self._size, 0
        keys = [f"beat/{rank}" for rank in range(self._size)]
        with suppress(RuntimeError):  # the store has gone with the machine that held it: the main thread notices
            while not self._over.wait(_TICK):
                number += 1
                self._store.set(keys[self.rank], str(number))
                every = 1 if self._failed else 4
                if number % every == 0:
                    if self._store.check(keys):  # one question, as there may be many processes
                        now = [str(beat) for beat in self._store.multi_get(keys)]
                    else:
                        now = [str(self._store.get(key)) if self._store.check([key]) else "" for key in keys]
                    before = self._beats
                    self._beats = [(new, ticks + every if new == old else 0) for new, (old, ticks) in zip(now, before)]
                if self._failed or self.silent(self.timeout):
                    self._look()
                if self._store.check(["problem"]):
                    self._hear(self._store.get("problem").decode())
                    return

    def _look(self) -> None:
        """Tell which process is gone, or keeps the others waiting."""
        error, since = self._failed or (None, time.monotonic())
        problem = ""
        for rank in self.silent(_GONE if error else self.timeout):
            self._store.set(f"heard/{rank}", "")  # nobody waits for it
            if self._beats[rank][1] * _TICK < 2 * _GONE:
                why = "it was killed, by hand or because memory ran out, or crashed"
                problem = peers.loss(f"{who(rank)} is gone", why)
            else:
                why = f"after {self.timeout} s (--timeout), it was stopped, or its machine hangs or cannot be reached"
                problem = peers.loss(f"{who(rank)} gives no sign of life any more", why)
        if not problem and time.monotonic() - since > 1.5 * _GONE:
            late = [who(rank) for rank in range(self._size) if not self._store.check([f"failed/{rank}"])]
            problem = peers.loss("the connection between two processes broke", shortened(error or ValueError()))
            if late and "timed out" in str(error).lower():
                what = f"{' and '.join(late)} kept the others waiting for more than {self.timeout} s (--timeout)"
                problem = peers.loss(what)
        elif error:
            self._store.set(f"failed/{self.rank}", "")
        if problem:
            self._store.compare_set("problem", "", problem)

    def explain(self, error: BaseException) -> str:
        """What an exchange with the others failed of; the store, which may never answer, is left to the thread."""
        self._is_ending, self._failed = True, (error, time.monotonic())
        self._clock.end_within(14)
        if not self._heard.wait(_GRACE):
            return peers.loss("the other processes cannot be reached any more", shortened(error))
        return self.tell(self._told)

    def _hear(self, problem: str) -> None:
        """End this process with what another one told, from the main thread if that is not waiting for a device."""
        self._told = problem
        self._heard.set()
        self._store.set(f"heard/{self.rank}", "")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        # One that ends by itself waits so long for a sign that the others heard it, and has its own reason.
        if not self._over.wait(1.5 * _GRACE if self._is_ending else _GRACE):
            end_with(problem, 2, of_another=True)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._told and not self._is_ending:
            raise _Ended

    def tell(self, sentence: str) -> str:
        """Tell all others why this one ends, unless another was first; what all end with."""
        self._is_ending = True
        self._clock.end_within(14)
        with suppress(RuntimeError):  # nobody is there any more
            first: str = self._store.compare_set("problem", "", sentence).decode()
            self._store.set(f"heard/{self.rank}", "")  # who tells something at the same moment waits for it
            waited_for = [f"heard/{rank}" for rank in range(self._size) if rank != self.rank]
            until = time.monotonic() + _GRACE
            while not self._store.check(waited_for) and time.monotonic() < until:
                time.sleep(0.05)  # the store may go with this process
            return first
        return self._told or sentence

    def part(self) -> str:
        """Stop watching; what another process told meanwhile, empty for nothing."""
        self._is_ending = True
        self._over.set()
        if self._earlier is not signal.SIG_DFL:  # else the thread's signal, if it is under way, would kill this process
            signal.signal(signal.SIGUSR2, self._earlier)
        return self._told


_world: World | None = None


def world() -> World | None:
    """The processes that met; None of one alone."""
    return _world


def who(rank: int) -> str:
    """A process in words, with the name of its machine."""
    return f"process {rank} (host {_world.hosts[rank] if _world and _world.hosts[rank] else socket.gethostname()})"


@contextmanager
def join(expected_processes: int | None = None, timeout_seconds: int | None = None) -> Iterator[None]:
    """Meet the processes that the launcher started; what ends one of them with an error in the block ends them all.

    Scripts read their options in the block, so that a mistake in those of one machine is said on all.

    Args:
        expected_processes: the announced size of the world; None takes what the line or the file of `--config` says,
            or LMS_EXPECTED_WORLD_SIZE.
        timeout_seconds: how long to wait for the others, and later for a sign of life of one; None takes what the line
            or the file says, or 600.

    Raises:
        UserError: the world is not the announced one, or what a process raised, on each of them, with its name.
    """
    global _world
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1 or _world is not None:
        refuse_others()
        check_number(expected_processes or _said("expected_processes"))
        yield
        return
    expected_processes = expected_processes or _said("expected_processes")
    _world = met = _meet(timeout_seconds or _said("timeout") or 600)
    try:
        with _telling(met):
            refuse_others()
            _check(met, _of_number(launched, expected_processes))
            yield
    except _Ended:  # also where this one was about to tell something itself
        raise OfAnother(met.part()) from None
    finally:
        met.part()
        _world = None


@contextmanager
def _telling(met: World) -> Iterator[None]:
    """What goes wrong in the block is told to the others, and raised as what all end with."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if peers.is_lost(error) or isinstance(error, OfAnother):
            raise OfAnother(met.explain(error)) from None
        sentence, is_fault = sentence_of(error)
        if met.machines[met.rank] != met.machines[0]:
            sentence += met.hint
        said = sentence if isinstance(error, AllAgree) else f"{who(met.rank)}: {sentence}"
        told = met.tell(said)
        if is_fault:  # of the program, which keeps its traceback
            raise
        raise (UserError if told == said else OfAnother)(told) from None
    except SystemExit as stop:  # the parser has said what is wrong here
        if stop.code and isinstance(stop.__context__, UserError):
            met.tell(f"{who(met.rank)}: {stop.__context__}")
        raise


def _said(name: str) -> int | None:
    """A whole number that the line or the file of `--config` gives for an option, before options are parsed."""
    of_file = None
    for word, following in pairwise([*sys.argv[1:], ""]):
        option, _, value = word.partition("=")
        option, value = option.replace("-", "_"), value or following
        if option == f"__{name}" and value.isdecimal():
            return int(value)
        if option == "__config" and Path(value).is_file():
            # The parser says what is wrong with it.
            with suppress(OSError, ValueError, RecursionError, yaml.YAMLError, AttributeError):
                of_file = yaml.safe_load(Path(value).read_text(encoding="utf-8")).get(name)
    return of_file if isinstance(of_file, int) else None


def _meet(timeout: int) -> World:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what goes wrong is said in words, not by stacks of C++
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
        called = _call(PrefixStore("lmscripts", store), rank, size, timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"not all of {os.environ['WORLD_SIZE']} processes joined at {where}: {shortened(error)}. Is that the "
            "address of the first machine, given on every machine and reachable from there (firewall, interface)? Was "
            "every machine told the right number of GPUs of all others, and was every one started?"
        ) from None
    return World(PrefixStore(f"lmscripts/{called}", store), rank, size, timeout)


def _call(store: Any, rank: int, size: int, timeout: int) -> str:
    """A name for these very processes, as a store may still hold what earlier ones left that a launcher started again.

    Raises:
        RuntimeError: not all have come.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + timeout
    keys, name = [f"here/{other}" for other in range(size)], ""
    store.set(keys[rank], own)
    while not (name and store.check([f"go/{name}"])):
        if rank == 0 and store.check(keys):
            names = [store.get(key).decode() for key in keys]  # maybe of earlier ones: these do not answer
            name = hashlib.sha256("".join(names).encode()).hexdigest()[:16]
            for each in names:
                store.set(f"name/{each}", name)
        if store.check([f"name/{own}"]):
            name = store.get(f"name/{own}").decode()
            store.set(f"yes/{name}/{rank}", "")
        if rank == 0 and name and store.check([f"yes/{name}/{other}" for other in range(size)]):
            store.set(f"go/{name}", "")
        if time.monotonic() > until:
            missing = [other for other in range(size) if not store.check([f"yes/{name}/{other}"])]
            raise RuntimeError(f"nothing was heard of process {' and '.join(map(str, missing))} for {timeout} s")
        time.sleep(0.02)
    return name


# ---- who started this one, and how many were meant ------------------------------------------------------------------


def launcher() -> int | None:
    """The process number of the launcher that started this process; None where it was started otherwise.

    A shell that exports a launcher's variables is none: under nohup it ends, and the run has to go on.
    """
    with suppress(psutil.Error):
        words = psutil.Process(os.getppid()).cmdline()
        if any(name in os.environ for name in _OF_LAUNCHERS) and any(
            name in word for name in ("accelerate", "torch", "launch.py") for word in words
        ):
            return os.getppid()
    return None


def _words_of_launcher() -> list[str]:
    with suppress(psutil.Error):
        if parent := launcher():
            return list(psutil.Process(parent).cmdline())
    return []


def is_elastic() -> bool:
    """Whether machines may come and go, as under torchrun with --nnodes MIN:MAX."""
    given = os.environ.get("PET_NNODES", "")
    for word, following in pairwise([*_words_of_launcher(), ""]):
        name, _, value = word.partition("=")
        given = (value or following) if name == "--nnodes" else given
    fewest, _, most = given.partition(":")
    return most not in ("", fewest)


def job() -> str:
    """Names the job of a launcher that may start its processes again; empty under none."""
    name, parent = os.environ.get("TORCHELASTIC_RUN_ID", ""), launcher()
    if name != "none":
        return name
    return f"{socket.gethostname()} {parent} {psutil.Process(parent).create_time()}" if parent else ""


def asked_of_launcher() -> int:
    """Processes that the line or the file of `accelerate launch` asks for, if that started this one; else 1."""
    words, of_line, of_file = _words_of_launcher(), "", ""
    words = words[words.index("launch") :] if "launch" in words else []
    for word, following in pairwise([*words, ""]):
        if word.endswith(".py"):
            break  # what comes now is for the script
        name, _, value = word.removeprefix("--").partition("=")
        if name == "config_file" and (file := Path(value or following)).is_file():
            of_file = str((yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("num_processes", ""))
        elif name in ("num_processes", "num-processes"):
            of_line = value or following
    return int(asked) if (asked := of_line or of_file).isdecimal() else 1


# ---- what is compared ----------------------------------------------------------------------------------------------


def check_number(expected: int | None) -> None:
    """Refuse a number of processes that is not the announced one, see `join`."""
    if problem := _of_number(int(os.environ.get("WORLD_SIZE", "1")), expected):
        raise UserError(problem)


def _of_number(launched: int, expected: int | None) -> str:
    """What is wrong with the number of processes, as this one sees it; empty for nothing."""
    if launched == 1 and (asked := asked_of_launcher()) > 1:
        return (
            f"accelerate launch was asked for {asked} processes and started one, as it does with --cpu, with MULTI_CPU "
            "and where there is no GPU: give --config_file accelerate_configs/cpu_2proc.yaml"
        )
    announced = expected or int(os.environ.get(WORLD_SIZE) or 0) or launched
    if launched == announced or is_elastic():
        return ""
    return (
        f"{announced} processes were announced but {launched} were started: with several machines, num_processes in "
        "each machine's Accelerate config is its own number of processes times the number of machines, and "
        "--other_gpus of launch.py is what all other machines have together"
    )


def _check(met: World, problem: str) -> None:
    """Tell the others what this process is, and compare.

    Raises:
        UserError: on every process, of the first difference in what decides results.
    """
    from lmscripts.training.log import versions

    facts: dict[str, Any] = {"problem": problem, "host": socket.gethostname(), "cluster": os.environ.get(NODES, "")}
    facts |= {
        "node": os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID", "0"),
        "versions": versions() | _of_program(),
    }
    everywhere = met.exchange("facts", facts)
    nodes = announced_nodes()
    met.hosts = [each["host"] for each in everywhere]
    met.machines = [f"{each['host']} {each['node']}" for each in everywhere]
    if sum(node.processes for node in nodes) == len(everywhere):
        met.hosts = [node.host for node in nodes for _ in range(node.processes)]
    clocks = met.exchange("clock", time.time())  # all at the same moment, as all have waited for the last
    if problems := [each["problem"] for each in everywhere if each["problem"]]:
        raise AllAgree(problems[0])
    check_same("LMS_CLUSTER", [each["cluster"] for each in everywhere], "give every machine the same cluster file")
    if nodes:
        _check_nodes([each["node"] for each in everywhere], [node.processes for node in nodes])
    for name in everywhere[0]["versions"]:
        full = [each["versions"].get(name, "not there") for each in everywhere]
        way_out = "install the same on every machine"
        check_same(name, [_deciding(name, value) for value in full], way_out)
        if len(set(full)) > 1:
            met.notices.append(difference(name, full))
    for rank, clock in enumerate(clocks):
        if abs(off := clock - clocks[0]) > _CLOCKS:
            raise AllAgree(
                f"the clock of {who(rank)} is {duration_text(abs(off))} {'ahead of' if off > 0 else 'behind'} that of "
                f"{who(0)}: set it (timedatectl set-ntp true)"
            )


def _check_nodes(nodes: Sequence[str], announced: Sequence[int]) -> None:
    """Refuse machines that started another number of processes than was announced for them."""
    started = [len(list(group)) for _, group in groupby(nodes)]
    if started != list(announced):
        hosts = [node.host for node in announced_nodes()]
        raise AllAgree(
            f"the machines {', '.join(hosts)} started {shown(started)} processes, but {shown(announced)} were "
            "announced: correct the cluster file, or the numbers of GPUs given to launch.py"
        )


def _of_program() -> dict[str, str]:
    """Hashes of this project's code and of the script, which decide results as versions do."""
    package = Path(__file__).parents[1]
    files = [file for file in sorted(package.rglob("*.py")) if package / "shipped" not in file.parents]
    hashes = "".join(file_sha256(file) for file in files)
    found = {"lmscripts": f"{metadata.version('lmscripts')} ({hashlib.sha256(hashes.encode()).hexdigest()[:12]})"}
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    return found | ({script.name: file_sha256(script)[:12]} if script.is_file() else {})


def _deciding(name: str, version: str) -> str:
    """The part of a version that decides results: of Python not its last number, nor for which GPUs a build is."""
    return version.rpartition(".")[0] if name == "python" else version.partition("+")[0]


def difference(name: str, values: Sequence[Any]) -> str:
    """Which processes have another value than most, in words; where there are as many, than the first."""
    common = max(values, key=lambda value: (values.count(value), value == values[0]))
    odd = next(value for value in values if value != common)
    ranks = [rank for rank, value in enumerate(values) if value == odd]
    others = [rank for rank, value in enumerate(values) if value == common]
    if values.count(common) == 1:
        return f"{name} is {values[0]} on {who(0)} but {odd} on {who(ranks[0])}"
    whole = f"the {len(others)} others" if len(others) + len(ranks) == len(values) else f"{len(others)} others"
    return f"{name} is {odd} on {' and '.join(map(who, ranks))} but {common} on {whole}"


def check_same(name: str, values: Sequence[Any], way_out: str) -> None:
    """Refuse a difference between processes, which all see alike.

    Raises:
        UserError: naming the processes, their machines and both values.
    """
    if any(value != values[0] for value in values):
        raise AllAgree(f"{difference(name, values)}: {way_out}")
