"""Whole commands without the seconds of their imports: a process that has these behind it forks for each command.

The fork runs the script as Python would, as a child of whoever asked for it: spared are the seconds of its imports, and
at its end the half of one in which they are taken down. A launcher that was forked has its processes forked as well.
Commands whose environment counts while torch is imported are started as processes of their own.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

_server = None  # the end of a socket at which requests are made
_one = threading.Lock()
_servers = []  # kept, as Python waits for those that are not
_start = subprocess.Popen._execute_child
_names = inspect.signature(_start)
_OWN = ("HF_", "LANG", "LC_", "MKL_", "OMP_", "PYTHON", "TRANSFORMERS_")  # what an import looks at
_ANY = ("PYTHONPATH", "PYTHONUNBUFFERED")  # which the fork sees to itself
_LAUNCHERS = ("accelerate.commands.accelerate_cli", "accelerate.commands.launch", "torch.distributed.run")
_LAUNCHERS += ("torch.distributed.launch", "lmscripts.cluster.agent", "launch.py")


def _fork(self, *given):
    """In the place of what starts the child of a `subprocess.Popen`."""
    global _server
    asked = _names.bind(self, *given).arguments
    words = [os.fspath(word) for word in asked["args"]] if isinstance(asked["args"], (list, tuple)) else []
    env = dict(os.environ if asked["env"] is None else asked["env"])
    script = [word for word in words[1:3] if word != "-u"][:1]
    settings = [{n: v for n, v in each.items() if n.startswith(_OWN) and n not in _ANY} for each in (env, os.environ)]
    forks = words[:1] in (["python"], [sys.executable]) and script and script[0].endswith(("-c", "-m", ".py"))
    if not forks or settings[0] != settings[1] or asked["preexec_fn"] or asked["pass_fds"]:
        return _start(self, *given)
    request = {"argv": words[1:], "cwd": os.fspath(asked["cwd"] or os.getcwd()), "env": env}
    request["session"] = asked["start_new_session"]
    files = [asked[name] if asked[name] >= 0 else n for n, name in enumerate(("p2cread", "c2pwrite", "errwrite"))]
    with _one:
        if _server is None:
            _server = _start_server()
        _adopt(1)
        try:
            socket.send_fds(_server, [json.dumps(request).encode()], files)
            self.pid = int(_server.recv(20))
        finally:
            _adopt(0)
    self._child_created = True
    self._close_pipe_fds(*(asked[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))
    return None


class Popen(subprocess.Popen):
    """A `subprocess.Popen` whose Python is forked where it can be."""

    _execute_child = _fork


def run(command, cwd=None, env=None, timeout=None, input=""):
    """As `subprocess.run(..., capture_output=True)` of Python, with text unless the input is bytes."""

    def decoded(data):
        return data if isinstance(input, bytes) else data.decode(errors="surrogateescape")

    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(input if isinstance(input, bytes) else input.encode())
        given.seek(0)
        late = False
        with Popen(command, cwd=cwd, env=env, stdin=given, stdout=out, stderr=err) as process:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                late = True
                process.kill()
        for file in (out, err):
            file.seek(0)
        texts = [decoded(file.read()) for file in (out, err)]
    if late:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, process.returncode, *texts)


def _start_server():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # The blanks are room for the words of a fork, see `_rename`.
        command = [sys.executable, __file__, str(theirs.fileno()), " " * 4000]
        _servers.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL))
    return ours


def _adopt(whether):
    """Let a process whose parent ends become a child of this one (PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(36, whether, 0, 0, 0)


def _serve(connection):
    """Fork for each request; returns in the fork, with what it is to run."""
    while True:
        request, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not request:
            os._exit(0)
        read, write = os.pipe()
        # By one that ends at once, so that the fork becomes a child of whoever asked.
        if (between := os.fork()) == 0:
            between = os.getpid()
            if child := os.fork():
                os.write(write, str(child).encode())
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.001)
            connection.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
            for file in (*files, read, write):
                os.close(file)
            return json.loads(request)
        os.waitpid(between, 0)
        connection.send(os.read(read, 20))
        for file in (*files, read, write):
            os.close(file)


# What every script that computes imports, and launchers; nothing of this project, and nothing that starts a thread.
_PRELOADED = ("torch._dynamo", "accelerate.commands.launch", "transformers.models.auto.modeling_auto")
_PRELOADED += ("torch.distributed.launcher.api", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "jsonargparse")
_MODELS = ("bert", "electra", "gpt2", "roberta")


def _preload():
    for name in (*_PRELOADED, *(f"transformers.models.{model}.modeling_{model}" for model in _MODELS)):
        importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):  # a table that is made when a model is first saved
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("bert")


def _rename(words):
    """Lay other words where the kernel has those of this process: a script looks for its launcher by them."""
    start, end = map(int, Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[45:47])
    line = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


def _run(asked):
    """Become what is asked for."""
    global _server
    words = asked["argv"]
    _rename([sys.executable, *words])
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)  # ignored where the tests run in the background, or under nohup
    if asked["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    random.seed()
    if words[0] == "-u" or "PYTHONUNBUFFERED" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    words = words[1:] if words[0] == "-u" else words
    if any(word.endswith(_LAUNCHERS) for word in words[:2]):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            _run(_serve(theirs))
            return
        theirs.close()
        _server, subprocess.Popen._execute_child = ours, _fork
    sys.path[:1] = filter(None, os.environ.get("PYTHONPATH", "").split(":"))
    if "BEFORE" in os.environ:  # what a machine has of its own
        runpy.run_path(os.environ["BEFORE"])
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(words[1], None)  # what is imported already would be warned of
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _end(code):
    """As Python ends, but for its last visit to all that was imported, which copies it: half a second of each fork."""
    threading._shutdown()
    atexit._run_exitfuncs()
    gc.collect()  # what closes as it goes away
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _preload()
    gc.freeze()  # or every collection in a fork would walk, and so copy, all of it
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        _run(asked)
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):
            raise
        _end((end.code or 0) & 255)
    _end(0)
