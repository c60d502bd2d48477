"""The same search for every way: one option after the other, the best value kept, judged on tuning sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """How one way trains.

    Attributes:
        way: of the benchmark.
        learning_rate: constant.
        model: "bert", "modernbert" or "gpt2".
        optimizer: of `lmscripts.training.optim` for ours, an `optim` of TrainingArguments for theirs.
        rows: of a step, as a multiple of what the way takes by default.
        dropout: of hidden states.
        mask: share of the tokens to predict.
        bf16: products in bfloat16.
    """

    way: str
    learning_rate: float = 1e-3
    model: str = "bert"
    optimizer: str = ""
    rows: float = 1.0
    dropout: float = 0.1
    mask: float = 0.15
    bf16: bool = False

    def words(self) -> str:
        """What differs from another recipe, for people."""
        parts = [f"{self.learning_rate:g}", self.optimizer or "adamw", f"rows x{self.rows:g}"]
        parts += [f"dropout {self.dropout:g}", *(["bf16"] if self.bf16 else [])]
        return f"{self.way}: {self.model}, {', '.join(parts)}, mask {self.mask:g}"


def search(
    start: Mapping[str, Recipe],
    stages: Sequence[tuple[str, Mapping[str, Sequence[Any]]]],
    race: Callable[[list[Recipe]], list[Curve]],
) -> tuple[dict[str, Recipe], list[dict[str, Any]]]:
    """The best recipe of every way, and all that was tried.

    Args:
        start: of each way.
        stages: options in their order, each with the values that a way tries; the same option may come again, as the
            rate does once the optimizer is chosen.
        race: trains recipes for the same time, in turns, and gives their curves.
    """
    best, tried, losses = dict(start), list[dict[str, Any]](), dict[Recipe, float]()
    for option, values in [("way", {way: [way] for way in start}), *stages]:
        candidates = [replace(best[way], **{option: value}) for way in best for value in values.get(way, ())]
        candidates = [recipe for recipe in dict.fromkeys(candidates) if recipe not in losses]
        for recipe, curve in zip(candidates, race(candidates) if candidates else [], strict=True):
            losses[recipe] = curve[-1]["loss"]
            tried.append(asdict(recipe) | curve[-1])
            print(f"tuning {recipe.words()}: {curve[-1]['loss']:.4f}", flush=True)
        best = {way: min((r for r in losses if r.way == way), key=losses.__getitem__) for way in best}
    return best, tried
