"""Whole runs of scripts/run_pretraining.py: what the shape of the cluster, a kill or a signal may not change."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import forked
import psutil
import pytest
import torch
from conftest import PATIENCE, SAMPLE, TINY_PRESET, launch, run_script
from runs import (
    SCRIPT,
    kill_at_random_moments,
    largest_difference,
    log_of,
    losses,
    newest_step,
    same_bits,
    start,
    wait_for_step,
    weights,
)
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def presets(workspace):
    """A parameter file with one very small model of each built family."""
    file = workspace / "tiny.json"
    file.write_text(json.dumps({"bert-test": TINY_PRESET, "roberta-test": TINY_PRESET}), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def common(store_dir, presets):
    """Arguments of a short run."""
    return ["--dataset_dir", store_dir, "--parameter_file", presets, "--model_type", "bert-test", "--tracker", "none"]


# ---- the shape of the cluster ------------------------------------------------------------------------------------

# 0.33 epochs leave a last batch of fewer rows than the others.
UNEVEN = [
    "--hidden_dropout",
    "0.1",
    "--attention_dropout",
    "0.1",
    "--epochs",
    "0.33",
    "--batch_size",
    "20",
    "--do_whole_word_mask",
]


@pytest.fixture(scope="module")
def one_process(common, workspace):
    run_dir = workspace / "one_process"
    done = run_script("run_pretraining.py", *common, *UNEVEN, "--model_dir", run_dir)
    steps = [r["step"] for r in log_of(run_dir) if "loss" in r]
    assert len(steps) > 5
    assert "rows of a step [20]" in done.stdout
    return run_dir


@pytest.mark.launch
@pytest.mark.parametrize(
    ("processes", "arguments"),
    [(2, ["--micro_batch_size", "3"]), (2, ["--process_shares", "3", "1", "--micro_batch_size", "4"])],
    ids=["2 processes", "2 processes 3:1"],
)
def test_result_does_not_depend_on_the_processes(common, workspace, one_process, processes, arguments, request):
    run_dir = workspace / request.node.name
    launch("cpu_2proc.yaml", "run_pretraining.py", *common, *UNEVEN, *arguments, "--model_dir", run_dir)
    assert largest_difference(weights(one_process), weights(run_dir)) < 1e-6
    a, b = losses(one_process), losses(run_dir)
    assert a.keys() == b.keys()
    assert all(abs(a[key] - b[key]) <= 1e-6 * a[key] for key in a)


def test_result_does_not_depend_on_accumulation(common, workspace, one_process):
    run_dir = workspace / "accumulated"
    run_script("run_pretraining.py", *common, *UNEVEN, "--micro_batch_size", "3", "--model_dir", run_dir)
    assert largest_difference(weights(one_process), weights(run_dir)) < 1e-6


@pytest.mark.launch
def test_a_process_may_have_no_rows(common, workspace):
    """One row a step for two processes: the idle one keeps the others from waiting for ever."""
    few = ["--hidden_dropout", "0", "--max_steps", "4", "--batch_size", "1"]
    run_script("run_pretraining.py", *common, *few, "--model_dir", workspace / "idle1")
    launch("cpu_2proc.yaml", "run_pretraining.py", *common, *few, "--model_dir", workspace / "idle2")
    assert largest_difference(weights(workspace / "idle1"), weights(workspace / "idle2")) < 1e-6


@pytest.mark.launch
def test_a_smaller_world_than_announced_stops(common, tmp_path):
    done = launch(
        "cpu_2proc.yaml",
        "run_pretraining.py",
        *common,
        *("--model_dir", tmp_path / "run", "--expected_processes", "3"),
        check=False,
    )
    assert done.returncode != 0
    assert "3 processes were announced but 2 were started" in done.stderr
    assert not (tmp_path / "run").exists()


# ---- kills and signals -------------------------------------------------------------------------------------------

LONG = ["--max_steps", "60", "--save_steps", "5", "--logging_steps", "10", "--batch_size", "4"]


@pytest.fixture(scope="module")
def uninterrupted(common, workspace):
    run_script("run_pretraining.py", *common, *LONG, "--model_dir", workspace / "uninterrupted")
    return workspace / "uninterrupted"


def test_killed_at_random_moments_ends_with_the_same_bits(common, workspace, uninterrupted):
    """LMSCRIPTS_KILLS=20 kills more often than the default."""
    run_dir = workspace / "killed"
    arguments = [*common, *LONG, "--model_dir", run_dir, "--do_continue"]
    assert kill_at_random_moments(arguments, run_dir, workspace / "killed.txt") >= 3
    run_script("run_pretraining.py", *arguments)
    assert same_bits(weights(uninterrupted), weights(run_dir))
    assert losses(uninterrupted) == losses(run_dir)


def test_damaged_newest_checkpoint_is_passed_over(common, workspace, uninterrupted):
    run_dir = workspace / "damaged"
    arguments = [*common, *LONG, "--model_dir", run_dir]
    run_script("run_pretraining.py", *arguments, "--stop_at_step", "20")
    file = run_dir / "checkpoint-20" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = run_script("run_pretraining.py", *arguments, "--do_continue")
    assert "checkpoint-20 is damaged (model.safetensors has" in done.stdout
    assert "going on from" in done.stdout
    assert "checkpoint-15" in done.stdout
    assert same_bits(weights(uninterrupted), weights(run_dir))


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGUSR1,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_signal_saves_and_ends_with_its_own_code(common, workspace, uninterrupted, number):
    run_dir = workspace / f"signal{number}"
    arguments = [*common, *LONG, "--model_dir", run_dir]
    with open(workspace / "signal.txt", "w+", encoding="utf-8") as log:
        process = start(arguments, log, forks=number != signal.SIGTERM)
        wait_for_step(process, run_dir, 5)
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == 75
        log.seek(0)
        text = log.read()
    assert f"stopped by {number.name}" in text
    assert "Traceback" not in text
    run_script("run_pretraining.py", *arguments, "--do_continue")
    assert same_bits(weights(uninterrupted), weights(run_dir))


@pytest.mark.launch
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_run_does_not_outlive_its_launcher(common, workspace, uninterrupted, number):
    """`accelerate launch` with one process dies of a signal without a word to the script."""
    run_dir = workspace / f"launcher{number}"
    arguments = [*common, *LONG, "--model_dir", run_dir]
    with open(workspace / "launcher.txt", "w+", encoding="utf-8") as log:
        launcher = start(arguments, log, "cpu.yaml", forks=number != signal.SIGKILL)
        wait_for_step(launcher, run_dir, 5)
        (child,) = (child for child in psutil.Process(launcher.pid).children() if SCRIPT in child.cmdline()[1:3])
        launcher.send_signal(number)
        launcher.wait(timeout=PATIENCE)
        psutil.wait_procs([child], timeout=PATIENCE)
        assert not child.is_running()
        log.seek(0)
        assert "stopped by the end of its launcher" in log.read()
    run_script("run_pretraining.py", *arguments, "--do_continue")
    assert same_bits(weights(uninterrupted), weights(run_dir))


def test_a_reader_that_goes_away_and_a_terminal_without_the_letters_cost_nothing(common, workspace):
    """As behind `| head -1`, in a console of Latin-1."""
    run_dir = workspace / "読まれない"
    command = [sys.executable, SCRIPT, *map(str, [*common, *LONG, "--model_dir", run_dir])]
    env = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert b"Traceback" not in said
    assert (run_dir / "final" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_no_result(common, workspace):
    run_dir = workspace / "exploded"
    line = [*common, "--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e30", "--model_dir", run_dir]
    done = run_script("run_pretraining.py", *line, check=False)
    assert done.returncode == 2
    assert "the held-out loss after step 4 is no finite number" in done.stderr
    assert not (run_dir / "final").exists()
    assert not list(run_dir.glob("checkpoint-*"))
    log_of(run_dir)  # is JSON
    assert "NaN" not in (run_dir / "log.jsonl").read_text(encoding="utf-8")


def test_signal_during_an_evaluation(common, workspace, uninterrupted):
    """An evaluation after every step, one row a pass: nearly all of the time is spent evaluating."""
    slow = [*common, *LONG, "--eval_every", "1", "--micro_batch_size", "1"]
    slow[slow.index("--max_steps") + 1] = "12"
    run_script("run_pretraining.py", *slow, "--model_dir", workspace / "slow")
    inside = 0
    for attempt in range(4):
        run_dir = workspace / f"signal_in_evaluation{attempt}"
        arguments = [*slow, "--model_dir", run_dir]
        arguments[arguments.index("--save_steps") + 1] = "1"
        with open(workspace / "evaluation.txt", "w+", encoding="utf-8") as log:
            process = start(arguments, log)
            wait_for_step(process, run_dir, 3 + attempt)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=PATIENCE) == 75
        state = json.loads((run_dir / f"checkpoint-{newest_step(run_dir)}" / "training_state.json").read_text())
        inside += state["progress"]["evaluated_step"] != state["progress"]["step"] == newest_step(run_dir)
        run_script("run_pretraining.py", *arguments, "--do_continue")
        assert same_bits(weights(workspace / "slow"), weights(run_dir))
        if inside:
            break
    assert inside, "no signal fell into an evaluation"


def test_time_limit_stops_and_continues(common, workspace, uninterrupted):
    run_dir = workspace / "timed"
    arguments = [*common, *LONG, "--model_dir", run_dir]
    # In a Python of its own, whose imports alone take longer than that: the time of a job counts from its start.
    own = {"OMP_NUM_THREADS": "1"}
    done = run_script("run_pretraining.py", *arguments, "--max_time", "1s", check=False, env=own)
    assert done.returncode == 75
    assert "stopped by --max_time" in done.stdout
    run_script("run_pretraining.py", *arguments, "--do_continue")
    assert same_bits(weights(uninterrupted), weights(run_dir))


@pytest.mark.launch
def test_two_processes_stopped_and_continued_end_with_the_same_bits(common, workspace):
    arguments = [*common, "--max_steps", "12", "--save_steps", "4"]
    for name, stops in (("pair", [[]]), ("pair_stopped", [["--stop_at_step", "5"], ["--do_continue"]])):
        for more in stops:
            launch("cpu_2proc.yaml", "run_pretraining.py", *arguments, *more, "--model_dir", workspace / name)
    assert same_bits(weights(workspace / "pair"), weights(workspace / "pair_stopped"))


def test_two_runs_in_one_folder(common, workspace):
    run_dir = workspace / "locked"
    arguments = [*common, "--max_steps", "9000", "--save_steps", "5", "--model_dir", run_dir]
    with open(workspace / "locked.txt", "w", encoding="utf-8") as log:
        first = start(arguments, log)
        wait_for_step(first, run_dir, 5)
        second = run_script("run_pretraining.py", *arguments, "--do_continue", check=False)
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert "another process is training in" in second.stderr


# ---- what a run leaves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_final_folder_needs_transformers_alone(common, workspace, store_dir, family, tmp_path):
    run_dir = workspace / f"final_{family}"
    arguments = [*common, "--max_steps", "3", "--model_dir", run_dir]
    arguments[arguments.index("bert-test")] = f"{family}-test"
    run_script("run_pretraining.py", *arguments)
    moved = tmp_path / "moved"
    shutil.move(run_dir / "final", moved)
    program = f"""
import sys
sys.modules["lmscripts"] = None  # importing it would fail
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained({str(moved)!r})
model = AutoModelForMaskedLM.from_pretrained({str(moved)!r}).eval()
batch = tokenizer(["水は冷たい。", "今日は[MASK]がよい。"], padding=True, return_tensors="pt")
with torch.no_grad():
    torch.save((batch["input_ids"], batch["attention_mask"], model(**batch).logits), {str(tmp_path / "logits.pt")!r})
answers = pipeline("fill-mask", model={str(moved)!r})("今日は[MASK]がよい。")
assert len(answers) == 5, answers
assert tokenizer.model_max_length == 64
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = forked.run([sys.executable, "-c", program], tmp_path, environment, PATIENCE)
    assert done.returncode == 0, done.stderr
    ids, real, logits = torch.load(tmp_path / "logits.pt", weights_only=True)

    # The same through the pieces that training used, from the last checkpoint.
    from transformers import AutoModelForMaskedLM

    from lmscripts.models import families

    module = families.family(family)
    trained = AutoModelForMaskedLM.from_pretrained(run_dir / "checkpoint-3").eval()
    segments = torch.where(real.bool(), 0, -1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    attention = module.attention(trained, "sdpa", {"input_ids": ids, "segments": segments}, torch.float32)
    with torch.no_grad():
        expected = module.predict(trained, module.encode(trained, ids, positions, attention))
    assert (logits - expected)[real.bool()].abs().max() < 1e-5


def test_a_model_folder_as_tokenizer_does_not_replace_the_trained_weights(common, store_dir, tokenizer_dir, tmp_path):
    """An older version copied all of the tokenizer's folder over the checkpoint, another model's weights included."""
    model_dir = tmp_path / "hub_style"
    shutil.copytree(tokenizer_dir, model_dir)
    for name in ("model.safetensors", "pytorch_model.bin", "optimizer.pt"):
        (model_dir / name).write_bytes(b"weights of another model")
    (model_dir / "config.json").write_text('{"model_type": "bert", "hidden_size": 999}', encoding="utf-8")
    arguments = [
        "--input_file",
        SAMPLE / "finnish.txt",
        "--tokenizer_dir",
        model_dir,
        "--output_dir",
        tmp_path / "store",
    ]
    run_script("prepare_corpus.py", *arguments, "--num_workers", "1")
    inside = {path.name for path in (tmp_path / "store" / "tokenizer").iterdir()}
    assert not inside & {"model.safetensors", "pytorch_model.bin", "optimizer.pt"}
    arguments = [tmp_path / "store" if argument == store_dir else argument for argument in common]
    more = ["--max_steps", "2", "--max_unknown_share", "1", "--model_dir", tmp_path / "run"]
    run_script("run_pretraining.py", *arguments, *more)
    assert weights(tmp_path / "run")["bert.encoder.layer.0.output.dense.weight"].shape == (32, 64)
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_size"] == 32


def test_run_folder_is_complete_and_repeats_itself(common, workspace, one_process):
    for name in ("config.yaml", "log.jsonl", "curves.png", "final/README.md", "final/config.json"):
        assert (one_process / name).stat().st_size > 0
    card = (one_process / "final" / "README.md").read_text(encoding="utf-8")
    last = [r for r in log_of(one_process) if "eval_loss" in r][-1]
    assert f"{last['eval_loss']:.4f}" in card
    again = workspace / "again"
    run_script("run_pretraining.py", "--config", one_process / "config.yaml", "--model_dir", again)
    assert same_bits(weights(one_process), weights(again))


def test_held_out_loss_falls(common, workspace):
    run_dir = workspace / "learning"
    more = ["--max_steps", "60", "--learning_rate", "5e-3", "--batch_size", "16", "--eval_every", "30"]
    run_script("run_pretraining.py", *common, *more, "--model_dir", run_dir)
    held_out = [r["eval_loss"] for r in log_of(run_dir) if "eval_loss" in r]
    assert held_out[-1] < held_out[0] - 0.5


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer", "lamb", "--learning_rate", "2e-2"],
        ["--schedule", "wsd", "--decay_steps", "4", "--learning_rate", "5e-3"],
        ["--activation_checkpointing", "--learning_rate", "5e-3"],
        ["--packing", "contiguous", "--attention", "eager", "--learning_rate", "5e-3"],
        ["--attention", "varlen", "--learning_rate", "5e-3"],
    ],
    ids=lambda more: more[0] + " " + more[1] if len(more) > 1 else more[0],
)
def test_other_ways_to_train(common, tmp_path, more):
    done = run_script("run_pretraining.py", *common, *more, "--max_steps", "30", "--model_dir", tmp_path / "run")
    assert "the model is in" in done.stdout
    found = [r["loss"] for r in log_of(tmp_path / "run") if "loss" in r]
    assert len(found) == 30
    assert sum(found[-5:]) / 5 < sum(found[:5]) / 5 - 0.1


def test_dry_run_touches_nothing(common, tmp_path):
    done = run_script("run_pretraining.py", *common, "--dry_run", "--model_dir", tmp_path / "run")
    for word in ("parameters", "tokens in", "rows", "epochs", "linear: step 1", "processes", "memory", "disk"):
        assert word in done.stdout
    words = (
        r"often +a line every 1 step \(about \d+ \w+\); held-out .* every 5 steps \(.*\); a checkpoint every 5 steps \("
    )
    assert re.search(words, done.stdout)
    assert re.search(r"time +about \d+ (s|min|h|days)", done.stdout)
    assert not (tmp_path / "run").exists()
    assert re.search(r"disk +about \d+ MiB a checkpoint, \d+ MiB in all\n", done.stdout)  # all three of them stay
    kept = ["--save_steps", "1", "--keep_last", "2", "--keep_every", "4", "--model_dir", tmp_path / "run"]
    done = run_script("run_pretraining.py", *common, "--dry_run", *kept)
    assert re.search(
        r"a checkpoint; the newest 2 stay, \d+ MiB in all; older ones are deleted, but for multiples of 4\n",
        done.stdout,
    )


def test_dry_run_of_text_looks_at_a_part_of_it(common, presets, tokenizer_dir, tmp_path):
    lines = [f"文書{number}の本文です。今日は{number % 31}日です。" for number in range(120_000)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    arguments = [
        "--input_file",
        tmp_path / "text.txt",
        "--tokenizer_dir",
        tokenizer_dir,
        "--model_dir",
        tmp_path / "run",
    ]
    arguments += ["--parameter_file", presets, "--model_type", "bert-test", "--dry_run", "--epochs", "2"]
    said = run_script("run_pretraining.py", *arguments).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    share, tokens = re.search(r"about ([\d.]+)% of it was read; ([\d,]+) tokens", said).groups()
    assert 20 < float(share) < 80
    assert "2.00 epochs" in said
    whole = sum(len(ids) for ids in AutoTokenizer.from_pretrained(tokenizer_dir)(lines[::40])["input_ids"]) - 2 * 3000
    assert int(tokens.replace(",", "")) == pytest.approx(40 * whole, rel=0.05)


def test_text_gives_a_store_that_is_used_again(presets, tokenizer_dir, tmp_path):
    arguments = ["--input_file", SAMPLE / "articles.txt", "--tokenizer_dir", tokenizer_dir, "--tracker", "none"]
    arguments += ["--parameter_file", presets, "--model_type", "bert-test", "--max_steps", "2"]
    run_script("run_pretraining.py", *arguments, "--model_dir", tmp_path / "one")
    (store,) = tmp_path.glob("token_store-*")
    written = (store / "manifest.json").stat().st_mtime_ns
    run_script("run_pretraining.py", *arguments, "--model_dir", tmp_path / "two")
    assert [store] == list(tmp_path.glob("token_store-*"))
    assert (store / "manifest.json").stat().st_mtime_ns == written
    run_script("run_pretraining.py", *arguments, "--validation_fraction", "0.2", "--model_dir", tmp_path / "three")
    assert len(list(tmp_path.glob("token_store-*"))) == 2
