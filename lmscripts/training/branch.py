"""A decay branch: the options that it takes from the run it leaves, and those that the checkpoint has settled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.options.yaml_text import shown

# Of a run's config.yaml, what belongs to that job and its machines and not to what comes after it.
_ITS_OWN = {
    *("model_dir", "do_continue", "dry_run", "decay_from", "start_from", "carry_over", "stop_at_step", "max_time"),
    *("node_rank", "expected_processes", "process_shares"),
}
# Where one of the first is given, the others are not taken either: they say the same in another way, or more of it.
_TOGETHER: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("dataset_dir", "input_file"), ("validation_fraction", "validation_file", "num_workers")),
    (("precision", "fp16_type"), ()),
)
_PRETRAINED = [f"pretrained_{half}model_name_or_path" for half in ("", "generator_", "discriminator_")]
# Of the settings in a checkpoint, what is no option, or none of the family's: config.yaml has it as it was given.
_LENGTHS = ("max_steps", "epochs")
_NOT_TAKEN = ("format", "token store", "phase_steps", "mask_unit", "mask_probability")


def branch_options(given: Mapping[str, tuple[Any, bool]], read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Options of a run with --decay_from beside those that were given, in the form of `options.parsing.Beneath`.

    Model and text, and all else that was not given, are those of the run: of the settings in the checkpoint, and of
    config.yaml in its folder. The schedule follows from the checkpoint's step; it is one of the options from here on,
    so that what is written down says what was run. A branch that is continued knows all of this itself; the checkpoint
    that it left may be gone.

    Args:
        given: name to value and whether it stands on the line.
        read: gives the options of a file.

    Returns:
        Name to value, settled ones among them; empty without --decay_from.

    Raises:
        UserError: the checkpoint is none or not one of a stable rate, or an option was given that has no effect.
    """
    from lmscripts.models.finding import find_checkpoint, read_state

    decay_from, steps = (given.get(name, (None, False))[0] for name in ("decay_from", "decay_steps"))
    if decay_from is None:
        return {}
    own = _own_checkpoint(given)
    if own is None and steps is None:
        raise UserError(f"--decay_from {decay_from} needs --decay_steps")
    checkpoint = own or find_checkpoint(Path(decay_from))[0]
    state = read_state(checkpoint)
    plan, fixed, step = state.get("schedule"), state["fixed"], state["progress"]["step"]
    if plan is None:
        raise UserError(f"{checkpoint} does not say its schedule: it was saved by an older version")
    if fixed.get("phase_steps"):
        raise UserError(
            f"{checkpoint} is of a run with --phase_steps {shown(tuple(fixed['phase_steps']))}: no branches"
        )
    decay = {"wsd": plan["decay_steps"] or 0, "constant": 0}.get(plan["schedule"])
    if decay is None:
        raise UserError(f"{checkpoint} was trained with --schedule {plan['schedule']}, whose rate is never stable")
    begin, end = plan["warmup_steps"], plan["max_steps"] - decay
    if own is None and not begin <= step <= end:
        raise UserError(f"{checkpoint} is at step {step}, but its rate was stable from step {begin} to {end} only")
    settled = {"schedule": "wsd", "learning_rate": plan["peak"], "warmup_steps": begin}
    settled |= {"epochs": None, "phase_steps": ()}
    settled |= {"max_steps": plan["max_steps"] if own else step + steps, "decay_steps": decay if own else steps}
    file = checkpoint.parent / "config.yaml"
    before = read(str(file)) if file.is_file() else {}
    if file.is_file():
        settled |= {name: before.get(name) for name in _PRETRAINED}
    _refuse_others(given, settled, before)
    settled |= _of_that_job(given, before)
    before |= {name: tuple(v) if isinstance(v, list) else v for name, v in fixed.items() if name not in _NOT_TAKEN}
    left_out = {*given, *_ITS_OWN}
    for names, more in _TOGETHER:
        left_out |= {*names, *more} if left_out & {*names} else set()
    taken = {name: value for name, value in before.items() if name not in left_out}
    return taken | settled | ({} if own else {"decay_from": str(checkpoint)})


def _of_that_job(given: Mapping[str, tuple[Any, bool]], before: Mapping[str, Any]) -> dict[str, None]:
    """Options of the file that say where the run's own job began and ended, if the file is that run's config.yaml."""
    names = ("start_from", "carry_over", "stop_at_step", "max_time")
    of_file = {name: given[name][0] for name in names if name in given and not given[name][1]}
    return {name: None for name, value in of_file.items() if value == before.get(name)}


def _own_checkpoint(given: Mapping[str, tuple[Any, bool]]) -> Path | None:
    """The newest checkpoint of a branch that is continued, be it damaged: its state has to be readable."""
    from lmscripts.models.finding import list_checkpoints, read_state

    run_dir, goes_on = (given.get(name, (None, False))[0] for name in ("model_dir", "do_continue"))
    for checkpoint in reversed(list_checkpoints(Path(run_dir)) if run_dir and goes_on else []):
        try:
            read_state(checkpoint)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            continue  # damaged: which is said where the run takes its folder
        return checkpoint
    return None


def _refuse_others(
    given: Mapping[str, tuple[Any, bool]], settled: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Refuse options that would be ignored; a file may repeat those of the run that is left, and name any length."""
    for name, value in settled.items():
        written, on_line = given.get(name, (None, False))
        of_file = not on_line and (written == before.get(name) or name in _LENGTHS)
        if written not in (None, value) and not of_file:
            there = "this branch has none" if value in (None, ()) else f"in this branch it is {shown(value)}"
            raise UserError(f"--{name} {shown(written)} has no effect with --decay_from: {there}")
