"""The records of a csv, tsv, jsonl or parquet file as they stand there, in memory that does not grow with the file."""

from __future__ import annotations

import codecs
import difflib
import io
import itertools
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from lmscripts.errors import UserError
from lmscripts.text.csv_rows import CsvRow, csv_rows
from lmscripts.text.reading import (
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
)

_DELIMITERS = (",", "\t", ";", "|")
_LINE_END = re.compile("\r\n|\r|\n")
_EXCEL_DELIMITER = re.compile(r'\s*"?sep=(.)"?\s*', re.IGNORECASE)
RAW_CHARACTERS = 200


@dataclass(frozen=True)
class TableOptions:
    """How a table is read.

    Attributes:
        text, label: names of their columns; an empty `label` reads texts without labels.
        id, group, split: names of further columns, empty for none; what `split` holds is train, validation or test.
        labels: all labels in their order; empty takes those of the table, sorted (as numbers where all are).
        separator: between the labels of a row in a table with several (`a|b`); empty for one label a row.
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
    format: Literal["", "txt", "csv", "tsv", "jsonl", "parquet"] = ""
    delimiter: str = ""
    encoding: str = ""
    quotes: bool = True
    on_bad_row: Literal["skip", "fail"] = "skip"

    def columns(self) -> dict[str, str]:
        """What is read -> the column from which it is read."""
        names = {name: getattr(self, name) for name in ("text", "label", "id", "group", "split")}
        return {name: column for name, column in names.items() if column}


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
    """One row that cannot be used: its first line, a reason of few kinds, the details, and its beginning."""

    line: int
    reason: str
    details: str
    raw: str

    def error(self, path: str | Path) -> UserError:
        """The row as the reason to stop."""
        return UserError(f"{path}:{self.line}: {self.reason}: {self.details} (in {self.raw!r})")


Fields = dict[str, Any]
Record = tuple[int, "Fields | BadRow"]


def read_records(path: str, table: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    """(first line, what is read -> what stands in its column) of every record, or why it is none.

    Args:
        path: the file.
        table: how it is read; `on_bad_row` is for the caller.
        repairs: counts what was put right: "nul_characters", "byte_order_marks", "lines_of_dashes".

    Raises:
        UserError: no such file, format, column or encoding; a damaged file, or one that is no table.
    """
    _check_reading(table)
    check_file(path, "table")
    readers = {"jsonl": _json_records, "parquet": _parquet_records}
    kind = kind_of(path, table.format)
    if kind == "txt":
        raise UserError(f"the name of {path} does not say its format: let it end in .csv, .tsv, .jsonl or .parquet")
    if kind in readers:
        yield from readers[kind](path, table, repairs)
    else:
        yield from _csv_records(path, kind, table, repairs)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name nearest to a given one, as the end of a sentence; empty where none is near."""
    by_case = {each.strip().lower(): each for each in known}
    near = difflib.get_close_matches(name.strip().lower(), list(by_case), n=1)
    return f"; did you mean {by_case[near[0]]!r:.60}?" if near else ""


def check_codec(encoding: str) -> None:
    """Refuse what Python has no codec of text for.

    Raises:
        UserError: no such encoding, or a codec that turns bytes into bytes.
    """
    try:
        "".encode(encoding)  # "hex", "zlib" and "rot13" are codecs too, but not here
    except (LookupError, ValueError):
        raise UserError(
            f"there is no encoding of text {encoding!r:.60}; cp932, euc-jp or latin-1, for example"
        ) from None


def _check_reading(table: TableOptions) -> None:
    columns = list(table.columns().values())
    if not table.text or len(set(columns)) < len(columns):
        raise UserError(f"text, label, id, group and split must be columns of their own, not {', '.join(columns)}")
    if table.delimiter and (len(table.delimiter) != 1 or table.delimiter in '"\r\n'):
        raise UserError(f"the delimiter must be one character, not {table.delimiter!r:.60}")
    check_codec(table.encoding or "utf-8")


def _find_columns(path: str, header: Sequence[str], table: TableOptions) -> dict[str, int]:
    """What is read -> its place in the header.

    Raises:
        UserError: a column is missing or there twice.
    """
    columns = table.columns()
    for name, column in columns.items():
        if column not in header:
            raise _no_column(path, name, column, header)
        if header.count(column) > 1:
            raise UserError(f"{path} has the column {column!r} more than once; rename one of them")
    return {name: header.index(column) for name, column in columns.items()}


def _no_column(path: str, name: str, column: str, header: Iterable[str]) -> UserError:
    names = list(header)
    shown = ", ".join(f"{each!r:.40}" for each in names[:12]) + (" ..." if len(names) > 12 else "")
    near = nearest(column, names)
    option = {"text": "--text (--text_column for a corpus)", "label": "--label"}.get(name, f"--{name}_column")
    way_out = f"give {option}"
    if format_of(path)[0] == "txt":
        way_out += ", or --input_format txt to read its lines as they stand"
    return UserError(f"{path} has no column {column!r}; it has {shown}{f'{near} Else ' if near else ': '}{way_out}")


# ---- csv and jsonl ----


def _text_lines(path: str, table: TableOptions, repairs: Counter[str]) -> Iterator[str]:
    """Lines with their ends; bytes that a given encoding cannot decode are characters of `UNDECODED`.

    Where the first line ends with CR, all do; else CR alone is text, as in a cell that was written on an old Mac.
    """
    head = head_of(path)
    marked = mark_of(head)
    if not marked and not table.encoding and head.count(0) > len(head) // 5:
        raise UserError(f"{path} looks like UTF-16 or is no text: give --encoding utf-16-le, or make it a text file")
    encoding = codecs.lookup(table.encoding or marked or "utf-8").name
    errors = "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    number = 0
    try:
        end = _LINE_END.search(head.decode(encoding, "ignore"))
        newline = "\r" if end is not None and end.group() == "\r" else "\n"
        with opened(path) as file:
            stream = io.TextIOWrapper(file, encoding, errors=errors, newline=newline)
            while line := stream.readline(MAX_RECORD_BYTES):
                number += 1
                if len(line) >= MAX_RECORD_BYTES:
                    raise UserError(f"{path}:{number}: the line is longer than 64 MiB; is it a table?")
                if not table.encoding and (found := UNDECODED.search(line)) is not None:
                    raise _not_decoded(path, number, line, found.start())
                if line.startswith("\ufeff"):  # also where one file was put behind another
                    repairs["byte_order_marks"] += 1
                    line = line[1:]
                if "\0" in line:
                    repairs["nul_characters"] += line.count("\0")
                    line = line.replace("\0", "")
                yield line
    except UnicodeError as error:
        raise UserError(f"{path}: behind line {number} it is not {encoding} ({error}); give --encoding") from error


def _not_decoded(path: str, number: int, line: str, position: int) -> UserError:
    place = len(line[:position].encode("utf-8", "surrogateescape")) + 1
    fits = " or ".join(encodings_of(head_of(path)))
    return UserError(
        f"{path}:{number}: byte {place} of the line is 0x{ord(line[position]) - 0xDC00:02X}, which is not UTF-8; give "
        f"--encoding with what the table is ({fits} would read it), or --encoding utf-8 to leave such rows out"
    )


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
    may_be_dashes = True
    for row in rows:
        if may_be_dashes and not row.stray_from and _is_dashes(delimiter.join(row.fields)):
            repairs["lines_of_dashes"] += 1
        else:
            yield row.first, _csv_fields(row, header, columns, delimiter)
        may_be_dashes = False


def _is_dashes(line: str) -> bool:
    return not line.strip("-=_+|:,; \t") and re.search("[-=]{3}", line) is not None


def _csv_fields(row: CsvRow, header: list[str], columns: dict[str, int], delimiter: str) -> Fields | BadRow:
    """What is read from a row, or why it is none; columns without a name at the end may be missing."""
    fields = row.fields
    least, most = max((place for place, name in enumerate(header, 1) if name), default=0), len(header)
    raw = delimiter.join(fields)
    upto = f", on the lines {row.first} to {row.last}" if row.last > row.first else ""

    def bad(reason: str, details: str) -> BadRow:
        return BadRow(row.first, reason, details, SURROGATE.sub("\ufffd", raw)[:RAW_CHARACTERS])

    if UNDECODED.search(raw):
        return bad("cannot be decoded", "it holds bytes that are not of the given encoding")
    if row.stray_from:
        return bad("stray quote", _stray_quote(row))
    if len(fields) < least:
        return bad("too few fields", f"{len(fields)} where the header has {least}{upto}")
    if any(field.strip() for field in fields[most:]):
        way_out = f"a text with {delimiter!r} in it must stand in quotes"
        return bad("too many fields", f"{len(fields)} where the header has {most}{upto}; {way_out}")
    if fields[0].strip() == header[0] and [field.strip() for field in fields[:most]] == header:
        return bad("header repeated", "it names the columns again; were tables put one behind the other?")
    return {name: fields[place] for name, place in columns.items()}


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
        reason, details = "no JSON record", ""
        record: Any = None
        try:
            if UNDECODED.search(line):
                reason, details = "cannot be decoded", "it holds bytes that are not of the given encoding"
            elif not isinstance(record := json.loads(line), dict):
                details = f"a {type(record).__name__} instead of an object"
        except (ValueError, RecursionError) as error:
            details = str(error) or type(error).__name__
        if details:
            yield number, BadRow(number, reason, details, SURROGATE.sub("\ufffd", line.strip())[:RAW_CHARACTERS])
            continue
        if missing:
            names.update(dict.fromkeys(record))
            missing = {name: column for name, column in missing.items() if column not in record}
        yield number, {name: record.get(column) for name, column in columns.items()}
    if missing and names:
        name, column = next(iter(missing.items()))
        raise _no_column(path, name, column, names)


# ---- parquet ----


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
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path} is not a parquet file that can be read ({reason})") from error
