"""Going on: the weights, the optimizer and the progress of a checkpoint, of this run or of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lmscripts.errors import UserError
from lmscripts.models.finding import AVERAGE, OPTIMIZER, list_checkpoints, read_state
from lmscripts.models.fitting import position_table, repeat_positions
from lmscripts.models.loading import load_model
from lmscripts.models.pretrained import adopt_tokenizer
from lmscripts.training import average as averaging
from lmscripts.training import checkpoint as checkpoints
from lmscripts.training.state import TrainingState

# What config.json of a checkpoint may say otherwise than the model that is to get its weights.
_DROPOUTS = ("dropout", "dropout_prob", "pdrop")  # --hidden_dropout and --attention_dropout may change at any step
_MAY_DIFFER = {
    "transformers_version": "says who wrote the file",
    "architectures": "is written when a model is saved",
    "dtype": "is that of the file; weights are loaded into float32",
    "torch_dtype": "is the older name of dtype",
    "use_cache": "is about writing text; training never keeps a cache",
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

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.swa_utils import AveragedModel


def built_like(run_dir: Path, do_continue: bool, branch_from: str | None) -> Path | None:
    """The checkpoint whose models a run has, whatever it once began with; None for a run that begins.

    Args:
        run_dir: the run's folder.
        do_continue: the newest of its checkpoints, whole or not, if there is one.
        branch_from: else the checkpoint that a decay branch leaves.
    """
    own = list_checkpoints(run_dir) if do_continue else []
    return own[-1] if own else Path(branch_from) if branch_from else None


def check_steps(step: int, stop_step: int) -> None:
    """Refuse a run that begins where it is to end.

    Raises:
        UserError: with --carry_over everything there is no step left to do.
    """
    if step >= stop_step:
        raise UserError(
            f"the run that was carried over is at step {step:,}, and this one ends at step {stop_step:,}: give a "
            "longer --max_steps, or --carry_over moments to count steps anew"
        )


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


def restore(
    accelerator: Accelerator,
    trained: nn.Module,
    optimizer: Optimizer,
    state: TrainingState,
    source: Path | None,
    *,
    average: AveragedModel | None = None,
    carry_over: str | None = None,
    optimizer_name: str = "",
) -> TrainingState:
    """Put optimizer, loss scaler, average and progress back; the weights are loaded before the model is prepared.

    Args:
        accelerator: the running processes.
        trained: the module whose parameters the optimizer steps.
        optimizer: the optimizer.
        state: of a beginning; its `own` part says what the loop keeps besides.
        source: checkpoint; None for a run that begins: nothing is touched.
        average: moving average of the weights, if there is one.
        carry_over: of the checkpoint of another run, what is taken: "weights"; "moments": the optimizer's state as
            well, counting steps anew; "everything": also the step, so that the schedule goes on. None for a
            checkpoint of this run.
        optimizer_name: as the options name it, to be compared with that of another run.

    Returns:
        The state that the run goes on with.

    Raises:
        UserError: the checkpoint does not fit.
    """
    if source is None or carry_over == "weights":
        return state
    facts = read_state(source)
    if carry_over is not None and facts["fixed"].get("optimizer") != optimizer_name:
        raise UserError(
            f"{source} was trained with the optimizer {facts['fixed'].get('optimizer')}, whose moments are no use to "
            f"{optimizer_name}: give --optimizer, or --carry_over weights"
        )
    checkpoints.load_optimizer_state(
        optimizer, trained, source / OPTIMIZER, facts["groups"], another_run=carry_over is not None
    )
    if accelerator.scaler is not None and facts["scaler"] is not None:
        accelerator.scaler.load_state_dict(facts["scaler"])
    if carry_over == "moments":
        return state
    if average is not None and (source / AVERAGE).is_file():
        averaging.load(average, load_file(source / AVERAGE))
    state = TrainingState.from_json(facts["progress"], state.own)
    if carry_over is not None:
        state.evaluated_step, state.window_sums, state.window_counts = -1, {}, {}
    return state


def _repeat_positions(model: PreTrainedModel, saved: dict[str, Tensor]) -> None:
    """Repeat saved position embeddings until they are as many as the model's."""
    place = position_table(model)
    name = f"{place}.weight"
    if place is None or name not in saved:
        return  # none are learned, or the checkpoint is of another family, which is said later
    table: Any = model.get_submodule(place)
    saved[name] = repeat_positions(saved[name], table.num_embeddings, table.padding_idx)
