"""Models that do not fit on one device: weights, gradients and moments divided among the processes (FSDP2).

Accelerate makes plain copies of a sharded config where there is no GPU, and on one it computes losses in the precision
of the weights. So torch's own `fully_shard` is called here, on any device: weights are gathered layer by layer, in half
precision where that was asked for, and gradients are summed in float32. Losses, draws and sums are not touched: our
forward passes compute them in float32, and what they are given is not cast.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from lmscripts.errors import AllAgree, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh

    from lmscripts.objectives.module import Objective

# What a config with FSDP may not ask for, as `accelerate launch` hands it on.
_ONLY = {
    "FSDP_VERSION": ("2", "the first version is not supported"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "no weights stay gathered"),
    "FSDP_OFFLOAD_PARAMS": ("false", "weights stay on the device"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "every process builds the model"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "it is the option --activation_checkpointing"),
}
_OTHERS = {"DEEPSPEED": "DEEPSPEED", "MEGATRON_LM": "MEGATRON_LM", "PARALLELISM_CONFIG": "with a parallelism_config"}


def refuse_others() -> None:
    """Refuse, with a UserError that names it, a way to divide a model that the Accelerate config asks for."""
    for name, said in _OTHERS.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise AllAgree(
                f"distributed_type {said} is not supported: models that do not fit are divided by --shard of "
                "run_pretraining.py, or by an Accelerate config such as accelerate_configs/fsdp2_bf16.yaml"
            )


def asked_of_launcher() -> bool:
    """Whether the Accelerate config asks for a sharded model.

    Raises:
        UserError: it asks for another way to divide a model, or for what is not done here.
    """
    refuse_others()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    odd = [
        f"{name.lower()} must be {value} ({why})"
        for name, (value, why) in _ONLY.items()
        if os.environ.get(name, value).lower() != value
    ]
    if odd:
        raise UserError(f"the Accelerate config: {'; '.join(odd)}")
    return True


@contextmanager
def whole_copies() -> Iterator[None]:
    """Let Accelerate start as for whole copies; a UserError where the config asks for what is not done here."""
    hidden = {"ACCELERATE_USE_FSDP": "true"} if asked_of_launcher() else {}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def shard(trained: Objective, mesh: DeviceMesh, half: torch.dtype | None) -> None:
    """Leave to each process its part of every parameter; in place, every process calls it.

    Each layer is gathered when it computes; all else, such as embeddings and heads, which models may share, as one.
    Nothing stays gathered, so that parameters are parts wherever no forward or backward pass is under way.

    Args:
        trained: models with whole weights in float32, the same on all processes.
        mesh: the processes.
        half: precision in which weights are gathered; None for float32.

    Raises:
        UserError: the Accelerate config names layers that the models do not have.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from lmscripts.models.fitting import stacked_layers

    layers = {id(layer): layer for model in trained.models.values() for layer in stacked_layers(model)}.values()
    known = {type(layer).__name__ for layer in layers}
    named = {name.strip() for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")} - {""}
    if named - known:
        raise UserError(
            f"the Accelerate config names the layers {', '.join(sorted(named))}, but the model has "
            f"{', '.join(sorted(known))}: leave fsdp_transformer_layer_cls_to_wrap out, the layers are found"
        )
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*layers, trained]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of a module are parts."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def whole_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors on the CPU of the first process, whole; on the others nothing of use.

    Sharded ones are gathered one by one: every process has to take equally many, and none holds more than its own parts
    and, the first process, one whole tensor.
    """
    import torch.distributed as dist

    for tensor in tensors:
        if not hasattr(tensor, "full_tensor"):
            yield tensor.detach().to("cpu")
            continue
        local, mesh = tensor.detach().to_local(), tensor.device_mesh  # type: ignore[attr-defined]
        rows, size, is_first = -(-tensor.shape[0] // mesh.size()), mesh.size(), mesh.get_local_rank() == 0
        part = local.new_zeros(rows, *tensor.shape[1:])  # all of one size, as a gather needs them
        part[: len(local)] = local
        whole = local.new_empty(rows * size, *tensor.shape[1:]) if is_first else local
        dist.gather(part, list(whole.chunk(size)) if is_first else None, group=mesh.get_group(), group_dst=0)
        yield whole[: tensor.shape[0]].to("cpu")


def part_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor where a parameter lives, and the same part of it where that is sharded; the whole can be freed."""
    if not hasattr(parameter, "device_mesh") or whole.shape != parameter.shape:
        return whole.to(parameter.device)
    from torch.distributed.tensor import DTensor

    parameter = cast(DTensor, parameter)
    mesh, parts = parameter.device_mesh, whole.chunk(parameter.device_mesh.size())
    local = parts[mesh.get_local_rank()] if mesh.get_local_rank() < len(parts) else whole[:0]
    return DTensor.from_local(
        local.to(parameter.device, copy=True),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
