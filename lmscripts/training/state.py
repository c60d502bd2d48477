"""Where a run stands: one dataclass for every loop, and beside it the loop's own part."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

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
        speeds: rows per second of each process by its name, where they decide who computes what; else empty.
        rows_at_once: of each process by its name and memory, what fits in each phase where that was tried; else empty.
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
    speeds: Sums = field(default_factory=dict)
    rows_at_once: dict[str, list[int]] = field(default_factory=dict)
    own: Any = None

    def __post_init__(self) -> None:
        """No step is to be judged yet."""
        # Its number, the norm on its way to the CPU, when it is there, and the streak that ends the run.
        self._pending = deque[tuple[int, Tensor, Any, int]]()

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

        Raises:
            UserError: a value is of another type than it should be, or is of no field.
        """
        shared = {each.name for each in fields(cls)} & values.keys()
        rest = {name: value for name, value in values.items() if name not in shared}
        hints = get_type_hints(cls) | ({} if own is None else get_type_hints(type(own)))
        for name in values if own is not None else shared:
            if name not in hints or not _is_a(values[name], hints[name]):
                raise UserError(f"{name} is {str(values[name])[:40]}")
        return cls(**{name: values[name] for name in shared}, own=None if own is None else type(own)(**rest))

    def open_window(self, process: int) -> tuple[Sums, Sums]:
        """Sums and counts to go on with; the sums belong to the first process, as they are over all of them."""
        return of_process(self.window_sums, process), dict(self.window_counts)

    def judge(self, gradient_norm: Tensor, has_scaler: bool, late: bool = False) -> bool:
        """Whether a step may be applied; the global norm is the same on all processes, so all decide alike.

        A loss scaler (fp16) meets overflows while it looks for its scale, so it is given a longer streak. If asked to
        be `late`, nothing waits for the norm: the step before is judged, and this one, which may be applied, after the
        next or when all are settled.

        Raises:
            UserError: too many steps in a row had no finite gradient.
        """
        norm = gradient_norm.detach().float().to("cpu", non_blocking=late)
        event = torch.Event(gradient_norm.device) if late and gradient_norm.device.type != "cpu" else None
        if event is not None:
            event.record()
        self._pending.append((self.step + 1, norm, event, 25 if has_scaler else 5))
        self.settle(int(late))
        return late or self.nonfinite_streak == 0

    def settle(self, left: int = 0) -> None:
        """Judge the steps that were not judged yet, but for so many of the last; a UserError as `judge` raises it."""
        while len(self._pending) > left:
            step, norm, event, limit = self._pending.popleft()
            if event is not None:
                event.synchronize()
            is_finite = isfinite(norm.numpy())
            self.nonfinite_streak = 0 if is_finite else self.nonfinite_streak + 1
            self.skipped_steps += not is_finite
            if self.nonfinite_streak >= limit:
                raise UserError(
                    f"the gradient was not finite in {limit} steps in a row, up to step {step}: lower the learning "
                    "rate or look at the text; the last checkpoint is from before"
                )


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value that JSON gave is of a type; what stands in lists is not looked at."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        return any(_is_a(value, each) for each in arguments)
    if kind is dict:
        return isinstance(value, dict) and all(_is_a(each, arguments[1]) for each in value.values())
    return kind is Any or (isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool))


def of_process(sums: Sums, process: int) -> Sums:
    """Sums over all processes as the share of one: the first has them, the others nothing."""
    return {name: value * (process == 0) for name, value in sums.items()}
