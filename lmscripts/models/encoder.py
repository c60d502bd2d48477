"""What the families with BERT's encoder share: the call that gives hidden states, at all positions or at some."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from lmscripts.models.attention import attend_from


def encode(body: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None) -> Tensor:
    """Last hidden states of an encoder (`model.bert`, `model.roberta`, `model.electra`).

    Args:
        body: the encoder with its embeddings; for `slots` its last layer must have been narrowed.
        input_ids: (B, T).
        positions: (B, T) position ids.
        attention: from `lmscripts.models.attention.attention_inputs`.
        slots: (B * K,) flat positions, K of each row in the order of the rows; None for every position.

    Returns:
        (B * K, H) hidden states at the slots, or (B, T, H) at every position.
    """
    some = {} if slots is None else {"slots": slots}
    hidden: Tensor = body(input_ids=input_ids, position_ids=positions, **attention, **some).last_hidden_state
    return hidden


def narrow_last_layer(layers: nn.ModuleList) -> None:
    """Let the last layer compute queries, attention and feed-forward only at the positions it is asked for.

    Keys and values need every position, all else of the last layer only those that are predicted: of a layer's
    operations about four fifths are saved where 15 % are. The layer stays a module with its parameters and hooks, and
    without `slots` it computes what it always did.
    """
    layers[-1].forward = MethodType(_forward_at_slots, layers[-1])


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
