"""Which process computes which rows of which step, for every training loop, and having them ready when they are asked.

What goes into optimizer step s is a function of the rows, the seed, the batch size and s; processes, micro-batches and
a stop only decide who computes it, and when. A loop brings an order (positions of a run -> rows), and a function that
makes batches of rows; see `step_batches`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, islice, pairwise
from operator import itemgetter
from queue import Empty, Queue
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmscripts.counters import hash_counters, permute, split_shares, stream_key
from lmscripts.data.masking import expand_ranges
from lmscripts.data.packing import Layout, PackedRows, Rows, segment_ends
from lmscripts.data.stream import StreamRows

Ints = NDArray[np.int64]
Batch = dict[str, Tensor]
Counts = dict[str, float]
Made = list[tuple[Batch, Counts]]
# (rows, the epoch of each, rows of each batch) -> the batches with the counts of their targets.
MakeBatches = Callable[[Ints, Ints, list[int]], Made]
RowSource = PackedRows | StreamRows
Item = TypeVar("Item")

_TOKENS_AT_ONCE = 1 << 17  # tokens laid out and masked together
_EVAL_SEED = 0x5EED  # held-out masks are the same for every run, whatever its seed
_WINDOW_BATCHES = 50  # in which rows are put in the order of their length
_RUN, _ROWS, _BATCHES = 0x0DE, 0xF01D, 0xBA7C  # which permutation of an epoch
_DROPOUT = 0xD807  # what the keys of rows are for


# ---- orders ------------------------------------------------------------------------------------------------------


def rows_before(step: int, batch_size: int, ramp: Sequence[int] = ()) -> int:
    """Rows of the first so many steps.

    A ramp (R, N) lets the rows of a step rise from R in the first to `batch_size` in step N (counted from 0), as nearly
    in a straight line as whole rows allow; few rows a step do while the gradients of all rows still agree
    (arXiv:1812.06162, section 2).
    """
    rows, length = ramp or (batch_size, 1)
    risen = min(step, length)
    within = rows * risen + (batch_size - rows) * risen * (risen - 1) // (2 * length)
    return within + batch_size * (step - risen)


@dataclass(frozen=True)
class Shuffled:
    """Every epoch a permutation of all rows of its own; only the last step of a run, of `total_rows`, may be short."""

    num_rows: int
    batch_size: int
    total_rows: int
    seed: int
    ramp: tuple[int, ...] = ()  # see `rows_before`

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        length = self.ramp[1] if self.ramp else 0
        left = self.total_rows - rows_before(length, self.batch_size, self.ramp)
        if left >= 0:
            return length - -left // self.batch_size
        return bisect_left(range(length), self.total_rows, key=lambda n: rows_before(n, self.batch_size, self.ramp))

    def bounds(self, step: int) -> tuple[int, int]:
        """The positions [first, last) of an optimizer step."""
        first, last = (rows_before(each, self.batch_size, self.ramp) for each in (step, step + 1))
        return min(first, self.total_rows), min(last, self.total_rows)

    def rows(self, positions: Ints) -> tuple[Ints, Ints]:
        """(N,) rows at (N,) positions of a run, and (N,) the epoch of each."""
        number, seed = self.num_rows, self.seed
        return _by_epoch(positions, number, lambda epoch, rows: permute(rows, number, stream_key(seed, epoch, _RUN)))


class ByLength:
    """Rows of about the same length share a step, so that hardly any padding is computed; every epoch has all rows.

    All rows are permuted, put in the order of their length within windows of 50 batches, cut into batches, and the
    batches permuted. The last batch of an epoch's rows may be a short one.
    """

    def __init__(self, lengths: Ints, batch_size: int, seed: int) -> None:
        """Nothing is computed yet; the lengths are (R,) tokens of each row."""
        self._lengths, self._batch_size, self.seed = lengths, batch_size, seed
        self.per_epoch = -(-len(lengths) // batch_size)
        self._epoch, self._rows, self._ends = -1, lengths[:0], lengths[:0]

    def bounds(self, step: int) -> tuple[int, int]:
        """As of `Shuffled`."""
        epoch, place = divmod(step, self.per_epoch)
        ends, before = self._laid_out(epoch)[1], epoch * len(self._lengths)
        return before + (int(ends[place - 1]) if place else 0), before + int(ends[place])

    def rows(self, positions: Ints) -> tuple[Ints, Ints]:
        """As of `Shuffled`."""
        return _by_epoch(positions, len(self._lengths), lambda epoch, rows: self._laid_out(epoch)[0][rows])

    def _laid_out(self, epoch: int) -> tuple[Ints, Ints]:
        """The rows of an epoch in their order, and where each step's end, kept until another epoch is asked for."""
        if epoch == self._epoch:
            return self._rows, self._ends
        number, window = len(self._lengths), _WINDOW_BATCHES * self._batch_size
        order = permute(np.arange(number), number, stream_key(self.seed, epoch, _ROWS))
        windows = cut(order, window)
        batches = [batch for part in windows for batch in _alike(part, self._lengths[part], self._batch_size)]
        shuffled = permute(np.arange(len(batches)), len(batches), stream_key(self.seed, epoch, _BATCHES))
        batches = [batches[place] for place in shuffled]
        self._epoch, self._rows, self._ends = epoch, np.concatenate(batches), np.cumsum([len(b) for b in batches])
        return self._rows, self._ends


class InWindows:
    """As `ByLength`, but batches are permuted within their window only, and a window is laid out when it is asked for.

    So the memory does not grow with the number of rows, of which lengths need not be known beforehand. Which rows are
    in a window is chosen among all, anew in every epoch.
    """

    def __init__(self, num_rows: int, lengths: Callable[[Ints], Ints], batch_size: int, seed: int) -> None:
        """Nothing is computed yet; `lengths` gives the (N,) lengths of (N,) rows."""
        self.num_rows, self._lengths, self._batch_size, self.seed = num_rows, lengths, batch_size, seed
        self.per_epoch = -(-num_rows // batch_size)
        self._window = lru_cache(maxsize=8)(self._laid_out)

    def bounds(self, step: int) -> tuple[int, int]:
        """As of `Shuffled`."""
        epoch, place = divmod(step, self.per_epoch)
        window, place = divmod(place, _WINDOW_BATCHES)
        before = epoch * self.num_rows + window * _WINDOW_BATCHES * self._batch_size
        ends = self._window(epoch, window)[1]
        return before + (int(ends[place - 1]) if place else 0), before + int(ends[place])

    def rows(self, positions: Ints) -> tuple[Ints, Ints]:
        """As of `Shuffled`."""
        return _by_epoch(positions, self.num_rows, self._of_epoch)

    def _of_epoch(self, epoch: int, places: Ints) -> Ints:
        windows, inside = np.divmod(places, _WINDOW_BATCHES * self._batch_size)
        for window in np.unique(windows):
            here = windows == window
            inside[here] = self._window(epoch, int(window))[0][inside[here]]
        return inside

    def _laid_out(self, epoch: int, window: int) -> tuple[Ints, Ints]:
        """The rows of a window in their order, and where each step's end in it."""
        size = _WINDOW_BATCHES * self._batch_size
        places = np.arange(window * size, min((window + 1) * size, self.num_rows))
        rows = permute(places, self.num_rows, stream_key(self.seed, epoch, _ROWS))
        batches = _alike(rows, self._lengths(rows), self._batch_size)
        order = permute(np.arange(len(batches)), len(batches), stream_key(self.seed, epoch, _BATCHES, window))
        batches = [batches[place] for place in order]
        return np.concatenate(batches), np.cumsum([len(batch) for batch in batches])


def _alike(rows: Ints, lengths: Ints, batch_size: int) -> list[Ints]:
    """Rows in batches of like length."""
    return cut(rows[np.argsort(lengths, kind="stable")], batch_size)


def _by_epoch(positions: Ints, num_rows: int, rows_of: Callable[[int, Ints], Ints]) -> tuple[Ints, Ints]:
    """(N,) rows at (N,) positions, which go on from one epoch of all rows into the next, and (N,) the epoch of each."""
    epochs, rows = np.divmod(positions, num_rows)
    several = (epochs != epochs[:1]).any()
    for epoch in np.unique(epochs) if several else epochs[:1]:
        here = epochs == epoch if several else slice(None)
        rows[here] = rows_of(int(epoch), rows[here])
    return rows, epochs


def cut(rows: Ints, size: int) -> list[Ints]:
    """Rows in pieces of a size, the last one shorter."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


Order = Shuffled | ByLength | InWindows


# ---- steps -------------------------------------------------------------------------------------------------------


def step_batches(
    order: Order,
    make: MakeBatches,
    *,
    shares: Sequence[int],
    process: int,
    micro_batch_size: int,
    first: int,
    stop: int,
    at_once: int = 1,
    aligned: bool = False,
) -> Iterator[tuple[list[Batch], Counts]]:
    """Micro-batches of one process for the steps [first, stop), with the counts of their targets.

    Each batch also has "row_keys", (B, 2) int32, of the seed and the rows' places in the run: dropout is drawn by them,
    see `lmscripts.models.dropout`.

    A step's rows are divided in proportion to the shares of the processes. A process without rows in a step computes
    one row that weighs nothing, so that all take part in what the processes exchange: its floating-point numbers, which
    are what positions and rows count, are all 0. Where processes are `aligned` all compute as many micro-batches as the
    one with the most rows, be it such rows. Making several micro-batches `at_once` is several times faster for short
    ones.
    """
    key = np.array(stream_key(order.seed, _DROPOUT), np.uint64)

    def pieces() -> Iterator[tuple[int, int, int]]:
        """Micro-batches as (step, position of the first row, rows); no rows for an idle process."""
        for step in range(first, stop):
            begin, end = order.bounds(step)
            parts = split_shares(end - begin, list(shares))
            place = begin + sum(parts[:process])
            # The fewest micro-batches that do, as even as possible.
            most = max(parts) if aligned else parts[process]
            for size in split_shares(parts[process], [1] * max(1, -(-most // micro_batch_size))):
                yield step, place if size else begin, size
                place += size

    def made(pieces: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, tuple[Batch, Counts]]]:
        while chunk := list(islice(pieces, at_once)):
            sizes = [max(1, size) for _, _, size in chunk]
            places = expand_ranges(np.array([place for _, place, _ in chunk]), np.array(sizes))
            rows, epochs = order.rows(places)
            keys = hash_counters(key, places.astype(np.uint64)).view(np.int32).reshape(-1, 2)
            keys_of = np.split(keys, np.cumsum(sizes)[:-1])
            for (step, _, size), (batch, counts), own in zip(chunk, make(rows, epochs, sizes), keys_of, strict=True):
                batch["row_keys"] = torch.from_numpy(own)
                if size == 0:
                    counts = dict.fromkeys(counts, 0.0)
                    for tensor in batch.values():
                        if tensor.is_floating_point():
                            tensor.zero_()
                yield step, (batch, counts)

    for _, group in groupby(made(pieces()), key=itemgetter(0)):
        batches, counts = zip(*(one for _, one in group))
        yield list(batches), {name: sum(some[name] for some in counts) for name in counts[0]}


# ---- packed rows: phases of a run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Packed rows of one stretch of steps, whose steps count from 0.

    Attributes:
        train: rows of the training part. held_out: those of the validation part, if it has any.
        make: (source, rows, epochs, seed, rows of each batch) -> batches with their counts, see the objectives.
        slots: prediction slots of a row.
        words: what is predicted, for people.
        seed: decides order and masks.
        batch_size: rows of an optimizer step over all processes.
        ramp: of the first steps, which have fewer, see `rows_before`.
        total_rows: rows of the stretch; its last step may be smaller than the others.
        shares: rows of each process in a full step.
        micro_batch_size: most rows of one forward pass.
        most_eval_rows: held-out rows to evaluate on, at most.
        same_keys: where rows may hold several segments, batches that need no mask have "segments" too, so that what was
            compiled for one batch is for all.
        pin_memory: put batches where a GPU can fetch them without blocking.
        whole: how many times as large the text is of which `train` is a sample.
        aligned: all processes make the same number of forward passes.
        is_tried: nobody said how many rows one forward pass has: as many as fit, see `lmscripts.training.passes`.
    """

    train: RowSource
    held_out: RowSource | None
    make: Callable[[RowSource, Ints, Ints, int, list[int]], Made]
    slots: int
    words: str
    seed: int
    batch_size: int
    total_rows: int
    shares: list[int]
    micro_batch_size: int
    most_eval_rows: int
    same_keys: bool = False
    pin_memory: bool = False
    whole: float = 1.0
    aligned: bool = False
    is_tried: bool = False
    ramp: tuple[int, ...] = ()

    @property
    def order(self) -> Shuffled:
        """Which rows are in which step."""
        return Shuffled(self.train.num_rows, self.batch_size, self.total_rows, self.seed, self.ramp)

    @property
    def layout(self) -> Layout:
        """How documents lie in rows."""
        return self.train.layout

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stretch."""
        return self.order.num_steps

    @property
    def num_eval_rows(self) -> int:
        """Held-out rows to evaluate on; 0 without a validation part."""
        return 0 if self.held_out is None else min(self.most_eval_rows, self.held_out.num_rows)

    def step_batches(
        self, first: int, stop: int, process: int, shares: Sequence[int] = ()
    ) -> Iterator[tuple[list[Batch], Counts]]:
        """Micro-batches of one process for the steps [first, stop) of the stretch, see `step_batches`.

        The rows are divided as the shares say, which need not sum to anything; without, as those of the stretch.
        """
        return step_batches(
            self.order,
            lambda rows, epochs, sizes: self._pinned(self.train, rows, epochs, self.seed, sizes),
            shares=shares or self.shares,
            process=process,
            micro_batch_size=self.micro_batch_size,
            first=first,
            stop=stop,
            at_once=max(1, _TOKENS_AT_ONCE // (self.layout.sequence_length * self.micro_batch_size)),
            aligned=self.aligned,
        )

    def eval_batch(self, rows: Ints) -> tuple[Batch, Counts]:
        """Held-out rows by number, with masks that never change."""
        if self.held_out is None:
            raise ValueError("this phase has no held-out rows")
        return fixed_batch(self.held_out, self._pinned, rows)

    def _pinned(self, *asked: Any) -> Made:
        """What `make` gives, where asked in page-locked memory, which a GPU fetches without blocking."""
        made = self.make(*asked)
        for batch, _ in made if self.same_keys and self.layout.packing == "isolated" else ():
            if "segments" not in batch:
                batch["segments"] = torch.zeros_like(batch["position_ids"])
        if not self.pin_memory:
            return made
        return [({name: tensor.pin_memory() for name, tensor in batch.items()}, counts) for batch, counts in made]


def fixed_batch(
    source: RowSource, make: Callable[[RowSource, Ints, Ints, int, list[int]], Made], rows: Ints
) -> tuple[Batch, Counts]:
    """Rows by number as one batch, with the masks that all evaluations have."""
    return make(source, rows, np.zeros_like(rows), _EVAL_SEED, [rows.size])[0]


@dataclass(frozen=True)
class Phases:
    """The rows of a run as a function of the step, phase after phase.

    BERT was trained on rows of 128 tokens for nine tenths of its steps and on rows of 512 for the rest
    (arXiv:1810.04805, appendix A.2). Every phase packs the same text anew, or has a store of its own.

    Attributes:
        phases: the rows of each phase, whose steps count from 0.
    """

    phases: Sequence[Phase]

    @property
    def ends(self) -> list[int]:
        """The step after the last of each phase."""
        return list(accumulate(phase.num_steps for phase in self.phases))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return self.ends[-1]

    @property
    def longest(self) -> Phase:
        """The phase with the longest rows, for which the model is built."""
        return max(self.phases, key=lambda phase: phase.layout.sequence_length)

    def of_step(self, step: int) -> Phase:
        """The phase of a step; the last one for a step after the end."""
        return self._place(step)[0]

    def positions(self, step: int) -> int:
        """Positions of an optimizer step over all processes."""
        phase, place = self._place(step)
        first, last = phase.order.bounds(place)
        return (last - first) * phase.layout.sequence_length

    def _place(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and which of its steps it is."""
        number = min(bisect_right(self.ends, step), len(self.phases) - 1)
        return self.phases[number], step - [0, *self.ends][number]

    def is_due(self, step: int, every: int | str) -> bool:
        """Whether what is done every so many steps, or at the end of every "epoch", is done after so many steps."""
        if step == 0 or not isinstance(every, str):
            return step == 0 or step % int(every) == 0
        phase, place = self._place(step - 1)
        before, after = (rows // phase.train.num_rows for rows in phase.order.bounds(place))
        return after > before

    def step_batches(
        self, first: int, stop: int, process: int, shares: Sequence[int] = ()
    ) -> Iterator[tuple[list[Batch], Counts]]:
        """As `Phase.step_batches`, for the steps [first, stop) of the run."""
        for (begin, end), phase in zip(pairwise([0, *self.ends]), self.phases, strict=True):
            if first < end and begin < stop:
                yield from phase.step_batches(max(first, begin) - begin, min(stop, end) - begin, process, shares)

    def prefetch(
        self, first: int, stop: int, process: int, shares: Sequence[int] = ()
    ) -> Prefetcher[tuple[list[Batch], Counts]]:
        """As `step_batches`, made in the background, a few steps ahead."""
        return Prefetcher(self.step_batches(first, stop, process, shares))


def cut_rows(
    rows: Rows, sizes: list[int], arrays: dict[str, NDArray[Any]], several: NDArray[np.bool_], usual: float | None
) -> list[Batch]:
    """Laid out rows as batches, with what keeps their documents apart.

    Args:
        rows: N rows of T tokens.
        sizes: rows of each batch, B; they sum to N.
        arrays: (N, ...) what else is in a batch, by name.
        several: (N,) whether a row holds more than one segment; a batch of none that does needs no mask.
        usual: segments of a row in the mean, where batches need "segment_ends" (for varlen attention): of twice as
            many there is room; None where not.

    Returns:
        For each batch: position_ids (B, T) int32, segments (B, T) int32 unless none is needed, segment_ends int32
        where they are asked for, and the arrays.
    """
    arrays = arrays | {"position_ids": rows.positions, "segments": rows.segments}
    batches = list[Batch]()
    for end, size in zip(accumulate(sizes), sizes):
        batch = {name: torch.from_numpy(array[end - size : end]) for name, array in arrays.items()}
        if usual is not None:
            batch["segment_ends"] = segment_ends(rows.segments[end - size : end], round(2 * usual * size))
        if not several[end - size : end].any():
            del batch["segments"]
        batches.append(batch)
    return batches


# ---- in the background -------------------------------------------------------------------------------------------


class Prefetcher(Iterator[Item]):
    """Runs an iterator in a thread, a few items ahead; its errors are raised where the items are taken."""

    def __init__(self, items: Iterator[Item], depth: int = 3) -> None:
        self._made: Queue[Any] = Queue(depth - 1)  # and the one that the thread has in hand
        self._closed, self._thread = False, Thread(target=self._make, args=(items,), daemon=True)
        self._thread.start()

    def _make(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                self._made.put((item, None))
                if self._closed:
                    return
            self._made.put((None, StopIteration()))
        except BaseException as error:
            self._made.put((None, error))

    def __next__(self) -> Item:
        item, error = self._made.get()
        if error is not None:
            self._made.put((None, error))  # what ends the iterator stays there, to be raised again
            raise error
        return item  # type: ignore[no-any-return]

    def close(self) -> None:
        """Stop the thread."""
        self._closed = True
        while self._thread.is_alive():
            with suppress(Empty):  # it may wait for a place
                self._made.get(timeout=0.01)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Start copying a batch to the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
