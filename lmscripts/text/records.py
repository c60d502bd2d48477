"""Tables: csv, tsv, jsonl, parquet and arrow, also compressed, read record by record in memory that does not grow.

`read_records` gives what stands there, `read_table` the rows of a labelled table. A row is either good or bad, and a
bad one is counted with its line and a reason. Nothing is dropped in silence, and nothing is guessed about a label. Text
and labels lose the white space around them. A line of dashes under the header is taken for decoration. What makes the
whole table doubtful (its encoding, its columns) is an error at once.

A value is missing where a JSON or parquet record has none, null or NaN. In a table with several labels a row, an empty
cell or list is the answer "none of them"; a missing one is no answer, and makes a bad row.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from lmscripts.errors import UserError, shortened
from lmscripts.text.csv_rows import CsvRow, csv_rows
from lmscripts.text.labels import in_words, items_of, nearest, quoted
from lmscripts.text.reading import (
    LINE_END,
    MAX_RECORD_BYTES,
    SURROGATE,
    UNDECODED,
    check_file,
    encodings_of,
    format_of,
    head_of,
    kind_of,
    mark_of,
    opened,
    without_faults,
)

PARTS = ("train", "validation", "test")
_PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_DELIMITERS = (",", "\t", ";", "|")
_EXCEL_DELIMITER = re.compile(r'\s*"?sep=(.)"?\s*', re.IGNORECASE)
_DASHES = re.compile(r"(?=.*[-=]{3})[-=_+|:,; \t]*")
_OTHER_ORDER = "the columns are named again in another order"
_UNDECODABLE = ("cannot be decoded", "it holds bytes that are not of the given encoding")
_RAW_CHARACTERS = 200
_MOST_TO_COMPARE, _LONGEST_TO_COMPARE = 200, 60  # labels, and characters of one


@dataclass(frozen=True)
class TableOptions:
    """How a table is read.

    Attributes:
        text, label: names of their columns; an empty `label` reads texts without labels.
        id, group, split: names of further columns, empty for none; what `split` holds is train, validation or test.
        labels: all labels in their order; empty takes those of the table, sorted (as numbers where all are).
        separator: between the labels of a row in a table with several (`a|b`); empty for one label a row. A cell that
            is a list, `['a', 'b']`, is read as one.
        label_columns: in place of `label`, a column for each label, which says 1 or 0 (or true or false).
        format: csv, tsv, jsonl or parquet (of a corpus also txt); empty goes by the file's name and content.
        delimiter: of csv and tsv; empty finds it in the header.
        encoding: empty takes UTF-8, or what a byte order mark says; given, rows that it cannot decode are bad rows.
        quotes: csv and tsv: whether a field may stand in double quotes; a quote that is astray makes a bad row then.
        on_bad_row: leave bad rows out and count them, or fail at the first.
    """

    text: str = "text"
    label: str = "label"
    id: str = ""
    group: str = ""
    split: str = ""
    labels: tuple[str, ...] = ()
    separator: str = ""
    label_columns: tuple[str, ...] = ()
    format: Literal["", "txt", "csv", "tsv", "jsonl", "parquet"] = ""
    delimiter: str = ""
    encoding: str = ""
    quotes: bool = True
    on_bad_row: Literal["skip", "fail"] = "skip"

    def columns(self) -> dict[str, str]:
        """What is read -> the column from which it is read."""
        names = {name: getattr(self, name) for name in ("text", "label", "id", "group", "split")}
        names |= {"label": ""} if self.label_columns else {}
        names |= {f"label {column}": column for column in self.label_columns}
        return {name: column for name, column in names.items() if column}

    @property
    def multi_label(self) -> bool:
        """Whether a row may have several labels, or none."""
        return bool(self.separator or self.label_columns)


def corpus_table(
    column: str | None = None,
    delimiter: str | None = None,
    quotes: bool = True,
    input_format: Any = None,
    on_bad_row: Literal["skip", "fail"] = "skip",
) -> TableOptions:
    """How the tables of a corpus are read: texts without labels, and rows that are not UTF-8 are bad rows."""
    form: dict[str, Any] = {"format": input_format or "", "delimiter": delimiter or "", "quotes": quotes}
    return TableOptions(column or "text", label="", encoding="utf-8", on_bad_row=on_bad_row, **form)


TEXTS = corpus_table()


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used: its first line, a reason of few kinds, details, its beginning, its id if known."""

    line: int
    reason: str
    details: str
    raw: str
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "raw", SURROGATE.sub("\ufffd", self.raw)[:_RAW_CHARACTERS])

    def error(self, path: str | Path) -> UserError:
        """The row as the reason to stop."""
        return UserError(f"{path}:{self.line}: {self.reason}: {self.details} (in {self.raw!r})")


Fields = dict[str, Any]
Record = tuple[int, "Fields | BadRow"]


def read_records(path: str, table: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    """(first line, what is read -> what stands in its column) of every record, or why it is none.

    `on_bad_row` is for the caller. In `repairs` what was put right is counted (keys of `report.SENTENCES`).

    Raises:
        UserError: no such file, format, column or encoding; a damaged file, or one that is no table.
    """
    columns = list(table.columns().values())
    twice = len(set(table.label_columns)) < len(table.label_columns)
    if not table.text or twice or len(set(columns)) < len(columns):
        raise UserError(f"text, labels, id, group and split must be columns of their own, not {', '.join(columns)}")
    if table.delimiter and (len(table.delimiter) != 1 or table.delimiter in '"\r\n'):
        raise UserError(f"the delimiter must be one character, not {table.delimiter!r:.60}")
    check_codec(table.encoding or "utf-8")
    check_file(path, "table")
    readers = {"jsonl": _json_records, "parquet": _parquet_records, "arrow": _arrow_records}
    kind = kind_of(path, table.format)
    if kind == "txt":
        raise UserError(f"the name of {path} does not say its format: let it end in .csv, .tsv, .jsonl or .parquet")
    if kind in readers:
        yield from readers[kind](path, table, repairs)
    else:
        yield from _csv_records(path, kind, table, repairs)


def check_codec(encoding: str) -> None:
    """Refuse what Python has no codec of text for, such as "hex", "zlib" and "rot13", which are codecs too."""
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        found = f"there is no encoding of text {encoding!r:.60}"
        raise UserError(f"{found}; cp932, euc-jp or latin-1, for example") from None


def _find_columns(path: str, header: Sequence[str], table: TableOptions) -> dict[str, int]:
    """What is read -> its place in the header, which must name each column once."""
    columns = table.columns()
    for name, column in columns.items():
        if column not in header:
            raise _no_column(path, name, column, header)
        if header.count(column) > 1:
            raise UserError(f"{path} has the column {column!r} more than once; rename one of them")
    return {name: header.index(column) for name, column in columns.items()}


def _no_column(path: str, name: str, column: str, header: Iterable[str]) -> UserError:
    names = tuple(header)
    listed = ", ".join(f"{each!r:.40}" for each in names[:12]) + (" ..." if len(names) > 12 else "")
    near = nearest(column, names)
    options = {"text": "--text (--text_column for a corpus)", "label": "--label"}
    option = options.get(name, "--label_columns" if name.startswith("label ") else f"--{name}_column")
    way_out = f"{f'{near} Else ' if near else ': '}give {option}"
    if format_of(path)[0] == "txt":
        way_out += ", or --input_format txt to read its lines as they stand"
    return UserError(f"{path} has no column {column!r}; it has {listed}{way_out}")


# ---- csv and jsonl ----


def _text_lines(path: str, table: TableOptions, repairs: Counter[str]) -> Iterator[str]:
    """Lines with their ends; bytes that a given encoding cannot decode are characters of `UNDECODED`.

    Where the first line ends with CR, lines may; else CR alone is text, as in a cell that was written on an old Mac.
    """
    head = head_of(path)
    marked = mark_of(head)
    if not marked and not table.encoding and head.count(0) > len(head) // 5:
        raise UserError(f"{path} looks like UTF-16 or is no text: give --encoding utf-16-le, or make it a text file")
    encoding = codecs.lookup(table.encoding or marked or "utf-8").name
    errors = "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    number = 0
    try:
        end = LINE_END.search(head.decode(encoding, "ignore"))
        newline = "" if end is not None and end.group() == "\r" else "\n"
        with opened(path) as file:
            stream = io.TextIOWrapper(file, encoding, errors=errors, newline=newline)
            while line := stream.readline(MAX_RECORD_BYTES):
                number += 1
                if len(line) >= MAX_RECORD_BYTES:
                    raise UserError(f"{path}:{number}: the line is longer than 64 MiB; is it a table?")
                if not table.encoding and (found := UNDECODED.search(line)) is not None:
                    place = len(line[: found.start()].encode("utf-8", "surrogateescape")) + 1
                    raise UserError(
                        f"{path}:{number}: byte {place} of the line is 0x{ord(found[0]) - 0xDC00:02X}, which is not "
                        f"UTF-8; give --encoding with what the table is ({' or '.join(encodings_of(head_of(path)))} "
                        "would read it), or --encoding utf-8 to leave such rows out"
                    )
                if line.startswith("\ufeff"):  # also where one file was put behind another
                    repairs["byte_order_marks"] += 1
                    line = line[1:]
                if "\0" in line:
                    repairs["nul_characters"] += line.count("\0")
                    line = line.replace("\0", "")
                yield line
    except UnicodeError as error:
        raise UserError(f"{path}: behind line {number} it is not {encoding} ({error}); give --encoding") from error


def _csv_records(path: str, kind: str, table: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    lines = _text_lines(path, table, repairs)
    before: list[str] = []  # lines without a row, so that lines are counted as in an editor
    delimiter = table.delimiter
    for first in lines:
        if said := _EXCEL_DELIMITER.fullmatch(first):
            delimiter = delimiter or said[1]
        elif first.strip():
            break
        before.append("\n")
    else:
        raise UserError(f"{path} is empty; it must begin with a header that names the columns")
    delimiter = delimiter or _find_delimiter(first, kind, table)
    rows = csv_rows(itertools.chain(before, [first], lines), delimiter, table.quotes)
    top = next(rows)
    if top.stray_from:
        raise UserError(f"{path}:{top.first}: {_stray_quote(top)}; the header must name the columns")
    header = [name.strip() for name in top.fields]
    columns = _find_columns(path, header, table)
    names, may_be_dashes = _normal(header, sum(map(bool, header)) > 1), True
    for row in rows:
        if may_be_dashes and not row.stray_from and _DASHES.fullmatch(delimiter.join(row.fields)):
            repairs["lines_of_dashes"] += 1
        else:
            fields = _csv_fields(row, header, names, columns, delimiter)
            if isinstance(fields, BadRow) and fields.reason == _OTHER_ORDER:
                raise fields.error(path)
            yield row.first, fields
        may_be_dashes = False


def _csv_fields(
    row: CsvRow, header: list[str], names: list[str], columns: dict[str, int], delimiter: str
) -> Fields | BadRow:
    """What is read from a row, or why it is none; columns without a name at the end may be missing."""
    fields, most = row.fields, len(header)
    least = max((place for place, name in enumerate(header, 1) if name), default=0)
    raw = delimiter.join(fields)
    number = f"{len(fields)} where the header has"
    upto = f", on the lines {row.first} to {row.last}" if row.last > row.first else ""
    if UNDECODED.search(raw):
        fault = _UNDECODABLE
    elif row.stray_from:
        fault = "stray quote", _stray_quote(row)
    elif len(fields) < least:
        fault = "too few fields", f"{number} {least}{upto}"
    elif any(field.strip() for field in fields[most:]):
        fault = "too many fields", f"{number} {most}{upto}; a text with {delimiter!r} in it must stand in quotes"
    elif again := _header_again(fields, names):
        fault = again, "were tables put one behind the other? Cut the file in front of this line"
    else:
        return {name: fields[place] for name, place in columns.items()}
    return BadRow(row.first, *fault, raw)


def _header_again(fields: list[str], names: list[str]) -> str:
    """What a row is that holds the names of the columns (see `_normal`) and nothing else; "" for others."""
    if fields[0].strip().casefold() not in names and fields[0].strip() not in names:  # most rows
        return ""
    found = _normal(fields, len(names) > 1)
    if found == names:
        return "header repeated"
    return _OTHER_ORDER if sorted(found) == sorted(names) else ""


def _normal(fields: list[str], several: bool) -> list[str]:
    """The cells that are not empty; case says nothing where there are several columns."""
    filled = filter(None, map(str.strip, fields))
    return list(map(str.casefold, filled) if several else filled)


def _stray_quote(row: CsvRow) -> str:
    what = "closes in the midst of a field in" if row.closed else "is not closed up to"
    return (
        f"the quote that opens a field in line {row.stray_from} {what} line {row.last}; put a text with quotes in "
        "it in quotes and double its own, or give --no_quotes where quotes mean nothing"
    )


def _find_delimiter(line: str, kind: str, table: TableOptions) -> str:
    """The delimiter with which the header has the wanted columns; otherwise the one that gives the most."""
    candidates = sorted(_DELIMITERS, key=lambda mark: mark != "\t") if kind == "tsv" else list(_DELIMITERS)
    headers = {
        mark: [name.strip() for row in csv_rows(iter([line]), mark, table.quotes) for name in row.fields]
        for mark in candidates
    }
    wanted = set(table.columns().values())
    return max(candidates, key=lambda mark: (len(wanted & set(headers[mark])), len(headers[mark])))


def _json_records(path: str, table: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    names: dict[str, None] = {}
    columns = missing = table.columns()
    for number, line in enumerate(_text_lines(path, table, repairs), 1):
        if not line.strip():
            continue
        record: Any = None
        fault = ("no JSON record", "")
        try:
            if UNDECODED.search(line):
                fault = _UNDECODABLE
            elif not isinstance(record := json.loads(line), dict):
                fault = fault[0], f"a {type(record).__name__} instead of an object"
        except (ValueError, RecursionError) as error:
            fault = fault[0], str(error) or type(error).__name__
        if fault[1]:
            yield number, BadRow(number, *fault, line.strip())
            continue
        if missing:
            names.update(dict.fromkeys(record))
            missing = {name: column for name, column in missing.items() if column not in record}
        yield number, {name: record.get(column) for name, column in columns.items()}
    if missing and names:
        name, column = next(iter(missing.items()))
        raise _no_column(path, name, column, names)


def _parquet_records(path: str, table: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    with opened(path) as file, tempfile.TemporaryFile() as unpacked:
        source: IO[bytes] = file
        if format_of(path)[1]:  # parquet is read from its end, which a compressed stream cannot do
            shutil.copyfileobj(file, unpacked, 1 << 22)
            unpacked.seek(0)
            source = unpacked
        try:
            parquet = pyarrow.parquet.ParquetFile(source)
            _find_columns(path, parquet.schema_arrow.names, table)
            columns = table.columns()
            number = 0
            for batch in parquet.iter_batches(batch_size=1000, columns=list(columns.values())):
                for record in batch.to_pylist():
                    number += 1
                    yield number, {name: record[column] for name, column in columns.items()}
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a parquet file that can be read ({shortened(error, 300)})") from error


def _arrow_records(path: str, table: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    """Of a stream of Arrow batches, as `datasets` saves one."""
    import pyarrow

    number, columns = 0, table.columns()
    with opened(path) as file:
        try:
            stream = pyarrow.ipc.open_stream(file)
            _find_columns(path, stream.schema.names, table)
            for batch in stream:
                for record in batch.select(list(columns.values())).to_pylist():
                    number += 1
                    yield number, {name: record[column] for name, column in columns.items()}
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not an Arrow stream that can be read ({shortened(error, 300)})") from error


# ---- rows of a labelled table ----


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
        raise UserError(f"the labels must differ and none may be empty: {in_words(table.labels, quoted)}")
    known = frozenset(table.labels)
    for line, fields in read_records(str(path), table, repairs):
        row = fields if isinstance(fields, BadRow) else _row(line, fields, table, known, repairs)
        if isinstance(row, BadRow) and table.on_bad_row == "fail":
            raise row.error(path)
        yield row


class _WrongKindError(Exception):
    """A value that is no plain text, number or date; says what it is."""


def _row(line: int, fields: Fields, table: TableOptions, known: frozenset[str], repairs: Counter[str]) -> Row | BadRow:
    """A row from its fields, or what is wrong with it."""
    values: dict[str, str] = {}
    labels: tuple[str, ...] | None = ()

    def bad(reason: str, details: str) -> BadRow:
        raw = " | ".join(f"{name}={fields.get(name)!s:.80}" for name in table.columns())
        return BadRow(line, reason, details, raw, values.get("id") or None)

    for name, column in table.columns().items():
        value = fields.get(name)
        try:
            if name == "label":
                labels = _labels(value, table.separator, known, repairs)
                continue
            if name.startswith("label "):
                if (holds := _yes_or_no(value, repairs)) is None:
                    return bad("empty label", f"nothing in {column!r}")
                labels = (*(labels or ()), *([column] if holds else []))
                continue
            values[name] = _plain(value, repairs) or ""
            if name == "id" and values[name] and isinstance(value, str):
                values[name] = without_faults(value)[0]  # as it stands: others join by it
            if name == "text" and values[name] and not isinstance(value, str):
                raise _WrongKindError(f"a {type(value).__name__}")
        except _WrongKindError as error:
            return bad(f"{name} of the wrong kind", f"{column!r} is {error}")
    if not values["text"]:
        return bad("empty text", f"nothing in {table.text!r}")
    if labels is None:
        return bad("empty label", f"nothing in {table.label!r}")
    if unknown := [label for label in labels if known and label not in known]:
        # A search among many labels, or for a long one, takes too long.
        few = len(table.labels) <= _MOST_TO_COMPARE and len(unknown[0]) <= _LONGEST_TO_COMPARE
        near = nearest(unknown[0], table.labels) if few else ""
        return bad("unknown label", f"{quoted(unknown[0])} is not one of {in_words(table.labels, quoted)}{near}")
    part = _PART_NAMES.get(values["split"].lower()) if table.split else None
    if table.split and part is None:
        return bad("unknown part", f"{quoted(values['split'])} in {table.split!r} is none of {', '.join(PARTS)}")
    return Row(line, values["text"], labels, values.get("id") or None, values.get("group") or None, part)


def _labels(value: Any, separator: str, known: frozenset[str], repairs: Counter[str]) -> tuple[str, ...] | None:
    """The labels of a row, each once; None where none is told."""
    parts: list[str | None]
    if separator and isinstance(value, (list, tuple)):
        parts = [_plain(part, repairs) for part in value]  # one label each, also where the separator stands in it
        if None in parts:
            raise _WrongKindError("a list in which a value is missing")
        return tuple(dict.fromkeys(part for part in parts if part))
    whole = _plain(value, repairs)
    if whole is None or not (whole or separator):
        return None
    if whole and isinstance(value, str) and value != whole:
        repairs["labels_with_white_space_around_them"] += 1
    if whole in known:
        return (whole,)
    try:
        items = items_of(whole)
    except ValueError:
        raise _WrongKindError(f"{quoted(whole)}, which looks like a list and cannot be read as one") from None
    if items is None and not separator:
        return (whole,)
    if not separator:
        raise _WrongKindError(
            f"the list {quoted(whole)}: give --separator '|' where a row has several labels, --labels where that is one"
        )
    found = whole.split(separator) if items is None else items
    if items is None and len(found) > 1 and whole[0] + whole[-1] in ("[]", "{}", "()") and whole[-1] not in found[0]:
        raise _WrongKindError(f"{quoted(whole)}, which looks like a list and cannot be read as one")
    if items is not None:
        repairs["lists_of_labels_in_one_cell"] += 1
    return tuple(dict.fromkeys(part for part in map(str.strip, found) if part))


def _yes_or_no(value: Any, repairs: Counter[str]) -> bool | None:
    """What a column of one label says of it; None where nothing."""
    text = (_plain(value, repairs) or "").casefold()
    if text in ("1", "1.0", "true", "yes"):
        return True
    if text in ("0", "0.0", "false", "no", ""):
        return False if text else None
    raise _WrongKindError(f"{quoted(text)}, neither 1 nor 0")


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
