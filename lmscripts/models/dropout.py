"""Dropout that no shape of the cluster changes: what is dropped depends on seed, row, place in it, and layer alone.

torch draws dropout from a generator, so that the numbers of processes and of micro-batches, and the order of a process'
rows, decide what is dropped. Here each element is kept or dropped by a hash: of its row's key, which
`lmscripts.data.steps` makes of the seed and of the row's place in the run; of its place in the row; and of the module.
So one process, several and unequal ones train alike, and a step that is done again drops the same. It is also about
twice as fast on a CPU; on a GPU, torch.compile makes one kernel of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

EAGER = "lmscripts_eager"
_GOLDEN = -1640531527  # 0x9E3779B9
_OTHER = -2048144789  # 0x85EBCA6B: no few steps of the one number are some of the other


class Draws:
    """What the modules of a model draw by in one forward pass.

    Attributes:
        keys: (B, 2) int32, of each row of the batch; None lets torch draw.
        places: (N,) flat positions, in the B * T, of states of which only some are computed; None for all.
        length: T.
        off: let torch draw in any case, see `probe`.
    """

    off = False
    keys: Tensor | None = None
    places: Tensor | None = None
    length: int = 1


class RowDropout(nn.Module):
    """In the place of `torch.nn.Dropout`; states are (B, T, H), (N, H) at `Draws.places`, or (B, heads, T, T)."""

    def __init__(self, p: float, number: int, draws: Draws) -> None:
        super().__init__()
        self.p, self.number, self.draws = p, number, draws

    def forward(self, states: Tensor) -> Tensor:
        """States of which a share p (at most 255/256) is 0 and the rest enlarged by 1 / (1 - p), in training mode."""
        return self.drop(states, self.p) if self.training and self.p > 0 else states

    def drop(self, states: Tensor, p: float) -> Tensor:
        """The same for a share that is given."""
        keys, places = self.draws.keys, cast(Any, self.draws.places)
        if keys is None or self.draws.off:
            return nn.functional.dropout(states, p)
        if states.ndim > 2 and len(states) != len(keys):
            raise ValueError(f"dropout of states {tuple(states.shape)} of {len(keys)} rows")
        keys = keys + self.number * _OTHER
        at = torch.arange(states.shape[-2], device=keys.device)
        if states.ndim == 2 and places is None:  # one state of each row, as in the head of a classifier
            at = torch.zeros_like(at)
        elif states.ndim == 2:
            keys, at = keys[places // self.draws.length], places % self.draws.length
        else:
            keys = keys[:, None]
        if states.ndim == 4:
            heads = torch.arange(states.shape[1], dtype=torch.int32, device=keys.device)
            keys = _mixed(keys[:, None] + heads[:, None, None] * _GOLDEN)
            if places is not None and states.shape[2] != self.draws.length:  # queries at some positions only
                at = (places % self.draws.length).view(len(states), 1, -1)
        dropped = min(round(p * 65536), 255 * 256)
        numbers = _mixed(keys[..., 0] + at.int() * _GOLDEN, keys[..., 1])[..., None]
        # Channels drop by bytes: a place drops a number of 256ths, and one more in as many places as make up the rest.
        least = (((numbers & 255) < dropped % 256) + (dropped // 256 - 128)).to(torch.int8)
        kept = torch.empty((*numbers.shape[:-1], states.shape[-1]), dtype=states.dtype, device=numbers.device)
        torch.ge(_bytes(numbers, states.shape[-1]), least, out=kept)  # no truth values on the way
        return states * kept.mul_(65536 / (65536 - dropped))


def _bytes(numbers: Tensor, width: int) -> Tensor:
    """(..., width) uniform int8 for (..., 1) hashes of places: half a hash more for every four of them."""
    alone = torch.compiler.is_compiling()  # each channel by itself: a view of another type would part the kernel
    channels = torch.arange(0, width, 1 if alone else 4, dtype=torch.int32, device=numbers.device)
    numbers = numbers ^ ((channels >> 2) + 1) * _GOLDEN
    numbers *= 0x7FEB352D
    numbers ^= numbers >> 16  # that the sign's copies come along makes no difference to be seen
    numbers *= -2073254261
    numbers ^= (numbers >> 16).bitwise_and_(0xFFFF)
    return numbers << 8 * (3 - (channels & 3)) >> 24 if alone else numbers.view(torch.int8)[..., :width]


def _mixed(numbers: Tensor, key: Tensor | int = 0) -> Tensor:
    """The mixer lowbias32 (see `lmscripts.counters.hash32`) on int32, whose shifts to the right repeat the sign.

    In place: most of the time would go into new memory.
    """
    numbers ^= (numbers >> 16).bitwise_and_(0xFFFF)
    numbers *= 0x7FEB352D
    numbers ^= key
    numbers ^= (numbers >> 15).bitwise_and_(0x1FFFF)
    numbers *= -2073254261  # 0x846CA68B
    numbers ^= (numbers >> 16).bitwise_and_(0xFFFF)
    return numbers


def install(models: Iterable[Any], of_weights: bool) -> None:
    """Let every dropout of models that are trained together draw by rows; in place.

    That `of_weights` of attention is drawn where `attend` computes them, in models that let it.
    """
    draws, number = Draws(), itertools.count(1)
    AttentionInterface.register(EAGER, attend)
    AttentionMaskInterface.register(EAGER, eager_mask)
    for model in models:
        model.draws = draws
        if of_weights and model._supports_attention_backend:
            model.set_attn_implementation(EAGER)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Dropout:
                    setattr(module, name, RowDropout(child.p, next(number), draws))
            if hasattr(module, "is_causal") and not hasattr(module, "of_weights"):
                module.of_weights = RowDropout(0.0, next(number), draws)


@torch.no_grad()
def probe(model: Any, rows: int, run: Callable[[], Tensor]) -> tuple[bool, bool]:
    """Whether a model in training mode drops anything, as some say a dropout and have none, and whether by its rows.

    `run` gives what it says of so many rows; it is asked twice with the same keys of rows, and then with others. Where
    a model's states are not laid out by rows, torch draws its dropout from here on.
    """
    found = list[Tensor]()
    try:
        with torch.random.fork_rng(devices=[]):
            for key in (1, 1, 2):
                model.draws.keys = torch.full((rows, 2), key, dtype=torch.int32)
                found.append(run())
    except Exception:  # an architecture of any kind
        model.draws.off = True
        return True, False
    finally:
        model.draws.keys = None
    same = torch.equal(found[0], found[1])
    return not same or not torch.equal(found[0], found[2]), same


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Transformers' attention interface with weights in memory, whose dropout is drawn by rows.

    `query` is (B, heads, T, d), keys and values the same or fewer heads, each for a group of queries; the mask is
    additive. Returns (B, T, heads, d) and the weights.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.float().softmax(-1).to(query.dtype)
    weights = module.of_weights.drop(weights, dropout) if dropout else weights
    return (weights @ value).transpose(1, 2).contiguous(), weights
