"""Text to token ids and word starts, with the ids of `AutoTokenizer` and many times its speed for Japanese.

`BertJapaneseTokenizer` spends its time on Python objects for every token. Here a line is cut into words by one call
of the analyser, and every word that was seen before is one look-up that gives the bytes of its ids.

Word starts, which whole-word masking needs, are
- for `BertJapaneseTokenizer`: the first token of every word of the analyser;
- for fast tokenizers: the first token of every pre-token, every piece that begins with `▁` or a space, a line feed, tab
  or carriage return and what follows it, and, unless the model is WordPiece, every piece that begins with a character
  of a script that is written without spaces (Japanese, Chinese, Thai, ...), because a stretch between two spaces is no
  word there. A byte of a byte fallback counts as the character that it begins;
- for other slow tokenizers: pieces without `##`, or with `▁`, whichever mark the vocabulary uses; without either,
  every piece.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel

from lmscripts.errors import UserError
from lmscripts.text.words import (
    MECAB_DICTIONARIES,
    Segmenter,
    mecab_dictionary_version,
    mecab_segmenter,
    sudachi_segmenter,
)

MAX_CACHED_WORDS = 1_000_000
# Entries that no text gives, kept free for later words.
UNUSED = re.compile(r"\[unused\d+\]|<unused\d+>|<\|?reserved[^>]*>")
# Thai, Lao, Myanmar, Khmer, kana, Chinese characters and their punctuation.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]"
)
_UNSPACED_BYTES = frozenset(f"<0x{byte:02X}>" for byte in (*range(0xE3, 0xEA), 0xF0))
_LINE_CONTROLS = frozenset("\t\n\r") | {"<0x09>", "<0x0A>", "<0x0D>"}


@dataclass(frozen=True)
class Encoded:
    """Tokens of a list of lines, one after the other, without special tokens of the model.

    Attributes:
        ids: shape [tokens], uint32.
        word_starts: shape [tokens], bool; True where a word begins.
        lengths: shape [lines], int64; tokens of each line.
    """

    ids: NDArray[np.uint32]
    word_starts: NDArray[np.bool_]
    lengths: NDArray[np.int64]

    def rows(self) -> list[NDArray[np.uint32]]:
        """The ids of each line."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


class Encoder:
    """A tokenizer folder ready to encode; made by `load_encoder`, once in every process that encodes.

    Attributes:
        folder: where it was loaded from.
        tokenizer: the tokenizer of transformers.
        vocab_size: number of entries, added ones included.
        pad_id, unk_id, cls_id, sep_id, mask_id, bos_id, eos_id: ids, None where the tokenizer has no such token.
        special_ids: sorted ids of all special tokens.
        reserved_ids: sorted ids of `[unusedN]` entries, which no text gives.
        num_reserved: their number.
        fingerprint: hex sha256 of vocabulary and settings, whatever the folder's place.
        description: one line for people.
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
        self.num_reserved = len(self.reserved_ids)
        self.fingerprint = _fingerprint(tokenizer, vocabulary)
        self.description = f"{_kind(tokenizer)}, {self.vocab_size:,} entries, fingerprint {self.fingerprint[:16]}"
        self._encode = _choose_way(tokenizer, vocabulary)

    def encode(self, lines: Sequence[str]) -> Encoded:
        """Ids and word starts of every line; no [CLS], [SEP] or the like is added."""
        return self._encode(lines)

    def __reduce__(self) -> tuple[Callable[[str], Encoder], tuple[str]]:
        return load_encoder, (str(self.folder),)


def load_encoder(tokenizer_dir: str | Path) -> Encoder:
    """Load a tokenizer folder: ours, or any that `AutoTokenizer` loads from a local folder.

    Raises:
        UserError: no such folder, or transformers cannot load it.
    """
    folder = Path(tokenizer_dir)
    if not folder.is_dir():
        raise UserError(f"the tokenizer folder {folder} does not exist (seen from {Path.cwd()})")
    return Encoder(folder, _auto_tokenizer(folder))


def reload_tokenizer(encoder: Encoder) -> Any:
    """The encoder's folder loaded afresh by transformers, as anyone else would load it."""
    return _auto_tokenizer(encoder.folder)


def _auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a foreign folder makes transformers raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} holds no tokenizer that AutoTokenizer can load ({reason})") from error


def _kind(tokenizer: Any) -> str:
    kind = type(tokenizer).__name__
    if _is_bert_japanese(tokenizer):
        words = tokenizer.word_tokenizer_type if tokenizer.do_word_tokenize else "no words"
        if words == "mecab":
            words = f"mecab {(tokenizer.mecab_kwargs or {}).get('mecab_dic', 'unidic_lite') or 'other dictionary'}"
        return f"{kind} ({words}, {tokenizer.subword_tokenizer_type})"
    return f"{kind} ({_model_type(tokenizer)})" if tokenizer.is_fast else kind


def _is_bert_japanese(tokenizer: Any) -> bool:
    return type(tokenizer).__name__ == "BertJapaneseTokenizer"


def _model_type(tokenizer: Any) -> str:
    return str(type(tokenizer.backend_tokenizer.model).__name__)


# ---- fingerprint ----


def _fingerprint(tokenizer: Any, vocabulary: dict[str, int]) -> str:
    """Hash of what decides the ids; paths, versions of transformers and padding do not."""
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
    if _is_bert_japanese(tokenizer):
        names = ("do_lower_case", "do_word_tokenize", "do_subword_tokenize", "word_tokenizer_type", "never_split")
        facts["words"] = [getattr(tokenizer, name) for name in (*names, "subword_tokenizer_type", "sudachi_kwargs")]
        facts["words"] += [tokenizer.jumanpp_kwargs, *_mecab_facts(tokenizer)]
        if tokenizer.subword_tokenizer_type == "sentencepiece":
            model = tokenizer.subword_tokenizer.sp_model.serialized_model_proto()
            facts["sentencepiece"] = hashlib.sha256(model).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()


def _mecab_facts(tokenizer: Any) -> list[Any]:
    """The dictionary by name or content, and the options without the folder of the dictionary."""
    if tokenizer.word_tokenizer_type != "mecab":
        return []
    arguments = tokenizer.mecab_kwargs or {}
    name = arguments.get("mecab_dic", "unidic_lite")
    option = arguments.get("mecab_option") or ""
    if name is None:
        option = re.sub(r"""-[dr]\s*("[^"]*"|'[^']*'|\S+)\s*""", "", option)
    return [name, option, arguments.get("normalize_text", True), mecab_dictionary_version(arguments)]


# ---- ways to encode ----

Way = Callable[[Sequence[str]], Encoded]


def _choose_way(tokenizer: Any, vocabulary: dict[str, int]) -> Way:
    if _is_bert_japanese(tokenizer):
        return _JapaneseWay(tokenizer)
    if tokenizer.is_fast:
        return _fast_way(tokenizer, vocabulary)
    return _slow_way(tokenizer, vocabulary)


def _empty(lines: Sequence[str]) -> Encoded:
    return Encoded(np.zeros(0, np.uint32), np.zeros(0, np.bool_), np.zeros(len(lines), np.int64))


class _JapaneseWay:
    """`BertJapaneseTokenizer` through a segmenter and a cache from words to the bytes of their uint32 ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.segment = _segmenter_of(tokenizer)
        self.cache = _WordCache(tokenizer)
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, added))) if added else None

    def __call__(self, lines: Sequence[str]) -> Encoded:
        look_up, segment = self.cache.__getitem__, self.segment
        find_added = self.added.search if self.added else lambda line: None
        words: list[bytes] = []  # the ids of every word of all lines
        words_before = array("q", [0])
        for line in lines:
            words.extend(self._with_added(line) if find_added(line) else map(look_up, segment(line)))
            words_before.append(len(words))
        if not words:
            return _empty(lines)
        ids = np.frombuffer(b"".join(words), np.uint32)
        word_lengths = np.fromiter(map(len, words), np.int64, len(words)) // 4
        word_ends = np.cumsum(word_lengths)
        starts = np.zeros(len(ids), np.bool_)
        starts[(word_ends - word_lengths)[word_lengths > 0]] = True
        tokens_before = np.concatenate([[0], word_ends])[np.frombuffer(words_before, np.int64)]
        return Encoded(ids, starts, np.diff(tokens_before))

    def _with_added(self, line: str) -> list[bytes]:
        """Words of a line in which a special or added token stands; the tokenizer itself has the last word."""
        assert self.added is not None
        added = self.tokenizer.get_added_vocab()
        words: list[bytes] = []
        end = 0
        for match in self.added.finditer(line):
            words += map(self.cache.__getitem__, self.segment(line[end : match.start()]) if match.start() > end else [])
            words.append(_as_bytes([added[match.group()]]))
            end = match.end()
        words += map(self.cache.__getitem__, self.segment(line[end:]) if end < len(line) else [])
        exact = _as_bytes(self.tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"])
        # Tokens that take neighbouring spaces or want to stand alone: every token counts as a word then.
        return words if b"".join(words) == exact else [exact[place : place + 4] for place in range(0, len(exact), 4)]


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.uint32).tobytes()


def _segmenter_of(tokenizer: Any) -> Segmenter:
    """Words before lower-casing; the analysers that we do not run ourselves are those of the tokenizer."""
    if not tokenizer.do_word_tokenize:
        return lambda line: [line]
    if tokenizer.word_tokenizer_type == "mecab":
        arguments = tokenizer.mecab_kwargs or {}
        known = (*MECAB_DICTIONARIES, None)
        if set(arguments) <= {"mecab_dic", "mecab_option", "normalize_text"} and arguments.get("mecab_dic") in known:
            return mecab_segmenter(arguments)
    if tokenizer.word_tokenizer_type == "sudachi":
        return sudachi_segmenter(tokenizer.sudachi_kwargs or {})
    never_split = tokenizer.all_special_tokens
    words: Callable[..., list[str]] = tokenizer.word_tokenizer.tokenize
    return lambda line: words(line, never_split=never_split)


class _WordCache(dict[str, bytes]):
    """Word -> bytes of its uint32 ids; filled on demand, emptied when it holds MAX_CACHED_WORDS."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.pieces_of = _subwords_of(tokenizer)
        never_split = {*(tokenizer.never_split or []), *tokenizer.all_special_tokens}
        self.lower_except = never_split if tokenizer.do_lower_case and tokenizer.do_word_tokenize else None

    def __missing__(self, word: str) -> bytes:
        if len(self) >= MAX_CACHED_WORDS:
            self.clear()
        cased = word if self.lower_except is None or word in self.lower_except else word.lower()
        ids = _as_bytes(self.pieces_of(cased))
        self[word] = ids
        return ids


def _subwords_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """Ids of one word, exactly those of the tokenizer's own subword tokenizer."""
    vocabulary: dict[str, int] = getattr(tokenizer, "vocab", {})
    unknown = tokenizer.unk_token_id
    if tokenizer.do_subword_tokenize and tokenizer.subword_tokenizer_type == "wordpiece":
        limit = tokenizer.subword_tokenizer.max_input_chars_per_word
        return lambda word: [number for part in word.split() for number in _wordpiece(part, vocabulary, unknown, limit)]
    if tokenizer.do_subword_tokenize and tokenizer.subword_tokenizer_type == "character":
        return lambda word: [vocabulary.get(character, unknown) for character in unicodedata.normalize("NFKC", word)]
    subwords = tokenizer.subword_tokenizer.tokenize if tokenizer.do_subword_tokenize else lambda word: [word]
    return lambda word: list(tokenizer.convert_tokens_to_ids(subwords(word)))


def _wordpiece(word: str, vocabulary: dict[str, int], unknown: int, limit: int) -> list[int]:
    """Greedy longest match first, as in BERT; a word that cannot be covered is one unknown token."""
    length = len(word)
    if length > limit:
        return [unknown]
    ids = []
    start, prefix = 0, ""
    while start < length:
        for end in range(length, start, -1):
            number = vocabulary.get(prefix + word[start:end])
            if number is not None:
                break
        else:
            return [unknown]
        ids.append(number)
        start, prefix = end, "##"
    return ids


def _fast_way(tokenizer: Any, vocabulary: dict[str, int]) -> Way:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    is_wordpiece = _model_type(tokenizer) == "WordPiece"
    begins_word, is_control = (np.zeros(max(vocabulary.values(), default=0) + 1, np.bool_) for _ in range(2))
    if not is_wordpiece:
        begins_unspaced = _begins_unspaced(backend)
        for piece, number in vocabulary.items():
            is_control[number] = piece in _LINE_CONTROLS
            begins_word[number] = piece.startswith(("▁", " ")) or is_control[number] or begins_unspaced(piece)
    # Where nothing cuts a line before the model does, nobody has to ask each token for its word.
    added = tokenizer.added_tokens_decoder.values()
    cuts_added = any(not (token.special and tokenizer.split_special_tokens) for token in added)
    has_words = backend.pre_tokenizer is not None or cuts_added
    encode_batch = backend.encode_batch if has_words else backend.encode_batch_fast

    def encode(lines: Sequence[str]) -> Encoded:
        encodings = encode_batch(list(lines), add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        total = int(lengths.sum())
        if not total:
            return _empty(lines)
        ids = np.fromiter((number for encoding in encodings for number in encoding.ids), np.uint32, total)
        starts = begins_word[ids]
        if has_words:
            pre_tokens = (number for encoding in encodings for number in encoding.word_ids)
            words = np.fromiter((-1 if number is None else number for number in pre_tokens), np.int64, total)
            starts[1:] |= (words[1:] != words[:-1]) | (words[1:] < 0)
        starts[1:] |= is_control[ids[:-1]]
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        return Encoded(ids, starts, lengths)

    return encode


def _begins_unspaced(backend: Any) -> Callable[[str], bool]:
    """Whether a piece begins with a character of a script without spaces, byte-level vocabularies included."""
    settings = json.loads(backend.to_str())
    if '"ByteLevel"' not in json.dumps([settings["pre_tokenizer"], settings["decoder"]]):
        # A byte of a byte fallback stands by itself: E3 to E9 begin U+3000 to U+9FFF, F0 a rare kanji or an emoji.
        return lambda piece: bool(_UNSPACED.match(piece)) or piece in _UNSPACED_BYTES
    decode = ByteLevel().decode
    # The bytes E3 to E9, which begin U+3000 to U+9FFF, stand for themselves in such a vocabulary.
    return lambda piece: piece[:1] in tuple("ãäåæçèé") or bool(_UNSPACED.match(decode([piece])))


def _slow_way(tokenizer: Any, vocabulary: dict[str, int]) -> Way:
    continued = any(piece.startswith("##") for piece in vocabulary)
    spaced = any(piece.startswith("▁") for piece in vocabulary)
    begins_word = np.ones(max(vocabulary.values(), default=0) + 1, np.bool_)
    for piece, number in vocabulary.items():
        if continued:
            begins_word[number] = not piece.startswith("##")
        elif spaced:
            begins_word[number] = piece.startswith("▁") or bool(_UNSPACED.match(piece))

    def encode(lines: Sequence[str]) -> Encoded:
        rows = [tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"] for line in lines]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        if not lengths.sum():
            return _empty(lines)
        ids = np.fromiter((number for row in rows for number in row), np.uint32, int(lengths.sum()))
        starts = begins_word[ids]
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        return Encoded(ids, starts, lengths)

    return encode
