"""Who computes which rows: of nodes, of weights, by measured speed; and how long who waits for whom."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, ROOT, TINY_PRESET, free_port, run_script
from runs import kill_tree, largest_difference, log_of, wait_for_step, weights
from safetensors.torch import load_file
from test_finetune_classifier import tiny_bert
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lmscripts.cluster.announced import AnnouncedNode, announcement
from lmscripts.errors import UserError
from lmscripts.training import log
from lmscripts.training.pace import Pace
from lmscripts.training.processes import check_sharded, nodes_of_processes, process_shares

# ---- of nodes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def announce(monkeypatch):
    def set_variables(*nodes):
        for name, value in announcement([AnnouncedNode(*node) for node in nodes]).items():
            monkeypatch.setenv(name, value)

    return set_variables


def of_rank(rank, number):
    """The part of an Accelerator that is asked, as if all other processes had given nothing."""
    device = torch.device("cpu")
    return SimpleNamespace(process_index=rank, num_processes=number, device=device, reduce=lambda tensor, _: tensor)


def test_rows_of_the_cluster_file_come_before_the_presets_and_after_the_options(announce):
    announce(("a", 2, 60), ("b", 1, 20))
    nodes = nodes_of_processes(of_rank(1, 3))
    assert nodes == [0, 0, 1]
    assert process_shares(8, nodes) == [3, 3, 2]
    assert process_shares(80, nodes, {0: 10, 1: 70}) == [30, 30, 20]
    assert process_shares(80, nodes, {0: 10, 1: 70}, weights=[2, 1, 1]) == [40, 20, 20]


def test_a_cluster_file_that_says_nothing_of_rows_leaves_them_to_the_preset(announce):
    announce(("a", 2), ("b", 1))
    assert process_shares(80, [0, 0, 1], {0: 10, 1: 70}) == [5, 5, 70]
    assert process_shares(9, [0, 0, 1]) == [3, 3, 3]


def test_rows_for_one_node_of_two_are_refused(announce):
    announce(("a", 2, 60), ("b", 1))
    with pytest.raises(UserError, match=r"names the nodes \[0\], but the processes run on nodes \[0, 1\]"):
        process_shares(8, [0, 0, 1])


def test_the_node_is_that_of_the_launcher_or_of_srun(monkeypatch):
    monkeypatch.delenv("GROUP_RANK", raising=False)
    assert nodes_of_processes(of_rank(1, 3)) == [0, 0, 0]
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert nodes_of_processes(of_rank(1, 3)) == [0, 2, 0]
    assert nodes_of_processes(of_rank(0, 1)) == [0]  # one process of a job of several nodes, started by hand
    monkeypatch.setenv("GROUP_RANK", "1")
    assert nodes_of_processes(of_rank(1, 3)) == [0, 1, 0]
    assert nodes_of_processes(of_rank(1, 3), 4) == [0, 4, 0]


def test_sharded_models_are_not_balanced():
    sharded = SimpleNamespace(mixed_precision="no")
    check_sharded(sharded, "adamw", "even")
    with pytest.raises(UserError, match="--balance auto cannot measure them: leave it out"):
        check_sharded(sharded, "adamw", "auto")


@pytest.mark.parametrize(
    "words",
    [
        "run_pretraining.py --model_dir x --model_type bert-tiny --dataset_dir x",
        "finetune_classifier.py x.csv",
        "train_policy.py --training-data x --training-batch-size 8 --output-prefix x",
    ],
    ids=lambda words: words.split()[0],
)
def test_shares_that_would_be_ignored_are_refused(words):
    done = run_script(*words.split(), "--balance", "auto", "--process_shares", 3, 1, check=False)
    assert done.returncode == 2
    assert "--process_shares 3 1 has no effect with --balance auto" in done.stderr


# ---- by speed --------------------------------------------------------------------------------------------------------


def test_a_hiccup_does_not_decide():
    pace = Pace(torch.device("cpu"))
    pace._steps.extend([(0.1, 4)] * 10 + [(60.0, 4)] + [(0.2, 8)] * 8 + [(9.0, 8)])
    assert pace.speed() == pytest.approx(40)


def test_waiting_is_what_is_not_the_own_computing():
    """Of a model with a gradient that comes last, on a world of one process."""
    port = free_port()
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
        model.module[1].register_forward_pre_hook(lambda *_: time.sleep(0.1))
        meter = log.Meter(torch.device("cpu"), model=model)
        pace = meter._pace
        for _ in range(3):
            pace.settle()
            with meter.waiting():
                time.sleep(0.5)
            pace.rows = 2
            model(torch.ones(2, 4)).sum().backward()
            time.sleep(0.5)  # as long as others need to bring their gradients
            meter.add_sums({})
        pace.settle()
        assert pace.waited >= 3 * 1.0
        assert len(pace._hooks) == 1  # nothing but the last gradient is watched after the first step
        assert [rows for _, rows in pace._steps] == [2, 2, 2]
        assert 0.1 <= min(pace._steps)[0] < 0.5
    finally:
        distributed.destroy_process_group()


def slowed(arguments, script, *, check=True, processes=2, log=None, **environment):
    """A script on two processes, of which the second takes three times as long for a row."""
    words = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port()]
    command = [sys.executable, *words, ROOT / "tests" / "slowed.py", ROOT / "scripts" / script, *arguments]
    environment = {**os.environ, "SLOWED": "0.01 0.03", **environment}
    if log is not None:
        return subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log)
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def arguments(store_dir, workspace):
    """Of a run of 40 steps with dropout."""
    preset = {**TINY_PRESET, "batch-size": {"-1": 12}, "train-steps": 40, "warmup-steps": 3}
    (workspace / "tiny.json").write_text(json.dumps({"bert-test": preset}), encoding="utf-8")
    words = ["--dataset_dir", store_dir, "--parameter_file", workspace / "tiny.json", "--model_type", "bert-test"]
    words += ["--tracker", "none", "--save_steps", 10, "--eval_every", 40, "--eval_rows", 8, "--keep_last", 9]
    return [*words, "--hidden_dropout", 0.1, "--balance", "auto", "--model_dir"]


@pytest.fixture(scope="module")
def alone(arguments, workspace):
    run_script("run_pretraining.py", *arguments, workspace / "alone")
    return workspace / "alone"


@pytest.mark.slow
@pytest.mark.launch
def test_rows_by_speed_change_nothing_but_who_computes_them(arguments, alone, tmp_path):
    """Killed after the rows were divided anew, and continued by the same processes."""
    run_dir = tmp_path / "run"
    with open(tmp_path / "log", "w", encoding="utf-8") as output:
        process = slowed([*arguments, run_dir], "run_pretraining.py", log=output)
        wait_for_step(process, run_dir, 30)
        kill_tree(process)
        assert process.wait() == -signal.SIGKILL
    record = next(each for each in log_of(run_dir) if "rows_per_second_0" in each)
    assert record["step"] == 25
    assert record["rows_per_second_0"] / record["rows_per_second_1"] > 1.5
    waits = {each["step"]: (each["waiting_0"], each["waiting_1"]) for each in log_of(run_dir) if "waiting_0" in each}
    assert sum(waits[step][0] for step in range(6, 26)) > sum(waits[step][1] for step in range(6, 26))
    printed = (tmp_path / "log").read_text(encoding="utf-8")
    assert "--balance auto: the rows are divided by speed after step 25" in printed
    assert "process 0 waits" in printed
    state = json.loads((run_dir / "checkpoint-30" / "training_state.json").read_text(encoding="utf-8"))
    assert list(state["progress"]["speeds"].values()) == [record["rows_per_second_0"], record["rows_per_second_1"]]
    again = slowed([*arguments, run_dir, "--do_continue"], "run_pretraining.py")
    assert "as measured before" in again
    assert "divided by speed after" not in again
    assert largest_difference(weights(run_dir), weights(alone)) < 1e-6
    tokens = [{each["step"]: each["tokens"] for each in log_of(run) if "tokens" in each} for run in (run_dir, alone)]
    assert tokens[0] == tokens[1]


def test_the_rate_of_a_run_alone_is_not_measured(alone):
    assert not [name for record in log_of(alone) for name in record if name.startswith(("waiting", "rows_per"))]


@pytest.mark.slow
@pytest.mark.launch
def test_a_policy_by_speed(tmp_path):
    run_script("make_annotations.py", "--output_file", tmp_path / "train.txt", "--num_records", 200)
    sizes = "--dimension 16 --num-heads 2 --num-layers 1 --training-batch-size 24 --num-epochs 2 --device cpu"
    words = [
        "--training-data",
        tmp_path / "train.txt",
        *sizes.split(),
        "--output-prefix",
        tmp_path,
        "--balance",
        "auto",
    ]
    words += ["--schema", "kanachan-v1", "--num-workers", 1, "--optimizer", "adam", "--epsilon", 1e-4]
    run_script("train_policy.py", *words, "--experiment-name", "alone")
    slow = slowed([*words, "--experiment-name", "two"], "train_policy.py", MEASURED="1 6", SLOWED="0.005 0.015")
    assert "step 7/18  rows from here on: process 0" in slow
    two, one = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("two", "alone"))
    assert largest_difference(two, one) < 1e-6


@pytest.mark.slow
@pytest.mark.launch
def test_a_classifier_by_speed(tmp_path, tokenizer_dir):
    texts = [f"{'水星' * (3 + number % 9)}。,{'ab'[number % 2]},{number}" for number in range(60)]
    (tmp_path / "table.csv").write_text("\n".join(["text,label,id", *texts]), encoding="utf-8")
    words = [tmp_path / "table.csv", "--model_name_or_path", tiny_bert(tmp_path / "bert", tokenizer_dir), "--epochs", 4]
    words += ["--batch_size", 12, "--max_length", 16, "--tracker", "none", "--balance", "auto", "--output_dir"]
    run_script("finetune_classifier.py", *words, tmp_path / "one")
    slow = slowed([*words, tmp_path / "two"], "finetune_classifier.py", MEASURED="1 6")
    assert "step 7/24  rows from here on: process 0" in slow, slow
    two, one = (load_file(tmp_path / name / "table_trained_model" / "model.safetensors") for name in ("two", "one"))
    assert largest_difference(two, one) < 1e-5  # an epsilon of 1e-8 enlarges what the order of a sum changes
