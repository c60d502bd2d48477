"""Fitting a model to a run: room for longer rows, activations in one kernel, layers that stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation

from lmscripts.errors import UserError

# ---- positions ----

LENGTHS = ("max_position_embeddings", "max_seq_len", "context_length")
# Types whose positions are counted from the padding id + 1: they read so many tokens fewer than they have places for.
OFFSET_POSITIONS = (
    "roberta",
    "camembert",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "longformer",
    "xmod",
    "data2vec-text",
)


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

    Args:
        rows: (P, H), P at most `total`.
        total: how many there shall be.
        padding_id: positions of RoBERTa begin behind it, and up to there nothing was learned; None for other models.
    """
    learned = rows[0 if padding_id is None else padding_id + 1 :]
    return torch.cat([rows, learned.repeat(-(-(total - len(rows)) // len(learned)), 1)])[:total]


def lengthen_positions(model: PreTrainedModel, num_positions: int) -> bool:
    """Give a model room for longer rows, before an optimizer knows its parameters; it is never shortened.

    The new position embeddings repeat the learned ones from the first on (arXiv:2004.05150, section 5), so that text
    beyond the learned length starts from what was learned about near neighbours. What the model says about rows that
    fitted before does not change by a bit.

    Args:
        model: BERT, RoBERTa, ELECTRA or GPT-2. Of two models that share their embeddings, each has to be given: the
            configuration belongs to one model.
        num_positions: rows of the table of positions; for RoBERTa with the pad_token_id + 1 rows that no text uses.

    Returns:
        Whether anything was changed.
    """
    name = position_table(model)
    if name is None:
        return False  # positions are computed, not learned
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    table: Any = model.get_submodule(name)
    rows = table.num_embeddings
    total = max(rows, num_positions)
    if total == rows == model.config.max_position_embeddings:
        return False
    table.weight.data = repeat_positions(table.weight.detach(), total, table.padding_idx)  # whoever shares it
    table.num_embeddings = total
    if hasattr(owner, "position_ids"):
        device = owner.position_ids.device
        owner.position_ids = torch.arange(total, device=device).expand(1, -1)
        owner.token_type_ids = torch.zeros(1, total, dtype=torch.long, device=device)
    model.config.max_position_embeddings = total
    return True


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
    that is as long as the configuration says (unlike the experts within a layer).

    Raises:
        UserError: the model has no such list.
    """
    base: Any = model.base_model
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [found for found in lists if all(any(True for _ in layer.children()) for layer in found)]
    number = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not lists:
        raise UserError(f"a {type(model).__name__} keeps its layers in no list, so they cannot be counted or frozen")
    return next((found for found in lists if len(found) == number), lists[0])


def freeze(model: PreTrainedModel, num_layers: int, layers: nn.ModuleList | None = None) -> int:
    """Keep the embeddings and the first layers as they are.

    ELECTRA's projection of the embeddings counts as embeddings. A head that is tied to the word embeddings keeps its
    matrix too; its bias and transform are trained.

    Args:
        model: BERT, RoBERTa, ELECTRA or a decoder.
        num_layers: -1 freezes nothing, 0 the embeddings, n the embeddings and the first n layers.
        layers: of the model; None looks for them.

    Returns:
        Number of frozen parameters; those that two models share are counted for each of them.

    Raises:
        UserError: the model has fewer layers, or the number is below -1.
    """
    base: Any = model.base_model
    layers = stacked_layers(model) if layers is None else layers
    if not -1 <= num_layers <= len(layers):
        raise UserError(
            f"frozen-layers is {num_layers}, but the model has {len(layers)} layers: give -1 to {len(layers)}"
        )
    if num_layers == -1:
        return 0
    inside = {id(module) for module in layers.modules()}
    frozen: list[nn.Module] = [m for m in base.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
    frozen += [base.embeddings] if hasattr(base, "embeddings") else []  # with their LayerNorm
    frozen += layers[:num_layers]
    frozen += [base.embeddings_project] if hasattr(base, "embeddings_project") else []
    parameters = {id(parameter): parameter for part in frozen for parameter in part.parameters()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in parameters.values())
