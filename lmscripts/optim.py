"""Optimizers and learning-rate schedules; a schedule is a function of the step, never an object with a state."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from lmscripts.errors import UserError

Schedule = Literal["linear", "cosine", "constant", "wsd"]


def lr_at(
    step: int,
    *,
    schedule: Schedule,
    peak: float,
    warmup_steps: int,
    max_steps: int,
    decay_steps: int | None = None,
    final_ratio: float = 0.0,
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    It rises linearly over `warmup_steps` (the first step already moves), then follows the schedule and would reach
    final_ratio x peak at `max_steps`, the step after the last.

    Args:
        step: in [0, max_steps).
        schedule: "linear" and "cosine" decay from the end of the warmup; "constant" does not decay; "wsd"
            (warmup-stable-decay, arXiv:2404.06395, section 4) stays and decays linearly over the last `decay_steps`.
        peak: the highest learning rate.
        warmup_steps: steps of the warmup.
        max_steps: length of the schedule.
        decay_steps: for "wsd".
        final_ratio: where the decay ends, as a share of the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    begin = max_steps - (decay_steps or 0) if schedule == "wsd" else warmup_steps
    done = max(0.0, (step - begin) / max(1, max_steps - begin))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (final_ratio + (1 - final_ratio) * left)


def check_schedule(
    *, schedule: Schedule, warmup_steps: int, max_steps: int, decay_steps: int | None, **_: object
) -> None:
    """Refuse a warmup-stable-decay schedule whose decay begins within the warmup.

    Raises:
        UserError: the steps of warmup and decay are more than there are.
    """
    if schedule == "wsd" and warmup_steps + (decay_steps or 0) > max_steps:
        raise UserError(f"warmup {warmup_steps} and decay {decay_steps} are more than the {max_steps} steps of the run")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices (embeddings included) decay, vectors (biases, norms) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) or LAMB (arXiv:1904.00962), with weight decay on matrices only.

    Raises:
        UserError: an unknown name, or the package that holds the optimizer is not installed.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)
    if name == "lamb":
        try:
            from pytorch_optimizer import Lamb
        except ImportError:
            raise UserError("--optimizer lamb needs: pip install pytorch_optimizer") from None
        # As in the paper: decay is part of the update that the trust ratio scales, and the step size is not
        # enlarged early on (adam_debias says the opposite of its name). The loop clips gradients itself.
        optimizer: torch.optim.Optimizer = Lamb(
            groups,
            lr=learning_rate,
            betas=betas,
            eps=epsilon,
            weight_decouple=False,
            max_grad_norm=0.0,
            adam_debias=True,
        )
        return optimizer
    raise UserError(f"optimizer must be adamw or lamb, got {name}")
