"""Fitting a model to a run: room for longer rows, activations in one kernel, layers that stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation

from lmscripts.errors import UserError, shortened
from lmscripts.models.checks import plain_logits, random_ids, relative_difference

# ---- positions ----

LENGTHS = ("max_position_embeddings", "max_seq_len", "context_length")
# Types whose positions are counted from the padding id + 1: they read so many tokens fewer than they have places for.
OFFSET_POSITIONS: tuple[str, ...] = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert")
OFFSET_POSITIONS += ("longformer", "xmod", "data2vec-text")


def longest_input(config: Any) -> int | None:
    """Tokens of the longest input, special ones included, that a configuration speaks of; None where it says none."""
    text = config.get_text_config(decoder=True)
    found = (getattr(text, name, None) for name in LENGTHS)
    length = next((n for n in found if isinstance(n, int) and n > 0), None)  # -1 is XLNet's word for any length
    if length is None or config.model_type not in OFFSET_POSITIONS:
        return length
    return length - ((config.pad_token_id or 0) + 1)


def repeat_positions(rows: Tensor, total: int, padding_id: int | None) -> Tensor:
    """(total, H) position embeddings: the (P, H) learned ones, then the same again from the first of the text on.

    Positions of RoBERTa begin behind the padding id, and up to there nothing was learned; it is None for other models.
    """
    learned = rows[0 if padding_id is None else padding_id + 1 :]
    return torch.cat([rows, learned.repeat(-(-(total - len(rows)) // len(learned)), 1)])[:total]


def lengthen(model: Any, name: str, length: int) -> tuple[Any, list[str]]:
    """A model with room for longer rows, built anew so that every table and mask that depends on it is right.

    Learned positions repeat from the first on (arXiv:2004.05150, section 5), so that text beyond the learned length
    starts from what was learned about near neighbours; computed ones go on. What the model says about rows that fitted
    before stays the same.

    Returns:
        The model, or one that reads `length` tokens, special ones included, and shares no part with another model; and
        sentences for the user.

    Raises:
        UserError: its positions cannot be lengthened.
    """
    before = longest_input(model.config)
    if before is None or length <= before:
        return model, []
    try:
        longer, learned = _rebuilt(model, before, length)
    except Exception as error:  # an architecture of any kind
        raise too_long(name, before, shortened(error)) from error
    if learned:
        return longer, [f"{before:,} position embeddings were lengthened to {length:,}"]
    said = f"{name} speaks of {before:,} positions; as they are computed, rows may be longer: config.json says "
    return longer, [f"{said}{length:,} now"]


def too_long(name: str, before: int, why: str) -> UserError:
    """The sentence about positions that stay as they are."""
    return UserError(
        f"{name} has {before} positions, which cannot be lengthened ({why}): give a --sequence_length of at most "
        f"{before}"
    )


def _rebuilt(model: Any, before: int, length: int) -> tuple[Any, bool]:
    """The model anew with a configuration of more positions, and whether these are learned."""
    config, weights = copy.deepcopy(model.config), model.state_dict()
    config._attn_implementation = model.config._attn_implementation
    text = config.get_text_config(decoder=True)
    key = next(key for key in LENGTHS if isinstance(getattr(text, key, None), int))
    setattr(text, key, getattr(text, key) + length - before)
    with torch.random.fork_rng(devices=[]):
        longer: Any = type(model)(config)
    learned = False
    for key, tensor in longer.state_dict().items():
        saved = weights[key]
        if tensor.shape == saved.shape:
            continue
        unused = len(saved) - before  # OPT and RoBERTa leave the first rows empty
        if tensor.ndim != 2 or tensor.shape[1:] != saved.shape[1:] or len(tensor) - unused != length or unused < 0:
            raise ValueError(f"{key} has the shape {tuple(saved.shape)}")
        weights[key], learned = repeat_positions(saved, len(tensor), unused - 1 if unused else None), True
    longer.load_state_dict(weights)
    if model.can_generate():
        longer.generation_config = model.generation_config
    training, ids = model.training, random_ids(model, min(23, before))
    ours, theirs = (plain_logits(network.eval(), ids) for network in (longer, model))
    if not relative_difference(ours, theirs) < 1e-3:
        raise ValueError("with more of them it gives other logits")
    model.train(training)
    return longer.train(training), learned


def position_table(model: PreTrainedModel) -> str | None:
    """Name of the module of learned position embeddings; None for a model without any."""
    names = (f"{model.base_model_prefix}.{part}" for part in ("embeddings.position_embeddings", "wpe"))
    modules = dict(model.named_modules())
    return next((name for name in names if isinstance(modules.get(name), nn.Embedding)), None)


# ---- activations ----


def fuse_activations(model: PreTrainedModel) -> None:
    """Let one kernel compute the tanh form of GELU ("gelu_new", "gelu_fast") where transformers takes eight.

    The function is the same, to rounding; weights and configuration stay as they are. Step by step it keeps five
    tensors as wide as the feed-forward layer for the gradient, which in GPT-2 is more than all else of a layer.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, FastGELUActivation)):
                setattr(module, name, nn.GELU(approximate="tanh"))


# ---- layers, and freezing them ----


def stacked_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of an encoder or decoder, wherever it keeps them.

    They are the first list of modules that have parts themselves (unlike a list of projections), and of such lists one
    that is as long as the configuration says (unlike the experts within a layer). Without any there is a UserError.
    """
    base: Any = model.base_model
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [found for found in lists if all(any(True for _ in layer.children()) for layer in found)]
    number = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not lists:
        raise UserError(f"a {type(model).__name__} keeps its layers in no list, so they cannot be counted or frozen")
    return next((found for found in lists if len(found) == number), lists[0])


def freeze(model: PreTrainedModel, num_layers: int) -> int:
    """Keep the embeddings, with their LayerNorm and projection, and the first layers as they are; -1 keeps nothing.

    A head that is tied to the word embeddings keeps its matrix too; its bias and transform are trained.

    Returns:
        Number of frozen parameters; those that two models share are counted for each of them.

    Raises:
        UserError: the model has fewer layers, or the number is below -1.
    """
    base: Any = model.base_model
    layers = stacked_layers(model)
    if not -1 <= num_layers <= len(layers):
        raise UserError(
            f"frozen-layers is {num_layers}, but the model has {len(layers)} layers: give -1 to {len(layers)}"
        )
    if num_layers == -1:
        return 0
    inside = {id(module) for module in layers.modules()}
    frozen: list[nn.Module] = [m for m in base.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
    frozen += [part for name, part in base.named_children() if name.startswith("embeddings")]
    frozen += layers[:num_layers]
    parameters = {id(parameter): parameter for part in frozen for parameter in part.parameters()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in parameters.values())
