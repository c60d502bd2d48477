"""The characters of a text at which its tokens begin.

Fast tokenizers tell them, all but those of the bytes of a byte fallback. `BertJapaneseTokenizer` does not: NFKC changes
lengths, and an unknown word leaves no trace of its own. There the tokens are laid along the text, piece by piece where
the pieces are the text; where one is unknown, by the words of the analyser. Where both fail (an analyser that is not
ours, tokens that swallow their neighbours' spaces) the places are near ones, and said to be so.
"""

from __future__ import annotations

import itertools
import unicodedata
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscripts.tokenizer.encoder import added_tokens, bare, own_segmenter

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

# For every code point, whether it is white space.
SPACE = np.zeros(0x110000, np.bool_)
SPACE[[number for number in range(0x3001) if chr(number).isspace()]] = True

_NEAR = 64  # characters that a piece may lie ahead where tokens are laid along the text loosely
_form = cache(partial(unicodedata.normalize, "NFKC"))


def code_points(text: str) -> NDArray[np.uint32]:
    """The characters of a text as numbers, shape [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def fallback_bytes(tokenizer: Any) -> NDArray[np.int16]:
    """For every id, the byte that it stands for in a vocabulary with byte fallback; -1 for all other ids."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    values = np.full(max(vocabulary.values(), default=0) + 1, -1, np.int16)
    for value in range(256):
        if (number := vocabulary.get(f"<0x{value:02X}>")) is not None:
            values[number] = value
    return values


def starts_by_offsets(offsets: list[tuple[int, int]], byte_values: NDArray[np.int16]) -> Ints:
    """Where each token begins, from the (start, end) that a fast tokenizer gives and the `fallback_bytes` of each.

    A unigram model gives all bytes of several unknown characters in a row the place of the whole run.
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    fused = (byte_values >= 0) & (ends - starts > 1)
    if fused.any():
        begins = fused & (byte_values & 0xC0 != 0x80)  # the first byte of a character in UTF-8
        count = np.cumsum(begins)
        new_run = fused & np.append(True, ~fused[:-1] | (starts[1:] != starts[:-1]))
        before = np.maximum.accumulate(np.where(new_run, count, 0))
        starts = np.where(fused, np.minimum(starts + count - before, ends - 1), starts)
    monotone: Ints = np.maximum.accumulate(starts)
    return monotone


class Aligner:
    """Finds the character at which each token of a slow tokenizer begins."""

    def __init__(self, tokenizer: Any) -> None:
        self.pieces = {number: bare(piece) for piece, number in tokenizer.get_vocab().items()}
        self.unknown: int | None = tokenizer.unk_token_id
        self.segment = own_segmenter(tokenizer)
        arguments = getattr(tokenizer, f"{tokenizer.word_tokenizer_type}_kwargs") or {} if self.segment else {}
        self.normalize = self.segment is not None and arguments.get("normalize_text", True)
        self.added = added_tokens(tokenizer)

    def __call__(self, text: str, ids: NDArray[np.int32], words: Flags) -> tuple[Ints, bool]:
        """(start of each token in the text, whether it is exact)."""
        normal = unicodedata.normalize("NFKC", text) if self.normalize else text
        origins = _origins(text, normal) if self.normalize else np.arange(len(text) + 1)
        if origins is not None:
            starts = self._by_pieces(normal, ids)
            starts = self._by_words(text, normal, words) if starts is None else starts
            if starts is not None:
                return origins[starts], True
        near, cursor = [], 0
        for piece in map(self.pieces.__getitem__, ids.tolist()):
            found = normal.find(piece, cursor, cursor + len(piece) + _NEAR)
            near.append(max(found, cursor))
            cursor = found + len(piece) if found >= 0 else cursor
        loose = np.array(near, np.int64)
        return (loose * len(text) // max(len(normal), 1) if origins is None else origins[loose]), False

    def _by_pieces(self, normal: str, ids: NDArray[np.int32]) -> Ints | None:
        """By the lengths of the pieces, if these are the text without its white space, in one way only."""
        text, numbers = "".join(normal.split()), ids.tolist()
        unknown = [place for place, number in enumerate(numbers) if number == self.unknown]
        pieces = [self.pieces[number] for number in numbers]
        bounds = [-1, *unknown, len(pieces)]
        runs = ["".join(pieces[before + 1 : after]) for before, after in itertools.pairwise(bounds)]
        places = _only_places(text, runs)
        if places is None:
            return None
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        for place, run, (start, following) in zip(unknown, runs, itertools.pairwise(places)):
            lengths[place] = following - start - len(run)
        codes = code_points(normal)
        filled = np.append(np.flatnonzero(~SPACE[codes]), len(codes))
        starts: Ints = filled[np.cumsum(lengths) - lengths]
        return starts

    def _by_words(self, text: str, normal: str, words: Flags) -> Ints | None:
        """By the words of the analyser; tokens within a word are spread evenly over it."""
        if self.segment is None:
            return None
        spans, offset = [], 0
        for number, part in enumerate(self.added.split(text)):
            if number % 2:  # a special or added token, which the analyser does not see
                spans.append((offset, offset + len(part)))
                offset += len(part)
                continue
            whole, cursor = unicodedata.normalize("NFKC", part) if self.normalize else part, 0
            for word in map(str.strip, self.segment(part) if part else []):
                found = whole.find(word, cursor)
                if found < 0 or whole[cursor:found].strip():
                    return None
                cursor = found + len(word)
                if word:
                    spans.append((offset + found, offset + cursor))
            offset += len(whole)
        firsts = np.flatnonzero(words)
        if len(spans) != len(firsts) or offset != len(normal):
            return None
        starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
        counts = np.diff(np.append(firsts, len(words)))
        within = np.arange(len(words)) - np.repeat(firsts, counts)
        spread: Ints = np.repeat(starts, counts) + within * np.repeat(ends - starts, counts) // np.repeat(
            counts, counts
        )
        return spread


def _only_places(text: str, runs: list[str]) -> list[int] | None:
    """Where runs of characters stand in a text of which they leave gaps of unknown characters, one or more.

    The first run begins the text and the last one ends it. None where there is no way, or more than one: the places
    furthest to the left are then not those furthest to the right.
    """
    if len(runs) == 1:
        return [0] if text == runs[0] else None
    last = len(text) - len(runs[-1])
    if not text.startswith(runs[0]) or not text.endswith(runs[-1]):
        return None
    leftmost, end = [0], len(runs[0])
    for run in runs[1:-1]:
        leftmost.append(text.find(run, end + 1, last - 1))
        if leftmost[-1] < 0:
            return None
        end = leftmost[-1] + len(run)
    rightmost, start = [last], last
    for run in reversed(runs[1:-1]):
        start = text.rfind(run, 0, start - 1)
        rightmost.append(start)
    places = [*leftmost, last]
    return places if end < last and places == [*reversed([*rightmost, 0])] else None


def _origins(text: str, normal: str) -> Ints | None:
    """For every character of the NFKC form, and its end, the character of the text from which it comes; None: unclear.

    Marks and halves of syllables go together with the character that they may be composed with.
    """
    if text == normal:
        return np.arange(len(text) + 1)
    groups: list[str] = list(text)
    forms = list(map(_form, text))
    if "".join(forms) != normal:
        groups = []
        for character in text:
            first = unicodedata.normalize("NFKD", character)[0]
            if groups and (unicodedata.category(first).startswith("M") or 0x1160 <= ord(first) <= 0x11FF):
                groups[-1] += character
            else:
                groups.append(character)
        forms = [unicodedata.normalize("NFKC", group) for group in groups]
        if "".join(forms) != normal:
            return None
    lengths = np.fromiter(map(len, groups), np.int64, len(groups))
    return np.append(np.repeat(np.cumsum(lengths) - lengths, [len(form) for form in forms]), len(text))
