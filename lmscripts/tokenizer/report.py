"""Whether a tokenizer folder gives the same ids everywhere, and how well it fits a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmscripts.errors import UserError
from lmscripts.tokenizer.encoder import Encoder, reload_tokenizer

_BATCH_LINES = 1000


def check_encoder(encoder: Encoder, lines: Sequence[str]) -> None:
    """Check that `encoder` gives every line the ids of the reloaded `AutoTokenizer`.

    Raises:
        UserError: it does not; names the first such line.
    """
    tokenizer = reload_tokenizer(encoder)
    for start in range(0, len(lines), _BATCH_LINES):
        part = list(lines[start : start + _BATCH_LINES])
        expected = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        for line, ours, theirs in zip(part, encoder.encode(part).rows(), expected):
            if ours.tolist() != list(theirs):
                raise UserError(
                    f"the fast path and AutoTokenizer differ on the line {line[:80]!r}: {ours[:12].tolist()} and "
                    f"{list(theirs)[:12]}; the tokenizer in {encoder.folder} must not be used with this program"
                )


def tokenizer_report(encoder: Encoder, lines: Sequence[str]) -> dict[str, Any]:
    """How the tokenizer fits these lines.

    Returns:
        Counts (lines, characters, words, tokens, unknown_tokens, vocab_size, vocab_used) and ratios: tokens_per_word,
        tokens_per_character, characters_per_token, unknown_rate (of all tokens), vocab_used_share (of the entries
        that text can give). A ratio without a denominator is None.
    """
    used = np.zeros(encoder.vocab_size, np.bool_)
    words = tokens = unknown = 0
    for start in range(0, len(lines), _BATCH_LINES):
        encoded = encoder.encode(lines[start : start + _BATCH_LINES])
        used[encoded.ids] = True
        words += int(encoded.word_starts.sum())
        tokens += len(encoded.ids)
        unknown += int((encoded.ids == encoder.unk_id).sum()) if encoder.unk_id is not None else 0
    used[list(encoder.special_ids)] = False
    characters = sum(map(len, lines))
    ordinary = encoder.vocab_size - len(encoder.special_ids) - encoder.num_reserved
    return {
        "lines": len(lines),
        "characters": characters,
        "words": words,
        "tokens": tokens,
        "unknown_tokens": unknown,
        "vocab_size": encoder.vocab_size,
        "vocab_used": int(used.sum()),
        "tokens_per_word": _ratio(tokens, words),
        "tokens_per_character": _ratio(tokens, characters),
        "characters_per_token": _ratio(characters, tokens),
        "unknown_rate": _ratio(unknown, tokens),
        "vocab_used_share": _ratio(int(used.sum()), ordinary),
    }


def _ratio(number: int, total: int) -> float | None:
    return round(number / total, 6) if total else None


def report_table(report: dict[str, Any]) -> str:
    """The report of `tokenizer_report` as lines of text."""

    def ratio(name: str, share: bool = False) -> str:
        value = report[name]
        return "-" if value is None else f"{value:.2%}" if share else f"{value:.3f}"

    rows = [
        ("measured on", f"{report['lines']:,} lines, {report['characters']:,} characters"),
        ("words, tokens", f"{report['words']:,}, {report['tokens']:,}"),
        ("tokens per word", ratio("tokens_per_word")),
        ("tokens per character", ratio("tokens_per_character")),
        ("characters per token", ratio("characters_per_token")),
        ("unknown tokens", f"{report['unknown_tokens']:,} ({ratio('unknown_rate', share=True)})"),
        (
            "vocabulary used",
            f"{report['vocab_used']:,} of {report['vocab_size']:,} ({ratio('vocab_used_share', share=True)} of the "
            "entries that text can give)",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
