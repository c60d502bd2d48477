"""Checkpoints: whole or absent, checked before they are used, and loadable by transformers as they are.

A checkpoint is a folder of a run, `checkpoint-STEP/` or `snapshots/NAME/`, with what `save_pretrained` writes, the
tokenizer, `optimizer.safetensors`, `training_state.json`, and `checksums.json`, written last. It holds no pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmscripts.errors import UserError
from lmscripts.files import new_folder, remove_leftovers
from lmscripts.models.finding import OPTIMIZER, STATE, find_damage, list_checkpoints, write_checksums
from lmscripts.models.fitting import position_table, repeat_positions
from lmscripts.models.loading import load_model
from lmscripts.models.pretrained import adopt_tokenizer
from lmscripts.training.sharding import part_like

# What config.json of a checkpoint may say otherwise than the model that is to get its weights.
_DROPOUTS = ("dropout", "dropout_prob", "pdrop")  # --hidden_dropout and --attention_dropout may change at any step
_MAY_DIFFER = {
    "transformers_version": "says who wrote the file",
    "architectures": "is written when a model is saved",
    "dtype": "is that of the file; weights are loaded into float32",
    "torch_dtype": "is the older name of dtype",
    "use_cache": "is about writing text; training never keeps a cache",
    "n_ctx": "repeats n_positions, which older versions did not",
    "initializer_range": "is about weights that were never trained",
}
_MAY_DIFFER_FROM_ANOTHER = {
    "n_positions": "learned positions are repeated, computed ones go on",
    "max_position_embeddings": "the same under the name of other families",
    "pad_token_id": "is compared with the tokenizer, and may be put right",
    "bos_token_id": "likewise",
    "eos_token_id": "likewise",
}

# Of a decoder: they come from the tokenizer, whose fingerprint is compared, and change nothing that is computed.
_SET_BY_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id")

# What safetensors calls the types that optimizers keep.
_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"
}  # fmt: skip


def save_checkpoint(
    folder: Path,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    whole: Iterable[Tensor] | None = None,
) -> Path:
    """Write a checkpoint aside, flush it to the disk and rename it. Called by one process.

    Args:
        folder: of the checkpoint, in the run's folder.
        write_model: writes the model and tokenizer files into the folder it is given.
        tensors: optimizer state, from `optimizer_state`.
        state: everything else, as JSON.
        whole: see `save_each`.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are as they were.
    """
    try:
        remove_leftovers(folder)
        with new_folder(folder) as aside:
            write_model(aside)
            save_each(aside / OPTIMIZER, tensors, whole)
            text = json.dumps(state, indent=1, ensure_ascii=False, sort_keys=True)
            (aside / STATE).write_text(text + "\n", encoding="utf-8")
            write_checksums(aside)
    except (UserError, OSError, SafetensorError, RuntimeError) as error:
        try:
            free = f"{shutil.disk_usage(folder.parent).free:,} bytes are free there"
        except OSError:
            free = f"{folder.parent} is gone"
        raise UserError(
            f"could not save {folder} ({error}); {free}. Earlier checkpoints are untouched: "
            "when it can be written again, go on with --do_continue"
        ) from None
    return folder


def save_each(file: Path, tensors: Mapping[str, Tensor], whole: Iterable[Tensor] | None = None) -> None:
    """Write tensors as a safetensors file, of which one at a time is in memory.

    Args:
        file: does not exist yet.
        tensors: by name. They may be sharded: shapes and types are those of the whole ones.
        whole: the same tensors on the CPU and whole, in this order; more may follow. None: they are here as they are.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in zip(tensors, tensors.values() if whole is None else whole, strict=False):
            out.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


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
        aside = set_aside(folder)
        sentences.append(f"{folder.name} is damaged ({damage}): renamed to {aside}, the one before is taken")
    return None, sentences


def set_aside(folder: Path) -> str:
    """Rename what is no whole checkpoint, so that one can be saved under its name; its new name."""
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    folder.rename(aside)
    return aside.name


# ---- weights -----------------------------------------------------------------------------------------------------


def check_architecture(models: Mapping[str, PreTrainedModel], checkpoint: Path, another_run: bool) -> None:
    """Refuse a checkpoint of models that compute something else with weights of the same shapes.

    Heads, activation or epsilon cannot be seen in the weights: they would be loaded, and trained on as another model.

    Args:
        models: as they were built, by subfolder.
        checkpoint: folder of the checkpoint.
        another_run: the checkpoint is of another run, whose positions and special tokens are looked at elsewhere.

    Raises:
        UserError: config.json of the checkpoint differs in anything but `_MAY_DIFFER`.
    """
    for subfolder, model in models.items():
        free = {*_MAY_DIFFER, *(_MAY_DIFFER_FROM_ANOTHER if another_run else ())}
        free |= {*_SET_BY_TEXT} if model.can_generate() else set()
        file = checkpoint / subfolder / "config.json"
        if not file.is_file():
            continue  # the weights are missing as well, which is said where they are loaded
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error})") from None
        now = model.config.to_dict()
        if saved.get("model_type") == now["model_type"]:
            then = type(model.config).from_dict(saved).to_dict()  # what an older version left out is at its default
        else:
            then, now = ({"model_type": config.get("model_type")} for config in (saved, now))
        names = [name for name in now if name not in free and not name.startswith("_") and not name.endswith(_DROPOUTS)]
        if differing := [
            f"{name} is {then[name]} there, {now[name]} here" for name in names if then[name] != now[name]
        ]:
            raise UserError(
                f"{checkpoint} does not fit the model ({file.relative_to(checkpoint)}: {'; '.join(differing)})"
            )


def load_weights(models: Mapping[str, PreTrainedModel], checkpoint: Path, tokenizer: Any = None) -> list[str]:
    """Load a checkpoint's weights into models of the same shape.

    Args:
        models: by subfolder. Tensors that two of them share must be equal in the checkpoint.
        checkpoint: folder of the checkpoint.
        tokenizer: for a checkpoint of another run, the tokenizer of this one, which must fit; models with more
            positions than the checkpoint then repeat its position embeddings.

    Returns:
        Sentences for the user.

    Raises:
        UserError: names, shapes, tokenizers or what config.json says of the model differ.
    """
    check_architecture(models, checkpoint, another_run=tokenizer is not None)
    first: dict[int, Tensor] = {}
    for subfolder, model in models.items():
        file = checkpoint / subfolder / "model.safetensors"
        if not file.is_file():
            raise UserError(f"{checkpoint} holds no {subfolder or 'model'}: {file.relative_to(checkpoint)} is missing")
        saved = _read_weights(model, file)
        if tokenizer is not None:
            _repeat_positions(model, saved)
        try:
            missing, unexpected = model.load_state_dict(saved, strict=False)
        except RuntimeError as error:
            raise UserError(f"{checkpoint} does not fit the model: {str(error).splitlines()[-1].strip()}") from None
        absent = set(missing) - set(model.all_tied_weights_keys)
        if absent or unexpected:
            raise UserError(f"{checkpoint} does not fit the model: {sorted(absent | set(unexpected))[0]}")
        for name, parameter in model.named_parameters():
            if name in saved and not torch.equal(saved[name], first.setdefault(id(parameter), saved[name])):
                raise UserError(
                    f"{checkpoint}: {name} of the {subfolder} is shared, but differs from the other model's"
                )
    return [] if tokenizer is None else adopt_tokenizer([*models.values()], str(checkpoint), tokenizer)


def _read_weights(model: PreTrainedModel, file: Path) -> dict[str, Tensor]:
    """Weights by the names that the model has for them, whatever names its file format has.

    transformers holds the experts of a mixture as one tensor and saves each by itself.
    """
    saved = load_file(file)
    if saved.keys() <= model.state_dict().keys():
        return saved
    try:
        loaded, info = load_model(file.parent, type(model))
    except UserError:  # of weights that cannot be put together
        return saved  # what does not fit is named by whoever compares them
    if info["unexpected_keys"]:
        return saved
    return {name: tensor for name, tensor in loaded.state_dict().items() if name not in model.all_tied_weights_keys}


def _repeat_positions(model: PreTrainedModel, saved: dict[str, Tensor]) -> None:
    """Repeat saved position embeddings until they are as many as the model's."""
    place = position_table(model)
    name = f"{place}.weight"
    if place is None or name not in saved:
        return  # none are learned, or the checkpoint is of another family, which is said later
    table: Any = model.get_submodule(place)
    saved[name] = repeat_positions(saved[name], table.num_embeddings, table.padding_idx)


# ---- the optimizer -----------------------------------------------------------------------------------------------


def check_finite(weights: Mapping[str, Tensor], part: str, step: int) -> None:
    """Refuse weights, or parts of them, that no training comes back from.

    Raises:
        UserError: names one that holds numbers that are not finite.
    """
    for name, tensor in weights.items():
        here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if here.is_floating_point() and not here.isfinite().all():
            raise UserError(
                f"after step {step:,} {name} of the {part or 'model'} holds numbers that are not finite: nothing was "
                "saved. Lower the learning rate; the last checkpoint is from before"
            )


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state by parameter name.

    Returns:
        Tensors named "parameter/key", the optimizer's own, which may be sharded, and the numbers of each parameter
        group (such as its step).
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
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
    saved: dict[str, dict[str, str]] = {}
    tensors: Any = safe_open(file, "pt")
    for entry in tensors.keys():  # noqa: SIM118
        owner, key = entry.rsplit("/", 1)
        saved.setdefault(owner, {})[key] = entry
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(saved) - set(parameters)):
        raise UserError(f"{file} holds state of the parameter {unknown[0]}, which the model has not")
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, entries in saved.items():
        parameter = parameters[name]
        if parameter not in group_of:
            continue  # trained in the other run, frozen in this one
        state = {key: tensors.get_tensor(entry) for key, entry in entries.items()}  # of one parameter at a time
        if another_run:
            state = {key: _fitted(value, parameter) for key, value in state.items()}
        if odd := [key for key, value in state.items() if value.ndim and value.shape != parameter.shape]:
            raise UserError(
                f"{file}: {name}/{odd[0]} has the shape {tuple(state[odd[0]].shape)}, the parameter "
                f"{tuple(parameter.shape)}: it is of another run; take another checkpoint"
            )
        counts_on_device = group_of[parameter].get("fused") or group_of[parameter].get("capturable")
        optimizer.state[parameter] = {
            # Fused kernels want their step counter on the device; for all others that would be a wait in every step.
            key: value if key == "step" and not counts_on_device else part_like(value, parameter)
            for key, value in state.items()
        }
    if len(groups) != len(optimizer.param_groups):
        raise UserError(f"{file} was saved by another optimizer: it has {len(groups)} groups of parameters")
    for group, numbers in zip(optimizer.param_groups, groups, strict=True):
        kept = {key: v for key, v in numbers.items() if key == "step" or not another_run}
        if odd := [key for key, v in kept.items() if not _alike(v, group.get(key, v))]:
            raise UserError(f"{file}: {odd[0]} of a group of parameters is {kept[odd[0]]!r}; take another checkpoint")
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in kept.items()})


def _alike(one: Any, other: Any) -> bool:
    """Whether two plain values are of one kind, lists of one length."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return not isinstance(one, (str, list, dict)) if not isinstance(other, str) else isinstance(one, str)


def _fitted(tensor: Tensor, parameter: Tensor) -> Tensor:
    """State of as many rows as the parameter has: rows that are new begin at 0, rows that are gone are left out."""
    if tensor.ndim != parameter.ndim or tensor.ndim < 2:
        return tensor
    missing = max(0, parameter.shape[0] - tensor.shape[0])
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])[: parameter.shape[0]].contiguous()
