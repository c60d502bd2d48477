"""Folded rows as batches: the order of an epoch, the rows of a process, padding, and what every row weighs.

Which rows an optimizer step has is a function of the rows, the seed, the batch size and the step, whatever the number
of processes. A batch holds rows of about the same length, so that hardly any padding is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lmscripts.counters import permute, split_shares, stream_key
from lmscripts.data.folding import special_tokens_around
from lmscripts.data.labelled_store import Database, FoldRows
from lmscripts.data.steps import micro_batches
from lmscripts.errors import UserError
from lmscripts.tokenizer.encoder import Encoder

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Batch = dict[str, Tensor]

WINDOW_BATCHES = 50
_PADDING_TOLERANCE = 2e-3  # of the largest logit; float32 stays far below, another place read lies far above
_ROWS, _BATCHES = 0xF01D, 0xBA7C  # which of the two permutations of an epoch


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


def read_part(
    database: Database,
    part: str,
    *,
    class_weights: Floats | None = None,
    count_documents_once: bool = True,
) -> Part:
    """A part of a split as it is trained or judged.

    Args:
        database: the file of the task, with the rows and the split that are meant.
        part: train, validation or test.
        class_weights: (K,) weight of the rows of each label, for one label a row; None weighs all alike.
        count_documents_once: a row of a document that has k of them weighs 1/k.
    """
    folds = database.read_folds(part)
    doc_ids, truth = database.read_labels(part)
    owners = np.searchsorted(doc_ids, folds.doc_ids).astype(np.int64)
    weights = 1.0 / np.maximum(folds.n, 1) if count_documents_once else np.ones(len(owners))
    if class_weights is not None:
        weights = weights * class_weights[truth.argmax(1)][owners]
    return Part(folds, doc_ids, truth, owners, weights.astype(np.float32))


def balanced_weights(truth: NDArray[np.bool_], multi_label: bool) -> Floats:
    """(K,) weights that let every label count alike.

    One label each: D / (K x documents of the label), so that their mean over documents is 1. Several: how many
    documents lack the label for one that has it, the weight of having it.

    Args:
        truth: (D, K) of the training part.
        multi_label: a document may have several.
    """
    having = np.maximum(truth.sum(0), 1)
    found = (len(truth) - having) / having if multi_label else len(truth) / (truth.shape[1] * having)
    return np.asarray(np.maximum(found, 1e-3), np.float32)


def num_batches(num_rows: int, batch_size: int) -> int:
    """Optimizer steps of an epoch; the last batch of the rows may be a short one."""
    return -(-num_rows // batch_size)


def epoch_batches(lengths: Ints, batch_size: int, seed: int, epoch: int) -> list[Ints]:
    """Rows of every step of an epoch, each row once.

    All rows are permuted, put in the order of their length within windows of 50 batches, cut into batches, and the
    batches permuted.

    Args:
        lengths: (R,) tokens of each row.
        batch_size: rows of a step.
        seed: of the order.
        epoch: number of the epoch.
    """
    order = permute(np.arange(len(lengths)), len(lengths), stream_key(seed, epoch, _ROWS))
    window = WINDOW_BATCHES * batch_size
    by_length = [part[np.argsort(lengths[part], kind="stable")] for part in _cut(order, window)]
    batches = [batch for part in by_length for batch in _cut(part, batch_size)]
    shuffled = permute(np.arange(len(batches)), len(batches), stream_key(seed, epoch, _BATCHES))
    return [batches[number] for number in shuffled]


def by_length(lengths: Ints, batch_size: int) -> list[Ints]:
    """All rows in batches of like length, for judging: the same batches always."""
    return _cut(np.argsort(lengths, kind="stable").astype(np.int64), batch_size)


def _cut(rows: Ints, size: int) -> list[Ints]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def collate(part: Part, rows: Ints, pad_id: int, weights: Floats | None = None) -> Batch:
    """Rows padded on the right to the longest of them.

    Args:
        part: where they are.
        rows: (B,) their numbers.
        pad_id: the padding token.
        weights: (B,) in place of the part's own.

    Returns:
        input_ids and attention_mask (B, T), truth (B, K) float32, weights (B,).
    """
    starts, lengths = part.folds.offsets[rows], part.lengths[rows]
    mask = np.arange(int(lengths.max())) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate([part.folds.ids[s : s + n] for s, n in zip(starts, lengths, strict=True)])
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "truth": torch.from_numpy(part.truth[part.owners[rows]].astype(np.float32)),
        "weights": torch.from_numpy(part.weights[rows] if weights is None else weights),
    }


def step_batches(
    part: Part,
    *,
    batch_size: int,
    micro_batch_size: int,
    process_weights: Sequence[int],
    process: int,
    pad_id: int,
    seed: int,
    first_step: int,
    end_step: int,
) -> Iterator[tuple[list[Batch], dict[str, float]]]:
    """Micro-batches of this process and its counts, for every step of a range.

    A step's rows are fixed; each process takes a contiguous share of them. One that has none computes a row that
    weighs nothing, so that all take part in what the processes exchange.

    Args:
        part: training rows.
        batch_size: rows of a step, over all processes.
        micro_batch_size: rows of a forward pass at most.
        process_weights: relative share of each process.
        process: which of them this is.
        pad_id: the padding token.
        seed: of the order.
        first_step: counted from the beginning of the run.
        end_step: the first that is not made.
    """
    per_epoch, epoch, batches = num_batches(part.num_rows, batch_size), -1, list[Ints]()
    for step in range(first_step, end_step):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            batches = epoch_batches(part.lengths, batch_size, seed, epoch)
        rows = batches[step % per_epoch]
        shares = split_shares(len(rows), list(process_weights))
        begin = sum(shares[:process])
        mine = rows[begin : begin + shares[process]]
        sizes = micro_batches(len(mine), micro_batch_size)
        ends = np.cumsum([0, *sizes])
        made = [collate(part, mine[first:end], pad_id) for first, end in itertools.pairwise(ends)]
        made = made or [collate(part, rows[:1], pad_id, np.zeros(1, np.float32))]
        yield made, _counts(part, mine)


def _counts(part: Part, rows: Ints) -> dict[str, Any]:
    weight = float(part.weights[rows].sum(dtype=np.float64))
    return {"weight": weight, "rows": float(len(rows)), "tokens": float(part.lengths[rows].sum())}


def check_padding(model: PreTrainedModel, encoder: Encoder, pad_id: int, longest: int | None) -> None:
    """See that a row has the same logits alone and beside a longer one, to whose length it is filled up on the right.

    XLNet, for one, reads its answer off the last place, whatever the attention mask says of it.

    Args:
        model: a classifier on the CPU; it is left in the mode that it was in.
        encoder: its tokenizer.
        pad_id: the padding token.
        longest: tokens of its longest input; None where nothing says.

    Raises:
        UserError: the logits differ, or the model cannot compute them.
    """
    before, after = special_tokens_around(encoder.tokenizer)
    special = {*encoder.special_ids, *encoder.reserved_ids}
    words = [number for number in sorted(encoder.tokenizer.get_vocab().values()) if number not in special][:9]
    room = len(words) if longest is None else min(len(words), longest - len(before) - len(after))
    if room < 2:  # no row can be longer than another
        return
    long, short = ([*before.tolist(), *words[:number], *after.tolist()] for number in (room, (room + 1) // 3))
    filler = len(long) - len(short)
    ids = torch.tensor([[*short, *[pad_id] * filler], long])
    mask = torch.tensor([[1] * len(short) + [0] * filler, [1] * len(long)])
    was_training = model.training
    kind, judge = model.config.model_type, cast(Any, model.train(False))
    try:
        with torch.no_grad():
            padded = judge(input_ids=ids, attention_mask=mask).logits[0].float()
            alone = judge(input_ids=ids[:1, : len(short)], attention_mask=mask[:1, : len(short)]).logits[0].float()
    except Exception as error:  # whatever a model that is not made for this raises
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"a model of the type {kind}, as its config.json has it, cannot answer rows of {encoder.folder} ({reason})"
        ) from error
    finally:
        model.train(was_training)
    difference, scale = float((padded - alone).abs().max()), float(alone.abs().max())
    if difference > _PADDING_TOLERANCE * scale + 1e-6:
        raise UserError(
            f"a model of the type {kind} cannot be a classifier here: its logits of a row change by {difference:.2g} "
            "when it is filled up to the length of another, so they would depend on the batch; take another type"
        )
