"""Machines that come and go: a run that changes its shape, and one whose launcher lets a machine leave and return."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time

import pytest
from conftest import PATIENCE, ROOT, TINY_PRESET, free_port, run_script
from runs import kill_tree, largest_difference, log_of, newest_step, same_bits, wait_for_step, weights

from lmscripts.training import folder, joining

STEPS = 120


@pytest.fixture(scope="module")
def arguments(store_dir, workspace):
    """Of a run of the preset bert-tiny with dropout, whose processes sleep a little for every row."""
    presets = json.loads((ROOT / "parameter.json").read_text(encoding="utf-8"))
    shape = {"sequence-length": 32, "batch-size": {"-1": 12}, "train-steps": STEPS, "warmup-steps": 5}
    shape |= {name: TINY_PRESET[name] for name in ("learning-rate", "logging-steps", "fp16-type", "bf16")}
    (workspace / "tiny.json").write_text(json.dumps({"bert-tiny": presets["bert-tiny"] | shape}), encoding="utf-8")
    words = ["--dataset_dir", store_dir, "--parameter_file", workspace / "tiny.json", "--model_type", "bert-tiny"]
    words += ["--tracker", "none", "--save_steps", 6, "--keep_last", 99, "--eval_every", STEPS, "--eval_rows", 8]
    return [*words, "--hidden_dropout", 0.1, "--attention_dropout", 0.1, "--timeout", 120, "--model_dir"]


@pytest.fixture(scope="module")
def alone(arguments, workspace):
    run_script("run_pretraining.py", *arguments, workspace / "alone")
    return workspace / "alone"


def torchrun(words, script_words, log, seconds="0.01"):
    """Start torchrun; the second process of the run is the slower one."""
    script = [ROOT / "tests" / "slowed.py", ROOT / "scripts" / "run_pretraining.py"]
    command = [sys.executable, "-m", "torch.distributed.run", *words, *script, *script_words]
    own = {"SLOWED": seconds, "MEASURED": "2 6", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(list(map(str, command)), env={**os.environ, **own}, stdout=log, stderr=log)


def same_as_one_process(run_dir, alone):
    assert largest_difference(weights(run_dir), weights(alone)) < 1e-5
    losses = [{each["step"]: each["loss"] for each in log_of(run) if "loss" in each} for run in (run_dir, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(losses[0]) == STEPS


@pytest.mark.slow
@pytest.mark.launch
def test_a_run_changes_its_shape_four_times_and_is_killed_in_between(arguments, alone, tmp_path):
    """1 -> 3 -> 2 + 1 -> 2 processes, with another micro-batch and, of three, rows by speed."""
    run_dir, log = tmp_path / "run", open(tmp_path / "log", "w", encoding="utf-8")  # noqa: SIM115
    words = [*arguments, run_dir, "--do_continue"]
    by_speed = ["--balance", "auto", "--micro_batch_size", 2]

    def shape(number, more, *nodes):
        port = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
        started = []
        for node, processes in enumerate(nodes):
            where = ["--nnodes", len(nodes), "--node-rank", node, "--nproc-per-node", processes, *port]
            started.append(torchrun(where, [*words, *more], log, "0.01 0.02"))
        wait_for_step(started[0], run_dir, number * STEPS // 4)
        for each in started:
            kill_tree(each)
            each.wait()

    with log:
        shape(1, ["--micro_batch_size", 5], 1)
        shape(2, by_speed, 3)
        first = newest_step(run_dir)
        shape(3, by_speed, 2, 1)
        port = ["--nproc-per-node", 2, "--master-port", free_port()]
        last = torchrun(port, [*words, "--process_shares", 3, 1], log, "0")
        assert last.wait(timeout=PATIENCE) == 0
    printed = (tmp_path / "log").read_text(encoding="utf-8")
    assert len(set(re.findall("going on from .*checkpoint-([0-9]+)", printed))) == 3
    # The second time the shape is the same to the run: as many processes on the same machines.
    assert printed.count("rows from here on") >= 2
    assert "as measured before" in printed
    assert first < STEPS
    same_as_one_process(run_dir, alone)


@pytest.mark.slow
@pytest.mark.launch
def test_a_machine_leaves_and_comes_back(arguments, alone, tmp_path):
    """Its launcher is killed, as a machine that goes, and the run goes on by itself; likewise when it returns."""
    run_dir, port = tmp_path / "run", free_port()
    where = f"127.0.0.1:{port}"
    words = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=lmscripts"]
    words += [f"--rdzv-endpoint={where}", "--rdzv-conf=last_call_timeout=5,join_timeout=300"]
    of_script = [*arguments, run_dir, "--expected_processes", 2]  # which is no reason to end where machines may go
    agents = {}

    def start(name, log):
        agents[name] = torchrun(words, of_script, log, "0.04")

    logs = {name: open(tmp_path / name, "w", encoding="utf-8") for name in ("stays", "goes", "returns")}  # noqa: SIM115
    try:
        start("stays", logs["stays"])
        # Whoever comes first to a port of this machine has the store of all, and must not go.
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert agents["stays"].poll() is None
            time.sleep(0.1)
        start("goes", logs["goes"])
        wait_for_step(agents["stays"], run_dir, STEPS // 5)
        agents["goes"].kill()
        agents["goes"].wait()
        wait_for_step(agents["stays"], run_dir, newest_step(run_dir) + 12)
        start("returns", logs["returns"])
        assert agents["returns"].wait(timeout=PATIENCE) == 0
        assert agents["stays"].wait(timeout=PATIENCE) == 0
    finally:
        for each in agents.values():
            if each.poll() is None:
                kill_tree(each)
        for log in logs.values():
            log.close()
    printed = (tmp_path / "stays").read_text(encoding="utf-8") + (tmp_path / "returns").read_text(encoding="utf-8")
    assert "rows of a step [12] by process" in printed  # alone, meanwhile
    assert printed.count("going on from") >= 2
    assert "holds a run already" not in printed
    same_as_one_process(run_dir, alone)


@pytest.mark.slow
@pytest.mark.launch
def test_a_run_is_not_begun_anew_where_its_main_machine_has_gone(arguments, tmp_path):
    """Machines without a disk in common: what the one has that goes, the other can neither continue nor replace."""
    port, arguments = free_port(), [*arguments[:-1], "--expected_processes", 2, "--model_dir"]
    words = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-id=lmscripts"]
    words += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=5,join_timeout=300"]
    agents = {}
    with open(tmp_path / "goes", "w") as goes, open(tmp_path / "stays", "w") as stays:
        # The main process is on the machine with the lower process number, the store where one comes first.
        gate = tmp_path / "gate"
        wait = f"until [ -e {gate} ]; do sleep 0.1; done; exec "
        line = [sys.executable, "-m", "torch.distributed.run", *words, ROOT / "tests" / "slowed.py"]
        line = [*line, ROOT / "scripts" / "run_pretraining.py", *arguments]
        own = {**os.environ, "SLOWED": "0.04", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        try:
            shell = wait + shlex.join(map(str, [*line, tmp_path / "a" / "run"]))
            agents["goes"] = subprocess.Popen(["sh", "-c", shell], env=own, stdout=goes, stderr=goes)
            agents["stays"] = torchrun(words, [*arguments, tmp_path / "b" / "run"], stays, "0.04")
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert agents["stays"].poll() is None
                time.sleep(0.1)
            gate.touch()
            wait_for_step(agents["stays"], tmp_path / "a" / "run", 12)
            agents["goes"].kill()
            assert agents["stays"].wait(timeout=PATIENCE) != 0
        finally:
            for each in agents.values():
                if each.poll() is None:
                    kill_tree(each)
    printed = (tmp_path / "stays").read_text(encoding="utf-8")
    assert f"the run was begun in {socket.gethostname()}:{tmp_path / 'a' / 'run'}, of which the main" in printed
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.launch
def test_three_processes_go_on_to_the_same_bits(arguments, tmp_path):
    """In which order three gradients are added is DDP's choice, which it makes anew at every start."""
    for run, parts in (("whole", [[]]), ("parts", [["--stop_at_step", 40], ["--do_continue"]])):
        for more in parts:
            with open(tmp_path / "log", "w", encoding="utf-8") as log:
                words = ["--nproc-per-node", 3, "--master-port", free_port()]
                ended = torchrun(words, [*arguments, tmp_path / run, *more], log, "0")
                assert ended.wait(timeout=PATIENCE) == 0
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.launch
def test_a_limit_of_time_is_no_failure_to_be_started_again(arguments, tmp_path):
    run_dir = tmp_path / "run"
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        words = ["--nproc-per-node", 2, "--master-port", free_port(), "--max-restarts", 3]
        ended = torchrun(words, [*arguments, run_dir, "--do_continue", "--max_time", "25s"], log, "0.2")
        assert ended.wait(timeout=PATIENCE) == 0
    assert (tmp_path / "log").read_text(encoding="utf-8").count("stopped by --max_time") == 1
    assert 0 < newest_step(run_dir) < STEPS


def test_only_the_job_that_began_a_run_goes_on_by_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    run = folder.RunFolder(tmp_path, {}, lambda step: 0.1)
    assert not folder.is_started_again(tmp_path)
    run.claim(False)
    assert folder.is_started_again(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not folder.is_started_again(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what accelerate launch and a plain torchrun call every job
    assert not folder.is_started_again(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    (tmp_path / folder.LOCK).write_text("", encoding="utf-8")
    assert not folder.is_started_again(tmp_path)


@pytest.mark.parametrize(
    ("words", "elastic"),
    [
        ("--nnodes=1:3 --nproc-per-node=1", True),
        ("--nnodes 1:3", True),
        ("--nnodes=2:2", False),
        ("--nnodes 2", False),
        ("--nproc-per-node 2 train.py --range 1:3", False),
    ],
)
def test_what_is_elastic(words, elastic, monkeypatch):
    monkeypatch.delenv("PET_NNODES", raising=False)
    monkeypatch.delenv("LMS_EXPECTED_WORLD_SIZE", raising=False)
    monkeypatch.setattr(joining, "_words_of_launcher", lambda: ["torchrun", *words.split()])
    assert joining.is_elastic() == elastic
    assert bool(joining._of_number(1, 3)) != elastic
