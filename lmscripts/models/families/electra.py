"""ELECTRA (arXiv:2003.10555): a generator that fills masks and a discriminator that finds what it filled in.

Both stand on one embeddings module (words, positions, types, LayerNorm), and the generator's output layer is tied to
the word embeddings (section 3.2, "weight sharing"). The generator has the depth of the discriminator and a fraction of
its width, as in the code that was published with the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import ElectraConfig, PreTrainedModel

from lmscripts.data.packing import Layout
from lmscripts.models import encoder
from lmscripts.models.encoder import adopt, attention, encode, fit, narrow
from lmscripts.options.presets import FamilyKeys, Preset

__all__ = ["adopt", "attention", "encode", "fit", "narrow"]

heads = {
    "replaced": {"": "ElectraForPreTraining", "generator": "ElectraForMaskedLM"},
    "masked": {"": "ElectraForMaskedLM"},
}
pretrained_heads = heads
may_be_new: dict[str, tuple[str, ...]] = {}
preset_keys = FamilyKeys(
    required=("embedding-size", "generator-size", "mask-percent"),
    pretrained=("pretrained-generator-model-name-or-path", "pretrained-discriminator-model-name-or-path"),
)
default_objective = "replaced"
defaults: dict[str, float] = {}


def config(preset: Preset, vocab_size: int, layout: Layout, part: str = "") -> Any:
    """Configuration of a new discriminator, or of the generator: widths and heads times `generator-size`."""
    found = encoder.config(ElectraConfig, preset, vocab_size, layout, embedding_size=preset.embedding_size)
    for name in ("hidden_size", "num_attention_heads", "intermediate_size") if part == "generator" else ():
        setattr(found, name, int((preset.generator_fraction or 1) * getattr(found, name)))
    return found


def join(models: Mapping[str, Any]) -> None:
    """Put the generator on the discriminator's embeddings module, and tie its output layer to it."""
    if "generator" in models:
        generator, embeddings = models["generator"], models[""].electra.embeddings
        generator.electra.embeddings = embeddings
        generator.generator_lm_head.weight = embeddings.word_embeddings.weight


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(N, V) logits of a generator for (N, H) hidden states; (B, T) of a discriminator, positive means replaced."""
    if hasattr(model, "discriminator_predictions"):
        return model.discriminator_predictions(hidden)  # type: ignore[no-any-return]
    return model.generator_lm_head(model.generator_predictions(hidden))  # type: ignore[no-any-return]


def flops(model: PreTrainedModel, sequence_length: int, slots: int) -> float:
    """See `lmscripts.models.encoder.flops`; the discriminator looks at every position."""
    return encoder.flops(model, sequence_length, 0 if hasattr(model, "discriminator_predictions") else slots)
