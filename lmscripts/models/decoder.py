"""What decoders share, of any architecture: see `lmscripts.models.families` for what each function is asked.

transformers has more than a hundred. Some know no position ids, attend to a window, scale or cap their logits, have no
SDPA, or room for few positions; what of that does not fit is refused with a sentence, before anything is written (here,
and by `lmscripts.models.checks.check_isolation`). They work for any causal model whose logits are an output matrix
times the last hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lmscripts.data.packing import Layout
from lmscripts.errors import UserError, shortened
from lmscripts.models.attention import AttentionPath, attention_inputs, use_attention
from lmscripts.models.encoder import join
from lmscripts.models.fitting import lengthen, longest_input, stacked_layers, too_long

__all__ = ["join"]

_WINDOWS: tuple[str, ...] = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size")
_WINDOWS += ("local_attention", "local_attention_window_len", "keep_window_size")


def narrow(model: Any) -> None:
    """Nothing: every position is predicted."""


def attention(model: Any, path: AttentionPath, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """See `lmscripts.models.attention.attention_inputs`; an explicit mask takes the place of the model's causal one."""
    return attention_inputs(path, batch, dtype, causal=True)


def encode(
    model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None = None
) -> Tensor:
    """(B, T, H) last hidden states, or (N, H) those at the slots; `positions` restart at 0 in each document."""
    # No row holds a second segment: the model's own causal mask and positions serve, and need no mask in memory.
    whole = attention["attention_mask"] is None and "cu_seq_lens_q" not in attention
    numbers = {} if whole else {"position_ids": positions.long()}  # of which not all decoders know
    body = model.base_model
    hidden: Tensor = body(input_ids=input_ids, use_cache=False, **numbers, **attention).last_hidden_state
    return hidden if slots is None else hidden.flatten(0, 1).index_select(0, slots)


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(..., V) logits of (..., H) hidden states."""
    return model.get_output_embeddings()(hidden)  # type: ignore[no-any-return]


def flops(model: Any, sequence_length: int, slots: int) -> float:
    """Floating-point operations of a training step per position, each of which is predicted.

    6 per weight that a position meets and 12 H T per layer for the scores (arXiv:2001.08361, section 2.1). The half of
    the scores that lies in the future is counted, as is usual, although kernels may skip it.
    """
    stack, head = stacked_layers(model), model.get_output_embeddings()
    matrices = sum(p.numel() for p in stack.parameters() if p.ndim >= 2) + head.weight.numel()
    return float(6 * matrices + 12 * len(stack) * head.weight.shape[1] * sequence_length)


def causal_class(name: str, config: PretrainedConfig) -> Any:
    """The class that AutoModelForCausalLM takes for a configuration; a UserError where there is none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name} is a {config.model_type}, of which transformers has no causal language model")
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


# ---- rows --------------------------------------------------------------------------------------------------------


def fit(model: Any, name: str, layout: Layout) -> tuple[Any, list[str]]:
    """A decoder with room for the longest rows of a run, or a UserError; see `lmscripts.models.fitting.lengthen`."""
    text, length = model.config.get_text_config(decoder=True), layout.sequence_length
    # GPT-Neo lays its own window over any mask; without a mask every model does.
    windows = [getattr(text, window, None) for window in _WINDOWS]
    short = [window for window in windows if type(window) is int and 0 < window < length]
    varlen = model.config._attn_implementation == use_attention("varlen")
    if short and (layout.packing == "isolated" or varlen):
        raise UserError(f"{name} attends to {min(short)} tokens at most: give a shorter --sequence_length")
    before, rope = longest_input(model.config), getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # once, or for each type of layers
    scaled = {kind["rope_type"] for kind in kinds if "rope_type" in kind} - {"default"}
    original = getattr(text, "original_max_position_embeddings", None)
    original = rope.get("original_max_position_embeddings", original)
    if layout.packing == "isolated" and scaled & {"longrope", "dynamic"} and original and original < length:
        raise UserError(
            f"{name} turns its positions otherwise in rows of more than {original} tokens ({min(scaled)}), whatever "
            f"documents they hold: give a --sequence_length of at most {original}, or --packing contiguous"
        )
    if before is None or length <= before:
        return model, []
    if scaled:
        raise too_long(name, before, f"they are scaled, {min(scaled)}")
    return lengthen(model, name, length)


# ---- ids ---------------------------------------------------------------------------------------------------------


def adopt(model: Any, layout: Layout, like: Path | None = None) -> list[str]:
    """Write into the configurations what training uses: the ids around documents, and how long a text may become.

    Without a length a pipeline of transformers writes 256 tokens, which breaks a model of shorter rows. The settings
    for generation are those of the checkpoint `like`, if it has any.

    Raises:
        UserError: the settings for generation contradict each other, and transformers would not save them.
    """
    if like is not None and (like / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(like)
    model.get_input_embeddings().padding_idx = None  # it may be the end of a document, which is learned like any token
    # What stands at the end of a row is not looked at by what stands before, so that no mask has to say so.
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None
    generation = getattr(model, "generation_config", None)
    files = {"config.json": model.config, "generation_config.json": generation}
    ids = {"bos_token_id": layout.begin_id, "eos_token_id": layout.end_id, "pad_token_id": layout.pad_id}
    notices = []
    for name, number in ids.items():
        before = {file: getattr(settings, name, None) for file, settings in files.items() if settings is not None}
        if found := " and ".join(f"{old} in {file}" for file, old in before.items() if old != number):
            notices.append(f"{name} is {number}, as in the rows of this run; it was {found}")
        for settings in (model.config, model.config.get_text_config(decoder=True), generation):
            if settings is not None:
                setattr(settings, name, number)
    if generation is not None:
        generation.max_length = layout.sequence_length
        try:
            generation.validate(strict=True)
        except ValueError as error:
            reason = shortened(error, 300)
            raise UserError(f"generation_config.json of the model contradicts itself ({reason})") from None
    return notices
