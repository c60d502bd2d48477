"""Scores of whole documents: a causal model's loss with sliding windows, a masked model's pseudo-perplexity.

Documents never see each other and no position of padding has any influence: rows are only batched with rows of the same
padded length, which is a function of the row alone, and padding stands behind a causal row, where nothing looks. Totals
are in float64 and have the same bits for any number of processes.

Every score takes the running processes, `batch_size` rows of full length for a forward pass (more where rows are short,
fewer where their logits would be too many), what `unknown_id` says, and `progress`, called after each forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from lmscripts.data.masking import expand_ranges
from lmscripts.data.packing import PackedRows
from lmscripts.data.steps import fixed_batch
from lmscripts.data.token_store import Part
from lmscripts.data.windows import slide, window_rows
from lmscripts.errors import UserError
from lmscripts.evaluation.sums import Progress, evaluate, sum_over_batches
from lmscripts.models import decoder
from lmscripts.objectives.module import Objective

LOGITS_AT_ONCE = 1 << 26

Ints = NDArray[np.int64]


def unknown_id(tokenizer: Any) -> int:
    """Id of the token that stands for what a tokenizer of transformers does not know; -1 where there is none.

    GPT-2's own names its end token as the unknown one, too, but builds every text from bytes and never gives it.
    """
    number = tokenizer.unk_token_id
    if number is None:
        return -1
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return -1 if number in ends and getattr(model, "unk_token", "") is None else int(number)


def per_target(totals: dict[str, float], **sizes: int) -> dict[str, float]:
    """Loss, perplexity and accuracy per target of `score_causal` or `score_pseudo`, and bits per byte.

    The sizes are bytes of the text, each under the name of the bits per byte that it gives.
    """
    loss, bits = totals["nats"] / totals["targets"], totals["nats"] / math.log(2)
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    found |= {name: bits / size for name, size in sizes.items()}
    return found | {"accuracy": totals["correct"] / totals["targets"]}


# ---- causal: sliding windows -------------------------------------------------------------------------------------


def score_causal(
    accelerator: Accelerator,
    model: Any,
    part: Part,
    boundary: tuple[int, int],
    *,
    block_size: int,
    stride: int,
    batch_size: int,
    unknown_id: int = -1,
    progress: Progress = lambda done, passes: None,
) -> dict[str, float]:
    """Score every token and the end of every document of a part of a store, each once, each document by itself.

    The model is any causal one of transformers, in evaluation mode on the accelerator's device. `boundary` are the ids
    that stand before a document and are predicted after it, see `objectives.causal.boundary_ids`; `stride` is the
    number of positions from one window of `block_size` positions to the next.

    Returns:
        "nats": sum of cross-entropies; "correct": targets with the highest logit; "targets"; "windows"; "unknown":
        targets that the tokenizer does not know.
    """
    windows = slide(part, block_size, stride)
    separate_head = has_separate_head(model)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    most_rows = len(windows)
    if not separate_head:
        most_rows = max(1, LOGITS_AT_ONCE // (block_size * vocabulary))
    batches = windows.batches(batch_size * block_size, most_rows)

    def measure(number: int) -> dict[str, float]:
        inputs, scored, targets = window_rows(part, windows, *batches[number], *boundary)
        ids, places, wanted = (torch.from_numpy(a).to(accelerator.device) for a in (inputs, scored, targets))
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        found = []
        if separate_head:
            hidden = decoder.encode(model, ids, positions, {"attention_mask": None}, places)
            most = max(1, LOGITS_AT_ONCE // vocabulary)
            for some, labels in zip(torch.split(hidden, most), torch.split(wanted, most), strict=True):
                found.append(_nats_and_correct(decoder.predict(model, some), labels))
        else:
            logits = model(input_ids=ids, use_cache=False).logits
            found.append(_nats_and_correct(logits.flatten(0, 1).index_select(0, places), wanted))
        nats, correct = (sum(values) for values in zip(*found, strict=True))
        sizes = {"targets": float(targets.size), "windows": float(len(inputs))}
        return {"nats": nats, "correct": correct, **sizes, "unknown": float(np.count_nonzero(targets == unknown_id))}

    return sum_over_batches(accelerator, len(batches), measure, progress=progress) or {}


def _nats_and_correct(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Sum of the cross-entropies, in float64, and the number of targets with the highest logit."""
    logits = logits.float()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    correct = (logits.argmax(-1) == targets).sum()
    return float(losses.cpu().numpy().astype(np.float64).sum()), float(correct)


@torch.no_grad()
def has_separate_head(model: Any) -> bool:
    """Whether the logits of a model are its output matrix times its last hidden states and nothing else.

    Some decoders scale or bend their logits afterwards; those have to be asked for all logits of a row at once.
    """
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    ids = torch.randint(0, vocabulary, (1, 12), generator=torch.Generator().manual_seed(0)).to(model.device)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    try:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        found = decoder.predict(model, decoder.encode(model, ids, positions, {"attention_mask": None})).float()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False  # built in another way
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


# ---- masked ------------------------------------------------------------------------------------------------------


def _cut(part: Part, most_tokens: int, most_documents: int | None) -> tuple[Ints, Ints]:
    """Documents in P pieces of at most `most_tokens` tokens, the longest first: first token and length, (P,) each."""
    offsets = part.document_tokens[: None if most_documents is None else most_documents + 1]
    tokens = np.diff(offsets)
    count = -(-tokens // most_tokens)
    begin = expand_ranges(np.zeros_like(count), count) * most_tokens
    length = np.minimum(most_tokens, np.repeat(tokens, count) - begin)
    order = np.argsort(-length, kind="stable")
    return (np.repeat(offsets[:-1], count) + begin)[order], length[order]


def _masked_batches(lengths: Ints, positions: int, most_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows with one masked token each, by length of their pieces.

    Yields:
        The length, the first piece that has it, and of the rows of these pieces the first and the last + 1.
    """
    for length, first, count in zip(*np.unique(-lengths, return_index=True, return_counts=True), strict=True):
        tokens = -int(length)
        rows = max(1, min(positions // (tokens + 2), most_rows))
        for begin in range(0, int(count) * tokens, rows):
            yield tokens, int(first), begin, min(int(count) * tokens, begin + rows)


def score_pseudo(
    accelerator: Accelerator,
    family: Any,
    model: Any,
    part: Part,
    special: dict[str, int],
    *,
    block_size: int,
    batch_size: int,
    most_documents: int | None = None,
    unknown_id: int = -1,
    progress: Progress = lambda done, passes: None,
) -> dict[str, float]:
    """Pseudo-log-likelihood (arXiv:1910.14659, section 2.3): every token is masked once and predicted from all others.

    Rows of one length share a batch, so there is no padding at all. Deviation: documents longer than the model reads
    are cut into pieces, each scored by itself. There is no likelihood behind the numbers.

    The model is a masked one of its family, evaluated on the accelerator's device, its last layer narrowed;
    `special` are the ids "cls", "sep" and "mask", the first and last of which are among the `block_size` tokens of a
    row. Only the first `most_documents` are scored.

    Returns:
        "nats": the pseudo-log-likelihood with the sign of a loss; "correct"; "targets": tokens; "unknown".
    """
    starts, lengths = _cut(part, block_size - 2, most_documents)
    most_rows = max(1, LOGITS_AT_ONCE // int(model.get_output_embeddings().weight.shape[0]))
    batches = list(_masked_batches(lengths, batch_size * block_size, most_rows))

    def measure(number: int) -> dict[str, float]:
        length, first, begin, end = batches[number]
        row = np.arange(begin, end)
        ids = np.empty((row.size, length + 2), np.int64)
        ids[:, 0], ids[:, -1] = special["cls"], special["sep"]
        ids[:, 1:-1] = part.tokens[starts[first + row // length][:, None] + np.arange(length)]
        at = np.arange(row.size) * (length + 2) + 1 + row % length
        targets = ids.reshape(-1)[at].copy()
        ids.reshape(-1)[at] = special["mask"]
        inputs, slots, wanted = (torch.from_numpy(a).to(accelerator.device) for a in (ids, at, targets))
        positions = torch.arange(length + 2, device=inputs.device).expand_as(inputs)
        hidden = family.encode(model, inputs, positions, {"attention_mask": None}, slots)
        nats, correct = _nats_and_correct(family.predict(model, hidden), wanted)
        unknown = np.count_nonzero(targets == unknown_id)
        return {"nats": nats, "correct": correct, "targets": float(row.size), "unknown": float(unknown)}

    return sum_over_batches(accelerator, len(batches), measure, progress=progress) or {}


def score_masks(
    accelerator: Accelerator,
    objective: Objective,
    rows: PackedRows,
    tokenizer: Any,
    *,
    batch_size: int,
    unknown_id: int = -1,
    progress: Progress = lambda done, passes: None,
) -> tuple[dict[str, float], dict[str, float]]:
    """What an objective with masks measures on all rows of a text, masked as the held-out rows of a training run are.

    Returns:
        The objective's metrics, and its counts; "unknown": masked tokens that the tokenizer does not know.

    Raises:
        UserError: the text is so short that no token of it is masked.
    """
    kind, settings = objective.kind, objective.settings
    plan = kind.plan(tokenizer, rows.layout, settings)
    tables: list[Any] = [model.get_input_embeddings() for model in objective.models.values()]
    vocabulary = max(len(table.weight) for table in tables)
    at_once = max(1, min(batch_size, LOGITS_AT_ONCE // (plan.slots * vocabulary)))
    make = partial(kind.batches, plan=plan, with_ends=objective.attention == "varlen")

    def make_batch(numbers: Ints) -> tuple[dict[str, Tensor], dict[str, float]]:
        batch, counts = fixed_batch(rows, make, numbers)
        return batch, counts | {"unknown": float(batch["weights"][batch["labels"] == unknown_id].sum())}

    metrics, counts = evaluate(accelerator, objective, make_batch, rows.num_rows, at_once, progress=progress)
    if not metrics:
        raise UserError(
            f"of the {rows.real_tokens} tokens of the text none is masked at --mask_probability "
            f"{settings.mask_probability[0]}: give more text"
        )
    return metrics, counts
