"""Where a run stands: one dataclass for every loop, and beside it the loop's own part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lmscripts.errors import UserError

Sums = dict[str, float]


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        evaluated_step: step of the last finished evaluation; -1 for none.
        skipped_steps: steps whose gradient was not finite, so that the weights were left alone.
        nonfinite_streak: how many of them came last in a row.
        real_tokens: text tokens seen, where the loop counts any.
        window_sums: sums of the objective since the last log line, over all processes.
        window_counts: their counts.
        origin: model or run that the training began with; empty for none.
        own: what else the loop has to know, a dataclass of plain values; None for nothing.
    """

    step: int = 0
    evaluated_step: int = -1
    skipped_steps: int = 0
    nonfinite_streak: int = 0
    real_tokens: float = 0.0
    window_sums: Sums = field(default_factory=dict)
    window_counts: Sums = field(default_factory=dict)
    origin: str = ""
    own: Any = None

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values, those of `own` among the others."""
        values = asdict(self)
        own = values.pop("own")
        return values | (own or {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any], own: Any = None) -> TrainingState:
        """A state from what `as_json` gave.

        Args:
            values: the values.
            own: an object of the class of `own`, of which an equal one with the saved values is made.
        """
        shared = {each.name for each in fields(cls)} & values.keys()
        rest = {name: value for name, value in values.items() if name not in shared}
        return cls(**{name: values[name] for name in shared}, own=None if own is None else type(own)(**rest))

    def open_window(self, process: int) -> tuple[Sums, Sums]:
        """Sums and counts to go on with; the sums belong to the first process, as they are over all of them."""
        return of_process(self.window_sums, process), dict(self.window_counts)

    def judge(self, gradient_norm: Tensor | float, has_scaler: bool) -> bool:
        """Whether a step may be applied; the global norm is the same on all processes, so all decide alike.

        A loss scaler (fp16) meets overflows while it looks for its scale, so it is given a longer streak.

        Raises:
            UserError: too many steps in a row had no finite gradient.
        """
        if bool(torch.isfinite(torch.as_tensor(gradient_norm))):
            self.nonfinite_streak = 0
            return True
        self.skipped_steps += 1
        self.nonfinite_streak += 1
        limit = 25 if has_scaler else 5
        if self.nonfinite_streak >= limit:
            raise UserError(
                f"the gradient was not finite in {limit} steps in a row, up to step {self.step + 1}: lower the "
                "learning rate or look at the text; the last checkpoint is from before"
            )
        return False


def of_process(sums: Sums, process: int) -> Sums:
    """Sums over all processes as the share of one: the first has them, the others nothing."""
    return {name: value * (process == 0) for name, value in sums.items()}
