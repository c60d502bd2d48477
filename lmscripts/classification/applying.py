"""A saved classifier applied to new texts: read one after the other, folded, answered, in the order they came."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lmscripts.classification.aggregate import calibrated, document_logits, names_of
from lmscripts.classification.batches import by_length
from lmscripts.classification.classifier import ClassifierSettings, Source, label_names, padding_id
from lmscripts.classification.records import BadRow, TableOptions
from lmscripts.classification.tables import read_table
from lmscripts.errors import UserError
from lmscripts.folding import Fold, Folder
from lmscripts.text_reading import MAX_RECORD_BYTES, format_of, open_binary, reading

EMPTY = "empty text"


@dataclass(frozen=True)
class Text:
    """One text of the input: its line, its name if it has one, and why it cannot be answered, if it cannot."""

    line: int
    name: str | None
    text: str
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """What a classifier says of a text.

    Attributes:
        text: the text.
        labels: names of those it is given; empty where nothing can be said.
        probabilities: of each label; empty likewise.
        num_fragments: rows that it was folded into.
        note: why nothing is said.
    """

    text: Text
    labels: list[str]
    probabilities: list[float]
    num_fragments: int
    note: str


# ---- reading -----------------------------------------------------------------------------------------------------


def read_texts(path: str, table: TableOptions) -> Iterator[Text]:
    """Texts of a file in their order, none left out; "-" is standard input, one text a line.

    Args:
        path: txt (one text a line), csv, tsv, jsonl or parquet, also compressed.
        table: how a table is read, with an empty `label`.

    Raises:
        UserError: there is no such file or column, or it is damaged.
    """
    if path == "-":
        yield from _lines(sys.stdin.buffer, table.encoding)
    elif not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(f"the input {path} {what} (seen from {Path.cwd()})")
    elif (table.format or format_of(path)[0]) == "txt":
        with reading(path), open_binary(path) as file:
            yield from _lines(file, table.encoding)
    else:
        for row in read_table(path, table):
            if isinstance(row, BadRow):
                yield Text(row.line, None, "", row.reason)
            else:
                yield Text(row.line, row.name, row.text)


def _lines(stream: Any, encoding: str) -> Iterator[Text]:
    source: BinaryIO = stream
    for number in itertools.count(1):
        line = source.readline(MAX_RECORD_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_RECORD_BYTES:
            raise UserError(f"line {number} of the input has more than {MAX_RECORD_BYTES:,} bytes")
        try:
            text = line.decode(encoding or "utf-8").replace("\0", "").strip()
        except UnicodeDecodeError:
            yield Text(number, None, "", f"cannot be decoded as {encoding or 'utf-8'}")
            continue
        yield Text(number, None, text.removeprefix("\ufeff") if number == 1 else text)


# ---- answering ---------------------------------------------------------------------------------------------------


class Classifier:
    """A saved classifier with all that it needs to answer."""

    def __init__(
        self,
        model: PreTrainedModel,
        source: Source,
        settings: ClassifierSettings,
        *,
        batch_size: int,
        device: torch.device,
        autocast: bool = False,
    ) -> None:
        """Put the model on the device.

        Args:
            model: from `lmscripts.classification.classifier.open_classifier`.
            source: likewise.
            settings: likewise.
            batch_size: rows of a forward pass.
            device: where it computes.
            autocast: compute in bfloat16.
        """
        on_device: Any = model
        self.model = on_device.to(device)
        self.labels = label_names(model.config)
        self.settings = settings
        self._folder = Folder(source.encoder, settings.folds)
        self._pad_id = padding_id(source.encoder)
        self._batch_size, self._device, self._autocast = batch_size, device, autocast

    def answer(self, texts: Sequence[Text]) -> list[Answer]:
        """Answers to texts, in their order."""
        folds = self._folder([text.text for text in texts])
        rows = [(owner, fold) for owner, each in enumerate(folds) for fold in each]
        owners = np.array([owner for owner, _ in rows], np.int64)
        lengths = np.array([len(fold.ids) for _, fold in rows], np.int64)
        logits = self._logits([fold for _, fold in rows], lengths)
        settings = self.settings
        found = document_logits(logits, owners, len(texts), settings.aggregate, settings.multi_label, lengths)
        probabilities = calibrated(found, settings.multi_label, settings.temperature)
        thresholds = np.array(settings.thresholds) if settings.thresholds is not None else None
        given = names_of(probabilities, self.labels, thresholds)
        answers = []
        for text, each, labels, values in zip(texts, folds, given, probabilities, strict=True):
            why = "" if each else text.note or ("no token in it" if text.text else EMPTY)
            answers.append(Answer(text, labels, values.tolist() if each else [], len(each), why))
        return answers

    def _logits(self, folds: Sequence[Fold], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """(R, K) logits of rows."""
        logits = np.zeros((len(folds), len(self.labels)))
        kind = self._device.type
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=self._autocast):
            for rows in by_length(lengths, self._batch_size):
                mask = np.arange(int(lengths[rows].max())) < lengths[rows][:, None]
                ids = np.full(mask.shape, self._pad_id, np.int64)
                ids[mask] = np.concatenate([folds[row].ids for row in rows])
                tensors = (torch.from_numpy(each).to(self._device) for each in (ids, mask.astype(np.int64)))
                output: Any = self.model(**dict(zip(("input_ids", "attention_mask"), tensors, strict=True)))
                logits[rows] = output.logits.float().cpu().numpy()
        return logits


def in_batches(texts: Iterator[Text], size: int) -> Iterator[list[Text]]:
    """Texts by the hundred, as they come."""
    while batch := list(itertools.islice(texts, size)):
        yield batch
