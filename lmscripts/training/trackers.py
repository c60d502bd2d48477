"""Trackers of experiments, by the names that accelerate has for them: checked, begun, gone on with."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import yaml

from lmscripts.errors import UserError, shortened
from lmscripts.files import write_text
from lmscripts.options.yaml_text import listed, nearest

if TYPE_CHECKING:
    from accelerate import Accelerator

_NOTE = "trackers.json"  # in the run's folder: by which id each tracker knows the run
_IDS = {"mlflow": "info.run_id", "aim": "hash", "clearml": "id"}  # where those have it that make it themselves
_PAUSE = 50  # times as long as it took to fail, a tracker is left alone: one that waits for a dead server costs 2 %


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, with a UserError, trackers that accelerate does not know or whose package is not there."""
    if "none" in names and len(names) > 1:
        raise UserError(f"--tracker {' '.join(names)}: none is for no tracker at all, leave it out")
    if not set(names) - {"tensorboard", "none"}:
        return  # the usual case, without the import
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known, there = [*LOGGER_TYPE_TO_CLASS, "none"], ["tensorboard", *map(str, get_available_trackers())]
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise UserError(f"--tracker must be some of {listed(known, 'or')}, not {name}{near and f'; {near}'}")
        # Those that a script registers are of no package; only process 0 shows anything.
        if name in LoggerType.list() and name not in there and os.environ.get("RANK", "0") == "0":
            raise UserError(f"--tracker {name} needs the package {name}: pip install {name}, or choose another")


def begin(accelerator: Accelerator, run_dir: Path, continued: bool) -> None:
    """Start the trackers of the main process, with the options in the run's config.yaml as their config.

    What a tracker raises later is told once and costs no training.

    Args:
        accelerator: the running processes; its `log` and `end_training` reach what is started here.
        run_dir: folder of the run, whose name is that of the run; the TensorBoard files are in it.
        continued: go on in the run that each tracker had.

    Raises:
        UserError: a tracker does not start, in a run that begins; one that goes on does without it.
    """
    if not accelerator.is_main_process or not accelerator.log_with:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    ids, note, told = dict[str, str](), run_dir / _NOTE, set[str]()
    with suppress(OSError, ValueError):
        ids = json.loads(note.read_text(encoding="utf-8")) if continued else {}
    values = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    config = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for name in map(str, accelerator.log_with):
        kind, known = LOGGER_TYPE_TO_CLASS[name], ids.get(name)
        project = values.get("tracker_project") or os.environ.get(f"{name.upper()}_PROJECT") or "lmscripts"
        first = {"tensorboard": name, "aim": run_dir.name}.get(name, project)
        place = [accelerator.logging_dir] if kind.requires_logging_directory else []
        run_id = known or uuid4().hex
        tracker = kind(first, *place, **_of_run(name, run_dir, project, run_id, bool(known)))
        try:
            tracker.start()
            if name == "comet_ml":
                tracker.tracker.set_name(run_dir.name)
            if name != "tensorboard":
                if not (known and name == "mlflow"):  # which takes a value once
                    tracker.store_init_configuration(config)
                ids[name] = attrgetter(_IDS[name])(tracker.tracker) if name in _IDS else run_id
        except Exception as error:
            problem = f"the tracker {name} does not start ({type(error).__name__}: {shortened(error)})"
            if not continued:
                for written in ("config.yaml", "log.jsonl"):  # so that the same line begins again
                    (run_dir / written).unlink(missing_ok=True)
                raise UserError(f"{problem}: set it up, choose another, or --tracker none") from None
            accelerator.print(f"warning: {problem}; the run goes on without it", flush=True)
            continue
        for method in ("log", "finish"):
            setattr(tracker, method, _harmless(name, getattr(tracker, method), accelerator.print, told))
        accelerator.trackers.append(tracker)
    for number, handler in handlers.items():  # of the run, which stops after a step, and not as a tracker would
        signal.signal(number, handler)
    if ids:
        write_text(note, json.dumps(ids) + "\n")


def has_kept(name: str, is_last: bool) -> bool:
    """Whether a tracker has what it was told of a step before a kill, the last of all or not, and is not told again.

    What was told last may not have left the process. TensorBoard may have lost two minutes; wandb and swanlab lose what
    they hold back, but take each step once, whatever they are told.
    """
    return not (is_last or name in ("tensorboard", "wandb", "swanlab"))


def _of_run(name: str, run_dir: Path, project: str, run_id: str, known: bool) -> dict[str, Any]:
    """What a tracker is told of the run besides its project."""
    run = run_dir.name
    given: dict[str, dict[str, Any]] = {
        "wandb": {"id": run_id, "name": run, "resume": "allow", "dir": os.environ.get("WANDB_DIR", str(run_dir))},
        "trackio": {"name": run, "resume": "allow" if known else "never"},
        "mlflow": {"run_name": run, "run_id": run_id if known else None},
        "comet_ml": {"experiment_key": run_id},
        "swanlab": {"id": run_id, "name": run, "resume": "allow", "log_dir": str(run_dir / "swanlog")},
        "aim": {"experiment": project, "run_hash": run_id if known else None},
        "clearml": {"task_name": run, "reuse_last_task_id": known and run_id}
        | ({"continue_last_task": 0} if known else {}),  # without adding to the steps
        "dvclive": {"dir": str(run_dir / "dvclive"), "resume": known},
    }
    return given.get(name, {})


def _harmless(name: str, call: Callable[..., None], say: Callable[..., None], told: set[str]) -> Callable[..., None]:
    """A method of a tracker that raises nothing: what went wrong is said once, and it is left alone for a while."""
    until = 0.0

    def called(*values: Any, **rest: Any) -> None:
        nonlocal until
        if (began := time.monotonic()) < until:
            return
        try:
            call(*values, **rest)
        except Exception as error:
            if name not in told:
                problem = f"{type(error).__name__}: {shortened(error)}"
                say(f"warning: the tracker {name} ({problem}); training goes on, log.jsonl has all", flush=True)
            told.add(name)
            until = time.monotonic() + _PAUSE * (time.monotonic() - began)

    return called
