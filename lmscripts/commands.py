"""The command `lmscripts`: the scripts by name, and the project's files where there is no clone of it.

`lmscripts run_pretraining ...` becomes `python FILE ...`, so that tracebacks, signals, workers and exit codes are those
of the script. No script is imported.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from lmscripts.errors import UserError, user_errors
from lmscripts.files import project_folder, write_bytes

_OWN = {
    "path": "[NAME ...]: print where a script, recipe, Accelerate config, preset file, sample or page is; or all names",
    "copy": "NAME [TO] [--force]: copy one of these to where you can change it; over a file only with --force",
}
_FOLDERS = ("scripts", "recipes", "accelerate_configs", "sample_data", "docs")
# What to do with a copy of this file, or of one in this folder.
_NEXT = {
    "parameter.json": "lmscripts run_pretraining --parameter_file {copy} ...",
    "cluster.example.yaml": "lmscripts launch --cluster {copy} run_pretraining ...",
    "scripts": "{python} {copy} --help",
    "recipes": "lmscripts run_pretraining --config {copy} ...",
    "accelerate_configs": 'accelerate launch --config_file {copy} "$(lmscripts path run_pretraining)" ...',
}


def main() -> None:
    """Do what the line asks for; a mistake ends as one sentence and exit code 2."""
    name, *words = sys.argv[1:] or ["--help"]
    with user_errors():
        if name == "--version":
            answer = f"lmscripts {metadata.version('lmscripts')}\n"
        elif name in ("-h", "--help") or (name in _OWN and {"-h", "--help"} & {*words}):
            lines = {script: file.open(encoding="utf-8").readline()[3:] for script, file in scripts().items()} | _OWN
            table = "".join(f"  {each:<22} {line.strip()}\n" for each, line in lines.items())
            answer = "usage: lmscripts COMMAND [--help | its options]\n"
            answer += f"version: {metadata.version('lmscripts')}\n\n{table}"
        elif name == "path":
            answer = "".join(f"{each}\n" for each in (map(find, words) if words else _names()))
        elif name == "copy":
            answer = _copy([word for word in words if word != "--force"], force="--force" in words)
        elif file := scripts().get(_plain(name)):
            os.execv(sys.executable, [sys.executable, str(file), *words])
        else:
            raise _unknown(f"command {name}", name, [*scripts(), *_OWN], "lmscripts")
        sys.stdout.write(answer)


def scripts() -> dict[str, Path]:
    """The project's scripts by name."""
    return {file.stem: file for file in sorted((project_folder() / "scripts").glob("*.py"))}


def find(name: str) -> Path:
    """The file that a name means: its path in the project or its own name, with the suffix or without.

    Raises:
        UserError: nothing is called that, or several files are.
    """
    found: dict[str, set[Path]] = {}
    for inside in _names():
        for spelled in (inside, inside.with_suffix(""), inside.name, inside.stem):
            found.setdefault(_plain(str(spelled)), set()).add(inside)
    fitting = sorted(found.get(_plain(name), ()))
    if len(fitting) > 1:
        raise UserError(f"{name} may be {' or '.join(map(str, fitting))}: say which")
    if not fitting:
        raise _unknown(name, name, found, "lmscripts path")
    return project_folder() / fitting[0]


def _names() -> list[Path]:
    """What `find` finds, from the project's folder."""
    root = project_folder()
    files = (file for folder in _FOLDERS for file in sorted((root / folder).rglob("*.*")) if file.suffix != ".pyc")
    return [Path("parameter.json"), *(file.relative_to(root) for file in files)]


def _copy(words: Sequence[str], force: bool) -> str:
    """Copy a file; what to do with the copy."""
    if not 1 <= len(words) <= 2:
        raise UserError("copy takes what to copy and where to: lmscripts copy run_pretraining my_pretraining.py")
    file, target = find(words[0]), Path(*words[1:])
    target = target / file.name if target.is_dir() else target
    if os.path.lexists(target) and not force:
        raise UserError(f"{target} exists: give another name, or --force to write over it")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, file.read_bytes())
    line = _NEXT.get(file.name) or _NEXT.get(file.relative_to(project_folder()).parts[0], "")
    line = line.format(copy=shlex.quote(str(target)), python=shlex.quote(sys.executable))
    return f"{target}\n" + (f"next: {line}\n" if line else "")


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _unknown(what: str, name: str, known: Iterable[str], lists: str) -> UserError:
    from lmscripts.options.yaml_text import nearest  # only here, as it loads the parser of options

    return UserError(f"there is no {what}: {nearest(name, known) or f'`{lists}` lists what there is'}")
