"""GPT-2 (OpenAI, "Language Models are Unsupervised Multitask Learners", 2019), and other decoders to go on with.

New models are GPT-2. Everything but `config` works for any causal model of transformers whose logits are an output
matrix times the last hidden states; `lmscripts.models.decoders` fits a given one and proves it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lmscripts.data.packing import Layout
from lmscripts.models.fitting import stacked_layers
from lmscripts.options.presets import Preset


def config(preset: Preset, vocab_size: int, layout: Layout) -> GPT2Config:
    """Model configuration of a preset; the dropouts are set by `lmscripts.models.build`."""
    sizes = preset.layer_sizes()
    return GPT2Config(
        n_layer=sizes["num_hidden_layers"],
        n_embd=sizes["hidden_size"],
        n_head=sizes["num_attention_heads"],
        n_inner=sizes["intermediate_size"],
        n_positions=num_positions(layout),
        vocab_size=vocab_size,
        bos_token_id=layout.begin_id,
        eos_token_id=layout.end_id,
        pad_token_id=layout.pad_id,
    )


architecture = GPT2LMHeadModel


def num_positions(layout: Layout) -> int:
    """Position embeddings that rows of this layout need."""
    return layout.sequence_length


def encode(
    model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None = None
) -> Tensor:
    """Last hidden states of a decoder.

    Args:
        model: with its head.
        input_ids: (B, T).
        positions: (B, T); restart at 0 in each document.
        attention: from `lmscripts.models.attention.attention_inputs` with causal=True.
        slots: flat positions to give; None for all.

    Returns:
        (B, T, H), or (slots, H).
    """
    # No row holds a second segment: the model's own causal mask and positions serve, and need no mask in memory.
    whole = attention["attention_mask"] is None and "cu_seq_lens_q" not in attention
    numbers = {} if whole else {"position_ids": positions.long()}  # of which not all decoders know
    body = model.base_model
    hidden: Tensor = body(input_ids=input_ids, use_cache=False, **numbers, **attention).last_hidden_state
    return hidden if slots is None else hidden.flatten(0, 1).index_select(0, slots)


layers = stacked_layers


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(..., V) logits of (..., H) hidden states."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits
