"""What families with BERT's encoder share: see `lmscripts.models.families` for what each function is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmscripts.data.packing import Layout
from lmscripts.models.attention import AttentionPath, attend_at, attention_inputs
from lmscripts.models.fitting import lengthen, stacked_layers
from lmscripts.options.presets import Preset


def config(kind: Any, preset: Preset, vocab_size: int, layout: Layout, part: str = "", **more: Any) -> Any:
    """Configuration of a new model of a kind; the dropouts are set by `lmscripts.models.building`."""
    sizes = preset.layer_sizes() | {"max_position_embeddings": layout.sequence_length}
    return kind(**sizes | {"vocab_size": vocab_size, "pad_token_id": layout.pad_id} | more)


def join(models: Mapping[str, Any]) -> None:
    """A single model shares nothing."""


def fit(model: PreTrainedModel, name: str, layout: Layout) -> tuple[PreTrainedModel, list[str]]:
    """See `lmscripts.models.fitting.lengthen`."""
    return lengthen(model, name, layout.sequence_length)


def adopt(model: PreTrainedModel, layout: Layout, like: Path | None = None) -> list[str]:
    """Nothing: what an encoder's configuration says of ids is compared with the tokenizer where a model is loaded."""
    return []


def attention(model: Any, path: AttentionPath, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """See `lmscripts.models.attention.attention_inputs`."""
    return attention_inputs(path, batch, dtype)


def encode(
    model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None = None
) -> Tensor:
    """(B, T, H) last hidden states; of a model that was narrowed (B * K, H), those at the slots, K of each row."""
    some = {} if slots is None else {"slots": slots}
    if hasattr(model, "draws"):
        model.draws.places = slots
    found = model.base_model(input_ids=input_ids, position_ids=positions, **attention, **some)
    return found.last_hidden_state  # type: ignore[no-any-return]


def narrow(model: Any, forward: Callable[..., Tensor] | None = None) -> None:
    """Let the last layer compute queries, attention and feed-forward only at the positions it is asked for.

    Keys and values need every position, all else of the last layer only those that are predicted: of a layer's
    operations about four fifths are saved where 15 % are. The layer stays a module with its parameters and hooks, and
    without `slots` it computes what it always did.
    """
    last, pooler = stacked_layers(model)[-1], getattr(model.base_model, "pooler", None)
    last.forward = MethodType(forward or _forward_at_slots, last)
    if pooler is not None:  # which takes the first position of a row, and there is no row of some positions
        pooler.forward = MethodType(_pool_rows, pooler)


def _pool_rows(pooler: Any, hidden: Tensor) -> Tensor:
    return hidden if hidden.ndim == 2 else type(pooler).forward(pooler, hidden)  # type: ignore[no-any-return]


def _forward_at_slots(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    slots: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    if slots is None:
        return type(layer).forward(layer, hidden, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
    attend, at_slots = layer.attention.self, hidden.flatten(0, 1).index_select(0, slots)
    if "cu_seq_lens_q" in kwargs:  # the varlen kernel computes every query
        context = attend(hidden, attention_mask, **kwargs)[0].flatten(0, 1).index_select(0, slots)
    else:
        shape = (len(hidden), -1, attend.num_attention_heads, attend.attention_head_size)
        query = attend.query(at_slots).view(shape).transpose(1, 2)
        key, value = (project(hidden).view(shape).transpose(1, 2) for project in (attend.key, attend.value))
        drop = attend.of_weights if attend.training and attend.dropout.p > 0 else None
        context = attend_at(slots, query, key, value, attention_mask, drop, attend.dropout.p)
    attended = layer.attention.output(context, at_slots)
    return layer.output(layer.intermediate(attended), attended)  # type: ignore[no-any-return]


def flops(model: PreTrainedModel, sequence_length: int, slots: int) -> float:
    """Floating-point operations of a training step per position; without slots the head looks at every position.

    6 per weight that a position meets, and 12 H T per layer for the attention scores (arXiv:2001.08361, section 2.1,
    with the attention term written out), T no more than a window of attention. Where logits are wanted at some
    positions only, the others meet neither the head nor, of the last layer, more than keys and values.
    """
    config: Any = model.config
    width, share, stack = config.hidden_size, slots / sequence_length, stacked_layers(model)
    embedding = getattr(config, "embedding_size", width)
    weights = [sum(p.numel() for p in layer.parameters() if p.ndim > 1) for layer in stack]
    near = min(sequence_length, 2 * (getattr(config, "sliding_window", None) or sequence_length) + 1)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(stack)
    seen = [sequence_length if kind == "full_attention" else near for kind in kinds]
    body, scores, head = float(sum(weights)), float(12 * width * sum(seen)), float(width**2)
    if slots:
        body -= (1 - share) * (weights[-1] - 2 * width**2)
        scores -= (1 - share) * 12 * width * seen[-1]
        head = share * (width * embedding + embedding * config.vocab_size)
    project = embedding * width if embedding != width else 0
    return float(6 * (body + project + head) + scores)
