"""Model families, one file each, all with the same four names: config, architecture, encode, predict."""

from __future__ import annotations

from types import ModuleType

import torch
from transformers import PreTrainedModel

from lmscripts.models import bert, roberta
from lmscripts.packing import Layout
from lmscripts.presets import Preset

FAMILIES: dict[str, ModuleType] = {"bert": bert, "roberta": roberta}


def build(
    preset: Preset,
    *,
    seed: int,
    attn_implementation: str,
    vocab_size: int,
    layout: Layout,
    hidden_dropout: float,
    attention_dropout: float,
) -> PreTrainedModel:
    """A freshly initialised model.

    Args:
        preset: sizes of the layers.
        seed: decides the initial weights, on every process alike.
        attn_implementation: from `lmscripts.attention.use_attention`.
        vocab_size: entries of the vocabulary.
        layout: of the rows; decides the number of positions and the special ids.
        hidden_dropout: of the hidden states.
        attention_dropout: of the attention weights.
    """
    family = FAMILIES[preset.family]
    config = family.config(preset, vocab_size, layout)
    config.hidden_dropout_prob = hidden_dropout
    config.attention_probs_dropout_prob = attention_dropout
    config._attn_implementation = attn_implementation
    torch.manual_seed(seed)
    model: PreTrainedModel = family.architecture(config)
    return model
