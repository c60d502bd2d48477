"""GPT-2 (OpenAI, "Language Models are Unsupervised Multitask Learners", 2019), and other decoders to go on with.

New models are GPT-2; a model to go on from may be any causal model of transformers, see `lmscripts.models.decoder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GPT2Config

from lmscripts.data.packing import Layout
from lmscripts.models import decoder
from lmscripts.models.decoder import attention, encode, fit, flops, join, narrow, predict
from lmscripts.options.presets import FamilyKeys, Preset

__all__ = ["attention", "encode", "fit", "flops", "join", "narrow", "predict"]

heads = {"causal": {"": "GPT2LMHeadModel"}}
preset_keys = FamilyKeys()
pretrained_heads = {"causal": {"": "AutoModelForCausalLM"}}
may_be_new: dict[str, tuple[str, ...]] = {}
default_objective = "causal"
defaults = {"beta2": 0.95}  # arXiv:2005.14165, appendix B


def config(preset: Preset, vocab_size: int, layout: Layout, part: str = "") -> GPT2Config:
    """Configuration of a new model; the dropouts are set by `lmscripts.models.building`."""
    sizes = preset.layer_sizes()
    return GPT2Config(
        n_layer=sizes["num_hidden_layers"],
        n_embd=sizes["hidden_size"],
        n_head=sizes["num_attention_heads"],
        n_inner=sizes["intermediate_size"],
        n_positions=layout.sequence_length,
        vocab_size=vocab_size,
        bos_token_id=layout.begin_id,
        eos_token_id=layout.end_id,
        pad_token_id=layout.pad_id,
    )


def adopt(model: Any, layout: Layout, like: Path | None = None) -> list[str]:
    """As `lmscripts.models.decoder.adopt`; the positions also by their older name, which converters to GGUF read."""
    if isinstance(model.config, GPT2Config):
        model.config.n_ctx = model.config.n_positions
    return decoder.adopt(model, layout, like)
