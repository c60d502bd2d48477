"""Whole ELECTRA runs: shape of the cluster, kills, phases, further pretraining, what is handed over."""

import itertools
import json
import shutil

import pytest
import torch
from conftest import TINY_PRESET, launch, run_script
from runs import kill_at_random_moments, largest_difference, log_of, losses, same_bits, weights
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

ELECTRA = {**TINY_PRESET, "embedding-size": 16, "generator-size": "1/2", "mask-percent": 15}


@pytest.fixture(scope="module")
def common(store_dir, workspace):
    """Arguments of a short run."""
    file = workspace / "electra.json"
    file.write_text(json.dumps({"electra-test": ELECTRA, "bert-test": TINY_PRESET}), encoding="utf-8")
    return ["--dataset_dir", store_dir, "--parameter_file", file, "--model_type", "electra-test", "--tracker", "none"]


UNEVEN = [
    "--hidden_dropout",
    "0.1",
    "--attention_dropout",
    "0.1",
    "--epochs",
    "0.2",
    "--batch_size",
    "20",
    "--do_whole_word_mask",
]


@pytest.fixture(scope="module")
def one_process(common, workspace):
    run_dir = workspace / "electra_one"
    run_script("run_pretraining.py", *common, *UNEVEN, "--model_dir", run_dir)
    assert len([r for r in log_of(run_dir) if "loss" in r]) > 3
    return run_dir


def assert_same_run(one, other):
    """What is guaranteed: the samples are functions of (seed, epoch, row, position), so both halves agree.

    Only where a draw falls within a rounding error of the border between two ids may another id be sampled.
    """
    assert largest_difference(weights(one), weights(other)) < 1e-6
    a, b = losses(one), losses(other)
    assert a.keys() == b.keys()
    assert {"eval_generator_loss", "eval_discriminator_recall"} <= {name for _, name in a}
    assert all(abs(a[key] - b[key]) <= 1e-6 * abs(a[key]) for key in a)


@pytest.mark.launch
def test_result_does_not_depend_on_the_processes(common, workspace, one_process):
    run_dir = workspace / "electra_two"
    more = ["--process_shares", "3", "1", "--micro_batch_size", "4"]
    launch("cpu_2proc.yaml", "run_pretraining.py", *common, *UNEVEN, *more, "--model_dir", run_dir)
    assert_same_run(one_process, run_dir)


def test_result_does_not_depend_on_accumulation(common, workspace, one_process):
    run_dir = workspace / "electra_accumulated"
    run_script("run_pretraining.py", *common, *UNEVEN, "--micro_batch_size", "3", "--model_dir", run_dir)
    assert_same_run(one_process, run_dir)


def test_electra_as_a_masked_language_model(common, tmp_path):
    """One model with the head that its generator has elsewhere, of the sizes that the line says."""
    run_dir = tmp_path / "run"
    sizes = ["--n_layer", "3", "--n_head", "4", "--n_embd", "48", "--max_steps", "4"]
    arguments = [*common, *sizes, "--objective", "masked", "--model_dir", run_dir]
    run_script("run_pretraining.py", *arguments, "--stop_at_step", "2")
    other = [*arguments, "--do_continue"]
    other[other.index("masked")] = "replaced"
    done = run_script("run_pretraining.py", *other, check=False)
    assert done.returncode == 2
    assert "objective: masked then, not given now" in done.stderr
    run_script("run_pretraining.py", *arguments, "--do_continue")
    model, info = AutoModelForMaskedLM.from_pretrained(run_dir / "final", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not (run_dir / "final" / "generator").exists()
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (3, 4, 48)
    assert {"loss", "eval_loss", "eval_accuracy"} <= {name for _, name in losses(run_dir)}


LAUNCHED = ["--max_steps", "60", "--save_steps", "5", "--logging_steps", "10", "--batch_size", "6"]
LAUNCHED += ["--learning_rate", "3e-3", "--do_whole_word_mask"]


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(900)
def test_two_processes_killed_at_random_moments(common, workspace):
    """Both processes and their launcher are killed; every bit is as without, and the run has learned something."""
    run_dir, killed_dir = workspace / "electra_pair", workspace / "electra_pair_killed"
    launch("cpu_2proc.yaml", "run_pretraining.py", *common, *LAUNCHED, "--eval_every", "1", "--model_dir", run_dir)
    arguments = [*common, *LAUNCHED, "--eval_every", "1", "--model_dir", killed_dir, "--do_continue"]
    kills = kill_at_random_moments(arguments, killed_dir, workspace / "pair.txt", config="cpu_2proc.yaml", times=2)
    assert kills >= 2
    launch("cpu_2proc.yaml", "run_pretraining.py", *arguments)
    assert same_bits(weights(run_dir), weights(killed_dir))
    found = losses(run_dir)
    for name, better in [("generator_loss", -1), ("generator_accuracy", 1), ("discriminator_loss", -1)]:
        assert (found[60, f"eval_{name}"] - found[1, f"eval_{name}"]) * better > 0, name


# ---- phases ------------------------------------------------------------------------------------------------------

PHASES = ["--phase_steps", "22", "18", "--sequence_length", "64", "128", "--batch_size", "4", "2", "--save_steps", "5"]
PHASES += ["--micro_batch_size", "4", "1", "--logging_steps", "5", "--mask_unit", "span", "--ema_decay", "0.9"]


@pytest.fixture(scope="module")
def two_phases(common, workspace):
    done = run_script("run_pretraining.py", *common, *PHASES, "--model_dir", workspace / "phases")
    assert "1: steps 1 to 22" in done.stdout
    assert "2: steps 23 to 40" in done.stdout
    return workspace / "phases"


@pytest.mark.slow
def test_killed_in_either_phase_ends_with_the_same_bits(common, workspace, two_phases):
    run_dir = workspace / "phases_killed"
    arguments = [*common, *PHASES, "--model_dir", run_dir, "--do_continue"]
    assert kill_at_random_moments(arguments, run_dir, workspace / "phases_killed.txt") >= 3
    run_script("run_pretraining.py", *arguments)
    assert same_bits(weights(two_phases), weights(run_dir))
    assert losses(two_phases) == losses(run_dir)


@pytest.mark.parametrize("stops", [pytest.param([3, 30], marks=pytest.mark.slow), [22]], ids=str)
def test_stopped_in_each_phase_and_between_them(common, workspace, two_phases, stops):
    run_dir = workspace / f"phases_stopped{stops[0]}"
    for number, stop in enumerate([*stops, 40]):
        more = ["--do_continue"] * (number > 0)
        run_script("run_pretraining.py", *common, *PHASES, *more, "--stop_at_step", str(stop), "--model_dir", run_dir)
    assert same_bits(weights(two_phases), weights(run_dir))


def test_one_schedule_runs_through_both_phases(two_phases):
    rates = {r["step"]: r["learning_rate"] for r in log_of(two_phases) if "learning_rate" in r}
    falling = [rates[step] for step in sorted(rates) if step > 3]
    steps = [a - b for a, b in itertools.pairwise(falling)]
    assert all(abs(step - steps[0]) < 1e-12 for step in steps)


def test_both_phases_learn_in_their_own_length(two_phases):
    model = json.loads((two_phases / "final" / "config.json").read_text())
    assert model["max_position_embeddings"] == 128
    before = load_file(two_phases / "checkpoint-30" / "model.safetensors")
    after = load_file(two_phases / "checkpoint-40" / "model.safetensors")
    name = "electra.embeddings.position_embeddings.weight"
    assert (before[name][64:] != after[name][64:]).any(dim=1).sum() > 30


def test_the_exported_model_is_the_average(two_phases):
    averaged = load_file(two_phases / "checkpoint-40" / "average.safetensors")
    final = load_file(two_phases / "final" / "model.safetensors")
    trained = load_file(two_phases / "checkpoint-40" / "model.safetensors")
    name = "electra.encoder.layer.0.output.dense.weight"
    assert torch.equal(final[name], averaged[f"discriminator.{name}"])
    assert not torch.equal(final[name], trained[name])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--phase_steps", "5", "5", "--batch_size", "4", "4", "4"], "--batch_size has 3 values for 2 phases"),
        (["--sequence_length", "64", "128"], "--sequence_length has 2 values for 1 phase "),
        (["--phase_steps", "5", "5", "--max_steps", "10"], "--max_steps 10 has no effect with --phase_steps"),
        (["--phase_steps", "5", "0"], "--phase_steps must be greater than 0, got 0"),
        (["--start_from", "somewhere"], "--start_from somewhere needs --carry_over"),
        (["--carry_over", "weights"], "--carry_over weights has no effect without --start_from"),
        (["--mask_unit", "span", "--do_whole_word_mask"], "contradict each other"),
        (["--ema_decay", "1"], "--ema_decay must lie between 0 and 1, got 1"),
        (
            ["--model_type", "bert-test", "--generator_weight", "2"],
            "--generator_weight 2.0 has no effect on the objective masked",
        ),
        (["--frozen_layers", "1"], "layers that were never trained"),
        (["--pretrained_generator_model_name_or_path", "x"], "give both"),
        (["--pretrained_model_name_or_path", "x"], "ELECTRA goes on from a pretrained generator and discriminator"),
    ],
)
def test_options_that_contradict_each_other(common, tmp_path, more, sentence):
    arguments = [*common, *more, "--model_dir", tmp_path / "run"]
    if "--model_type" in more:
        arguments.remove("--model_type")
        arguments.remove("electra-test")
    done = run_script("run_pretraining.py", *arguments, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# ---- from one run to another -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(common, workspace):
    """Six steps of rows of 64 tokens, then to be gone on from with rows of 128."""
    arguments = [*common, "--max_steps", "6", "--save_steps", "6", "--logging_steps", "1", "--hidden_dropout", "0"]
    run_script("run_pretraining.py", *arguments, "--model_dir", workspace / "short")
    return workspace / "short"


def first_record(run_dir):
    return next(r for r in log_of(run_dir) if "learning_rate" in r)


@pytest.mark.parametrize("carry_over", ["weights", "moments", "everything"])
def test_what_is_carried_over(common, tmp_path, short, carry_over):
    more = ["--start_from", short, "--carry_over", carry_over, "--sequence_length", "128", "--max_steps", "12"]
    more += ["--stop_at_step", "7" if carry_over == "everything" else "1", "--logging_steps", "1"]
    run_script("run_pretraining.py", *common, *more, "--hidden_dropout", "0", "--model_dir", tmp_path / "run")
    record = first_record(tmp_path / "run")
    everything = carry_over == "everything"
    assert record["step"] == (7 if everything else 1)
    assert record["learning_rate"] == pytest.approx(1e-3 * (6 / 9 if everything else 1 / 3))
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    state = load_file(checkpoint / "optimizer.safetensors")
    steps = {float(tensor) for name, tensor in state.items() if name.endswith("/step")}
    assert steps == ({1.0} if carry_over == "weights" else {7.0})
    old = load_file(short / "checkpoint-6" / "model.safetensors")
    new = load_file(checkpoint / "model.safetensors")
    name = "electra.embeddings.position_embeddings.weight"
    assert new[name].shape[0] == 2 * old[name].shape[0]
    assert (new[name][:64] - old[name]).abs().max() < 0.01  # a step or none away, not initialised anew
    assert (new[name][64:] - old[name]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--carry_over", "moments", "--optimizer", "radam"], "was trained with the optimizer adamw"),
        (["--carry_over", "weights", "--model_type", "bert-test"], "does not fit the model"),
    ],
    ids=["another optimizer", "another model"],
)
def test_what_cannot_be_carried_over(common, tmp_path, short, more, sentence):
    arguments = [*common, "--start_from", short, "--model_dir", tmp_path / "run"]
    if "--model_type" in more:
        arguments = [a for a in arguments if a not in ("--model_type", "electra-test")]
    done = run_script("run_pretraining.py", *arguments, *more, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistake_does_not_block_the_folder(common, tmp_path, short):
    """The corrected command runs in the folder in which the first one was refused."""
    arguments = [*common, "--start_from", short, "--carry_over", "weights", "--max_steps", "1"]
    wrong = [argument if argument != "electra-test" else "bert-test" for argument in arguments]
    assert run_script("run_pretraining.py", *wrong, "--model_dir", tmp_path / "run", check=False).returncode == 2
    done = run_script("run_pretraining.py", *arguments, "--model_dir", tmp_path / "run")
    assert f"starting from {short / 'checkpoint-6'}" in done.stdout
    card = (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert f"Trained further from {short.name}" in card


def test_nothing_is_left_to_do(common, tmp_path, short):
    more = ["--start_from", short, "--carry_over", "everything", "--max_steps", "6", "--model_dir", tmp_path / "run"]
    done = run_script("run_pretraining.py", *common, *more, check=False)
    assert done.returncode == 2
    assert "is at step 6, and this one ends at step 6" in done.stderr
    assert not (tmp_path / "run" / "final").exists()


def test_a_damaged_checkpoint_of_another_run_is_passed_over_aloud(common, tmp_path, short):
    other = tmp_path / "other"
    shutil.copytree(short, other)
    shutil.copytree(other / "checkpoint-6", other / "checkpoint-7")
    (other / "checkpoint-7" / "model.safetensors").write_bytes(b"half")
    more = ["--start_from", other, "--carry_over", "moments", "--max_steps", "1", "--model_dir", tmp_path / "run"]
    done = run_script("run_pretraining.py", *common, *more)
    assert "checkpoint-7 is damaged" in done.stdout
    assert f"starting from {other / 'checkpoint-6'}" in done.stdout
    assert (other / "checkpoint-7").exists()


def test_the_card_of_a_pair_says_how_to_use_each_half(short, tmp_path):
    from transformers import AutoModelForPreTraining, pipeline

    final = short / "final"
    card = (final / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag" not in card
    assert 'pipeline("fill-mask", model="PATH/TO/THIS/FOLDER/generator")' in card
    assert len(pipeline("fill-mask", model=str(final / "generator"))("水は[MASK]。")) == 5
    AutoModelForPreTraining.from_pretrained(final)


def test_a_start_that_is_no_checkpoint_leaves_no_run(common, tmp_path):
    (tmp_path / "empty").mkdir()
    more = ["--start_from", tmp_path / "empty", "--carry_over", "weights", "--model_dir", tmp_path / "run"]
    done = run_script("run_pretraining.py", *common, *more, check=False)
    assert done.returncode == 2
    assert "is no checkpoint and holds none" in done.stderr
    assert not (tmp_path / "run").exists()


def test_further_pretraining_of_a_pair(common, short, tmp_path):
    final = short / "final"
    more = ["--pretrained_generator_model_name_or_path", final / "generator", "--max_steps", "3"]
    more += ["--pretrained_discriminator_model_name_or_path", final, "--frozen_layers", "1", "--sequence_length", "96"]
    preset = {name: value for name, value in ELECTRA.items() if "size" not in name or name == "batch-size"}
    for name in ("number-of-layers", "attention-heads", "sequence-length"):
        preset.pop(name)
    additional = tmp_path / "additional.json"
    keys = {"pretrained_generator_model_name_or_path": "x", "pretrained_discriminator_model_name_or_path": "y"}
    additional.write_text(json.dumps({"electra-test": {**preset, **keys, "flozen-layers": -1}}), encoding="utf-8")
    arguments = [additional if argument == common[3] else argument for argument in common]
    done = run_script("run_pretraining.py", *arguments, *more, "--model_dir", tmp_path / "run")
    assert "64 position embeddings were lengthened to 96" in done.stdout
    old = {"": load_file(final / "model.safetensors"), "generator": load_file(final / "generator/model.safetensors")}
    for subfolder, before in old.items():
        after = load_file(tmp_path / "run" / "final" / subfolder / "model.safetensors")
        for name, tensor in before.items():
            if name.endswith("position_embeddings.weight"):
                after[name] = after[name][: len(tensor)]
            frozen = "embeddings" in name or ".layer.0." in name or name == "generator_lm_head.weight"
            assert torch.equal(after[name], tensor) == frozen, name


def test_a_further_run_is_continued_without_what_it_began_with(common, tmp_path):
    arguments = [*common, "--max_steps", "4", "--hidden_dropout", "0"]
    arguments[arguments.index("electra-test")] = "bert-test"
    run_script("run_pretraining.py", *arguments, "--model_dir", tmp_path / "first")
    more = ["--pretrained_model_name_or_path", tmp_path / "first" / "final", "--frozen_layers", "1"]
    run_script("run_pretraining.py", *arguments, *more, "--model_dir", tmp_path / "whole")
    run_script("run_pretraining.py", *arguments, *more, "--model_dir", tmp_path / "cut", "--stop_at_step", "2")
    shutil.rmtree(tmp_path / "first")
    run_script("run_pretraining.py", *arguments, *more, "--model_dir", tmp_path / "cut", "--do_continue")
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_further_pretraining_of_a_masked_language_model(common, workspace, tmp_path):
    """Frozen layers keep every bit, the others move; a second run on a model that is no BERT is refused."""
    arguments = [*common, "--max_steps", "4"]
    arguments[arguments.index("electra-test")] = "bert-test"
    run_script("run_pretraining.py", *arguments, "--model_dir", tmp_path / "first")
    more = ["--pretrained_model_name_or_path", tmp_path / "first" / "final", "--frozen_layers", "1"]
    run_script("run_pretraining.py", *arguments, *more, "--model_dir", tmp_path / "second")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == ("embeddings" in name or ".layer.0." in name), name
    twice = [*arguments, *more[:2], "--start_from", tmp_path / "first", "--carry_over", "weights"]
    done = run_script("run_pretraining.py", *twice, "--model_dir", tmp_path / "twice", check=False)
    assert done.returncode == 2
    assert "are both a beginning" in done.stderr
    wrong = [*common, "--pretrained_model_name_or_path", tmp_path / "first" / "final"]
    wrong[wrong.index("electra-test")] = "bert-test"
    (tmp_path / "first" / "final" / "config.json").write_text('{"model_type": "electra"}', encoding="utf-8")
    done = run_script("run_pretraining.py", *wrong, "--model_dir", tmp_path / "third", check=False)
    assert done.returncode == 2
    assert "electra" in done.stderr
    assert not (tmp_path / "third").exists()
