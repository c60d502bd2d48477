"""CUDA tensors without a GPU: their shapes, dtypes and devices alone, through whole forward passes.

`FakeTensorMode` needs no kernel, but where torch was built without CUDA some ways from Python to its operators ask for
the device first: indexing, `contiguous` and `~`. They are led to the operators themselves. Gradients cannot be had so.
Where torch was built with CUDA it asks for a driver as well, and where there is none these tests are skipped.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """What is launched: (operator, arguments)."""

    def __init__(self):
        super().__init__()
        self.launched, self.elsewhere = [], []

    def __torch_dispatch__(self, operator, types, arguments=(), more=None):
        result = operator(*arguments, **(more or {}))
        self.launched.append((str(operator), arguments))
        devices = {each.device.type for each in tree_leaves((arguments, more, result)) if torch.is_tensor(each)}
        if devices - {"cuda"}:
            self.elsewhere.append(str(operator))
        return result

    def of(self, name):
        """Arguments of the calls of an operator whose name contains this."""
        return [arguments for operator, arguments in self.launched if name in operator]


class _PastTheGuard(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), more=None):
        if function is torch.Tensor.__getitem__:
            return pick(*arguments)
        if function is torch.Tensor.contiguous:
            return torch.ops.aten.clone(arguments[0], memory_format=torch.contiguous_format)
        if function is torch.Tensor.__invert__:
            return torch.ops.aten.bitwise_not(arguments[0])
        return function(*arguments, **(more or {}))


def pick(tensor, index):
    """tensor[index] without a step in between."""
    index = index if isinstance(index, tuple) else (index,)
    free = tensor.ndim - sum(each is not None and each is not Ellipsis for each in index)
    at, tensors = 0, []
    for each in [part for one in index for part in ([slice(None)] * free if one is Ellipsis else [one])]:
        if isinstance(each, int):
            tensor = tensor.select(at, each)
            continue
        if each is None:
            tensor = tensor.unsqueeze(at)
        elif isinstance(each, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, at, each.start, each.stop, each.step or 1)
        tensors.append(each if torch.is_tensor(each) else None)
        at += 1
    return torch.ops.aten.index.Tensor(tensor, tensors) if any(each is not None for each in tensors) else tensor


@contextlib.contextmanager
def autocast(dtype):
    """As torch.autocast("cuda", dtype), which switches itself off without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def forward(module, batch, dtype):
    """What a module says of a batch, all of it on a GPU in autocast to `dtype`, and what was launched."""
    if torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("runs where torch is built without CUDA, or finds a GPU")
    made = {}

    def on_gpu(tensor):
        return made.setdefault(id(tensor), torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))

    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    with FakeTensorMode(), torch.no_grad(), _PastTheGuard(), autocast(dtype):
        own = {name: on_gpu(tensor) for name, tensor in tensors}
        given = {name: on_gpu(tensor) for name, tensor in batch.items()}
        with Recorder() as recorder:
            return functional_call(module, own, (given,), tie_weights=False), recorder
