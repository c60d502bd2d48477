"""Going on: the weights, the optimizer and the progress of a checkpoint, of this run or of another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lmscripts import averaging
from lmscripts import checkpoint as checkpoints
from lmscripts.errors import UserError
from lmscripts.fitting import position_table, repeat_positions
from lmscripts.pretrained import adopt_tokenizer
from lmscripts.run_folder import TrainingState, read_state

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.swa_utils import AveragedModel

    from lmscripts.objectives import Objective


def newest_of(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, whole or not; None without any."""
    return next(reversed(checkpoints.list_checkpoints(run_dir)), None)


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
        UserError: names, shapes or tokenizers differ.
    """
    first: dict[int, Tensor] = {}
    for subfolder, model in models.items():
        file = checkpoint / subfolder / "model.safetensors"
        if not file.is_file():
            raise UserError(f"{checkpoint} holds no {subfolder or 'model'}: {file.relative_to(checkpoint)} is missing")
        saved = load_file(file)
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


def restore(
    accelerator: Accelerator,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    optimizer_name: str,
    average: AveragedModel | None,
    source: Path | None,
    carry_over: str | None,
) -> TrainingState:
    """Put optimizer, loss scaler, average and progress back; the weights are loaded before the model is prepared.

    Args:
        accelerator: the running processes.
        objective: the module whose parameters the optimizer steps.
        optimizer: the optimizer.
        optimizer_name: as the options name it.
        average: moving average of the weights, if there is one.
        source: checkpoint; None for a run that begins: nothing is touched and the state is that of a beginning.
        carry_over: of the checkpoint of another run, what is taken: "weights"; "moments": the optimizer's state as
            well, counting steps anew; "everything": also the step, so that the schedule goes on. None for a
            checkpoint of this run.

    Raises:
        UserError: the checkpoint does not fit.
    """
    if source is None or carry_over == "weights":
        return TrainingState()
    facts = read_state(source)
    if carry_over is not None and facts["fixed"].get("optimizer") != optimizer_name:
        raise UserError(
            f"{source} was trained with the optimizer {facts['fixed'].get('optimizer')}, whose moments are no use to "
            f"{optimizer_name}: give --optimizer, or --carry_over weights"
        )
    checkpoints.load_optimizer_state(
        optimizer, objective, source / "optimizer.safetensors", facts["groups"], another_run=carry_over is not None
    )
    if accelerator.scaler is not None and facts["scaler"] is not None:
        accelerator.scaler.load_state_dict(facts["scaler"])
    if carry_over == "moments":
        return TrainingState()
    if average is not None and (source / checkpoints.AVERAGE).is_file():
        averaging.load(average, load_file(source / checkpoints.AVERAGE))
    state = TrainingState(**facts["progress"])
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
