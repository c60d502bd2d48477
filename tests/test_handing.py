"""Machines that share no disk: what the main process has is handed to the others, and a run goes on as if they did."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import worlds
from conftest import PATIENCE, ROOT, free_port
from runs import newest_step
from safetensors.torch import load_file
from test_finetune_classifier import COMMON, bert, same_results, table  # noqa: F401
from test_policy_training import files, line  # noqa: F401

from lmscripts.training import handing

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
NAMES = ("run_pretraining", "train_policy", "finetune_classifier", "evaluate_lm")
PRETRAINING, POLICY, CLASSIFIER, EVALUATION = (ROOT / "scripts" / f"{name}.py" for name in NAMES)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_classifier_goes_on_and_only_the_main_process_writes_results(bert, table, tmp_path):  # noqa: F811
    a, b, alone = (tmp_path / name for name in ("a", "b", "alone"))
    for folder in (a, b, alone):
        folder.mkdir()
        shutil.copy(table, folder / "topics.csv")
        shutil.copytree(bert, folder / "bert")
    words = [CLASSIFIER, "topics.csv", "--model_name_or_path", "bert", *COMMON]
    words += ["--save_steps", 4, "--output_dir", "out"]
    run((1,), [alone], *words)
    run((1, 1), [a, b], *words, "--stop_at_step", 8)
    run((2, 1), [a, b], *words, "--do_continue", "--stop_at_step", 10)
    # The database is made of the table on each machine; all else is the main process'.
    assert sorted(path.name for path in b.iterdir()) == ["bert", "topics.csv", "topics.sqlite"]
    shutil.rmtree(b)
    run((1, 1), [a, b], *words, "--do_continue", "--send_inputs")
    same_results(a / "out", alone / "out", 1e-6)
    assert not list(b.iterdir())


@pytest.mark.slow
def test_a_policy_goes_on_from_a_snapshot_of_another_machine(files, tmp_path):  # noqa: F811
    a, b = tmp_path / "a", tmp_path / "b"
    run((1,), [tmp_path / "alone"], POLICY, *line(files, "runs", "it"))
    words = line(files, "runs", "it")
    run((1, 1), [a, b], POLICY, *words, "--stop_at_step", 3)
    run((1, 2), [a, b], POLICY, *words, "--resume", "--stop_at_step", 8)
    run((1, 1), [a, b], POLICY, *words, "--resume")
    assert largest_difference(a / "runs/it", tmp_path / "alone/runs/it") < 1e-6
    assert not list(b.iterdir())


def test_from_nothing_but_the_script(machines, tmp_path):
    """Another run to begin with, store, presets, a glob of text and a model: all of it comes from the main process."""
    a, b = machines
    shutil.copytree(a, tmp_path / "alone")
    shutil.rmtree(b)
    text = [f"これ は 文 {number} です。" for number in range(400)]
    for number in range(2):
        (a / f"text{number}.txt").write_text("\n".join(text[number::2]), encoding="utf-8")
    run((1,), [a], PRETRAINING, *PRETRAIN, "--stop_at_step", 2)
    more = ["--model_dir", "runs/second", "--start_from", "runs/it", "--carry_over", "moments", "--stop_at_step", 2]
    run((1, 1), machines, PRETRAINING, *PRETRAIN[:-2], *more, "--send_inputs")
    assert newest_step(a / "runs/second") == 2
    sent = sorted((b.with_name("b-cache") / "lmscripts" / "inputs").glob("*/*"))
    assert [path.name for path in sent if path.is_dir()] == ["store"]
    stamps = [path.stat().st_ino for path in sent]
    words = ["--model_dir", "runs/second", "--input_file", "text*.txt", "--send_inputs", "--output_file", "result.json"]
    run((1, 1), machines, EVALUATION, *words)
    alone = [EVALUATION, *words[:-1], "alone.json"]
    run((1,), [a], *alone)
    together, one = (json.loads((a / name).read_text(encoding="utf-8")) for name in ("result.json", "alone.json"))
    assert together["metrics"] == one["metrics"]
    assert [path.stat().st_ino for path in sent] == stamps
    assert not list(b.iterdir())


def test_a_folder_is_compared_by_what_says_what_is_in_it(tmp_path):
    (tmp_path / "store" / "rows").mkdir(parents=True)
    for name in ("manifest.json", "tokens.bin", "rows/index.json", ".lock"):
        (tmp_path / "store" / name).write_text("abc", encoding="utf-8")
    (tmp_path / "table.csv").write_text("abc", encoding="utf-8")
    found = handing._files(tmp_path, ["store", "table.csv", "absent"])
    assert {name: size for name, (size, _) in found.items()} == {
        "store/manifest.json": 3,
        "store/tokens.bin": 3,
        "table.csv": 3,
    }
    assert found["store/manifest.json"][1] == found["table.csv"][1] != ""
    assert found["store/tokens.bin"][1] == ""


ALL_AT_ONCE = """
import multiprocessing, os
from lmscripts.training import handing, joining

parent = os.getpid()
joining.launcher = lambda: parent


def work(together, answers):
    found = set()
    for number in range(200):
        together.wait()
        found.add(handing.begun_on(f"run {number}", "host:/run"))
    answers.put(found)


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    together, answers = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=work, args=(together, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    print(set.union(*(answers.get() for _ in processes)))
"""


def test_all_processes_of_a_machine_see_where_the_run_was_begun(tmp_path):
    """They look at the same moment, at the start of a job."""
    of_test = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    given = {"env": {**os.environ, **of_test}, "capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run([sys.executable, "-c", ALL_AT_ONCE], **given)
    assert done.stdout == "{'host:/run'}\n", done.stderr
