"""The one pool of worker processes: results in order, few items held at a time, and no worker outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, TypeVar

from lmscripts.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

DIED = "a worker process died{where}; if memory ran out, give fewer --num_workers"


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    *,
    alone: float = 0.0,
    tick: Callable[[], None] = lambda: None,
    place: Callable[[Item], Callable[[], str]] = lambda item: str,
    if_died: str = DIED,
) -> Iterator[Result]:
    """Yield `function` of each item, in the order of the items, computed by several processes.

    Args:
        function: given to each worker once, so that it may keep what is costly to make; must be possible to pickle.
        items: taken as they are needed, about twice as many as there are workers at a time.
        num_workers: processes; with one or fewer, or for a single item, all is done in this one.
        alone: seconds for which this process works alone before it starts others, whose start takes as long.
        tick: called in this process about every second, and at each result, while workers work.
        place: called as an item is taken, gives what names its place in the text, should a worker die.
        if_died: the sentence of the `UserError` then.

    What `function` raises is raised here, also that of a later item.
    """
    taken = ((item, place(item)) for item in items)
    until = time.monotonic() + alone
    for item, _ in taken if num_workers > 1 and alone else ():
        yield function(item)
        if time.monotonic() > until:
            break
    first = list(islice(taken, 2)) if num_workers > 1 else []
    if len(first) < 2:  # a process takes seconds to begin
        yield from (function(item) for item, _ in chain(first, taken))
        return
    # Not forked: a child would keep the threads' locks of whatever runs here, and files locked that this process locks.
    spawn = multiprocessing.get_context("spawn")
    asked, asking = spawn.Pipe(duplex=False)
    with ProcessPoolExecutor(num_workers, spawn, _start, (function, asked)) as pool:
        waiting: deque[Future[Result]] = deque()
        places: deque[Callable[[], str]] = deque()
        try:
            for item, where in chain(first, taken):
                places.append(where)
                with _not_interrupted():  # workers inherit it, which are being made here
                    waiting.append(pool.submit(_call, item))
                if len(waiting) > 2 * num_workers:
                    yield _first(pool, waiting, tick)
                    places.popleft()
            while waiting:
                yield _first(pool, waiting, tick)
                places.popleft()
        except BrokenProcessPool:
            found = places[0]() if places else ""
            raise UserError(if_died.format(where=found and f" on the text {found}")) from None
        finally:
            asking.close()
            pool.shutdown(cancel_futures=True)
            asked.close()


@contextmanager
def _not_interrupted() -> Iterator[None]:
    """An interrupt from the keyboard comes after the block; what is started in it has none."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _first(pool: ProcessPoolExecutor, waiting: deque[Future[Result]], tick: Callable[[], None]) -> Result:
    """The result of the first one, unless another has failed by then."""
    while True:
        wait([waiting[0]], timeout=1)
        tick()
        for future in waiting:
            if future.done() and (error := future.exception()):
                raise error
        if waiting[0].done():
            return waiting.popleft().result()
        _notice_the_dead(pool)


def _notice_the_dead(pool: ProcessPoolExecutor) -> None:
    """Let the pool see that a worker has died in the middle of handing over its result.

    The pool's thread waits for the rest of it then, and for ever, as the other workers and this process could still
    write into the same pipe. The pool is lost either way.
    """
    workers = list((getattr(pool, "_processes", None) or {}).values())
    if any(worker.exitcode is not None for worker in workers):
        for worker in workers:
            worker.kill()
        pool._result_queue._writer.close()  # type: ignore[attr-defined]


# ---- in a worker -------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start(function: Callable[[Any], Any], asked: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(function=function, asked=asked)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(item: Any) -> Any:
    return _worker["function"](item)


def given_up() -> bool:
    """Whether the parent wants no result any more: what works long on one item asks now and then, and raises."""
    return bool(_worker) and bool(_worker["asked"].poll())
