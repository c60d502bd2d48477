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
import shutil
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lmscripts.data.arrays import fetch_soon
from lmscripts.data.masking import expand_ranges
from lmscripts.data.token_store import Part, TokenStore, rows_folders
from lmscripts.errors import UserError, naming
from lmscripts.files import check_once, file_sha256, new_folder, read_json

Ints = NDArray[np.int64]
Packing = Literal["isolated", "contiguous"]
_VERSION = 1
_MIN_PIECE = 4  # a shorter gap at the end of a row is left empty rather than filled with a sliver of a document
_CHUNK = 1 << 20  # tokens whose segments are found together while an index is built


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


def segment_ends(segments: ArrayLike, usual: int = 1) -> Tensor:
    """(S + 1,) int32 cumulative lengths 0, l1, l1 + l2, ... of the segments of (B, T) rows, for varlen attention.

    The empty end of a row counts as a segment. S is their number, or the `usual` one where that is higher, rounded up
    to a power of two: few shapes, and the kernel, which begins blocks and keeps memory for every sequence, is asked for
    few empty ones. Unused entries, at least one, repeat the total.
    """
    numbers = np.asarray(segments)
    begins = np.ones(numbers.shape, np.bool_)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = np.flatnonzero(begins)
    ends = np.full(2 ** (max(starts.size, usual) - 1).bit_length() + 1, numbers.size, np.int32)
    ends[: starts.size] = starts
    return torch.from_numpy(ends)


@dataclass(frozen=True)
class PackedRows:
    """The rows of a part of a store, as an index says that is mapped into memory. R rows, S segments.

    Attributes:
        part: of the store.
        layout: of the rows.
        facts: counts of the whole, "real_tokens" among them.
        first_segment: (R + 1,) int64 offsets into the segments.
        segment_start: (S,) int64 offset of the segment's first token in the store; or (S, 2), of each of its pieces.
        segment_length: of the same shape, int32, text tokens.
    """

    part: Part
    layout: Layout
    facts: dict[str, int]
    first_segment: Ints
    segment_start: Ints
    segment_length: NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        """Number of rows, R."""
        return int(self.first_segment.size - 1)

    @property
    def real_tokens(self) -> int:
        """Text tokens in all rows."""
        return self.facts["real_tokens"]

    @property
    def usual_segments(self) -> float:
        """Segments of a row in the mean, its empty end counted as one."""
        return len(self.segment_start) / self.num_rows + 1

    def fill(self) -> float:
        """Share of the positions that hold a text token or a special token that belongs to one."""
        layout, (segments, pieces) = self.layout, (len(self.segment_start), self.segment_start.size)
        leads = segments * layout.lead_of_segment + self.num_rows * layout.lead_of_row
        return (self.real_tokens + pieces + leads) / (self.num_rows * layout.sequence_length)

    def read(self, rows: Ints) -> Rows:
        """Lay out (B,) rows, in any order; vectorised over all of them."""
        part, layout = self.part, self.layout
        num_rows, length = rows.size, layout.sequence_length
        lead, row_lead = layout.lead_of_segment, layout.lead_of_row
        pieces = self.segment_start.size // len(self.segment_start)  # of a segment
        first = self.first_segment[rows]
        count = self.first_segment[rows + 1] - first
        segment = expand_ranges(first, count)
        count *= pieces
        before = np.cumsum(count) - count
        row = np.repeat(np.arange(num_rows), count)
        size = self.segment_length[segment].reshape(-1).astype(np.int64)
        leads = np.zeros_like(size)
        leads[::pieces] = lead
        full = leads + size + 1
        # Flat position of each piece: rows are whole, so what stands before it in its row decides.
        total = np.cumsum(full)
        row_base = (total - full)[before]
        at = total - full - row_base[row] + row * length + row_lead
        text = at + leads

        # First as if each row were its first piece alone: then it is one run of the store. The further pieces, and
        # rows at the very ends of the store, are laid over it token by token.
        start = self.segment_start[segment].reshape(-1)
        ids, word_starts, inside = _pieces_of_store(part, start[before] - lead - row_lead, length)
        is_first = np.zeros(start.size, np.bool_)
        is_first[before] = True
        further = np.flatnonzero(~is_first)
        again = np.flatnonzero(~(is_first & inside[row]))
        covered, source = expand_ranges(text[again], size[again]), expand_ranges(start[again], size[again])
        flat_ids, flat_starts = ids.reshape(-1), word_starts.reshape(-1)
        flat_ids[covered] = part.tokens[source]
        flat_starts[covered] = (part.word_start_bits[source >> 3] >> (source & 7).astype(np.uint8)) & 1
        flat_starts[text] = True  # also where a word had to be cut

        content = np.ones((num_rows, length), np.bool_)
        row_end = (at + full)[before + count - 1]
        empty = expand_ranges(row_end, np.arange(1, num_rows + 1) * length - row_end)
        specials = [(at + full - 1, layout.end_id), (empty, layout.pad_id)]
        if layout.begin_id is not None:
            specials.append((at[::pieces] if lead else np.arange(num_rows) * length, layout.begin_id))
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
            number = (further - before[row[further]]) // pieces
            segments.reshape(-1)[covered] = np.repeat(number, full[further])
            positions.reshape(-1)[covered] = covered - np.repeat(at[further - further % pieces], full[further])
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
    fetch_soon([(part.tokens, begin, length), (part.word_start_bits, begin >> 3, width)])
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


def _pieces(part: Part, layout: Layout) -> Iterator[tuple[Ints, Ints, NDArray[np.bool_]]]:
    """Segments in order, many at a time: (n,) first tokens, lengths, and whether they begin a row."""
    first, total, span = 0, part.tokens.size, max(_CHUNK, 16 * layout.sequence_length)
    while first < total:  # where a row begins
        size = min(span, total - first)
        after, before = np.searchsorted(part.document_tokens, [first + 1, first + size])
        documents = np.append(first, part.document_tokens[after:before]) - first
        sizes = np.diff(documents, append=size)
        documents, sizes = documents[sizes > 0], sizes[sizes > 0]
        rows = _row_starts(documents, sizes, part.word_starts(first, first + size).tobytes(), layout)
        if first + size < total:  # the last row goes on
            size = int(rows[-1])
        marks = np.zeros(size, np.uint8)
        marks[documents[: np.searchsorted(documents, size)]] = 1
        marks[rows[: np.searchsorted(rows, size)]] = 2
        starts = np.flatnonzero(marks)
        yield first + starts, np.diff(starts, append=size), marks[starts] == 2
        first += size


def _row_starts(documents: Ints, sizes: Ints, word_starts: bytes, layout: Layout) -> Ints:
    """(r,) tokens at which rows begin, 0 the first, that hold documents of some sizes; a loop over the rows alone.

    The tokens are thought to lie with the special tokens of their documents in one line: a row that begins at a place
    reaches as far as it has positions, which is inside of the one document that does not fit.
    """
    lead, positions = layout.lead_of_segment, layout.sequence_length - layout.lead_of_row
    ends = np.cumsum(sizes + lead + 1)
    places, tokens = (ends - sizes - lead - 1).tolist(), documents.tolist()
    at, found, end = 0, [0], int(ends[-1])
    while (reach := at + positions) < end:
        document = bisect_right(places, reach) - 1
        place, token = places[document], tokens[document]
        begin, room = max(at, place), reach - place - lead - 1
        # Cut before the last word that does not fit whole; a word longer than the room is cut itself only where it
        # would not fit an empty row either.
        cut = word_starts.rfind(1, token + begin - place + 1, token + room + 1) - token if room >= _MIN_PIECE else -1
        at = place + cut if cut >= 0 else place + room if at >= place else place
        found.append(token + at - place)
    return np.array(found)


# ---- what is kept beside the store --------------------------------------------------------------------------------


def open_rows(store: TokenStore, part_name: str, layout: Layout) -> PackedRows | None:
    """Rows of one part of a store by their index, see `kept_arrays`; None when the part is empty.

    Raises:
        UserError: the sequence length is too short for any text.
    """
    part = store.part(part_name)
    if part.tokens.size == 0:
        return None
    if layout.most_real_tokens < 2 * _MIN_PIECE:
        raise UserError(f"sequence length {layout.sequence_length} is too short for rows of text")

    def build(facts: dict[str, int]) -> Iterator[Sequence[ArrayLike]]:
        facts |= {"version": _VERSION, "rows": 0, "segments": 0, "real_tokens": 0}
        for starts, sizes, begins_row in _pieces(part, layout):
            firsts = facts["segments"] + np.flatnonzero(begins_row)
            yield firsts, starts, sizes
            facts["rows"] += firsts.size
            facts["segments"] += starts.size
            facts["real_tokens"] += int(sizes.sum())
        yield [facts["segments"]], [], []

    what = [part_name, layout.sequence_length, layout.packing, layout.lead_of_segment, layout.lead_of_row]
    name = f"{part_name}-{layout.packing}-{layout.sequence_length}"
    dtypes = {"first_segment": "int64", "segment_start": "int64", "segment_length": "int32"}
    arrays, facts = kept_arrays(store, name, what, "index.json", dtypes, build)
    return PackedRows(part, layout, facts, *arrays)


def kept_arrays(
    store: TokenStore,
    name: str,
    what: list[Any],
    facts_file: str,
    dtypes: Mapping[str, str],
    build: Callable[[dict[str, int]], Iterator[Sequence[ArrayLike]]],
) -> tuple[list[NDArray[Any]], dict[str, int]]:
    """Arrays that describe rows of a store, made on first use and then mapped from files; and facts about them.

    They lie in the store or, where it may not be written, in the user's cache; damaged ones are made again. Several
    processes may ask at once. Of those that a launcher started on one machine, the first builds and the others wait
    for whole ones to appear; else each builds aside and the first to rename wins.

    Args:
        store: of the rows.
        name: of the folder, which ends with a hash of the store and of `what`.
        what: values that decide the arrays, as JSON knows them.
        facts_file: name of the file with the facts.
        dtypes: of each array. The first holds (R + 1,) offsets of R rows into the others.
        build: gives the next elements of all arrays, again and again, and fills in the facts, "rows" among them.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, store.fingerprint, *what]).encode()).hexdigest()
    places = [place / f"{name}-{digest[:12]}" for place in rows_folders(store)]
    while True:
        for place in places:
            with suppress(UserError, OSError):
                return _open_kept(place, facts_file, dtypes)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            break
        time.sleep(0.1)  # if the builder fails, the launcher ends this process as well
    folder = places[0]
    with suppress(OSError):  # damaged, or of a version that wrote no hashes
        broken = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        folder.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
        broken.unlink(missing_ok=True)
    try:
        with naming(folder), new_folder(folder) as aside, ExitStack() as opened:
            files = [opened.enter_context((aside / f"{file}.bin").open("wb")) for file in dtypes]
            facts: dict[str, Any] = {}
            for chunk in build(facts):
                for file, values, dtype in zip(files, chunk, dtypes.values(), strict=True):
                    file.write(np.asarray(values, np.dtype(dtype).base).tobytes())
            opened.close()
            facts["sha256"] = {file: file_sha256(aside / f"{file}.bin") for file in dtypes}
            (aside / facts_file).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    except (UserError, OSError):
        if not folder.is_dir():
            raise
    return _open_kept(folder, facts_file, dtypes)


def _open_kept(folder: Path, facts_file: str, dtypes: Mapping[str, str]) -> tuple[list[NDArray[Any]], dict[str, int]]:
    """Arrays and facts of a folder of `kept_arrays`; an error where they are not as they were written."""
    form = {"rows": int, "sha256": dict.fromkeys(dtypes, str)}
    facts = read_json(folder / facts_file, form, f"remove {folder}")
    hashes, files = facts.pop("sha256"), {name: folder / f"{name}.bin" for name in dtypes}

    def check() -> None:
        if {name: file_sha256(file) for name, file in files.items()} != hashes:
            raise UserError(f"{folder} is damaged; remove it")

    check_once(folder / "checked.json", files.values(), check)
    return [np.asarray(np.memmap(file, dtypes[name], mode="r")) for name, file in files.items()], facts
