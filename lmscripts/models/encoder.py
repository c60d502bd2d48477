"""What families with BERT's encoder share: see `lmscripts.models.families` for what each function is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmscripts.data.packing import Layout
from lmscripts.models.attention import AttentionPath, attend_from, attention_inputs
from lmscripts.models.fitting import lengthen_positions, longest_input


def join(models: Mapping[str, Any]) -> None:
    """A single model shares nothing."""


def fit(
    model: PreTrainedModel, name: str, layout: Layout, num_positions: int | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """Give a loaded model room for the rows of a run, see `lmscripts.models.fitting.lengthen_positions`.

    Args:
        model: the model; the same one is returned.
        name: where it comes from.
        layout: of the longest rows.
        num_positions: position embeddings that they need; None for one each position.
    """
    before = longest_input(model.config)
    if not lengthen_positions(model, num_positions or layout.sequence_length):
        return model, []
    return model, [f"{before:,} position embeddings were lengthened to {layout.sequence_length:,}"]


def adopt(model: PreTrainedModel, layout: Layout, like: Path | None = None) -> list[str]:
    """Nothing: what an encoder's configuration says of ids is compared with the tokenizer where a model is loaded."""
    return []


def layers(model: Any) -> nn.ModuleList:
    """The layers of the encoder."""
    found: nn.ModuleList = model.base_model.encoder.layer
    return found


def attention(model: Any, path: AttentionPath, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """See `lmscripts.models.attention.attention_inputs`."""
    return attention_inputs(path, batch, dtype)


def encode(
    model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None = None
) -> Tensor:
    """Last hidden states of an encoder.

    Args:
        model: with its head; for `slots` its last layer must have been narrowed.
        input_ids: (B, T).
        positions: (B, T) position ids.
        attention: from `attention`.
        slots: (B * K,) flat positions, K of each row in the order of the rows; None for every position.

    Returns:
        (B * K, H) hidden states at the slots, or (B, T, H) at every position.
    """
    some = {} if slots is None else {"slots": slots}
    body = model.base_model
    hidden: Tensor = body(input_ids=input_ids, position_ids=positions, **attention, **some).last_hidden_state
    return hidden


def narrow(model: Any) -> None:
    """Let the last layer compute queries, attention and feed-forward only at the positions it is asked for.

    Keys and values need every position, all else of the last layer only those that are predicted: of a layer's
    operations about four fifths are saved where 15 % are. The layer stays a module with its parameters and hooks, and
    without `slots` it computes what it always did.
    """
    last, pooler = layers(model)[-1], getattr(model.base_model, "pooler", None)
    last.forward = MethodType(_forward_at_slots, last)
    if pooler is not None:  # which takes the first position of a row, and there is no row of some positions
        pooler.forward = MethodType(_pool_rows, pooler)


def _pool_rows(pooler: Any, hidden: Tensor) -> Tensor:
    if hidden.ndim == 2:
        return hidden
    pooled: Tensor = type(pooler).forward(pooler, hidden)
    return pooled


def _forward_at_slots(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    slots: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    if slots is None:
        unchanged: Tensor = type(layer).forward(layer, hidden, attention_mask, *args, **kwargs)
        return unchanged
    at_slots = hidden.flatten(0, 1).index_select(0, slots)
    context = attend_from(layer.attention.self, hidden, at_slots, slots, attention_mask, kwargs)
    attended = layer.attention.output(context, at_slots)
    out: Tensor = layer.output(layer.intermediate(attended), attended)
    return out


def flops(model: PreTrainedModel, sequence_length: int, slots: int) -> float:
    """Floating-point operations of a training step per position.

    6 per weight that a position meets, and 12 H T per layer for the attention scores (arXiv:2001.08361, section 2.1,
    with the attention term written out). Where logits are wanted at some positions only, the others meet neither the
    head nor, of the last layer, more than keys and values.

    Args:
        model: its configuration says the sizes.
        sequence_length: positions per row.
        slots: positions of a row that get logits over the vocabulary; 0 for a head that looks at every position.
    """
    config: Any = model.config
    width, inner = config.hidden_size, config.intermediate_size
    embedding = getattr(config, "embedding_size", width)
    layer, keys_and_values = 4 * width**2 + 2 * width * inner, 2 * width**2
    share = slots / sequence_length
    number = float(config.num_hidden_layers)
    body, scores = number * layer, 12 * width * sequence_length * number
    head = float(width**2)
    if slots:
        body -= (1 - share) * (layer - keys_and_values)
        scores -= (1 - share) * 12 * width * sequence_length
        head = share * (width * embedding + embedding * config.vocab_size)
    project = embedding * width if embedding != width else 0
    return float(6 * (body + project + head) + scores)
