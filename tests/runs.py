"""Looking at whole runs of scripts/run_pretraining.py, and killing them."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import forked
import psutil
import torch
from conftest import PATIENCE, ROOT
from safetensors.torch import load_file

SCRIPT = str(ROOT / "scripts" / "run_pretraining.py")


def weights(run_dir):
    """All weights of the final folder, those of a generator as well."""
    final = run_dir / "final"
    found = load_file(final / "model.safetensors")
    if (final / "generator").exists():
        found |= {f"generator/{name}": t for name, t in load_file(final / "generator" / "model.safetensors").items()}
    return found


def log_of(run_dir):
    return [json.loads(line) for line in open(run_dir / "log.jsonl", encoding="utf-8")]


def losses(run_dir):
    """Every loss and share that was logged, by step and name."""
    kinds = ("loss", "accuracy", "precision", "recall")
    return {(r["step"], name): value for r in log_of(run_dir) for name, value in r.items() if name.endswith(kinds)}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def start(arguments, log, config=None, script=SCRIPT, forks=True):
    """Start a run, forked or not; with a file of accelerate_configs/ through `accelerate launch`."""
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    launcher = [] if config is None else [*launcher, str(ROOT / "accelerate_configs" / config)]
    command = [sys.executable, *launcher, script, *map(str, arguments)]
    if forks:
        return forked.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=heed_signals)


def heed_signals():
    """Those that are ignored where the tests run in the background, or under nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def kill_tree(process):
    """Kill -9 a process and all that it started, the processes of a launcher first."""
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            child.kill()


def newest_step(run_dir):
    names = [p.name for p in run_dir.glob("checkpoint-*")] if run_dir.exists() else []
    return max((int(name.split("-")[1]) for name in names if name.split("-")[1].isdigit()), default=-1)


def wait_for_step(process, run_dir, step):
    """Wait until a running process has saved a checkpoint of this step or a later one."""
    deadline = time.monotonic() + PATIENCE
    while newest_step(run_dir) < step:
        assert process.poll() is None, f"the run ended before step {step}"
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in two minutes"
        time.sleep(0.002)


def kill_at_random_moments(arguments, run_dir, log_file, config=None, times=4, seed=5, script=SCRIPT):
    """Start a run again and again and kill it, LMSCRIPTS_KILLS or `times` times; returns how often it was killed."""
    moment = random.Random(seed)
    kills = 0
    with open(log_file, "w", encoding="utf-8") as log:
        while kills < int(os.environ.get("LMSCRIPTS_KILLS", times)):
            process = start(arguments, log, config, script)
            before = newest_step(run_dir)
            # Somewhere in the loop or in a save, after a little progress; or at any time, often while starting.
            deadline = time.monotonic() + (60 if moment.random() < 0.6 else moment.uniform(0.2, 5))
            while newest_step(run_dir) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(moment.random() * 0.08)
            if process.poll() is None:
                kill_tree(process)
            if process.wait() != -signal.SIGKILL:
                break  # it had ended: the run is complete
            kills += 1
    return kills
