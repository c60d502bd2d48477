"""Muon with what others add to it, to be compared by `recipes.py`; `lmscripts.training.optim` has plain Muon."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lmscripts.training import optim

A, B, C = 3.4445, -4.7750, 2.0315
WARMUP = 300


class Muon(torch.optim.Optimizer):
    """Muon whose matrices of one shape are orthogonalised together.

    Args:
        params: groups with "weight_decay".
        lr: until the loop assigns another.
        parts: "warmed": the momentum rises from 0.85 to 0.95 over 300 steps. "cautious": only weights that the update
            draws towards 0 decay (arXiv:2510.12402, algorithm 1). "normal": rows of the update are divided by the root
            of their mean square over time, and the whole brought back to its size (NorMuon, arXiv:2510.05491).
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, parts: list[str]) -> None:
        super().__init__(params, {"lr": lr})
        self.parts, self.steps = parts, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """As of torch."""
        momentum = 0.85 + 0.1 * min(1.0, self.steps / WARMUP) if "warmed" in self.parts else 0.95
        self.steps += 1
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for alike in shapes.values():
                self._step(alike, momentum, group["lr"], group["weight_decay"])

    def _step(self, alike: list[nn.Parameter], momentum: float, rate: float, decay: float) -> None:
        kept = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in alike]
        for buffer, parameter in zip(kept, alike, strict=True):
            buffer.lerp_(parameter.grad, 1 - momentum)
        gradients = torch.stack([p.grad for p in alike])
        updates = orthogonal(gradients.lerp(torch.stack(kept), momentum)) * 0.2 * max(alike[0].shape) ** 0.5
        if "normal" in self.parts:
            zeros = torch.zeros_like(updates[0, :, :1])
            for update, parameter in zip(updates, alike, strict=True):
                square = self.state[parameter].setdefault("square", zeros.clone())
                square.lerp_(update.square().mean(1, keepdim=True), 0.05)
                update /= square.sqrt() + 1e-8
                update *= 0.2 * update.numel() ** 0.5 / update.norm()
        for update, parameter in zip(updates, alike, strict=True):
            decayed = parameter * (update * parameter > 0) if "cautious" in self.parts else parameter
            parameter -= rate * (update + decay * decayed)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(N, R, C) fp32, nearly orthogonal by five steps of Newton and Schulz in bfloat16."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return (x if wide else x.mT).float()


def muon_of(parts: str, model: nn.Module, weight_decay: float, adam: dict[str, Any]) -> torch.optim.Optimizer:
    """In the place of `optim.muon_and_adamw`."""
    hidden = optim.hidden_matrices(model)
    muon = Muon([{"params": hidden, "weight_decay": weight_decay}], adam["lr"], parts.split())
    rest = optim.parameter_groups(model, weight_decay, leave_out=hidden)
    return optim._TwoOptimizers(muon, torch.optim.AdamW(rest, **adam, fused=True))
