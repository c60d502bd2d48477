"""Sliding windows over documents for the score of a causal model, made when they are needed.

At a stride of 1 there is a window for every token of a text, so what is kept grows with the documents only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmscripts.data.token_store import Part
from lmscripts.errors import UserError

_LENGTH_STEP = 16  # rows are padded to a multiple of this, so that rows of similar lengths share a batch

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Numbered windows over documents, those of one padded length side by side, the longest first.

    A document of n tokens has n + 1 positions: its inputs are the begin token and its tokens, its targets the tokens
    and the end token. Kept are runs: windows of one document that follow one another and have one padded length. All
    windows of a document but its last are full, so it has two runs at most.

    Attributes:
        block_size: positions of a full window.
        stride: positions from one window to the next.
        positions: (D,) of each document.
        document: (R,) of each run.
        number: (R,) place of a run's first window among those of its document.
        padded: (R,) length of a run's windows with padding.
        first: (R + 1,) number of a run's first window; at the end the number of all windows.
    """

    block_size: int
    stride: int
    positions: IntArray
    document: IntArray
    number: IntArray
    padded: IntArray
    first: IntArray

    def __len__(self) -> int:
        return int(self.first[-1])

    def between(self, first: int, last: int) -> tuple[IntArray, ...]:
        """(W,) document, start in it, length, positions that only give context, padded length of [first, last)."""
        window = np.arange(first, last)
        run = np.searchsorted(self.first, window, side="right") - 1
        document, number = self.document[run], self.number[run] + window - self.first[run]
        start = number * self.stride
        length = np.minimum(self.block_size, self.positions[document] - start)
        scored_from = np.where(number == 0, 0, self.block_size - self.stride)
        return document, start, length, scored_from, self.padded[run]

    def batches(self, positions: int, most_rows: int) -> Batches:
        """Batches of windows of one padded length each.

        Args:
            positions: of a batch, at most; one window is always taken.
            most_rows: of a batch.
        """
        begins = np.flatnonzero(np.diff(self.padded, prepend=-1))
        first = np.append(self.first[begins], len(self))
        rows = np.maximum(1, np.minimum(positions // self.padded[begins], most_rows))
        return Batches(first, rows, np.concatenate([[0], np.cumsum(-(-np.diff(first) // rows))]))


@dataclass(frozen=True)
class Batches:
    """Batches of windows, by number; each is the first and the last + 1 of its windows.

    Attributes:
        first: (G + 1,) first window of each group of one padded length; at the end the number of all windows.
        rows: (G,) windows of a batch of the group.
        before: (G + 1,) batches before each group; at the end the number of all batches.
    """

    first: IntArray
    rows: IntArray
    before: IntArray

    def __len__(self) -> int:
        return int(self.before[-1])

    def __getitem__(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no batch {number} of {len(self)}")
        group = int(np.searchsorted(self.before, number, side="right")) - 1
        rows = int(self.rows[group])
        begin = int(self.first[group]) + (number - int(self.before[group])) * rows
        return begin, min(int(self.first[group + 1]), begin + rows)


def slide(part: Part, block_size: int, stride: int) -> Windows:
    """Windows of `block_size` positions that begin every `stride` positions; each target is scored exactly once.

    All of the first window is scored, of every further one what no earlier window reached: with at least
    block_size - stride positions before it.

    Raises:
        UserError: the stride is not in [1, block_size].
    """
    if not 1 <= stride <= block_size:
        raise UserError(f"--stride must lie between 1 and --block_size {block_size}, got {stride}")
    positions = np.diff(part.document_tokens) + 1
    full = np.maximum(0, -(-(positions - block_size) // stride))  # windows before the last one
    rest = positions - full * stride
    of_rest = np.minimum(block_size, -(-rest // _LENGTH_STEP) * _LENGTH_STEP)
    several = np.flatnonzero(full)
    document = np.concatenate([several, np.arange(positions.size)])
    number = np.concatenate([np.zeros_like(several), full])
    padded = np.concatenate([np.full_like(several, block_size), of_rest])
    size = np.concatenate([full[several], np.ones_like(full)])
    order = np.lexsort((number, document, -padded))
    first = np.concatenate([[0], np.cumsum(size[order])])
    return Windows(block_size, stride, positions, document[order], number[order], padded[order], first)


def window_rows(
    part: Part, windows: Windows, first: int, last: int, begin_id: int, end_id: int
) -> tuple[IntArray, IntArray, IntArray]:
    """The windows [first, last), of one padded length T, as rows.

    Returns:
        (B, T) inputs, padded with the end token; (N,) flat positions that are scored, in order; (N,) their targets.
    """
    document, start, length, scored_from, padded = (each[:, None] for each in windows.between(first, last))
    at = np.arange(int(padded[0, 0]))
    place = start + at  # position in the document
    offset = part.document_tokens[document]
    size = part.document_tokens[document + 1] - offset
    most = max(0, part.tokens.size - 1)
    tokens = part.tokens if part.tokens.size else np.zeros(1, np.int64)
    inputs = np.where(place == 0, begin_id, tokens[np.clip(offset + place - 1, 0, most)].astype(np.int64))
    targets = np.where(place == size, end_id, tokens[np.clip(offset + place, 0, most)].astype(np.int64))
    inputs = np.where(at < length, inputs, end_id)
    scored = np.flatnonzero((at >= scored_from) & (at < length))
    return inputs, scored, targets.reshape(-1)[scored]
