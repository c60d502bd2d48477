"""RoBERTa (arXiv:1907.11692): BERT's encoder, positions that begin after the padding id, longer training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM

from lmscripts.data.packing import Layout
from lmscripts.models.encoder import encode as encode_with
from lmscripts.options.presets import Preset


def config(preset: Preset, vocab_size: int, layout: Layout) -> RobertaConfig:
    """Model configuration of a preset; the dropouts are set by `lmscripts.models.build`."""
    return RobertaConfig(
        **preset.layer_sizes(),
        max_position_embeddings=num_positions(layout),
        vocab_size=vocab_size,
        pad_token_id=layout.pad_id,
        bos_token_id=layout.begin_id,
        eos_token_id=layout.end_id,
        type_vocab_size=1,
    )


architecture = RobertaForMaskedLM


def num_positions(layout: Layout) -> int:
    """Position embeddings that rows of this layout need; those up to the padding id are never used."""
    return layout.sequence_length + layout.pad_id + 1


def encode(
    model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None = None
) -> Tensor:
    """Last hidden states, see `lmscripts.models.encoder.encode`; `positions` restart at 0 in each document."""
    first = model.config.pad_token_id + 1
    return encode_with(model.roberta, input_ids, positions + first, attention, slots)


def layers(model: Any) -> nn.ModuleList:
    """The layers of the encoder."""
    found: nn.ModuleList = model.roberta.encoder.layer
    return found


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(N, V) logits of (N, H) hidden states."""
    logits: Tensor = model.lm_head(hidden)
    return logits
