"""Files and command lines of an older GPT-2 trainer: each key means what it meant there, or is refused by its name."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import PATIENCE, ROOT

from lmscripts.options import lightning
from lmscripts.options.checks import parse_duration
from lmscripts.options.parsing import dump_options, option, parse_options, parse_options_with_origin


@dataclass(frozen=True)
class Options:
    """What run_pretraining.py has of the options that the older keys mean."""

    model_dir: str = option(help="Folder.", required=True)
    model_type: str = option(help="Preset.", required=True)
    do_continue: bool = option(False, help="Go on.")
    max_time: str | None = option(None, help="Time.")
    logging_steps: int | None = option(None, help="Steps.")
    save_steps: int | Literal["epoch"] | None = option(None, help="Steps.")
    eval_every: int | Literal["epoch"] | None = option(None, help="Steps.")
    tracker: tuple[str, ...] = option(("tensorboard",), help="Trackers.")
    seed: int = option(42, help="Seed.")
    input_file: tuple[str, ...] = option((), help="Text.")
    validation_file: tuple[str, ...] = option((), help="Text.")
    tokenizer_dir: str | None = option(None, help="Tokenizer.")
    sequence_length: tuple[int, ...] = option((), help="Length.")
    pretrained_model_name_or_path: str | None = option(None, help="Model.")
    n_layer: int | None = option(None, help="Layers.")
    n_head: int | None = option(None, help="Heads.")
    n_embd: int | None = option(None, help="Width.")
    hidden_dropout: float = option(0.0, help="Dropout.")
    attention_dropout: float = option(0.0, help="Dropout.")
    attention: Literal["auto", "sdpa", "varlen"] = option("auto", help="Path.")
    phase_steps: tuple[int, ...] = option((), help="Phases.")
    batch_size: tuple[int, ...] = option((), help="Rows.")
    micro_batch_size: tuple[int, ...] = option((32,), help="Rows.")
    optimizer: Literal["adamw", "adam"] = option("adamw", help="Optimizer.")
    learning_rate: float | None = option(None, help="Rate.")
    schedule: Literal["linear", "constant"] = option("linear", help="Schedule.")
    warmup_steps: int | None = option(None, help="Warmup.")
    max_steps: int | None = option(None, help="Steps.")
    epochs: float | None = option(None, help="Epochs.")
    weight_decay: float = option(0.01, help="Decay.")
    beta2: float | None = option(None, help="Moment.")
    epsilon: float = option(1e-6, help="Epsilon.")
    max_grad_norm: float = option(1.0, help="Norm.")
    precision: Literal["no", "fp16", "bf16", "fp16_on_gpu"] | None = option(None, help="Precision.")
    deterministic: bool = option(False, help="Bits.")


# The table of the document, with the callbacks that it recommends.
DOCUMENTED = """
trainer:
  seed_everything: 1000
  max_epochs: 10
  deterministic: true
  precision: 16
  accumulate_grad_batches: 16
  gradient_clip_val: 1
  callbacks:
    - class_path: pytorch_lightning.callbacks.LearningRateMonitor
    - class_path: pytorch_lightning.callbacks.GPUStatsMonitor
model:
  tokenizer_model: colorfulscoop/gpt2-small-ja
  train_file: data/train.txt
  valid_file: data/valid.txt
  block_size: 1024
  n_layer: 12
  n_head: 12
  n_embd: 768
"""
TEST_FILE = "  test_file: data/test.txt\n"
DOCUMENTED_VALUES = {
    "seed": 1000,
    "epochs": 10.0,
    "deterministic": True,
    "precision": "fp16_on_gpu",
    "batch_size": (32,),
    "micro_batch_size": (2,),
    "max_grad_norm": 1.0,
    "tokenizer_dir": "colorfulscoop/gpt2-small-ja",
    "input_file": ("data/train.txt",),
    "validation_file": ("data/valid.txt",),
    "sequence_length": (1024,),
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "learning_rate": 1e-4,
    "warmup_steps": 0,
    "schedule": "constant",
    "max_steps": None,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "logging_steps": 50,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "eval_every": "epoch",
    "save_steps": "epoch",
    "model_type": "gpt2-small",
    "model_dir": "lightning_logs/version_0",
}
# What its --print_config wrote: all arguments of the Trainer of Lightning 1.3.6 and of the model.
PRINTED = """
seed_everything: null
trainer:
  logger: true
  checkpoint_callback: true
  callbacks: null
  default_root_dir: null
  gradient_clip_val: 0.0
  gradient_clip_algorithm: norm
  process_position: 0
  num_nodes: 1
  num_processes: 1
  gpus: null
  auto_select_gpus: false
  tpu_cores: null
  log_gpu_memory: null
  progress_bar_refresh_rate: null
  overfit_batches: 0.0
  track_grad_norm: -1
  check_val_every_n_epoch: 1
  fast_dev_run: false
  accumulate_grad_batches: 1
  max_epochs: null
  min_epochs: null
  max_steps: null
  min_steps: null
  max_time: null
  limit_train_batches: 1.0
  limit_val_batches: 1.0
  limit_test_batches: 1.0
  limit_predict_batches: 1.0
  val_check_interval: 1.0
  flush_logs_every_n_steps: 100
  log_every_n_steps: 50
  accelerator: null
  sync_batchnorm: false
  precision: 32
  weights_summary: top
  weights_save_path: null
  num_sanity_val_steps: 2
  truncated_bptt_steps: null
  resume_from_checkpoint: null
  profiler: null
  benchmark: false
  deterministic: false
  reload_dataloaders_every_epoch: false
  auto_lr_find: false
  replace_sampler_ddp: true
  terminate_on_nan: false
  auto_scale_batch_size: false
  prepare_data_per_node: true
  plugins: null
  amp_backend: native
  amp_level: O2
  distributed_backend: null
  move_metrics_to_cpu: false
  multiple_trainloader_mode: max_size_cycle
  stochastic_weight_avg: false
model:
  tokenizer_model: null
  train_file: null
  valid_file: null
  test_file: null
  from_pretrained: null
  block_size: 1024
  n_layer: 12
  n_head: 12
  n_embd: 768
  batch_size: 2
  prefetch_factor: 10
  num_workers: 1
  shuffle_buffer_size: 1000
  lr: 0.0001
  num_warmup_steps: 0
  num_training_steps: null
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> Any:
    """The real script."""
    specification = importlib.util.spec_from_file_location("real_run_pretraining", ROOT / "scripts/run_pretraining.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def parse(*words: str, file: str | None = None, options_class: type[Any] = Options) -> Any:
    if file is not None:
        Path("config.yaml").write_text(file, encoding="utf-8")
        words = (*words, "--config", "config.yaml")
    also = {"foreign": lightning, "one_of": [lightning.LENGTHS]}
    return parse_options(options_class, description="Trains.", argv=words, **also)


def refusal(capsys: pytest.CaptureFixture[str], *words: str, file: str | None = None) -> str:
    """The one sentence with which options are refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(*words, file=file)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if ": error: " in line]
    assert len(lines) == 1
    assert captured.err.endswith(lines[0] + "\n")
    return lines[0].split(": error: ", 1)[1]


# ---- whole files -------------------------------------------------------------------------------------------------


def test_the_documented_file(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(file=DOCUMENTED + TEST_FILE)
    expected = DOCUMENTED_VALUES
    assert {name: getattr(options, name) for name in expected} == expected
    notices = capsys.readouterr().err.splitlines()
    for sentence in (
        "trainer.max_epochs is now --epochs",
        "trainer.seed_everything is now --seed",
        "trainer.precision 16 is now --precision fp16_on_gpu",
        "model.test_file has no effect: training does not read it; evaluate_lm.py --input_file takes it when the model "
        "is trained",
        "--optimizer is adam, as it was in the older trainer",
        "--weight_decay is 0, as it was in the older trainer",
        "--model_type is not given: gpt2-small",
        "--model_dir is not given: lightning_logs/version_0",
    ):
        assert sentence in notices
    assert len(set(notices)) == len(notices)
    for key in (*(f"trainer.{name}" for name in ("deterministic", "gradient_clip_val", "accumulate_grad_batches")),):
        assert sum(key in notice for notice in notices) == 1
    assert sum("LearningRateMonitor" in notice for notice in notices) == 1
    assert sum("GPUStatsMonitor" in notice for notice in notices) == 1
    assert not Path("lightning_logs").exists()  # parsing makes no folder: all processes have to find the same number


def test_the_documented_file_with_the_real_options(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(file=DOCUMENTED, options_class=script.Options)
    assert {name: getattr(options, name) for name in DOCUMENTED_VALUES} == DOCUMENTED_VALUES


def test_the_real_script_has_every_option_that_is_meant(script: Any) -> None:
    names = {field.name for field in fields(Options)}
    assert {*lightning.RENAMED.values(), *lightning.DEFAULTS, *lightning.SIZES} <= names
    assert names <= {field.name for field in fields(script.Options)}


def test_a_printed_file_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """All arguments at their defaults give what the older trainer did with no file at all."""
    options = parse(file=PRINTED)
    notices = capsys.readouterr().err
    assert options == parse("--model.n_layer=12", "--model.n_head=12", "--model.n_embd=768", "--model.block_size=1024",
                            "--trainer.precision=32")  # fmt: skip
    assert (options.epochs, options.max_grad_norm, options.seed) == (1000.0, 0.0, 42)
    assert (options.batch_size, options.micro_batch_size, options.schedule) == ((2,), (2,), "constant")
    for key in ("limit_train_batches", "num_sanity_val_steps", "amp_level", "resume_from_checkpoint", "num_nodes"):
        assert key not in notices


def test_every_argument_of_the_older_trainer_is_known() -> None:
    lines = [line for line in PRINTED.splitlines() if line.startswith("  ")]
    known = {key.rpartition(".")[2] for key in lightning.KEYS}
    assert len(lines) == 55 + 16
    assert not {line.strip().partition(":")[0] for line in lines} - known


def test_print_edit_config(capsys: pytest.CaptureFixture[str]) -> None:
    """`--print_config > config.yaml`, edit, `--config config.yaml`, with our names and with the older ones."""
    with pytest.raises(SystemExit) as stopped:
        parse("--print_config")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    edited = printed.replace("# model_dir:", "model_dir: run").replace("# model_type:", "model_type: gpt2-small")
    options = parse(file=edited.replace("epochs: null", "epochs: 3"))
    assert (options.epochs, options.optimizer, options.micro_batch_size) == (3.0, "adamw", (32,))
    assert capsys.readouterr().err == ""

    with pytest.raises(SystemExit) as stopped:
        parse("--print_config", "--trainer.max_epochs=3", file=DOCUMENTED)
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for line in ("epochs: 3.0", "batch_size: [32]", "optimizer: adam", "learning_rate: 0.0001"):
        assert f"\n{line}\n" in printed
    assert "trainer" not in printed
    expected = parse("--trainer.max_epochs=3", file=DOCUMENTED)
    capsys.readouterr()
    assert parse(file=printed) == expected
    assert capsys.readouterr().err == ""
    assert parse(file=dump_options(expected)) == expected


# ---- one key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed_everything", "7"], {"seed": 7}),
        (["--trainer.max_epochs=3"], {"epochs": 3.0, "max_steps": None}),
        (["--trainer.max-epochs", "3"], {"epochs": 3.0}),
        (["--trainer.max_steps", "500"], {"max_steps": 500, "epochs": None}),
        (["--trainer.deterministic"], {"deterministic": True}),
        (["--trainer.deterministic", "false"], {"deterministic": False}),
        (["--trainer.gradient_clip_val", "0"], {"max_grad_norm": 0.0}),
        (["--trainer.log_every_n_steps", "10"], {"logging_steps": 10}),
        (["--trainer.default_root_dir", "out"], {"model_dir": "out"}),
        (["--trainer.logger", "false"], {"tracker": ("none",)}),
        (["--trainer.precision", "16"], {"precision": "fp16_on_gpu"}),
        (["--trainer.precision", "16-mixed"], {"precision": "fp16_on_gpu"}),
        (["--trainer.precision", "bf16"], {"precision": "bf16"}),
        (["--trainer.precision", "bf16-mixed"], {"precision": "bf16"}),
        (["--trainer.precision", "32"], {"precision": "no"}),
        (["--model.lr", "1e-4"], {"learning_rate": 1e-4}),
        (["--model.lr", "3e-5"], {"learning_rate": 3e-5}),
        (["--model.num_warmup_steps", "10000"], {"warmup_steps": 10000}),
        (["--model.block_size", "128"], {"sequence_length": (128,)}),
        (["--model.train_file", "a.txt", "b.txt"], {"input_file": ("a.txt", "b.txt")}),
        (["--model.from_pretrained", "gpt2"], {"pretrained_model_name_or_path": "gpt2", "n_layer": None}),
        (["--model.from_pretrained=gpt2", "--model.n_layer=24"], {"n_layer": None}),
        (["--model.num_training_steps", "900"], {"max_steps": 900, "schedule": "linear", "epochs": None}),
        (["--model.num_training_steps=9", "--trainer.max_steps=9"], {"max_steps": 9, "schedule": "linear"}),
        (["--model.num_training_steps", "null"], {"schedule": "constant", "epochs": 1000.0}),
    ],
)
def test_what_a_key_means(words: list[str], expected: dict[str, Any]) -> None:
    options = parse(*words)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("file", "batch_size", "micro_batch_size"),
    [
        ("trainer: {accumulate_grad_batches: 16}", 32, 2),
        ("model: {batch_size: 4}", 4, 4),
        ("model: {batch_size: 4}\ntrainer: {accumulate_grad_batches: 8, gpus: 2}", 64, 4),
        ("model: {batch_size: 4}\ntrainer: {gpus: 2, num_nodes: 3}", 24, 4),
        ("trainer: {gpus: [0, 3, 5]}", 6, 2),
        ("trainer: {gpus: [3], accumulate_grad_batches: 4}", 8, 2),  # the GPU number 3, not three
        ("trainer: {gpus: 3, accumulate_grad_batches: 4}", 24, 2),
        ("trainer: {gpus: '3,', accumulate_grad_batches: 4}", 8, 2),
        ("trainer:\n  devices:\n  - 3", 2, 2),
        ("trainer: {gpus: []}", 2, 2),
        ("trainer:\n  gpus: '0,1'", 4, 2),
        ("trainer: {gpus: 0}", 2, 2),
        ("trainer: {devices: 4}", 8, 2),
        ("trainer: {gpus: 4, num_processes: 4}", 8, 2),
        ("trainer: {num_processes: 3, accelerator: ddp_cpu}", 6, 2),
        ("trainer: {max_epochs: 1}", 2, 2),
        ("trainer: {accumulate_grad_batches: 8}\nmicro_batch_size: 8", 16, 8),
    ],
)
def test_rows_of_a_step(file: str, batch_size: int, micro_batch_size: int) -> None:
    """Rows of one process, times accumulation, times processes: the same step as there, whatever runs it here."""
    options = parse(file=file)
    assert options.batch_size == (batch_size,)
    assert options.micro_batch_size == (micro_batch_size,)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("00:12:00:00", 12 * 3600),
        ("01:02:03:04", 93784),
        ("'0:0:90:0'", 5400),
        ("{hours: 11, minutes: 30}", 41400),
        ("{weeks: 1}", 604800),
    ],
)
def test_time(written: str, seconds: int) -> None:
    """There 00:12:00:00 began with the days."""
    assert parse_duration(parse(file=f"trainer:\n  max_time: {written}").max_time) == seconds


@pytest.mark.parametrize("key", ["prefetch_factor", "num_workers", "shuffle_buffer_size"])
def test_keys_that_are_not_needed_say_why(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    parse(file=f"model: {{{key}: 3}}")
    notices = [line for line in capsys.readouterr().err.splitlines() if key in line]
    assert len(notices) == 1
    assert notices[0].startswith(f"model.{key} has no effect: ")


# ---- the line, the file and the two spellings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "file", "expected"),
    [
        (["--epochs", "3"], "trainer: {max_epochs: 10}", {"epochs": 3.0}),
        (["--trainer.max_epochs", "3"], "epochs: 10", {"epochs": 3.0}),
        (["--trainer.max_epochs", "3"], "trainer: {max_epochs: 10}", {"epochs": 3.0}),
        (["--batch_size", "64"], "trainer: {accumulate_grad_batches: 16}", {"batch_size": (64,)}),
        (["--trainer.accumulate_grad_batches", "8"], "batch_size: 64", {"batch_size": (16,)}),
        (["--trainer.accumulate_grad_batches=8"], "model: {batch_size: 5}", {"batch_size": (40,)}),
        (["--optimizer", "adamw"], "trainer: {max_epochs: 1}", {"optimizer": "adamw", "weight_decay": 0.0}),
        (["--model_type", "gpt2-tiny"], "model: {lr: 1}", {"model_type": "gpt2-tiny", "optimizer": "adam"}),
        (["--model_dir", "run"], "model: {lr: 1}", {"model_type": "gpt2-small", "model_dir": "run"}),
        (
            ["--model.lr", "2", "--model_type", "gpt2-tiny"],
            "model: {lr: 1}",
            {"learning_rate": 2.0, "optimizer": "adam"},
        ),
        (["--schedule", "constant"], "model: {num_training_steps: 9}", {"max_steps": 9, "schedule": "constant"}),
        (["--max_steps=5", "--epochs=null"], "trainer: {max_epochs: 3}", {"max_steps": 5, "epochs": None}),
        (["--attention", "varlen"], "trainer: {max_epochs: 1}", {"attention_dropout": 0.0}),
        (["--save_steps", "7"], "trainer: {max_epochs: 1}", {"save_steps": 7, "eval_every": "epoch"}),
        (["--trainer.gpus=[3]"], "model: {batch_size: 4}", {"batch_size": (4,)}),
        (["--trainer.gpus", "3"], "model: {batch_size: 4}", {"batch_size": (12,)}),
        ([], "model: {lr: 1}\noptimizer: adamw", {"optimizer": "adamw"}),
        ([], "model.lr: 1e-3", {"learning_rate": 1e-3}),
        ([], "epochs: 2\ntrainer: {max_epochs: 2}", {"epochs": 2.0}),
        ([], "trainer:\nmodel: {lr: 1}", {"learning_rate": 1.0}),
    ],
)
def test_the_line_beats_the_file_whichever_names_they_use(
    words: list[str], file: str, expected: dict[str, Any]
) -> None:
    options = parse(*words, file=file)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "file", "max_steps", "epochs"),
    [
        ("--max_steps 10", "trainer: {max_epochs: 2}", 10, None),
        ("--max_steps 10", "epochs: 2\nmodel: {lr: 1}", 10, None),
        ("--max_steps 10", "phase_steps: [3, 4]\nmodel: {lr: 1}", 10, None),
        ("--max_steps 10", "trainer: {max_epochs: 2, max_steps: 5}", 10, None),
        ("--trainer.max_steps 10", "trainer: {max_epochs: 2}", 10, None),
        ("--trainer.max_steps 10", "epochs: 2", 10, None),
        ("--trainer.max_steps 10", "model: {num_training_steps: 9}", 10, None),
        ("--trainer.max_epochs 3", "max_steps: 5", None, 3.0),
        ("--epochs 3", "trainer: {max_steps: 5}", None, 3.0),
        ("--epochs 3", "model: {num_training_steps: 9}", None, 3.0),
        ("--model.num_training_steps 9", "trainer: {max_epochs: 2}", 9, None),
        ("--max_steps 10 --max_time 1h", "trainer: {max_epochs: 2, max_time: '00:00:10:00'}", 10, None),
        ("--max_time 1h", "trainer: {max_epochs: 2}", None, 2.0),
        ("--max_steps null", "trainer: {max_epochs: 2}", None, 2.0),
        ("--epochs null", "max_steps: 5\nmodel: {lr: 1}", 5, None),
    ],
)
def test_a_length_on_the_line_replaces_any_length_of_the_file(
    words: str, file: str, max_steps: int | None, epochs: float | None
) -> None:
    options = parse(*words.split(), file=file)
    assert (options.max_steps, options.epochs, options.phase_steps) == (max_steps, epochs, ())
    assert options.max_time == ("1h" if "--max_time" in words else None)
    assert (options.schedule == "linear") == ("num_training" in file + words)


def test_two_lengths_in_one_place_are_still_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, file in (
        (["--trainer.max_steps=5", "--trainer.max_epochs=3"], "epochs: 3"),
        ([], "trainer: {max_epochs: 2, max_steps: 5}"),
    ):
        assert "disagree" in refusal(capsys, *words, file=file)


def test_a_key_beside_the_options_of_our_own_run_brings_no_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    own = "model_dir: run\nmodel_type: bert-base\n"
    options = parse("--trainer.max_epochs=3", file=own)
    assert (options.epochs, options.optimizer, options.batch_size) == (3.0, "adamw", ())
    assert capsys.readouterr().err == "trainer.max_epochs is now --epochs\n"


def test_origins() -> None:
    Path("config.yaml").write_text("trainer: {max_epochs: 3, accumulate_grad_batches: 4}", encoding="utf-8")
    argv = ["--config", "config.yaml", "--model.batch_size", "2"]
    _, origins = parse_options_with_origin(Options, description="Trains.", argv=argv, foreign=lightning)
    assert origins["epochs"] == "config.yaml"
    assert origins["batch_size"] == "command line"
    assert origins["optimizer"] == "default"


def test_the_next_run_gets_the_next_folder() -> None:
    for name in ("version_0", "version_3", "version_x", "token_store-1"):
        Path("lightning_logs", name).mkdir(parents=True)
    assert parse("--trainer.max_epochs=1").model_dir == "lightning_logs/version_4"


def test_continuing_needs_to_know_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert "missing --model_dir" in refusal(capsys, "--do_continue", file=DOCUMENTED)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("trainer:\n  max_epoch: 3", ["config.yaml: unknown key trainer.max_epoch in line 2", "trainer.max_epochs?"]),
        ("model:\n  lr: 1\n  n_layers: 3", ["unknown key model.n_layers in line 3 (did you mean model.n_layer?)"]),
        ("trainer: {max_epochs: x}", ["config.yaml, line 1: trainer.max_epochs must be a number or null, not x"]),
        ("model: {lr: fast}", ["config.yaml, line 1: model.lr must be a number or null, not fast"]),
        ("model: {train_file: {a: b}}", ["model.train_file must be a value or a list of values"]),
        ("model: {block_size: 1.5}", ["model.block_size must be a whole number, not 1.5"]),
        ("model: {batch_size: 0}", ["model.batch_size must be a whole number greater than 0, not 0"]),
        ("trainer: {accumulate_grad_batches: {4: 2}}", ["trainer.accumulate_grad_batches must be one value"]),
        ("trainer: {precision: 64}", ["trainer.precision must be 16, 32 or bf16, not 64"]),
        ("trainer: {gpus: -1}", ["trainer.gpus", "-1"]),
        ("trainer: {devices: auto}", ["trainer.devices", "auto"]),
        ("trainer: {gpus: 2, devices: 3}", ["trainer.gpus 2 and trainer.devices 3 disagree"]),
        ("trainer: {max_time: 12h}", ["trainer.max_time must look like 00:12:00:00", "12h"]),
        ("trainer: {max_time: {hour: 1}}", ["trainer.max_time must look like 00:12:00:00"]),
        ("trainer:\n\n  val_check_interval: 0.25", ["line 3: trainer.val_check_interval 0.25", "--eval_every"]),
        ("trainer: {limit_train_batches: 1}", ["trainer.limit_train_batches 1 has no counterpart", "--stop_at_step"]),
        ("trainer: {stochastic_weight_avg: true}", ["trainer.stochastic_weight_avg true", "--ema_decay"]),
        ("trainer: {terminate_on_nan: true}", ["trainer.terminate_on_nan true"]),
        ("trainer: {fast_dev_run: 3}", ["trainer.fast_dev_run 3", "--dry_run"]),
        ("trainer: {gradient_clip_algorithm: value}", ["trainer.gradient_clip_algorithm value", "--max_grad_norm"]),
        ("trainer: {accelerator: horovod}", ["trainer.accelerator horovod", "accelerate launch"]),
        ("trainer: {logger: {class_path: a.B}}", ["trainer.logger", "--tracker"]),
        (
            "trainer: {resume_from_checkpoint: a.ckpt}",
            ["trainer.resume_from_checkpoint a.ckpt", "null", "--do_continue"],
        ),
        ("trainer: {callbacks: [{class_path: a.b.ModelCheckpoint}]}", ["a.b.ModelCheckpoint", "--save_steps"]),
        ("trainer: {callbacks: [{class_path: mine.Own, init_args: {x: 1}}]}", ["trainer.callbacks: mine.Own"]),
        ("trainer: {callbacks: [{path: a}]}", ["trainer.callbacks must be a list of `class_path: NAME`"]),
        ("trainer: {max_epochs: 3, max_steps: 5}", ["trainer.max_epochs 3", "trainer.max_steps 5", "disagree"]),
        ("trainer: {max_steps: 5}\nmodel: {num_training_steps: 9}", ["max_steps 5", "num_training_steps 9", "line 1"]),
        ("trainer: {max_epochs: 5}\nmodel: {num_training_steps: 9}", ["max_epochs 5", "num_training_steps 9"]),
        ("epochs: 2\ntrainer: {max_epochs: 3}", ["epochs is given twice: --epochs 2 and trainer.max_epochs 3"]),
        ("seed_everything: 2\ntrainer: {seed_everything: 3}", ["seed is given twice", "2", "3"]),
        ("trainer: {max_epochs: 3}\ntrainer: {max_epochs: 3}", ["line 2: trainer stands in the file a second time"]),
        ("trainer: {max_epochs: 3, max_epochs: 3}", ["trainer.max_epochs stands in the file a second time"]),
        ("trainer: {max_epochs: 3}\ntrainer.max_epochs: 4", ["trainer.max_epochs is given twice: 3 and 4"]),
        ("trainer: 5", ["config.yaml, line 1: trainer must hold indented lines"]),
        ("seed: {a: 1}", ["seed must be a value or a list of values"]),
        ("data: {file: 1}", ["data must be a value or a list of values"]),
        ("trainer: &a\n  plugins: [*a]", ["nested too deeply"]),
    ],
)
def test_refused_files(file: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refusal(capsys, file=file)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--trainer.max_epoch", "3"], ["unknown option --trainer.max_epoch (did you mean --trainer.max_epochs?)"]),
        (["--trainer.max_epochs"], ["--trainer.max_epochs needs a value"]),
        (["--trainer.max_epochs", "3", "4"], ["--trainer.max_epochs takes one value, not 2 (3 and 4)"]),
        (["--trainer.max_epochs=3", "--trainer.max_epochs=4"], ["trainer.max_epochs is given twice: 3 and 4"]),
        (["--trainer.max_epochs=3", "--epochs=4"], ["epochs is given twice: --epochs 4 and trainer.max_epochs 3"]),
        (["--model.batch_size"], ["--model.batch_size needs a value"]),
        (["--trainer.callbacks=[{class_path: EarlyStopping}]"], ["--trainer.callbacks: EarlyStopping"]),
        (["--trainer.callbacks=[{"], ["[{ is not valid YAML"]),
        (["--trainer.benchmark"], ["--trainer.benchmark", "no counterpart"]),
    ],
)
def test_refused_lines(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refusal(capsys, *words)
    for part in parts:
        assert part in sentence


def test_the_line_can_take_back_what_a_file_says() -> None:
    file = "trainer: {resume_from_checkpoint: a.ckpt, max_epochs: 3, callbacks: [{class_path: Own}]}"
    words = ["--trainer.resume_from_checkpoint=null", "--trainer.max_epochs=null", "--trainer.callbacks=[]"]
    assert parse(*words, "--trainer.max_steps=9", file=file).max_steps == 9


def test_scripts_without_a_translation_know_none_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text("trainer: {max_epochs: 3}", encoding="utf-8")
    for words in (["--config", "config.yaml"], ["--trainer.max_epochs", "3"]):
        with pytest.raises(SystemExit) as stopped:
            parse_options(Options, description="Trains.", argv=words)
        assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].endswith("config.yaml, line 1: trainer must be a value or a list of values")
    assert "unknown option --trainer.max_epochs" in errors[1]


# ---- what it costs -----------------------------------------------------------------------------------------------


def test_help_says_it_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.endswith("PyTorch Lightning are accepted too: model.*, seed_everything and trainer.*.")


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, lmscripts.options.lightning\n"
    code += "print([m for m in ('torch', 'numpy', 'transformers', 'accelerate') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.strip() == "[]"
