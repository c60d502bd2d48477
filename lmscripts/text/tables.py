"""Labelled tables: csv, tsv, jsonl and parquet, also compressed, read row by row in memory that does not grow.

A row is either good or bad, and a bad one is counted with its line and a reason. Nothing is dropped in silence, and
nothing is guessed about a label. Text and labels lose the white space around them. A line of dashes under the header
is taken for decoration. What makes the whole table doubtful (its encoding, its columns) is an error at once.

A value is missing where a JSON or parquet record has none, null or NaN. In a table with several labels a row, an empty
cell or list is the answer "none of them"; a missing one is no answer, and makes a bad row.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.text.reading import SURROGATE, without_faults
from lmscripts.text.records import RAW_CHARACTERS, BadRow, Fields, TableOptions, nearest, read_records

PARTS = ("train", "validation", "test")
_PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SHOWN_CHARACTERS = 60  # of a label in a sentence
_SHOWN_LABELS = 20
_MOST_TO_COMPARE = 200


@dataclass(frozen=True)
class Row:
    """One good row: its first line (for parquet its number) and what it holds; `part` is what the split column says.

    `labels` is empty in a table without labels and, in one with several labels a row, where a row has none of them.
    """

    line: int
    text: str
    labels: tuple[str, ...]
    name: str | None = None
    group: str | None = None
    part: str | None = None


def read_table(path: str | Path, table: TableOptions, repairs: Counter[str] | None = None) -> Iterator[Row | BadRow]:
    """The rows of a table in their order; see `read_records`.

    Raises:
        UserError: no such file, format, column or encoding; a damaged file; with `on_bad_row="fail"` the first bad
            row, with file, line and values.
    """
    repairs = Counter() if repairs is None else repairs
    if len(set(table.labels)) < len(table.labels) or "" in map(str.strip, table.labels):
        raise UserError(f"the labels must differ and none may be empty: {shown_labels(table.labels)}")
    known = frozenset(table.labels)
    for line, fields in read_records(str(path), table, repairs):
        row = fields if isinstance(fields, BadRow) else _row(line, fields, table, known, repairs)
        if isinstance(row, BadRow) and table.on_bad_row == "fail":
            raise row.error(path)
        yield row


def order_labels(counts: Counter[str], table: TableOptions) -> list[str]:
    """The labels in the order of their ids: as given, else sorted, as numbers where all are whole numbers."""
    if table.labels:
        return list(table.labels)
    if all(re.fullmatch(r"-?\d{1,15}", label) for label in counts):
        return sorted(counts, key=lambda label: (int(label), label))
    return sorted(counts)


def shown_labels(labels: Collection[str]) -> str:
    """Labels as a part of a sentence: quoted, of bounded length, and at most twenty of them."""
    names = ", ".join(f"{label!r:.{_SHOWN_CHARACTERS}}" for label in itertools.islice(labels, _SHOWN_LABELS))
    return names + (f" and {len(labels) - _SHOWN_LABELS:,} more" if len(labels) > _SHOWN_LABELS else "")


def check_classes(path: str | Path, counts: Counter[str], num_rows: int, reasons: Counter[str], column: str) -> None:
    """Refuse a table from which nothing can be learnt.

    Args:
        path: the file, for the sentence.
        counts: good rows of each label, labels that were given and never seen among them.
        num_rows: good rows.
        reasons: bad rows by reason.
        column: the column of the labels.

    Raises:
        UserError: no rows, fewer than two labels, or a label with fewer than two rows.
    """
    bad = ", ".join(f"{number:,} x {reason}" for reason, number in reasons.most_common(4))
    left_out = f"; left out: {bad}" if bad else ""
    if not num_rows:
        raise UserError(f"{path} has no row that can be used{left_out or ', only a header or nothing at all'}")
    seen = [label for label, number in counts.items() if number]
    if not seen:
        raise UserError(f"no row of {path} has a label in {column!r}; two labels are needed{left_out}")
    if len(seen) < 2:
        which = "every row" if counts[seen[0]] == num_rows else "every row with a label"
        raise UserError(f"{which} of {path} has the label {shown_labels(seen)} in {column!r}; two are needed{left_out}")
    rare = sorted(label for label, number in counts.items() if number < 2)
    if rare:
        shown = ", ".join(f"{shown_labels([label])} ({counts[label]})" for label in rare[:5])
        more = f" and {len(rare) - 5:,} more" if len(rare) > 5 else ""
        raise UserError(
            f"{path}: these labels of {column!r} have fewer than 2 rows: {shown}{more}; add rows, merge labels, or "
            f"take another label column{left_out}"
        )


# ---- one row ----


class _WrongKindError(Exception):
    """A value that is no plain text, number or date; says what it is."""


def _row(line: int, fields: Fields, table: TableOptions, known: frozenset[str], repairs: Counter[str]) -> Row | BadRow:
    """A row from its fields, or what is wrong with it."""
    values: dict[str, str] = {}
    labels: tuple[str, ...] | None = ()

    def bad(reason: str, details: str) -> BadRow:
        shown = " | ".join(f"{name}={fields.get(name)!s:.80}" for name in table.columns())
        return BadRow(line, reason, details, SURROGATE.sub("\ufffd", shown)[:RAW_CHARACTERS])

    for name, column in table.columns().items():
        value = fields.get(name)
        try:
            if name == "label":
                labels = _labels(value, table.separator, repairs)
                continue
            values[name] = _plain(value, repairs) or ""
            if name == "text" and values[name] and not isinstance(value, str):
                raise _WrongKindError(f"a {type(value).__name__}")
        except _WrongKindError as error:
            return bad(f"{name} of the wrong kind", f"{column!r} is {error}")
    if not values["text"]:
        return bad("empty text", f"nothing in {table.text!r}")
    if labels is None:
        return bad("empty label", f"nothing in {table.label!r}")
    if unknown := [label for label in labels if known and label not in known]:
        near = _near_label(unknown[0], table.labels)
        return bad("unknown label", f"{shown_labels(unknown[:1])} is not one of {shown_labels(table.labels)}{near}")
    part = _PART_NAMES.get(values["split"].lower()) if table.split else None
    if table.split and part is None:
        shown = f"{values['split']!r:.{_SHOWN_CHARACTERS}}"
        return bad("unknown part", f"{shown} in {table.split!r} is none of {', '.join(PARTS)}")
    return Row(line, values["text"], labels, values.get("id") or None, values.get("group") or None, part)


def _labels(value: Any, separator: str, repairs: Counter[str]) -> tuple[str, ...] | None:
    """The labels of a row, each once; None where none is told."""
    if not separator:
        label = _plain(value, repairs)
        return (label,) if label else None
    parts: list[str | None]
    if isinstance(value, (list, tuple)):
        parts = [_plain(part, repairs) for part in value]  # one label each, also where the separator stands in it
        if None in parts:
            raise _WrongKindError("a list in which a value is missing")
    else:
        whole = _plain(value, repairs)
        if whole is None:
            return None
        parts = [part.strip() for part in whole.split(separator)]
    return tuple(dict.fromkeys(part for part in parts if part))


def _plain(value: Any, repairs: Counter[str]) -> str | None:
    """A value as text without white space around it; None where it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (list, tuple, dict, bytes)):
        raise _WrongKindError(f"a {type(value).__name__}")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text, faults = without_faults(text)
    repairs.update(faults)
    return text.strip()


@functools.lru_cache(1024)
def _near_label(label: str, known: tuple[str, ...]) -> str:
    """The known label nearest to one, as the end of a sentence; a search among many or long ones takes too long."""
    return nearest(label, known) if len(known) <= _MOST_TO_COMPARE and len(label) <= _SHOWN_CHARACTERS else ""
