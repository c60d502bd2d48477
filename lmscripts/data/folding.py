"""Token folding: a text that is longer than a row becomes several rows, cut between words, and nothing is lost.

What is folded are the ids of the whole text, line feeds included, as `Encoder` gives them: the rows of a text, without
special tokens and repeated tokens, one after the other, are those ids exactly. What looks like a special token in a
text ("</s>", "[SEP]") is text: nobody who writes it ends a row or makes a gap.

A row begins where a word begins. A word is what stands between white space; in scripts that are written without spaces
it is what `Encoder` takes for one (a word of MeCab or Sudachi). Only a word that alone exceeds a row is cut: where the
encoder sees a word in it ("https" in an address), else between characters, else anywhere.

The characters that a row covers refer to the text as it was given, whatever normalisation did to it. Where they cannot
be told exactly (see `tokenizer.alignment`) rows still begin at word starts and lose nothing, and the places are near.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lmscripts.errors import UserError
from lmscripts.tokenizer.alignment import SPACE, Aligner, Flags, Ints, code_points, fallback_bytes, starts_by_offsets
from lmscripts.tokenizer.encoder import UNSPACED, Encoder

_UNSPACED = np.zeros(0x110000, np.bool_)
for _first, _last in UNSPACED:
    _UNSPACED[_first : _last + 1] = True

_PROBES = ("a", "x y", "東京")
_HEAD_SHARE = 4  # 128 of 510 tokens, arXiv:1905.05583 section 5.3.1


@dataclass(frozen=True)
class FoldSettings:
    """How texts become rows.

    Attributes:
        max_length: tokens of a row at most, the special tokens among them.
        unit: what `overlap` and the length of a row are counted in; with "words" a row has at most `max_words` words,
            special tokens not counted, and still at most `max_length` tokens.
        max_words: for unit "words".
        overlap: units at the beginning of a row that repeat the end of the row before, at most; whole words.
        balance: make the rows of a text about equally long, instead of full ones and a rest; their number stays.
        policy: "fold"; "truncate" keeps the first row; "head_tail" makes one row of the text's beginning (a quarter)
            and its end (arXiv:1905.05583 section 5.3.1).
        most_folds: keep at most that many rows of a text, the first ones; None keeps all.

    Raises:
        UserError: settings that contradict one another.
    """

    max_length: int = 128
    unit: Literal["tokens", "words"] = "tokens"
    max_words: int = 0
    overlap: int = 0
    balance: bool = False
    policy: Literal["fold", "truncate", "head_tail"] = "fold"
    most_folds: int | None = None

    def __post_init__(self) -> None:
        if self.unit not in ("tokens", "words") or self.policy not in ("fold", "truncate", "head_tail"):
            raise UserError(
                "the unit of folding must be tokens or words and the policy fold, truncate or head_tail, not "
                f"{self.unit!r} and {self.policy!r}"
            )
        if (self.unit == "words") != (self.max_words > 0) or self.max_words < 0:
            raise UserError(f"max_words ({self.max_words}) goes with unit words and must be 1 or more there")
        most = self.max_words if self.unit == "words" else self.max_length
        if not 0 <= self.overlap < most:
            raise UserError(f"an overlap of {self.overlap} {self.unit} leaves no room in rows of {most} {self.unit}")
        if self.most_folds is not None and self.most_folds < 1:
            raise UserError(f"most_folds must be 1 or more, not {self.most_folds}")
        if self.policy != "fold" and (self.overlap or self.balance or self.most_folds is not None):
            raise UserError(f"policy {self.policy} makes one row: overlap, balance and most_folds have no meaning then")


@dataclass(frozen=True)
class Fold:
    """One row of a text.

    Attributes:
        ids: shape [tokens], int32, with the special tokens of the tokenizer around.
        idx: number of the row within its text, from 0.
        n: number of rows of its text.
        char_start, char_end: the characters of the original text that it covers. Neighbours touch, and without overlap
            all rows together cover the text once; the single row of "head_tail" names the whole text.
        num_tokens: tokens of text, without special tokens.
        num_repeated: how many of them, the first ones, repeat the end of the row before.
    """

    ids: NDArray[np.int32]
    idx: int
    n: int
    char_start: int
    char_end: int
    num_tokens: int
    num_repeated: int


class Folder:
    """Folds texts with one tokenizer.

    Attributes:
        encoder: the tokenizer.
        settings: how texts become rows.
        before, after: special tokens around a row, shape [tokens], int32, found by asking the tokenizer.
        room: tokens of text that a row holds.

    Raises:
        UserError: `max_length` leaves no room beside the special tokens; when called, what `Encoder.encode` raises.
    """

    def __init__(self, encoder: Encoder, settings: FoldSettings) -> None:
        self.encoder, self.settings, tokenizer = encoder, settings, encoder.tokenizer
        self.before, self.after = special_tokens_around(tokenizer)
        self.room = settings.max_length - len(self.before) - len(self.after)
        if self.room < 1:
            raise UserError(
                f"a row of {settings.max_length} tokens has no room for text beside the "
                f"{settings.max_length - self.room} special tokens of {encoder.folder}"
            )
        self._aligner = None if tokenizer.is_fast else Aligner(tokenizer)
        self._bytes = fallback_bytes(tokenizer)

    def __reduce__(self) -> tuple[type[Folder], tuple[Encoder, FoldSettings]]:
        return Folder, (self.encoder, self.settings)

    def __call__(self, texts: Sequence[str]) -> list[list[Fold]]:
        """Rows of every text; blank ones, and ones of which the tokenizer makes nothing, give no row."""
        encoded = self.encoder.encode(texts)
        shortest = 1 if self.settings.unit == "words" else self.room + 1
        long = [place for place, length in enumerate(encoded.lengths) if length >= shortest and texts[place].strip()]
        ids = [row.astype(np.int32) for row in encoded.rows()]
        words = np.split(encoded.word_starts, np.cumsum(encoded.lengths)[:-1])
        cuts = dict(zip(long, self._cuts([(texts[place], ids[place], words[place]) for place in long])))
        folds = []
        for place, text in enumerate(texts):
            if place in cuts:
                folds.append(self._rows(ids[place], len(text), *cuts[place]))
            elif len(ids[place]) and text.strip():
                folds.append([self._row(ids[place], 0, 1, (0, len(text)), 0)])
            else:
                folds.append([])
        return folds

    def _cuts(self, long: list[tuple[str, NDArray[np.int32], Flags]]) -> list[tuple[Ints, Ints]]:
        """Where words begin in texts, with ids and word starts: as tokens and, for all tokens, as characters."""
        if self._aligner is None:
            assert self.encoder.backend is not None
            found = self.encoder.backend.encode_batch([text for text, _, _ in long], add_special_tokens=False)
            places = [(starts_by_offsets(e.offsets, self._bytes[ids]), True) for e, (_, ids, _) in zip(found, long)]
        else:
            places = [self._aligner(*each) for each in long]
        return [_word_bounds(text, *place, words, self.room) for place, (text, _, words) in zip(places, long)]

    def _rows(self, ids: NDArray[np.int32], num_characters: int, bounds: Ints, places: Ints) -> list[Fold]:
        """The rows of one text, given the token bounds of its words and the character of every token."""
        settings = self.settings
        if settings.policy == "head_tail" and (ends := _head_and_tail(bounds, settings, self.room)):
            row = np.concatenate([ids[: bounds[ends[0]]], ids[bounds[ends[1]] :]])
            return [self._row(row, 0, 1, (0, num_characters), 0)]
        plan, rows = _plan(bounds, settings, self.room), []
        edges = [0, *places[bounds[1:-1]].tolist(), num_characters]
        for number, (begin, fresh, end) in enumerate(plan):
            span, repeated = (edges[begin], edges[end]), int(bounds[fresh] - bounds[begin])
            rows.append(self._row(ids[bounds[begin] : bounds[end]], number, len(plan), span, repeated))
        return rows

    def _row(self, ids: NDArray[np.int32], idx: int, n: int, span: tuple[int, int], num_repeated: int) -> Fold:
        row = np.concatenate([self.before, ids, self.after])
        return Fold(row, idx, n, *span, num_tokens=len(ids), num_repeated=num_repeated)


def special_tokens_around(tokenizer: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ids that a tokenizer of transformers puts before and after a single text.

    Raises:
        UserError: they depend on the text.
    """
    possible: list[set[tuple[tuple[int, ...], tuple[int, ...]]]] = []
    for probe in _PROBES:
        plain = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
        whole = list(tokenizer(probe, verbose=False)["input_ids"])
        leads = [lead for lead in range(len(whole) - len(plain) + 1) if whole[lead : lead + len(plain)] == plain]
        possible.append({(tuple(whole[:lead]), tuple(whole[lead + len(plain) :])) for lead in leads})
    if not (around := set.intersection(*possible)):
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} does not put the same special tokens around every text"
        )
    before, after = (np.array(ids, np.int32) for ids in max(around))
    return before, after


# ---- from words to rows ----


def _plan(bounds: Ints, settings: FoldSettings, room: int) -> list[tuple[int, int, int]]:
    """(first word, first word that is not repeated, end) of every row; greedy, hence as few rows as possible."""
    num_words = len(bounds) - 1
    words = np.arange(num_words)
    in_words = settings.unit == "words"
    back = words - settings.overlap if in_words else np.searchsorted(bounds, bounds[:-1] - settings.overlap)
    # What is repeated gives way where the next word would not fit beside it.
    back = np.minimum(np.maximum(back, np.searchsorted(bounds, bounds[1:] - room)), words)
    reach = np.searchsorted(bounds, bounds[back] + room, "right") - 1
    if in_words:
        reach = np.minimum(reach, back + settings.max_words)
    cuts = [0]
    while cuts[-1] < num_words:
        cuts.append(min(int(reach[cuts[-1]]), num_words))
    most = 1 if settings.policy == "truncate" else settings.most_folds or len(cuts)
    if len(cuts) - 1 > most:
        cuts = cuts[: most + 1]
    elif settings.balance:
        cuts = _balanced(words if in_words else bounds[:-1], reach, len(cuts) - 1, num_words)
    return [(int(back[cut]), cut, end) for cut, end in itertools.pairwise(cuts)]


def _balanced(units: Ints, reach: Ints, num_rows: int, num_words: int) -> list[int]:
    """Cuts as near as possible to those of equal rows, such that every row holds its words."""
    earliest = [num_words]
    for _ in range(num_rows - 1):
        earliest.append(int(np.searchsorted(reach, earliest[-1])))
    step = (units[-1] + 1) / num_rows
    cuts = [0]
    for row in range(1, num_rows):
        target = step * row
        after = int(np.searchsorted(units, target))
        nearest = after if after < num_words and units[after] - target < target - units[after - 1] else after - 1
        latest = min(int(reach[cuts[-1]]), num_words - (num_rows - row))
        cuts.append(min(max(nearest, earliest[num_rows - row], cuts[-1] + 1), latest))
    return [*cuts, num_words]


def _head_and_tail(bounds: Ints, settings: FoldSettings, room: int) -> tuple[int, int] | None:
    """(end of the head, start of the tail) in words; None where the whole text or only its head fits."""
    num_words, total = len(bounds) - 1, int(bounds[-1])
    most_words = settings.max_words if settings.unit == "words" else num_words * _HEAD_SHARE
    head = min(int(np.searchsorted(bounds, room // _HEAD_SHARE, "right")) - 1, most_words // _HEAD_SHARE)
    tail = max(int(np.searchsorted(bounds, total - (room - bounds[head]))), num_words - (most_words - head))
    return (head, tail) if head < tail < num_words else None


def _word_bounds(text: str, starts: Ints, exact: bool, words: Flags, room: int) -> tuple[Ints, Ints]:
    """Token bounds of the words of a text, [words + 1], no word longer than `room`, and the character of every token.

    The tokens begin at `starts`, which are exact or only near the truth; `words` are the encoder's word starts.
    """
    codes = code_points(text)
    filled = np.where(SPACE[codes], len(codes), np.arange(len(codes)))
    next_filled = np.append(np.minimum.accumulate(filled[::-1])[::-1], len(codes))
    places: Ints = next_filled[np.minimum(starts, len(codes))]  # white space belongs to what is before it
    levels = [words, np.ones(len(words), np.bool_)]
    if exact:
        moves = np.append(True, places[1:] > places[:-1]) & (places < len(codes))
        here, before = codes[np.minimum(places, len(codes) - 1)], codes[np.maximum(places - 1, 0)]
        between = SPACE[before] | (words & (_UNSPACED[here] | _UNSPACED[before]))
        levels = [moves & between, moves & words, moves]
    first = levels[0].copy()
    first[0] = True
    bounds: Ints = np.append(np.flatnonzero(first), len(words))
    for level in (*levels[1:], np.ones(len(words), np.bool_)):
        if (np.diff(bounds) <= room).all():
            break
        bounds = _cut_long(bounds, np.flatnonzero(level), room)
    return bounds, places


def _cut_long(bounds: Ints, finer: Ints, room: int) -> Ints:
    """Bounds with further ones, taken from `finer`, in what is longer than `room`; as few as possible."""
    more = []
    for start, end in itertools.pairwise(bounds):
        while end - start > room:
            fits, beyond = np.searchsorted(finer, [start + room, start], "right")
            # One that is still too long is cut at the next level.
            cut = finer[fits - 1] if fits > beyond else finer[beyond] if beyond < len(finer) else end
            if cut >= end:
                break
            more.append(cut)
            start = cut
    return np.union1d(bounds, np.array(more, np.int64))
