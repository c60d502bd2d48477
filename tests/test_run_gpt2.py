"""Whole GPT-2 runs: shape of the cluster, kills, phases, decay branches, going on with other decoders."""

import json
import re
import shutil

import pytest
import torch
from conftest import TINY_PRESET, launch, run_script
from runs import kill_at_random_moments, largest_difference, log_of, losses, newest_step, same_bits, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline


@pytest.fixture(scope="module")
def common(store_dir, workspace):
    """Arguments of a short run."""
    file = workspace / "gpt2.json"
    file.write_text(json.dumps({"gpt2-test": TINY_PRESET, "bert-test": TINY_PRESET}), encoding="utf-8")
    return ["--dataset_dir", store_dir, "--parameter_file", file, "--model_type", "gpt2-test", "--tracker", "none"]


UNEVEN = [
    "--hidden_dropout",
    "0.1",
    "--attention_dropout",
    "0.1",
    "--epochs",
    "0.2",
    "--batch_size",
    "20",
    "--z_loss",
    "1e-3",
]


@pytest.fixture(scope="module")
def one_process(common, workspace):
    run_script("run_pretraining.py", *common, *UNEVEN, "--model_dir", workspace / "gpt2_one")
    return workspace / "gpt2_one"


def assert_same_run(one, other):
    assert largest_difference(weights(one), weights(other)) < 1e-6
    a, b = losses(one), losses(other)
    assert a.keys() == b.keys()
    assert {"loss", "z_loss", "eval_loss", "eval_accuracy"} <= {name for _, name in a}
    assert all(abs(a[key] - b[key]) <= 1e-6 * abs(a[key]) for key in a)


@pytest.mark.launch
def test_result_does_not_depend_on_the_processes(common, workspace, one_process):
    more = ["--process_shares", "3", "1", "--micro_batch_size", "4", "--model_dir", workspace / "gpt2_two"]
    launch("cpu_2proc.yaml", "run_pretraining.py", *common, *UNEVEN, *more)
    assert_same_run(one_process, workspace / "gpt2_two")


def test_result_does_not_depend_on_accumulation(common, workspace, one_process):
    more = ["--micro_batch_size", "3", "--model_dir", workspace / "gpt2_accumulated"]
    run_script("run_pretraining.py", *common, *UNEVEN, *more)
    assert_same_run(one_process, workspace / "gpt2_accumulated")


@pytest.mark.launch
def test_a_process_may_have_no_rows(common, workspace):
    few = ["--hidden_dropout", "0", "--max_steps", "4", "--batch_size", "1"]
    run_script("run_pretraining.py", *common, *few, "--model_dir", workspace / "gpt2_idle1")
    launch("cpu_2proc.yaml", "run_pretraining.py", *common, *few, "--model_dir", workspace / "gpt2_idle2")
    assert largest_difference(weights(workspace / "gpt2_idle1"), weights(workspace / "gpt2_idle2")) < 1e-6


PHASES = ["--phase_steps", "30", "20", "--sequence_length", "64", "128", "--batch_size", "4", "2", "--save_steps", "5"]
PHASES += ["--micro_batch_size", "4", "1", "--logging_steps", "5", "--ema_decay", "0.9", "--learning_rate", "3e-3"]


def test_killed_in_either_phase_ends_with_the_same_bits(common, workspace):
    """LMSCRIPTS_KILLS=20 kills more often than the default."""
    whole, run_dir = workspace / "gpt2_phases", workspace / "gpt2_killed"
    run_script("run_pretraining.py", *common, *PHASES, "--model_dir", whole)
    arguments = [*common, *PHASES, "--model_dir", run_dir, "--do_continue"]
    assert kill_at_random_moments(arguments, run_dir, workspace / "gpt2_killed.txt") >= 3
    run_script("run_pretraining.py", *arguments)
    assert same_bits(weights(whole), weights(run_dir))
    assert losses(whole) == losses(run_dir)
    found = losses(whole)
    assert found[50, "eval_loss"] < found[0, "eval_loss"] - 0.5
    assert found[50, "eval_accuracy"] > 0.01


# ---- warmup, stable, decay ---------------------------------------------------------------------------------------

WSD = ["--schedule", "wsd", "--max_steps", "20", "--save_steps", "5", "--keep_last", "9", "--batch_size", "4"]


@pytest.fixture(scope="module")
def stable(common, workspace):
    arguments = [*common, *WSD, "--decay_steps", "5", "--model_dir", workspace / "stable"]
    run_script("run_pretraining.py", *arguments)
    return workspace / "stable"


def test_a_branch_where_the_run_decays_is_the_run(common, workspace, stable):
    """From the last stable checkpoint: the same rows, moments and rates, so every bit is the same."""
    branch = workspace / "branch15"
    more = ["--decay_from", stable / "checkpoint-15", "--decay_steps", "5", "--model_dir", branch]
    run_script("run_pretraining.py", "--config", stable / "config.yaml", *more)
    assert same_bits(weights(stable), weights(branch))


def test_a_branch_from_the_middle_falls_to_its_own_end(common, workspace, stable):
    branch = workspace / "branch10"
    more = ["--decay_from", stable / "checkpoint-10", "--decay_steps", "4", "--model_dir", branch]
    run_script("run_pretraining.py", *more, "--logging_steps", "1")  # nothing of the run is said again
    rates = {r["step"]: r["learning_rate"] for r in log_of(branch) if "learning_rate" in r}
    assert rates == pytest.approx({11: 1e-3, 12: 0.75e-3, 13: 0.5e-3, 14: 0.25e-3})
    stopped = workspace / "branch10_stopped"
    for again in ([], ["--do_continue"]):
        where = ["--model_dir", stopped, "--stop_at_step", "14" if again else "12"]
        run_script("run_pretraining.py", *common, *more[:4], *where, "--batch_size", "4", *again)
    assert same_bits(weights(branch), weights(stopped))
    for file in (branch / "config.yaml", branch / "final" / "README.md"):  # they say what was run
        assert "\nschedule: wsd\n" in file.read_text(encoding="utf-8")
        assert "\nmax_steps: 14\n" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("checkpoint", "more", "sentence"),
    [
        ("checkpoint-20", [], "was stable from step 3 to 15 only"),
        ("checkpoint-10", ["--learning_rate", "0.5"], "--learning_rate 0.5 has no effect with --decay_from"),
        ("checkpoint-10", ["--n_head", "16"], "(config.json: n_head is 2 there, 16 here)"),
        ("checkpoint-10", ["--seed", "7"], "seed: 42 then, 7 now"),
        ("checkpoint-10", ["--start_from", "x", "--carry_over", "weights"], "--start_from x has no effect with"),
        ("nothing", [], "is no checkpoint and holds none"),
    ],
)
def test_what_no_branch_can_start_from(common, tmp_path, stable, checkpoint, more, sentence):
    arguments = [*common, "--batch_size", "4", "--decay_from", stable / checkpoint, "--decay_steps", "4", *more]
    done = run_script("run_pretraining.py", *arguments, "--model_dir", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluation_and_checkpoints_at_the_end_of_every_epoch(common, tmp_path):
    arguments = [*common, "--epochs", "1.5", "--batch_size", "100", "--save_steps", "epoch", "--n_layer", "1"]
    done = run_script("run_pretraining.py", *arguments, "--model_dir", tmp_path / "run")
    rows = int(re.search(r"in (\d+) rows of", done.stdout)[1])
    ends = [-(-rows // 100), -(-round(1.5 * rows) // 100)]
    assert newest_step(tmp_path / "run") == ends[-1]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in ends}
    assert [r["step"] for r in log_of(tmp_path / "run") if "eval_loss" in r] == [0, *ends]


def test_a_run_whose_rate_always_falls_has_no_branch(common, one_process, tmp_path):
    more = ["--decay_from", one_process, "--decay_steps", "4", "--model_dir", tmp_path / "run"]
    done = run_script("run_pretraining.py", *common, *more, check=False)
    assert done.returncode == 2
    assert "was trained with --schedule linear, whose rate is never stable" in done.stderr


# ---- models ------------------------------------------------------------------------------------------------------


def test_sizes_of_the_line_make_the_model(common, tmp_path):
    sizes = ["--n_layer", "3", "--n_head", "4", "--n_embd", "48", "--block_size", "96", "--max_steps", "2"]
    done = run_script("run_pretraining.py", *common, *sizes, "--model_dir", tmp_path / "run")
    assert "--block_size is now --sequence_length" in done.stdout + done.stderr
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    wanted = {"n_layer": 3, "n_head": 4, "n_embd": 48, "n_positions": 96, "n_inner": 192}
    assert {name: config[name] for name in wanted} == wanted
    sizes[sizes.index("--n_head") + 1] = "8"  # the weights have the same shapes
    again = [*common, *sizes[:-1], "4", "--model_dir", tmp_path / "run", "--do_continue"]
    done = run_script("run_pretraining.py", *again, check=False)
    assert done.returncode == 2
    assert "checkpoint-2 does not fit the model (config.json: n_head is 4 there, 8 here)" in done.stderr
    assert not (tmp_path / "run" / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--mask_unit", "word"], "--mask_unit word has no effect on the objective causal"),
        (["--do_whole_word_mask"], "--do_whole_word_mask true has no effect on the objective causal"),
        (["--mask_probability", "0.2"], "--mask_probability 0.2 has no effect on the objective causal"),
        (["--n_embd", "33"], "--n_embd 33 is not divisible by --n_head 2"),
        (["--z_loss", "-1"], "--z_loss must be at least 0, got -1.0"),
        (["--model_type", "bert-test", "--z_loss", "1"], "--z_loss 1.0 has no effect on the objective masked"),
        (["--decay_from", "x"], "--decay_from x needs --decay_steps"),
    ],
)
def test_options_without_effect_are_refused(common, tmp_path, more, sentence):
    arguments = [*common, *more, "--model_dir", tmp_path / "run"]
    if "--model_type" in more:
        arguments.remove("--model_type")
        arguments.remove("gpt2-test")
    done = run_script("run_pretraining.py", *arguments, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_handed_over_writes_text(common, workspace, one_process):
    final = one_process / "final"
    card = (final / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation" in card
    examples = card.partition("## Examples\n\n")[2].partition("\n\n## ")[0].splitlines()
    assert len(examples) == 3
    assert all(re.fullmatch(r"- .+ \*\*.*\*\*", line) for line in examples)
    assert "held-out bits per text byte" in card
    writer = pipeline("text-generation", model=str(final))
    assert writer("水は", max_new_tokens=5, do_sample=False)[0]["generated_text"]


def test_going_on_with_any_decoder(common, tokenizer_dir, tmp_path):
    """A LLaMA that was saved elsewhere: trained on, continued from a checkpoint, and loaded by the Auto class."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    arguments = [*common, "--pretrained_model_name_or_path", tmp_path / "llama", "--max_steps", "6"]
    arguments += ["--frozen_layers", "1", "--batch_size", "4", "--schedule", "wsd", "--decay_steps", "1"]
    run_script("run_pretraining.py", *arguments, "--model_dir", tmp_path / "whole")
    for more in (["--stop_at_step", "3"], ["--do_continue"]):
        run_script("run_pretraining.py", *arguments, *more, "--model_dir", tmp_path / "cut")
    after = weights(tmp_path / "whole")
    assert same_bits(after, weights(tmp_path / "cut"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final")
    assert isinstance(model, LlamaForCausalLM)
    for name, tensor in LlamaForCausalLM.from_pretrained(tmp_path / "llama").state_dict().items():
        frozen = "embed_tokens" in name or ".layers.0." in name
        assert torch.equal(after[name], tensor) == frozen, name
    shutil.rmtree(tmp_path / "llama")  # a branch is made of its checkpoint
    branch = ["--decay_from", tmp_path / "whole" / "checkpoint-5", "--decay_steps", "1"]
    run_script("run_pretraining.py", *branch, "--model_dir", tmp_path / "branch")
    assert same_bits(after, weights(tmp_path / "branch"))
