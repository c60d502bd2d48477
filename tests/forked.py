"""Whole commands without the seconds of their imports: a process that has these behind it forks for each command.

The fork runs the script as Python would, up to its own exit; only the first seconds are spared. Commands whose
environment counts while torch is imported, and those that are killed, are started as processes of their own.
"""

import array
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

_server = None


def run(command, cwd, env, timeout):
    """As `subprocess.run(..., capture_output=True, text=True)` of a Python script; raises the same when it is late."""
    global _server
    if _server is None:
        ours, theirs = socket.socketpair()
        start = [sys.executable, __file__, str(theirs.fileno())]
        _server = ours, subprocess.Popen(start, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
    connection = _server[0]
    request = json.dumps({"argv": command[1:], "cwd": str(cwd or os.getcwd()), "env": dict(env)}).encode()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        connection.settimeout(None)
        connection.sendall(len(request).to_bytes(4, "little"))
        rights = array.array("i", [out.fileno(), err.fileno()])
        connection.sendmsg([request[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        connection.sendall(request[1:])
        child = int.from_bytes(_exactly(connection, 4), "little")
        connection.settimeout(timeout)
        late = False
        try:
            status = _exactly(connection, 4)
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            connection.settimeout(None)
            status, late = _exactly(connection, 4), True
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="surrogateescape"))
    if late:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, int.from_bytes(status, "little", signed=True), *texts)


def _exactly(connection, size):
    data = b""
    while len(data) < size:
        if not (more := connection.recv(size - len(data))):
            raise EOFError("the other end is gone")
        data += more
    return data


def _serve(connection):
    """Fork for each request; returns in the fork, with what it is to run."""
    while True:
        try:
            size = int.from_bytes(_exactly(connection, 4), "little")
        except EOFError:
            os._exit(0)
        first, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(8))
        files = array.array("i", ancillary[0][2])
        request = json.loads(first + _exactly(connection, size - 1))
        child = os.fork()
        if child == 0:
            connection.close()
            for number, file in enumerate(files, 1):
                os.dup2(file, number)
                os.close(file)
            return request
        for file in files:
            os.close(file)
        connection.sendall(child.to_bytes(4, "little"))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(status.to_bytes(4, "little", signed=True))


# What every script that computes imports; nothing of this project, and nothing that starts a thread.
_PRELOADED = ("torch._dynamo", "accelerate", "transformers.models.auto.modeling_auto")
_MODELS = ("bert", "electra", "gpt2", "roberta")


def _preload():
    for name in (*_PRELOADED, *(f"transformers.models.{model}.modeling_{model}" for model in _MODELS)):
        importlib.import_module(name)


if __name__ == "__main__":
    _preload()
    gc.freeze()  # or the exit of every fork would walk, and so copy, all of it
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    random.seed()
    sys.argv = asked["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
