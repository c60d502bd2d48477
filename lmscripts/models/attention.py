"""Attention that keeps the documents of a packed row apart, on every path that transformers offers.

Restarted position ids alone do not isolate documents in BERT, RoBERTa, ELECTRA or ModernBERT, and a 4-D boolean mask
leaks under eager attention. An additive float mask is right under "eager" and "sdpa". On CUDA with fp16 or bf16
"varlen" calls the flash kernel on the concatenated segments and needs no mask at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmscripts.errors import UserError

AttentionPath = Literal["eager", "sdpa", "varlen"]
VARLEN = "lmscripts_varlen"


def additive_mask(segments: Tensor, dtype: torch.dtype, causal: bool = False, window: int | None = None) -> Tensor:
    """(B, 1, T, T) mask: 0 where query and key lie in the same segment, the lowest number of `dtype` elsewhere.

    Args:
        segments: (B, T) integers; empty positions hold -1 and see each other, so no row of the softmax is empty.
        dtype: of the queries.
        causal: hide what comes after the query as well.
        window: hide what is farther than so many positions from the query as well.
    """
    apart = segments[:, None, :, None] != segments[:, None, None, :]
    at = torch.arange(segments.shape[1], device=segments.device)
    if causal:
        apart = apart | (at[:, None] < at[None, :])
    if window is not None:
        apart = apart | ((at[:, None] - at[None, :]).abs() > window)
    mask = torch.zeros(apart.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(apart, torch.finfo(dtype).min)


def attention_inputs(
    path: AttentionPath, batch: dict[str, Tensor], dtype: torch.dtype, causal: bool = False
) -> dict[str, Any]:
    """Keyword arguments for the forward of an encoder or decoder that isolate the segments of `batch`.

    Args:
        path: how attention is computed; for "varlen" the model must have been built by `use_attention`.
        batch: holds "segments" (B, T) and, for "varlen", "segment_ends", see `data.packing.segment_ends`. A batch
            without "segments" has one segment per row and no empty position: nothing needs masking, except what a
            decoder hides by itself.
        dtype: dtype of the queries.
        causal: for a decoder, whose own causal mask an explicit one takes the place of.
    """
    if path == "varlen":
        ends = batch["segment_ends"]
        length = batch["input_ids"].shape[1]
        return {"attention_mask": None, "cu_seq_lens_q": ends, "max_length_q": length}
    if "segments" not in batch:
        return {"attention_mask": None}
    return {"attention_mask": additive_mask(batch["segments"], dtype, causal)}


def _varlen_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over the flash varlen kernel; SDPA with a mask where there is none.

    Args:
        module: a decoder's says `is_causal`.
        query: (B, heads, T, d).
        key: the same, or fewer heads, each for a group of queries.
        value: as key.
        attention_mask: not used; the segments are given by `cu_seq_lens_q`.
        cu_seq_lens_q: see `lmscripts.data.packing.segment_ends`.
        max_length_q: T.
        dropout: must be 0, the kernel has none.
        scaling: factor of the scores.
        sliding_window: positions that a query sees on a side, its own among them; None for all.

    Returns:
        (B, T, heads, d), and None for the weights.
    """
    if dropout:
        raise ValueError(f"varlen attention has no dropout, got {dropout}: set the attention dropout to 0")
    rows, heads, length, width = query.shape
    causal = bool(getattr(module, "is_causal", False))
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x.transpose(1, 2).reshape(rows * length, heads, width) for x in (query, key, value))
        ends, longest = cu_seq_lens_q, max_length_q
        reach = -1 if sliding_window is None else sliding_window - 1
        window = (reach, 0 if causal else reach)
        out: Tensor = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window)  # type: ignore[assignment]
        return out.view(rows, length, heads, width), None
    at = torch.arange(rows * length, device=query.device)
    segments = torch.searchsorted(cu_seq_lens_q, at, right=True, out_int32=True).view(rows, length)
    mask = additive_mask(segments, query.dtype, causal, None if sliding_window is None else sliding_window - 1)
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2), None


def attend_from(
    module: Any, hidden: Tensor, at_slots: Tensor, slots: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> Tensor:
    """Self-attention of BERT's encoder with queries at some positions only; keys and values at all.

    Args:
        module: the self-attention module, with `query`, `key`, `value` and its sizes.
        hidden: (B, T, H).
        at_slots: (B * K, H) the rows of `hidden` at the slots.
        slots: (B * K,) flat positions, K of each row in the order of the rows.
        mask: (B, 1, T, T) additive, or None.
        given: what else `attention_inputs` gave; with segment ends every query is computed, by the varlen kernel.

    Returns:
        (B * K, H).
    """
    if "cu_seq_lens_q" in given:
        everywhere: Tensor = module(hidden, mask, **given)[0]
        return everywhere.flatten(0, 1).index_select(0, slots)
    rows, length, _ = hidden.shape
    heads = (module.num_attention_heads, module.attention_head_size)
    query = module.query(at_slots).view(rows, -1, *heads).transpose(1, 2)
    key, value = (project(hidden).view(rows, length, *heads).transpose(1, 2) for project in (module.key, module.value))
    if mask is not None:
        mask = mask.expand(rows, 1, length, length).flatten(0, 2).index_select(0, slots).view(rows, 1, -1, length)
    dropout = module.dropout.p if module.training else 0.0
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def attention_paths(architecture: Any) -> tuple[AttentionPath, ...]:
    """The ways to compute attention that a class of transformers has, the fastest first."""
    if not architecture._supports_sdpa:
        return ("eager",)
    return ("varlen", "sdpa", "eager") if architecture._supports_attention_backend else ("sdpa", "eager")


def use_attention(path: AttentionPath) -> str:
    """The name to give as `attn_implementation` when a model is built; registers "varlen" with transformers."""
    if path != "varlen":
        return path
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, _varlen_forward)
    return VARLEN


def choose_attention(
    wanted: str,
    device: str,
    precision: str,
    attention_dropout: float,
    paths: Sequence[AttentionPath] = ("varlen", "sdpa", "eager"),
) -> AttentionPath:
    """Resolve "auto": varlen where its kernel runs (CUDA, fp16 or bf16, no attention dropout), else sdpa, else eager.

    Args:
        wanted: "auto", or one of the paths.
        device: "cuda", "cpu".
        precision: "fp16", "bf16", "no".
        attention_dropout: of the attention weights.
        paths: what the model has, the fastest first.

    Raises:
        UserError: the model does not have the wanted one.
    """
    if wanted == "auto":
        fits = device == "cuda" and precision in ("fp16", "bf16") and attention_dropout == 0
        return next(path for path in paths if path != "varlen" or fits)
    if wanted not in ("eager", "sdpa", "varlen"):
        raise ValueError(f"attention must be auto, eager, sdpa or varlen, got {wanted}")
    if wanted not in paths:
        raise UserError(f"models of this type cannot compute --attention {wanted}: give {' or '.join(paths)}, or auto")
    return wanted  # type: ignore[return-value]
