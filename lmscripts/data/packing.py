"""Rows: packed sequences of a fixed length, cut from a token store and described by a memory-mapped index.

A row is filled with consecutive text. A document that does not fit goes on in the next row, cut at the start of a
word; every token of the store is in exactly one row of an epoch. Two ways:

    isolated     each document's piece is a segment of its own, [CLS] tokens [SEP], and attends only to itself;
    contiguous   one [CLS], then pieces each closed by [SEP], all of a row attending to each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmscripts.data.masking import expand_ranges
from lmscripts.data.token_store import Part, TokenStore
from lmscripts.errors import UserError
from lmscripts.files import new_folder

Packing = Literal["isolated", "contiguous"]
INDEX_VERSION = 1
_MIN_PIECE = 4  # a shorter gap at the end of a row is left empty rather than filled with a sliver of a document
_CHUNK = 1 << 16  # segments held in memory while an index is built


@dataclass(frozen=True)
class Layout:
    """How documents are laid into rows.

    Attributes:
        sequence_length: tokens per row, T.
        packing: see the module's docstring.
        begin_id: id put before a segment (isolated) or before a row (contiguous); None for none.
        end_id: id put after each segment.
        pad_id: id of the positions that stay empty.
    """

    sequence_length: int
    packing: Packing
    begin_id: int | None
    end_id: int
    pad_id: int

    @property
    def lead_of_segment(self) -> int:
        """Special tokens before a segment's text."""
        return int(self.begin_id is not None and self.packing == "isolated")

    @property
    def lead_of_row(self) -> int:
        """Special tokens before the first segment of a row."""
        return int(self.begin_id is not None and self.packing == "contiguous")

    @property
    def most_real_tokens(self) -> int:
        """The most text tokens a row can hold."""
        return self.sequence_length - self.lead_of_row - self.lead_of_segment - 1


@dataclass(frozen=True)
class RowIndex:
    """Which tokens each row holds. R rows, S segments; memory-mapped.

    Attributes:
        first_segment: (R + 1,) int64 offsets into the segments.
        segment_start: (S,) int64 offset of the segment's first token in the store.
        segment_length: (S,) int32 text tokens of the segment.
        real_tokens: text tokens in all rows.
    """

    first_segment: NDArray[np.int64]
    segment_start: NDArray[np.int64]
    segment_length: NDArray[np.int32]
    real_tokens: int

    @cached_property
    def most_segments(self) -> int:
        """Segments of the row that has the most."""
        return int(np.diff(self.first_segment).max())

    @property
    def num_rows(self) -> int:
        """Number of rows, R."""
        return int(self.first_segment.size - 1)


@dataclass(frozen=True)
class Rows:
    """Rows as arrays. B rows, T tokens.

    Attributes:
        ids: (B, T) int32.
        content: (B, T) bool, True at text tokens.
        word_starts: (B, T) bool.
        segments: (B, T) int32, 0, 1, ... per row; what may attend to each other. Empty positions hold -1.
        positions: (B, T) int32, position within the segment.
        targets: (B, T) int32, what a causal model is to predict at each position; None for rows of the other kind.
    """

    ids: NDArray[np.int32]
    content: NDArray[np.bool_]
    word_starts: NDArray[np.bool_]
    segments: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32] | None = None


def segment_ends(segments: Tensor, capacity: int) -> Tensor:
    """(capacity,) int32 cumulative lengths 0, l1, l1 + l2, ... of the segments of all rows, for varlen attention.

    The empty end of a row counts as a segment. Unused entries repeat the total, so the shape does not depend on the
    number of segments.

    Args:
        segments: (B, T) integers.
        capacity: at least the number of segments + 1.
    """
    changes = torch.ones_like(segments, dtype=torch.bool)
    changes[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = changes.reshape(-1).nonzero().squeeze(1)
    ends = torch.full((capacity,), segments.numel(), dtype=torch.int32, device=segments.device)
    ends[: starts.numel()] = starts.to(torch.int32)
    return ends


@dataclass(frozen=True)
class PackedRows:
    """The rows of a part of a store, as its index says."""

    part: Part
    index: RowIndex
    layout: Layout

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.index.num_rows

    @property
    def real_tokens(self) -> int:
        """Text tokens in all rows."""
        return self.index.real_tokens

    @property
    def most_segments(self) -> int:
        """Segments of the row that has the most, its empty end counted as one."""
        return self.index.most_segments + 1

    def fill(self) -> float:
        """Share of the positions that hold a text token or a special token that belongs to one."""
        index, layout = self.index, self.layout
        segments = index.segment_start.size
        used = index.real_tokens + segments * (1 + layout.lead_of_segment) + index.num_rows * layout.lead_of_row
        return used / (index.num_rows * layout.sequence_length)

    def read(self, rows: NDArray[np.int64]) -> Rows:
        """Lay out (B,) rows, in any order."""
        return read_rows(self.part, self.index, rows, self.layout)


def _pieces(part: Part, layout: Layout) -> Iterator[tuple[int, int, bool]]:
    """Segments in order: (first token, length, whether it begins a row)."""
    length, lead, row_lead = layout.sequence_length, layout.lead_of_segment, layout.lead_of_row
    used, new_row = row_lead, True
    offsets = part.document_tokens
    for document in range(part.num_documents):
        begin, end = int(offsets[document]), int(offsets[document + 1])
        flags = part.word_starts(begin, end).tobytes() if end - begin > length - used - lead - 1 else b""
        at = begin
        while at < end:
            room = length - used - lead - 1
            rest = end - at
            size = rest
            if rest > room:
                # Cut before the last word that does not fit whole; a word longer than the room is cut itself
                # only where it would not fit an empty row either.
                cut = flags.rfind(1, at - begin + 1, at - begin + room + 1) if room >= _MIN_PIECE else -1
                size = cut - (at - begin) if cut >= 0 else room
                if room < _MIN_PIECE or (cut < 0 and used > row_lead):
                    used, new_row = row_lead, True
                    continue
            yield at, size, new_row
            used += lead + size + 1
            new_row = False
            at += size
            if at < end:
                used, new_row = row_lead, True


def build_row_index(part: Part, layout: Layout, folder: Path) -> RowIndex:
    """Build the index of a part and layout as files in a new folder, in time linear and memory constant in the text.

    Raises:
        UserError: the sequence length is too short for any text, or the folder exists.
    """
    if layout.most_real_tokens < 2 * _MIN_PIECE:
        raise UserError(f"sequence length {layout.sequence_length} is too short for rows of text")
    firsts: list[int] = []
    starts: list[int] = []
    sizes: list[int] = []
    segments = rows = real = 0
    names = ("first_segment", "segment_start", "segment_length")
    with new_folder(folder) as aside:
        files = [(aside / f"{name}.bin").open("wb") for name in names]

        def flush() -> None:
            for file, values, dtype in zip(files, (firsts, starts, sizes), (np.int64, np.int64, np.int32), strict=True):
                file.write(np.array(values, dtype).tobytes())
                values.clear()

        for start, size, new_row in _pieces(part, layout):
            if new_row:
                firsts.append(segments)
                rows += 1
            starts.append(start)
            sizes.append(size)
            segments += 1
            real += size
            if len(starts) >= _CHUNK:
                flush()
        firsts.append(segments)
        flush()
        for file in files:
            file.close()
        facts = {"version": INDEX_VERSION, "rows": rows, "segments": segments, "real_tokens": real}
        (aside / "index.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return _open_index(folder)


def _open_index(folder: Path) -> RowIndex:
    facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    expected: dict[str, tuple[str, int]] = {"first_segment": ("int64", facts["rows"] + 1)}
    expected |= {"segment_start": ("int64", facts["segments"]), "segment_length": ("int32", facts["segments"])}
    return RowIndex(**open_arrays(folder, expected), real_tokens=facts["real_tokens"])


def open_arrays(folder: Path, expected: Mapping[str, tuple[str, int]]) -> dict[str, NDArray[Any]]:
    """Arrays of a folder, mapped into memory, by name; `expected` says of each its dtype and size.

    Raises:
        UserError: a file has another size; it names the folder to remove, which is then made anew.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, (dtype, size) in expected.items():
        path = folder / f"{name}.bin"
        if path.stat().st_size != size * np.dtype(dtype).itemsize:
            raise UserError(f"{path} has {path.stat().st_size} bytes, expected {size} numbers; remove {folder}")
        arrays[name] = np.asarray(np.memmap(path, dtype, mode="r")) if size else np.zeros(0, dtype)
    return arrays


def built_once(cache_dir: Path, name: str, what: Sequence[Any], build: Callable[[Path], Any]) -> Path:
    """The folder NAME-HASH inside of `cache_dir`, built on first use and then reused; `what` it is goes into the hash.

    Several processes may ask at once. Of those that a launcher started on one machine, the first builds and the others
    wait for the folder to appear; else each builds aside and the first to rename wins.
    """
    folder = cache_dir / f"{name}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"
    while not folder.is_dir() and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(0.1)  # if the builder fails, the launcher ends this process as well
    if not folder.is_dir():
        try:
            build(folder)
        except (UserError, OSError):
            if not folder.is_dir():
                raise
    return folder


def rows_dir(store: TokenStore) -> Path:
    """Where rows of a store are kept: inside of it or, where it may not be written, among the temporary files."""
    if os.access(store.folder, os.W_OK):
        return store.folder / "rows"
    return Path(tempfile.gettempdir()) / f"lmscripts_rows_{store.fingerprint[:16]}"


def row_index(part: Part, store_fingerprint: str, layout: Layout, cache_dir: Path) -> RowIndex:
    """The index of a part and layout, see `built_once`."""
    what = [INDEX_VERSION, store_fingerprint, part.folder.name, layout.sequence_length, layout.packing]
    what += [layout.lead_of_segment, layout.lead_of_row]
    name = f"{part.folder.name}-{layout.packing}-{layout.sequence_length}"
    return _open_index(built_once(cache_dir, name, what, lambda folder: build_row_index(part, layout, folder)))


def open_rows(store: TokenStore, part_name: str, layout: Layout) -> PackedRows | None:
    """Rows of one part of a store by their index, which is built on first use; None when the part is empty."""
    part = store.part(part_name)
    if part.tokens.size == 0:
        return None
    return PackedRows(part, row_index(part, store.fingerprint, layout, rows_dir(store)), layout)


def read_rows(part: Part, index: RowIndex, rows: NDArray[np.int64], layout: Layout) -> Rows:
    """Lay out the given rows; vectorised over all of them.

    Args:
        part: of the store.
        index: of the part in this layout.
        rows: (B,) row numbers, in any order.
        layout: the layout.
    """
    num_rows, length = rows.size, layout.sequence_length
    lead, row_lead = layout.lead_of_segment, layout.lead_of_row
    first = index.first_segment[rows]
    count = index.first_segment[rows + 1] - first
    before = np.cumsum(count) - count
    segment = expand_ranges(first, count)
    row = np.repeat(np.arange(num_rows), count)
    size = index.segment_length[segment].astype(np.int64)
    full = lead + size + 1
    # Flat position of each segment: rows are whole, so what stands before it in its row decides.
    total = np.cumsum(full)
    row_base = (total - full)[before]
    at = total - full - row_base[row] + row * length + row_lead

    # First as if each row were its first segment alone: then it is one piece of the store. The further segments, and
    # rows at the very ends of the store, are laid over it token by token.
    start = index.segment_start[segment]
    ids, word_starts, inside = _pieces_of_store(part, start[before] - lead - row_lead, length)
    is_first = np.zeros(segment.size, np.bool_)
    is_first[before] = True
    further = np.flatnonzero(~is_first)
    again = np.flatnonzero(~(is_first & inside[row]))
    covered, source = expand_ranges(at[again] + lead, size[again]), expand_ranges(start[again], size[again])
    flat_ids, flat_starts = ids.reshape(-1), word_starts.reshape(-1)
    flat_ids[covered] = part.tokens[source]
    flat_starts[covered] = (part.word_start_bits[source >> 3] >> (source & 7).astype(np.uint8)) & 1
    flat_starts[at + lead] = True  # also where a word had to be cut

    content = np.ones((num_rows, length), np.bool_)
    row_end = (at + full)[before + count - 1]
    empty = expand_ranges(row_end, np.arange(1, num_rows + 1) * length - row_end)
    specials = [(at + full - 1, layout.end_id), (empty, layout.pad_id)]
    if layout.begin_id is not None:
        specials.append((at if lead else np.arange(num_rows) * length, layout.begin_id))
    for places, special in specials:
        flat_ids[places] = special
        flat_starts[places] = False
        content.reshape(-1)[places] = False

    segments = np.zeros((num_rows, length), np.int32)
    positions = np.empty((num_rows, length), np.int32)
    positions[:] = np.arange(length, dtype=np.int32)
    segments.reshape(-1)[empty] = -1
    if layout.packing == "isolated":
        covered = expand_ranges(at[further], full[further])
        segments.reshape(-1)[covered] = np.repeat(further - before[row[further]], full[further])
        positions.reshape(-1)[covered] = covered - np.repeat(at[further], full[further])
    return Rows(ids, content, word_starts, segments, positions)


def _pieces_of_store(
    part: Part, begin: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Tokens and word starts of `length` positions from each of (B,) offsets, copied as whole pieces.

    Returns:
        (B, length) ids and word starts, and (B,) False where a piece would pass an end of the store and holds nothing.
    """
    width = length // 8 + 2  # bytes of bits that hold any `length` neighbours
    if part.tokens.size < length + 8 * width:
        nothing = np.zeros((begin.size, length), np.int32)
        return nothing, nothing.astype(np.bool_), np.zeros(begin.size, np.bool_)
    inside = (begin >= 0) & (begin <= part.tokens.size - length - 8 * width)
    begin = np.where(inside, begin, 0)
    ids = _runs(part.tokens, begin, length).astype(np.int32)
    bits = np.unpackbits(_runs(part.word_start_bits, begin >> 3, width).reshape(-1), bitorder="little")
    starts = _runs(bits, np.arange(0, bits.size, 8 * width) + (begin & 7), length)
    return ids, starts.view(np.bool_), inside


def _runs(array: NDArray[Any], begin: NDArray[np.int64], length: int) -> NDArray[Any]:
    """(B, length) copies of the runs of `length` neighbours of a (N,) array that begin at the (B,) offsets."""
    # As single items of many bytes: each is copied at once, several times faster than element by element.
    item = np.dtype((np.void, length * array.itemsize))
    runs: NDArray[Any] = np.ndarray((array.size - length + 1,), item, array, strides=array.strides)[begin]
    return runs.view(array.dtype).reshape(begin.size, length)
