"""Worlds of processes without the seconds of their imports, and without a launcher that ends those that are left.

Each process is forked from one that has torch and transformers loaded, as `forked` does it for one, with the variables
that launchers set, and with a folder and a cache of its own machine: no two machines see the other's files.
"""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil

_server = None


def start(counts, folders, script, *arguments, port, env=None, of_node=None):
    """Start a script on `counts` processes of each machine; their ids and the files with what they print.

    Args:
        counts: processes of each machine.
        folders: working folder of each machine, beside which its cache lies.
        script: a file.
        arguments: of the script; "{}" becomes the number of the machine.
        port: a free one.
        env: further variables.
        of_node: the same of some machines, by their number.
    """
    world, rank, asked = sum(counts), 0, []
    for node, (count, folder) in enumerate(zip(counts, folders, strict=True)):
        folder.mkdir(parents=True, exist_ok=True)
        for local in range(count):
            own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count}
            own |= {"GROUP_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own |= {"XDG_CACHE_HOME": folder.with_name(f"{folder.name}-cache"), "ACCELERATE_USE_CPU": "true"}
            own |= (env or {}) | (of_node or {}).get(node, {})
            words = [str(word).replace("{}", str(node)) for word in (script, *arguments)]
            out = str(folder.with_name(f"{folder.name}-{rank}.log"))
            whole = {**os.environ, **{name: str(value) for name, value in own.items()}}
            asked.append({"argv": words, "cwd": str(folder), "env": whole, "out": out})
            rank += 1
    return _ask("start", asked), [Path(each["out"]) for each in asked]


def wait(pids, seconds):
    """The exit codes of processes, once all have ended; those that are late are killed, with the code None."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        codes |= {int(pid): code for pid, code in _ask("ended", [pid for pid in pids if pid not in codes]).items()}
        if time.monotonic() > until:
            for pid in set(pids) - set(codes):
                os.kill(pid, 9)
                _ask("reap", pid)
                codes[pid] = None
        time.sleep(0.05)
    return [codes[pid] for pid in pids]


def running(pids):
    """Those that have not ended."""
    time.sleep(0.01)
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def run(*arguments, seconds=600, **how):
    """As `start`; exit codes and texts once all have ended."""
    pids, files = start(*arguments, **how)
    codes = wait(pids, seconds)
    return codes, [file.read_text(errors="replace") for file in files]


def _ask(what, value):
    global _server
    if _server is None:
        start = [sys.executable, __file__]
        _server = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _server.stdin.write(json.dumps([what, value]) + "\n")
    _server.stdin.flush()
    return json.loads(_server.stdout.readline())


def _serve():
    """Answer until the tests have ended; returns in a fork, with what it is to run."""
    for line in sys.stdin:
        what, value = json.loads(line)
        answer = {}
        if what == "start":
            answer = []
            for asked in value:
                if (child := os.fork()) == 0:
                    return asked
                answer.append(child)
        elif what == "ended":
            for pid in value:
                done, status = os.waitpid(pid, os.WNOHANG)
                answer |= {pid: os.waitstatus_to_exitcode(status)} if done else {}
        elif what == "reap":
            os.waitpid(value, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    forked._preload()
    asked = _serve()
    with open(asked["out"], "wb", buffering=0) as out, open(os.devnull, "rb") as nothing:
        for number, file in enumerate((nothing, out, out)):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = asked["argv"]
    sys.path[:0] = [*filter(None, os.environ.get("PYTHONPATH", "").split(":")), str(Path(sys.argv[0]).parent)]
    if "BEFORE" in os.environ:  # what this machine has of its own
        runpy.run_path(os.environ["BEFORE"])
    runpy.run_path(sys.argv[0], run_name="__main__")
