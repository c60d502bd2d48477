"""From the bytes of a file to clean lines and records: decompression, encoding, repairs, and the count of each.

Nothing here needs memory that grows with the file. Every repair is counted in a `TextReport`, with the first few
places, and nothing is dropped without being counted.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, cast

from lmscripts.errors import UserError
from lmscripts.text.report import Place, TextReport

MAX_LINE_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 26
HEAD_BYTES = 1 << 16

FORMATS = {
    ".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")

_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_END = re.compile("\r\n|\r|\n")
_SENTENCE_ENDS = tuple(mark.encode() for mark in "。．！？!?")
_SPACES = tuple(mark.encode() for mark in " \t\u3000")


def format_of(path: str | Path) -> tuple[str, str]:
    """(format, compression) by the file's suffixes; a name without a known suffix is plain text."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return FORMATS.get(suffixes[-1] if suffixes else "", "txt"), compression


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what a decompressor says about a damaged file into a sentence that names the file."""
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    try:
        yield
    except damaged as error:
        raise UserError(f"{path} is damaged or cut off ({error}); make the file again or leave it out") from error
    except OSError as error:
        if error.errno is None:  # bz2 reports bad data so
            raise UserError(f"{path} is damaged ({error}); make the file again or leave it out") from error
        raise


def open_binary(path: str) -> IO[bytes]:
    """Open a file for reading bytes, decompressed according to its suffix."""
    compression = format_of(path)[1]
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".bz2":
        return bz2.open(path, "rb")
    if compression == ".zst":
        return io.BufferedReader(_ZstandardFile(path), 1 << 18)
    return open(path, "rb")


class _ZstandardFile(io.RawIOBase):
    """Reads .zst frame by frame, because zstandard's own reader takes a file that is cut off for a complete one."""

    def __init__(self, path: str) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._file = open(path, "rb")  # noqa: SIM115 (closed in close)
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._file.read(1 << 17)
            if not block:
                if self._frame is not None:
                    raise EOFError("the last zstandard frame has no end")
                return 0
            parts = []
            while block:
                if self._frame is None:
                    self._frame = self._new_frame()
                try:
                    parts.append(self._frame.decompress(block))
                except self._error as error:
                    raise EOFError(str(error)) from error
                block = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = None
            self._ready = b"".join(parts)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def check_encoding(path: str) -> None:
    """Refuse a file whose beginning is not UTF-8 text at all, as opposed to one with a few damaged bytes.

    Raises:
        UserError: UTF-16 or UTF-32, an older Japanese encoding, or no text; with the command that converts it.
    """
    with reading(path), open_binary(path) as file:
        head = file.read(HEAD_BYTES)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 5:
        guess = "UTF-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "UTF-16LE"
        raise UserError(_not_utf8(path, f"looks like {guess} or is not text", guess))
    lines = head.split(b"\n")
    texts = [line.decode("utf-8", "replace") for line in (lines[:-1] if len(head) == HEAD_BYTES else lines)]
    filled = [text for text in texts if text.strip()]
    invalid = sum(text.count("\ufffd") for text in filled)
    foreign = sum(not character.isascii() for text in filled for character in text)
    # A few damaged bytes are repaired and counted; another encoding spoils most of what is not ASCII in many lines.
    spoilt_lines = sum("\ufffd" in text for text in filled)
    if invalid >= 10 and spoilt_lines * 10 > len(filled) and invalid * 10 >= foreign * 3:
        for encoding in ("EUC-JP", "CP932"):
            try:
                head[: head.rfind(b"\n") + 1 or len(head)].decode(encoding)
            except UnicodeDecodeError:
                continue
            raise UserError(_not_utf8(path, f"is not UTF-8 but reads as {encoding}", encoding))
        raise UserError(_not_utf8(path, "is not UTF-8", "ITS-ENCODING"))


def _not_utf8(path: str, finding: str, encoding: str) -> str:
    return f"{path} {finding}; convert it first: iconv -f {encoding} -t UTF-8 {path} > {path}.utf8.txt"


def raw_lines(stream: IO[bytes], size: int | None = None, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[bytes, bool]]:
    """Lines as bytes, ended by LF, CRLF or CR, read in blocks so that no line is ever held beyond `limit`.

    Args:
        stream: opened for reading bytes, standing at the start of a line.
        size: read that many bytes only; None reads to the end.
        limit: bytes after which a line is cut: behind a sentence end, else behind a space, else between characters.

    Yields:
        (line, True), or (piece, False) for a piece of a line that goes on in what comes next.
    """
    carry, left = b"", size
    while True:
        block = stream.read(limit if left is None else min(limit, left))
        left = None if left is None else left - len(block)
        data = carry + block
        # A CR at the very end may be the first half of a CRLF: it waits for the next block.
        waiting = b"\r" if block and data.endswith(b"\r") else b""
        data = data[: len(data) - len(waiting)]
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        carry = lines.pop()
        for line in lines:
            while len(line) > limit:
                cut = cut_position(line, limit)
                yield line[:cut], False
                line = line[cut:]
            yield line, True
        while len(carry) > limit:
            cut = cut_position(carry, limit)
            yield carry[:cut], False
            carry = carry[cut:]
        if not block:
            if carry:
                yield carry, True
            return
        carry += waiting


def cut_position(line: bytes, limit: int) -> int:
    """Where to cut a line that is longer than `limit` bytes; at least 1 and at most `limit`."""
    for marks in (_SENTENCE_ENDS, _SPACES):
        ends = [position + len(mark) for mark in marks if (position := line.rfind(mark, 0, limit)) >= 0]
        if ends:
            return max(ends)
    cut = limit
    while cut > max(limit - 4, 1) and line[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return cut


def clean_bytes(raw: bytes, report: TextReport, place: Place, keep_spaces: bool = False) -> str:
    """A line as text: decoded, without control characters and surrounding white space, repairs counted."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "replace")
        report.count("invalid_utf8_lines", 1, place)
    return clean_text(text, report, place, keep_spaces)


def clean_text(text: str, report: TextReport, place: Place, keep_spaces: bool = False) -> str:
    """A line without control characters and (unless `keep_spaces`) surrounding white space, repairs counted."""
    if _CONTROL.search(text):
        if number := text.count("\0"):
            report.count("nul_characters", number, place)
            text = text.replace("\0", "")
        text, number = _CONTROL.subn(" ", text)
        if number:
            report.count("control_characters", number, place)
    return text if keep_spaces else text.strip()


def record_lines(text: str, report: TextReport, place: Place, keep_spaces: bool = False) -> list[str]:
    """The clean lines of one record's text: those that are not empty, or with `keep_spaces` all from first to last."""
    if _SURROGATE.search(text):  # JSON may escape half a character, which no encoding can hold
        text = _SURROGATE.sub("\ufffd", text)
        report.count("invalid_utf8_lines", 1, place)
    lines = []
    for line in _LINE_END.split(text):
        if len(line) * 4 > MAX_LINE_BYTES and len(raw := line.encode()) > MAX_LINE_BYTES:
            for piece, ends in raw_lines(io.BytesIO(raw)):
                report.count("long_lines_cut", 0 if ends else 1, place)
                lines.append(clean_bytes(piece, report, place, keep_spaces))
        else:
            lines.append(clean_text(line, report, place, keep_spaces))
    filled = [number for number, line in enumerate(lines) if line.strip()]
    if keep_spaces:
        return lines[filled[0] : filled[-1] + 1] if filled else []
    return [lines[number] for number in filled]


def read_records(
    path: str, text_column: str, on_bad_line: Literal["skip", "fail"], report: TextReport
) -> Iterator[tuple[str, Place]]:
    """(text, place) of every record of a jsonl, csv, tsv or parquet file.

    Raises:
        UserError: no such column, a damaged file, or a bad record where `on_bad_line` is "fail".
    """
    readers = {"jsonl": _json_records, "csv": _csv_records, "tsv": _csv_records, "parquet": _parquet_records}
    with reading(path):
        for number, text in readers[format_of(path)[0]](path, text_column, report):

            def place(number: int = number) -> str:
                return f"{path}:{number}"

            if isinstance(text, Exception):
                if on_bad_line == "fail":
                    raise UserError(f"{path}:{number}: {text}") from text
                report.count("bad_records_dropped", 1, place)
            elif text is None or not text.strip():
                report.count("records_without_text", 1, place)
            else:
                yield text, place


Records = Iterator[tuple[int, "str | Exception | None"]]


def _table_lines(path: str, report: TextReport) -> Iterator[tuple[int, str]]:
    """Numbered lines of a table as text with their line ends, NUL removed (csv before 3.11 cannot hold it)."""
    check_encoding(path)
    with open_binary(path) as file:
        number = 0
        while raw := file.readline(MAX_RECORD_BYTES):
            number += 1
            if len(raw) == MAX_RECORD_BYTES:
                raise UserError(f"{path}:{number}: the line is longer than 64 MiB; split the record")
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                raw = raw[3:]
                report.count("byte_order_marks")
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                text = raw.decode("utf-8", "replace")
                report.count("invalid_utf8_lines", 1, lambda: f"{path}:{number}")  # noqa: B023 (called at once)
            if "\0" in text:
                report.count("nul_characters", text.count("\0"), lambda: f"{path}:{number}")  # noqa: B023
                text = text.replace("\0", "")
            yield number, text


def _json_records(path: str, text_column: str, report: TextReport) -> Records:
    seen = False
    for number, line in _table_lines(path, report):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"not a JSON record ({error})")
            continue
        if not isinstance(record, dict):
            yield number, ValueError(f"a JSON {type(record).__name__} where an object is expected")
            continue
        if not seen and text_column not in record:
            raise _no_column(path, text_column, list(record))
        seen = True
        text = record.get(text_column)
        bad = text is not None and not isinstance(text, str)
        yield number, ValueError(f"{text_column!r} is no text but {type(text).__name__}") if bad else text


def _csv_records(path: str, text_column: str, report: TextReport) -> Records:
    csv.field_size_limit(MAX_RECORD_BYTES)
    numbered = _table_lines(path, report)
    reader = csv.reader((line for _, line in numbered), dialect="excel-tab" if "tsv" in format_of(path) else "excel")
    header: list[str] | None = None
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, ValueError(f"not a row of the table ({error})")
            continue
        if row is None:
            return
        if header is None:
            header = row
            if text_column not in header:
                raise _no_column(path, text_column, header)
            column = header.index(text_column)
        elif row:
            yield reader.line_num, row[column] if column < len(row) else None


def _parquet_records(path: str, text_column: str, report: TextReport) -> Records:
    import pyarrow
    import pyarrow.parquet

    with open_binary(path) as file, tempfile.TemporaryFile() as unpacked:
        source: IO[bytes] = file
        if format_of(path)[1]:  # parquet is read from its end, which a compressed stream cannot do
            while block := file.read(1 << 22):
                unpacked.write(block)
            unpacked.seek(0)
            source = unpacked
        try:
            table = pyarrow.parquet.ParquetFile(source)
            if text_column not in table.schema_arrow.names:
                raise _no_column(path, text_column, table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    bad = text is not None and not isinstance(text, str)
                    yield number, ValueError(f"{text_column!r} is no text but {type(text).__name__}") if bad else text
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a parquet file that can be read ({error})") from error


def _no_column(path: str, text_column: str, columns: list[str]) -> UserError:
    return UserError(
        f"{path} has no column {text_column!r}; it has {', '.join(map(repr, columns))}: give --text_column"
    )
