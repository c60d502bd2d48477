"""Attention that keeps the documents of a packed row apart, on every path that transformers offers.

Restarted position ids alone do not isolate documents in BERT, RoBERTa, ELECTRA or ModernBERT, and a 4-D boolean mask
leaks under eager attention. An additive float mask is right under "eager" and "sdpa". On CUDA with fp16 or bf16
"varlen" calls the flash kernel on the concatenated segments and needs no mask at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lmscripts.errors import UserError

AttentionPath = Literal["eager", "sdpa", "varlen"]
PATHS: tuple[AttentionPath, ...] = ("varlen", "sdpa", "eager")  # the fastest first
VARLEN = "lmscripts_varlen"
HALF = ("fp16", "bf16")


def additive_mask(segments: Tensor, dtype: torch.dtype, causal: bool = False, window: int | None = None) -> Tensor:
    """(B, 1, T, T) mask: 0 where query and key lie in the same segment, the lowest number of `dtype` elsewhere.

    Segments are (B, T) integers; empty positions hold -1 and see each other, so no row of the softmax is empty. A
    causal mask hides what comes after the query as well, a window what is farther from it than so many positions.
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

    A batch holds "segments" (B, T) and, for "varlen", "segment_ends", see `lmscripts.data.packing.segment_ends`. One
    without "segments" has one segment per row and no empty position: nothing needs masking, except what a decoder hides
    by itself, whose own causal mask an explicit one takes the place of. `dtype` is that of the queries.
    """
    if path == "varlen":
        ends, length = batch["segment_ends"], batch["input_ids"].shape[1]
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

    `query` is (B, heads, T, d), `key` and `value` have the same shape or fewer heads, each for a group of queries;
    `cu_seq_lens_q` says the segments, see `lmscripts.data.packing.segment_ends`, and `attention_mask` is not looked at.
    `sliding_window` is how many positions a query sees on a side, its own among them. The kernel has no dropout.

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


def attend_at(
    slots: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, drop: Any = None, p: float = 0.0
) -> Tensor:
    """(B * K, heads * d) attention with queries (B, heads, K, d) at some positions only, keys and values at all.

    Slots are (B * K,) flat positions, K of each row in the order of the rows. The mask is additive, (B, 1, T, T) or one
    for all rows; None hides nothing. `drop` is the `lmscripts.models.dropout.RowDropout` of the weights.
    """
    rows, length = key.shape[0], key.shape[2]
    if mask is not None:
        mask = mask.expand(rows, 1, length, length).flatten(0, 2).index_select(0, slots).view(rows, 1, -1, length)
    if drop is None:
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    else:
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        weights = (scores if mask is None else scores + mask).float().softmax(-1).to(query.dtype)
        out = drop.drop(weights, p) @ value
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def attention_paths(architecture: Any) -> tuple[AttentionPath, ...]:
    """The ways to compute attention that a class of transformers has, the fastest first."""
    if not architecture._supports_sdpa:
        return PATHS[2:]
    return PATHS if architecture._supports_attention_backend else PATHS[1:]


def use_attention(path: AttentionPath) -> str:
    """The name to give as `attn_implementation` when a model is built; registers "varlen" with transformers."""
    if path != "varlen":
        return path
    AttentionInterface.register(VARLEN, _varlen_forward)
    return VARLEN


def kernel_lacks(head_sizes: Iterable[int]) -> str:
    """Why the flash kernel cannot compute heads of these sizes on this GPU, in words; empty where it can."""
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"varlen attention needs a GPU of compute capability 8.0 (Ampere), and this one has {major}.{minor}"
    odd = [size for size in head_sizes if size % 8 or size > 256]
    return f"varlen attention needs heads of a multiple of 8, at most 256, and not of {odd[0]}" if odd else ""


def choose_attention(
    wanted: str,
    device: str,
    precision: str,
    attention_dropout: float,
    paths: Sequence[AttentionPath] = PATHS,
    lacking: str = "",
) -> AttentionPath:
    """Resolve "auto": varlen where its kernel runs (CUDA, fp16 or bf16, nothing `lacking`), else sdpa, else eager.

    Of the paths that a model has, the fastest first; a UserError where the wanted one is not among them, or lacks what
    `kernel_lacks` says. Kernels draw no dropout by rows (see `lmscripts.models.dropout`), so that attention dropout
    takes eager.
    """
    if attention_dropout > 0 and wanted not in ("auto", "eager"):
        raise UserError(
            f"--attention {wanted} draws no dropout that is the same for any number of processes: give --attention "
            f"eager, or --attention_dropout 0 instead of {attention_dropout}"
        )
    if wanted == "auto" and attention_dropout > 0:
        return "eager"
    if wanted == "auto":
        fits = device == "cuda" and precision in HALF and not lacking
        return next(path for path in paths if path != "varlen" or fits)
    if wanted not in PATHS:
        raise ValueError(f"attention must be auto, eager, sdpa or varlen, got {wanted}")
    if wanted not in paths:
        raise UserError(f"models of this type cannot compute --attention {wanted}: give {' or '.join(paths)}, or auto")
    if wanted == "varlen" and lacking:
        raise UserError(f"{lacking}: give --attention sdpa, or auto")
    return wanted  # type: ignore[return-value]
