"""Writing files and folders so that a reader sees the whole thing or nothing, whenever the writer is stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from lmscripts.errors import UserError, leave, naming, shortened

Item = TypeVar("Item")

_HOST = re.sub(r"\W", "_", socket.gethostname())


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---- what is read back -------------------------------------------------------------------------------------------


def read_json(path: Path, form: Any, way_out: str) -> Any:
    """What a JSON file of ours holds, which must have a form.

    A form is a type, a tuple of the values that there are, `[form]` for a list, `{key: form}` for an object with at
    least these keys, and `{str: form}` for one with any. Numbers are not negative.

    Raises:
        UserError: the file is no JSON or has another form; it names the file and the place in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({shortened(error)}); {way_out}") from None
    if wrong := _misfit(content, form, ""):
        raise UserError(f"{path} is damaged ({wrong}); {way_out}")
    return content


def _misfit(value: Any, form: Any, place: str) -> str:
    """The first place of a value that has not its form, in words; empty where there is none."""
    if isinstance(form, tuple):
        return "" if value in form else f"{place} is {_short(value)}, not {' or '.join(map(str, form))}"
    kind = form if isinstance(form, type) else type(form)
    fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind in (int, float) and not 0 <= value < float("inf")):
        return f"{place or 'it'} is {_short(value)}, not {_KINDS[kind]}"
    if isinstance(form, list):
        members = [(f"{place}[{number}]", item, form[0]) for number, item in enumerate(value)]
    elif isinstance(form, dict):
        wanted = dict.fromkeys(value, form[str]) if str in form else form
        if lacking := [key for key in wanted if key not in value]:
            return f"{place or 'it'} has no {lacking[0]}"
        members = [(f"{place}.{key}".lstrip("."), value[key], each) for key, each in wanted.items()]
    else:
        return ""
    return next(filter(None, (_misfit(item, each, name) for name, item, each in members)), "")


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_KINDS |= {list: "a list", dict: "an object with keys"}


def _short(value: Any) -> str:
    return json.dumps(value)[:40]


def check_once(note: Path, files: Iterable[Path], check: Callable[[], None]) -> None:
    """Call `check` on files, unless a note says that it went well on these: same size, inode and time of change."""
    seen = [
        (file.name, status.st_size, status.st_ino, status.st_ctime_ns) for file in files for status in [file.stat()]
    ]
    now = json.dumps(seen)
    with suppress(OSError, ValueError):
        if note.read_text(encoding="utf-8") == now:
            return
    check()
    with suppress(OSError, UserError):  # who cannot write it down checks again
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, now)


def user_cache() -> Path:
    """The user's own folder for what can be made again: nobody else can write there, or lay something out for us.

    Raises:
        UserError: it belongs to somebody else.
    """
    place = os.environ.get("XDG_CACHE_HOME", "")
    folders = [Path(place) if os.path.isabs(place) else Path("~/.cache").expanduser()]
    folders = [folders[0] / "lmscripts", Path(tempfile.gettempdir()) / f"lmscripts-{os.getuid()}"]
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and os.access(folder, os.W_OK):
                folder.chmod(0o700)
                return folder
    raise UserError(f"neither {folders[0]} nor {folders[1]} is a folder of yours: set XDG_CACHE_HOME to one")


def project_folder() -> Path:
    """Where scripts, presets and recipes lie: beside the package in a clone, inside it where it was installed."""
    package = Path(__file__).resolve().parent
    shipped = package / "shipped"
    return shipped if shipped.is_dir() else package.parent


def command(script: str) -> str:
    """How a script is called here, for what one says about the next step."""
    return f"lmscripts {script}" if project_folder().name == "shipped" else f"python scripts/{script}.py"


# ---- what is written ---------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, see `new_text`."""
    with new_text(path) as file:
        file.write(text)


@contextmanager
def new_text(path: Path) -> Iterator[TextIO]:
    """Give a text file to write aside, renamed when the block ends well: an earlier one is never half overwritten.

    Of a link the file that it stands for is written. An earlier file keeps its mode, a new one gets the usual one. Half
    characters, which stand for the bytes of names that are not UTF-8, are escaped by a backslash, as JSON does it too.

    Raises:
        UserError: there is something that is no file.
    """
    aside, place, mode = _beside(path)
    try:
        with naming(path), open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def text_output(path: Path | None) -> Iterator[TextIO]:
    """Give standard output to write to, or a file as `new_text` does, with its folder; ends well where nobody reads on.

    Raises:
        SystemExit: with code 0, after the reader of standard output had seen enough.
    """
    if path is None:
        try:
            yield sys.stdout
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            leave(0)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_text(path) as file:
        yield file


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole, as `new_text` does it."""
    aside, place, mode = _beside(path)
    try:
        with naming(path), open(aside, "wb") as file:
            file.write(content)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
        os.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)


def check_place(path: Path, is_folder: bool) -> None:
    """Refuse where a file or folder of this name cannot be made: better said now than after hours.

    Raises:
        UserError: it is something else already, a link to nowhere, or lies where nothing can be written.
    """
    near = path.parent
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # of a name that is too long
        if os.path.lexists(path):
            if is_folder and not path.is_dir():
                raise UserError(f"{path} is {'a file' if path.exists() else 'a link to nowhere'}: give another folder")
            if not is_folder and path.is_dir():
                raise UserError(f"{path} is a folder: give the name of a file")
            if not is_folder and path.exists() and not path.is_file():
                return  # a device
            if is_folder and any(path.iterdir()):
                return  # who reads what is there judges it
        while not os.path.lexists(near):
            near = near.parent
        before = near.stat()
        with tempfile.TemporaryDirectory(dir=near, prefix=f".{path.name[:40]}."):
            pass
        os.utime(near, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been tried
    except OSError as error:
        raise UserError(f"{path} cannot be written, {near}: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Try out what `write_text` will do, and refuse what it cannot: better said now than after hours."""
    try:
        aside = _beside(path)[0]
        aside.touch(exist_ok=False)
        aside.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _beside(path: Path) -> tuple[Path, Path, int | None]:
    """A new name beside a file, the file with links followed, and its mode if there is one."""
    place = Path(os.path.realpath(path))
    # Not the whole name, which may be as long as a name can be.
    aside = place.with_name(f".{place.name[:40]}.{uuid.uuid4().hex[:8]}")
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return aside, place, None
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
        raise UserError(f"{path} is {what}, not a file: give the name of a file")
    return aside, place, stat.S_IMODE(status.st_mode)


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder and the folder entries themselves to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        fsync(path)
    fsync(folder)


def fsync(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_modes(folder: Path) -> None:
    """Set files to 0666 and folders to 0777 less the umask: safetensors writes 0600 whatever the umask is."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    folder.chmod(0o777 & ~umask)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; when the block ends well it is flushed and renamed to `folder`.

    When the block fails the temporary folder is removed. What a killed process left is for `remove_leftovers`.

    Raises:
        UserError: `folder` exists already.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already; nothing was changed. Choose another folder or remove it")
    with folder_aside(folder) as aside:
        yield aside
        give_usual_modes(aside)
        sync_folder(aside)
        os.rename(aside, folder)
        fsync(folder.parent)


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, with a name by which `remove_leftovers` knows it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.aside-{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:6]}")
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """As `new_folder`, but an earlier folder is replaced, by the whole new one, when the block has ended well."""
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    remove_leftovers(new)
    with new_folder(new) as aside:
        yield aside
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def built_once(folder: Path, build: Callable[[], Item], opened: Callable[[], Item]) -> Item:
    """What the first process of each machine builds in a folder, and the others open when it has appeared.

    Called before the processes join, by all of them, so that no collective operation is waiting meanwhile.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            return build()
        except (UserError, OSError):
            if not folder.exists():
                raise
    while not folder.exists():
        time.sleep(0.2)
    return opened()


def remove_leftovers(folder: Path) -> None:
    """Remove what earlier, killed writers of `folder` left beside it.

    Only folders of this machine whose process is gone are touched, judged by the names of both in theirs.
    """
    import psutil

    for path in folder.parent.glob(f".{folder.name}.aside-{_HOST}-*"):
        number = path.name.rsplit("-", 2)[-2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(path, ignore_errors=True)
