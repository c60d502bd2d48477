"""BERT (arXiv:1810.04805): masked language model without next-sentence prediction."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from lmscripts.packing import Layout
from lmscripts.presets import Preset


def config(preset: Preset, vocab_size: int, layout: Layout) -> BertConfig:
    """Model configuration of a preset; the dropouts are set by `lmscripts.models.build`."""
    return BertConfig(
        **preset.layer_sizes(),
        max_position_embeddings=layout.sequence_length,
        vocab_size=vocab_size,
        pad_token_id=layout.pad_id,
    )


architecture = BertForMaskedLM


def encode(model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any]) -> Tensor:
    """(B, T, H) last hidden states of (B, T) ids; `positions` restart at 0 in each document."""
    hidden: Tensor = model.bert(input_ids=input_ids, position_ids=positions, **attention).last_hidden_state
    return hidden


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(N, V) logits of (N, H) hidden states."""
    logits: Tensor = model.cls(hidden)
    return logits
