"""Was it trained? Weights that are still as initialisation leaves them, found by what initialisation cannot hide.

Two kinds of evidence. Exact: gains of normalisations and most biases begin with one value, and the first optimizer step
moves them. Statistical, for what begins with random numbers: such a tensor has the mean, the spread and the tails that
its initialisation gives and no structure at all, while training writes structure into it: a direction that all rows of
an output matrix share, rows of frequent tokens that are longer than others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_MOST_VALUES = 1 << 21  # of one tensor, that are looked at
_LIMIT = 5.5  # standard errors: a fresh model has hundreds of statistics, and not all are quite normal
_CLEARLY = 8.0  # standard errors that nobody takes for chance
_SEES_ENOUGH = 0.2  # share of the spread: what hides a greater change than this is no evidence
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
    """Find what in a model is still as initialisation leaves it.

    Named are: matrices that hold one value each; a model that is fresh as a whole (rows near zero in its embeddings
    aside, which padding has and which resizing adds); a fresh head on a trained body. The whole model is built anew to
    compare only where no gain of a normalisation has moved; a head is compared with a copy of itself.

    The margin: where gains or biases were trained and are saved in float32, and with biases in any precision, one step
    of any size shows, and the model is not named. Else (none of them, frozen ones, or gains alone in bfloat16, where
    1.001 is 1) only matrices speak, and the sentence says which change of theirs would show: of a vocabulary of 1,000
    and a width of 32 about 7 %, of 32,000 and 768 about 2 %. Measured on the first with Adam and frozen gains: 10 steps
    of 1e-4 do not show, three of 1e-3 and 50 of 1e-4 do. If even a fifth of the spread would not show, or there is no
    matrix of the vocabulary, it is a doubt; and so is everything but matrices of one value, if steps of training are on
    record. A head is named where its biases stand still while gains of the body have moved, and by its matrix alone
    only where most matrices of the body are beyond chance by far: one short training of both is never taken for it.

    Args:
        model: in any mode; it is not changed, and neither is the state of the random numbers.
        steps: optimizer steps on record; None where nothing says.
    """
    matrices = [tensor for tensor in model.parameters() if tensor.ndim > 1]
    if matrices and all(map(_is_constant, matrices)):
        return Signs([f"each of its {len(matrices)} matrices holds one value, which no training leaves"])
    pairs: list[tuple[Tensor, Tensor]] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        gains = _gains(model)
        still = all(map(_is_constant, gains))
        if still and (gains or not _is_clearly_trained(model)):
            architecture: Any = type(model)
            ours, fresh = dict(model.named_parameters()), dict(architecture(model.config).named_parameters())
            # A head that was saved untied is no parameter of a new model: nothing of that sort is fresh.
            pairs = [(ours[name], fresh[name]) for name in ours] if ours.keys() == fresh.keys() else []
            if pairs and _fits(pairs):
                return _verdict(model, "every part", pairs, _unmoved(pairs), steps)
            del fresh, pairs  # as large as the model
        pairs = _head_and_twin(model)
        unmoved = 0 if still else _unmoved(pairs)  # biases that stand still everywhere were frozen
        if pairs and _fits(pairs) and (unmoved or _is_clearly_trained(model)):
            return _verdict(model, "the head", pairs, unmoved, steps)
    return Signs()


def _verdict(
    model: PreTrainedModel, part: str, pairs: list[tuple[Tensor, Tensor]], unmoved: int, steps: int | None
) -> Signs:
    """In words what was found, as a fact or as a doubt."""
    embeddings: Any = model.get_input_embeddings()
    entries = len(embeddings.weight)
    vocabulary = [tensor.shape for tensor, _ in pairs if tensor.ndim == 2 and len(tensor) == entries]
    visible = 1.0
    if vocabulary:
        rows, columns = vocabulary[0]
        rows = min(rows, max(1, _MOST_VALUES // columns))
        # Adam moves all rows of an output matrix alike: the columns' means, known to spread / sqrt(rows), tell first.
        visible = min(1.0, 2 * (_LIMIT / (rows * max(1.0, columns / 2) ** 0.5)) ** 0.5)
    what = f"{part} is as freshly initialised"
    if unmoved:
        why = f"{what}: {unmoved} biases and gains of normalisations have not moved"
    else:
        why = f"{what}: its matrices hold nothing but chance, and a change by {visible:.1%} of their spread would show"
    if steps:
        return Signs(doubts=[f"{why}, although {_on_record(steps)}"])
    return Signs([why]) if unmoved or visible <= _SEES_ENOUGH else Signs(doubts=[f"{why}, but no smaller one"])


def _on_record(steps: int) -> str:
    return f"{steps:,} step{'s' * (steps > 1)} of training {'are' if steps > 1 else 'is'} on record"


def _unmoved(pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Number of biases and gains that began with one value and would have moved visibly in training."""
    found = 0
    for _, theirs in pairs:
        if theirs.numel() > 1 and _is_constant(theirs):
            found += not bool(theirs.any()) or not _is_half(pairs)
    return found


def _is_half(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether the weights were saved in half precision, where 1 stays 1 under small steps."""
    values = next((tensor.detach().reshape(-1)[:4096] for tensor, _ in pairs if tensor.ndim > 1), torch.zeros(1))
    return any(torch.equal(values.to(precision).to(values), values) for precision in _HALF_PRECISION)


def _is_constant(tensor: Tensor) -> bool:
    values = tensor.detach().reshape(-1)
    return bool((values[:1000] == values[0]).all()) and bool((values == values[0]).all())


def _gains(model: PreTrainedModel) -> list[Tensor]:
    """Gains and biases of normalisations, which every initialisation sets to one value each."""
    return [
        tensor.detach()
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for tensor in module.parameters(recurse=False)
        if tensor.ndim == 1 and tensor.numel() > 1
    ]


# ---- parts -------------------------------------------------------------------------------------------------------


def _head_and_twin(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Parameters of the head that are not the body's, each with one of a fresh head."""
    body = model.base_model_prefix
    own = {name for name, _ in model.named_parameters() if not name.startswith(f"{body}.")}
    found: list[tuple[Tensor, Tensor]] = []
    for part, module in model.named_children() if own and hasattr(model, body) else ():
        if part != body and any(name.startswith(f"{part}.") for name in own):
            twin = dict(_twin(model, module).named_parameters(part))
            found += [(tensor, twin[name]) for name, tensor in module.named_parameters(part) if name in own]
    return found


def _is_clearly_trained(model: PreTrainedModel) -> bool:
    """Whether most matrices of a layer in the middle of the body are beyond chance by far."""
    stacks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        return False
    layer = max(stacks, key=len)[len(max(stacks, key=len)) // 2]
    twin = dict(_twin(model, layer).named_parameters())
    found = [_fits([(tensor, twin[name])], _CLEARLY) for name, tensor in layer.named_parameters() if tensor.ndim > 1]
    return 2 * sum(found) < len(found)


def _twin(model: PreTrainedModel, module: nn.Module) -> nn.Module:
    """A copy of a part of a model, initialised as transformers initialises what the weights lack."""
    twin = copy.deepcopy(module)
    for each in [*twin.modules(), *twin.parameters()]:
        each.__dict__["_is_hf_initialized"] = False  # else transformers would leave it as it is
    return twin.apply(model._init_weights)


# ---- statistics --------------------------------------------------------------------------------------------------


def _fits(pairs: Iterable[tuple[Tensor, Tensor]], limit: float = _LIMIT) -> bool:
    """Whether tensors and fresh ones of the same shapes differ by chance alone, each and all together."""
    total, number = 0.0, 0
    for ours, theirs in pairs:
        ours, theirs = ours.detach(), theirs.detach()
        if ours.shape == theirs.shape and _same(ours, theirs):
            continue
        if ours.shape != theirs.shape or ours.numel() < 2 or _is_constant(theirs) or _is_constant(ours):
            return False
        if ours.numel() < 32:
            continue  # too few numbers to say anything
        found = _deviations(ours, theirs)
        if max(map(abs, found)) > limit:
            return False
        total, number = total + sum(z * z for z in found), number + len(found)
    return number == 0 or _normal(total, number) <= limit


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether a tensor is the other one, up to the precision that it was saved in."""
    if torch.allclose(ours, theirs.to(ours), rtol=1e-6, atol=0):
        return True
    return any(torch.equal(ours, theirs.to(precision).to(ours)) for precision in _HALF_PRECISION)


def _deviations(ours: Tensor, theirs: Tensor) -> list[float]:
    """How far a tensor is from a random one with the distribution of another, in standard errors, one per statistic."""
    a, b = _rows(ours), _rows(theirs)
    (mean, spread, tails), (their_mean, their_spread, their_tails) = _moments(a), _moments(b)
    size = a.numel()
    found = [(mean - their_mean) / (2 * their_spread / size) ** 0.5]
    found.append(float(torch.tensor(spread / their_spread).log()) / (2 * max(their_tails - 1, 0.1) / size) ** 0.5)
    if size >= 256:
        found.append((tails - their_tails) / (48 / size) ** 0.5)
    if min(a.shape) >= 8:
        # Some initialisations do not give independent numbers (orthogonal ones): what they fail says nothing.
        found += [z for z, known in zip(_structure(a), _structure(b), strict=True) if abs(known) <= _LIMIT]
    return found


def _rows(tensor: Tensor) -> Tensor:
    """(m, n) values in float32, without the rows of padding and of resized embeddings, which are near zero."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor[None]
    rows = rows[:: max(1, -(-rows.numel() // _MOST_VALUES))].float()
    if min(rows.shape) < 8:
        return rows
    lengths = rows.norm(dim=1)
    return rows[lengths >= lengths.median() / 4]


def _moments(rows: Tensor) -> tuple[float, float, float]:
    """Mean, variance and kurtosis."""
    centered = rows - rows.mean()
    variance = float(centered.square().mean())
    return float(rows.mean()), variance, float(centered.pow(4).mean()) / max(variance, 1e-300) ** 2


def _structure(rows: Tensor) -> list[float]:
    """Means and lengths of rows and of columns; their spread is known where all values are independent."""
    _, variance, tails = _moments(rows)
    centered = (rows - rows.mean()) / variance**0.5
    found = []
    for some in (centered, centered.T):
        count, size = some.shape
        found.append(_normal(size * float(some.mean(1).square().sum()), count - 1))
        lengths = some.square().mean(1)
        freedom = 2 * (count - 1) / (2 + 12 / size)
        found.append(_normal(freedom * float(lengths.var()) * size / max(tails - 1, 0.1), freedom))
    return found


def _normal(chi_square: float, freedom: float) -> float:
    """A chi-square in standard errors (Wilson and Hilferty's cube root, which is near to normal)."""
    scale = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - 1 + scale) / scale**0.5)
