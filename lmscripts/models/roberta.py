"""RoBERTa (arXiv:1907.11692): BERT's encoder, positions that begin after the padding id, longer training."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import RobertaConfig, RobertaForMaskedLM

from lmscripts.packing import Layout
from lmscripts.presets import Preset


def config(preset: Preset, vocab_size: int, layout: Layout) -> RobertaConfig:
    """Model configuration of a preset; the dropouts are set by `lmscripts.models.build`."""
    return RobertaConfig(
        **preset.layer_sizes(),
        max_position_embeddings=layout.sequence_length + layout.pad_id + 1,
        vocab_size=vocab_size,
        pad_token_id=layout.pad_id,
        bos_token_id=layout.begin_id,
        eos_token_id=layout.end_id,
        type_vocab_size=1,
    )


architecture = RobertaForMaskedLM


def encode(model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any]) -> Tensor:
    """(B, T, H) last hidden states of (B, T) ids; `positions` restart at 0 in each document."""
    first = model.config.pad_token_id + 1
    hidden: Tensor = model.roberta(input_ids=input_ids, position_ids=positions + first, **attention).last_hidden_state
    return hidden


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(N, V) logits of (N, H) hidden states."""
    logits: Tensor = model.lm_head(hidden)
    return logits
