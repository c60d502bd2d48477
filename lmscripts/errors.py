"""Errors that are the user's to solve."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """One sentence for the user: what is wrong, both values, the way out."""


class AllAgree(UserError):
    """What all processes of a run find wrong together, so that none of them has to be named."""


class OfAnother(UserError):
    """What ended another process, repeated by one that cannot go on without it."""


class _Outlet:
    """A stream whose reader may go away, as `head` does, and whose encoding need not know every letter."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._unbroken():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unbroken():
            self._stream.flush()

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # from here on into nothing, also what is flushed when Python ends
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())


WRITER = "writer"  # name of threads whose work is to be done before a process ends
UPLOADER = "uploader"  # of one that works for the moment, which a process does not wait for
_NO_MEMORY = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")


@contextmanager
def user_errors(only_words: bool = False) -> Iterator[None]:
    """Wrap a script's main: what the user can solve ends as one sentence on standard error and exit code 2.

    Covers `UserError`, `OSError` (missing file, permission, full disk; with the file's name), memory that does not
    suffice, an interrupt from the keyboard, and, where one process works, SIGTERM and SIGHUP, so that what was written
    aside is removed. Anything else is a fault of the program and keeps its traceback.

    Args:
        only_words: what is printed are words about the work, not its result: the work goes on where nobody reads them
            any more, and letters that the terminal's encoding lacks are printed as escapes.

    Raises:
        SystemExit: with code 2, or 128 and the signal's number, after the sentence was written.
    """
    code, handlers, of_another = 2, {}, False
    if sys.platform == "win32":
        end_with("lmscripts needs Linux or macOS: on Windows run it in WSL", code)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # under nohup SIGHUP stays ignored
                handlers[number] = signal.signal(number, _interrupt)
    if only_words:
        sys.stdout, sys.stderr = _Outlet(sys.stdout), _Outlet(sys.stderr)
    try:
        yield
        return
    except (Exception, KeyboardInterrupt) as error:
        sentence, is_fault = sentence_of(error)
        if is_fault:
            tell_launcher(sentence)
            raise
        of_another = isinstance(error, OfAnother)
        if isinstance(error, KeyboardInterrupt) and error.args:
            code = 128 + error.args[0]
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is _interrupt:
                signal.signal(number, handler)
    end_with(sentence, code, of_another=of_another)


def sentence_of(error: BaseException) -> tuple[str, bool]:
    """An error in words for the user, and whether it is a fault of the program instead of the user's to solve."""
    if isinstance(error, UserError):
        return str(error), False
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        sentence = f"{' -> '.join(names)}: {reason}" if names else reason
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sentence += "; what is half written is removed, free some space and run the same again"
        return sentence, False
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by {error.args[0].name}" if error.args else "stopped from the keyboard", False
    # Of memory torch raises an error of its own.
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    ):
        return f"not enough memory ({shortened(error)}): give smaller sizes or batches", False
    return f"it ended with {type(error).__name__}: {shortened(error)}", True


def end_with(sentence: str, code: int, *, of_another: bool = False) -> NoReturn:
    """End the process with a sentence on standard error, see `tell_launcher`."""
    # A second line would hide the sentence among the output of other processes.
    one_line = " ".join(sentence.split())
    tell_launcher(one_line, of_another=of_another)
    try:
        sys.stderr.write(f"error: {one_line}\n")
        sys.stderr.flush()
    finally:
        leave(code)


def tell_launcher(sentence: str, *, of_another: bool = False) -> None:
    """Write where the launcher looks why this process ends, in torch's form, so that it can be said last of all.

    Args:
        sentence: the reason.
        of_another: it ends because another process did, whose reason matters more.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"timestamp": time.time(), "of_another": of_another}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": sentence, "extraInfo": more}}), encoding="utf-8")


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number))


def shortened(error: BaseException, most: int = 200) -> str:
    """What another library's exception says, on one line of at most `most` characters."""
    return " ".join(str(error).split())[:most]


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an `OSError` that names no file (a full disk says so while writing) the name of what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def leave(code: int) -> NoReturn:
    """End the process; in a launched world at once, without tearing anything down.

    When the processes of a world end one after the other, the teardown of gloo sometimes aborts or waits for ever for a
    peer that has gone. By then everything is written.
    """
    uploads = any(thread.name == UPLOADER for thread in threading.enumerate())  # Python would wait for its helpers
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or uploads:
        sys.stdout.flush()
        sys.stderr.flush()
        for thread in threading.enumerate():
            if thread.name == WRITER:
                thread.join()
        os._exit(code)
    sys.exit(code)
