"""Lossless tokenizers for causal language models: byte-level BPE, and a unigram vocabulary with byte fallback.

Decoding gives every text back, character for character, so that bits per byte are those of the text and a model can
learn all that is in it: line ends, tabs, runs of spaces, half and full width. Nothing is normalised.

Special tokens are <pad> <unk> <s> </s> with the ids 0 to 3. `tokenizer(text)` puts <s> in front and nothing behind, so
that a prompt begins as a document does. Text in which "<s>" or "</s>" stands literally is text, as is any other:
`split_special_tokens` is on, the characters are encoded one by one, and no text can end a document by itself. Whoever
wants the token gives its id.

The unigram vocabulary is trained by sentencepiece, as the trainer of `tokenizers` loses the byte fallback, and is then
taken apart: the mark U+2581 becomes the space that it stood for, so that no character of a text has a second meaning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from lmscripts.errors import UserError
from lmscripts.segmentation import WordTokenizer
from lmscripts.tokenization import Encoder
from lmscripts.tokenizer_folder import write_json, write_record
from lmscripts.tokenizer_training import (
    TokenizerType,
    Trained,
    VocabularySettings,
    count_characters,
    most_frequent,
    require_text,
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

# Text that reads like a byte or a special token, "<0x0A>", must never be taken for it. All its characters are in the
# vocabulary with a logarithm of probability of -20 or so; this is far below a sum of a few of them.
_NEVER = -10_000.0
# Bytes that sentencepiece keeps for itself in its training text: its mark of a space, and what separates columns.
_SENTENCEPIECE_MARKS = re.compile("[\u2581\t\x00]")
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

    Printable ASCII is always kept, for the sake of text that reads like a special token; `min_frequency` has no
    meaning here.

    Raises:
        UserError: no text, or no room.
    """
    required = PRINTABLE_ASCII + "\u2581"
    fixed = settings.size - settings.room() + 256 + len(required)
    if settings.size <= fixed:
        raise UserError(
            f"a lossless unigram vocabulary needs more than {fixed} entries for the special tokens, the 256 bytes and "
            f"printable ASCII; --vocab_size is {settings.size}"
        )
    units: Counter[str] = Counter()
    for line in sampled_lines(files):
        units.update(part for part in _SENTENCEPIECE_MARKS.split(line) if part)
    require_text(units)
    characters, _ = count_characters(units)
    alphabet = most_frequent(characters, min(settings.limit_alphabet, settings.size - fixed))
    trained = run_sentencepiece(
        units,
        settings,
        characters,
        alphabet,
        byte_fallback=True,
        required_chars=required,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    assert trained.scores is not None
    # Special tokens, reserved entries and bytes have the score 0; what is trained has a logarithm.
    return Trained(
        [piece.replace("\u2581", " ") for piece in trained.pieces],
        scores=[score if score < 0 else _NEVER for score in trained.scores],
        num_characters=trained.num_characters,
        num_text_characters=trained.num_text_characters,
    )


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

    Raises:
        UserError: names the first line that it does not give back.
    """
    for line in lines:
        decoded = encoder.tokenizer.decode(
            encoder.tokenizer(line, verbose=False)["input_ids"], skip_special_tokens=True
        )
        if decoded != line:
            raise UserError(
                f"the tokenizer in {encoder.folder} is not lossless: {line[:80]!r} comes back as {decoded[:80]!r}"
            )


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
