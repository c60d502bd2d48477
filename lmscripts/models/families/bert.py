"""BERT (arXiv:1810.04805): masked language model without next-sentence prediction."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from lmscripts.data.packing import Layout
from lmscripts.models.encoder import encode as encode_with
from lmscripts.options.presets import Preset


def config(preset: Preset, vocab_size: int, layout: Layout) -> BertConfig:
    """Model configuration of a preset; the dropouts are set by `lmscripts.models.build`."""
    return BertConfig(
        **preset.layer_sizes(),
        max_position_embeddings=num_positions(layout),
        vocab_size=vocab_size,
        pad_token_id=layout.pad_id,
    )


architecture = BertForMaskedLM


def num_positions(layout: Layout) -> int:
    """Position embeddings that rows of this layout need."""
    return layout.sequence_length


def encode(
    model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None = None
) -> Tensor:
    """Last hidden states, see `lmscripts.models.encoder.encode`; `positions` restart at 0 in each document."""
    return encode_with(model.bert, input_ids, positions, attention, slots)


def layers(model: Any) -> nn.ModuleList:
    """The layers of the encoder."""
    found: nn.ModuleList = model.bert.encoder.layer
    return found


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(N, V) logits of (N, H) hidden states."""
    logits: Tensor = model.cls(hidden)
    return logits
