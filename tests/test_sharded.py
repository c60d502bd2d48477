"""Sharded models (FSDP2) on gloo: the same losses as whole copies, in the same precision; what is saved, and where."""

import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import PATIENCE, ROOT, TINY_PRESET, free_port, launch, run_script
from runs import (
    SCRIPT,
    kill_at_random_moments,
    largest_difference,
    log_of,
    losses,
    same_bits,
    start,
    weights,
)
from test_electra import PLAN, make_pair, make_rows
from test_objectives import batches_of
from torch.distributed.device_mesh import init_device_mesh

from lmscripts.errors import UserError
from lmscripts.objectives import replaced
from lmscripts.training import sharding
from lmscripts.training.log import Meter
from lmscripts.training.processes import _check_same_weights, start_processes

PAIR = {"embedding-size": 16, "generator-size": "1/2", "mask-percent": 15}
LARGE = {"number-of-layers": 8, "hidden-size": 1024, "ffn-inner-hidden-size": 4096, "attention-heads": 16}


@pytest.fixture(scope="module")
def common(store_dir, workspace):
    """Arguments of a short run; --model_type comes with them."""
    large = TINY_PRESET | LARGE | {"batch-size": {"-1": 4}}
    presets = {"bert-test": TINY_PRESET, "electra-test": TINY_PRESET | PAIR, "gpt2-test": TINY_PRESET}
    (workspace / "sharded.json").write_text(json.dumps(presets | {"bert-large": large}), encoding="utf-8")
    words = ["--dataset_dir", store_dir, "--parameter_file", workspace / "sharded.json", "--tracker", "none"]
    return [*words, "--hidden_dropout", "0.1"]


@pytest.fixture(scope="module")
def fsdp_file(workspace):
    """The file that the project ships, for two processes on the CPU."""
    content = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2_bf16.yaml").read_text(encoding="utf-8"))
    file = workspace / "fsdp2.yaml"
    file.write_text(yaml.safe_dump(content | {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}))
    return file


def torchrun(processes, *arguments, check=True, **settings):
    """A run under torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", str(free_port()), SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **settings)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def world():
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# ---- precision -------------------------------------------------------------------------------------------------------


def test_draws_losses_and_the_mean_of_many_steps_are_float32(world, monkeypatch):
    """In bfloat16 half of the draws are equal, and those near 1 take the last id; the mean of many steps is nothing."""
    objective, drawn = make_pair(), []
    ((batch, counts),) = batches_of(make_rows(40), plan=PLAN)
    sample = replaced.sample
    monkeypatch.setattr(
        replaced, "sample", lambda logits, draws: drawn.append((logits, draws)) or sample(logits, draws)
    )
    sharding.shard(objective, world, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        sums = objective(batch)
    ((logits, draws),) = drawn
    assert logits.dtype == torch.float32
    assert torch.equal(draws, batch["draws"])
    assert len(draws.unique()) > 0.99 * len(draws)
    assert {value.dtype for value in sums.values()} == {torch.float32}
    meter = Meter(torch.device("cpu"))
    for _ in range(2000):
        meter.add_sums(sums)
    assert abs(meter._sums["mlm"].item() / 2000 / sums["mlm"].item() - 1) < 1e-3
    objective.loss(sums, counts).backward()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert len(gradients) > 20


# ---- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type DEEPSPEED is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "distributed_type MEGATRON_LM is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version must be 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}, "no weights stay gathered"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params must be false"),
    ],
)
def test_other_ways_to_divide_a_model_are_refused(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        sharding.asked_of_launcher()
    with pytest.raises(UserError, match=words):
        start_processes()


def test_deepspeed_is_refused_before_anything_is_done(common, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    arguments = [*common, "--model_type", "bert-test", "--model_dir", tmp_path / "run"]
    done = run_script("run_pretraining.py", *arguments, check=False)
    assert done.returncode != 0
    assert "models that do not fit are divided by --shard" in done.stderr
    assert "parameters" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_optimizers_and_precisions_without_shards_are_refused(common, tmp_path):
    arguments = [*common, "--model_type", "bert-test", "--shard", "--model_dir", tmp_path / "run"]
    done = run_script("run_pretraining.py", *arguments, "--optimizer", "lamb", check=False)
    assert done.returncode != 0
    assert "the optimizer lamb does not know sharded weights" in done.stderr
    assert not (tmp_path / "run").exists()


def test_parts_of_different_models_are_refused():
    """Whole copies are handed out by the main process; of parts each would belong to the model of its process."""
    for factor, answer in (
        (2.0, nullcontext()),
        (2.01, pytest.raises(UserError, match="begin with different weights")),
    ):
        two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=lambda t, how, f=factor: f * t)
        with answer:
            _check_same_weights(two, make_pair())


def test_layers_that_the_model_has_not_are_refused(world, monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertLayer")
    with pytest.raises(UserError, match=r"names the layers BertLayer, but the model has ElectraLayer"):
        sharding.shard(make_pair(), world, None)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "ElectraLayer")
    sharding.shard(make_pair(), world, None)


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.launch
def test_shards_go_on_whole_and_whole_ones_as_shards(common, tmp_path, fsdp_file):
    """Two halves that share embeddings, an average, and processes with unequal rows and micro-batches."""
    more = ["--model_type", "electra-test", "--max_steps", "6", "--ema_decay", "0.9", "--save_steps", "2"]
    arguments = [*common, *more, "--model_dir"]
    run_script("run_pretraining.py", *arguments, tmp_path / "one")
    arguments += [tmp_path / "several"]
    uneven = ["--process_shares", "3", "1", "--micro_batch_size", "2"]
    torchrun(2, *arguments, *uneven, "--shard", "--stop_at_step", "2")
    run_script("run_pretraining.py", *arguments, "--do_continue", "--stop_at_step", "4")
    done = launch(fsdp_file, "run_pretraining.py", *arguments, *uneven, "--do_continue")
    assert "weights divided (FSDP2)" in done.stdout
    one, several = (tmp_path / name for name in ("one", "several"))
    assert largest_difference(weights(one), weights(several)) < 1e-6
    assert all(abs(losses(several)[key] - value) < 1e-5 for key, value in losses(one).items())
    files = [sorted(f.name for f in (run / "checkpoint-6").rglob("*") if f.is_file()) for run in (one, several)]
    assert files[0] == files[1]
    assert {"model.safetensors", "optimizer.safetensors", "average.safetensors"} <= {*files[0]}


@pytest.mark.slow
@pytest.mark.launch
def test_a_full_disk_ends_all_processes_of_a_sharded_run(common, tmp_path):
    """Between two of the tensors that all of them gather."""
    run_dir = tmp_path / "run"
    arguments = [*common, "--model_type", "bert-test", "--max_steps", "4", "--save_steps", "2", "--model_dir", run_dir]
    began = time.monotonic()
    limit = 500_000  # more than the weights, less than what the optimizer keeps
    done = torchrun(
        2,
        *arguments,
        "--shard",
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode != 0
    assert f"could not save {run_dir}/checkpoint-2" in done.stderr
    assert "process 0 (host " in done.stderr  # said by the other as well
    assert not [*run_dir.glob("checkpoint-*")]
    assert time.monotonic() - began < PATIENCE


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("family", ["bert", "electra", "gpt2"])
def test_four_shards_train_like_four_copies(family, common, tmp_path, fsdp_file):
    more = ["--model_type", f"{family}-test", "--max_steps", "20", "--micro_batch_size", "1"]
    for name, config in (("whole", "cpu_2proc.yaml"), ("sharded", fsdp_file)):
        launch(config, "run_pretraining.py", *common, *more, "--model_dir", tmp_path / name, processes=4)
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    difference = largest_difference(weights(whole), weights(sharded))
    of_losses = max(abs(losses(sharded)[key] - value) for key, value in losses(whole).items())
    print(f"{family}: weights differ by {difference:.1e} after 20 steps, losses by {of_losses:.1e}")
    assert len([record for record in log_of(sharded) if "loss" in record]) == 20
    assert difference < 1e-5
    assert of_losses < 1e-5


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize(
    "option", ["--optimizer radam", "--optimizer sgd", "--activation_checkpointing", "--compile", "--frozen_layers 1"]
)
def test_options_of_sharded_models(option, common, tmp_path, fsdp_file):
    more = ["--model_type", "bert-test", "--max_steps", "5", *option.split()]
    if "frozen" in option:
        begin = [*common, "--model_type", "bert-test", "--max_steps", "1", "--model_dir", tmp_path / "begin"]
        run_script("run_pretraining.py", *begin)
        more += ["--pretrained_model_name_or_path", tmp_path / "begin" / "final"]
    for name, config in (("whole", "cpu_2proc.yaml"), ("sharded", fsdp_file)):
        launch(config, "run_pretraining.py", *common, *more, "--model_dir", tmp_path / name)
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "sharded")) < 1e-6


@pytest.mark.slow
@pytest.mark.launch
def test_a_sharded_run_that_is_killed_goes_on_to_the_same_bits(common, tmp_path, fsdp_file):
    more = ["--model_type", "electra-test", "--max_steps", "60", "--save_steps", "5", "--shard", "--model_dir"]
    launch(fsdp_file, "run_pretraining.py", *common, *more, tmp_path / "whole")
    arguments = [*common, *more, tmp_path / "killed", "--do_continue"]
    kills = kill_at_random_moments(arguments, tmp_path / "killed", tmp_path / "log.txt", fsdp_file, times=3)
    assert kills >= 2
    launch(fsdp_file, "run_pretraining.py", *arguments)
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.slow
@pytest.mark.launch
def test_memory_of_each_process(common, tmp_path, fsdp_file):
    """Of 104 million parameters: 1,587 MiB of weights, gradients and moments, or a quarter beside a layer at a time."""
    more = ["--model_type", "bert-large", "--max_steps", "3", "--save_steps", "3", "--eval_rows", "1", "--model_dir"]
    most = {}
    for name, config in (("whole", "cpu_2proc.yaml"), ("sharded", fsdp_file)):
        environment = tmp_path / f"{name}.yaml"
        content = yaml.safe_load((ROOT / "accelerate_configs" / config).read_text(encoding="utf-8"))
        environment.write_text(yaml.safe_dump(content | {"num_processes": 4}), encoding="utf-8")
        with open(tmp_path / f"{name}.txt", "w", encoding="utf-8") as log:
            process = start([*common, *more, tmp_path / name], log, environment, forks=False)
            most[name] = peaks(process)
        assert process.wait() == 0, (tmp_path / f"{name}.txt").read_text(encoding="utf-8")
        print(f"{name}: most memory of each process {most[name]} MiB")
    assert all(part < 0.8 * whole for part, whole in zip(most["sharded"], most["whole"], strict=True))


def peaks(process):
    """MiB that each process of a launcher held at most, the main process first, until it ends."""
    found = {}
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(OSError, psutil.Error, KeyError, IndexError):  # it ends, or has not begun
                lines = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8").splitlines()
                sizes = [int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")]
                found[child.environ()["RANK"]] = sizes[0]
        time.sleep(0.1)
    return [found[rank] for rank in sorted(found)]
