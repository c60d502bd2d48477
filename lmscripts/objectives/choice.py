"""What a policy is trained on: which of the candidates of a decision was chosen, and what came of it.

It is no objective of pretraining: its rows are decisions, see `lmscripts.data.decision_rows`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import huber_loss
from transformers import PreTrainedModel

from lmscripts.data.decision_rows import Steps
from lmscripts.models import policy
from lmscripts.objectives.module import Objective

if TYPE_CHECKING:
    from lmscripts.objectives.module import Batch, Sums

__all__ = ["Steps"]  # its batches

PARTS = {"": "policy"}
_INPUTS = ("input_ids", "values", "position_ids", "attention_mask", "candidates", "candidate_mask")


@dataclass(frozen=True)
class Settings:
    """How decisions are judged in training.

    Attributes:
        value: also by what came of it, at the VALUE token; batches and model are to have it.
        value_weight: of that in the loss, beside the choice.
        label_smoothing: share of the wanted probability that is spread over all candidates.
    """

    value: bool = False
    value_weight: float = 1.0
    label_smoothing: float = 0.0


def trained(model: PreTrainedModel, settings: Settings) -> Objective:
    """What is trained: a policy and its loss."""
    return Objective(sys.modules[__name__], policy, {"": model}, "sdpa", settings)


def weights(settings: Settings) -> dict[str, float]:
    """The terms "choice", and "value" where it is asked for."""
    return {"choice": 1.0} | ({"value": settings.value_weight} if settings.value else {})


def prepare(trained: Objective) -> None:
    """Nothing is to be made fit."""


def forward(trained: Objective, batch: Batch) -> dict[str, Tensor]:
    """Sums over the decisions of "choice" (cross entropy), "top1", "top3" (1 where the chosen one is among so many).

    With a value also of "value" (Huber's loss), its answer's distance to what came of it.
    """
    answers = say(trained, batch)
    losses, places = row_losses(trained, answers.logits, batch)  # type: ignore[arg-type]
    rows = {"choice": losses, "top1": (places < 1).float(), "top3": (places < 3).float()}
    if trained.settings.value:
        rows["value"] = huber_loss(answers.value, batch["outcome"].float(), reduction="none")  # type: ignore[arg-type]
    return {name: (each * batch["weights"]).sum() for name, each in rows.items()}


def say(trained: Objective, batch: Batch) -> policy.PolicyOutput:
    """What the policy says of a batch: (B, K) logits in float32, and (B,) values where they are trained."""
    model, value_places = trained.get_submodule("policy"), batch["value_places"] if trained.settings.value else None
    return model(**{name: batch[name] for name in _INPUTS}, value_places=value_places)  # type: ignore[no-any-return]


def row_losses(trained: Objective, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B,) loss of each decision, without weights, and (B,) int64 how many candidates come before the chosen one.

    Of equal ones the first is before the others; a logit that is no number is before all, so that it is no success.
    """
    labels, mask, smoothing = batch["labels"][:, None], batch["candidate_mask"], trained.settings.label_smoothing
    logs, chosen = logits.log_softmax(1), logits.gather(1, labels)
    losses = -logs.gather(1, labels)[:, 0]
    if smoothing:  # no share to places without a candidate, whose logarithm is -inf
        losses = (1 - smoothing) * losses - smoothing * logs.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels
    return losses, torch.where(earlier, ~(logits < chosen), ~(logits <= chosen)).sum(1)


def metrics(trained: Objective, sums: Sums, counts: Sums) -> dict[str, float]:
    """Means over the decisions of what `forward` sums; "loss" is the weighted sum of the terms, named if several."""
    means = {name: value / max(counts["choice"], 1e-12) for name, value in sums.items()}
    found = {"loss": sum(weight * means[term] for term, weight in trained.weights.items())}
    if len(trained.weights) > 1:
        found |= {f"{term}_loss": means[term] for term in trained.weights}
    return found | {f"{name}_accuracy": means[name] for name in means if name not in trained.weights}
