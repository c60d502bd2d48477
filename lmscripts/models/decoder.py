"""Decoders of any architecture to go on with: made to fit the rows, and proved to keep documents apart.

transformers has more than a hundred. Some know no position ids, attend to a window, scale or cap their logits, have no
SDPA, or room for few positions; what of that does not fit is refused with a sentence, before anything is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2LMHeadModel, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lmscripts.data.packing import Layout, Packing
from lmscripts.errors import UserError
from lmscripts.models import gpt2
from lmscripts.models.attention import AttentionPath, attention_inputs, segment_ends, use_attention
from lmscripts.models.fitting import lengthen_positions, repeat_positions
from lmscripts.models.pretrained import quiet_loading

_LENGTHS = ("max_position_embeddings", "max_seq_len", "context_length")
_WINDOWS: tuple[str, ...] = ("sliding_window", "sliding_window_size", "attention_window_size", "local_attention")
_WINDOWS += ("local_attention_window_len", "keep_window_size", "attention_chunk_size")
_DOCUMENTS = [9, 14]  # tokens of the documents that are compared


# ---- what a configuration says -----------------------------------------------------------------------------------


def attention_paths(architecture: Any) -> tuple[AttentionPath, ...]:
    """The ways to compute attention that a class of transformers has, the fastest first."""
    if not architecture._supports_sdpa:
        return ("eager",)
    return ("varlen", "sdpa", "eager") if architecture._supports_attention_backend else ("sdpa", "eager")


def causal_class(name: str, config: PretrainedConfig) -> Any:
    """The class that AutoModelForCausalLM takes for a configuration.

    Raises:
        UserError: there is none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name} is a {config.model_type}, of which transformers has no causal language model")
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def longest_input(config: Any) -> int | None:
    """Tokens of the longest input that a decoder's configuration speaks of; None where it says none."""
    text = config.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in _LENGTHS]
    return next((length for length in found if isinstance(length, int) and length > 0), None)  # XLNet says -1


def _rope_types(config: Any) -> set[str]:
    """How rotary positions are scaled; a configuration says it once, or for each type of layers."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return {part["rope_type"] for part in parts if "rope_type" in part}


# ---- rows --------------------------------------------------------------------------------------------------------


def fit_rows(model: Any, name: str, layout: Layout) -> tuple[Any, list[str]]:
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
    setattr(text, next(key for key in _LENGTHS if isinstance(getattr(text, key, None), int)), length)
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
    ids = _random_ids(model)
    with torch.no_grad():
        logits = [network.eval()(input_ids=ids, use_cache=False).logits for network in (model, longer)]
    if not _relative_difference(*logits) < 1e-3:
        raise _too_long(name, before, "with more of them it gives other logits")
    said = f"{name} speaks of {before:,} positions; as they are computed, rows may be longer: config.json says "
    return longer.train(), [_lengthened(before, length) if learned else f"{said}{length:,} now"]


# ---- ids ---------------------------------------------------------------------------------------------------------


def set_ids(model: Any, layout: Layout, like: Path | None = None) -> list[str]:
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


# ---- proof -------------------------------------------------------------------------------------------------------


def check_isolation(model: Any, path: AttentionPath, packing: Packing = "isolated") -> None:
    """Prove that a model of any architecture keeps the documents of a row apart and gives its own logits here.

    Position ids and a mask are not understood by all decoders alike (some have no position ids, some overlay a window,
    some scale their logits), so two short documents in one row are compared with each of them alone, and a row that is
    one document with the same given to the model itself. That is done again with an output matrix many times as large:
    a cap on the logits does not show before they are large. Then one document is changed, and the next must not move.

    Args:
        model: any causal model of transformers; it is the same afterwards, to the bit.
        path: how attention is computed.
        packing: documents that share a "contiguous" row are not to be kept apart, which is not looked at.

    Raises:
        UserError: the logits differ, or the model cannot be called this way; it says what the model can.
    """
    problem = _problem(model, path, packing)
    if problem is None:
        return
    paths = attention_paths(type(model)) if type(model)._can_set_attn_implementation() else (path,)
    ways: list[tuple[AttentionPath, Packing]] = [(other, packing) for other in paths if other != path]
    ways += [] if packing == "contiguous" else [(path, "contiguous")]
    if not (right := [way for way in ways if _problem(model, *way) is None]) and packing == "isolated":
        right = [(other, "contiguous") for other in paths if _problem(model, other, "contiguous") is None]
    others = [
        " ".join([f"--attention {other}"] * (other != path) + [f"--packing {rows}"] * (rows != packing))
        for other, rows in right
    ]
    way_out = f"it can be trained with {' or '.join(others)}" if others else "it cannot be trained here"
    raise UserError(f"a {type(model).__name__} {problem}; {way_out}")


@torch.no_grad()
def _problem(model: Any, path: AttentionPath, packing: Packing) -> str | None:
    """Why rows of this packing are not right with a model; None where they are."""
    was_training, implementation = model.training, model.config._attn_implementation
    reference = next(way for way in ("sdpa", "eager") if way in attention_paths(type(model)))
    ids, head = _random_ids(model), model.get_output_embeddings()
    model.eval()
    try:
        with quiet_loading():  # of classes that are built with one way of attention and keep it
            factor = 1.0
            for _ in range(2):
                with _enlarged(head, factor):
                    model.set_attn_implementation(use_attention(path))
                    ours = [_logits(model, path, ids, [sum(_DOCUMENTS)])]
                    ours += [_logits(model, path, ids, _DOCUMENTS)] if packing == "isolated" else []
                    model.set_attn_implementation(reference)  # as anybody would call it
                    whole = model(input_ids=ids, use_cache=False).logits[0]
                    documents = torch.split(ids, _DOCUMENTS, 1)
                    parts = [model(input_ids=document, use_cache=False).logits[0] for document in documents]
                for logits, alone in zip(ours, (whole, torch.cat(parts)), strict=False):
                    if not (difference := _relative_difference(logits, alone)) < 1e-3:
                        if factor > 1:  # as small as they are at first, its logits show nothing of it
                            return "caps or scales its logits, which the loss here does not"
                        return f"gives other logits in packed rows than alone, by {difference:.1e} of the highest"
                factor = max(1.0, 1e4 / float(whole.abs().max()))
            if packing == "isolated" and (leak := _leak(model, path, ids)) > 1e-5:
                return f"lets a document see the one before it in a row, which changes its logits by {leak:.1e}"
    except Exception as error:  # an architecture of any kind
        return f"does not understand packed rows ({' '.join(str(error).split())[:200]})"
    finally:
        with quiet_loading():
            model.set_attn_implementation(implementation)
        model.train(was_training)
    return None


def _leak(model: Any, path: AttentionPath, ids: Tensor) -> float:
    """How far the second document's logits move with the first, which is less than any comparison with it alone shows.

    Both are computed in the same way, so there is no rounding to allow for but that of experts of varying load.
    """
    model.set_attn_implementation(use_attention(path))
    first, changed = _DOCUMENTS[0], ids.clone()
    changed[:, :first] = ids[:, :first].flip(1).roll(1, 1)
    seen = [_logits(model, path, row, _DOCUMENTS)[first:] for row in (ids, changed)]
    return _relative_difference(*seen)


def _logits(model: Any, path: AttentionPath, ids: Tensor, lengths: list[int]) -> Tensor:
    """(T, V) logits as the objective computes them, of a row (1, T) of documents of these lengths."""
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    batch = {"input_ids": ids, "segment_ends": segment_ends(segments, 4)}
    batch |= {"segments": segments} if len(lengths) > 1 else {}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs = attention_inputs(path, batch, model.dtype, causal=True)
    return gpt2.predict(model, gpt2.encode(model, ids, positions, inputs))[0]


@contextmanager
def _enlarged(head: Any, factor: float) -> Iterator[None]:
    """Multiply the output matrix for a while, but not the embeddings that it may be tied to."""
    weight = head.weight
    head.weight = nn.Parameter(weight * factor, requires_grad=False)
    try:
        yield
    finally:
        head.weight = weight


@torch.no_grad()
def drops_something(model: Any, path: AttentionPath) -> bool:
    """Whether a decoder in training mode gives other logits each time; some say a dropout and have none."""
    ids = _random_ids(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (_logits(model, path, ids, [ids.shape[1]]) for _ in range(2))
    return not torch.equal(first, second)


def _random_ids(model: Any) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (1, sum(_DOCUMENTS)), generator=torch.Generator().manual_seed(0))


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
