"""ELECTRA (arXiv:2003.10555): a generator that fills masks and a discriminator that finds what it filled in.

Both stand on one embeddings module (words, positions, types, LayerNorm), and the generator's output layer is tied to
the word embeddings (section 3.2, "weight sharing"). The generator has the depth of the discriminator and a fraction of
its width, as in the code that was published with the paper.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from lmscripts.data.packing import Layout
from lmscripts.models.encoder import encode as encode_with
from lmscripts.options.presets import Preset


def config(preset: Preset, vocab_size: int, layout: Layout) -> ElectraConfig:
    """Configuration of the discriminator; the dropouts are set by `lmscripts.models.build`."""
    return ElectraConfig(
        **preset.layer_sizes() | {"embedding_size": preset.embedding_size},
        max_position_embeddings=num_positions(layout),
        vocab_size=vocab_size,
        pad_token_id=layout.pad_id,
    )


def generator_config(preset: Preset, vocab_size: int, layout: Layout) -> ElectraConfig:
    """Configuration of the generator: hidden size, heads and feed-forward size times `generator-size`."""
    small = config(preset, vocab_size, layout)
    fraction = preset.generator_fraction or 1
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        setattr(small, name, int(fraction * getattr(small, name)))
    return small


architecture = ElectraForPreTraining
generator_architecture = ElectraForMaskedLM


def num_positions(layout: Layout) -> int:
    """Position embeddings that rows of this layout need."""
    return layout.sequence_length


def share_embeddings(generator: Any, discriminator: Any) -> None:
    """Put the generator on the discriminator's embeddings module, and tie its output layer to it."""
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight


def encode(
    model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None = None
) -> Tensor:
    """Last hidden states, see `lmscripts.models.encoder.encode`; `positions` restart at 0 in each document."""
    return encode_with(model.electra, input_ids, positions, attention, slots)


def layers(model: Any) -> nn.ModuleList:
    """The layers of the encoder."""
    found: nn.ModuleList = model.electra.encoder.layer
    return found


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(N, V) logits of the generator for (N, H) hidden states."""
    logits: Tensor = model.generator_lm_head(model.generator_predictions(hidden))
    return logits


def detect(model: Any, hidden: Tensor) -> Tensor:
    """(B, T) logits of the discriminator for (B, T, H) hidden states; positive means replaced."""
    logits: Tensor = model.discriminator_predictions(hidden)
    return logits
