"""Reading text: which files, who reads which part, and documents as lists of clean sentences, in flat memory.

A plain text file holds one sentence a line and a blank line between documents (or one document a line). In a table
(jsonl, csv, tsv, parquet) one record is one document. Each may be compressed. A name
`hub:NAME[:CONFIG][:SPLIT][:COLUMN]` stands for a data set that is streamed through `datasets`.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from lmscripts.errors import UserError
from lmscripts.text.reading import (
    COMPRESSIONS,
    FORMATS,
    check_encoding,
    clean_bytes,
    format_of,
    open_binary,
    raw_lines,
    read_records,
    reading,
    record_lines,
)
from lmscripts.text.report import TextReport

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "Span",
    "TextReport",
    "batches",
    "find_files",
    "plan_spans",
    "read_documents",
    "source_fingerprint",
    "spread_sample",
]

MAX_DOCUMENT_BYTES = 1 << 24
HUB = "hub:"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` (None: to the end) of a file; anything but a plain text file is one whole span."""

    path: str
    start: int = 0
    end: int | None = None


# ---- which files ----


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Files for what the user named, in the order of the arguments, each once.

    Args:
        inputs: files, patterns (`*`, `?`, `[...]`, `**`), folders (searched to any depth, sorted by name, files
            with a known suffix only), or `hub:` names, which are passed on.

    Raises:
        UserError: something is missing or cannot be read, or nothing is left.
    """
    found: dict[Path, None] = {}
    for name in inputs:
        if name.startswith(HUB):
            found[Path(name)] = None
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            matches = _files_in(path)
        elif path.exists() or not glob.has_magic(name):
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
            if not matches:
                raise UserError(f"no file matches {name}")
        found.update(dict.fromkeys(matches))
    if not found:
        raise UserError("no input file was given")
    for path in found:
        if not str(path).startswith(HUB):
            _check_readable(path)
    return list(found)


def _files_in(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".") and _is_known(name)]
    if not files:
        known = " ".join(FORMATS)
        raise UserError(f"the folder {folder} holds no text file ({known}, each also {' '.join(COMPRESSIONS)})")
    return sorted(files)


def _is_known(name: str) -> bool:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in FORMATS


def _check_readable(path: Path) -> None:
    if not path.exists():
        raise UserError(f"the input file {path} does not exist (seen from {Path.cwd()})")
    if not path.is_file():
        raise UserError(f"the input {path} is neither a file nor a folder")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"the input file {path} cannot be read: {error.strerror}") from error


def source_fingerprint(paths: Sequence[str | Path]) -> str:
    """Hex sha256 over the contents of the files in order; for a `hub:` name, over the name."""
    digest = hashlib.sha256()
    for path in paths:
        if str(path).startswith(HUB):
            digest.update(f"{path}\n".encode())
            continue
        # The length keeps the cut between two files from being invisible.
        digest.update(f"{os.path.getsize(path)}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


# ---- who reads which part ----


def plan_spans(paths: Sequence[str | Path], num_splits: int, *, document_per_line: bool = False) -> list[list[Span]]:
    """Cut the corpus into `num_splits` lists of spans of about equal bytes, at document ends.

    Reading the lists one after the other gives the documents of the files in order, whatever `num_splits` is. A cut
    is found by seeking to its byte and reading to the next document end; only plain text files are cut inside. With
    fewer documents than splits some lists are empty.

    Raises:
        ValueError: `num_splits` is below 1.
    """
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, not {num_splits}")
    names = [str(path) for path in paths]
    sizes = [0 if name.startswith(HUB) else os.path.getsize(name) for name in names]
    first_bytes = [sum(sizes[:index]) for index in range(len(sizes))]
    total = sum(sizes)
    cuts = [(0, 0)]  # (file, byte in the file)
    for split in range(1, num_splits):
        target = total * split // num_splits
        file = max((index for index, first in enumerate(first_bytes) if first <= target), default=0)
        offset = target - first_bytes[file]
        if (file, offset) <= cuts[-1]:
            cuts.append(cuts[-1])  # the last document end lies behind this target already
        elif format_of(names[file]) == ("txt", "") and not names[file].startswith(HUB):
            cuts.append((file, _document_end(names[file], offset, document_per_line)))
        else:
            cuts.append((file, 0) if 2 * offset < sizes[file] else (file + 1, 0))
        cuts[-1] = max(cuts[-1], cuts[-2])
    cuts.append((len(names), 0))
    return [_spans_between(names, sizes, *pair) for pair in itertools.pairwise(cuts)]


def _document_end(path: str, offset: int, document_per_line: bool) -> int:
    """First byte behind a document end that lies behind `offset`; the size of the file where there is none."""
    with open(path, "rb") as file:
        file.seek(offset)
        while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
            pass  # the rest of the line in which the offset lies
        # A line feed ends a line for the reader too, whatever other line ends the file uses.
        at_start = True
        while not document_per_line and (line := file.readline(_BLOCK)):
            ends = line.endswith(b"\n")
            if at_start and ends and not line.decode("utf-8", "replace").strip():
                break
            at_start = ends
        return file.tell()


def _spans_between(names: list[str], sizes: list[int], first: tuple[int, int], last: tuple[int, int]) -> list[Span]:
    spans = []
    for index in range(first[0], min(last[0] + 1, len(names))):
        start = first[1] if index == first[0] else 0
        end = last[1] if index == last[0] else sizes[index]
        is_hub = names[index].startswith(HUB)
        if start < end or (is_hub and index < last[0]):
            whole = is_hub or (start == 0 and end == sizes[index])
            spans.append(Span(names[index], start, None if whole else end))
    return spans


# ---- documents ----


def read_documents(
    spans: Iterable[Span],
    report: TextReport,
    *,
    document_per_line: bool = False,
    text_column: str = "text",
    on_bad_line: Literal["skip", "fail"] = "skip",
    keep_spaces: bool = False,
) -> Iterator[list[str]]:
    """The documents of the spans in order, each a non-empty list of non-empty lines without surrounding white space.

    Args:
        spans: from `plan_spans`, or `Span(path)` for a whole file.
        report: is added to while reading: counts, repairs, drops.
        document_per_line: in plain text, every line is a document.
        text_column: column or key of the text in tables.
        on_bad_line: what to do with a record that cannot be read: leave it out and count it, or stop.
        keep_spaces: lines as they stand, with indentation and what is at their ends; in tables also the empty ones
            between the first line with text and the last.

    Raises:
        UserError: a file in another encoding, damaged or cut off, or without the column.
    """
    for span in spans:
        if span.start == 0:
            report.num_files += 1
        if span.path.startswith(HUB):
            documents = _hub_documents(span.path, text_column, report, keep_spaces)
        elif format_of(span.path)[0] == "txt":
            documents = _text_documents(span, document_per_line, report, keep_spaces)
        else:
            documents = (
                record_lines(text, report, place, keep_spaces)
                for text, place in read_records(span.path, text_column, on_bad_line, report)
            )
        for document in documents:
            for piece in _bounded(document, report):
                report.add_document(piece)
                yield piece


def _text_documents(span: Span, document_per_line: bool, report: TextReport, keep_spaces: bool) -> Iterator[list[str]]:
    """Documents of a plain (or compressed) text file, each cut where it passes MAX_DOCUMENT_BYTES."""
    check_encoding(span.path)
    number = 0  # complete lines before the present one, counted from the start of the span

    def place() -> str:
        return f"{span.path}:{_lines_before(span.path, span.start) + number + 1}"

    document: list[str] = []
    size, whole = 0, True
    with reading(span.path), open_binary(span.path) as file:
        if span.start:
            file.seek(span.start)
        length = None if span.end is None else span.end - span.start
        for raw, ends in raw_lines(file, length):
            if span.start == number == 0 and raw.startswith(b"\xef\xbb\xbf"):
                raw = raw[3:]
                report.count("byte_order_marks")
            if not ends:
                report.count("long_lines_cut", 1, place)
            text = clean_bytes(raw, report, place, keep_spaces)
            is_blank = not text.strip()
            if not is_blank:
                if size + len(raw) > MAX_DOCUMENT_BYTES and document:
                    report.count("long_documents_cut", 1, place)
                    yield document
                    document, size = [], 0
                document.append(text)
                size += len(raw)
            is_document_end = ends and (document_per_line or (whole and is_blank))
            if is_document_end and document:
                yield document
                document, size = [], 0
            number += ends
            whole = ends
    if document:
        yield document


@lru_cache(maxsize=64)
def _lines_before(path: str, start: int) -> int:
    """Lines before a byte of a plain file; asked for only when a place has to be named."""
    lines, left = 0, start
    with open(path, "rb") as file:
        while left and (block := file.read(min(_BLOCK, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def _bounded(document: list[str], report: TextReport) -> Iterator[list[str]]:
    """The document, or the pieces of one that passes MAX_DOCUMENT_BYTES (a record; text files are cut on the way)."""
    if sum(map(len, document)) * 4 <= MAX_DOCUMENT_BYTES:
        if document:
            yield document
        return
    piece: list[str] = []
    size = 0
    for line in document:
        length = len(line.encode())
        if piece and size + length > MAX_DOCUMENT_BYTES:
            report.count("long_documents_cut")
            yield piece
            piece, size = [], 0
        piece.append(line)
        size += length
    if piece:
        yield piece


def _hub_documents(name: str, text_column: str, report: TextReport, keep_spaces: bool) -> Iterator[list[str]]:
    """Documents of a data set on the Hub, streamed: `hub:NAME[:CONFIG][:SPLIT][:COLUMN]`."""
    import datasets

    data_set, config, split, column = [*name.removeprefix(HUB).split(":"), "", "", ""][:4]
    column = column or text_column
    try:
        records = iter(datasets.load_dataset(data_set, config or None, split=split or "train", streaming=True))
        number = 0
        while (record := next(records, None)) is not None:
            number += 1
            if number == 1 and column not in record:
                columns = ", ".join(map(repr, record))
                raise UserError(
                    f"{name} has no column {column!r}; it has {columns}: write {HUB}NAME:CONFIG:SPLIT:COLUMN"
                )
            place = f"{name}:{number}"
            if isinstance(text := record.get(column), str) and text.strip():
                yield record_lines(text, report, lambda place=place: place, keep_spaces)  # type: ignore[misc]
            else:
                report.count("records_without_text", 1, lambda place=place: place)  # type: ignore[misc]
    except UserError:
        raise
    except Exception as error:  # the Hub client raises many kinds, all of which mean: this data set cannot be read
        raise UserError(f"{name} cannot be read from the Hub: {' '.join(str(error).split())}") from error


def spread_sample(
    paths: Sequence[str | Path],
    num_lines: int,
    *,
    document_per_line: bool = False,
    text_column: str = "text",
    keep_spaces: bool = False,
) -> list[str]:
    """Up to `num_lines` lines from about 200 places of the corpus, in its order; reads little more than these."""
    places = [spans for spans in plan_spans(paths, 200, document_per_line=document_per_line) if spans]
    lines: list[str] = []
    for number, spans in enumerate(places):
        end = len(lines) + (num_lines - len(lines)) // (len(places) - number)
        options = {"document_per_line": document_per_line, "text_column": text_column, "keep_spaces": keep_spaces}
        for document in read_documents(spans, TextReport(), **options):  # type: ignore[arg-type]
            lines += document[: end - len(lines)]
            if len(lines) >= end:
                break
    return lines


def batches(documents: Iterable[list[str]], batch_bytes: int = 1 << 20) -> Iterator[list[list[str]]]:
    """Group documents, in order, into lists of at least `batch_bytes` of UTF-8 (the last one may be smaller)."""
    batch: list[list[str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(len(line.encode()) for line in document)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
