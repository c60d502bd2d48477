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
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lmscripts.errors import UserError
from lmscripts.files import new_folder, write_text
from lmscripts.tokenizer.folder import copy_tokenizer
from lmscripts.training import average as averaging
from lmscripts.training import checkpoint as checkpoints
from lmscripts.training.log import versions
from lmscripts.training.processes import sum_over_processes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.swa_utils import AveragedModel

    from lmscripts.objectives import Objective


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
        origin: model or run that the training began with; empty for none.
    """

    step: int = 0
    evaluated_step: int = -1
    skipped_steps: int = 0
    nonfinite_streak: int = 0
    real_tokens: float = 0.0
    window_sums: dict[str, float] = field(default_factory=dict)
    window_counts: dict[str, float] = field(default_factory=dict)
    origin: str = ""

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

    def __init__(
        self, path: Path, tokenizer_dir: Path, sequence_length: int, fixed: dict[str, Any], schedule: dict[str, Any]
    ) -> None:
        """Nothing is touched yet.

        Args:
            path: the folder.
            tokenizer_dir: copied into every checkpoint.
            sequence_length: written down as the tokenizer's longest input.
            fixed: what must not change when the run is continued, name to value.
            schedule: arguments of `lmscripts.training.optim.lr_at`, written down for those who branch off.
        """
        self.path = path
        self._tokenizer_dir = tokenizer_dir
        self._sequence_length = sequence_length
        # As it will be read back. The format grows when the same numbers would give other rows or another state.
        self._fixed: dict[str, Any] = json.loads(json.dumps(fixed | {"format": _FORMAT}))
        self._schedule = schedule
        self._lock: TextIO | None = None

    def claim(
        self, do_continue: bool, start_from: str | None, branch: bool = False
    ) -> tuple[Path | None, bool, list[str]]:
        """Take the folder for this run; called by the main process.

        Args:
            do_continue: go on from the newest whole checkpoint of this run.
            start_from: checkpoint or folder of another run to begin with, where this one has no checkpoint yet.
            branch: this run goes on as that one would have: what must not change there must not change here.

        Returns:
            The checkpoint to go on from, whether it is of this run, and sentences for the user.

        Raises:
            UserError: another process writes there, it holds a run that is not to be continued, every checkpoint is
                damaged, or there is none to start from.
        """
        sentences: list[str] = []
        earlier = None
        if start_from is not None and not (do_continue and checkpoints.list_checkpoints(self.path)):
            earlier, sentences = find_checkpoint(Path(start_from))
            if branch:
                self._check_fixed(earlier)
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
        checkpoint, damaged = checkpoints.newest_whole_checkpoint(self.path)
        if checkpoint is None and any(self.path.glob("checkpoint-*.damaged*")):
            raise UserError(f"every checkpoint in {self.path} is damaged; nothing was started. {' '.join(damaged)}")
        if do_continue and checkpoint is None:
            sentences.append(f"{self.path} holds no checkpoint yet: the run starts from the beginning")
        if checkpoint is not None:
            self._check_fixed(checkpoint)
            return checkpoint, True, [*damaged, f"going on from {checkpoint}"]
        return earlier, False, sentences

    def write_options(self, options_yaml: str) -> None:
        """Keep the options that repeat the run; from here on the folder counts as used."""
        write_text(self.path / "config.yaml", options_yaml)

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
            facts |= {"schedule": self._schedule}
            facts |= {"processes": accelerator.num_processes, "versions": versions(), "saved_at": time.time()}

            def write(aside: Path) -> None:
                for subfolder, (model, weights) in models.items():
                    self._write_tokenizer(aside / subfolder)
                    _write_weights(aside / subfolder, model, weights)
                if average is not None:
                    save_file(averaging.state(average), aside / checkpoints.AVERAGE)

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
            training_only = ("optimizer.safetensors", "training_state.json", "checksums.json", checkpoints.AVERAGE)
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


def find_checkpoint(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint that a path names: itself, or the newest whole one of a run's folder; nothing is changed.

    Returns:
        The checkpoint, and sentences for the user.

    Raises:
        UserError: it is neither, or it is damaged.
    """
    if (path / "training_state.json").is_file():
        if damage := checkpoints.find_damage(path):
            raise UserError(f"the checkpoint {path} is damaged: {damage}")
        return path, [f"starting from {path}", *checkpoints.average_notice(path)]
    checkpoint, sentences = checkpoints.look_for_whole(path)
    if checkpoint is not None:
        return checkpoint, [f"starting from {checkpoint}", *sentences]
    if sentences:
        raise UserError(f"every checkpoint in {path} is damaged: {'; '.join(sentences)}")
    hint = ": give a model's folder as --pretrained_model_name_or_path" if (path / "config.json").is_file() else ""
    raise UserError(f"{path} is no checkpoint and holds none{hint}")


def _write_weights(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor] | None) -> None:
    """A model as the Auto classes load it; `weights` if they had to be gathered."""
    if weights is None:
        model.save_pretrained(folder)
    else:
        tied = set(model.all_tied_weights_keys)
        model.save_pretrained(folder, state_dict={k: v for k, v in weights.items() if k not in tied})
