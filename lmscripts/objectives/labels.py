"""What a classifier is trained on: losses of rows, one label each or several, and what a row counts in a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class ClassifierObjective(nn.Module):
    """Sums of weighted losses over the rows of a batch.

    Attributes:
        models: {"": model}, as `lmscripts.training.folder` saves them.
    """

    def __init__(
        self, model: PreTrainedModel, *, multi_label: bool, label_smoothing: float, positive_weights: Tensor | None
    ) -> None:
        """Wrap the model.

        Args:
            model: gives logits (B, K).
            multi_label: one statement for each label (binary cross entropy, its mean over labels) instead of one.
            label_smoothing: share of the wanted probability that is spread over all answers.
            positive_weights: (K,) weight of the statements on rows that have the label, for several labels a row.
        """
        super().__init__()
        self.classifier = model
        self._multi_label, self._smoothing = multi_label, label_smoothing
        self.positive_weights: Tensor | None
        self.register_buffer("positive_weights", positive_weights, persistent=False)

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """{"": model}."""
        return {"": self.classifier}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the rows: "loss", and "accuracy" (all labels of the row right), each row by its weight."""
        logits = self.logits(batch)
        losses, right = self.row_losses(logits, batch["truth"])
        return {"loss": (losses * batch["weights"]).sum(), "accuracy": (right * batch["weights"]).sum()}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, K) in float32."""
        output = self.classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found: Tensor = output.logits.float()
        return found

    def row_losses(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) loss of each row, without weights of rows, and (B,) 1 where all its labels are right."""
        num_labels = truth.shape[1]
        if self._multi_label:
            wanted = truth * (1 - self._smoothing) + self._smoothing / 2
            losses = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            if self.positive_weights is not None:
                # By what the row has, not by what is wanted: smoothing wants a little of every label, and a rare
                # one's weight on that little would make "yes" the best answer to rows without the label.
                losses = losses * torch.where(truth > 0, self.positive_weights, 1.0)
            return losses.mean(1), ((logits > 0) == (truth > 0)).all(1).float()
        wanted = truth * (1 - self._smoothing) + self._smoothing / num_labels
        losses = -(wanted * logits.log_softmax(1)).sum(1)
        return losses, (logits.argmax(1) == truth.argmax(1)).float()

    @staticmethod
    def metrics(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Weighted means of what `forward` sums."""
        return {name: value / max(counts["weight"], 1e-12) for name, value in sums.items()}


def step_scale(targets: Mapping[str, float], mean_weight: float, world: int) -> float:
    """What the summed loss of a micro-batch is multiplied by, so that a step is a weighted mean over its rows.

    The mean weight is that of the whole training part and not of the step: rows of long texts share batches, where
    dividing by their own weights would undo the 1/k of each.

    Args:
        targets: "rows" of the step, over all processes.
        mean_weight: of the rows of the training part.
        world: number of processes; data parallelism takes the mean of their gradients, and wanted is the sum.
    """
    return world / (targets["rows"] * max(mean_weight, 1e-12))
