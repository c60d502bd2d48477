"""Checkpoints: whole or absent, checked before they are used, and loadable by transformers as they are.

`RUN/checkpoint-STEP/` holds what `save_pretrained` writes and the tokenizer, `optimizer.safetensors`,
`training_state.json`, and `checksums.json`, written last. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmscripts.errors import UserError
from lmscripts.files import new_folder, remove_leftovers
from lmscripts.models.finding import OPTIMIZER, STATE, find_damage, list_checkpoints, write_checksums


def save_checkpoint(
    run_dir: Path, step: int, write_model: Callable[[Path], None], tensors: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write a checkpoint aside, flush it to the disk and rename it. Called by one process.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        write_model: writes the model and tokenizer files into the folder it is given.
        tensors: optimizer state, from `optimizer_state`.
        state: everything else, as JSON.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are as they were.
    """
    folder = run_dir / f"checkpoint-{step}"
    remove_leftovers(folder)
    try:
        with new_folder(folder) as aside:
            write_model(aside)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / OPTIMIZER)
            text = json.dumps(state, indent=1, ensure_ascii=False, sort_keys=True)
            (aside / STATE).write_text(text + "\n", encoding="utf-8")
            write_checksums(aside)
    except (OSError, SafetensorError, RuntimeError) as error:
        free = shutil.disk_usage(run_dir).free
        raise UserError(
            f"could not save {folder} ({error}); {free:,} bytes are free there. Earlier checkpoints are untouched"
        ) from None
    return folder


def newest_whole_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as they were written.

    Damaged ones are renamed to NAME.damaged, so that their steps can be saved again.

    Returns:
        The folder, None if there is none, and a sentence for each damaged folder passed over.
    """
    sentences: list[str] = []
    for folder in reversed(list_checkpoints(run_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder, sentences
        aside = folder.with_name(f"{folder.name}.damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{folder.name}.damaged-{number}")
        folder.rename(aside)
        sentences.append(f"{folder.name} is damaged ({damage}): renamed to {aside.name}, the one before is taken")
    return None, sentences


def _whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered first if it is sharded (FSDP2); a collective operation in that case."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().to("cpu", copy=True)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights on the CPU, gathered from all processes if they are sharded. Every process must call it."""
    return {name: _whole(tensor) for name, tensor in model.state_dict().items()}


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state by parameter name. Every process must call it.

    Returns:
        Tensors named "parameter/key", and the numbers of each parameter group (such as its step).
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = _whole(value) if isinstance(value, Tensor) else torch.tensor(value)
    numbers = (int, float, bool, str, type(None), list, tuple)
    groups = [{k: v for k, v in g.items() if k != "params" and isinstance(v, numbers)} for g in optimizer.param_groups]
    return tensors, groups


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    file: Path,
    groups: list[dict[str, Any]],
    *,
    another_run: bool = False,
) -> None:
    """Put a saved state back; parameters that had none (never stepped) keep none.

    Args:
        optimizer: of the same kind as the one that was saved.
        model: its parameters.
        file: tensors from `optimizer_state`.
        groups: numbers from `optimizer_state`.
        another_run: the state is that of an earlier run. Parameters may have more or fewer rows than then (position
            embeddings) or be frozen now; of the groups only counted steps are taken, no rates or decays.

    Raises:
        UserError: the file names other parameters than the model has.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in load_file(file).items():
        owner, key = entry.rsplit("/", 1)
        saved.setdefault(owner, {})[key] = tensor
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(saved) - set(parameters)):
        raise UserError(f"{file} holds state of the parameter {unknown[0]}, which the model has not")
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, state in saved.items():
        parameter = parameters[name]
        if parameter not in group_of:
            continue  # trained in the other run, frozen in this one
        if another_run:
            state = {key: _fitted(value, parameter) for key, value in state.items()}
        counts_on_device = group_of[parameter].get("fused") or group_of[parameter].get("capturable")
        optimizer.state[parameter] = {
            # Fused kernels want their step counter on the device; for all others that would be a wait in every step.
            key: value if key == "step" and not counts_on_device else _placed(value, parameter)
            for key, value in state.items()
        }
    if len(groups) != len(optimizer.param_groups):
        raise UserError(f"{file} was saved by another optimizer: it has {len(groups)} groups of parameters")
    for group, numbers in zip(optimizer.param_groups, groups, strict=True):
        kept = {key: v for key, v in numbers.items() if key == "step" or not another_run}
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in kept.items()})


def _fitted(tensor: Tensor, parameter: Tensor) -> Tensor:
    """State of as many rows as the parameter has: rows that are new begin at 0, rows that are gone are left out."""
    if tensor.ndim != parameter.ndim or tensor.ndim < 2:
        return tensor
    missing = max(0, parameter.shape[0] - tensor.shape[0])
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])[: parameter.shape[0]].contiguous()


def _placed(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A saved tensor where its parameter lives, sharded like it when the shapes agree."""
    if hasattr(parameter, "device_mesh") and tensor.shape == parameter.shape:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)
