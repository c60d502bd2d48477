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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, count, islice
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmscripts.counters import stream_key
from lmscripts.data.masking import expand_ranges
from lmscripts.data.packing import Ints, Layout, PackedRows, Rows, kept_arrays
from lmscripts.data.token_store import Part, TokenStore
from lmscripts.errors import UserError

Span = tuple[int, int]  # first token in the store, tokens
Below = Callable[[int], int]  # a random whole number below n

_WINDOW = 4096  # pairs that are packed into rows together
_SPECIAL = 3  # [CLS] and two [SEP]
_DTYPES = {"first_pair": "int64", "start": "2int64", "length": "2int32", "label": "int8"}
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
    """A pair: A and B, whether B is another text, and tokens cut off.

    The label is -1 where nothing can be said: a document of one token has no B.
    """

    a: Span
    b: Span
    label: int
    cut: int


@dataclass(frozen=True)
class PairRows(PackedRows):
    """Rows of pairs of one part of a store. A pair is a segment, of two pieces, A and B; P pairs.

    Attributes:
        label: (P,) 0 where B is what came next, or in order; 1 where not; -1 unknown.
        facts: "rows", "pairs", "negatives", "unlabelled", "real_tokens", "cut_tokens"; and "most_pairs" of a row.
    """

    label: NDArray[np.int8]

    def read_pairs(self, rows: Ints) -> tuple[Rows, dict[str, NDArray[Any]]]:
        """Lay out (B,) rows of T tokens, in any order; Q is the most pairs of a row.

        Returns:
            The rows; and "token_types" (B, T) int64, 1 from the first token of a B to its [SEP]; "pair_places" (B, Q)
            int64, positions of [CLS], 0 for unused ones; "pair_labels" (B, Q) int64; "pair_weights" (B, Q) fp32.
        """
        laid_out, first = self.read(rows), self.first_segment[rows]
        pair = expand_ranges(first, self.first_segment[rows + 1] - first)
        row, place = np.nonzero((laid_out.positions == 0) & (laid_out.segments >= 0))  # of every [CLS]
        number = laid_out.segments[row, place]
        types = np.zeros(laid_out.ids.shape, np.int64)
        a, b = self.segment_length[pair].astype(np.int64).T
        types.reshape(-1)[expand_ranges(row * laid_out.ids.shape[1] + place + a + 2, b + 1)] = 1
        found: dict[str, NDArray[Any]] = {"token_types": types}
        of_pairs = {"pair_places": place, "pair_labels": np.maximum(self.label[pair], 0).astype(np.int64)}
        for name, values in (of_pairs | {"pair_weights": (self.label[pair] >= 0).astype(np.float32)}).items():
            found[name] = np.zeros((rows.size, self.facts["most_pairs"]), values.dtype)
            found[name][row, number] = values
        return laid_out, found


def open_pairs(store: TokenStore, part_name: str, layout: Layout, settings: PairSettings) -> PairRows | None:
    """Rows of pairs of one part of a store, see `kept_arrays`; None when the part is empty.

    Raises:
        UserError: rows too short for pairs, or a single document, which has no other to take a negative from.
    """
    part, length = store.part(part_name), layout.sequence_length
    if part.tokens.size == 0:
        return None
    if layout.begin_id is None:
        raise ValueError("rows of pairs need a token before each pair")
    if length < _SPECIAL + 5:
        raise UserError(f"sequence length {length} is too short for rows of pairs")

    def build(facts: dict[str, int]) -> Iterator[Sequence[ArrayLike]]:
        names = ("rows", "pairs", "negatives", "unlabelled", "real_tokens", "cut_tokens", "most_pairs")
        facts |= dict.fromkeys(names, 0)
        yield [0], [], [], []
        drawn = _pairs_of(part, length - _SPECIAL, settings)
        while window := list(islice(drawn, _WINDOW)):
            rows = _rows_of(window, length)
            pairs = [pair for row in rows for pair in row]
            lengths, labels = [(pair.a[1], pair.b[1]) for pair in pairs], [pair.label for pair in pairs]
            ends = facts["pairs"] + np.cumsum([len(row) for row in rows])
            yield ends, [(pair.a[0], pair.b[0]) for pair in pairs], lengths, labels
            counts = [len(rows), len(pairs), labels.count(_OTHER), labels.count(_UNKNOWN)]
            counts += [sum(map(sum, lengths)), sum(pair.cut for pair in pairs)]
            facts |= {name: facts[name] + number for name, number in zip(names, counts)}
            facts["most_pairs"] = max(facts["most_pairs"], *map(len, rows))

    what = [part_name, length, asdict(settings)]
    arrays, facts = kept_arrays(store, f"{part_name}-pairs-{length}", what, "pairs.json", _DTYPES, build)
    return PairRows(part, layout, facts, *arrays)


# ---- drawing -----------------------------------------------------------------------------------------------------


def document_pairs(
    sentences: list[Span], most_tokens: int, settings: PairSettings, below: Below, other: Callable[[int], Span]
) -> Iterator[Pair]:
    """The pairs of one document.

    Args:
        sentences: none empty, one after the other in the store.
        most_tokens: of A and B together.
        settings: how pairs are drawn.
        below: a random whole number below its argument.
        other: text of another document that begins with a sentence and goes on for as many whole sentences as it takes
            to have so many tokens, or to its end.
    """

    def share() -> float:
        return below(1 << 53) * 2.0**-53

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


def truncated(a: Span, b: Span, most_tokens: int, below: Below) -> tuple[Span, Span]:
    """A and B, cut token by token, always the longer one (B of equal ones), at its front or its back at random."""
    spans = [list(a), list(b)]
    while spans[0][1] + spans[1][1] > most_tokens:
        span = spans[0] if spans[0][1] > spans[1][1] else spans[1]
        span[0] += below(2)
        span[1] -= 1
    return (spans[0][0], spans[0][1]), (spans[1][0], spans[1][1])


def _draws(key: int) -> Below:
    """Random numbers of one document: hashes of a key and a counter."""
    counter = count(1)
    return lambda number: (stream_key(key, next(counter)) * number) >> 64


def _pairs_of(part: Part, most_tokens: int, settings: PairSettings) -> Iterator[Pair]:
    """Pairs of all documents in their order, pass after pass."""
    lengths, ends = part.sentence_lengths, part.document_sentences
    if settings.task == "next" and (filled := int(np.count_nonzero(np.diff(part.document_tokens)))) < 2:
        raise UserError(
            f"{part.folder} has {filled} document: next-sentence prediction takes its negatives from other documents, "
            "so give more, or --pair_task order"
        )

    def sentences_of(document: int) -> list[Span]:
        sizes = lengths[ends[document] : ends[document + 1]].astype(np.int64)
        starts = int(part.document_tokens[document]) + np.cumsum(sizes) - sizes
        return [(start, size) for start, size in zip(starts.tolist(), sizes.tolist(), strict=True) if size]

    for number in range(settings.passes):
        for document in range(part.num_documents):
            below = _draws(stream_key(0x9A12, number, document))

            def other(size: int, document: int = document, below: Below = below) -> Span:
                found: list[Span] = []
                while not found:
                    drawn = below(part.num_documents - 1)
                    found = sentences_of(drawn + (drawn >= document))
                found = found[below(len(found)) :]
                sums = list(accumulate(tokens for _, tokens in found))
                return found[0][0], next((taken for taken in sums if taken >= size), sums[-1])

            if found := sentences_of(document):
                yield from document_pairs(found, most_tokens, settings, below, other)


# ---- packing -----------------------------------------------------------------------------------------------------


def _rows_of(pairs: list[Pair], length: int) -> list[list[Pair]]:
    """Pairs in as few rows as may be: the longest first, each into the fullest row that has room for it."""
    rows: list[list[Pair]] = []
    by_room: list[list[list[Pair]]] = [[] for _ in range(length + 1)]  # rows with so many positions left
    for pair in sorted(pairs, key=lambda pair: -(pair.a[1] + pair.b[1])):
        size = pair.a[1] + pair.b[1] + _SPECIAL
        room = next((room for room in range(size, length) if by_room[room]), length)
        if room == length:
            rows.append([])
        row = rows[-1] if room == length else by_room[room].pop()
        row.append(pair)
        by_room[room - size].append(row)
    return rows
