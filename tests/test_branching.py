"""Options of a decay branch: taken from the run that it leaves, settled by the checkpoint, or refused. No training."""

import dataclasses
import importlib.util
import json
import shutil
import sys

import pytest
from conftest import ROOT

from lmscripts.options import lightning
from lmscripts.options.parsing import dump_options, parse_options
from lmscripts.training.checkpoint import write_checksums
from lmscripts.training.plan import branch_options


@pytest.fixture(scope="module")
def script():
    """The real script, whose options are what is branched."""
    specification = importlib.util.spec_from_file_location(
        "branching_run_pretraining", ROOT / "scripts/run_pretraining.py"
    )
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


FIXED = {"model_type": "gpt2-tiny", "seed": 7, "sequence_length": [64], "batch_size": [4], "mask_unit": "token"}
FIXED |= {"phase_steps": [], "format": 2, "token store": ["x"], "beta2": 0.95, "mask_probability": [0.15]}
PLAN = {"schedule": "wsd", "peak": 1e-3, "warmup_steps": 3, "max_steps": 20, "decay_steps": 5, "final_ratio": 0.0}


def save(folder, step, plan=PLAN, **fixed):
    """A checkpoint as far as options are concerned."""
    folder.mkdir(parents=True)
    state = {"schedule": plan, "fixed": FIXED | fixed, "progress": {"step": step}}
    (folder / "training_state.json").write_text(json.dumps(state), encoding="utf-8")
    write_checksums(folder)


@pytest.fixture
def parse(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def parsed(line):
        also = {"one_of": [lightning.LENGTHS], "beneath": branch_options}
        also |= {"description": "", "argv": line.split(), "foreign": lightning, "more": script.SETTINGS}
        options, further = parse_options(script.Options, **also)
        parsed.older = further.settings[script.OlderNames]
        return options

    return parsed


@pytest.fixture
def base(parse, tmp_path):
    """A run in w/ that began with a pretrained model, and whose store and preset are not named again below."""
    line = "--model_dir w --model_type gpt2-tiny --dataset_dir store --seed 7 --pretrained_model_name_or_path m/llama"
    line += " --schedule wsd --max_steps 20 --decay_steps 5 --learning_rate 1e-3 --stop_at_step 10 --max_time 3h"
    options = parse(line + " --hidden_dropout 0.05 --precision bf16 --process_shares 3 1")
    save(tmp_path / "w" / "checkpoint-10", 10)
    (tmp_path / "w" / "config.yaml").write_text(dump_options(options, parse.older), encoding="utf-8")
    return options


def test_a_branch_repeats_nothing_of_the_run(parse, base):
    branch = parse("--decay_from w --decay_steps 4 --model_dir b")
    other = {"model_dir": "b", "decay_from": "w/checkpoint-10", "decay_steps": 4, "max_steps": 14, "warmup_steps": 3}
    other |= {"stop_at_step": None, "max_time": None, "process_shares": ()}
    other |= {"sequence_length": (64,), "batch_size": (4,), "beta2": 0.95}  # as the preset was then
    assert branch == dataclasses.replace(base, **other)


def test_what_is_written_down_repeats_the_branch(parse, base, tmp_path):
    branch = parse("--decay_from w/checkpoint-10 --decay_steps 4 --model_dir b --precision no")
    (tmp_path / "again.yaml").write_text(dump_options(branch, parse.older), encoding="utf-8")
    assert parse("--config again.yaml") == branch
    assert "\nschedule: wsd\n" in dump_options(branch, parse.older)


def test_the_file_of_the_run_may_be_given_as_well(parse, base):
    """Where that job stopped is its own affair: the run was stopped at step 10, where this one begins."""
    branch = parse("--config w/config.yaml --decay_from w/checkpoint-10 --decay_steps 4 --model_dir b")
    assert (branch.max_steps, branch.stop_at_step, branch.max_time) == (14, None, None)
    line = "--config w/config.yaml --decay_from w/checkpoint-10 --decay_steps 4 --model_dir b --stop_at_step 12"
    assert parse(line).stop_at_step == 12


def test_the_length_of_a_file_is_that_of_the_run_and_not_of_its_branch(parse, base, tmp_path):
    """A run whose length stood on the line, and its file with another one."""
    (tmp_path / "l.yaml").write_text("epochs: 3\n", encoding="utf-8")
    branch = parse("--config l.yaml --decay_from w/checkpoint-10 --decay_steps 4 --model_dir b")
    assert (branch.max_steps, branch.epochs) == (14, None)


def test_what_is_given_wins_with_what_belongs_to_it(parse, base):
    branch = parse("--decay_from w --decay_steps 4 --model_dir b --input_file new.txt --fp16_type 1 --tokenizer_dir t")
    assert (branch.input_file, branch.dataset_dir, branch.num_workers) == (("new.txt",), (), None)
    assert (parse.older.fp16_type, branch.precision, branch.hidden_dropout) == (1, None, 0.05)


def test_a_checkpoint_that_was_taken_elsewhere(parse, base, tmp_path):
    """Without config.yaml the settings in the checkpoint still say which model it is."""
    shutil.move(tmp_path / "w" / "checkpoint-10", tmp_path / "kept")
    branch = parse("--decay_from kept --decay_steps 4 --model_dir b --dataset_dir store")
    assert (branch.model_type, branch.seed, branch.batch_size) == ("gpt2-tiny", 7, (4,))
    assert branch.pretrained_model_name_or_path is None


def test_a_branch_that_goes_on_needs_nothing_of_the_run(parse, base, tmp_path):
    branch = parse("--decay_from w --decay_steps 4 --model_dir b")
    save(tmp_path / "b" / "checkpoint-12", 12, PLAN | {"max_steps": 14, "decay_steps": 4})
    save(tmp_path / "b" / "checkpoint-13", 13)
    (tmp_path / "b" / "checkpoint-13" / "training_state.json").write_text("{", encoding="utf-8")  # damaged
    (tmp_path / "b" / "config.yaml").write_text(dump_options(branch, parse.older), encoding="utf-8")
    shutil.rmtree(tmp_path / "w")
    again = parse("--decay_from w/checkpoint-10 --decay_steps 4 --model_dir b --do_continue")
    assert again == dataclasses.replace(branch, do_continue=True)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--max_steps 999", "--max_steps 999 has no effect with --decay_from: in this branch it is 14"),
        ("--max_steps 20", "--max_steps 20 has no effect with --decay_from"),
        ("--epochs 3", "--epochs 3.0 has no effect with --decay_from: this branch has none"),
        ("--trainer.max_epochs 3", "--epochs 3.0 has no effect with --decay_from"),
        ("--schedule cosine", "--schedule cosine has no effect with --decay_from: in this branch it is wsd"),
        ("--schedule linear", "--schedule linear has no effect with --decay_from"),  # the default, but given
        ("--warmup_steps 777", "--warmup_steps 777 has no effect with --decay_from: in this branch it is 3"),
        ("--learning_rate 0.5", "--learning_rate 0.5 has no effect with --decay_from: in this branch it is 0.001"),
        ("--pretrained_model_name_or_path m/x", "m/x has no effect with --decay_from: in this branch it is m/llama"),
        ("--phase_steps 3 4", "--phase_steps 3 4 has no effect with --decay_from: this branch has none"),
        ("--start_from x --carry_over weights", "--start_from x has no effect with --decay_from"),
        ("--config cosine.yaml", "--schedule cosine has no effect with --decay_from"),
    ],
)
def test_options_that_a_branch_would_ignore(parse, base, tmp_path, more, sentence, capsys):
    (tmp_path / "cosine.yaml").write_text("schedule: cosine", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        parse(f"--decay_from w/checkpoint-10 --decay_steps 4 --model_dir b {more}")
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "plan", "fixed", "sentence"),
    [
        (2, PLAN, {}, "is at step 2, but its rate was stable from step 3 to 15 only"),
        (16, PLAN, {}, "is at step 16, but its rate was stable from step 3 to 15 only"),
        (10, PLAN | {"schedule": "linear"}, {}, "was trained with --schedule linear, whose rate is never stable"),
        (10, None, {}, "does not say its schedule"),
        (10, PLAN, {"phase_steps": [5, 15]}, "is of a run with --phase_steps 5 15"),
    ],
)
def test_checkpoints_without_branches(parse, tmp_path, step, plan, fixed, sentence, capsys):
    save(tmp_path / "w" / f"checkpoint-{step}", step, plan, **fixed)
    with pytest.raises(SystemExit):
        parse(f"--decay_from w/checkpoint-{step} --decay_steps 4 --model_dir b")
    assert sentence in capsys.readouterr().err


def test_the_end_of_a_branch_has_to_be_said(parse, base, capsys):
    with pytest.raises(SystemExit):
        parse("--decay_from w --model_dir b")
    assert "--decay_from w needs --decay_steps" in capsys.readouterr().err


def test_other_runs_are_left_alone(parse):
    assert parse("--model_dir b --model_type gpt2-tiny --dataset_dir s").schedule == "linear"
