"""Lossless tokenizers for causal language models: byte-level BPE, and a unigram vocabulary with byte fallback.

Decoding gives every text back, character for character, so that bits per byte are those of the text and a model can
learn all that is in it: line ends, tabs, runs of spaces, half and full width. Nothing is normalised.

Special tokens are <pad> <unk> <s> </s> with the ids 0 to 3. `tokenizer(text)` puts <s> in front and nothing behind, so
that a prompt begins as a document does. Text in which "<s>" or "</s>" stands literally is text, as is any other:
`split_special_tokens` is on, the characters are encoded one by one, and no text can end a document by itself. Whoever
wants the token gives its id.

The unigram vocabulary is trained by sentencepiece, as the trainer of `tokenizers` loses the byte fallback, and is then
taken apart: the mark U+2581 becomes the space that it stood for, so that no character of a text has a second meaning,
and characters that have to be there get the entries that sentencepiece did not give them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from lmscripts.errors import UserError
from lmscripts.text.words import WordTokenizer
from lmscripts.tokenizer.encoder import UNUSED, Encoder
from lmscripts.tokenizer.folder import write_json, write_record
from lmscripts.tokenizer.training import (
    TokenizerType,
    Trained,
    VocabularySettings,
    count_characters,
    most_frequent,
    run_sentencepiece,
    sampled_lines,
    train_bpe,
)

CAUSAL_SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
PRINTABLE_ASCII = "".join(map(chr, range(0x21, 0x7F)))

# Lines on which tokenizers of other makes lose text or differ from one another.
DIFFICULT_LINES = (
    "吾輩は猫である。名前はまだ無い。",
    "The quick brown fox doesn't jump; 3.14 > 2.71?",
    "",
    " ",
    "  two before, two  between, two behind  ",
    "\ttab\tand\nline feed\r\nand return\r",
    "ﾃﾞｰﾀﾍﾞｰｽのﾊﾟﾋﾟﾌﾟ、ｶﾞｷﾞｸﾞと半角ｶﾅ",
    "ＡＢＣａｂｃ１２３！＠～〜＃全角",
    "全角\u3000空白\u3000\u3000と\u00a0改行しない空白\u2009細い空白\u200b幅なし",
    "は\u3099は\u309aか\u3099 e\u0301 a\u0323\u0302 X\u0301 結合文字",
    "T\u0301\u0323 セ\u032e\u3099 a\u0316\u0301 o\u0301\u031b が\u0323 각\u11a8 \u1100\u1161 \u00e9\u0323 marks",
    "①②㍿㌔㊤ｱﾞ ﬁ ½ ℃ … ― ‐ − – —",
    "葛\U000e0100城 𠮷野家 𩸽 \U00020bb7\U0002a6d6 稀な漢字",
    "👍🏽 👩‍👩‍👧‍👦 🇯🇵 ❤️ 🏳️‍🌈",
    "▁ literal ▁▁mark▁ of ▁a space▁",
    "<s> </s> <unk> <pad> [MASK] <0x0A> <0xE3><0x81> ##piece [unused0]",
    "\ue000\uf8ff\U000f1234 private use, \u0301 alone, \ufeff inside, \ufffd replaced",
    "한국어 조합형 \u1112\u1161\u11ab ไทย العربية हिन्दी Ελληνικάς İstanbul Straße ǅ",
    "wwwwwwwwww ーーーーーーーー 。。。。。。 ああああああああ aaaaaaaaaaaaaaaaa",
    "“quotes” ‘single’ `` '' „low“ «guillemets» 「かぎ」『二重』",
    "a" * 300 + "漢" * 100,
)

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Text that reads like a byte or a special token, "<0x0A>", must never be taken for it. All its characters are in the
# vocabulary with a logarithm of probability of -20 or so; this is far below a sum of a few of them.
_NEVER = -10_000.0
# Characters that sentencepiece keeps for itself in its training text: its mark of a space, that of an unknown character
# (it leaves out lines that hold one), and what separates columns.
_SENTENCEPIECE_MARKS = "\u2581\u2585\t\x00"
# What `decoders.ByteFallback` reads as a byte: hexadecimal digits of both cases, also behind a sign.
_READ_AS_BYTE = re.compile("<0x[0-9A-Fa-f+][0-9A-Fa-f]>")
# Characters of a text below which sentencepiece may find nothing at all.
_LITTLE_TEXT = 10_000
_BATCH_LINES = 1000
_LONE_BYTE = re.compile("[\udc80-\udcff]")


def check_causal(tokenizer_type: TokenizerType, words: WordTokenizer) -> None:
    """Refuse what loses text.

    Raises:
        UserError: says what is lost, and what to take instead.
    """
    if tokenizer_type not in ("bpe", "unigram"):
        lost = "white space and words with unknown characters" if tokenizer_type == "wordpiece" else "white space"
        raise UserError(
            f"--tokenizer_type {tokenizer_type} loses text ({lost}) that a causal model has to write: take bpe or "
            "unigram"
        )
    if words.kind != "none":
        raise UserError(
            f"--word_tokenizer {words.kind} loses text (the white space between words) that a causal model has to "
            "write: take --word_tokenizer none"
        )
    if words.normalization != "none":
        raise UserError(
            f"--normalization {words.normalization} loses text (half and full width, U+3000, ligatures) that a causal "
            "model has to write: take --normalization none"
        )


def train_causal(tokenizer_type: TokenizerType, files: Sequence[Path], settings: VocabularySettings) -> Trained:
    """Train byte-level BPE or a unigram vocabulary with byte fallback on lines of text.

    Args:
        tokenizer_type: bpe or unigram.
        files: text, UTF-8, one sentence a line; see `sampled_lines`.
        settings: with `CAUSAL_SPECIAL_TOKENS`.

    Raises:
        UserError: no text, or no such vocabulary can be made from it.
    """
    return train_bpe(files, settings) if tokenizer_type == "bpe" else train_lossless_unigram(files, settings)


def train_lossless_unigram(files: Sequence[Path], settings: VocabularySettings) -> Trained:
    """A unigram vocabulary (arXiv:1804.10959) in which spaces are spaces and rare characters are their bytes.

    The space and printable ASCII are always kept, whether the text has them or not: text that reads like a special
    token or a byte is made of them. `min_frequency` has no meaning here. Of a text too small for sentencepiece only
    the characters are kept.

    Raises:
        UserError: no text, or no room.
    """
    fixed = settings.size - settings.room() + len(BYTE_PIECES) + 1 + len(PRINTABLE_ASCII)
    if settings.size <= fixed:
        raise UserError(
            f"a lossless unigram vocabulary needs more than {fixed} entries for the special tokens, the 256 bytes and "
            f"printable ASCII; --vocab_size is {settings.size}"
        )
    units = _parts(Counter(sampled_lines(files)), _SENTENCEPIECE_MARKS)
    characters, _ = count_characters(units)
    frequent = most_frequent(characters, min(settings.limit_alphabet, settings.size - fixed))
    kept = {" ", *PRINTABLE_ASCII, *frequent}
    # sentencepiece refuses a text of which the alphabet covers less than 98 %, so it gets that which is covered.
    scores = _with_characters(_train_pieces(_parts(units, characters.keys() - kept), settings), kept, settings)
    reserved = [*settings.reserved(), *BYTE_PIECES]
    filling = settings.fill_up(len(reserved) + len(scores))
    return Trained(
        [*reserved, *scores, *filling],
        scores=[*[_NEVER] * len(reserved), *scores.values(), *[_NEVER] * len(filling)],
        num_characters=len(characters.keys() & kept),
        num_text_characters=len(characters),
    )


def _parts(units: Counter[str], separators: Iterable[str]) -> Counter[str]:
    """What stands between the separators, and how often."""
    if not (alternatives := "".join(map(re.escape, sorted(separators)))):
        return units
    separator = re.compile(f"[{alternatives}]+")
    parts: Counter[str] = Counter()
    for unit, count in units.items():
        for part in separator.split(unit):
            if part:
                parts[part] += count
    return parts


def _train_pieces(units: Counter[str], settings: VocabularySettings) -> dict[str, float]:
    """The ordinary pieces that sentencepiece finds, the best ones first, with the logarithms of their probabilities."""
    characters, _ = count_characters(units)
    if not characters:
        return {}
    try:
        trained = run_sentencepiece(
            units,
            settings,
            characters,
            list(characters),
            byte_fallback=True,
            required_chars=PRINTABLE_ASCII + "\u2581",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
        )
    except UserError:
        if characters.total() < _LITTLE_TEXT:
            return {}
        raise
    assert trained.scores is not None
    return {
        piece.replace("\u2581", " "): score
        for piece, score in zip(trained.pieces, trained.scores, strict=True)
        if piece not in settings.special_tokens and not (UNUSED.fullmatch(piece) or _READ_AS_BYTE.fullmatch(piece))
    }


def _with_characters(scores: dict[str, float], kept: set[str], settings: VocabularySettings) -> dict[str, float]:
    """The pieces with every character of `kept` among them, in as many entries as there are.

    For some texts sentencepiece leaves out required characters that do not occur. They come last and score below every
    other piece, and the worst pieces of several characters make room for them, as in a smaller vocabulary.
    """
    missing = sorted(kept - scores.keys())
    too_many = max(0, len(scores) + len(missing) - (settings.room() - len(BYTE_PIECES)))
    several = sorted((score, piece) for piece, score in scores.items() if len(piece) > 1)
    left_out = {piece for _, piece in several[:too_many]}
    lowest = min(scores.values(), default=0.0) - 1.0
    return {piece: score for piece, score in scores.items() if piece not in left_out} | dict.fromkeys(missing, lowest)


def write_causal_tokenizer(
    folder: Path,
    trained: Trained,
    tokenizer_type: TokenizerType,
    words: WordTokenizer,
    *,
    model_max_length: int,
    record: dict[str, Any],
) -> None:
    """Write the files of a tokenizer; for the arguments see `tokenizer_folder.write_tokenizer`."""
    fast = fast_causal_tokenizer(trained, tokenizer_type)
    (folder / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8", newline="\n")
    pad, unknown, beginning, end = CAUSAL_SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **{"pad_token": pad, "unk_token": unknown, "bos_token": beginning, "eos_token": end},
    }
    write_json(folder / "tokenizer_config.json", config)
    write_record(folder, trained, tokenizer_type, words, {"objective": "causal", **record})


def fast_causal_tokenizer(trained: Trained, tokenizer_type: TokenizerType) -> Tokenizer:
    """A tokenizer of the `tokenizers` library: no normalisation, <s> in front."""
    ids = {piece: number for number, piece in enumerate(trained.pieces)}
    if tokenizer_type == "bpe":
        assert trained.merges is not None
        tokenizer = Tokenizer(models.BPE(ids, trained.merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        assert trained.scores is not None
        tokenizer = Tokenizer(models.Unigram(list(zip(trained.pieces, trained.scores)), unk_id=1, byte_fallback=True))
        # Without words before it: a line is one lattice, in time linear in its length.
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CAUSAL_SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return tokenizer


def check_lossless(encoder: Encoder, lines: Sequence[str]) -> None:
    """Check that decoding gives back every line, with special tokens left out as `generate` would.

    Besides `lines`, it tries text that reads like a special token, a reserved entry or a byte.

    Raises:
        UserError: names the first line that it does not give back, or that gives a special token or a reserved entry.
    """
    tokenizer = encoder.tokenizer
    never = {*encoder.special_ids, *encoder.reserved_ids}
    for batch in (lines, _lines_of_look_alikes(encoder)):
        for start in range(0, len(batch), _BATCH_LINES):
            part = list(batch[start : start + _BATCH_LINES])
            for line, ids in zip(part, tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]):
                decoded = tokenizer.decode(ids, skip_special_tokens=True)
                if decoded != line:
                    raise UserError(
                        f"the tokenizer in {encoder.folder} is not lossless: {line[:80]!r} comes back as "
                        f"{decoded[:80]!r}"
                    )
                if found := sorted(never.intersection(ids)):
                    raise UserError(
                        f"the tokenizer in {encoder.folder} takes text for {tokenizer.convert_ids_to_tokens(found[0])} "
                        f"(id {found[0]}), in the line {line[:80]!r}"
                    )


def _lines_of_look_alikes(encoder: Encoder) -> list[str]:
    """All texts that read like a byte or an entry that no text gives: alone, beside letters, and beside spaces."""
    entries = encoder.tokenizer.convert_ids_to_tokens([*encoder.special_ids, *encoder.reserved_ids])
    texts = dict.fromkeys([*entries, *BYTE_PIECES, *map(str.lower, BYTE_PIECES), "<0x+A>"])
    return [
        line for text in texts for line in (text, f"{text}{text} a{text}b {text} 1", f"東京{text}は {text}　{text}。")
    ]


def keeps_line_feeds(encoder: Encoder) -> bool:
    """Whether lines that are encoded one by one with their line feed come back with it."""
    lines = ["a", "b c", "d"]
    ids = encoder.encode([line + "\n" for line in lines]).ids.tolist()
    decoded: str = encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [line.strip(" ") for line in decoded.split("\n")] == [*lines, ""]


def readable_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The pieces of these ids for people: characters instead of stand-ins for bytes, and no line feed among them.

    A byte that is no character by itself is `<0xE3>`.
    """
    pieces: list[str] = tokenizer.convert_ids_to_tokens(list(ids))
    if not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        pieces = ["\n" if piece == "<0x0A>" else piece for piece in pieces]
    else:
        stand_ins = _bytes_of_stand_ins()
        special = set(tokenizer.all_special_tokens)
        as_bytes = [bytes(stand_ins.get(character, 0x3F) for character in piece) for piece in pieces]
        texts = [data.decode(errors="surrogateescape") for data in as_bytes]
        texts = [_LONE_BYTE.sub(lambda found: f"<0x{ord(found.group()) - 0xDC00:02X}>", text) for text in texts]
        pieces = [piece if piece in special else text for piece, text in zip(pieces, texts, strict=True)]
    return [piece.replace("\n", "\\n") for piece in pieces]


def _bytes_of_stand_ins() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies, backwards.

    Printable Latin-1 characters stand for themselves, the other bytes in order for U+0100 onwards.
    """
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(256 + place): byte for place, byte in enumerate(others)}
