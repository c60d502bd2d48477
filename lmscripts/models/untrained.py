"""Was it trained? What initialisation sets to one value, and the first optimizer step moves, tells exactly.

Gains of normalisations begin as ones and biases as zeros. Matrices begin with random numbers and prove nothing, so a
model without gains and biases, or with random ones, is never named. One whose gains and biases were all frozen while
its matrices were trained looks as a fresh one does, and is named unless its steps are on record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

_HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Signs:
    """What the weights say of their training, in words.

    Attributes:
        untrained: parts that are as freshly initialised; empty for a trained model.
        doubts: parts that look so although a short training may have left no trace.
    """

    untrained: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def signs_of_no_training(model: PreTrainedModel, steps: int | None = None) -> Signs:
    """Find what in a model is still as initialisation leaves it: all of it, or a head on a trained body.

    A doubt it is where steps of training are on record, and where weights were saved in half precision and only gains
    could have moved: there 1 stays 1 under small steps.

    Args:
        model: in any mode; it is not changed.
        steps: optimizer steps on record; None where nothing says.
    """
    matrices = [tensor for tensor in model.parameters() if tensor.ndim > 1]
    if matrices and all(map(_is_constant, matrices)):
        return Signs([f"each of its {len(matrices)} matrices holds one value, which no training leaves"])
    vectors = {name: tensor for name, tensor in model.named_parameters() if tensor.ndim == 1 and tensor.numel() > 1}
    body = f"{model.base_model_prefix}."
    head = [tensor for name, tensor in vectors.items() if not name.startswith(body)]
    for part, tensors in (("every part", list(vectors.values())), ("the head", head)):
        if not tensors or not all(map(_is_fresh, tensors)):
            continue
        why = f"{part} is as freshly initialised: {len(tensors)} biases and gains of normalisations have not moved"
        if steps:
            counted = f"{steps:,} steps of training are" if steps > 1 else "1 step of training is"
            return Signs(doubts=[f"{why}, although {counted} on record"])
        if all(bool(tensor.any()) for tensor in tensors) and _is_half(matrices):
            return Signs(doubts=[f"{why}, but in half precision small steps would not show"])
        return Signs([why])
    return Signs()


def _is_fresh(tensor: Tensor) -> bool:
    return _is_constant(tensor) and float(tensor.detach()[0]) in (0.0, 1.0)


def _is_constant(tensor: Tensor) -> bool:
    values = tensor.detach().reshape(-1)
    return bool((values[:1000] == values[0]).all()) and bool((values == values[0]).all())


def _is_half(matrices: Iterable[Tensor]) -> bool:
    """Whether the weights were saved in half precision."""
    values = next((tensor.detach().reshape(-1)[:4096] for tensor in matrices), torch.full((1,), 1e-9))
    return any(torch.equal(values.to(precision).to(values), values) for precision in _HALF_PRECISION)
