"""What is trained: the models of an objective in one module, of which a batch gives sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmscripts.models.attention import AttentionPath

Batch = dict[str, Tensor]
Sums = Mapping[str, float]


class Objective(nn.Module):
    """The models of an objective under the names of its PARTS, and what computes its loss.

    Attributes:
        kind: module of the objective, see `lmscripts.objectives`.
        family: module of the family, see `lmscripts.models.families`.
        attention: how attention is computed.
        settings: of the objective.
        weights: loss terms and their weights.
    """

    def __init__(
        self, kind: Any, family: Any, models: Mapping[str, PreTrainedModel], attention: AttentionPath, settings: Any
    ) -> None:
        super().__init__()
        self._parts = {subfolder: name for subfolder, name in kind.PARTS.items() if subfolder in models}
        for subfolder, name in self._parts.items():
            setattr(self, name, models[subfolder])
        self.kind, self.family, self.settings = kind, family, settings
        self.attention: AttentionPath = attention
        self.weights: dict[str, float] = kind.weights(settings)
        kind.prepare(self)

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """What is saved, by subfolder, the model's own folder first."""
        return {subfolder: getattr(self, self._parts[subfolder]) for subfolder in sorted(self._parts)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the targets of a batch, see the objective."""
        found: dict[str, Tensor] = self.kind.forward(self, batch)
        return found

    def loss(self, sums: Mapping[str, Tensor], targets: Sums) -> Tensor:
        """() the weighted sum of the terms, each divided by its targets.

        Args:
            sums: of the terms over one batch.
            targets: of the terms over everything that the optimizer step averages.
        """
        terms = self.weights.items()
        return torch.stack([sums[term] * (weight / (targets[term] or 1.0)) for term, weight in terms]).sum()

    def metrics(self, sums: Sums, counts: Sums) -> dict[str, float]:
        """Named numbers from sums of `forward` and counts of targets."""
        found: dict[str, float] = self.kind.metrics(self, sums, counts)
        return found

    def flops_per_position(self, sequence_length: int, slots: int) -> float:
        """Operations of a training step per position."""
        bodies = {id(model.base_model): model for model in self.models.values()}  # two heads may share one
        return float(sum(self.family.flops(model, sequence_length, slots) for model in bodies.values()))

    def attention_inputs(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """What keeps the documents of a batch apart in a model."""
        device = batch["input_ids"].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        found: dict[str, Any] = self.family.attention(model, self.attention, batch, dtype)
        return found

    def logits_at_slots(self, model: PreTrainedModel, batch: Batch, attention: dict[str, Any]) -> Tensor:
        """(B * K, V) fp32 logits at the prediction slots."""
        hidden = self.family.encode(model, batch["input_ids"], batch["position_ids"], attention, batch["slots"])
        logits: Tensor = self.family.predict(model, hidden).float()
        return logits


def ratio(part: float, whole: float) -> float:
    """A share or a mean; of nothing it is 0."""
    return part / max(1.0, whole)
