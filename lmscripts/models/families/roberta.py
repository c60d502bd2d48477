"""RoBERTa (arXiv:1907.11692): BERT's encoder, positions that begin after the padding id, longer training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import RobertaConfig

from lmscripts.data.packing import Layout
from lmscripts.models import encoder
from lmscripts.models.encoder import adopt, attention, fit, flops, narrow
from lmscripts.options.presets import FamilyKeys, Preset

__all__ = ["adopt", "attention", "fit", "flops", "narrow"]

heads = {
    "masked": {"": "RobertaForMaskedLM"},
    # It has no class with both heads: two folders, which hold the same body.
    "sentence_pairs": {"": "RobertaForMaskedLM", "pairs": "RobertaForSequenceClassification"},
}
preset_keys = FamilyKeys()
pretrained_heads = heads
may_be_new: dict[str, tuple[str, ...]] = {"sentence_pairs": ("classifier.",)}
default_objective = "masked"
defaults = {"beta2": 0.98}  # section 3.1


def config(preset: Preset, vocab_size: int, layout: Layout, part: str = "") -> Any:
    """Configuration of a new model, see `lmscripts.models.encoder.config`."""
    return encoder.config(
        RobertaConfig,
        preset,
        vocab_size,
        layout,
        max_position_embeddings=layout.sequence_length + layout.pad_id + 1,  # those up to the padding id stay unused
        bos_token_id=layout.begin_id,
        eos_token_id=layout.end_id,
        type_vocab_size=1,
    )


def join(models: Mapping[str, Any]) -> None:
    """Put the head for pairs on the body of the language model."""
    if "pairs" in models:
        models["pairs"].roberta = models[""].roberta


def encode(
    model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None = None
) -> Tensor:
    """See `lmscripts.models.encoder.encode`; `positions` restart at 0 in each document."""
    return encoder.encode(model, input_ids, positions + model.config.pad_token_id + 1, attention, slots)


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(N, V) logits of (N, H) hidden states."""
    return model.lm_head(hidden)  # type: ignore[no-any-return]


def pair_scores(models: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """(N, 2) scores of N pairs by the (N, H) hidden states at their [CLS]; the second says "not what came next"."""
    return models["pairs"].classifier(hidden[:, None])  # type: ignore[no-any-return]
