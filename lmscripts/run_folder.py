"""The folder of a training run: who may write there, where to go on, what is saved, what it ends with."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmscripts import checkpoint as checkpoints
from lmscripts.distributed import sum_over_processes
from lmscripts.errors import UserError
from lmscripts.files import new_folder, write_text
from lmscripts.tracking import versions

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        evaluated_step: step of the last finished evaluation; -1 for none.
        skipped_steps: steps whose gradient was not finite, so that the weights were left alone.
        nonfinite_streak: how many of them came last in a row.
        real_tokens: text tokens seen.
        window_loss: sum of losses since the last log line, over all processes.
        window_targets: targets of those losses.
    """

    step: int = 0
    evaluated_step: int = -1
    skipped_steps: int = 0
    nonfinite_streak: int = 0
    real_tokens: float = 0.0
    window_loss: float = 0.0
    window_targets: float = 0.0

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
        self._fixed = fixed
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
        model: PreTrainedModel,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
    ) -> None:
        """Save a checkpoint; every process calls it and learns whether it worked.

        Args:
            accelerator: the running processes.
            model: what `save_pretrained` is called on.
            trained: the module whose parameters the optimizer steps.
            optimizer: the optimizer.
            state: where the run stands.

        Raises:
            UserError: it could not be written; earlier checkpoints are as they were.
        """
        problem: UserError | None = None
        sharded = any(hasattr(parameter, "full_tensor") for parameter in trained.parameters())
        if accelerator.is_main_process or sharded:
            weights = checkpoints.model_state(model) if sharded else None
            tensors, groups = checkpoints.optimizer_state(optimizer, trained)
        if accelerator.is_main_process and not (self.path / f"checkpoint-{state.step}").exists():
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            facts = {"fixed": self._fixed, "progress": asdict(state), "groups": groups, "scaler": scaler}
            facts |= {"processes": accelerator.num_processes, "versions": versions(), "saved_at": time.time()}
            try:
                checkpoints.save_checkpoint(
                    self.path, state.step, lambda aside: self._write_model(aside, model, weights), tensors, facts
                )
            except UserError as error:
                problem = error
        if sum_over_processes(accelerator, [float(problem is not None)])[0]:
            raise problem or UserError("the main process could not save a checkpoint")

    def _write_model(self, folder: Path, model: PreTrainedModel, weights: dict[str, Tensor] | None) -> None:
        """Model and tokenizer as AutoModel and AutoTokenizer load them."""
        if weights is None:
            model.save_pretrained(folder)
        else:
            tied = set(model.all_tied_weights_keys)
            model.save_pretrained(folder, state_dict={k: v for k, v in weights.items() if k not in tied})
        shutil.copytree(self._tokenizer_dir, folder, dirs_exist_ok=True)
        settings = folder / "tokenizer_config.json"
        facts = json.loads(settings.read_text(encoding="utf-8"))
        facts["model_max_length"] = self._sequence_length
        settings.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def export(self, step: int, describe: Callable[[Path], str]) -> Path:
        """Write final/ from the checkpoint of the last step: model, tokenizer and card. Called by the main process.

        Args:
            step: of the checkpoint.
            describe: gives the text of the card, once model and tokenizer are in the folder it is given.
        """
        final, new, old = (self.path / name for name in ("final", ".final.new", ".final.old"))
        shutil.rmtree(new, ignore_errors=True)
        with new_folder(new) as aside:
            training_only = shutil.ignore_patterns("optimizer.safetensors", "training_state.json", "checksums.json")
            shutil.copytree(self.path / f"checkpoint-{step}", aside, ignore=training_only, dirs_exist_ok=True)
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


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a model of the same shape.

    Raises:
        UserError: names or shapes differ.
    """
    try:
        missing, unexpected = model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    except RuntimeError as error:
        raise UserError(f"{checkpoint} does not fit the model: {str(error).splitlines()[-1].strip()}") from None
    absent = set(missing) - set(model.all_tied_weights_keys)
    if absent or unexpected:
        raise UserError(f"{checkpoint} does not fit the model: {sorted(absent | set(unexpected))[0]}")


def restore(
    accelerator: Accelerator, trained: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None
) -> TrainingState:
    """Put optimizer, loss scaler and progress back; the weights are loaded before the model is prepared.

    Without a checkpoint nothing is touched and the state is that of a beginning.
    """
    if checkpoint is None:
        return TrainingState()
    facts = read_state(checkpoint)
    checkpoints.load_optimizer_state(optimizer, trained, checkpoint / "optimizer.safetensors", facts["groups"])
    if accelerator.scaler is not None and facts["scaler"] is not None:
        accelerator.scaler.load_state_dict(facts["scaler"])
    return TrainingState(**facts["progress"])
