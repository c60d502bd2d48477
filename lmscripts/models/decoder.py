"""What decoders share, of any architecture: see `lmscripts.models.families` for what each function is asked.

transformers has more than a hundred. Some know no position ids, attend to a window, scale or cap their logits, have no
SDPA, or room for few positions; what of that does not fit is refused with a sentence, before anything is written (here,
and by `lmscripts.models.checks.check_isolation`). They work for any causal model whose logits are an output matrix
times the last hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GPT2LMHeadModel, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lmscripts.data.packing import Layout
from lmscripts.errors import UserError
from lmscripts.models.attention import AttentionPath, attention_inputs, use_attention
from lmscripts.models.fitting import LENGTHS, lengthen_positions, longest_input, repeat_positions, stacked_layers

_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "local_attention",
    "local_attention_window_len",
    "keep_window_size",
    "attention_chunk_size",
)

layers = stacked_layers


def join(models: Mapping[str, Any]) -> None:
    """A single model shares nothing."""


def narrow(model: Any) -> None:
    """Nothing: every position is predicted."""


def attention(model: Any, path: AttentionPath, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """See `lmscripts.models.attention.attention_inputs`; an explicit mask takes the place of the model's causal one."""
    return attention_inputs(path, batch, dtype, causal=True)


def encode(
    model: Any, input_ids: Tensor, positions: Tensor, attention: dict[str, Any], slots: Tensor | None = None
) -> Tensor:
    """Last hidden states of a decoder.

    Args:
        model: with its head.
        input_ids: (B, T).
        positions: (B, T); restart at 0 in each document.
        attention: from `attention`.
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


def predict(model: Any, hidden: Tensor) -> Tensor:
    """(..., V) logits of (..., H) hidden states."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits


def flops(model: Any, sequence_length: int, slots: int) -> float:
    """Floating-point operations of a training step per position; `slots` is not used, as every position is predicted.

    6 per weight that a position meets and 12 H T per layer for the scores (arXiv:2001.08361, section 2.1). The half of
    the scores that lies in the future is counted, as is usual, although kernels may skip it.
    """
    stack, head = layers(model), model.get_output_embeddings()
    matrices = sum(p.numel() for p in stack.parameters() if p.ndim >= 2) + head.weight.numel()
    return float(6 * matrices + 12 * len(stack) * head.weight.shape[1] * sequence_length)


def causal_class(name: str, config: PretrainedConfig) -> Any:
    """The class that AutoModelForCausalLM takes for a configuration.

    Raises:
        UserError: there is none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name} is a {config.model_type}, of which transformers has no causal language model")
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _rope_types(config: Any) -> set[str]:
    """How rotary positions are scaled; a configuration says it once, or for each type of layers."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return {part["rope_type"] for part in parts if "rope_type" in part}


# ---- rows --------------------------------------------------------------------------------------------------------


def fit(model: Any, name: str, layout: Layout) -> tuple[Any, list[str]]:
    """A decoder with room for the rows of a run.

    Learned positions are repeated (see `models.fitting.lengthen_positions`), computed ones computed further; what
    the model says about rows that fitted before stays the same.

    Args:
        model: any causal model of transformers.
        name: where it comes from.
        layout: of the longest rows.

    Returns:
        The model, or a longer one with its weights, and sentences for the user.

    Raises:
        UserError: it attends to less than a row, or its positions cannot be lengthened.
    """
    text, length = model.config.get_text_config(decoder=True), layout.sequence_length
    # GPT-Neo lays its own window over any mask; without a mask every model does.
    windows = [getattr(text, window, None) for window in _WINDOWS]
    short = [window for window in windows if isinstance(window, int) and not isinstance(window, bool)]
    varlen = model.config._attn_implementation == use_attention("varlen")
    if any(0 < window < length for window in short) and (layout.packing == "isolated" or varlen):
        shortest = min(window for window in short if window > 0)
        raise UserError(f"{name} attends to {shortest} tokens at most: give a shorter --sequence_length")
    before, scaled = longest_input(model.config), _rope_types(model.config) - {"default"}
    original = getattr(text, "original_max_position_embeddings", None)
    original = (getattr(text, "rope_parameters", None) or {}).get("original_max_position_embeddings", original)
    if layout.packing == "isolated" and scaled & {"longrope", "dynamic"} and original and original < length:
        raise UserError(
            f"{name} turns its positions otherwise in rows of more than {original} tokens ({min(scaled)}), whatever "
            f"documents they hold: give a --sequence_length of at most {original}, or --packing contiguous"
        )
    if before is None or length <= before:
        return model, []
    if scaled:
        raise _too_long(name, before, f"they are scaled, {min(scaled)}")
    if isinstance(model, GPT2LMHeadModel):
        lengthen_positions(model, length)
        return model, [_lengthened(before, length)]
    try:
        return _rebuilt(model, name, before, length)
    except UserError:
        raise
    except Exception as error:  # an architecture of any kind
        raise _too_long(name, before, " ".join(str(error).split())[:200]) from error


def _too_long(name: str, before: int, why: str) -> UserError:
    return UserError(
        f"{name} has {before} positions, which cannot be lengthened ({why}): give a --sequence_length of at most "
        f"{before}"
    )


def _lengthened(before: int, length: int) -> str:
    return f"{before:,} position embeddings were lengthened to {length:,}"


def _rebuilt(model: Any, name: str, before: int, length: int) -> tuple[Any, list[str]]:
    """The model anew with a configuration of more positions: so every table and mask that depends on it is right."""
    config, weights = copy.deepcopy(model.config), model.state_dict()
    config._attn_implementation = model.config._attn_implementation
    text = config.get_text_config(decoder=True)
    setattr(text, next(key for key in LENGTHS if isinstance(getattr(text, key, None), int)), length)
    longer: Any = type(model)(config)
    learned = False
    for key, tensor in longer.state_dict().items():
        saved = weights[key]
        if tensor.shape == saved.shape:
            continue
        unused = len(saved) - before  # OPT leaves the first rows empty
        if tensor.ndim != 2 or tensor.shape[1:] != saved.shape[1:] or len(tensor) - unused != length or unused < 0:
            raise _too_long(name, before, f"{key} has the shape {tuple(saved.shape)}")
        weights[key], learned = repeat_positions(saved, len(tensor), unused - 1 if unused else None), True
    longer.load_state_dict(weights)
    longer.generation_config = model.generation_config
    ids = torch.randint(len(model.get_input_embeddings().weight), (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (network.eval()(input_ids=ids, use_cache=False).logits for network in (longer, model))
    if not float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-3:
        raise _too_long(name, before, "with more of them it gives other logits")
    said = f"{name} speaks of {before:,} positions; as they are computed, rows may be longer: config.json says "
    return longer.train(), [_lengthened(before, length) if learned else f"{said}{length:,} now"]


# ---- ids ---------------------------------------------------------------------------------------------------------


def adopt(model: Any, layout: Layout, like: Path | None = None) -> list[str]:
    """Write into the configurations what training uses: the ids around documents, and how long a text may become.

    Without a length a pipeline of transformers writes 256 tokens, which breaks a model of shorter rows.

    Args:
        model: any causal model of transformers.
        layout: of the longest rows.
        like: checkpoint of which the settings for generation are taken.

    Returns:
        Sentences for the user; none where nothing was changed but the length of texts.

    Raises:
        UserError: the settings for generation contradict each other, and transformers would not save them.
    """
    if like is not None and (like / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(like)
    model.get_input_embeddings().padding_idx = None  # it may be the end of a document, which is learned like any token
    generation = getattr(model, "generation_config", None)
    files = {"config.json": model.config, "generation_config.json": generation}
    ids = {"bos_token_id": layout.begin_id, "eos_token_id": layout.end_id, "pad_token_id": layout.pad_id}
    notices = []
    for name, number in ids.items():
        said = {}
        for file, settings in files.items():
            if settings is not None and getattr(settings, name, None) != number:
                said[file] = getattr(settings, name, None)
                setattr(settings, name, number)
        text = model.config.get_text_config(decoder=True)
        setattr(text, name, number)
        if said:
            found = " and ".join(f"{old} in {file}" for file, old in said.items())
            notices.append(f"{name} is {number}, as in the rows of this run; it was {found}")
    if generation is not None:
        generation.max_length = layout.sequence_length
        try:
            generation.validate(strict=True)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"generation_config.json of the model contradicts itself ({reason})") from None
    return notices
