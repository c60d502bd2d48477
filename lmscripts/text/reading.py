"""Files to lines: the one place that opens, unpacks and decodes, and that sees what a file is.

Nothing here needs memory that grows with the file.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import shlex
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lmscripts.errors import UserError
from lmscripts.text.report import Place, TextReport

MAX_LINE_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 26
_HEAD_BYTES = 1 << 16

FORMATS = {
    ".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
_UNPACK = {"": "", ".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}
COMPRESSIONS = tuple(filter(None, _UNPACK))
BINARY = ("parquet", "arrow")  # formats that hold no lines

_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f]")
LINE_END = re.compile("\r\n|\r|\n")
SURROGATE = re.compile("[\ud800-\udfff]")
UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not of the encoding, as "surrogateescape" has them
# The same for a character in two halves of three bytes each, as Java and Oracle write it (CESU-8).
_TWO_HALVES = re.compile("\udced[\udca0-\udcaf][\udc80-\udcbf]\udced[\udcb0-\udcbf][\udc80-\udcbf]")
_BLANK = re.compile(  # white space, and what is neither seen nor space
    r"[\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0]*\Z"
)
_SENTENCE_ENDS = tuple(mark.encode() for mark in "。．！？!?")
_SPACES = tuple(mark.encode() for mark in " \t\u3000")
_MARKS = (  # the longer ones first, as one begins with another
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXT = {  # beginning of a file -> what it is, and the way out
    b"PK\x05\x06": "an empty zip archive",
    b"PK\x03\x04": "an office file (.xlsx, .docx) or a zip archive: save it as CSV or text, or unpack it",
    b"\xd0\xcf\x11\xe0": "an older office file (.xls, .doc): save it as CSV or text",
    b"%PDF-": "a PDF: take its text out, for example with pdftotext",
    b"PAR1": "a parquet file: let its name end in .parquet",
    b"SQLite format 3\0": "an SQLite database: write its texts to a table",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!\x1a": "a rar archive: unpack it",
    b"\x1f\x8b": "packed with gzip: let its name end in .gz",
    b"BZh91AY": "packed with bzip2: let its name end in .bz2",
    b"\xfd7zXZ": "packed with xz: let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "packed with zstandard: let its name end in .zst",
}
_NO_TEXT_BYTES = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_MARKUP = re.compile(rb"<(!doctype|html|\?xml|mediawiki|rss|svg)\b", re.IGNORECASE)
_RECORD = re.compile(rb'\{\s*"[^"]*"\s*:')


# ---- what a file is ----


def format_of(path: str | Path) -> tuple[str, str]:
    """(format, compression) by the file's suffixes; a name without a known suffix is plain text."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return FORMATS.get(suffixes[-1] if suffixes else "", "txt"), compression


def check_file(path: str | Path, what: str) -> None:
    """Refuse what is not there, is no file, or cannot be read; `what` it is meant to be is said in the sentence."""
    place = Path(path)
    if not place.is_file():
        why = "is a folder" if place.is_dir() else "is no file" if place.exists() else "does not exist"
        raise UserError(f"the {what} {path} {why} (seen from {Path.cwd()})")
    try:
        place.open("rb").close()
    except OSError as error:
        raise UserError(f"the {what} {path} cannot be read: {error.strerror}") from error


class DamagedFileError(UserError):
    """A file that cannot be unpacked to its end."""


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """A file for reading bytes, unpacked according to its suffix; damage may be seen anywhere in the block."""
    compression = format_of(path)[1]
    openers: dict[str, Any] = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstandard}
    try:
        with openers[compression](path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of a decompressor
        raise DamagedFileError(
            f"{path} is damaged or cut off ({error}); make the file again or leave it out"
        ) from error


def _open_zstandard(path: str, mode: str) -> IO[bytes]:
    """By pyarrow, as zstandard's own reader takes a file that is cut off for a complete one."""
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 18)


def kind_of(path: str, given: str = "") -> str:
    """How a file is read: as `given` says, else by suffix and content: txt, csv, tsv, jsonl, parquet or arrow.

    Where the first lines are JSON objects, all of the file is JSON lines whatever its name says. What is something else
    by its content is refused.
    """
    kind = given or format_of(path)[0]
    if kind in BINARY:
        return kind
    head = head_of(path)
    for beginning, what in _NO_TEXT.items():
        if head.startswith(beginning):
            raise UserError(f"{path} is {what}")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it")
    if given:
        return kind
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"{") and _begins_with_records(text, len(head) == _HEAD_BYTES):
        return "jsonl"
    is_json = Path(path.lower().removesuffix(format_of(path)[1])).suffix == ".json"
    as_it_is = ", or give --input_format txt to read it as it stands" if kind == "txt" else ""
    if (text.startswith(b"[") and _RECORD.match(text[1:].lstrip())) or (is_json and text[:1] in (b"[", b"{")):
        compression = format_of(path)[1]
        plain = path.removesuffix(compression)
        each = "'.[]'" if _RECORD.match(text[1:].lstrip()) else "'.[] | {text: .}'"
        lines = shlex.quote(f"{plain}l" if is_json else f"{plain}.lines.jsonl")
        jq, source = f"jq -c {each}", shlex.quote(path)
        command = f"{_UNPACK[compression]} -cd {source} | {jq}" if compression else f"{jq} {source}"
        way_out = f": {command} > {lines}" if text[:1] == b"[" else ""
        what = "array" if way_out else "object"
        raise UserError(f"{path} is one JSON {what} from end to end; write a record a line{way_out}{as_it_is}")
    if kind == "txt" and (markup := _MARKUP.match(text)) is not None:
        raise UserError(f"{path} is markup ({markup.group().decode()} ...): take its text out first{as_it_is}")
    return kind


def _begins_with_records(text: bytes, goes_on: bool) -> bool:
    """Whether the first lines, up to twenty, look like JSON objects and the first of them is one."""
    lines = text.splitlines()
    whole = [line for line in (lines[:-1] if goes_on else lines) if line.strip()][:20]
    try:
        is_object = not whole or isinstance(json.loads(whole[0]), dict)
    except (ValueError, RecursionError):
        return False
    return is_object and all(_RECORD.match(line.lstrip()) for line in whole or [text])


def head_of(path: str) -> bytes:
    """The first 64 KiB of what a file holds."""
    with opened(path) as file:
        return file.read(_HEAD_BYTES)


def mark_of(head: bytes) -> str:
    """The encoding that a byte order mark at the beginning says; empty without one."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "")


def encodings_of(head: bytes) -> list[str]:
    """The usual encodings that read the beginning of a file without a fault."""
    fits = []
    for encoding in ("euc-jp", "cp932", "cp1252", "latin-1"):
        with suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder(encoding)().decode(head)
            fits.append(encoding)
    return fits


def _wide_encoding(head: bytes) -> str:
    """Which UTF-32 or UTF-16 without a mark reads the beginning of a file as text; empty for none."""
    found: dict[str, int] = {}
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        with suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(encoding)().decode(head)
            strange = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") and not c.isspace() for c in text)
            if strange * 10 <= len(text):
                found[encoding] = sum(map(str.isascii, text))  # the wrong order of bytes makes letters rare characters
    return max(found, key=found.__getitem__, default="")


def check_utf8(path: str) -> None:
    """Refuse a file whose beginning is not UTF-8 text at all, as opposed to one with a few damaged bytes.

    Raises:
        UserError: UTF-16 or UTF-32, an older encoding, or no text; with the command that converts it.
    """
    head = head_of(path)
    encoding = mark_of(head).replace("utf-8-sig", "")
    lines = head.split(b"\n")
    whole = lines[:-1] if len(head) == _HEAD_BYTES else lines
    texts = [_joined(line.decode("utf-8", "surrogateescape"))[0] for line in whole]
    filled = [text for text in texts if text.strip()]
    invalid = sum(text.count("\ufffd") for text in filled)
    foreign = sum(not character.isascii() for text in filled for character in text)
    # A few damaged bytes are repaired and counted; another encoding spoils most of what is not ASCII in many lines.
    spoilt_lines = sum("\ufffd" in text for text in filled)
    is_spoilt = invalid >= 10 and spoilt_lines * 10 > len(filled) and invalid * 10 >= foreign * 3
    has_nuls = head.count(0) > len(head) // 5
    if not encoding and (has_nuls or is_spoilt):
        encoding = _wide_encoding(head) if 0 in head else ""
        if not encoding and (has_nuls or len(_NO_TEXT_BYTES.findall(head)) * 50 > len(head)):
            raise UserError(f"{path} is no text: its beginning is full of bytes that no text holds")
    if b"\x1b$B" in head or b"\x1b$@" in head:
        encoding = "iso-2022-jp"
    finding = f"is {encoding.upper()}"
    if not encoding and is_spoilt:
        fits = encodings_of(head)
        encoding, finding = fits[0], f"is not UTF-8 ({' or '.join(fits)} would read it)"
    if encoding:
        command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {shlex.quote(path + '.utf8.txt')}"
        raise UserError(f"{path} {finding}; convert it first: {command}")


# ---- lines ----


class _Part(io.RawIOBase):
    """The next bytes of a file, as a file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(min(len(buffer), self._left))
        buffer[: len(block)] = block
        self._left -= len(block)
        return len(block)


def text_lines(file: IO[bytes], size: int | None = None, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[str, bool]]:
    """Lines of UTF-8, ended by LF, CRLF or CR, of `size` bytes of a file or of all that is left of it.

    Yields (line, True), or (piece, False) for a piece of a line beyond `limit` bytes that goes on in what comes next,
    see `pieces`. Bytes that are not UTF-8 are U+DC80 to U+DCFF.
    """
    source: Any = file if size is None else io.BufferedReader(_Part(file, size), 1 << 18)
    stream = io.TextIOWrapper(source, "utf-8", errors="surrogateescape")
    rest = ""
    while line := stream.readline(limit):
        ends = line.endswith("\n")
        *cut, rest = pieces(rest + line.removesuffix("\n"), limit)
        for piece in cut:
            yield piece, False
        if ends:
            yield rest, True
            rest = ""
    if rest:
        yield rest, True


def lines_as_they_come(file: Any, most: int) -> Iterator[list[bytes]]:
    """Lines, ended by LF or CRLF, without their ends: those that are there, at most so many, before a later one comes.

    A byte order mark at the beginning is none of the first line.

    Raises:
        UserError: a line has more than `MAX_RECORD_BYTES`.
    """
    begun, number = list[bytes](), 0
    while block := file.read1(1 << 16):
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            lines = [b"".join(begun), *others[:-1]]
            begun = [others[-1]]
            lines[0] = lines[0].removeprefix(b"" if number else codecs.BOM_UTF8)
            number += len(lines)
            for begin in range(0, len(lines), most):
                yield [line.removesuffix(b"\r") for line in lines[begin : begin + most]]
        elif sum(map(len, begun)) > MAX_RECORD_BYTES:
            raise UserError(f"line {number + 1} of the input has more than {MAX_RECORD_BYTES:,} bytes")
    if last := b"".join(begun):
        yield [last.removeprefix(b"" if number else codecs.BOM_UTF8).removesuffix(b"\r")]


def pieces(text: str, limit: int) -> list[str]:
    """A text in pieces of at most `limit` bytes: cut behind a sentence end, else behind a space, else anywhere."""
    if len(text) * 4 <= limit:
        return [text]
    raw, found = text.encode("utf-8", "surrogateescape"), []
    while len(raw) > limit:
        cut = _cut_position(raw, limit)
        found.append(raw[:cut])
        raw = raw[cut:]
    return [piece.decode("utf-8", "surrogateescape") for piece in (*found, raw)]


def _cut_position(line: bytes, limit: int) -> int:
    """At least 1 and at most `limit`, which the line is longer than."""
    for marks in (_SENTENCE_ENDS, _SPACES):
        ends = [position + len(mark) for mark in marks if (position := line.rfind(mark, 0, limit)) >= 0]
        if ends:
            return max(ends)
    cut = limit
    while cut > max(limit - 4, 1) and line[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return cut


# ---- cleaning ----


def is_blank(line: str) -> bool:
    """Whether nothing can be seen in a line."""
    return _BLANK.match(line) is not None


def _joined(text: str) -> tuple[str, int]:
    """A text with U+FFFD for bytes that are not UTF-8, and how many characters were joined of two halves."""

    def join(found: re.Match[str]) -> str:
        halves = found[0].encode("utf-8", "surrogateescape").decode("utf-8", "surrogatepass")
        return halves.encode("utf-16", "surrogatepass").decode("utf-16")

    text, number = _TWO_HALVES.subn(join, text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), number


def without_faults(text: str) -> tuple[str, dict[str, int]]:
    """A text without NUL and half characters, which JSON may escape and nothing can store; and how many of each."""
    if text.isascii() and "\0" not in text:
        return text, {}
    nuls = text.count("\0")
    text, halves = SURROGATE.subn("\ufffd", text.replace("\0", ""))
    return text, {kind: n for kind, n in (("nul_characters", nuls), ("half_characters", halves)) if n}


def _mended(text: str, report: TextReport, place: Place) -> str:
    text, faults = without_faults(text)
    for kind, number in faults.items():
        report.count(kind, number, place)
    return text


def clean_line(text: str, report: TextReport, place: Place, keep_spaces: bool = False) -> str:
    """A line without control characters and (unless `keep_spaces`) surrounding white space, repairs counted."""
    if not text.isascii():
        if UNDECODED.search(text):
            text, number = _joined(text)
            if number:
                report.count("joined_halves", number, place)
            if "\ufffd" in text:
                report.count("invalid_utf8_lines", 1, place)
        if text.startswith("\ufeff"):
            text = text[1:]
            report.count("byte_order_marks", 1, place)
    if _CONTROL.search(text):
        text, number = _CONTROL.subn(" ", _mended(text, report, place))
        if number:
            report.count("control_characters", number, place)
    if not text.isascii() and is_blank(text) and text.strip():
        report.count("invisible_lines", 1, place)
    return text if keep_spaces else text.strip()


def clean_lines(text: str, report: TextReport, place: Place, keep_spaces: bool = False) -> list[str]:
    """The clean lines of one record's text: those that are not blank, or with `keep_spaces` all from first to last."""
    cut = [pieces(line, MAX_LINE_BYTES) for line in LINE_END.split(_mended(text, report, place))]
    if num_cuts := sum(map(len, cut)) - len(cut):
        report.count("long_lines_cut", num_cuts, place)
    lines = [clean_line(piece, report, place, keep_spaces) for line in cut for piece in line]
    filled = [number for number, line in enumerate(lines) if not is_blank(line)]
    if keep_spaces:
        return lines[filled[0] : filled[-1] + 1] if filled else []
    return [lines[number] for number in filled]
