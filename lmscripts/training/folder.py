"""The folder of a training run: who may write there, where to go on, what is saved, what it ends with."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lmscripts.errors import WRITER, OfAnother, UserError, shortened
from lmscripts.files import remove_leftovers, replaced_folder, write_text
from lmscripts.models.checks import check_classes, check_exports
from lmscripts.models.finding import (
    AVERAGE,
    CHECKSUMS,
    OF_TRAINING,
    OPTIMIZER,
    SNAPSHOTS,
    STATE,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    read_state,
)
from lmscripts.tokenizer.encoder import Encoder
from lmscripts.tokenizer.folder import copy_tokenizer
from lmscripts.training import checkpoint as checkpoints
from lmscripts.training import handing
from lmscripts.training.card import About, fenced, model_card, named, pretraining_card
from lmscripts.training.hub import Hub
from lmscripts.training.joining import is_elastic, job
from lmscripts.training.log import versions
from lmscripts.training.optim import average_state, load_average
from lmscripts.training.peers import progress
from lmscripts.training.processes import check_agreement, from_main, sum_over_processes
from lmscripts.training.sharding import is_sharded, whole_tensors
from lmscripts.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.swa_utils import AveragedModel

__all__ = ["About", "fenced", "model_card", "named", "pretraining_card"]  # beside what is written here
_FORMAT = 2
LOCK = ".lock"  # of the run that is going on; in it, which job of an elastic launcher that is
_ORPHANED = 60  # seconds until a process of this job that lost its launcher has noticed and let go
Beside = Callable[[Path], None]


def built_like(run_dir: Path, do_continue: bool, branch_from: str | None) -> Path | None:
    """The checkpoint whose models a run has, whatever it once began with; None for a run that begins.

    Args:
        run_dir: the run's folder.
        do_continue: the newest of its checkpoints, whole or not, if there is one.
        branch_from: else the checkpoint that a decay branch leaves.
    """
    own = list_checkpoints(handing.run_folder(run_dir, True)) if do_continue else []
    return own[-1] if own else Path(branch_from) if branch_from else None


def carried_from(start_from: str | None) -> Path | None:
    """What a run begins with of another one, as this process can read it; None for nothing."""
    return handing.checkpoint(Path(start_from)) if start_from else None


def is_started_again(run_dir: Path) -> bool:
    """Whether the job of this process began the run in that folder, and an elastic launcher has started it anew."""
    with suppress(OSError):
        return (run_dir / LOCK).read_text(encoding="utf-8") == job() != ""
    return False


def goes_on_by_itself(accelerator: Accelerator, run_dir: Path) -> bool:
    """Whether an elastic launcher has started anew the job that began the run in that folder; every process calls it.

    Raises:
        UserError: that job began it on the disk of a machine that is not the main one any more.
    """
    again = from_main(accelerator, partial(is_started_again, run_dir))
    own = f"{socket.gethostname()}:{run_dir.resolve()}"
    of_main = from_main(accelerator, lambda: own)
    if is_elastic() and (begun := handing.begun_on(own, of_main)) != of_main and not again:
        raise UserError(
            f"the run was begun in {begun}, of which the main process, now {of_main}, sees nothing: start that machine "
            "again and all others with it, or keep the run on a disk that every machine sees"
        )
    return again


def write_nothing(folder: Path) -> None:
    """For models beside which nothing stands."""


def nothing_beside(models: Mapping[str, PreTrainedModel], autos: Mapping[str, str]) -> Beside:
    """As `tokenizer_beside`, of models that need no tokenizer."""
    check_classes(models, autos)
    return write_nothing


def tokenizer_beside(
    tokenizer: Any, models: Mapping[str, PreTrainedModel], autos: Mapping[str, str], sequence_length: int
) -> Beside:
    """What writes a tokenizer beside a model, after both were loaded once as anyone will load them.

    Args:
        tokenizer: from transformers; the files of its folder are held from here on, and it may be gone later.
        models: by the subfolder that each is saved in.
        autos: subfolder -> Auto class that is to load it.
        sequence_length: written down as the tokenizer's longest input.

    Raises:
        UserError: see `lmscripts.models.checks.check_exports`.
    """
    encoder = Encoder(Path(tokenizer.name_or_path), tokenizer)
    with tempfile.TemporaryDirectory() as place:
        copy_tokenizer(encoder.folder, Path(place))
        files = {file.name: file.read_bytes() for file in Path(place).iterdir() if file.is_file()}
    files |= check_exports(models, autos, encoder)
    settings = json.loads(files.get("tokenizer_config.json", b"{}")) | {"model_max_length": sequence_length}
    files["tokenizer_config.json"] = (json.dumps(settings, indent=1, ensure_ascii=False) + "\n").encode()

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return write


class RunFolder:
    """A run's folder.

    Attributes:
        path: the folder; on a machine that does not see the main process' one, a copy of its newest checkpoint.
        source: the checkpoint that the run goes on from, its own or another run's; None for none.
        behind: checkpoints are written by a thread, from a copy on the CPU, while the next steps are computed; None to
            do so where they are computed on another device. Not with sharded weights, which are gathered one by one.
        continued: it is the run's own.
        beside: writes what stands beside each model, such as its tokenizer.
        hub: where checkpoints and the model are uploaded; None for nowhere.
    """

    behind: bool | None = None

    def __init__(
        self,
        path: Path,
        fixed: Mapping[str, Any],
        rate: Callable[[int], float],
        beside: Beside = write_nothing,
        name: Callable[[int], str] = "checkpoint-{}".format,
        hub: Hub | None = None,
    ) -> None:
        """Nothing is touched yet.

        Args:
            path: the folder.
            fixed: what must not change when the run is continued, name to value.
            rate: learning rate of a step, counted from 0. It is written down for those who branch off: a schedule of
                `lmscripts.training.optim` with its numbers, another function by its name.
            beside: writes what stands beside each model, such as its tokenizer.
            name: of the checkpoint after so many steps, as `lmscripts.models.finding.checkpoint_place` knows it.
            hub: where checkpoints and the model are uploaded; None for nowhere.
        """
        self.path, self.hub = path, hub
        # As it will be read back. The format grows when the same numbers would give other rows or another state.
        self._fixed: dict[str, Any] = json.loads(json.dumps({**fixed, "format": _FORMAT}))
        self._rate, self.beside, self._name = rate, beside, name
        self._lock: TextIO | None = None
        self.source: Path | None = None
        self.continued = False
        self._carry_over: str | None = None
        self._writer: threading.Thread | None = None  # on the main process
        self._problem: Exception | None = None  # that it had
        self._place: Path | None = None  # of the checkpoint that nobody waited for yet
        self._copies = list[Tensor]()

    def enter(
        self,
        accelerator: Accelerator,
        models: Mapping[str, PreTrainedModel],
        do_continue: bool,
        *,
        start_from: str | None = None,
        carry_over: str | None = None,
        branch: bool = False,
        tokenizer: Any = None,
    ) -> list[str]:
        """Take the folder, and load the weights that the run goes on with; every process calls it.

        Args:
            accelerator: the running processes.
            models: of this run, by subfolder, not yet prepared.
            do_continue: go on from the newest whole checkpoint of this run.
            start_from: checkpoint or folder of another run to begin with, where this one has no checkpoint yet.
            carry_over: of that checkpoint, what is taken: "weights"; "moments": the optimizer's state as well, counting
                steps anew; "everything": also the step, so that the schedule goes on.
            branch: this run goes on as that one would have: what must not change there must not change here.
            tokenizer: of this run, which has to fit the weights of another.

        Returns:
            Sentences for the user.

        Raises:
            UserError: see `claim` and `lmscripts.training.checkpoint.load_weights`.
        """
        self.path = handing.run_folder(self.path, do_continue)
        claimed = from_main(accelerator, partial(self.claim, do_continue, start_from, branch))
        self.source, self.continued, notices = claimed
        self.source = self.source and handing.checkpoint(self.source, self.path)
        check_agreement({"checkpoint found": self.source is None or self.source.is_dir()})
        self._carry_over = None if self.continued else carry_over
        if self.continued:
            progress["checkpoint"] = self.source
        if self.source is not None:
            notices += checkpoints.load_weights(models, self.source, tokenizer if self._carry_over else None)
        return notices

    def restore(
        self,
        accelerator: Accelerator,
        trained: nn.Module,
        optimizer: Optimizer,
        *,
        own: Any = None,
        average: AveragedModel | None = None,
        optimizer_name: str = "",
    ) -> TrainingState:
        """Put optimizer, loss scaler, average and progress back; the weights were loaded by `enter`.

        Args:
            accelerator: the running processes.
            trained: the module whose parameters the optimizer steps.
            optimizer: the optimizer.
            own: what the loop keeps beside `TrainingState`, as it is at a beginning.
            average: moving average of the weights, if there is one.
            optimizer_name: as the options name it, to be compared with that of another run.

        Returns:
            The state that the run goes on with.

        Raises:
            UserError: the checkpoint does not fit.
        """
        source, another_run = self.source, self._carry_over is not None
        if source is None or self._carry_over == "weights":
            return TrainingState(own=own)
        if another_run:
            facts = _load_moments(source, trained, optimizer, optimizer_name, "or --carry_over weights")
        else:
            facts = read_state(source, "fixed", "progress", "groups")
            checkpoints.load_optimizer_state(optimizer, trained, source / OPTIMIZER, facts["groups"])
        if accelerator.scaler is not None and facts["scaler"] is not None:
            accelerator.scaler.load_state_dict(facts["scaler"])
        if self._carry_over == "moments":
            return TrainingState(own=own)
        if average is not None and (source / AVERAGE).is_file():
            load_average(average, load_file(source / AVERAGE))
        try:
            state = TrainingState.from_json(facts["progress"], own)
        except UserError as error:
            raise UserError(f"{source / STATE} is damaged ({error}); take another checkpoint") from None
        if another_run:
            state.evaluated_step, state.window_sums, state.window_counts = -1, {}, {}
        return state

    def claim(
        self, do_continue: bool, start_from: str | None = None, branch: bool = False
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
        if start_from is not None and not (do_continue and list_checkpoints(self.path)):
            earlier, sentences = find_checkpoint(Path(start_from))
            if branch:
                self._check_fixed(earlier)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("a", encoding="utf-8")
        until = time.monotonic() + (_ORPHANED if is_started_again(self.path) else 0)
        while not _locks(self._lock):
            if time.monotonic() > until:
                raise UserError(f"another process is training in {self.path}; wait for it or choose another folder")
            time.sleep(0.5)
        used = any((self.path / name).exists() for name in ("config.yaml", "log.jsonl", "final"))
        if (used or list_checkpoints(self.path)) and not do_continue:
            raise UserError(f"{self.path} holds a run already: add --do_continue to go on, or choose another folder")
        self._lock.truncate(0)
        self._lock.write(job())
        self._lock.flush()
        for pattern in (".checkpoint-*", f"{SNAPSHOTS}/.*", ".final.new*", "..final*", ".hub-*"):
            for leftover in self.path.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)  # of a killed process; the lock is ours
        checkpoint, damaged = checkpoints.newest_whole_checkpoint(self.path)
        set_aside = [*self.path.glob("checkpoint-*.damaged*"), *self.path.glob(f"{SNAPSHOTS}/*.damaged*")]
        if checkpoint is None and set_aside:
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
        saved = read_state(checkpoint, "fixed")["fixed"]
        # What a checkpoint of an older version does not say was as it is where nobody asks for anything.
        changed = [name for name, value in self._fixed.items() if saved.get(name) != value and (name in saved or value)]
        if changed:
            pairs = "; ".join(
                f"{name}: {_said(saved.get(name))} then, {_said(self._fixed[name])} now" for name in changed
            )
            raise UserError(
                f"{checkpoint} cannot be continued with other settings ({pairs}); give the same or start anew"
            )

    def save(
        self,
        accelerator: Accelerator,
        trained: nn.Module,
        optimizer: Optimizer,
        state: TrainingState,
        average: AveragedModel | None = None,
    ) -> None:
        """Save a checkpoint; every process calls it and learns whether it worked, see also `wait`.

        Args:
            accelerator: the running processes.
            trained: the module whose parameters the optimizer steps; its `models` are saved by their subfolders.
            optimizer: the optimizer.
            state: where the run stands.
            average: moving average of the weights, if there is one.

        Raises:
            UserError: it could not be written, or a weight is no finite number; earlier checkpoints are as they were.
        """
        self.wait(accelerator)
        state.settle()
        models: Mapping[str, PreTrainedModel] = trained.models  # type: ignore[assignment]
        states = {part: _untied(model) for part, model in models.items()}
        sharded, place, problem = is_sharded(trained), self.path / self._name(state.step), None
        behind = (accelerator.device.type != "cpu" if self.behind is None else self.behind) and not sharded
        try:
            for part, of_part in states.items():
                checkpoints.check_finite(of_part, part, state.step)
        except UserError as error:
            problem = error
        _raise_together(accelerator, problem, "the weights of another process are not finite: nothing was saved")
        tensors, groups = checkpoints.optimizer_state(optimizer, trained)
        averages = {} if average is None else average_state(average)
        # What is sharded is gathered while it is written, in this order, in which all processes take part.
        weights = [tensor for of_part in states.values() for tensor in of_part.values()] if sharded or behind else []
        needed = [*weights, *averages.values(), *tensors.values()]
        whole = whole_tensors(needed)
        if accelerator.is_main_process and _is_free(place, accelerator.print):
            whole = self._copied(needed) if behind else whole
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            facts = {"fixed": self._fixed, "progress": state.as_json(), "groups": groups, "scaler": scaler}
            facts |= {"schedule": _in_numbers(self._rate), "learning_rate": self._rate(max(0, state.step - 1))}
            facts |= {"processes": accelerator.num_processes, "versions": versions(), "saved_at": time.time()}

            def write(aside: Path) -> None:
                for part, model in models.items():
                    self.beside(aside / part)
                    own = dict(zip(states[part], whole, strict=False)) if weights else None
                    write_weights(aside / part, model, own)
                if averages:
                    checkpoints.save_each(aside / AVERAGE, averages, whole)

            task = partial(checkpoints.save_checkpoint, place, write, tensors, facts, whole)
            self._do(partial(self._keep, task, f"step {state.step}", accelerator.print), behind)
        if sharded:
            deque(whole, maxlen=0)  # what was not written: of other processes, or after an error
        self._place = place
        if not behind:
            self.wait(accelerator)

    def _keep(self, save: Callable[[], Path], message: str, say: Callable[[str], Any]) -> None:
        place = save()
        if self.hub is not None:
            self.hub.push(place, message, say, self.path)

    def _copied(self, tensors: list[Tensor]) -> Iterator[Tensor]:
        """Tensors as they are now, in memory on the CPU that is kept for the next time, one after another."""
        is_on_gpu = tensors[0].device.type == "cuda"
        if [each.shape for each in self._copies] != [each.shape for each in tensors]:  # at first, or of more parameters
            self._copies = [torch.empty(each.shape, dtype=each.dtype, pin_memory=is_on_gpu) for each in tensors]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=is_on_gpu)
        if is_on_gpu:
            torch.cuda.synchronize()
        return iter(self._copies)

    def _do(self, task: Callable[[], Any], behind: bool) -> None:
        """Do something, or let a thread do it after what it is doing; what goes wrong is raised by `wait`."""
        before = self._writer

        def work() -> None:
            if before is not None:
                before.join()
            try:
                task()
            except Exception as error:
                self._problem = self._problem or error

        if behind:
            self._writer = threading.Thread(target=work, name=WRITER)
            self._writer.start()
        else:
            work()

    def wait(self, accelerator: Accelerator) -> None:
        """Wait until the last checkpoint is written; every process calls it, and learns whether it worked.

        Raises:
            UserError: it could not be written; earlier checkpoints are as they were.
        """
        place, self._place = self._place, None
        if place is None:
            return
        if self._writer is not None:
            self._writer.join()
        problem, self._writer, self._problem = self._problem, None, None
        _raise_together(accelerator, problem, "the main process could not save a checkpoint")
        progress["checkpoint"] = place
        handing.forget_copies()

    def prune(self, keep_last: int, keep_every: int = 0, best: Callable[[dict[str, Any]], Any] | None = None) -> None:
        """Remove old checkpoints, not the newest `keep_last` (at least one) nor those at multiples of `keep_every`.

        It is done once the last checkpoint is written. With `best`, which gives the name of the best weights from what
        a checkpoint says of its progress, those that are there now and that none names any more are removed as well.
        """
        weights = [] if best is None else [*self.path.glob("best-*")]
        task = partial(self._prune, keep_last, keep_every, best, weights)
        if self._writer is None:
            task()
        else:
            self._do(task, behind=True)

    def _prune(
        self, keep_last: int, keep_every: int, best: Callable[[dict[str, Any]], Any] | None, weights: list[Path]
    ) -> None:
        for folder in list_checkpoints(self.path)[: -max(1, keep_last)]:
            step = checkpoint_step(folder) or 0
            if not (keep_every and step % keep_every == 0):
                doomed = folder.with_name(f".{folder.name}.removed")
                with suppress(FileNotFoundError):  # somebody else removed it
                    folder.rename(doomed)  # so that a half removed checkpoint is never found by its name
                shutil.rmtree(doomed, ignore_errors=True)
        if best is not None and weights:
            named = {str(best(read_state(each, "progress")["progress"])) for each in list_checkpoints(self.path)}
            for folder in weights:
                if folder.name.removeprefix("best-") not in named:
                    shutil.rmtree(folder, ignore_errors=True)

    def export(
        self,
        step: int,
        models: Mapping[str, PreTrainedModel] | None,
        describe: Callable[[Path], str],
        average: AveragedModel | None = None,
    ) -> Path:
        """Write final/ from the checkpoint of the last step: model, tokenizer and card. Called by the main process.

        Args:
            step: of the checkpoint.
            models: to write instead of those of the checkpoint, by subfolder.
            describe: gives the text of the card, once model and tokenizer are in the folder it is given.
            average: moving average of the weights, if there is one; what the checkpoint has of it is written instead.
        """
        final, ignored = self.path / "final", shutil.ignore_patterns(*OF_TRAINING)
        with replaced_folder(final) as aside:
            shutil.copytree(self.path / self._name(step), aside, ignore=ignored, dirs_exist_ok=True)
            for part, model in (models or {}).items():
                write_weights(aside / part, model)
            if average is not None:
                trained: Any = average.module
                saved = load_file(self.path / self._name(step) / AVERAGE)
                own = {id(parameter): saved[name] for name, parameter in trained.named_parameters()}
                for part, model in trained.models.items():
                    write_weights(aside / part, model, {n: own.get(id(t), t) for n, t in _untied(model).items()})
            (aside / "README.md").write_text(describe(aside), encoding="utf-8")
        return final

    def publish(self, accelerator: Accelerator, folder: Path | None, step: int) -> None:
        """Wait for uploads, that of the finished model as the last if there is one; every process calls it.

        Raises:
            UserError: the model could not be uploaded; it is kept.
        """
        if (hub := self.hub) is None:
            return
        message = f"the model, after step {step}"
        accelerator.print(f"uploading to {hub.repo}", flush=True)
        if accelerator.is_main_process and folder is not None:
            hub.push(folder, message, lambda _: None, self.path)  # what goes wrong is raised below
        while not from_main(accelerator, partial(hub.is_done, 5.0)):  # no process is silent for long
            pass
        if folder is not None:
            from_main(accelerator, partial(hub.check, folder, message))
            accelerator.print(f"the model is on the Hub, as {hub.repo}")


def _locks(file: TextIO) -> bool:
    import fcntl  # not on Windows, where scripts say so themselves

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def load_moments(path: str, trained: nn.Module, optimizer: Optimizer, optimizer_name: str) -> list[str]:
    """Begin with the optimizer's state of another run, whose weights are not taken; sentences for the user.

    Args:
        path: its folder, or a checkpoint in it.
        trained: the module whose parameters the optimizer steps.
        optimizer: the optimizer.
        optimizer_name: as the options name it.

    Raises:
        UserError: there is no such checkpoint, or it does not fit.
    """
    source, notices = find_checkpoint(handing.checkpoint(Path(path)))
    _load_moments(source, trained, optimizer, optimizer_name, "or begin without its state")
    return [f"the optimizer's state is that of {source}", *notices[1:]]


def _load_moments(
    source: Path, trained: nn.Module, optimizer: Optimizer, optimizer_name: str, way_out: str
) -> dict[str, Any]:
    """Load the optimizer's state of another run; all that its checkpoint says."""
    facts = read_state(source, "fixed", "progress", "groups")
    if facts["fixed"].get("optimizer") != optimizer_name:
        raise UserError(
            f"{source} was trained with the optimizer {facts['fixed'].get('optimizer')}, whose moments are no use to "
            f"{optimizer_name}: give --optimizer, {way_out}"
        )
    checkpoints.load_optimizer_state(optimizer, trained, source / OPTIMIZER, facts["groups"], another_run=True)
    return facts


def _is_free(place: Path, say: Callable[[str], Any]) -> bool:
    """Whether a checkpoint is still to be saved there; what has its name and is none is set aside."""
    if (place / CHECKSUMS).is_file():
        return False  # it was saved at this step before
    if place.exists():
        say(f"warning: {place} is no checkpoint: renamed to {checkpoints.set_aside(place)}")
    return True


def _raise_together(accelerator: Accelerator, problem: Exception | None, elsewhere: str) -> None:
    """Raise a problem that any process has, on every process."""
    if sum_over_processes(accelerator, [float(problem is not None)])[0]:
        raise problem or OfAnother(elsewhere)


def _untied(model: PreTrainedModel) -> dict[str, Any]:
    """The weights of a model, those that are tied under one name."""
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in model.all_tied_weights_keys}


def _said(value: Any) -> str:
    return "not given" if value in (None, "", []) else str(value)


def _in_numbers(rate: Callable[[int], float]) -> dict[str, Any]:
    if is_dataclass(rate) and not isinstance(rate, type):
        return asdict(rate)
    return {"schedule": getattr(rate, "__name__", type(rate).__name__)}


def write_weights(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor] | None = None) -> None:
    """A model as the Auto classes load it; `weights` if its own are to be others, tied ones under one name."""
    given: dict[str, Any] = {} if weights is None else {"state_dict": weights}
    try:
        model.save_pretrained(folder, **given)
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be written ({shortened(error)})") from None


# ---- the best weights so far ---------------------------------------------------------------------------------------


def keep_best(run_dir: Path, name: str, model: PreTrainedModel) -> None:
    """Write weights aside as best-NAME; earlier ones stay until no checkpoint names them, see `RunFolder.prune`."""
    folder = run_dir / f"best-{name}"
    remove_leftovers(folder)
    with replaced_folder(folder) as aside:  # of an epoch that was repeated after a stop
        write_weights(aside, model)


def load_best(models: Mapping[str, PreTrainedModel], run_dir: Path, name: str) -> None:
    """Load what `keep_best` wrote; a UserError where it is not there."""
    checkpoints.load_weights(models, run_dir / f"best-{name}")
