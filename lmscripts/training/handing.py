"""Handing over: machines that share no disk get what only the main process has, its checkpoint or its inputs.

A machine needs nothing where it sees the same files by the same name, or has a copy from the last time. Else one of its
processes receives them over the process group, in pieces, and the others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import psutil

from lmscripts.errors import UserError, naming
from lmscripts.files import file_sha256, replaced_folder, user_cache, write_text
from lmscripts.models.finding import CHECKSUMS, STATE, find_damage, find_saved, list_checkpoints, run_of
from lmscripts.training import joining

_PIECE = 16 << 20  # bytes that are sent at once
_LATE = 120  # seconds after which another machine sees what one has written
_KEPT = 30 * 86400  # seconds that a copy is kept for which nobody has asked again
# A folder that says itself what is in it is compared by this file, and by the sizes of the others.
_SAYS = (CHECKSUMS, "manifest.json")
_RUNS = "runs"  # in the cache
_ROWS = "rows"  # in a store, made anew on each machine

Files = dict[str, list[Any]]  # name -> bytes, and a hash or ""
_handed: dict[Path, Path] = {}  # what was asked for, and where it is here
_copies: set[Path] = set()  # of runs


def run_folder(run_dir: Path, goes_on: bool) -> Path:
    """A run's folder as this process can read it: itself, or a copy of the main process' newest checkpoint in it.

    Args:
        run_dir: the folder, by the name that this process knows.
        goes_on: whether the run is continued; else nothing is read.
    """
    if not goes_on or run_dir in _handed or not _several_machines():
        return _handed.get(run_dir, run_dir)

    def newest(base: Path, hashed: bool) -> Files:
        names = [str(each.relative_to(base)) for each in list_checkpoints(base)[-1:]]
        return _files(base, [*names, "config.yaml"], hashed)

    _handed[run_dir] = _handed_over("the run", run_dir, newest, [run_dir], _RUNS)
    return _handed[run_dir]


def checkpoint(path: Path, run_dir: Path | None = None) -> Path:
    """A checkpoint, or the newest of a run, as this process can read it; what was named, where there is none.

    Args:
        path: as it was named.
        run_dir: where else this process may have it.
    """
    if path in _handed or not _several_machines():
        return _handed.get(path, path)
    found = path if (path / STATE).is_file() else next(reversed(list_checkpoints(path)), path)
    mine = run_of(found)
    base, name = _of_main("the checkpoint", [str(mine), str(found.relative_to(mine))])
    files, here = [name, "config.yaml"], [mine, Path(base), *([run_dir] if run_dir else [])]
    _handed[path] = (
        _handed_over(name, Path(base), lambda place, hashed: _files(place, files, hashed), here, _RUNS) / name
    )
    return _handed[path]


def inputs(given: Any) -> Any:
    """What an option of the main process names, as this process can read it: files, folders, globs.

    Args:
        given: the value of the option here: a path, several, or None.
    """
    own = given if isinstance(given, (tuple, list)) else [given]
    found, is_one = _of_main("the inputs", [list(own), own is not given])
    if not _several_machines():
        return given
    places = [_input(text, own[number] if number < len(own) else text) for number, text in enumerate(found)]
    return places[0] if is_one else tuple(places)


def _input(text: str | None, own: str | None) -> str | None:
    """As `inputs`, of one path: where it is here, if it is none on the main process as it stands."""
    if text is None:
        return None
    place = Path(text).expanduser()
    about = _of_main(text, _named(place))
    if about is None:  # a name on the Hub, or of something that the project has
        return text
    base, names, rest = about
    here = [Path(str(own)).expanduser().parent, Path(base)]

    def look(folder: Path, hashed: bool) -> Files:
        return _files(folder, names, hashed)

    folder = _handed_over(text, Path(base), look, here, "inputs")
    return text if folder == Path(base) else str(folder / rest)


def _named(place: Path) -> tuple[str, list[str], str] | None:
    """A folder, the names of what is meant in it, and what is to be asked for there; None for nothing on the disk."""
    if place.is_dir() and (list_checkpoints(place) or (place / "final").is_dir()):  # of a run what is read
        return str(place.parent), [str(find_saved(place)[0].relative_to(place.parent))], place.name
    if place.exists():
        return str(place.parent), [place.name], place.name
    if not (matches := sorted(glob(str(place), recursive=True))):
        return None
    base = next(each for each in place.parents if not has_magic(str(each)))
    return str(base), [str(Path(match).relative_to(base)) for match in matches], str(place.relative_to(base))


def forget_copies() -> None:
    """Remove what was handed over of runs: from now on this run has a checkpoint of its own."""
    while _copies:
        shutil.rmtree(_copies.pop(), ignore_errors=True)


def begun_on(own: str, of_main: str) -> str:
    """Where the main process had the run when the launcher of this process first started it: a machine and a folder.

    Args:
        own: what this process would have.
        of_main: what the main process has now.
    """
    if (launcher := joining.launcher()) is None:
        return of_main
    key = f"{launcher} {psutil.Process(launcher).create_time()} {own}"
    mark = user_cache() / _RUNS / hashlib.sha256(key.encode()).hexdigest()[:16] / "begun"
    if not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_text(mark, of_main)  # whole, as the other processes of this machine look at the same moment
    return mark.read_text(encoding="utf-8")


def _several_machines() -> bool:
    met = joining.world()
    return met is not None and len(set(met.machines)) > 1


def _of_main(what: str, value: Any) -> Any:
    met = joining.world()
    assert met is not None
    return met.exchange(what, value if met.rank == 0 else None)[0]


def _handed_over(what: str, base: Path, look: Callable[[Path, bool], Files], here: Sequence[Path], kind: str) -> Path:
    """The folder that has files of the main process here; all processes call it.

    Args:
        what: it is, in words.
        base: the folder of the main process.
        look: gives the files in a folder, with their hashes or without.
        here: folders of this process that may have the same.
        kind: of the cache where they are put, if none has.
    """
    met = joining.world()
    assert met is not None
    is_main = met.rank == 0
    origin, wanted = _of_main(what, [f"{met.machines[0]} {base.resolve()}", look(base, True)] if is_main else None)
    key = origin if kind == _RUNS else json.dumps(wanted)  # inputs stay, a run goes on
    copy = user_cache() / kind / hashlib.sha256(key.encode()).hexdigest()[:16]
    sizes = {name: [size, ""] for name, (size, _) in wanted.items()}

    def is_same(place: Path) -> bool:
        # The name of a copy of inputs is a hash of what is in it.
        is_known = is_main or (place == copy and kind != _RUNS)
        return look(place, False) == sizes and (is_known or look(place, True) == wanted)

    found = next(filter(is_same, [base] if is_main else [*here, copy]), None)
    lacking = met.exchange(f"{what} is lacking", _own_cache() if found is None else None)
    receivers = {cache: rank for rank, cache in reversed([*enumerate(lacking)]) if cache}  # the first of each
    if receivers:
        _send(base, wanted, copy if met.rank in receivers.values() else None)
        met.exchange(f"{what} was handed over")
        _wait_for(lambda: found is not None or is_same(copy), copy)
    if kind == _RUNS:
        _copies.add(copy)
    return found or copy


def _own_cache() -> str:
    """What tells the cache of a machine from those of others, which may also be one for all of them."""
    file, name = user_cache() / "name", uuid.uuid4().hex
    with suppress(FileExistsError), file.open("x", encoding="utf-8") as new:
        new.write(name)
    _wait_for(lambda: file.stat().st_size == len(name), file)  # of another process
    return file.read_text(encoding="utf-8")


def _wait_for(is_there: Callable[[], bool], place: Path) -> None:
    """Wait for what another machine has written: a network disk shows it later."""
    until = time.monotonic() + _LATE
    while not is_there():
        if time.monotonic() > until:
            raise UserError(f"what was handed over is not in {place}: set XDG_CACHE_HOME to a disk of this machine")
        time.sleep(0.5)


def _files(base: Path, names: Iterable[str], hashed: bool = True) -> Files:
    """Files and folders of a folder as they are compared; those that are not there are left out."""
    found: Files = {}
    for place in (base / name for name in names):
        files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
        says = {place / name for name in _SAYS}.intersection(files)
        for path in files:
            inside = path.relative_to(place).parts
            if not any(part.startswith(".") for part in inside) and not (says and inside[0] == _ROWS):
                whole = hashed and (path in says or not says)
                found[str(path.relative_to(base))] = [path.stat().st_size, file_sha256(path) if whole else ""]
    return found


def _send(base: Path, wanted: Files, copy: Path | None) -> None:
    """Send files of the main process, maybe none, to all processes, of which those with a `copy` write them down.

    Raises:
        UserError: what came is not what was wanted.
    """
    with ExitStack() as stack:
        aside = None
        if copy is not None:
            _remove_old(copy.parents[1] / _RUNS)
            aside = stack.enter_context(replaced_folder(copy))
        for name, (size, _) in wanted.items():
            _send_file(base / name, aside and aside / name, size)
        folders = [file.parent for file in aside.rglob(CHECKSUMS)] if aside else []
        for damage in filter(None, map(find_damage, folders)):
            raise UserError(f"{base} was damaged when it was handed over ({damage}): start again")


def _send_file(source: Path, target: Path | None, size: int) -> None:
    import torch
    from torch import distributed

    from lmscripts.training.processes import connect

    met, piece = joining.world(), torch.empty(min(_PIECE, size), dtype=torch.uint8)
    assert met is not None
    device = connect(met.timeout)
    with ExitStack() as stack:
        reads = stack.enter_context(source.open("rb")) if met.rank == 0 else None
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(naming(target))
            writes = stack.enter_context(target.open("wb"))
        for first in range(0, size, _PIECE):
            part = piece[: size - first]
            if reads and reads.readinto(part.numpy().data) != len(part):
                raise UserError(f"{source} became shorter while it was handed over: start again")
            sent = part.to(device)
            distributed.broadcast(sent, 0)
            if target is not None:
                writes.write(sent.cpu().numpy().data)


def _remove_old(folder: Path) -> None:
    """Remove copies for which nobody has asked in a month."""
    with suppress(OSError):
        for place in folder.iterdir():
            if time.time() - place.stat().st_mtime > _KEPT:
                shutil.rmtree(place, ignore_errors=True)
