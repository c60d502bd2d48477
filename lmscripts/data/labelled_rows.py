"""Folded rows of a labelled table as batches: what each row weighs, padding, and what a step's loss is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmscripts.data.labelled_store import Database, FoldRows
from lmscripts.data.steps import Batch, ByLength, Counts, Ints, Made, MakeBatches, Prefetcher, cut, step_batches
from lmscripts.errors import UserError
from lmscripts.text.records import PARTS

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """Rows of one part of a split, with the labels and weights of their documents. R rows, D documents, K labels.

    Attributes:
        folds: the rows.
        doc_ids: (D,) int64, all documents of the part in rising order, those of which no row was made among them.
        truth: (D, K) bool, labels of each document.
        owners: (R,) int64, place in `doc_ids` of the document of each row.
        weights: (R,) float32, what a row counts in the loss.
    """

    folds: FoldRows
    doc_ids: Ints
    truth: NDArray[np.bool_]
    owners: Ints
    weights: Floats

    @property
    def lengths(self) -> Ints:
        """(R,) tokens of each row."""
        return np.diff(self.folds.offsets)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.owners)


def read_parts(
    database: Database, *, balanced: bool, multi_label: bool, count_documents_once: bool
) -> tuple[dict[str, Part], Floats | None]:
    """Rows of each part, "train", "validation" and "test", and the weights of statements.

    Args:
        database: the file of the task, with the rows and the split that are meant.
        balanced: weigh rare labels up: the rows of one label each, of several (K,) the statement of having each.
        multi_label: a document may have several.
        count_documents_once: a row of a document that has k of them weighs 1/k.

    Raises:
        UserError: there is nothing to train on.
    """
    of_labels = balanced_weights(database.read_labels("train")[1], multi_label) if balanced else None
    parts = dict[str, Part]()
    for part in PARTS:
        folds = database.read_folds(part)
        doc_ids, truth = database.read_labels(part)
        owners = np.searchsorted(doc_ids, folds.doc_ids).astype(np.int64)
        weights = 1.0 / np.maximum(folds.n, 1) if count_documents_once else np.ones(len(owners))
        if of_labels is not None and not multi_label:
            weights = weights * of_labels[truth.argmax(1)][owners]
        parts[part] = Part(folds, doc_ids, truth, owners, weights.astype(np.float32))
    if not parts["train"].num_rows:
        raise UserError(f"no document for training in {database.path} gives a row")
    return parts, of_labels if multi_label else None


def balanced_weights(truth: NDArray[np.bool_], multi_label: bool) -> Floats:
    """(K,) weights that let every label count alike.

    One label each: D / (K x documents of the label), so that their mean over documents is 1. Several: how many
    documents lack the label for one that has it, the weight of having it. `truth` is (D, K), of the training part.
    """
    having = np.maximum(truth.sum(0), 1)
    found = (len(truth) - having) / having if multi_label else len(truth) / (truth.shape[1] * having)
    return np.asarray(np.maximum(found, 1e-3), np.float32)


def by_length(lengths: Ints, batch_size: int) -> list[Ints]:
    """All rows in batches of like length, for judging: the same batches always."""
    return cut(np.argsort(lengths, kind="stable").astype(np.int64), batch_size)


def padded(rows: Sequence[NDArray[np.int32]], pad_id: int) -> Batch:
    """Rows filled up on the right to the longest of them: input_ids and attention_mask, (B, T) int64."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate(rows)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def collate(part: Part, rows: Ints, pad_id: int) -> Batch:
    """(B,) rows of a part by number: what `padded` gives, truth (B, K) float32, and weights (B,)."""
    spans = zip(part.folds.offsets[rows], part.folds.offsets[rows + 1], strict=True)
    return {
        **padded([part.folds.ids[begin:end] for begin, end in spans], pad_id),
        "truth": torch.from_numpy(part.truth[part.owners[rows]].astype(np.float32)),
        "weights": torch.from_numpy(part.weights[rows]),
    }


def batch_maker(part: Part, pad_id: int) -> MakeBatches:
    """What makes batches of a part for `lmscripts.data.steps.step_batches`.

    Their counts are "tokens"; "weight", that of their rows; and "loss", by whose sum over a step its loss is divided:
    rows x the mean weight of a row of the whole part. With the weight of the step's own rows instead, the 1/k of the
    rows of long texts, which share batches, would be undone.
    """
    mean_weight = float(part.weights.mean(dtype=np.float64))
    lengths = part.lengths

    def make(rows: Ints, epochs: Ints, sizes: list[int]) -> Made:
        made: Made = []
        for mine in np.split(rows, np.cumsum(sizes)[:-1]):
            weight, tokens = float(part.weights[mine].sum(dtype=np.float64)), float(lengths[mine].sum())
            counts = {"loss": len(mine) * mean_weight, "weight": weight, "tokens": tokens}
            made.append((collate(part, mine, pad_id), counts))
        return made

    return make


class Steps:
    """Which process computes which rows of the training part in which step, see `lmscripts.data.steps`.

    Attributes:
        per_epoch: steps of an epoch.
        shares: rows of each process in a full step.
        pad_id: the token that rows are filled up with.
    """

    def __init__(
        self, part: Part, batch_size: int, micro_batch_size: int, *, shares: Sequence[int], seed: int, pad_id: int
    ) -> None:
        """Nothing is computed yet.

        Args:
            part: the rows.
            batch_size: rows of a step.
            micro_batch_size: most rows of one forward pass.
            shares: rows of each process in a full step.
            seed: of the order.
            pad_id: the token that rows are filled up with.
        """
        self._order, self._make = ByLength(part.lengths, batch_size, seed), batch_maker(part, pad_id)
        self._micro_batch_size, self.shares, self.pad_id = micro_batch_size, shares, pad_id
        self.per_epoch = self._order.per_epoch

    def is_due(self, step: int, every: int | None) -> bool:
        """Whether what is done at the end of an epoch, and every so many steps, is done after so many steps."""
        return step % self.per_epoch == 0 or (every is not None and step % every == 0)

    def prefetch(
        self, first: int, stop: int, process: int, shares: Sequence[int] = ()
    ) -> Prefetcher[tuple[list[Batch], Counts]]:
        """Micro-batches of one process for the steps [first, stop), with their counts, made in the background.

        The rows are divided as the shares say, which need not sum to anything; without, as the steps' own.
        """
        own: Any = {"process": process, "micro_batch_size": self._micro_batch_size, "first": first, "stop": stop}
        return Prefetcher(step_batches(self._order, self._make, shares=shares or self.shares, **own))
