"""Numbers and options that make no sense, refused before anything is done.

A name that is not among the values is passed over, so that an option can be deleted from a copy of a script.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.files import check_place
from lmscripts.options.yaml_text import Flag, shown


def check_value(flag: Flag, given: Any) -> None:
    """Check what was given for an option against what it is for.

    Raises:
        UserError: a whole number beyond all sense, a place where nothing can be written, or no name.
    """
    for value in given if isinstance(given, tuple) else (given,):
        if isinstance(value, int) and not -flag.most <= value <= flag.most:
            raise UserError(f"--{flag.name} must be at most {flag.most:,}, got {value:,}")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"--{flag.name} {value!r} holds a character that no name can have")
    if flag.writes and given is not None and given != flag.default:
        if not given.strip():
            raise UserError(f"--{flag.name} is empty: give the name of a {flag.writes}")
        if os.environ.get("RANK", "0") == "0":  # the process that writes
            try:
                check_place(Path(given), flag.writes == "folder")
            except UserError as error:
                raise UserError(f"--{flag.name} {error}") from None


def check_numbers(
    values: Mapping[str, Any],
    *,
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    below_one: Iterable[str] = (),
) -> None:
    """Check options by name; None is always fine, and so is a word instead of a number.

    Raises:
        UserError: names the option, its bounds and its value.
    """
    limits: tuple[tuple[Iterable[str], str, Callable[[float], bool]], ...] = (
        (positive, "greater than 0", lambda value: value > 0),
        (not_negative, "at least 0", lambda value: value >= 0),
        (below_one, "at least 0 and less than 1", lambda value: 0 <= value < 1),
    )
    for names, bounds, fits in limits:
        for name in names:
            given = values.get(name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and not isinstance(value, str) and not fits(value):
                    raise UserError(f"--{name} must be {bounds}, got {value}")


def check_useless(values: Mapping[str, Any], why: str, *names: str) -> None:
    """Refuse options that were given although they would have no effect.

    Raises:
        UserError: names the option and why.
    """
    for name in names:
        if values.get(name) not in (None, ()):
            raise UserError(f"--{name} {shown(values[name])} has no effect {why}")


def refuse_given(in_use: Any, given: Mapping[str, Any], why: str) -> None:
    """Refuse options of further dataclasses that were given although the dataclass is not in use.

    Args:
        in_use: an instance whose fields are in use, or the names that are.
        given: name to value, as `lmscripts.options.parsing.Further` has it.
        why: for example "on the objective masked".

    Raises:
        UserError: names the option, its value and why.
    """
    used = vars(in_use) if dataclasses.is_dataclass(in_use) else in_use
    check_useless(given, why, *(name for name in given if name not in used))


def duration_text(seconds: float) -> str:
    """A time in words, in the two units that matter: "45 s", "12 min", "3 h 20 min", "2 days 4 h", "400 days"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 2 * 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{hours // 24} days {hours % 24} h" if hours < 10 * 24 else f"{round(seconds / 86400):,} days"


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_duration(text: str | None) -> float:
    """Seconds of "90", "90m", "11h30m" or "2d"; None is endless.

    Raises:
        UserError: it looks otherwise.
    """
    if text is None:
        return math.inf
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if parts is None or not text.strip():
        raise UserError(f"a duration must look like 90 (seconds), 90m or 11h30m, got {text!r}")
    return float(sum(int(part or 0) * unit for part, unit in zip(parts.groups(), (86400, 3600, 60, 1), strict=True)))
