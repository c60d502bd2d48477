"""ModernBERT (arXiv:2412.13663): rotary positions, GeGLU, norms before each part, and attention that alternates.

Every third layer attends to the whole document, the others to 64 tokens on either side (section 2.1.1 and 2.1.2).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ModernBertConfig
from transformers.models.modernbert.modeling_modernbert import rotate_half

from lmscripts.data.packing import Layout
from lmscripts.models import encoder
from lmscripts.models.attention import AttentionPath, additive_mask, attend_at, attention_inputs
from lmscripts.models.encoder import adopt, encode, fit, flops, join
from lmscripts.options.presets import FamilyKeys, Preset

__all__ = ["adopt", "encode", "fit", "flops", "join"]

heads = {"masked": {"": "ModernBertForMaskedLM"}}
preset_keys = FamilyKeys()
pretrained_heads = heads
may_be_new: dict[str, tuple[str, ...]] = {}
default_objective = "masked"
defaults = {"beta2": 0.98}  # table 3


def config(preset: Preset, vocab_size: int, layout: Layout, part: str = "") -> Any:
    """Configuration of a new model, see `lmscripts.models.encoder.config`."""
    ids: Any = {"bos_token_id": layout.begin_id, "eos_token_id": layout.end_id}
    ids |= {"cls_token_id": layout.begin_id, "sep_token_id": layout.end_id}
    return encoder.config(ModernBertConfig, preset, vocab_size, layout, **ids)


def attention(model: Any, path: AttentionPath, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """A mask for each type of layers: a single one would take the place of the windows too."""
    inputs = attention_inputs(path, batch, dtype)
    whole, near, ids = inputs["attention_mask"], inputs["attention_mask"], batch["input_ids"]
    window = model.config.sliding_window
    if path != "varlen" and ids.shape[1] > window + 1:  # whose kernel is told the window by the layer
        near = additive_mask(batch.get("segments", torch.zeros_like(ids[:1])), dtype, window=window)
    return inputs | {"attention_mask": {"full_attention": whole, "sliding_attention": near}}


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(N, V) logits of (N, H) hidden states."""
    return model.decoder(model.head(hidden))  # type: ignore[no-any-return]


def _forward_at_slots(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: Any = None,
    *,
    slots: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
    if slots is None:
        return type(layer).forward(layer, hidden, **given)  # type: ignore[no-any-return]
    normed, at_slots = layer.attn_norm(hidden), hidden.flatten(0, 1).index_select(0, slots)
    if "cu_seq_lens_q" in kwargs:
        attended = layer.attn(normed, **given)[0].flatten(0, 1).index_select(0, slots)
    else:
        attended = _attend_from(layer.attn, normed, slots, attention_mask, position_embeddings)
    at_slots = at_slots + attended
    return at_slots + layer.mlp(layer.mlp_norm(at_slots))  # type: ignore[no-any-return]


def _attend_from(module: Any, normed: Tensor, slots: Tensor, mask: Tensor | None, turns: tuple[Tensor, ...]) -> Tensor:
    """(B * K, H) self-attention with queries at some positions only; keys and values at all."""
    rows, length, width = normed.shape
    weights = module.Wqkv.weight.split([width, 2 * width])
    biases = (None, None) if module.Wqkv.bias is None else module.Wqkv.bias.split([width, 2 * width])
    query = nn.functional.linear(normed.flatten(0, 1).index_select(0, slots), weights[0], biases[0])
    query = query.view(rows, -1, width // module.head_dim, module.head_dim).transpose(1, 2)
    pairs = nn.functional.linear(normed, weights[1], biases[1])
    key, value = (x.transpose(1, 2) for x in pairs.view(rows, length, 2, -1, module.head_dim).unbind(2))
    flat = (x.expand(rows, -1, -1).flatten(0, 1).index_select(0, slots) for x in turns)
    query = _turned(query, *(x.view(rows, 1, -1, module.head_dim) for x in flat))
    key = _turned(key, *(x.unsqueeze(1) for x in turns))
    drop = module.of_weights if module.training and module.attention_dropout > 0 else None
    out = attend_at(slots, query, key, value, mask, drop, module.attention_dropout)
    return module.out_drop(module.Wo(out))  # type: ignore[no-any-return]


def _turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Queries or keys turned by their positions, in float32 as transformers does it."""
    wide = states.float()
    return ((wide * cosine) + (rotate_half(wide) * sine)).to(states.dtype)  # type: ignore


narrow = partial(encoder.narrow, forward=_forward_at_slots)
