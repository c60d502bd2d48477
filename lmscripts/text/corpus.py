"""Reading text: which files, who reads which part, and documents as lists of clean sentences, in flat memory.

A plain text file holds one sentence a line and a blank line between documents (or one document a line). In a table
(jsonl, csv, tsv, parquet, arrow) one record is one document. Each may be compressed. A folder may be what `datasets`
saved to disk. A name `hub:NAME[@REVISION][:CONFIG][:SPLIT][:COLUMN]` stands for a data set that is streamed through
`datasets`; it is always that of one commit.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from lmscripts.errors import UserError, shortened
from lmscripts.files import read_json
from lmscripts.text.reading import (
    BINARY,
    COMPRESSIONS,
    FORMATS,
    check_file,
    check_utf8,
    clean_line,
    clean_lines,
    format_of,
    is_blank,
    kind_of,
    opened,
    pieces,
    text_lines,
)
from lmscripts.text.records import TEXTS, BadRow, Record, TableOptions, read_records
from lmscripts.text.report import Place, TextReport

MAX_DOCUMENT_BYTES = 1 << 24
HUB = "hub:"
_SAVE_AGAIN = "save the data set again"
_BLOCK = 1 << 22
_SAMPLED_LINE, _SAMPLED_PLACE = 1 << 15, (1 << 26) // 200  # bytes, and characters


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` (None: to the end) of a file; anything but a plain text file is one whole span."""

    path: str
    start: int = 0
    end: int | None = None


# ---- which files ----


def find_files(inputs: Sequence[str], report: TextReport | None = None) -> list[Path]:
    """Files for what the user named, in the order of the arguments, each once.

    Args:
        inputs: files, patterns (`*`, `?`, `[...]`, `**`), folders (searched to any depth, sorted by name, files
            with a known suffix only; of what `datasets` saved there its parts), or `hub:` names, in whose place come
            those with the commit that their revision is.
        report: counts the files of folders that are left out (what begins with a dot is none), and repeated ones.
    """
    found, report = dict[Path, None](), TextReport() if report is None else report
    for name in inputs:
        path = Path(name).expanduser()
        if name.startswith(HUB):
            matches = [Path(_pinned(name))]
        elif path.is_dir():
            matches = _saved_in(path, report) or _files_in(path, report)
        elif path.exists() or not glob.has_magic(name):
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
            if not matches:
                raise UserError(f"no file matches {name}")
        for again in (match for match in matches if match in found):
            report.count("files_repeated", 1, again.__str__)
        found.update(dict.fromkeys(matches))
    if not found:
        raise UserError("no input file was given")
    for path in found:
        if not str(path).startswith(HUB):
            check_file(path, "input file")
    return list(found)


@lru_cache(maxsize=64)  # one commit for all who ask in a run, however the branch moves
def _pinned(name: str) -> str:
    """A `hub:` name with the 40 digits of the commit that its revision (or the main branch) is now."""
    from huggingface_hub import HfApi

    data_set, colon, rest = name.removeprefix(HUB).partition(":")
    data_set, _, revision = data_set.partition("@")
    if re.fullmatch("[0-9a-f]{40}", revision):
        return name
    try:
        commit = HfApi().dataset_info(data_set, revision=revision or None).sha
    except Exception as error:  # of many kinds, all of which mean: the Hub does not say
        raise UserError(
            f"the Hub does not say which commit {name} is ({shortened(error)}); name it, {HUB}{data_set}@COMMIT, or "
            "give a folder of save_to_disk"
        ) from error
    return f"{HUB}{data_set}@{commit}{colon}{rest}"


def _saved_in(folder: Path, report: TextReport) -> list[Path]:
    """The parts of what `Dataset.save_to_disk` or that of a `DatasetDict` wrote, of which train is read; else none."""
    if (named := folder / "dataset_dict.json").is_file():
        splits = read_json(named, {"splits": [str]}, _SAVE_AGAIN)["splits"]
        chosen = splits[0] if len(splits) == 1 else "train"
        if chosen not in splits:
            named_alone = " or ".join(f"{folder}/{split}" for split in splits)
            raise UserError(f"the data set {folder} has no split train: name {named_alone}")
        for split in splits:
            if split != chosen:
                report.count("splits_left", 1, (folder / split).__str__)
        folder = folder / chosen
    if not (folder / "dataset_info.json").is_file() or not (named := folder / "state.json").is_file():
        return []
    parts = read_json(named, {"_data_files": [{"filename": str}]}, _SAVE_AGAIN)["_data_files"]
    return [folder / part["filename"] for part in parts]


def _files_in(folder: Path, report: TextReport) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    endings = tuple(form + packed for form in FORMATS for packed in ("", *COMPRESSIONS))
    known = sorted(path for path in files if path.name.lower().endswith(endings))
    if not known:
        suffixes = f"{' '.join(FORMATS)}, each also {' '.join(COMPRESSIONS)}"
        raise UserError(f"the folder {folder} holds no text file ({suffixes})")
    for path in sorted(set(files) - set(known)):
        report.count("files_skipped", 1, path.__str__)
    return known


def source_fingerprint(paths: Sequence[str | Path]) -> str:
    """Hex sha256 over the contents of the files in order; for a `hub:` name, over the name, which has the commit."""
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


def plan_spans(
    paths: Sequence[str | Path], num_splits: int, *, document_per_line: bool = False, input_format: str = ""
) -> list[list[Span]]:
    """Cut the corpus into `num_splits` lists of spans of about equal bytes, at document ends.

    Reading the lists one after the other gives the documents of the files in order, whatever `num_splits` is. A cut
    is found by seeking to its byte and reading to the next document end; only plain text files are cut inside. With
    fewer documents than splits some lists are empty.
    """
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, not {num_splits}")
    names = [str(path) for path in paths]
    sizes = [1 if name.startswith(HUB) else os.path.getsize(name) for name in names]
    ends = list(itertools.accumulate(sizes))  # of the files, in bytes of the corpus
    can_be_cut = lru_cache(lambda name: not format_of(name)[1] and is_plain(name, input_format))
    cuts = [0]
    for split in range(1, num_splits):
        cut = ends[-1] * split // num_splits
        if cut > cuts[-1]:  # else the last document end lies behind it already
            file = bisect.bisect_right(ends, cut)
            first = ends[file] - sizes[file]
            if can_be_cut(names[file]):
                cut = first + _document_end(names[file], cut - first, document_per_line)
            else:
                cut = first if 2 * (cut - first) < sizes[file] else ends[file]
        cuts.append(max(cut, cuts[-1]))

    def spans(begin: int, stop: int) -> Iterator[Span]:
        for name, size, end in zip(names, sizes, ends):
            start, last = max(begin - (end - size), 0), min(stop - (end - size), size)
            if start < last:
                yield Span(name) if last - start == size else Span(name, start, last)

    return [list(spans(*pair)) for pair in itertools.pairwise([*cuts, ends[-1]])]


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
            if at_start and ends and is_blank(line.decode("utf-8", "replace")):
                break
            at_start = ends
        return file.tell()


# ---- documents ----

Lines = Iterator[tuple[str | None, Place]]  # None ends a document


def read_documents(
    spans: Iterable[Span],
    report: TextReport,
    table: TableOptions = TEXTS,
    *,
    document_per_line: bool = False,
    keep_spaces: bool = False,
) -> Iterator[list[str]]:
    """The documents of the spans in order, each a non-empty list of non-empty lines without surrounding white space.

    A document beyond MAX_DOCUMENT_BYTES goes on as another.

    Args:
        spans: from `plan_spans`, or `Span(path)` for a whole file.
        report: is added to while reading: counts, repairs, drops.
        table: how tables are read: column of the text, delimiter, quotes, bad rows; its `format` is that of all files.
        document_per_line: in plain text, every line is a document.
        keep_spaces: lines as they stand, with indentation and what is at their ends; in tables also the empty ones
            between the first line with text and the last.

    Raises:
        UserError: a file in another encoding, damaged or cut off, or without the column.
    """
    for span in spans:
        report.num_files += span.start == 0
        if is_plain(span.path, table.format):
            lines = _text_lines(span, document_per_line, report, keep_spaces)
        else:
            lines = _record_lines(span.path, table, report, keep_spaces)
        document: list[str] = []
        size = 0
        for line, report.at in lines:
            length = 0 if line is None else len(line.encode())
            if document and (line is None or size + length > MAX_DOCUMENT_BYTES):
                if line is not None:
                    report.count("long_documents_cut", 1, report.at)
                report.add_document(document, size)
                yield document
                document, size = [], 0
            if line is not None:
                document.append(line)
                size += length


def is_plain(path: str, input_format: str = "") -> bool:
    """Whether an input is plain text, not a table of records; what is neither, or not UTF-8, is refused."""
    if path.startswith(HUB):
        return False
    kind = kind_of(path, input_format)
    if kind not in BINARY:
        check_utf8(path)
    return kind == "txt"


def _text_lines(span: Span, document_per_line: bool, report: TextReport, keep_spaces: bool) -> Lines:
    """Lines of a plain (or compressed) text file."""
    number = 0  # complete lines before the present one, counted from the start of the span

    def place() -> str:
        return f"{span.path}:{lines_before(span.path, span.start) + number + 1}"

    whole = True
    with opened(span.path) as file:
        if span.start:
            file.seek(span.start)
        for text, ends in text_lines(file, None if span.end is None else span.end - span.start):
            if not ends:
                report.count("long_lines_cut", 1, place)
            line = clean_line(text, report, place, keep_spaces)
            blank = is_blank(line)
            if not blank:
                yield line, place
            if ends and (document_per_line or (whole and blank)):
                yield None, place
            number += ends
            whole = ends
    yield None, place


def _record_lines(path: str, table: TableOptions, report: TextReport, keep_spaces: bool) -> Lines:
    """Lines of the records of a table."""
    for text, place in table_texts(path, table, report):
        for line in clean_lines(text, report, place, keep_spaces):
            yield line, place
        yield None, place


@lru_cache(maxsize=64)
def lines_before(path: str, start: int) -> int:
    """Lines before a byte of a plain file; asked for only when a place has to be named."""
    lines, left = 0, start
    with open(path, "rb") as file:
        while left and (block := file.read(min(_BLOCK, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def table_texts(path: str, table: TableOptions, report: TextReport) -> Iterator[tuple[str, Place]]:
    """(text as it stands, place) of the records of a table or a data set on the Hub; what is none is counted."""
    if path.startswith(HUB):
        records = _hub_records(path, table.text)
    else:
        if not table.format and format_of(path)[0] != kind_of(path):
            report.count("json_lines_files", 1, path.__str__)
        records = read_records(path, table, report.changes)
    for number, fields in records:
        place = partial("{}:{}".format, path, number)
        text = fields if isinstance(fields, BadRow) else fields["text"]
        if text is None or text != text or (isinstance(text, str) and is_blank(text)):  # NaN is not equal to itself
            report.count("records_without_text", 1, place)
            continue
        if not isinstance(text, (str, BadRow)):
            details = f"{table.text!r} is no text but {type(text).__name__}"
            text = BadRow(number, "text of the wrong kind", details, f"{text!r:.80}")
        if isinstance(text, str):
            yield text, place
        elif table.on_bad_row == "fail":
            raise text.error(path)
        else:
            report.count_bad(text.reason, text.details, place)


def _hub_records(name: str, text_column: str) -> Iterator[Record]:
    """Records of a data set on the Hub, streamed: `hub:NAME@COMMIT[:CONFIG][:SPLIT][:COLUMN]`."""
    import datasets

    data_set, config, split, column = [*name.removeprefix(HUB).split(":"), "", "", ""][:4]
    column, (data_set, _, commit) = column or text_column, data_set.partition("@")
    try:
        about = {"split": split or "train", "revision": commit or None, "streaming": True}
        records = datasets.load_dataset(data_set, config or None, **about)
        for number, record in enumerate(records, 1):
            if number == 1 and column not in record:
                columns = ", ".join(map(repr, record))
                raise UserError(
                    f"{name} has no column {column!r}; it has {columns}: write {HUB}NAME:CONFIG:SPLIT:COLUMN"
                )
            yield number, {"text": record.get(column)}
    except UserError:
        raise
    except Exception as error:  # the Hub client raises many kinds, all of which mean: this data set cannot be read
        raise UserError(f"{name} cannot be read from the Hub: {' '.join(str(error).split())}") from error


def spread_sample(
    paths: Sequence[str | Path],
    num_lines: int,
    table: TableOptions = TEXTS,
    *,
    document_per_line: bool = False,
    keep_spaces: bool = False,
) -> list[str]:
    """Up to `num_lines` lines from about 200 places of the corpus, in its order; reads little more than these.

    Of a line longer than 32 KiB its beginning is taken, and of a place no more than a two-hundredth of 64 MiB.
    """
    form = {"document_per_line": document_per_line, "keep_spaces": keep_spaces}
    plan = plan_spans(paths, 200, document_per_line=document_per_line, input_format=table.format)
    places = [spans for spans in plan if spans]
    lines: list[str] = []
    for number, spans in enumerate(places):
        end, size = len(lines) + (num_lines - len(lines)) // (len(places) - number), 0
        for document in read_documents(spans, TextReport(), replace(table, on_bad_row="skip"), **form):
            begun = [pieces(line, _SAMPLED_LINE)[0] for line in document[: end - len(lines)]]
            lines += begun
            size += sum(map(len, begun))
            if len(lines) >= end or size >= _SAMPLED_PLACE:
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
