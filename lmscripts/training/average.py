"""Exponential moving average of the weights.

While the learning rate is high, the average of about the last 1 / (1 - decay) steps tends to be a better model than the
newest weights (arXiv:2502.06761). It is kept beside the run in one more copy of the weights and never trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lmscripts.errors import UserError

_COUNT = "n_averaged"


def start(objective: nn.Module, decay: float | None) -> AveragedModel | None:
    """An average of no step yet; its `module` is a copy of the objective, in eval mode and without gradients.

    After step t it is the mean of the weights after steps 1 to t, each weighted by decay to the power of its age. The
    weights are made to sum to 1 at every t, so that the first update is a copy and an early average does not lean on
    the initial weights (the correction of Adam's moments, arXiv:1412.6980, section 3). Parameters that modules share
    are shared in the copy, and averaged once. Buffers are copied, not averaged.

    Args:
        objective: what is trained, on its device and not wrapped for distributed training.
        decay: in (0, 1); None for no average.

    Returns:
        The average; None without a decay.

    Raises:
        UserError: the decay is out of range, or the parameters are sharded or in half precision.
    """
    if decay is None:
        return None
    if not 0 < decay < 1:
        raise UserError(f"the decay of the average must lie between 0 and 1, got {decay}")
    for name, parameter in objective.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise UserError(f"an average of sharded weights (FSDP) is not kept, and {name} is sharded; use DDP")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{name} is in {parameter.dtype}, too coarse for an average: keep the weights in float32")
    average = AveragedModel(nn.Identity())
    average.multi_avg_fn = _mover(decay, average.n_averaged)
    average.module = _copy(objective).requires_grad_(False).eval()
    return average


def _copy(objective: nn.Module) -> nn.Module:
    """A deep copy, except for Python modules (of the model's family), which `AveragedModel` itself fails to copy."""
    values = (value for module in objective.modules() for value in vars(module).values())
    return copy.deepcopy(objective, {id(value): value for value in values if isinstance(value, ModuleType)})


def _mover(decay: float, steps: Tensor) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """What moves averages of so many steps towards the weights after the next.

    The steps are read from the average's own counter, on the CPU: the one that torch hands over is on the device, and
    reading it would wait for the device.
    """

    @torch.no_grad()
    def move(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        share = (1 - decay) / (1 - decay ** (int(steps) + 1))
        torch._foreach_lerp_(list(averages), list(weights), share)

    return move


def update(average: AveragedModel, objective: nn.Module) -> None:
    """Take the weights after an optimizer step into the average."""
    average.update_parameters(objective)


def state(average: AveragedModel) -> dict[str, Tensor]:
    """The averages by parameter name, and the number of steps, on the CPU; no two tensors share memory.

    A shared parameter is there once, under its first name. Buffers are the objective's, and saved with it.
    """
    tensors = {name: parameter.detach() for name, parameter in average.module.named_parameters()}
    return {name: tensor.to("cpu", copy=True) for name, tensor in (tensors | {_COUNT: average.n_averaged}).items()}


@torch.no_grad()
def load(average: AveragedModel, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave; updates go on bit for bit as if nothing had happened.

    Raises:
        UserError: names or shapes differ; the average is as it was.
    """
    own = dict(average.module.named_parameters()) | {_COUNT: average.n_averaged}
    if differing := sorted(set(own) ^ set(tensors)):
        place = "misses" if differing[0] in own else "has too many:"
        raise UserError(f"the saved average is of another model: it {place} {differing[0]}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
            raise UserError(f"the saved average is of another model: {name} has the shape {shapes}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
