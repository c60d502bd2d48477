"""ModernBERT (arXiv:2412.13663): rotary positions, GeGLU, norms before each part, and attention that alternates.

Every third layer attends to the whole document, the others to 64 tokens on either side (section 2.1.1 and 2.1.2).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ModernBertConfig
from transformers.models.modernbert.modeling_modernbert import rotate_half

from lmscripts.data.packing import Layout
from lmscripts.models.attention import AttentionPath, additive_mask, attention_inputs
from lmscripts.models.encoder import adopt, encode, join
from lmscripts.options.presets import FamilyKeys, Preset

__all__ = ["adopt", "encode", "join"]

heads = {"masked": {"": "ModernBertForMaskedLM"}}
preset_keys = FamilyKeys()
pretrained_heads = heads
default_objective = "masked"
defaults = {"beta2": 0.98}  # table 3


def config(preset: Preset, vocab_size: int, layout: Layout, part: str = "") -> ModernBertConfig:
    """Configuration of a new model; the dropouts are set by `lmscripts.models.building`."""
    return ModernBertConfig(
        **preset.layer_sizes(),
        max_position_embeddings=layout.sequence_length,
        vocab_size=vocab_size,
        pad_token_id=layout.pad_id,
        bos_token_id=layout.begin_id,
        eos_token_id=layout.end_id,
        cls_token_id=layout.begin_id,
        sep_token_id=layout.end_id,
    )


def fit(model: Any, name: str, layout: Layout) -> tuple[Any, list[str]]:
    """Rotary positions go on; only what config.json says of the longest input may have to follow."""
    before = model.config.max_position_embeddings
    if layout.sequence_length <= before:
        return model, []
    model.config.max_position_embeddings = layout.sequence_length
    said = f"{name} speaks of {before:,} positions; as they are computed, rows may be longer: config.json says "
    return model, [f"{said}{layout.sequence_length:,} now"]


def layers(model: Any) -> nn.ModuleList:
    """The layers of the encoder."""
    found: nn.ModuleList = model.base_model.layers
    return found


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


def narrow(model: Any) -> None:
    """See `lmscripts.models.encoder.narrow`."""
    last = layers(model)[-1]
    last.forward = MethodType(_forward_at_slots, last)


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
    out: Tensor = at_slots + layer.mlp(layer.mlp_norm(at_slots))
    return out


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
    if mask is not None:
        mask = mask.expand(rows, 1, length, length).flatten(0, 2).index_select(0, slots).view(rows, 1, -1, length)
    dropout = module.attention_dropout if module.training else 0.0
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return module.out_drop(module.Wo(out.transpose(1, 2).flatten(2).flatten(0, 1)))  # type: ignore[no-any-return]


def _turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Queries or keys turned by their positions, in float32 as transformers does it."""
    wide = states.float()
    turned: Tensor = (wide * cosine) + (rotate_half(wide) * sine)  # type: ignore[no-untyped-call]
    return turned.to(states.dtype)


def flops(model: Any, sequence_length: int, slots: int) -> float:
    """As `lmscripts.models.encoder.flops`, with the gate of the feed-forward layers and the windows of attention."""
    sizes = model.config
    width, kinds = sizes.hidden_size, sizes.layer_types
    layer, keys_and_values = 4 * width**2 + 3 * width * sizes.intermediate_size, 2 * width**2
    near = min(sequence_length, 2 * sizes.sliding_window + 1)
    seen = [sequence_length if kind == "full_attention" else near for kind in kinds]
    share = slots / sequence_length
    body = len(kinds) * layer - (1 - share) * (layer - keys_and_values)
    scores = 12 * width * (sum(seen) - (1 - share) * seen[-1])
    return float(6 * (body + share * (width**2 + width * sizes.vocab_size)) + scores)
