"""Causal language modelling: every token from what stands before it, of its own document only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmscripts.data.packing import Rows
from lmscripts.errors import UserError
from lmscripts.models import gpt2
from lmscripts.models.attention import AttentionPath, attention_inputs
from lmscripts.objectives.cross_entropy import chunked_cross_entropy

Batch = dict[str, Tensor]


def boundary_ids(tokenizer: Any) -> tuple[int, int]:
    """Ids of what stands before the first token of a document and of what is predicted after its last.

    Begin: bos, else eos, else cls. End: eos, else sep. In GPT-2's own tokenizer both are <|endoftext|>.

    Raises:
        UserError: the tokenizer has none of them.
    """
    begin = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id]
    end = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    found = [next((number for number in ids if number is not None), None) for ids in (begin, end)]
    if found[0] is None or found[1] is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no {'eos or sep' if found[0] is not None else 'bos or cls'} "
            "token, which separates the documents of a causal model"
        )
    return int(found[0]), int(found[1])


class CausalLanguageModel(nn.Module):
    """Predict every token of a document and its end (GPT-2; arXiv:2005.14165, section 2.1, trains the same way).

    Of models other than GPT-2 `lmscripts.models.decoders.check_isolation` has to be asked first.

    Attributes:
        models: the transformers model, untouched.
        weights: one loss term, "clm".
    """

    weights: Mapping[str, float] = {"clm": 1.0}

    def __init__(self, model: PreTrainedModel, attention: AttentionPath, z_loss: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.attention: AttentionPath = attention
        self.z_loss = z_loss

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """What is saved, by subfolder."""
        return {"": self.model}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the targets of a batch.

        Args:
            batch: from `causal_batches`.

        Returns:
            () fp32 each. "clm": sum of cross-entropies and of the terms of the z-loss; "clm_entropy" and "clm_penalty":
            of either alone; in eval mode "clm_correct": right predictions.
        """
        device = batch["input_ids"].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype
        attention = attention_inputs(self.attention, batch, dtype, causal=True)
        hidden = gpt2.encode(self.model, batch["input_ids"], batch["position_ids"], attention).flatten(0, 1)
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        loss, entropy, penalty, correct = chunked_cross_entropy(
            hidden, head.weight, head.bias, batch["labels"], batch["weights"], self.z_loss
        )
        sums = {"clm": loss, "clm_entropy": entropy, "clm_penalty": penalty}
        return sums if self.training else sums | {"clm_correct": correct}

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Cross-entropy per target, perplexity, bits per byte of the text as read; where counted, right ones."""
        targets = max(1.0, counts["clm"])
        loss = sums["clm_entropy"] / targets
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        found["bits_per_text_byte"] = sums["clm_entropy"] / math.log(2) / max(1.0, counts["bytes"])
        if self.z_loss:
            found["z_loss"] = sums["clm_penalty"] / targets
        if "clm_correct" in sums:
            found["accuracy"] = sums["clm_correct"] / targets
        return found

    def flops_per_position(self, sequence_length: int, slots: int) -> float:
        """Operations of a training step per position; `slots` is not used, as every position is predicted."""
        return _operations(self.model, sequence_length)


def _operations(model: PreTrainedModel, sequence_length: int) -> float:
    """6 per weight that a position meets and 12 H T per layer for the scores (arXiv:2001.08361, section 2.1).

    The half of the scores that lies in the future is counted, as is usual, although kernels may skip it.
    """
    layers = gpt2.layers(model)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    matrices = sum(p.numel() for p in layers.parameters() if p.ndim >= 2) + head.weight.numel()
    width = head.weight.shape[1]
    return float(6 * matrices + 12 * len(layers) * width * sequence_length)


def causal_batches(rows: Rows, sizes: list[int]) -> list[tuple[Batch, dict[str, float]]]:
    """Rows of a stream laid out for the objective, cut into batches.

    Args:
        rows: N rows of T tokens, with targets.
        sizes: rows of each batch, B; they sum to N.

    Returns:
        For each batch: input_ids (B, T) int32, position_ids (B, T) int32, segments (B, T) int32 (left out when no row
        holds a second one: what is empty comes last, where nothing sees it), labels (B * T,) int64 and weights
        (B * T,) fp32, 0 where a position is empty. And its counts: targets of the term "clm" and real (text) "tokens".
    """
    if rows.targets is None:
        raise ValueError("these rows have no targets")
    real = rows.segments >= 0
    labels, weights = rows.targets.astype(np.int64), real.astype(np.float32)
    several = np.any(rows.segments > 0, axis=1)
    batches, begin = [], 0
    for size in sizes:
        part = slice(begin, begin + size)
        begin += size
        arrays = {
            "input_ids": rows.ids[part],
            "position_ids": rows.positions[part],
            "labels": labels[part].reshape(-1),
            "weights": weights[part].reshape(-1),
        }
        if several[part].any():
            arrays["segments"] = rows.segments[part]
        counts = {"clm": float(real[part].sum()), "tokens": float(np.count_nonzero(rows.content[part]))}
        batches.append(({name: torch.from_numpy(array) for name, array in arrays.items()}, counts))
    return batches
