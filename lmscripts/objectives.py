"""Training objectives: modules that take a batch and return sums of losses, never means.

The loop divides each sum once, by the number of targets over all processes and micro-batches of the optimizer step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmscripts.attention import AttentionPath, attention_inputs
from lmscripts.masking import MaskingPlan, mask_rows, row_keys
from lmscripts.models import FAMILIES
from lmscripts.packing import Rows

Batch = dict[str, Tensor]


class MaskedLanguageModel(nn.Module):
    """Predict masked tokens (arXiv:1810.04805, section 3.1), with logits at the masked positions only.

    Attributes:
        model: a transformers model for masked language modelling, untouched.
        terms: the loss terms that `forward` returns and `num_targets` counts.
    """

    terms = ("mlm",)

    def __init__(self, model: PreTrainedModel, family: str, attention: AttentionPath) -> None:
        super().__init__()
        self.model = model
        self.family = FAMILIES[family]
        self.attention: AttentionPath = attention

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the used prediction slots of a batch.

        Args:
            batch: from `masked_batch`.

        Returns:
            "mlm": () fp32 sum of cross-entropies. In eval mode also "mlm_correct": () number of right predictions.
        """
        dtype = torch.get_autocast_dtype(batch["input_ids"].device.type)
        if not torch.is_autocast_enabled(batch["input_ids"].device.type):
            dtype = self.model.dtype
        attention = attention_inputs(self.attention, batch, dtype)
        hidden = self.family.encode(self.model, batch["input_ids"], batch["position_ids"], attention)
        at_slots = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch["slots"])
        logits = self.family.predict(self.model, at_slots).float()
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        sums = {"mlm": (losses * batch["weights"]).sum()}
        if not self.training:
            sums["mlm_correct"] = ((logits.argmax(-1) == batch["labels"]) * batch["weights"]).sum()
        return sums


def masked_batches(
    rows: Rows,
    row_numbers: np.ndarray[Any, Any],
    epochs: np.ndarray[Any, Any],
    seed: int,
    plan: MaskingPlan,
    sizes: list[int],
) -> list[tuple[Batch, dict[str, float]]]:
    """Mask rows and lay them out for `MaskedLanguageModel`, all at once, then cut into batches.

    Args:
        rows: N rows of T tokens.
        row_numbers: (N,) which rows they are.
        epochs: (N,) in which epoch; number, epoch and seed decide the masks.
        seed: of the masks.
        plan: how to mask, with K slots per row.
        sizes: rows of each batch, B; they sum to N.

    Returns:
        For each batch: input_ids (B, T) int32, position_ids (B, T) int32, segments (B, T) int32 (left out when every
        row is one full segment), slots (B * K,) int64 flat positions, labels (B * K,) int64, weights (B * K,) fp32.
        And its counts: targets of the term "mlm" and real (text) "tokens".
    """
    masks = mask_rows(rows.ids, rows.content, rows.word_starts, row_keys(seed, epochs, row_numbers), plan)
    labels = masks.labels.astype(np.int64)
    several: np.ndarray[Any, Any] = np.any(rows.segments, axis=1)
    batches, begin = [], 0
    for size in sizes:
        part = slice(begin, begin + size)
        begin += size
        first = np.arange(size)[:, None] * rows.ids.shape[1]
        arrays = {
            "input_ids": masks.input_ids[part],
            "position_ids": rows.positions[part],
            "slots": (masks.positions[part] + first).reshape(-1),
            "labels": labels[part].reshape(-1),
            "weights": masks.weights[part].reshape(-1),
        }
        if several[part].any():
            arrays["segments"] = rows.segments[part]
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        counts = {"mlm": float(masks.weights[part].sum()), "tokens": float(np.count_nonzero(rows.content[part]))}
        batches.append((batch, counts))
    return batches
