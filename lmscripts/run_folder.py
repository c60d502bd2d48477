"""The folder of a training run: who may write there, where to go on, what is saved, what it ends with."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lmscripts import averaging
from lmscripts import checkpoint as checkpoints
from lmscripts.distributed import sum_over_processes
from lmscripts.errors import UserError
from lmscripts.files import new_folder, write_text
from lmscripts.pretrained import adopt_tokenizer, repeat_positions
from lmscripts.tokenizer_folder import copy_tokenizer
from lmscripts.tracking import versions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.swa_utils import AveragedModel

    from lmscripts.objectives import MaskedLanguageModel, ReplacedTokenDetection

    Objective = MaskedLanguageModel | ReplacedTokenDetection

AVERAGE = "average.safetensors"
_FORMAT = 2


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        evaluated_step: step of the last finished evaluation; -1 for none.
        skipped_steps: steps whose gradient was not finite, so that the weights were left alone.
        nonfinite_streak: how many of them came last in a row.
        real_tokens: text tokens seen.
        window_sums: sums of the objective since the last log line, over all processes.
        window_counts: their counts.
    """

    step: int = 0
    evaluated_step: int = -1
    skipped_steps: int = 0
    nonfinite_streak: int = 0
    real_tokens: float = 0.0
    window_sums: dict[str, float] = field(default_factory=dict)
    window_counts: dict[str, float] = field(default_factory=dict)

    def open_window(self, process: int) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and counts to go on with; the sums belong to the first process, as they are over all of them."""
        return {name: value * (process == 0) for name, value in self.window_sums.items()}, dict(self.window_counts)

    def judge(self, gradient_norm: Tensor | float, has_scaler: bool) -> bool:
        """Whether a step may be applied; the global norm is the same on all processes, so all decide alike.

        A loss scaler (fp16) meets overflows while it looks for its scale, so it is given a longer streak.

        Raises:
            UserError: too many steps in a row had no finite gradient.
        """
        if bool(torch.isfinite(torch.as_tensor(gradient_norm))):
            self.nonfinite_streak = 0
            return True
        self.skipped_steps += 1
        self.nonfinite_streak += 1
        limit = 25 if has_scaler else 5
        if self.nonfinite_streak >= limit:
            raise UserError(
                f"the gradient was not finite in {limit} steps in a row, up to step {self.step + 1}: lower the "
                "learning rate or look at the text; the last checkpoint is from before"
            )
        return False


class RunFolder:
    """A run's folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, tokenizer_dir: Path, sequence_length: int, fixed: dict[str, Any]) -> None:
        """Nothing is touched yet.

        Args:
            path: the folder.
            tokenizer_dir: copied into every checkpoint.
            sequence_length: written down as the tokenizer's longest input.
            fixed: what must not change when the run is continued, name to value.
        """
        self.path = path
        self._tokenizer_dir = tokenizer_dir
        self._sequence_length = sequence_length
        # As it will be read back. The format grows when the same numbers would give other rows or another state.
        self._fixed: dict[str, Any] = json.loads(json.dumps(fixed | {"format": _FORMAT}))
        self._lock: TextIO | None = None

    def claim(self, do_continue: bool, options_yaml: str) -> tuple[Path | None, list[str]]:
        """Take the folder for this run; called by the main process.

        Returns:
            The checkpoint to go on from, and sentences for the user.

        Raises:
            UserError: another process writes there, it holds a run that is not to be continued, or every checkpoint
                is damaged.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {self.path}; wait for it or choose another folder"
            ) from None
        used = any((self.path / name).exists() for name in ("config.yaml", "log.jsonl", "final"))
        if (used or checkpoints.list_checkpoints(self.path)) and not do_continue:
            raise UserError(f"{self.path} holds a run already: add --do_continue to go on, or choose another folder")
        for leftover in [*self.path.glob(".checkpoint-*"), *self.path.glob(".final.new*"), *self.path.glob("..final*")]:
            shutil.rmtree(leftover, ignore_errors=True)  # of a killed process; the lock is ours
        checkpoint, sentences = checkpoints.newest_whole_checkpoint(self.path)
        if checkpoint is None and any(self.path.glob("checkpoint-*.damaged*")):
            raise UserError(f"every checkpoint in {self.path} is damaged; nothing was started. {' '.join(sentences)}")
        if do_continue and checkpoint is None:
            sentences.append(f"{self.path} holds no checkpoint yet: the run starts from the beginning")
        if checkpoint is not None:
            sentences.append(f"going on from {checkpoint}")
            self._check_fixed(checkpoint)
        write_text(self.path / "config.yaml", options_yaml)
        return checkpoint, sentences

    def _check_fixed(self, checkpoint: Path) -> None:
        saved = read_state(checkpoint)["fixed"]
        changed = [name for name in self._fixed if saved.get(name) != self._fixed[name]]
        if changed:
            pairs = "; ".join(f"{name}: {saved.get(name)} then, {self._fixed[name]} now" for name in changed)
            raise UserError(
                f"{checkpoint} cannot be continued with other settings ({pairs}); give the same or start anew"
            )

    def save(
        self,
        accelerator: Accelerator,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        average: AveragedModel | None,
        state: TrainingState,
    ) -> None:
        """Save a checkpoint; every process calls it and learns whether it worked.

        Args:
            accelerator: the running processes.
            objective: the module whose parameters the optimizer steps; its models are saved.
            optimizer: the optimizer.
            average: moving average of the weights, if there is one.
            state: where the run stands.

        Raises:
            UserError: it could not be written; earlier checkpoints are as they were.
        """
        problem: UserError | None = None
        sharded = any(hasattr(parameter, "full_tensor") for parameter in objective.parameters())
        if accelerator.is_main_process or sharded:
            models = {n: (m, checkpoints.model_state(m) if sharded else None) for n, m in objective.models.items()}
            tensors, groups = checkpoints.optimizer_state(optimizer, objective)
        if accelerator.is_main_process and not (self.path / f"checkpoint-{state.step}").exists():
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            facts = {"fixed": self._fixed, "progress": asdict(state), "groups": groups, "scaler": scaler}
            facts |= {"processes": accelerator.num_processes, "versions": versions(), "saved_at": time.time()}

            def write(aside: Path) -> None:
                self._write_tokenizer(aside)
                for subfolder, (model, weights) in models.items():
                    _write_weights(aside / subfolder, model, weights)
                if average is not None:
                    save_file(averaging.state(average), aside / AVERAGE)

            try:
                checkpoints.save_checkpoint(self.path, state.step, write, tensors, facts)
            except UserError as error:
                problem = error
        if sum_over_processes(accelerator, [float(problem is not None)])[0]:
            raise problem or UserError("the main process could not save a checkpoint")

    def _write_tokenizer(self, folder: Path) -> None:
        """The tokenizer as AutoTokenizer loads it, with the length that the model reads."""
        copy_tokenizer(self._tokenizer_dir, folder)
        settings = folder / "tokenizer_config.json"
        facts = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
        facts["model_max_length"] = self._sequence_length
        settings.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def export(
        self, step: int, averages: Mapping[str, PreTrainedModel] | None, describe: Callable[[Path], str]
    ) -> Path:
        """Write final/ from the checkpoint of the last step: model, tokenizer and card. Called by the main process.

        Args:
            step: of the checkpoint.
            averages: models to write instead of those of the checkpoint, by subfolder.
            describe: gives the text of the card, once model and tokenizer are in the folder it is given.
        """
        final, new, old = (self.path / name for name in ("final", ".final.new", ".final.old"))
        shutil.rmtree(new, ignore_errors=True)
        with new_folder(new) as aside:
            training_only = ("optimizer.safetensors", "training_state.json", "checksums.json", AVERAGE)
            ignored = shutil.ignore_patterns(*training_only)
            shutil.copytree(self.path / f"checkpoint-{step}", aside, ignore=ignored, dirs_exist_ok=True)
            for subfolder, model in (averages or {}).items():
                _write_weights(aside / subfolder, model, None)
            (aside / "README.md").write_text(describe(aside), encoding="utf-8")
        if final.exists():  # from an earlier, shorter schedule
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """training_state.json of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))
    return state


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest whole one of a run's folder.

    Raises:
        UserError: it is neither, or it is damaged.
    """
    if checkpoints.list_checkpoints(path):
        whole = [folder for folder in checkpoints.list_checkpoints(path) if checkpoints.find_damage(folder) is None]
        if not whole:
            raise UserError(f"every checkpoint in {path} is damaged")
        return whole[-1]
    if not (path / "training_state.json").is_file():
        raise UserError(f"{path} is no checkpoint and holds none")
    if damage := checkpoints.find_damage(path):
        raise UserError(f"the checkpoint {path} is damaged: {damage}")
    return path


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
    if average is not None and (source / AVERAGE).is_file():
        averaging.load(average, load_file(source / AVERAGE))
    state = TrainingState(**facts["progress"])
    if carry_over is not None:
        state.evaluated_step, state.window_sums, state.window_counts = -1, {}, {}
    return state


def _repeat_positions(model: PreTrainedModel, saved: dict[str, Tensor]) -> None:
    """Repeat saved position embeddings until they are as many as the model's."""
    name = f"{model.base_model_prefix}.embeddings.position_embeddings.weight"
    if name not in saved:
        return  # of another family, which is said later
    table: Any = model.get_submodule(name.removesuffix(".weight"))
    saved[name] = repeat_positions(saved[name], table.num_embeddings, table.padding_idx)


def _write_weights(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor] | None) -> None:
    """A model as the Auto classes load it; `weights` if they had to be gathered."""
    if weights is None:
        model.save_pretrained(folder)
    else:
        tied = set(model.all_tied_weights_keys)
        model.save_pretrained(folder, state_dict={k: v for k, v in weights.items() if k not in tied})
