"""BERT (arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from transformers import BertConfig

from lmscripts.models import encoder
from lmscripts.models.encoder import adopt, attention, encode, fit, flops, join, narrow
from lmscripts.options.presets import FamilyKeys

__all__ = ["adopt", "attention", "encode", "fit", "flops", "join", "narrow"]

heads = {"masked": {"": "BertForMaskedLM"}, "sentence_pairs": {"": "BertForPreTraining"}}
preset_keys = FamilyKeys()
pretrained_heads = heads
may_be_new: dict[str, tuple[str, ...]] = {"sentence_pairs": ("bert.pooler.", "cls.seq_relationship.")}
default_objective = "masked"
defaults: dict[str, float] = {}
config = partial(encoder.config, BertConfig)


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(N, V) logits of (N, H) hidden states."""
    return model.cls.predictions(hidden)  # type: ignore[no-any-return]


def pair_scores(models: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """(N, 2) scores of N pairs by the (N, H) hidden states at their [CLS]; the second says "not what came next"."""
    model = models[""]
    return model.cls.seq_relationship(model.bert.pooler(hidden[:, None]))  # type: ignore[no-any-return]
