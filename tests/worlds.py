"""Worlds of processes without a launcher, which would end those that are left when one has gone.

Each process is forked, see `forked`, with the variables that launchers set, and with a folder and a cache of its own
machine: no two machines see the other's files.
"""

import os
import subprocess
import sys
import time

import forked

_started = {}  # by their ids


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
    world, pids, files = sum(counts), [], []
    for node, (count, folder) in enumerate(zip(counts, folders, strict=True)):
        folder.mkdir(parents=True, exist_ok=True)
        for local in range(count):
            rank = len(pids)
            own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count}
            own |= {"GROUP_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own |= {"XDG_CACHE_HOME": folder.with_name(f"{folder.name}-cache"), "ACCELERATE_USE_CPU": "true"}
            own |= (env or {}) | (of_node or {}).get(node, {})
            words = [sys.executable, *(str(word).replace("{}", str(node)) for word in (script, *arguments))]
            whole = {**os.environ, **{name: str(value) for name, value in own.items()}}
            files.append(folder.with_name(f"{folder.name}-{rank}.log"))
            with open(files[-1], "wb") as out:
                process = forked.Popen(
                    words, cwd=folder, env=whole, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
                )
            _started[process.pid] = process
            pids.append(process.pid)
    return pids, files


def wait(pids, seconds):
    """The exit codes of processes, once all have ended; those that are late are killed, with the code None."""
    codes, until = [], time.monotonic() + seconds
    for pid in pids:
        try:
            codes.append(_started[pid].wait(max(0, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            _started[pid].kill()
            _started[pid].wait()
            codes.append(None)
    return codes


def running(pids):
    """Those that have not ended."""
    time.sleep(0.01)
    return [pid for pid in pids if _started[pid].poll() is None]


def run(*arguments, seconds=600, **how):
    """As `start`; exit codes and texts once all have ended."""
    pids, files = start(*arguments, **how)
    codes = wait(pids, seconds)
    return codes, [file.read_text(errors="replace") for file in files]
