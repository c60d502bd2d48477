"""Rows for causal language models: the text as one stream, cut every `sequence_length` positions.

A document of n tokens takes n + 1 positions: the begin token and its tokens. What is predicted there is its tokens and
the end token, so every token of the store and the end of every document is a target exactly once, and no row but the
last has an empty position. Where the tokenizer has one token for both, as GPT-2's, the stream reads as documents
separated by it. Nothing is built beforehand: a row's place in the store is found by bisection.

    isolated     a document sees only itself, from where it begins in the row; its positions count from 0 there;
    contiguous   all of a row, across documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmscripts.data.arrays import fetch_soon
from lmscripts.data.masking import expand_ranges
from lmscripts.data.packing import Layout, Rows
from lmscripts.data.token_store import Part, TokenStore


@dataclass(frozen=True)
class StreamRows:
    """The rows of a part of a store; N tokens, D documents.

    Attributes:
        part: of the store.
        layout: its `begin_id` is never None; no `end_id` stands in the rows, as it is predicted only.
        text_bytes: bytes of the text of the part.
    """

    part: Part
    layout: Layout
    text_bytes: int

    @property
    def bytes_per_target(self) -> float:
        """Bytes of text that a target stands for, in the mean of the part."""
        return self.text_bytes / self.num_positions

    @property
    def num_positions(self) -> int:
        """Positions of all documents, N + D; each has one target."""
        return int(self.part.tokens.size) + self.part.num_documents

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return -(-self.num_positions // self.layout.sequence_length)

    @property
    def real_tokens(self) -> int:
        """Text tokens in all rows."""
        return int(self.part.tokens.size)

    @property
    def usual_segments(self) -> float:
        """Segments of a row in the mean: those that begin in it, and the one that goes on."""
        return 1 + (self.part.num_documents / self.num_rows if self.layout.packing == "isolated" else 0)

    def fill(self) -> float:
        """Share of the positions that are not empty."""
        return self.num_positions / (self.num_rows * self.layout.sequence_length)

    def documents_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the document in which each of (n,) places of the stream lies."""
        low = np.zeros_like(places)
        high = np.full_like(places, self.part.num_documents)
        # The begin of document d is offset[d] + d: a table of them would grow with the text.
        for _ in range(self.part.num_documents.bit_length()):
            middle = (low + high) >> 1
            begun = self.part.document_tokens[middle] + middle <= places
            low, high = np.where(begun, middle, low), np.where(begun, high, middle)
        return low

    def read(self, rows: NDArray[np.int64]) -> Rows:
        """Lay out (B,) rows, in any order. Every text token counts as a word start, as nobody asks for words here."""
        part, layout = self.part, self.layout
        if (begin_id := layout.begin_id) is None:
            raise ValueError("a stream needs a token before each document")
        length, num_rows = layout.sequence_length, rows.size
        begin = rows * length
        end = np.minimum(begin + length, self.num_positions)
        first, last = self.documents_at(begin), self.documents_at(end - 1)
        fetch_soon([(part.tokens, begin - first, length)])
        count = last - first + 1
        document, row = expand_ranges(first, count), np.repeat(np.arange(num_rows), count)
        starts, stops = (part.document_tokens[document + n] + document + n for n in (0, 1))
        inside_start, inside_stop = np.maximum(starts, begin[row]), np.minimum(stops, end[row])
        size = inside_stop - inside_start
        at = inside_start - begin[row] + row * length  # flat position of each piece
        flat = expand_ranges(at, size)
        place = expand_ranges(inside_start, size)
        target = place - np.repeat(document, size)  # token of the store that is predicted, but at a document's end

        ids, targets = (np.full(num_rows * length, layout.pad_id, np.int32) for _ in range(2))
        most = max(0, part.tokens.size - 1)
        ids[flat] = part.tokens[np.maximum(target - 1, 0)] if part.tokens.size else layout.end_id
        targets[flat] = part.tokens[np.minimum(target, most)] if part.tokens.size else layout.end_id
        begins = starts == inside_start
        ids[at[begins]] = begin_id
        ends = stops == inside_stop
        targets[(at + size - 1)[ends]] = layout.end_id
        content = np.zeros(num_rows * length, np.bool_)
        content[flat] = True
        content[at[begins]] = False

        segments = np.full(num_rows * length, -1, np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), num_rows)
        isolated = layout.packing == "isolated"
        segments[flat] = np.repeat(document - first[row], size) if isolated else 0
        if isolated:
            positions[flat] = flat - np.repeat(at, size)
        text = content.reshape(num_rows, length)
        numbers = [a.reshape(num_rows, length) for a in (ids, segments, positions, targets)]
        return Rows(numbers[0], text, text, *numbers[1:])


def open_stream(store: TokenStore, part_name: str, layout: Layout) -> StreamRows | None:
    """One part of a store as a stream for a causal model; None when the part is empty."""
    part = store.part(part_name)
    if part.tokens.size == 0:
        return None
    return StreamRows(part, layout, int(store.manifest["parts"][part_name]["text_bytes"]))
