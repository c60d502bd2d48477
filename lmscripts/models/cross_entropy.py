"""Cross-entropy over a vocabulary without ever holding the logits of a whole batch.

Logits of 8 rows of 1,024 tokens over 50,304 entries are 1.6 GB in fp32, and a plain loss holds them three times. Here a
few hundred positions are taken at a time; their gradient is computed at once, while their logits are there, so that
nothing is computed twice and only the gradients of the hidden states and of the output matrix are kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Most logits held at a time, for at least so many positions. On the CPU they should stay in its cache and in memory
# that the C library keeps: blocks of over 32 MiB go back to the kernel and are cleared anew each time. With fewer
# positions the time would go into adding to the gradient of the output matrix.
# A GPU wants large products: half a GiB of logits in fp32.
LOGITS_AT_ONCE = {"cpu": (1 << 21, 128), "cuda": (1 << 27, 1)}
LOGITS_ON_DEVICE = (1 << 24, 1)  # another one


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    z_loss: float = 0.0,
    positions_at_once: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over N positions: of the loss, of its two parts, and of right predictions.

    Hidden states are (N, H), the output matrix (V, H), the bias (V,), labels (N,) int64 and weights (N,) fp32; where
    one is 0 the label may be any id. `z_loss` is the factor of the square of the logarithm of the partition function,
    which is added to every loss so that logits do not drift (arXiv:2204.02311, section 5). Logits of so many positions
    at once are held in fp32 and once more in the precision of the matrix product; None takes what suits the device.
    Where it is `compiled`, what lies between the products is a kernel or two, which hold nothing in fp32.

    Returns:
        () fp32 each: the sum of weight x (cross-entropy + z_loss x log(Z)^2), which gradients flow through; the sum of
        weight x cross-entropy; that of weight x z_loss x log(Z)^2; the sum of weight where the highest logit is the
        label's, 0 where a gradient is wanted.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if positions_at_once is None:
        most, least = LOGITS_AT_ONCE.get(device, LOGITS_ON_DEVICE)
        positions_at_once = max(least, most // weight.shape[0])
    with_gradients = torch.is_grad_enabled()  # which inside a Function always is off
    settings = (z_loss, dtype, positions_at_once, with_gradients, compiled)
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, weights, *settings)  # type: ignore


def _losses(
    logits: Tensor, bias: Tensor | None, label: Tensor, share: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(n, V) fp32 logits, their logarithmic softmax, (n,) logarithms of the partition function, and the two losses."""
    logits = logits.float()
    if bias is not None:
        logits += bias.float()
    first = logits[:, 0].clone()
    logarithms = torch.log_softmax(logits, -1)  # one pass, where logsumexp takes several
    partition = first - logarithms[:, 0]
    entropy = -logarithms.gather(1, label).squeeze(1)
    return logits, logarithms, partition, (entropy * share).sum(), (z_loss * partition.square() * share).sum()


def _gradient(
    product: Tensor, bias: Tensor | None, label: Tensor, share: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The two losses of (n, V) logits, and of their sum the (n, V) gradient in the same precision, and its (V,) sum."""
    logits, logarithms, partition, plain, penalty = _losses(product, bias, label, share, z_loss)
    gradient = torch.exp(logarithms, out=logits)
    gradient *= (share * (1 + 2 * z_loss * partition))[:, None]
    gradient.scatter_add_(1, label, -share[:, None])
    return plain, penalty, gradient.to(product.dtype), None if bias is None else gradient.sum(0)


@cache
def _compiled_gradient() -> Any:
    return torch.compile(_gradient, dynamic=True)  # for the last positions, which are fewer


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        z_loss: float,
        dtype: torch.dtype,
        chunk: int,
        with_gradients: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plain, penalty, correct = hidden.new_zeros(3, dtype=torch.float32).unbind()
        wants_hidden, wants_weight, wants_bias = (with_gradients and needed for needed in ctx.needs_input_grad[:3])
        for_hidden = torch.empty_like(hidden) if wants_hidden else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        between = _compiled_gradient() if compiled else _gradient
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for begin in range(0, hidden.shape[0], chunk):
                part = slice(begin, begin + chunk)
                states, label, share = hidden[part].to(dtype), labels[part, None], weights[part]
                if not (wants_hidden or wants_weight):
                    logits, _, _, losses, penalties = _losses(states @ matrix.t(), bias, label, share, z_loss)
                    plain, penalty = plain + losses, penalty + penalties
                    correct = correct + ((logits.argmax(-1) == label.squeeze(1)) * share).sum()
                    del logits
                    continue
                losses, penalties, gradient, of_bias = between(states @ matrix.t(), bias, label, share, z_loss)
                plain, penalty = plain + losses, penalty + penalties
                if for_bias is not None and of_bias is not None:
                    for_bias += of_bias
                if for_hidden is not None:
                    for_hidden[part] = gradient @ matrix
                if for_weight is not None and dtype == torch.float32:
                    for_weight.addmm_(gradient.t(), states)
                elif for_weight is not None:
                    for_weight += gradient.t() @ states
                del gradient  # or it would stand beside those of the next positions
        ctx.save_for_backward(for_hidden, for_weight, for_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(plain, penalty, correct)
        return plain + penalty, plain, penalty, correct

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        for_hidden, for_weight, for_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if for_hidden is None else for_hidden * gradient.to(for_hidden.dtype),
            None if for_weight is None else (for_weight.mul_(gradient)).to(weight_dtype),
            None if for_bias is None else (for_bias * gradient).to(bias_dtype),
            *([None] * 7),
        )
