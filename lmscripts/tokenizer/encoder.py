"""Text to token ids and word starts, with the ids of `AutoTokenizer` and many times its speed for Japanese.

`BertJapaneseTokenizer` spends its time on Python objects for every token. Here a line is cut into words by one call
of the analyser, and every word that was seen before is one look-up that gives the bytes of its ids. Byte-level BPE
looks up what stands between spaces.

Word starts, which whole-word masking needs, are
- for `BertJapaneseTokenizer`: the first token of every word of the analyser;
- for fast tokenizers: the first token of every pre-token, every piece that begins with `▁` or a space, a line feed, tab
  or carriage return and what follows it, and, unless the model is WordPiece, every piece that begins with a character
  of a script that is written without spaces (Japanese, Chinese, Thai, ...), because a stretch between two spaces is no
  word there. A byte of a byte fallback counts as the character that it begins;
- for other slow tokenizers: pieces without `##`, or with `▁`, whichever mark the vocabulary uses; without either,
  every piece.

Text is text: where a special token is written in it, it is encoded by its characters, whatever `AutoTokenizer` does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordPiece

from lmscripts.errors import UserError, shortened
from lmscripts.text.words import (
    MECAB_MAX_CHARACTERS,
    SUDACHI_DEFAULTS,
    Segmenter,
    mecab_facts,
    mecab_segmenter,
    sudachi_segmenter,
)

MAX_CACHED_WORDS = 1_000_000
_LONGEST_CACHED = 40  # characters between spaces: a script without them would fill the memory with its lines
_BEFORE_SPACE = re.compile(r"(?= \S)")
# Entries that no text gives, kept free for later words.
UNUSED = re.compile(r"\[unused\d+\]|<unused\d+>|<\|?reserved[^>]*>")
# Scripts without spaces: Thai, Lao, Myanmar, Khmer, kana, Chinese characters and their punctuation.
UNSPACED = [(0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3001, 0x30FF), (0x3400, 0x9FFF)]
UNSPACED += [(0xF900, 0xFAFF), (0xFF01, 0xFF9F), (0x20000, 0x3FFFF)]
UNSPACED_CLASS = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED)
_UNSPACED = re.compile(f"[{UNSPACED_CLASS}]")
_UNSPACED_BYTES = frozenset(f"<0x{byte:02X}>" for byte in (*range(0xE3, 0xEA), 0xF0))
_LINE_CONTROLS = frozenset("\t\n\r") | {"<0x09>", "<0x0A>", "<0x0D>"}


@dataclass(frozen=True)
class Encoded:
    """Tokens of a list of lines, one after the other, without special tokens of the model."""

    ids: NDArray[np.uint32]  # [tokens]
    word_starts: NDArray[np.bool_]  # [tokens], True where a word begins
    lengths: NDArray[np.int64]  # [lines], tokens of each line

    def rows(self) -> list[NDArray[np.uint32]]:
        """The ids of each line."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


class Encoder:
    """A tokenizer folder ready to encode; made by `load_encoder`, once in every process that encodes.

    Attributes:
        folder, tokenizer: where it was loaded from, and the tokenizer of transformers.
        vocab_size: number of entries, added ones included.
        pad_id, unk_id, cls_id, sep_id, mask_id, bos_id, eos_id: None where the tokenizer has no such token.
        special_ids, reserved_ids: sorted ids of all special tokens, and of `[unusedN]` entries, which no text gives.
        fingerprint, description: see `fingerprint`; one line for people.
        backend: of a fast tokenizer, the one of `tokenizers` that encodes; no other caller changes its settings.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = len(tokenizer)
        self.pad_id: int | None = tokenizer.pad_token_id
        self.unk_id: int | None = tokenizer.unk_token_id
        self.cls_id: int | None = tokenizer.cls_token_id
        self.sep_id: int | None = tokenizer.sep_token_id
        self.mask_id: int | None = tokenizer.mask_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.special_ids: tuple[int, ...] = tuple(sorted(set(tokenizer.all_special_ids)))
        reserved = {number for piece, number in vocabulary.items() if UNUSED.fullmatch(piece)}
        self.reserved_ids = tuple(sorted(reserved - set(self.special_ids)))
        self.fingerprint = fingerprint(tokenizer)
        kind = type(tokenizer.backend_tokenizer.model).__name__ if tokenizer.is_fast else ""
        if is_bert_japanese(tokenizer):
            words = tokenizer.word_tokenizer_type if tokenizer.do_word_tokenize else "no words"
            if words == "mecab":
                words += f" {mecab_facts(tokenizer.mecab_kwargs or {})['mecab_dic'] or 'other dictionary'}"
            kind = f"{words}, {tokenizer.subword_tokenizer_type}"
        kind = f"{type(tokenizer).__name__} ({kind})" if kind else type(tokenizer).__name__
        self.description = f"{kind}, {self.vocab_size:,} entries, fingerprint {self.fingerprint[:16]}"
        self.backend = _text_backend(tokenizer) if tokenizer.is_fast else None
        way = _JapaneseWay if is_bert_japanese(tokenizer) else _slow_way
        self._encode: Callable[[Sequence[str]], Encoded]
        self._encode = way(tokenizer) if self.backend is None else _fast_way(tokenizer, self.backend)
        # Of a fast one all are hidden; which id is its unknown one its model says, whatever the class does.
        left = set() if tokenizer.is_fast else set(self.special_ids) - {self.unk_id}
        self._never = _flags(vocabulary, lambda piece: vocabulary[piece] in left)
        self._sizes = np.zeros(len(self._never), np.int64)  # characters that a piece stands for
        for piece, number in vocabulary.items():
            self._sizes[number] = 0 if number in self.special_ids else len(bare(piece))

    def encode(self, lines: Sequence[str]) -> Encoded:
        """Ids and word starts of every line; no [CLS], [SEP] or the like is added.

        Raises:
            UserError: a special token in a line cannot be told from a real one, and there is no unknown token.
        """
        encoded = self._encode(lines)
        if not (taken := self._never[encoded.ids]).any():
            return encoded
        if self.unk_id is None:
            token = self.tokenizer.convert_ids_to_tokens(int(encoded.ids[taken][0]))
            line = next(line for line in lines if token in line)
            raise UserError(
                f"the text {line[:60]!r} holds {token}, which the tokenizer {self.folder} takes for its special "
                "token, and it has no unknown token to put in its place: take it out of the text"
            )
        return replace(encoded, ids=np.where(taken, np.uint32(self.unk_id), encoded.ids))

    def unknown_characters(self, lines: Sequence[str], encoded: Encoded) -> NDArray[np.int64]:
        """How many characters of each of the lines, which gave `encoded`, the unknown token stands for, shape [lines].

        White space is not counted; characters are those after normalisation.
        """
        found = np.zeros(len(lines), np.int64)
        ends = np.cumsum(encoded.lengths)
        rows = np.searchsorted(ends, np.flatnonzero(encoded.ids == self.unk_id), "right")
        for row, times in zip(*np.unique(rows, return_counts=True)):
            known = self._sizes[encoded.ids[ends[row] - encoded.lengths[row] : ends[row]]].sum()
            filled = len("".join(self._normalize(lines[row]).replace("▁", " ").split()))
            found[row] = max(filled - known, times)
        return found

    def _normalize(self, line: str) -> str:
        if self.backend is not None:
            return line if self.backend.normalizer is None else str(self.backend.normalizer.normalize_str(line))
        return unicodedata.normalize("NFKC", line) if is_bert_japanese(self.tokenizer) else line

    def __reduce__(self) -> tuple[Callable[[str], Encoder], tuple[str]]:
        return load_encoder, (str(self.folder),)


# ---- finding and loading ----

_FETCHED = ("*.json", "*.txt", "*.model", "*.tiktoken")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_tokenizer(name: str) -> Path:
    """The folder of a tokenizer: the one that is named, or that of an OWNER/NAME on the Hub in its cache.

    Raises:
        UserError: there is no folder and nothing on the Hub, or when offline in the cache, of that name.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() or not _HUB_NAME.fullmatch(name):  # who opens a folder that is not there says what is wrong
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FETCHED)))
    except Exception as error:  # the Hub client raises many kinds
        here = f"neither a folder (seen from {Path.cwd()}) nor on the Hub"
        raise UserError(f"{name} is {here}: {shortened(error)}") from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of transformers in a local folder, as anyone loads it; a UserError where there is none."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(
            f"the tokenizer folder {folder} does not exist (seen from {Path.cwd()}); make one with train_tokenizer.py"
        )
    try:
        # False: a folder that names code of its own would have it asked for on the terminal, and run.
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a foreign folder makes transformers raise
        reason = shortened(error, 300)
        raise UserError(f"{folder} holds no tokenizer that AutoTokenizer can load ({reason})") from error


def load_encoder(tokenizer_dir: str | Path) -> Encoder:
    """Load a tokenizer folder: ours, or any other; see `load_tokenizer`."""
    return Encoder(Path(tokenizer_dir), load_tokenizer(Path(tokenizer_dir)))


# ---- ways to encode ----


def own_segmenter(tokenizer: Any) -> Segmenter | None:
    """The words of a tokenizer before it lower-cases them; None where it has none, or an analyser that is not ours."""
    if is_bert_japanese(tokenizer) and tokenizer.do_word_tokenize:
        if tokenizer.word_tokenizer_type == "mecab":
            return mecab_segmenter(tokenizer.mecab_kwargs or {})
        if tokenizer.word_tokenizer_type == "sudachi":
            return sudachi_segmenter(tokenizer.sudachi_kwargs or {})
    return None


def special_tokens(tokenizer: Any) -> set[str]:
    """What stands for no text, as it is written."""
    marked = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return marked.union(tokenizer.all_special_tokens)


def any_of(entries: Iterable[str], flags: int = 0) -> re.Pattern[str]:
    """What finds entries in a text, as its only group; the longest first."""
    found = sorted(entries, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, found)) or '(?!)'})", flags)


def added_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What finds tokens that were added to a vocabulary in a text, but not the special ones, which are text there."""
    return any_of(set(tokenizer.get_added_vocab()) - special_tokens(tokenizer))


def _hidden(tokenizer: Any) -> Callable[[str], str]:
    """A function that gives a special token a name that no text holds, and all other pieces as they are."""
    special = special_tokens(tokenizer)
    return lambda piece: f"\0special\0{piece}" if piece in special else piece


def bare(piece: str) -> str:
    """The text of a piece, without what marks its place in a word."""
    return piece[2:] if piece.startswith("##") and len(piece) > 2 else piece.replace("▁", "")


def num_filled(line: str) -> int:
    """Characters of a line but spaces."""
    return len(line) - line.count(" ") - line.count("\u3000")


def _first_places(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where parts of these lengths begin, one behind the other; without the empty ones."""
    places: NDArray[np.int64] = (np.cumsum(lengths) - lengths)[lengths > 0]
    return places


class _JapaneseWay:
    """`BertJapaneseTokenizer` through a segmenter and a cache from words to the bytes of their uint32 ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        theirs = tokenizer.word_tokenizer.tokenize if tokenizer.do_word_tokenize else lambda line, never_split: [line]
        self.segment = own_segmenter(tokenizer) or partial(theirs, never_split=[])
        self.cache = _WordCache(tokenizer)
        self.added, self.special = added_tokens(tokenizer), any_of(special_tokens(tokenizer))

    def __call__(self, lines: Sequence[str]) -> Encoded:
        look_up, segment, find_added = self.cache.__getitem__, self.segment, self.added.search
        words: list[bytes] = []  # the ids of every word of all lines
        words_before = array("q", [0])
        for line in lines:
            words.extend(self._with_added(line) if find_added(line) else map(look_up, segment(line)))
            words_before.append(len(words))
        ids = np.frombuffer(b"".join(words), np.uint32)
        word_lengths = np.fromiter(map(len, words), np.int64, len(words)) // 4
        starts = np.zeros(len(ids), np.bool_)
        starts[_first_places(word_lengths)] = True
        tokens_before = np.append(0, np.cumsum(word_lengths))[np.frombuffer(words_before, np.int64)]
        return Encoded(ids, starts, np.diff(tokens_before))

    def _with_added(self, line: str) -> list[bytes]:
        """Words of a line in which an added token stands; if no special one does, the tokenizer has the last word.

        It would hand a very long line to MeCab as it is, and is not asked.
        """
        added = self.tokenizer.get_added_vocab()
        words: list[bytes] = []
        for number, part in enumerate(self.added.split(line)):
            if number % 2:
                words.append(_as_bytes([added[part]]))
            elif part:
                words += map(self.cache.__getitem__, self.segment(part))
        if self.special.search(line) or len(line) > MECAB_MAX_CHARACTERS:
            return words
        exact = _as_bytes(self.tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"])
        # Tokens that take neighbouring spaces or want to stand alone: every token counts as a word then.
        return words if b"".join(words) == exact else [exact[place : place + 4] for place in range(0, len(exact), 4)]


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.uint32).tobytes()


class _WordCache(dict[str, bytes]):
    """Word -> bytes of its uint32 ids; filled on demand, emptied when it holds MAX_CACHED_WORDS."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.pieces_of = _subwords_of(tokenizer)
        never_split = set(tokenizer.never_split or [])
        self.lower_except = never_split if tokenizer.do_lower_case and tokenizer.do_word_tokenize else None

    def __missing__(self, word: str) -> bytes:
        if len(self) >= MAX_CACHED_WORDS:
            self.clear()
        cased = word if self.lower_except is None or word in self.lower_except else word.lower()
        ids = _as_bytes(self.pieces_of(cased))
        self[word] = ids
        return ids


def _subwords_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """Ids of one word, exactly those of the tokenizer's own subword tokenizer unless it is a special token."""
    name, unknown = _hidden(tokenizer), tokenizer.unk_token_id
    vocabulary = {name(piece): number for piece, number in getattr(tokenizer, "vocab", {}).items()}
    if tokenizer.do_subword_tokenize and tokenizer.subword_tokenizer_type == "wordpiece":
        limit = tokenizer.subword_tokenizer.max_input_chars_per_word
        model = WordPiece(vocabulary, unk_token=name(tokenizer.unk_token), max_input_chars_per_word=limit)
        return lambda word: [token.id for part in word.split() for token in model.tokenize(part)]
    if tokenizer.do_subword_tokenize and tokenizer.subword_tokenizer_type == "character":
        return lambda word: [vocabulary.get(character, unknown) for character in unicodedata.normalize("NFKC", word)]
    subwords = tokenizer.subword_tokenizer.tokenize if tokenizer.do_subword_tokenize else lambda word: [word]
    return lambda word: list(tokenizer.convert_tokens_to_ids(subwords(word)))


def _flags(vocabulary: dict[str, int], is_flagged: Callable[[str], bool]) -> NDArray[np.bool_]:
    """For every id whether its piece is flagged."""
    flags = np.zeros(max(vocabulary.values(), default=0) + 1, np.bool_)
    flags[[number for piece, number in vocabulary.items() if is_flagged(piece)]] = True
    return flags


def _text_backend(tokenizer: Any) -> Tokenizer:
    """A copy of a fast tokenizer that takes special tokens in a text for text, and neither cuts nor pads."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model, name = settings["model"], _hidden(tokenizer)
    # These find an entry wherever it is written; in other BPE nothing is joined to a special one.
    if model["type"] != "BPE" or model["ignore_merges"]:
        if isinstance(model["vocab"], dict):
            model["vocab"] = {name(piece): number for piece, number in model["vocab"].items()}
        else:
            model["vocab"] = [[name(piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = name(model["unk_token"])
        for token in settings["added_tokens"]:
            token["content"] = name(token["content"])
    backend = Tokenizer.from_str(json.dumps(settings))
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _fast_way(tokenizer: Any, backend: Tokenizer) -> Callable[[Sequence[str]], Encoded]:
    vocabulary = tokenizer.get_vocab()
    begins_unspaced = _begins_unspaced(backend)
    if isinstance(backend.model, WordPiece):  # the pre-tokens alone are its words
        is_control = begins_word = _flags(vocabulary, lambda piece: False)
    else:
        is_control = _flags(vocabulary, _LINE_CONTROLS.__contains__)
        begins_word = is_control | _flags(vocabulary, lambda piece: piece[:1] in ("▁", " ") or begins_unspaced(piece))
    # Where nothing cuts a line before the model does, nobody has to ask each token for its word.
    has_words = backend.pre_tokenizer is not None or bool(set(tokenizer.get_added_vocab()) - special_tokens(tokenizer))
    encode_batch = backend.encode_batch if has_words else backend.encode_batch_fast

    def encode(lines: Sequence[str]) -> Encoded:
        encodings = encode_batch(list(lines), add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        total = int(lengths.sum())
        ids = np.fromiter((number for encoding in encodings for number in encoding.ids), np.uint32, total)
        starts = begins_word[ids]
        if has_words:
            pre_tokens = (number for encoding in encodings for number in encoding.word_ids)
            words = np.fromiter((-1 if number is None else number for number in pre_tokens), np.int64, total)
            starts[1:] |= (words[1:] != words[:-1]) | (words[1:] < 0)
        starts[1:] |= is_control[ids[:-1]]
        starts[_first_places(lengths)] = True
        return Encoded(ids, starts, lengths)

    return _SpacedWay(encode) if _cuts_at_spaces(tokenizer, backend) else encode


def _cuts_at_spaces(tokenizer: Any, backend: Tokenizer) -> bool:
    """Whether a line is cut before every space with something behind it, and nothing before it decides what follows.

    GPT-2's pattern does so, by which a byte-level BPE cuts.
    """
    settings = json.loads(backend.to_str())
    cut, model = settings["pre_tokenizer"] or {}, settings["model"]
    is_pattern = cut.get("type") == "ByteLevel" and cut["use_regex"] and not cut["add_prefix_space"]
    is_fixed = model["type"] == "BPE" and not model["dropout"] and settings["normalizer"] is None
    return is_pattern and is_fixed and set(tokenizer.get_added_vocab()) <= special_tokens(tokenizer)


class _SpacedWay:
    """A fast tokenizer that cuts at spaces, through a cache from what it cuts to the bytes of its uint32 ids.

    The highest bit of an id says that it begins a word, as there may be several between two spaces.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Encoded]) -> None:
        self.encode, self.cache = encode, dict[str, bytes]()

    def __call__(self, lines: Sequence[str]) -> Encoded:
        cut = list(map(_BEFORE_SPACE.split, lines))
        words = list(itertools.chain.from_iterable(cut))
        if len(self.cache) >= MAX_CACHED_WORDS:
            self.cache.clear()
        if new := list(set(words).difference(self.cache)):
            encoded = self.encode(new)
            marked = replace(encoded, ids=encoded.ids | encoded.word_starts.astype(np.uint32) << np.uint32(31))
            self.cache.update(zip(new, map(np.ndarray.tobytes, marked.rows()), strict=True))
        found = list(map(self.cache.__getitem__, words))
        for word in new:
            if len(word) > _LONGEST_CACHED:
                del self.cache[word]
        tokens_before = np.append(0, np.cumsum(np.fromiter(map(len, found), np.int64, len(found)) // 4))
        words_before = np.append(0, np.cumsum(np.fromiter(map(len, cut), np.int64, len(cut))))
        marked_ids = np.frombuffer(b"".join(found), np.uint32)
        starts, lengths = marked_ids >> 31 > 0, np.diff(tokens_before[words_before])
        return Encoded(marked_ids & np.uint32(0x7FFFFFFF), starts, lengths)


def _begins_unspaced(backend: Any) -> Callable[[str], bool]:
    """Whether a piece begins with a character of a script without spaces, byte-level vocabularies included."""
    settings = json.loads(backend.to_str())
    if '"ByteLevel"' not in json.dumps([settings["pre_tokenizer"], settings["decoder"]]):
        # A byte of a byte fallback stands by itself: E3 to E9 begin U+3000 to U+9FFF, F0 a rare kanji or an emoji.
        return lambda piece: bool(_UNSPACED.match(piece)) or piece in _UNSPACED_BYTES
    decode = ByteLevel().decode
    # The bytes E3 to E9, which begin U+3000 to U+9FFF, stand for themselves in such a vocabulary.
    return lambda piece: piece[:1] in tuple("ãäåæçèé") or bool(_UNSPACED.match(decode([piece])))


def _slow_way(tokenizer: Any) -> Callable[[Sequence[str]], Encoded]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if any(piece.startswith("##") for piece in vocabulary):
        begins_word = _flags(vocabulary, lambda piece: not piece.startswith("##"))
    elif any(piece.startswith("▁") for piece in vocabulary):
        begins_word = _flags(vocabulary, lambda piece: piece.startswith("▁") or bool(_UNSPACED.match(piece)))
    else:
        begins_word = _flags(vocabulary, lambda piece: True)
    # It would take all added tokens for text, not only the special ones.
    only_special = set(tokenizer.get_added_vocab()) <= special_tokens(tokenizer)
    asked = {"add_special_tokens": False, "verbose": False, "split_special_tokens": only_special}

    def encode(lines: Sequence[str]) -> Encoded:
        rows = [tokenizer(line, **asked)["input_ids"] for line in lines]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.uint32, int(lengths.sum()))
        starts = begins_word[ids]
        starts[_first_places(lengths)] = True
        return Encoded(ids, starts, lengths)

    return encode


# ---- what makes a tokenizer the one it is ----


def is_bert_japanese(tokenizer: Any) -> bool:
    """Whether it is a `BertJapaneseTokenizer`, which importing would need its analysers."""
    return type(tokenizer).__name__ == "BertJapaneseTokenizer"


def model_kind(tokenizer: Any) -> str:
    """How words become pieces: wordpiece, unigram, bpe, character or sentencepiece; "slow" where nothing says it."""
    if is_bert_japanese(tokenizer):
        return str(tokenizer.subword_tokenizer_type) if tokenizer.do_subword_tokenize else "wordpiece"
    return type(tokenizer.backend_tokenizer.model).__name__.lower() if tokenizer.is_fast else "slow"


def fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of what decides the ids; paths, versions of transformers and padding do not."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    facts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "vocabulary": sorted(vocabulary.items(), key=lambda item: (item[1], item[0])),
        "special": [tokenizer.pad_token_id, *tokenizer.all_special_ids],
    }
    if getattr(tokenizer, "split_special_tokens", False):
        facts["special tokens are text"] = True
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        facts["backend"] = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    else:
        added = tokenizer.added_tokens_decoder
        facts["added"] = [[number, repr(token)] for number, token in sorted(added.items())]
    if is_bert_japanese(tokenizer):
        names = ["do_lower_case", "do_word_tokenize", "do_subword_tokenize", "word_tokenizer_type", "never_split"]
        names += ["subword_tokenizer_type", "sudachi_kwargs", "jumanpp_kwargs"]
        mecab = mecab_facts(tokenizer.mecab_kwargs or {}) if tokenizer.word_tokenizer_type == "mecab" else {}
        facts["words"] = [*(getattr(tokenizer, name) for name in names), *mecab.values()]
        if tokenizer.subword_tokenizer_type == "sentencepiece":
            model = tokenizer.subword_tokenizer.sp_model.serialized_model_proto()
            facts["sentencepiece"] = hashlib.sha256(model).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()


def segmentation_difference(first: Any, second: Any) -> str:
    """The first setting in which two tokenizers cut text differently, with both values; empty when there is none.

    The entries of their vocabularies are not compared. Settings that are not written down count with their defaults.
    """
    one, other = (_flat(_segmentation(tokenizer)) for tokenizer in (first, second))
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            return f"{name} is {_short(one.get(name))} and {_short(other.get(name))}"
    return ""


def _segmentation(tokenizer: Any) -> dict[str, Any]:
    """What decides how a tokenizer cuts text, as plain values."""
    if is_bert_japanese(tokenizer):
        words = tokenizer.word_tokenizer_type if tokenizer.do_word_tokenize else "none"
        arguments = getattr(tokenizer, f"{words}_kwargs", None) or {}
        defaults = {"sudachi": SUDACHI_DEFAULTS, "jumanpp": {"normalize_text": True, "trim_whitespace": False}}
        return {
            "tokenizer": "BertJapaneseTokenizer",
            "word_tokenizer_type": words,
            "subword_tokenizer_type": tokenizer.subword_tokenizer_type if tokenizer.do_subword_tokenize else "none",
            "do_lower_case": tokenizer.do_lower_case and words != "none",
            **(mecab_facts(arguments) if words == "mecab" else defaults.get(words, {}) | arguments),
        }
    if not tokenizer.is_fast:
        return {"tokenizer": type(tokenizer).__name__, "do_lower_case": getattr(tokenizer, "do_lower_case", None)}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {name: value for name, value in backend["model"].items() if name != "vocab"}
    steps = {name: backend[name] for name in ("normalizer", "pre_tokenizer")}
    return {"tokenizer": "of tokenizer.json", "subwords": model.pop("type"), **steps, **model}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots, so that a difference can be named exactly."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        steps = isinstance(value, list) and all(isinstance(step, dict) for step in value)
        inner = dict(enumerate(value)) if steps else value
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
