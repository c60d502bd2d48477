"""Whether a tokenizer folder gives the same ids everywhere and every text back, and how well it fits a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from tokenizers import decoders

from lmscripts.errors import UserError
from lmscripts.text.reading import pieces
from lmscripts.text.words import MECAB_MAX_CHARACTERS
from lmscripts.tokenizer.encoder import UNSPACED_CLASS, Encoder, any_of, load_tokenizer, num_filled, special_tokens
from lmscripts.tokenizer.training import BYTE_PIECES

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

_BATCH_LINES = 1000
_LONE_BYTE = re.compile("[\udc80-\udcff]")


def _batches(lines: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(lines), _BATCH_LINES):
        yield list(lines[start : start + _BATCH_LINES])


def check_encoder(encoder: Encoder, lines: Sequence[str]) -> None:
    """Check that `encoder` gives every line the ids of the reloaded `AutoTokenizer`, see `check_ids`."""
    encode = partial(load_tokenizer(encoder.folder), add_special_tokens=False, verbose=False)
    blame = f"the tokenizer in {encoder.folder} must not be used with this program: the fast path and AutoTokenizer"
    check_ids(encoder, lines, lambda part: encode(part)["input_ids"], blame)


def check_ids(
    encoder: Encoder, lines: Sequence[str], ids_of: Callable[[list[str]], list[list[int]]], blame: str
) -> None:
    """Check that `encoder` gives every line the ids that `ids_of` gives a batch of lines.

    Lines in which a special token stands are left out where that is not text to the tokenizer itself; long ones are
    cut, as the analysers of transformers may crash on them.

    Raises:
        UserError: `blame`, the first line that differs and from where on it does.
    """
    if not getattr(encoder.tokenizer, "split_special_tokens", False):
        written = any_of(special_tokens(encoder.tokenizer), re.IGNORECASE)
        lines = [line for line in lines if not written.search(unicodedata.normalize("NFKC", line))]
    for part in _batches([piece for line in lines for piece in pieces(line, MECAB_MAX_CHARACTERS)]):
        for line, row, theirs in zip(part, encoder.encode(part).rows(), ids_of(part)):
            if (ours := row.tolist()) != theirs:
                start = next((n for n, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), len(ours))
                shown = f"{ours[start : start + 8]} and {theirs[start : start + 8]}"
                raise UserError(f"{blame} differ on the line {line[:80]!r} from token {start} on, {shown}")


# ---- lossless ----


def check_lossless(encoder: Encoder, lines: Sequence[str]) -> None:
    """Check that decoding gives back every line, with special tokens left out as `generate` would.

    Besides `lines`, it tries all texts that read like a byte or an entry that no text gives: alone, and beside letters
    and spaces.

    Raises:
        UserError: names the first line that it does not give back, or that gives a special token or a reserved entry.
    """
    tokenizer = encoder.tokenizer
    never = dict.fromkeys([*encoder.special_ids, *encoder.reserved_ids])
    entries = tokenizer.convert_ids_to_tokens(list(never))
    texts = dict.fromkeys([*entries, *BYTE_PIECES, *map(str.lower, BYTE_PIECES), "<0x+A>"])
    beside = (text for t in texts for text in (t, f"{t}{t} a{t}b {t} 1", f"東京{t}は {t}　{t}。"))
    for part in _batches([*lines, *beside]):
        for line, ids in zip(part, tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]):
            if (decoded := tokenizer.decode(ids, skip_special_tokens=True)) != line:
                raise UserError(
                    f"the tokenizer in {encoder.folder} is not lossless: {line[:80]!r} comes back as {decoded[:80]!r}"
                )
            if found := sorted(never.keys() & ids):
                raise UserError(
                    f"the tokenizer in {encoder.folder} takes text for {tokenizer.convert_ids_to_tokens(found[0])} "
                    f"(id {found[0]}), in the line {line[:80]!r}"
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
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces: list[str] = tokenizer.convert_ids_to_tokens(list(ids))
    if not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        pieces = ["\n" if piece == "<0x0A>" else piece for piece in pieces]
    else:
        stand_ins = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
        special = set(tokenizer.all_special_tokens)
        as_bytes = [bytes(stand_ins.get(character, 0x3F) for character in piece) for piece in pieces]
        texts = [data.decode(errors="surrogateescape") for data in as_bytes]
        texts = [_LONE_BYTE.sub(lambda found: f"<0x{ord(found.group()) - 0xDC00:02X}>", text) for text in texts]
        pieces = [piece if piece in special else text for piece, text in zip(pieces, texts, strict=True)]
    return [piece.replace("\n", "\\n") for piece in pieces]


# ---- how well it fits ----

# Scripts without spaces but their punctuation: so many characters in a row are hardly one word.
_UNSPACED_RUN = re.compile(f"(?:(?![\u3001-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20])[{UNSPACED_CLASS}]){{8,}}")


def unspaced_share(lines: Sequence[str]) -> float:
    """Share of the characters that stand in long runs without spaces, as Thai, Chinese or Japanese is written."""
    within = sum(len(run) for line in lines for run in _UNSPACED_RUN.findall(line))
    return within / max(sum(map(num_filled, lines)), 1)


def tokenizer_report(encoder: Encoder, lines: Sequence[str]) -> dict[str, Any]:
    """How the tokenizer fits these lines.

    Returns:
        Counts (lines, characters, words, tokens, unknown_tokens, unknown_characters, vocab_size, vocab_used); ratios:
        tokens_per_word, tokens_per_character, characters_per_token, unknown_rate (of all tokens),
        unknown_character_rate (of all characters but spaces), vocab_used_share (of the entries that text can give). A
        ratio without a denominator is None.
    """
    times = np.zeros(encoder.vocab_size, np.int64)
    words = unknown_characters = 0
    for part in _batches(lines):
        encoded = encoder.encode(part)
        unknown_characters += int(encoder.unknown_characters(part, encoded).sum())
        times += np.bincount(encoded.ids, minlength=encoder.vocab_size)
        words += int(encoded.word_starts.sum())
    tokens, unknown = int(times.sum()), 0 if encoder.unk_id is None else int(times[encoder.unk_id])
    times[list(encoder.special_ids)] = 0
    characters, used = sum(map(len, lines)), int(np.count_nonzero(times))
    ordinary = encoder.vocab_size - len(encoder.special_ids) - len(encoder.reserved_ids)
    counts: dict[str, Any] = {"lines": len(lines), "characters": characters, "words": words, "tokens": tokens}
    counts |= {"unknown_tokens": unknown, "unknown_characters": unknown_characters}
    counts |= {"vocab_size": encoder.vocab_size, "vocab_used": used}
    ratios = {
        "tokens_per_word": (tokens, words),
        "tokens_per_character": (tokens, characters),
        "characters_per_token": (characters, tokens),
        "unknown_rate": (unknown, tokens),
        "unknown_character_rate": (unknown_characters, sum(map(num_filled, lines))),
        "vocab_used_share": (used, ordinary),
    }
    return counts | {name: round(one / other, 6) if other else None for name, (one, other) in ratios.items()}


def report_table(report: dict[str, Any]) -> str:
    """The report of `tokenizer_report` as lines of text."""
    shown = {name: "-" if value is None else f"{value:,}" for name, value in report.items()}
    ratios = ("tokens_per_word", "tokens_per_character", "characters_per_token")
    shown |= {name: f"{report[name]:.3f}" for name in ratios if report[name] is not None}
    shares = ("unknown_rate", "unknown_character_rate", "vocab_used_share")
    shown |= {name: f"{report[name]:.2%}" for name in shares if report[name] is not None}
    rows = {
        "measured on": "{lines} lines, {characters} characters",
        "words, tokens": "{words}, {tokens}",
        **{name.replace("_", " "): f"{{{name}}}" for name in ratios},
        "unknown tokens": "{unknown_tokens} ({unknown_rate})",
        "unknown characters": "{unknown_characters} ({unknown_character_rate})",
        "vocabulary used": "{vocab_used} of {vocab_size} ({vocab_used_share} of the entries that text can give)",
    }
    return "\n".join(f"{name:<20}  {row.format(**shown)}" for name, row in rows.items())
