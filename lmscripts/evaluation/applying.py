"""A saved classifier applied to new texts: read one after the other, folded, answered, in the order they came."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lmscripts.data.folding import Folder
from lmscripts.data.labelled_rows import by_length, padded
from lmscripts.data.steps import to_device
from lmscripts.errors import UserError, naming
from lmscripts.evaluation.judging import calibrated, decided, document_logits, names_of
from lmscripts.models.classifier import ClassifierSettings, Source, label_names, padding_id
from lmscripts.text.reading import MAX_RECORD_BYTES, check_file, format_of, kind_of, opened
from lmscripts.text.records import BadRow, TableOptions, check_codec, read_table

_JSON_LIST = re.compile(r"\[\s*\{")
_TABLES: tuple[str, ...] = ("csv", "tsv", "jsonl", "parquet", "arrow")
_OF_KIND = {"text": _TABLES, "id_column": _TABLES}  # an option on reading -> the kinds of input it is for
_OF_KIND |= {"delimiter": ("csv", "tsv"), "quotes": ("csv", "tsv"), "encoding": ("csv", "tsv", "jsonl", "txt")}


@dataclass(frozen=True)
class Text:
    """One text of the input: its line, its name if it has one, and why it cannot be answered, if it cannot."""

    line: int
    name: str | None
    text: str
    note: str = ""
    details: str = ""  # of the note


@dataclass(frozen=True)
class Answer:
    """What a classifier says of a text; without labels and probabilities, and with a note, where it says nothing."""

    text: Text
    labels: list[str]
    probabilities: list[float]
    num_fragments: int  # rows that it was folded into
    note: str


# ---- reading -----------------------------------------------------------------------------------------------------


def check_input_options(path: str, kind: str | None, given: Mapping[str, Any]) -> None:
    """Refuse options on how an input is read that would be ignored for its kind, which None takes from its name.

    Raises:
        UserError: naming the option and the kind; or an encoding that there is not.
    """
    if "encoding" in given:
        check_codec(given["encoding"])
    real = kind or ("txt" if path == "-" else kind_of(path) if Path(path).is_file() else format_of(path)[0])
    for name, value in given.items():
        if real not in _OF_KIND[name]:
            shown = f"--no_{name}" if value is False else f"--{name} {value}"
            what = "standard input" if path == "-" else path
            way_out = "" if kind else f"; is {what} another kind of table? Then give --input_format"
            raise UserError(f"{shown} has no effect on {real}, which is how {what} is read{way_out}")


def read_texts(path: str, kind: str, table: TableOptions) -> Iterator[Text]:
    """Texts of a file, also a compressed one, or of standard input ("-") in their order, none left out.

    The kind is "txt" (one text a line), "csv", "tsv", "jsonl" or "parquet". Empty goes by the file's name and content;
    standard input is lines of text as they come then, unless the first looks like the beginning of a table. A table on
    standard input is stored before its first text, as its reader looks at it twice.

    Raises:
        UserError: there is no such file or column, or it is damaged; or nothing says that standard input is a table.
    """
    if path != "-":
        check_file(path, "input")
        if kind_of(path, kind) != "txt":
            yield from _rows(path, kind, table)
            return
        with opened(path) as file:
            yield from _lines(file, table.encoding)
    elif kind in ("", "txt"):
        first = sys.stdin.buffer.readline(MAX_RECORD_BYTES + 1)
        if not kind:
            _check_no_table(first.decode(table.encoding or "utf-8", "replace").removeprefix("\ufeff").strip(), table)
        yield from _lines(sys.stdin.buffer, table.encoding, first)
    else:
        with tempfile.TemporaryDirectory() as folder:
            stored = Path(folder) / f"standard_input.{kind}"
            with naming(stored), open(stored, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy, 1 << 20)
            try:
                yield from _rows(str(stored), kind, table)
            except UserError as error:
                raise UserError(str(error).replace(str(stored), "standard input")) from error


def _rows(path: str, kind: str, table: TableOptions) -> Iterator[Text]:
    given: Any = kind
    for row in read_table(path, replace(table, format=given)):
        if isinstance(row, BadRow):
            yield Text(row.line, row.name, "", row.reason, row.details)
        else:
            yield Text(row.line, row.name, row.text)


def _check_no_table(text: str, table: TableOptions) -> None:
    """Refuse to take for a text what begins a table: a JSON record, a list of them, a header with the texts' column.

    Raises:
        UserError: saying how it is read as the table that it seems to be.
    """
    kind, said, column = "", "", table.text
    if _JSON_LIST.match(text):
        kind, said = "a JSON list", "a record a line and --input_format jsonl"
    elif text.startswith("{"):
        with suppress(ValueError, RecursionError):
            kind = "jsonl" if isinstance(json.loads(text), dict) else ""
    else:
        for mark, form in ((",", "csv"), (";", "csv"), ("|", "csv"), ("\t", "tsv")):
            names = [field.strip(" \"'") for field in text.split(mark)]
            alike = [name for name in names if name.casefold() == table.text.casefold()]
            if alike and not kind:
                kind, column = form, table.text if table.text in alike else alike[0]
    if kind:
        named = "" if column == table.text else f" --text {shlex.quote(column)}"
        said = said or f"--input_format {kind}{named} to read it as a table"
        raise UserError(
            f"standard input begins like {kind}: give {said}, or --input_format txt to take each line for a text"
        )


def _lines(stream: IO[bytes], encoding: str, *read: bytes) -> Iterator[Text]:
    """Lines of a stream, of which the first may have been read already."""
    lines = itertools.chain(filter(None, read), iter(partial(stream.readline, MAX_RECORD_BYTES + 1), b""))
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_RECORD_BYTES:
            raise UserError(f"line {number} of the input has more than {MAX_RECORD_BYTES:,} bytes")
        try:
            text = line.decode(encoding or "utf-8").replace("\0", "").strip()
        except UnicodeDecodeError:
            yield Text(number, None, "", f"cannot be decoded as {encoding or 'utf-8'}")
            continue
        yield Text(number, None, text.removeprefix("\ufeff") if number == 1 else text)


# ---- answering ---------------------------------------------------------------------------------------------------


@dataclass
class Classifier:
    """A saved classifier, see `lmscripts.models.classifier.open_classifier`, with all that it needs to answer."""

    model: Any
    source: Source
    settings: ClassifierSettings
    batch_size: int  # rows of a forward pass
    device: torch.device
    autocast: bool = False  # compute in bfloat16

    def __post_init__(self) -> None:
        """Put the model on the device."""
        self.model.to(self.device)
        self.labels = label_names(self.model.config)
        self._folder, self._pad_id = Folder(self.source.encoder, self.settings.folds), padding_id(self.source.encoder)

    def answer(self, texts: Sequence[Text]) -> list[Answer]:
        """Answers to texts, in their order."""
        folds = self._folder([text.text for text in texts])
        rows = [(owner, fold) for owner, each in enumerate(folds) for fold in each]
        owners = np.array([owner for owner, _ in rows], np.int64)
        lengths = np.array([len(fold.ids) for _, fold in rows], np.int64)
        logits, settings = np.zeros((len(rows), len(self.labels))), self.settings
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            for places in by_length(lengths, self.batch_size):
                batch = to_device(padded([rows[place][1].ids for place in places], self._pad_id), self.device)
                logits[places] = self.model(**batch).logits.float().cpu().numpy()
        probabilities = calibrated(document_logits(logits, owners, len(texts), lengths, settings), settings)
        given = names_of(decided(probabilities, settings), self.labels)
        answers = []
        for text, each, labels, values in zip(texts, folds, given, probabilities, strict=True):
            why = "" if each else text.note or ("no token in it" if text.text else "empty text")
            answers.append(Answer(text, labels, values.tolist() if each else [], len(each), why))
        return answers
