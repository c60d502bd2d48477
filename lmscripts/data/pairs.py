"""Rows of sentence pairs, [CLS] A [SEP] B [SEP], for objectives that judge whether B is what came after A.

Pairs are built as for BERT (arXiv:1810.04805, appendix A.2, and the code published with it), document by document:
sentences are gathered up to a length and cut at random into A and B. For half of the pairs of the task "next" B is text
of another document, and the sentences that it stands for are gathered again. For the task "order" half of the pairs
have their parts exchanged (arXiv:1909.11942, section 3.1). Deviations: a negative never comes from the same document;
pairs shorter than a row share it, kept apart like documents; all that is cut off is counted.

Which pairs there are is a function of the text, the length and the settings. They are drawn once, in as many passes
over the text as asked for, and kept as files beside the store; masks are drawn anew in every epoch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lmscripts.counters import stream_key
from lmscripts.data.masking import expand_ranges
from lmscripts.data.packing import Layout, Rows, built_once, open_arrays, rows_dir
from lmscripts.data.token_store import Part, TokenStore
from lmscripts.errors import UserError
from lmscripts.files import new_folder

Ints = NDArray[np.int64]
Below = Callable[[int], int]  # a random whole number below n

_VERSION = 1
_WINDOW = 4096  # pairs that are packed into rows together
_SPECIAL = 3  # [CLS] and two [SEP]
_FILES = {"first_pair": "int64", "start": "int64", "length": "int32", "label": "int8"}
_ALIKE, _OTHER, _UNKNOWN = 0, 1, -1


@dataclass(frozen=True)
class PairSettings:
    """How pairs are drawn.

    Attributes:
        task: "next": is B what came next; "order": are A and B in their order.
        short_share: share of documents whose pairs are of a random shorter length.
        passes: over the text, each with pairs of its own.
    """

    task: Literal["next", "order"] = "next"
    short_share: float = 0.1
    passes: int = 1


@dataclass(frozen=True)
class Pair:
    """A pair: (first token in the store, tokens) of A and of B, whether B is another text, and tokens cut off.

    The label is -1 where nothing can be said: a document of one token has no B.
    """

    a: tuple[int, int]
    b: tuple[int, int]
    label: int
    cut: int


@dataclass(frozen=True)
class PairRows:
    """Rows of pairs of one part of a store. R rows, P pairs.

    Attributes:
        part: of the store.
        layout: of the rows; a pair is a segment.
        first_pair: (R + 1,) offsets into the pairs.
        start: (P, 2) first token of A and B.
        length: (P, 2) their tokens.
        label: (P,) 0 where B is what came next, or in order; 1 where not; -1 unknown.
        facts: counts of the whole: "rows", "pairs", "negatives", "unlabelled", "real_tokens", "cut_tokens"; and
            "most_pairs" of a row.
    """

    part: Part
    layout: Layout
    first_pair: Ints
    start: Ints
    length: NDArray[np.int32]
    label: NDArray[np.int8]
    facts: dict[str, int]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self.first_pair.size - 1)

    @property
    def real_tokens(self) -> int:
        """Text tokens in all rows."""
        return self.facts["real_tokens"]

    @property
    def most_segments(self) -> int:
        """Pairs of the row that has the most, its empty end counted as one."""
        return self.facts["most_pairs"] + 1

    def fill(self) -> float:
        """Share of the positions that hold a text token or a special token that belongs to one."""
        used = self.real_tokens + _SPECIAL * self.facts["pairs"]
        return used / (self.num_rows * self.layout.sequence_length)

    def read(self, rows: Ints) -> Rows:
        """Lay out (B,) rows, in any order."""
        return self.read_pairs(rows)[0]

    def read_pairs(self, rows: Ints) -> tuple[Rows, dict[str, NDArray[Any]]]:
        """Lay out (B,) rows of T tokens, in any order; Q is the most pairs of a row.

        Returns:
            The rows; and "token_types" (B, T) int64, 1 from the first token of a B to its [SEP]; "pair_places" (B, Q)
            int64, positions of [CLS], 0 for unused ones; "pair_labels" (B, Q) int64; "pair_weights" (B, Q) fp32.
        """
        length, layout, number = self.layout.sequence_length, self.layout, rows.size
        first = self.first_pair[rows]
        count = self.first_pair[rows + 1] - first
        pair, row = expand_ranges(first, count), np.repeat(np.arange(number), count)
        sizes = self.length[pair].astype(np.int64)
        full = sizes.sum(1) + _SPECIAL
        within = expand_ranges(np.zeros_like(count), count)  # number of a pair in its row
        total = np.cumsum(full)
        place = total - full - (total - full)[np.cumsum(count) - count][row]  # of its [CLS] in the row
        at = place + row * length

        ids = np.full(number * length, layout.pad_id, np.int32)
        flags = {name: np.zeros(number * length, np.bool_) for name in ("content", "starts")}
        begins = np.stack([at + 1, at + 2 + sizes[:, 0]], 1)
        for side in (0, 1):
            covered = expand_ranges(begins[:, side], sizes[:, side])
            source = expand_ranges(self.start[pair, side], sizes[:, side])
            ids[covered], flags["content"][covered] = self.part.tokens[source], True
            flags["starts"][covered] = (self.part.word_start_bits[source >> 3] >> (source & 7).astype(np.uint8)) & 1
            flags["starts"][begins[:, side][sizes[:, side] > 0]] = True  # also where a word had to be cut
        if layout.begin_id is None:
            raise ValueError("rows of pairs need a token before each pair")
        ids[at] = layout.begin_id
        ids[at + 1 + sizes[:, 0]] = ids[at + full - 1] = layout.end_id

        segments = np.full(number * length, -1, np.int32)
        everywhere = expand_ranges(at, full)
        segments[everywhere] = np.repeat(within, full)
        positions = np.tile(np.arange(length, dtype=np.int32), number)
        positions[everywhere] = everywhere - np.repeat(at, full)
        types = np.zeros(number * length, np.int64)
        types[expand_ranges(begins[:, 1], sizes[:, 1] + 1)] = 1
        pairs = {"pair_places": np.zeros((number, self.facts["most_pairs"]), np.int64)}
        pairs |= {"pair_labels": np.zeros_like(pairs["pair_places"])}
        weights = np.zeros(pairs["pair_places"].shape, np.float32)
        label = self.label[pair]
        pairs["pair_places"][row, within] = place
        pairs["pair_labels"][row, within] = np.maximum(label, 0)
        weights[row, within] = label >= 0
        content, starts = (flags[name].reshape(number, length) for name in ("content", "starts"))
        numbers = [a.reshape(number, length) for a in (ids, segments, positions)]
        laid_out = Rows(numbers[0], content, starts, *numbers[1:])
        return laid_out, {"token_types": types.reshape(number, length), **pairs, "pair_weights": weights}


def open_pairs(store: TokenStore, part_name: str, layout: Layout, settings: PairSettings) -> PairRows | None:
    """Rows of pairs of one part of a store, drawn on first use and then reused; None when the part is empty.

    Raises:
        UserError: rows too short for pairs, or a single document, which has no other to take a negative from.
    """
    part = store.part(part_name)
    if part.tokens.size == 0:
        return None
    what = [_VERSION, store.fingerprint, part_name, layout.sequence_length, asdict(settings)]
    name = f"{part_name}-pairs-{layout.sequence_length}"
    folder = built_once(rows_dir(store), name, what, lambda folder: _build(part, layout, settings, folder))
    facts = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    sizes = {"first_pair": facts["rows"] + 1, "label": facts["pairs"]}
    sizes |= dict.fromkeys(("start", "length"), 2 * facts["pairs"])
    arrays = open_arrays(folder, {name: (dtype, sizes[name]) for name, dtype in _FILES.items()})
    start, length = (arrays[name].reshape(-1, 2) for name in ("start", "length"))
    return PairRows(part, layout, arrays["first_pair"], start, length, arrays["label"], facts)


# ---- drawing -----------------------------------------------------------------------------------------------------


def document_pairs(
    sentences: list[tuple[int, int]],
    most_tokens: int,
    settings: PairSettings,
    below: Below,
    share: Callable[[], float],
    other: Callable[[int], tuple[int, int]],
) -> Iterator[Pair]:
    """The pairs of one document.

    Args:
        sentences: (first token in the store, tokens) of each, none empty, one after the other in the store.
        most_tokens: of A and B together.
        settings: how pairs are drawn.
        below: a random whole number below its argument.
        share: a random number in [0, 1).
        other: (first token, tokens) of text of another document that begins with a sentence and goes on for as many
            whole sentences as it takes to have so many tokens, or to its end.
    """
    target = 2 + below(most_tokens - 1) if share() < settings.short_share else most_tokens
    at = 0
    while at < len(sentences):
        end, size = at, 0
        while end < len(sentences) and size < target:
            size += sentences[end][1]
            end += 1
        number = end - at
        first = 1 + below(number - 1) if number > 1 else 1
        begin = sentences[at][0]
        a_size = sum(tokens for _, tokens in sentences[at : at + first])
        if settings.task == "next" and (number == 1 or share() < 0.5):
            a, b, label = (begin, a_size), other(max(1, target - a_size)), _OTHER
            end = at + first  # the sentences that B stands for are gathered again
        else:
            if number == 1:  # of a single sentence both parts are taken
                a_size = 1 + below(size - 1) if size > 1 else size
            a, b, label = (begin, a_size), (begin + a_size, size - a_size), _ALIKE
            if settings.task == "order" and share() < 0.5:
                a, b, label = b, a, _OTHER
        before = a[1] + b[1]
        a, b = truncated(a, b, most_tokens, below)
        yield Pair(a, b, label if a[1] and b[1] else _UNKNOWN, before - a[1] - b[1])
        at = end


def truncated(
    a: tuple[int, int], b: tuple[int, int], most_tokens: int, below: Below
) -> tuple[tuple[int, int], tuple[int, int]]:
    """A and B, cut token by token, always the longer one (B of equal ones), at its front or its back at random."""
    spans = [list(a), list(b)]
    while spans[0][1] + spans[1][1] > most_tokens:
        span = spans[0] if spans[0][1] > spans[1][1] else spans[1]
        span[0] += below(2)
        span[1] -= 1
    return (spans[0][0], spans[0][1]), (spans[1][0], spans[1][1])


class _Draws:
    """Random numbers of one document: hashes of a key and a counter."""

    def __init__(self, *parts: int) -> None:
        self._key, self._counter = stream_key(*parts), 0

    def below(self, number: int) -> int:
        self._counter += 1
        return (stream_key(self._key, self._counter) * number) >> 64

    def share(self) -> float:
        return self.below(1 << 53) * 2.0**-53


def _pairs_of(part: Part, most_tokens: int, settings: PairSettings) -> Iterator[Pair]:
    """Pairs of all documents in their order, pass after pass."""
    lengths, ends = part.sentence_lengths, part.document_sentences
    filled = part.num_documents if settings.task == "order" else int(np.count_nonzero(np.diff(part.document_tokens)))
    if filled < 2 and settings.task == "next":
        raise UserError(
            f"{part.folder} has {filled} document: next-sentence prediction takes its negatives from other documents, "
            "so give more, or --pair_task order"
        )

    def sentences_of(document: int) -> list[tuple[int, int]]:
        sizes = lengths[ends[document] : ends[document + 1]].astype(np.int64)
        starts = int(part.document_tokens[document]) + np.cumsum(sizes) - sizes
        return [(start, size) for start, size in zip(starts.tolist(), sizes.tolist(), strict=True) if size]

    for number in range(settings.passes):
        for document in range(part.num_documents):
            draws = _Draws(0x9A12, number, document)

            def other(size: int, document: int = document, draws: _Draws = draws) -> tuple[int, int]:
                while True:
                    drawn = draws.below(part.num_documents - 1)
                    found = sentences_of(drawn + (drawn >= document))
                    if found:
                        break
                begin = draws.below(len(found))
                taken = 0
                for _, tokens in found[begin:]:
                    taken += tokens
                    if taken >= size:
                        break
                return found[begin][0], taken

            if found := sentences_of(document):
                yield from document_pairs(found, most_tokens, settings, draws.below, draws.share, other)


# ---- packing -----------------------------------------------------------------------------------------------------


def _rows_of(pairs: list[Pair], length: int) -> Iterator[list[Pair]]:
    """Pairs in as few rows as may be: the longest first, each into the fullest row that has room for it."""
    rows: list[list[Pair]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows with so many positions left
    for pair in sorted(pairs, key=lambda pair: -(pair.a[1] + pair.b[1])):
        size = pair.a[1] + pair.b[1] + _SPECIAL
        room = next((room for room in range(size, length + 1) if by_room[room]), None)
        if room is None:
            rows.append([])
            number, room = len(rows) - 1, length
        else:
            number = by_room[room].pop()
        rows[number].append(pair)
        by_room[room - size].append(number)
    yield from rows


def _build(part: Part, layout: Layout, settings: PairSettings, folder: Path) -> None:
    """Draw the pairs of a part and write them down in rows, in memory that does not grow with the text."""
    most_tokens = layout.sequence_length - _SPECIAL
    if most_tokens < 5:
        raise UserError(f"sequence length {layout.sequence_length} is too short for rows of pairs")
    facts = dict.fromkeys(("rows", "pairs", "negatives", "unlabelled", "real_tokens", "cut_tokens", "most_pairs"), 0)
    with new_folder(folder) as aside:
        files = {name: (aside / f"{name}.bin").open("wb") for name in _FILES}
        files["first_pair"].write(np.zeros(1, np.int64).tobytes())

        def write(window: list[Pair]) -> None:
            for row in _rows_of(window, layout.sequence_length):
                facts["rows"] += 1
                facts["pairs"] += len(row)
                facts["most_pairs"] = max(facts["most_pairs"], len(row))
                files["first_pair"].write(np.array([facts["pairs"]], np.int64).tobytes())
                files["start"].write(np.array([(p.a[0], p.b[0]) for p in row], np.int64).tobytes())
                files["length"].write(np.array([(p.a[1], p.b[1]) for p in row], np.int32).tobytes())
                files["label"].write(np.array([p.label for p in row], np.int8).tobytes())
                facts["negatives"] += sum(p.label == _OTHER for p in row)
                facts["unlabelled"] += sum(p.label == _UNKNOWN for p in row)
                facts["real_tokens"] += sum(p.a[1] + p.b[1] for p in row)
                facts["cut_tokens"] += sum(p.cut for p in row)

        window: list[Pair] = []
        for pair in _pairs_of(part, most_tokens, settings):
            window.append(pair)
            if len(window) == _WINDOW:
                write(window)
                window = []
        write(window)
        for file in files.values():
            file.close()
        (aside / "pairs.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
