"""Training objectives: modules that take a batch and return sums, never means.

Every objective has `models` (what is saved, by subfolder), `weights` (its loss terms and their weights), `forward`
(a batch in, sums out), `metrics` (sums and counts in, named numbers out) and `flops_per_position`. The loop divides
each term once, by its targets over all processes and micro-batches of the optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmscripts.data.masking import MaskingPlan, mask_rows, row_keys
from lmscripts.data.packing import Rows
from lmscripts.models import DECODERS, FAMILIES, electra
from lmscripts.models.attention import AttentionPath, attention_inputs
from lmscripts.models.encoder import narrow_last_layer
from lmscripts.objectives.causal import CausalLanguageModel
from lmscripts.training.log import forward_backward_flops

Batch = dict[str, Tensor]
Sums = Mapping[str, float]
# How the chosen tokens are corrupted where it is not as in BERT: ELECTRA's generator sees [MASK] or the token itself.
CORRUPTION: Mapping[str, Mapping[str, Any]] = {"electra": {"mask_share": 0.85, "random_share": 0.0, "draws": True}}


class MaskedLanguageModel(nn.Module):
    """Predict masked tokens (arXiv:1810.04805, section 3.1), with logits at the masked positions only.

    Attributes:
        models: the transformers model; its last layer skips what no prediction needs, else it is untouched.
        weights: one loss term, "mlm".
    """

    weights: Mapping[str, float] = {"mlm": 1.0}

    def __init__(self, model: PreTrainedModel, family: str, attention: AttentionPath) -> None:
        super().__init__()
        self.model = model
        self.family = FAMILIES[family]
        self.attention: AttentionPath = attention
        narrow_last_layer(self.family.layers(model))

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """What is saved, by subfolder."""
        return {"": self.model}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the used prediction slots of a batch.

        Args:
            batch: from `masked_batches`.

        Returns:
            "mlm": () fp32 sum of cross-entropies. In eval mode also "mlm_correct": () number of right predictions.
        """
        attention = attention_inputs(self.attention, batch, compute_dtype(self.model, batch))
        logits = logits_at_slots(self.family, self.model, batch, attention)
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        sums = {"mlm": (losses * batch["weights"]).sum()}
        if not self.training:
            sums["mlm_correct"] = ((logits.argmax(-1) == batch["labels"]) * batch["weights"]).sum()
        return sums

    @staticmethod
    def metrics(sums: Sums, counts: Sums) -> dict[str, float]:
        """Loss per masked token; where it was counted, the share of right predictions."""
        found = {"loss": _ratio(sums["mlm"], counts["mlm"])}
        if "mlm_correct" in sums:
            found["accuracy"] = _ratio(sums["mlm_correct"], counts["mlm"])
        return found

    def flops_per_position(self, sequence_length: int, slots: int) -> float:
        """Operations of a training step per position."""
        return forward_backward_flops(self.model.config, sequence_length, slots)


class ReplacedTokenDetection(nn.Module):
    """ELECTRA (arXiv:2003.10555): the discriminator says of every token whether the generator put it there.

    The generator predicts the masked tokens; one sample of each prediction takes the token's place (no gradient flows
    through it, section 2); the label is 1 only where the sample differs from the original. Where the published code
    adds Gumbel noise to every logit and takes the highest, here the sample is the first id whose cumulative probability
    exceeds one uniform number of the slot: the same distribution, but the number is a hash of (seed, epoch, row,
    position), so the shape of the cluster does not change what is sampled.

    Attributes:
        models: the discriminator, and in the subfolder generator/ the generator. They share one embeddings module.
        weights: loss terms "mlm" (generator) and "rtd" (replaced token detection).
    """

    def __init__(
        self,
        generator: PreTrainedModel,
        discriminator: PreTrainedModel,
        attention: AttentionPath,
        generator_weight: float = 1.0,
        discriminator_weight: float = 50.0,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.attention: AttentionPath = attention
        self.weights = {"mlm": generator_weight, "rtd": discriminator_weight}
        narrow_last_layer(electra.layers(generator))

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """What is saved, by subfolder."""
        return {"": self.discriminator, "generator": self.generator}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the masked slots (generator) and over all positions that are not empty (discriminator).

        Args:
            batch: from `masked_batches`, with "draws".

        Returns:
            () fp32 each. "mlm": sum of cross-entropies; "mlm_correct": right predictions; "rtd": sum of binary
            cross-entropies; "rtd_correct": right decisions; "rtd_replaced": positions with label 1; "rtd_flagged":
            positions that were called replaced; "rtd_hits": both at once.
        """
        attention = attention_inputs(self.attention, batch, compute_dtype(self.generator, batch))
        logits = logits_at_slots(electra, self.generator, batch, attention)
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        used = batch["weights"] > 0
        with torch.no_grad():
            sampled = sample(logits, batch["draws"])
            seen, replaced = replace_tokens(batch, sampled)
        hidden = electra.encode(self.discriminator, seen, batch["position_ids"], attention)
        scores = electra.detect(self.discriminator, hidden).float()
        real = batch["segments"] >= 0 if "segments" in batch else torch.ones_like(replaced)
        real = real & batch["row_weights"][:, None]
        decisions = nn.functional.binary_cross_entropy_with_logits(scores, replaced.float(), reduction="none")
        flagged = (scores > 0) & real
        return {
            "mlm": (losses * batch["weights"]).sum(),
            "mlm_correct": ((logits.argmax(-1) == batch["labels"]) & used).sum().float(),
            "rtd": (decisions * real).sum(),
            "rtd_correct": (((scores > 0) == replaced) & real).sum().float(),
            "rtd_replaced": replaced.sum().float(),
            "rtd_flagged": flagged.sum().float(),
            "rtd_hits": (flagged & replaced).sum().float(),
        }

    def metrics(self, sums: Sums, counts: Sums) -> dict[str, float]:
        """Weighted loss; loss and accuracy of both halves; precision and recall of the discriminator's finds."""
        mlm, rtd = _ratio(sums["mlm"], counts["mlm"]), _ratio(sums["rtd"], counts["rtd"])
        return {
            "loss": self.weights["mlm"] * mlm + self.weights["rtd"] * rtd,
            "generator_loss": mlm,
            "generator_accuracy": _ratio(sums["mlm_correct"], counts["mlm"]),
            "discriminator_loss": rtd,
            "discriminator_accuracy": _ratio(sums["rtd_correct"], counts["rtd"]),
            "discriminator_precision": _ratio(sums["rtd_hits"], sums["rtd_flagged"]),
            "discriminator_recall": _ratio(sums["rtd_hits"], sums["rtd_replaced"]),
        }

    def flops_per_position(self, sequence_length: int, slots: int) -> float:
        """Operations of a training step per position."""
        generator = forward_backward_flops(self.generator.config, sequence_length, slots)
        return generator + forward_backward_flops(self.discriminator.config, sequence_length, 0)


def compute_dtype(model: PreTrainedModel, batch: Batch) -> torch.dtype:
    """The dtype that queries will have: autocast's where it is on."""
    device = batch["input_ids"].device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def logits_at_slots(family: Any, model: PreTrainedModel, batch: Batch, attention: dict[str, Any]) -> Tensor:
    """(B * K, V) fp32 logits at the prediction slots."""
    hidden = family.encode(model, batch["input_ids"], batch["position_ids"], attention, batch["slots"])
    logits: Tensor = family.predict(model, hidden).float()
    return logits


def sample(logits: Tensor, draws: Tensor) -> Tensor:
    """One id for each row of logits, by inverting the cumulative distribution.

    Args:
        logits: (N, V) fp32.
        draws: (N,) uniform in [0, 1).

    Returns:
        (N,) int64: the first id whose cumulative probability exceeds the draw.
    """
    cumulative = logits.softmax(-1).cumsum_(-1)  # in place: with a large vocabulary this is the peak of memory
    wanted = draws[:, None] * cumulative[:, -1:]  # the last entry is 1 up to rounding
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def replace_tokens(batch: Batch, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """What the discriminator sees: the original text with the samples at the masked positions.

    Args:
        batch: with the masked "input_ids", "slots", "labels" and "weights"; unused slots point at the row's first
            position, which is never masked.
        sampled: (B * K,) ids.

    Returns:
        (B, T) ids, and (B, T) bool: True where a token differs from the original.
    """
    ids, slots, used = batch["input_ids"], batch["slots"], batch["weights"] > 0
    flat = ids.reshape(-1)
    seen = flat.scatter(0, slots, torch.where(used, sampled.to(flat.dtype), flat[slots]))
    changed = (sampled != batch["labels"]) & used
    # Unused slots all write False at a position that no used slot has.
    replaced = torch.zeros_like(flat, dtype=torch.bool).scatter(0, slots, changed)
    return seen.view_as(ids), replaced.view_as(ids)


Objective = MaskedLanguageModel | ReplacedTokenDetection | CausalLanguageModel


def build(family: str, models: Mapping[str, PreTrainedModel], attention: AttentionPath, **settings: float) -> Objective:
    """The objective of a family.

    Args:
        family: of the preset.
        models: from `lmscripts.models.build`.
        attention: how attention is computed.
        settings: generator_weight and discriminator_weight for ELECTRA, z_loss for a causal model.
    """
    if family == "electra":
        return ReplacedTokenDetection(models["generator"], models[""], attention, **settings)
    if family in DECODERS:
        return CausalLanguageModel(models[""], attention, **settings)
    return MaskedLanguageModel(models[""], family, attention)


def total_loss(weights: Mapping[str, float], sums: Mapping[str, Tensor], targets: Sums) -> Tensor:
    """() the weighted sum of the terms, each divided by its targets.

    Args:
        weights: loss terms and their weights.
        sums: of the terms over one batch.
        targets: of the terms over everything that the optimizer step averages.
    """
    return torch.stack([sums[term] * (weight / max(1.0, targets[term])) for term, weight in weights.items()]).sum()


def _ratio(part: float, whole: float) -> float:
    return part / max(1.0, whole)


def masked_batches(
    rows: Rows,
    row_numbers: np.ndarray[Any, Any],
    epochs: np.ndarray[Any, Any],
    seed: int,
    plan: MaskingPlan,
    sizes: list[int],
) -> list[tuple[Batch, dict[str, float]]]:
    """Mask rows and lay them out for an objective, all at once, then cut into batches.

    Args:
        rows: N rows of T tokens.
        row_numbers: (N,) which rows they are.
        epochs: (N,) in which epoch; number, epoch and seed decide the masks.
        seed: of the masks.
        plan: how to mask, with K slots per row.
        sizes: rows of each batch, B; they sum to N.

    Returns:
        For each batch: input_ids (B, T) int32, position_ids (B, T) int32, segments (B, T) int32 (left out when every
        row is one full segment), slots (B * K,) int64 flat positions, labels (B * K,) int64, weights (B * K,) fp32,
        row_weights (B,) bool, and draws (B * K,) fp32 if the plan asks for them. And its counts: targets of the terms
        "mlm" and "rtd", and real (text) "tokens".
    """
    masks = mask_rows(rows.ids, rows.content, rows.word_starts, row_keys(seed, epochs, row_numbers), plan)
    labels = masks.labels.astype(np.int64)
    several: np.ndarray[Any, Any] = rows.segments[:, -1] != 0  # else one segment fills the row
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
        counts = {"mlm": float(masks.weights[part].sum()), "tokens": float(np.count_nonzero(rows.content[part]))}
        if several[part].any():
            arrays["segments"] = rows.segments[part]
        if masks.draws is not None:
            arrays["draws"] = masks.draws[part].reshape(-1)
            arrays["row_weights"] = np.ones(size, np.bool_)
            counts["rtd"] = float(np.count_nonzero(rows.segments[part] >= 0))
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batches.append((batch, counts))
    return batches
