"""What a classifier is trained on: one label for each row, or a statement for each of several labels.

It is no objective of pretraining: its rows come from a labelled table, see `lmscripts.data.labelled_rows`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel

from lmscripts.data.labelled_rows import Steps, read_parts
from lmscripts.objectives.module import Objective

if TYPE_CHECKING:
    from lmscripts.objectives.module import Batch, Sums

__all__ = ["Steps", "read_parts"]  # its rows and its batches

PARTS = {"": "classifier"}


@dataclass(frozen=True)
class Settings:
    """How rows are judged in training.

    Attributes:
        multi_label: one statement for each label (binary cross entropy, its mean over labels) instead of one label.
        label_smoothing: share of the wanted probability that is spread over all answers.
        positive_weights: (K,) weight of the statements on rows that have the label, for several labels a row.
    """

    multi_label: bool
    label_smoothing: float = 0.0
    positive_weights: NDArray[np.float32] | None = None


def trained(model: PreTrainedModel, settings: Settings) -> Objective:
    """What is trained: a classifier and its loss."""
    return Objective(sys.modules[__name__], None, {"": model}, "sdpa", settings)


def weights(settings: Settings) -> dict[str, float]:
    """The one term "loss"."""
    return {"loss": 1.0}


def prepare(trained: Objective) -> None:
    """Let the weights of statements go where the model goes; no checkpoint holds them."""
    given = trained.settings.positive_weights
    trained.register_buffer("positive_weights", None if given is None else torch.from_numpy(given), persistent=False)


def forward(trained: Objective, batch: Batch) -> dict[str, Tensor]:
    """Sums over the rows: "loss", and "accuracy" (all labels of the row right), each row by its weight."""
    losses, right = row_losses(trained, logits(trained, batch), batch["truth"])
    return {"loss": (losses * batch["weights"]).sum(), "accuracy": (right * batch["weights"]).sum()}


def logits(trained: Objective, batch: Batch) -> Tensor:
    """(B, K) in float32."""
    output = trained.get_submodule("classifier")(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits.float()  # type: ignore[no-any-return]


def row_losses(trained: Objective, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) loss of each row, without weights of rows, and (B,) 1 where all its labels are right."""
    smoothing = trained.settings.label_smoothing
    if trained.settings.multi_label:
        losses = binary_cross_entropy_with_logits(logits, truth * (1 - smoothing) + smoothing / 2, reduction="none")
        if trained.positive_weights is not None:
            # By what the row has, not by what is wanted: smoothing wants a little of every label, and a rare
            # one's weight on that little would make "yes" the best answer to rows without the label.
            losses = losses * torch.where(truth > 0, trained.positive_weights, 1.0)  # type: ignore[arg-type]
        return losses.mean(1), ((logits > 0) == (truth > 0)).all(1).float()
    wanted = truth * (1 - smoothing) + smoothing / truth.shape[1]
    losses = -(wanted * logits.log_softmax(1)).sum(1)
    return losses, (logits.argmax(1) == truth.argmax(1)).float()


def metrics(trained: Objective, sums: Sums, counts: Sums) -> dict[str, float]:
    """Weighted means of what `forward` sums."""
    return {name: value / max(counts["weight"], 1e-12) for name, value in sums.items()}
