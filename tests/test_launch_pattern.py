"""Unequal machines under `accelerate launch`, as 2 + 1 processes on this one.

The two files of `accelerate_configs/two_nodes` are copied with a loopback address, a free port and the CPU. This
pins a behaviour of Accelerate: a machine starts num_processes // num_machines processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import psutil
import pytest
import yaml
from conftest import PATIENCE, TINY_PRESET, free_port
from safetensors.torch import load_file

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).resolve().parent.parent
TWO_NODES = REPOSITORY / "accelerate_configs" / "two_nodes"
SCRIPT = """
import datetime, json, os, sys
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

patience = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=60))
accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
total = accelerator.reduce(torch.tensor([float(accelerator.process_index + 1)]), "sum").item()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
found = {name: int(os.environ[name]) for name in names} | {"processes": accelerator.num_processes, "total": total}
with open(os.path.join(sys.argv[1], f"{os.getpid()}.json"), "w") as file:
    json.dump(found, file)
accelerator.wait_for_everyone()
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Launchers that a test starts; they are ended afterwards, with their processes."""
    launchers: list[subprocess.Popen[bytes]] = []
    yield launchers
    for launcher in launchers:
        if launcher.poll() is None:
            # The processes of a launcher lead sessions of their own: to end its group would leave them running.
            for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        launcher.wait(timeout=PATIENCE)


def node_file(folder: Path, source: str, num_processes: int, port: int) -> Path:
    """A copy of a file of the repository, for the loopback address and the CPU."""
    content = yaml.safe_load((TWO_NODES / source).read_text(encoding="utf-8"))
    content |= {"num_processes": num_processes, "main_process_ip": "127.0.0.1", "main_process_port": port}
    content |= {"mixed_precision": "no", "use_cpu": True}
    file = folder / source
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def launch(
    folder: Path, num_processes: tuple[int, int], started: list[subprocess.Popen[bytes]], words: list[str]
) -> str:
    """Starts a script with its arguments on both machines, waits for both, and returns what they printed."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "PET_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCH_ELASTIC_WORKER_IDENTICAL"):
        environment.pop(name, None)
    for source, number in zip(("rank0_4gpu_fp16.yaml", "rank1_2gpu_fp16.yaml"), num_processes):
        file = node_file(folder, source, number, port)
        module = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
        with open(folder / f"{source}.log", "wb") as log:
            process = forked.Popen([*module, *words], env=environment, stdout=log, stderr=log)
        started.append(process)
    deadline = time.monotonic() + PATIENCE
    for process in started:
        process.wait(timeout=max(1.0, deadline - time.monotonic()))
    # Exit codes are not looked at: gloo sometimes aborts after everything is done.
    return "\n".join(log.read_text(errors="replace") for log in folder.glob("*.log"))


def world(folder: Path, num_processes: tuple[int, int], started: list[subprocess.Popen[bytes]]) -> list[dict[str, int]]:
    """What each process of a small script found, by rank."""
    script, results = folder / "script.py", folder / "results"
    script.write_text(SCRIPT, encoding="utf-8")
    results.mkdir()
    printed = launch(folder, num_processes, started, [str(script), str(results)])
    found = [json.loads(file.read_text()) for file in results.iterdir()]
    assert found, printed
    return sorted(found, key=lambda result: result["RANK"])


def test_two_and_one_processes_form_one_world(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    found = world(tmp_path, (4, 2), started)
    assert [result["RANK"] for result in found] == [0, 1, 2]
    assert [result["GROUP_RANK"] for result in found] == [0, 0, 1]
    assert [result["LOCAL_RANK"] for result in found] == [0, 1, 0]
    assert {(result["WORLD_SIZE"], result["processes"], result["total"]) for result in found} == {(3, 3, 6.0)}


def test_the_honest_total_silently_starts_too_few(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """3 // 2 is one process on each machine: the reason why the files say 4 and 2."""
    found = world(tmp_path, (3, 3), started)
    assert [(result["RANK"], result["GROUP_RANK"], result["processes"]) for result in found] == [(0, 0, 2), (1, 1, 2)]


@pytest.fixture
def training(store_dir, tmp_path) -> list[str]:
    """A short run whose preset gives machine 0 five rows of a step and machine 1 three."""
    preset = {**TINY_PRESET, "batch-size": {"0": 5, "1": 3}, "train-steps": 4}
    (tmp_path / "nodes.json").write_text(json.dumps({"bert-test": preset}), encoding="utf-8")
    words = [str(REPOSITORY / "scripts" / "run_pretraining.py"), "--dataset_dir", str(store_dir), "--tracker", "none"]
    words += ["--parameter_file", str(tmp_path / "nodes.json"), "--model_type", "bert-test", "--hidden_dropout", "0"]
    return [*words, "--expected_processes", "3", "--model_dir"]


def test_two_and_one_processes_train_like_one(training, tmp_path, started) -> None:
    printed = launch(tmp_path, (4, 2), started, [*training, str(tmp_path / "three")])
    assert "rows of a step [3, 2, 3]" in printed or "rows of a step [2, 3, 3]" in printed, printed
    alone = [*training, str(tmp_path / "alone"), "--process_shares", "1"]
    alone[alone.index("--expected_processes") + 1] = "1"
    assert forked.run([sys.executable, *alone], timeout=PATIENCE).returncode == 0
    three, one = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("three", "alone"))
    assert max((three[name] - one[name]).abs().max().item() for name in one) < 1e-6


def test_a_run_notices_that_too_few_were_started(training, tmp_path, started) -> None:
    printed = launch(tmp_path, (3, 3), started, [*training, str(tmp_path / "two")])
    assert "3 processes were announced but 2 were started" in printed
    assert all(process.returncode != 0 for process in started)
    assert not (tmp_path / "two").exists()
