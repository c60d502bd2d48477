"""Machines that share no disk: what the main process has is handed to the others, and a run goes on as if they did."""

import json
import os
import shutil
import signal

import pytest
import worlds
from conftest import PATIENCE, ROOT, TINY_PRESET, free_port
from runs import newest_step
from safetensors.torch import load_file
from test_finetune_classifier import COMMON, bert, table  # noqa: F401
from test_policy_training import files, line  # noqa: F401

pytestmark = pytest.mark.launch
PRETRAIN = [
    "--parameter_file",
    "preset.json",
    "--model_type",
    "bert-test",
    "--dataset_dir",
    "store",
    "--tracker",
    "none",
]
PRETRAIN += ["--logging_steps", "5", "--save_steps", "4", "--max_steps", "40", "--model_dir", "runs/it"]
PRETRAINING, POLICY, CLASSIFIER = (
    ROOT / "scripts" / f"{name}.py" for name in ("run_pretraining", "train_policy", "finetune_classifier")
)


@pytest.fixture
def machines(tmp_path, store_dir):
    """Working folders of two machines, each with its own copy of the inputs."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(store_dir, folder / "store")
        (folder / "preset.json").write_text(json.dumps({"bert-test": TINY_PRESET}), encoding="utf-8")
    return folders


def run(counts, folders, script, *arguments, codes=0, **how):
    found, texts = worlds.run(counts, folders[: len(counts)], script, *arguments, port=free_port(), **how)
    assert codes is None or set(found) == {codes}, "\n".join(texts)
    return texts


def largest_difference(one, other):
    one, other = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    return max((one[name] - other[name]).abs().max().item() for name in one)


def copies(folder):
    """What was handed over to a machine of runs: name of the checkpoint, and the file by which one knows it again."""
    cache = folder.with_name(f"{folder.name}-cache") / "lmscripts" / "runs"
    return {path.name: path.stat().st_ino for path in sorted(cache.glob("*/checkpoint-*"))}


def test_a_run_that_is_killed_goes_on_as_on_one_machine(machines, tmp_path):
    a, b = machines
    shutil.copytree(a, tmp_path / "alone")
    run((1,), [tmp_path / "alone"], PRETRAINING, *PRETRAIN)
    run((1, 1), machines, PRETRAINING, *PRETRAIN, "--stop_at_step", 6)
    before = sorted(b.rglob("*.json"))
    # A plan reads the run as well; the second time nothing is sent, as the copy is the same.
    run((1, 1), machines, PRETRAINING, *PRETRAIN, "--do_continue", "--dry_run")
    first = copies(b)
    assert list(first) == ["checkpoint-6"]
    assert not copies(a)
    run((1, 1), machines, PRETRAINING, *PRETRAIN, "--do_continue", "--dry_run")
    assert copies(b) == first
    pids, logs = worlds.start((1, 2), machines, PRETRAINING, *PRETRAIN, "--do_continue", port=free_port())
    while newest_step(a / "runs/it") < 12:
        assert worlds.running(pids) == pids, logs[0].read_text()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert set(worlds.wait(pids, PATIENCE)) == {-signal.SIGKILL}
    assert not copies(b)  # the run had a checkpoint of its own again
    texts = run((1, 1), machines, PRETRAINING, *PRETRAIN, "--do_continue", "--stop_at_step", 30)
    assert "going on from" in texts[0]
    run((2,), [a], PRETRAINING, *PRETRAIN, "--do_continue")
    assert largest_difference(a / "runs/it", tmp_path / "alone/runs/it") < 1e-6
    assert not (b / "runs").exists()
    assert [path for path in sorted(b.rglob("*.json")) if "rows" not in path.parts] == [
        path for path in before if "rows" not in path.parts
    ]
