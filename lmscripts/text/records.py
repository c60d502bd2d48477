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
from lmscripts.text.reading import MAX_RECORD_BYTES, format_of, open_binary, reading

_DELIMITERS = (",", "\t", ";", "|")
_MARKS = (  # the longer ones first, as one begins with another
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNDECODED = re.compile("[\udc80-\udcff]")
SURROGATE = re.compile("[\ud800-\udfff]")
RAW_CHARACTERS = 200


@dataclass(frozen=True)
class TableOptions:
    """How a table is read.

    Attributes:
        text, label: names of their columns; an empty `label` reads texts without labels.
        id, group, split: names of further columns, empty for none; what `split` holds is train, validation or test.
        labels: all labels in their order; empty takes those of the table, sorted (as numbers where all are).
        separator: between the labels of a row in a table with several (`a|b`); empty for one label a row.
        format: csv, tsv, jsonl or parquet; empty goes by the name of the file.
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
    format: Literal["", "csv", "tsv", "jsonl", "parquet"] = ""
    delimiter: str = ""
    encoding: str = ""
    quotes: bool = True
    on_bad_row: Literal["skip", "fail"] = "skip"

    def columns(self) -> dict[str, str]:
        """What is read -> the column from which it is read."""
        names = {name: getattr(self, name) for name in ("text", "label", "id", "group", "split")}
        return {name: column for name, column in names.items() if column}


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used: its first line, a reason of few kinds, the details, and its beginning."""

    line: int
    reason: str
    details: str
    raw: str


Fields = dict[str, Any]
Record = tuple[int, "Fields | BadRow"]


def read_records(path: str, options: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    """(first line, what is read -> what stands in its column) of every record, or why it is none.

    Raises:
        UserError: no such file, format, column or encoding; a damaged file.
    """
    kind = options.format or format_of(path)[0]
    if kind == "txt":
        raise UserError(f"the name of {path} does not say its format: let it end in .csv, .tsv, .jsonl or .parquet")
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(f"the table {path} {what} (seen from {Path.cwd()})")
    readers = {"csv": _csv_records, "tsv": _csv_records, "jsonl": _json_records, "parquet": _parquet_records}
    with reading(path):
        yield from readers[kind](path, options, repairs)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name nearest to a given one, as the end of a sentence; empty where none is near."""
    by_case = {each.strip().lower(): each for each in known}
    near = difflib.get_close_matches(name.strip().lower(), list(by_case), n=1)
    return f"; did you mean {by_case[near[0]]!r:.60}?" if near else ""


def check_encoding(encoding: str) -> None:
    """Refuse what Python has no codec of text for.

    Raises:
        UserError: no such encoding, or a codec that turns bytes into bytes.
    """
    try:
        # "hex", "zlib" and "rot13" are codecs too; that they are none of text is only said under this name.
        is_text = getattr(codecs.lookup(encoding), "_is_text_encoding", True)
    except (LookupError, ValueError):
        is_text = False
    if not is_text:
        raise UserError(f"there is no encoding of text {encoding!r:.60}; cp932, euc-jp or latin-1, for example")


def _find_columns(path: str, header: Sequence[str], options: TableOptions) -> dict[str, int]:
    """What is read -> its place in the header.

    Raises:
        UserError: a column is missing or there twice.
    """
    if twice := [name for name, number in Counter(header).items() if number > 1 and name in options.columns().values()]:
        raise UserError(f"{path} has the column {twice[0]!r} more than once; rename one of them")
    for name, column in options.columns().items():
        if column not in header:
            raise _no_column(path, name, column, header)
    return {name: header.index(column) for name, column in options.columns().items()}


def _no_column(path: str, name: str, column: str, header: Iterable[str]) -> UserError:
    names = list(header)
    shown = ", ".join(f"{each!r:.40}" for each in names[:12]) + (" ..." if len(names) > 12 else "")
    near = nearest(column, names)
    way_out = f"give --{name}" + ("_column" if name not in ("text", "label") else "")
    return UserError(f"{path} has no column {column!r}; it has {shown}{f'{near} Else ' if near else ': '}{way_out}")


# ---- csv and jsonl ----


def _text_lines(path: str, options: TableOptions, repairs: Counter[str]) -> Iterator[str]:
    """Lines with their ends (LF, CRLF or CR); what a given encoding cannot decode is U+DC80 to U+DCFF."""
    with open_binary(path) as file:
        head = file.read(4096)
    marked = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "")
    if not marked and not options.encoding and head.count(0) > len(head) // 5:
        raise UserError(f"{path} looks like UTF-16 or is no text: give --encoding utf-16-le, or make it a text file")
    encoding = codecs.lookup(options.encoding or marked or "utf-8").name
    wide = encoding.startswith(("utf-16", "utf-32"))
    number = 0
    with open_binary(path) as file:
        stream = io.TextIOWrapper(file, encoding, errors="strict" if wide else "surrogateescape", newline="")
        try:
            while line := stream.readline(MAX_RECORD_BYTES):
                number += 1
                if len(line) >= MAX_RECORD_BYTES:
                    raise UserError(f"{path}:{number}: the line is longer than 64 MiB; is it a table?")
                if not options.encoding and (found := _UNDECODED.search(line)) is not None:
                    place = len(line[: found.start()].encode("utf-8", "surrogateescape")) + 1
                    byte = f"byte {place} of the line is 0x{ord(found.group()) - 0xDC00:02X}, which is not UTF-8"
                    raise UserError(f"{path}:{number}: {byte}; {_encoding_hint(path)}")
                if "\0" in line:
                    repairs["nul_characters"] += line.count("\0")
                    line = line.replace("\0", "")
                yield line.removeprefix("\ufeff") if number == 1 else line
        except UnicodeError as error:
            raise UserError(f"{path}: behind line {number} it is not {encoding} ({error}); give --encoding") from error


def _encoding_hint(path: str) -> str:
    """The way out, with the encodings that read the beginning of the file without a fault."""
    with open_binary(path) as file:
        head = file.read(1 << 20)
    fits = []
    for encoding in ("cp932", "euc-jp", "cp1252", "latin-1"):
        try:
            codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        fits.append(encoding)
    return (
        f"give --encoding with what the table is ({' or '.join(fits)} would read it), or --encoding utf-8 to leave "
        "such rows out"
    )


def _csv_records(path: str, options: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    first, lines = "", _text_lines(path, options, repairs)
    num_blank = 0
    for first in lines:
        if first.strip():
            break
        num_blank += 1
    if not first.strip():
        raise UserError(f"{path} is empty; it must begin with a header that names the columns")
    delimiter = options.delimiter or _find_delimiter(path, first, options)
    rows = csv_rows(itertools.chain(["\n"] * num_blank, [first], lines), delimiter, options.quotes)
    top = next(rows)
    if top.stray_from:
        raise UserError(f"{path}:{top.first}: {_stray_quote(top)}; the header must name the columns")
    header = [name.strip() for name in top.fields]
    columns = _find_columns(path, header, options)
    width = max((place for place, name in enumerate(header, 1) if name), default=0)
    may_be_dashes = True
    for row in rows:
        if may_be_dashes and not row.stray_from and _is_dashes(delimiter.join(row.fields)):
            repairs["lines_of_dashes"] += 1
        else:
            yield row.first, _csv_fields(row, (width, len(header)), columns, delimiter)
        may_be_dashes = False


def _is_dashes(line: str) -> bool:
    return not line.strip("-=_+|:,; \t") and re.search("[-=]{3}", line) is not None


def _csv_fields(row: CsvRow, widths: tuple[int, int], columns: dict[str, int], delimiter: str) -> Fields | BadRow:
    """What is read from a row, or why it is none; it has from the one to the other number of fields."""
    fields, (least, most) = row.fields, widths
    raw = delimiter.join(fields)
    shown = SURROGATE.sub("\ufffd", raw)[:RAW_CHARACTERS]
    upto = f", on the lines {row.first} to {row.last}" if row.last > row.first else ""
    if _UNDECODED.search(raw):
        return BadRow(row.first, "cannot be decoded", "it holds bytes that are not of the given encoding", shown)
    if row.stray_from:
        return BadRow(row.first, "stray quote", _stray_quote(row), shown)
    if len(fields) < least:
        return BadRow(row.first, "too few fields", f"{len(fields)} where the header has {least}{upto}", shown)
    if any(field.strip() for field in fields[most:]):
        way_out = f"a text with {delimiter!r} in it must stand in quotes"
        return BadRow(
            row.first, "too many fields", f"{len(fields)} where the header has {most}{upto}; {way_out}", shown
        )
    return {name: fields[place] for name, place in columns.items()}


def _stray_quote(row: CsvRow) -> str:
    what = "closes in the midst of a field in" if row.closed else "is not closed up to"
    return (
        f"the quote that opens a field in line {row.stray_from} {what} line {row.last}; put a text with quotes in "
        "it in quotes and double its own, or give --no_quotes where quotes mean nothing"
    )


def _find_delimiter(path: str, line: str, options: TableOptions) -> str:
    """The delimiter with which the header has the wanted columns; otherwise the one that gives the most."""
    kind = options.format or format_of(path)[0]
    candidates = sorted(_DELIMITERS, key=lambda mark: mark != "\t") if kind == "tsv" else list(_DELIMITERS)
    headers = {
        mark: [name.strip() for row in csv_rows(iter([line]), mark, options.quotes) for name in row.fields]
        for mark in candidates
    }
    wanted = set(options.columns().values())
    return max(candidates, key=lambda mark: (len(wanted & set(headers[mark])), len(headers[mark])))


def _json_records(path: str, options: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    names: dict[str, None] = {}
    missing = options.columns()
    for number, line in enumerate(_text_lines(path, options, repairs), 1):
        if not line.strip():
            continue
        shown = SURROGATE.sub("\ufffd", line.strip())[:RAW_CHARACTERS]
        if _UNDECODED.search(line):
            yield (
                number,
                BadRow(number, "cannot be decoded", "it holds bytes that are not of the given encoding", shown),
            )
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, BadRow(number, "no JSON record", str(error) or type(error).__name__, shown)
            continue
        if not isinstance(record, dict):
            yield number, BadRow(number, "no JSON record", f"a {type(record).__name__} instead of an object", shown)
            continue
        if missing:
            names.update(dict.fromkeys(record))
            missing = {name: column for name, column in missing.items() if column not in record}
        yield number, {name: record.get(column) for name, column in options.columns().items()}
    if missing and names:
        name, column = next(iter(missing.items()))
        raise _no_column(path, name, column, names)


# ---- parquet ----


def _parquet_records(path: str, options: TableOptions, repairs: Counter[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    with open_binary(path) as file, tempfile.TemporaryFile() as unpacked:
        source: IO[bytes] = file
        if format_of(path)[1]:  # parquet is read from its end, which a compressed stream cannot do
            shutil.copyfileobj(file, unpacked, 1 << 22)
            unpacked.seek(0)
            source = unpacked
        try:
            table = pyarrow.parquet.ParquetFile(source)
            _find_columns(path, table.schema_arrow.names, options)
            columns = options.columns()
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=list(columns.values())):
                for record in batch.to_pylist():
                    number += 1
                    yield number, {name: record[column] for name, column in columns.items()}
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path} is not a parquet file that can be read ({reason})") from error
