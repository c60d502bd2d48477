"""Shared fixtures: no network, whole commands, and small artefacts made once per session."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from lmscripts.cluster.nodes import free_port

__all__ = ["free_port"]  # beside what is written here
ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "sample_data"

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")


PATIENCE = 900  # seconds until something hangs, on a machine with much else to do


@contextlib.contextmanager
def cpu_seconds_below(most):
    """CPU time of this process and of those that it waited for, which another load on the machine hardly changes."""

    def used():
        return sum(os.times()[:4])

    began = used()
    yield
    assert used() - began < most


def run_script(name, *arguments, cwd=None, check=True, timeout=PATIENCE, env=None, prefix=()):
    """Run scripts/NAME as a user would; returns the finished process with its output.

    Where nothing in front of it and no environment asks for a Python of its own, it is forked from one that has torch
    and transformers loaded.
    """
    command = [*prefix, sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    if env or prefix:
        whole = {**os.environ, **(env or {})}
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=whole)
    else:
        done = forked.run(command, cwd, os.environ, timeout)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def launch(config, name, *arguments, processes=None, cwd=None, check=True, timeout=PATIENCE, env=None, forks=True):
    """Run scripts/NAME through accelerate launch with a file of accelerate_configs/.

    `forks`: the launcher and its processes are forked, as by `run_script`.
    """
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / config)]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    command += [str(ROOT / "scripts" / name), *map(str, arguments)]
    whole = {**os.environ, **(env or {})}
    if forks:
        done = forked.run(command, cwd, whole, timeout)
    else:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=whole)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def help_of(script, env=None):
    """What --help of a script prints, and which of the packages that take seconds to load it loads."""
    command = [sys.executable, "-X", "importtime", str(script), "--help"]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=PATIENCE)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    return done.stdout, loaded & {"torch", "numpy", "transformers", "accelerate", "datasets", "tokenizers"}


def forget_accelerator():
    """accelerate keeps one state for the whole process: what comes next may want another precision."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


# The files that take longest come first: one that began last would run on alone.
LONGEST = """run_pretraining finetune_classifier policy_training run_electra run_gpt2 coming_from causal pretrained
families written_before launch launch_pattern copying modernbert pairs documents"""


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}.py": number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def no_accelerator_left():
    """Tests run in any order, each as if it were the first."""
    yield
    forget_accelerator()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder for artefacts that several tests of a file read and none changes."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A small Japanese wordpiece tokenizer of the sample articles."""
    folder = tmp_path_factory.mktemp("shared") / "tokenizer"
    run_script(
        "train_tokenizer.py", "--input_file", SAMPLE / "articles.txt", "--model_dir", folder, "--vocab_size", 2048
    )
    return folder


@pytest.fixture(scope="session")
def store_dir(tokenizer_dir):
    """A token store of the sample articles with a tenth of them held out."""
    folder = tokenizer_dir.with_name("store")
    arguments = ["--input_file", SAMPLE / "articles.txt", "--tokenizer_dir", tokenizer_dir, "--output_dir", folder]
    run_script("prepare_corpus.py", *arguments, "--validation_fraction", 0.1, "--num_workers", 1)
    return folder


TINY_PRESET = {
    "number-of-layers": 2,
    "hidden-size": 32,
    "sequence-length": 64,
    "ffn-inner-hidden-size": 64,
    "attention-heads": 2,
    "warmup-steps": 3,
    "learning-rate": 1e-3,
    "batch-size": {"-1": 8},
    "train-steps": 12,
    "save-steps": 5,
    "logging-steps": 1,
    "fp16-type": 0,
    "bf16": False,
}


@pytest.fixture
def machines(tmp_path, store_dir):
    """Working folders of two machines, each with its own copy of the inputs."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(store_dir, folder / "store")
        (folder / "preset.json").write_text(json.dumps({"bert-test": TINY_PRESET}), encoding="utf-8")
    return folders


@pytest.fixture(scope="session")
def parameter_file():
    """The presets that the project ships."""
    return ROOT / "parameter.json"
