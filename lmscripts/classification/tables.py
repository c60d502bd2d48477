"""Labelled tables: csv, tsv, jsonl and parquet, also compressed, read row by row in memory that does not grow.

A row is either good or bad, and a bad one is counted with its line and a reason. Nothing is dropped in silence, and
nothing is guessed about a label. Text and labels lose the white space around them. A line of dashes under the header
is taken for decoration. What makes the whole table doubtful (its encoding, its columns, a quote that never closes) is
an error at once.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscripts.classification.records import (
    RAW_CHARACTERS,
    SURROGATE,
    BadRow,
    Fields,
    TableOptions,
    nearest,
    read_records,
)
from lmscripts.errors import UserError

PARTS = ("train", "validation", "test")
_PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Row:
    """One good row: its first line (for parquet its number) and what it holds; `part` is what the split column says."""

    line: int
    text: str
    labels: tuple[str, ...]
    name: str | None = None
    group: str | None = None
    part: str | None = None


def read_table(path: str | Path, options: TableOptions, repairs: Counter[str] | None = None) -> Iterator[Row | BadRow]:
    """The rows of a table in their order.

    Args:
        path: the file.
        options: how.
        repairs: counts what was put right on the way: "nul_characters", "half_characters", "lines_of_dashes".

    Raises:
        UserError: no such file, format, column or encoding; a damaged file; a quote that is never closed; with
            `on_bad_row="fail"` the first bad row, with file, line and values.
    """
    repairs = Counter() if repairs is None else repairs
    _check_options(options)
    known = frozenset(options.labels)
    for line, fields in read_records(str(path), options, repairs):
        row = fields if isinstance(fields, BadRow) else _row(line, fields, options, known, repairs)
        if isinstance(row, BadRow) and options.on_bad_row == "fail":
            raise UserError(f"{path}:{row.line}: {row.reason}: {row.details} (in {row.raw!r})")
        yield row


def order_labels(counts: Counter[str], options: TableOptions) -> list[str]:
    """The labels in the order of their ids: as given, else sorted, as numbers where all are whole numbers."""
    if options.labels:
        return list(options.labels)
    if all(re.fullmatch(r"-?\d{1,15}", label) for label in counts):
        return sorted(counts, key=lambda label: (int(label), label))
    return sorted(counts)


def check_classes(path: str | Path, counts: Counter[str], num_rows: int, reasons: Counter[str], column: str) -> None:
    """Refuse a table from which nothing can be learnt.

    Args:
        path: the file, for the sentence.
        counts: good rows of each label, labels that were given and never seen among them.
        num_rows: good rows.
        reasons: bad rows by reason.
        column: the column of the labels.

    Raises:
        UserError: no rows, one class only, or a class with fewer than two rows.
    """
    bad = ", ".join(f"{number:,} x {reason}" for reason, number in reasons.most_common(4))
    left_out = f"; left out: {bad}" if bad else ""
    if not num_rows:
        raise UserError(f"{path} has no row that can be used{left_out or ', only a header or nothing at all'}")
    if sum(number > 0 for number in counts.values()) < 2:
        only = next(label for label, number in counts.items() if number)
        raise UserError(f"every row of {path} has the label {only!r} in {column!r}; two are needed{left_out}")
    rare = [label for label, number in counts.items() if number < 2]
    if rare:
        shown = ", ".join(f"{label!r} ({counts[label]})" for label in sorted(rare)[:5])
        more = f" and {len(rare) - 5:,} more" if len(rare) > 5 else ""
        raise UserError(
            f"{path}: these labels of {column!r} have fewer than 2 rows: {shown}{more}; add rows, merge labels, or "
            f"take another label column{left_out}"
        )


# ---- one row ----


def _row(
    line: int, fields: Fields, options: TableOptions, known: frozenset[str], repairs: Counter[str]
) -> Row | BadRow:
    """A row from its fields, or what is wrong with it."""
    values: dict[str, str] = {}

    def bad(reason: str, details: str) -> BadRow:
        shown = " | ".join(f"{name}={fields.get(name)!s:.80}" for name in options.columns())
        return BadRow(line, reason, details, SURROGATE.sub("\ufffd", shown)[:RAW_CHARACTERS])

    for name, column in options.columns().items():
        value = fields.get(name)
        if isinstance(value, (list, tuple)) and name == "label" and options.separator:
            value = options.separator.join(map(_plain, value))
        elif isinstance(value, (list, tuple, dict)) or (name == "text" and not isinstance(value, (str, type(None)))):
            return bad(f"{name} of the wrong kind", f"{column!r} is a {type(value).__name__}")
        text = "" if value is None else _plain(value)
        if "\0" in text:
            repairs["nul_characters"] += text.count("\0")
            text = text.replace("\0", "")
        text, number = SURROGATE.subn("\ufffd", text)  # JSON may escape half a character, which nothing can store
        repairs["half_characters"] += number
        values[name] = text.strip()
    if not values["text"]:
        return bad("empty text", f"nothing in {options.text!r}")
    labels: tuple[str, ...] = ()
    if options.label:
        whole = values["label"]
        parts = whole.split(options.separator) if options.separator else [whole]
        labels = tuple(dict.fromkeys(part for part in map(str.strip, parts) if part))
        if not labels:
            return bad("empty label", f"nothing in {options.label!r}")
        if unknown := [label for label in labels if known and label not in known]:
            near = nearest(unknown[0], known)
            return bad("unknown label", f"{unknown[0]!r} is not one of {', '.join(options.labels)}{near}")
    part = _PART_NAMES.get(values["split"].lower()) if options.split else None
    if options.split and part is None:
        return bad("unknown part", f"{values['split']!r} in {options.split!r} is none of {', '.join(PARTS)}")
    return Row(line, values["text"], labels, values.get("id") or None, values.get("group") or None, part)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_options(options: TableOptions) -> None:
    columns = list(options.columns().values())
    if not options.text or len(set(columns)) < len(columns):
        raise UserError(f"text, label, id, group and split must be columns of their own, not {', '.join(columns)}")
    if len(set(options.labels)) < len(options.labels) or "" in map(str.strip, options.labels):
        raise UserError(f"the labels must differ and none may be empty: {', '.join(map(repr, options.labels))}")
    if options.delimiter and (len(options.delimiter) != 1 or options.delimiter in '"\r\n'):
        raise UserError(f"the delimiter must be one character, not {options.delimiter!r}")
    try:
        codecs.lookup(options.encoding or "utf-8")
    except LookupError as error:
        raise UserError(f"there is no encoding {options.encoding!r}; cp932, euc-jp or latin-1, for example") from error
