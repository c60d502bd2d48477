"""The page for users of older systems names only what exists, and says so where something does not exist yet."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import forked
import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import PATIENCE, ROOT, run_script

from lmscripts.options import language_pretraining, lightning
from lmscripts.options.yaml_text import Entry

PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
SCRIPTS = ROOT / "scripts"
PRESETS = json.loads((ROOT / "parameter.json").read_text(encoding="utf-8"))
FOLDERS = ("scripts", "lmscripts", "accelerate_configs", "recipes", "docs", "benchmarks", "sample_data", "tests")
SECTIONS = {
    "policy": "`kanachan.training.bert.phase1`",
    "japanese": "language-pretraining",
    "finnish": "How to train your ~dragon~ BERT",
    "gpt2": "Training GPT2 Language Model",
    "classifier": "Parallel Bert Training",
}
# What the five documents name, as they spell it: options, keys and files. None may be without an answer.
DOCUMENTED = {
    "policy": """--training-data --validation-data --num-workers --device --amp-optimization-level --model-preset
        --dimension --num-heads --dim-feedforward --num-layers --dim-final-feedforward --activation-function --dropout
        --initial-encoder --initial-decoder --training-batch-size --freeze-encoder --optimizer --momentum
        --learning-rate --epsilon --checkpointing --gradient-accumulation-steps --max-gradient-norm --num-epochs
        --initial-optimizer --output-prefix --experiment-name --num-epoch-digits --snapshot-interval --resume""",
    "japanese": """train_tokenizer.py --input_file --model_dir --intermediate_dir --num_files --mecab_dic_type
        --tokenizer_type --vocab_size --min_frequency --limit_alphabet --num_unused_tokens run_pretraining.py
        --tokenizer_dir --parameter_file --model_type --fp16_type --do_whole_word_mask --do_continue
        --disable_overwrite_cache torch.distributed.launch --nproc_per_node --nnodes --node_rank --master_addr
        --master_port --local_rank NCCL_SOCKET_IFNAME CUDA_VISIBLE_DEVICES extract_electra_model.py --input_dir
        --output_dir --generator --discriminator parameter.json batch-size --logdir""",
    "finnish": """run_pretraining.py --nodes --ntasks --cpus-per-task --mem --gres --ntasks-per-node --account -p -t -J
        -o -e umask module BERT_DIR OUTPUT_DIR NCCL_DEBUG --input_file --output_dir --do_train --do_eval
        --bert_config_file finnish_main_config_50k.json --train_batch_size --max_seq_length --max_predictions_per_seq
        --num_train_steps --num_warmup_steps --learning_rate --horovod --use_xla --use_fp16 seff --dependency=singleton
        finnish_5_9_final_data_512.sbatch tf_records""",
    "gpt2": """requirements.txt train_tokenizer.py trainer.py --print_config default_config.yaml --config config.yaml
        test.py --ckpt_path lightning_logs epoch=2-step=8.ckpt trainer.seed_everything trainer.max_epochs
        trainer.deterministic trainer.precision trainer.accumulate_grad_batches trainer.gradient_clip_val
        trainer.callbacks model.tokenizer_model model.train_file model.valid_file model.test_file model.block_size
        model.n_layer model.n_head model.n_embd""",
    "classifier": """launch.py bert_train_parallel.py bert_parallel.py leanings.csv leanings.sqlite
        leanings_testset_predictions.csv leanings_train_test_stats.json leanings_trained_model.sav
        bert_result_analysis.py --node_rank --other_gpus --here_gpus --master_addr --master_port --quiet --module
        --no_python --logfile --text --label --epoch --preponly -q -m -f -t -l -e -p""",
}
OLDER_SCRIPTS = {"setup.py", "trainer.py", "test.py"}  # named again in the third column


@dataclass(frozen=True)
class Row:
    """A line of a table; `script` is the script last named in the second column."""

    there: str
    here: str
    differs: str
    script: str


def spans(text: str) -> list[str]:
    """What stands between backquotes."""
    return re.findall(r"`([^`]+)`", text)


def section(name: str) -> str:
    """The text under a heading."""
    found = re.search(rf"^## {re.escape(SECTIONS[name])}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, f"docs/coming_from.md has no section {SECTIONS[name]}"
    return found.group(1)


def rows(name: str) -> list[Row]:
    """The table of a section."""
    lines = [line for line in section(name).splitlines() if line.startswith("|")]
    assert lines[0] == "| there | here | what differs, and why it matters |"
    found, script = [], ""
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        assert len(cells) == 3, line
        script = named[-1] if (named := scripts_in(cells[1])) else script
        found.append(Row(*cells, script))
    return found


def scripts_in(text: str) -> list[str]:
    """Names of scripts of ours, in the order of the text; `X.py` may stand alone or before options."""
    return [name for span in spans(text) if (name := span.split()[0]).endswith(".py") and name not in OLDER_SCRIPTS]


@cache
def options_of(script: str) -> frozenset[str]:
    """Options of a script by their names today."""
    help_text = run_script(script, "--help").stdout
    return frozenset(re.findall(r"^  --(\w+)", help_text, re.M))


@cache
def launcher_options() -> frozenset[str]:
    """Options of `accelerate launch`."""
    return frozenset(word.lstrip("-") for word in launch_command_parser()._option_string_actions)


def commands() -> list[str]:
    """Lines of the page's code blocks, those that go on put together."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)
    return [line for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]


@pytest.mark.parametrize("name", SECTIONS)
def test_everything_that_a_document_names_has_an_answer(name: str) -> None:
    there = " ".join(row.there for row in rows(name))
    for word in DOCUMENTED[name].split():
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", there), f"{SECTIONS[name]}: {word} is missing"
    assert all(row.here for row in rows(name))


@pytest.mark.parametrize("name", SECTIONS)
def test_options_on_the_right_exist_in_the_script_that_is_named(name: str) -> None:
    named = ""
    for row in rows(name):
        for cell in (row.here, row.differs):
            script = named if cell is row.here else row.script
            for span in spans(cell):
                program = span.split()[0]
                script = program if scripts_in(f"`{span}`") else script
                known = launcher_options() if program == "accelerate" else frozenset({"logdir"})
                for option in re.findall(r"(?<!\S)--([\w-]+)", span):
                    found = known if program in ("accelerate", "tensorboard") else options_of(script)
                    owner = program if program in ("accelerate", "tensorboard") else script
                    assert option in found or option.replace("-", "_") in found, f"{owner} has no --{option}: {row}"
        named = row.script


def test_paths_and_presets_exist() -> None:
    for path in re.findall(rf"(?<![\w/.])(?:slurm|{'|'.join(FOLDERS)})/[\w/.]*\w", PAGE):
        assert (ROOT / path).exists(), path
    for row in (row for name in SECTIONS for row in rows(name)):
        for preset in re.findall(r"`(?:--model_type )?((?:bert|electra|gpt2)-[a-z-]+)`", row.here + row.differs):
            assert preset in PRESETS, preset
    for script in {script for name in SECTIONS for row in rows(name) for script in scripts_in(row.here)}:
        assert (SCRIPTS / script).exists() or f"`{script}`: not there yet" in PAGE, script


def test_what_is_not_there_yet_is_not_there_yet() -> None:
    promised = re.findall(r"`(\w+\.py)`: not there yet", PAGE)
    assert promised or "not there yet" not in PAGE
    for script in promised:
        assert not (SCRIPTS / script).exists(), (
            f"scripts/{script} exists now: docs/coming_from.md has to say what it does"
        )


def test_keys_of_the_gpt2_trainer() -> None:
    """All keys that the parser knows, but those of which only the default is accepted; each beside what it becomes."""
    table = {key: row for row in rows("gpt2") for key in spans(row.there)}
    rest = {f"trainer.{name}" for name in lightning.UNSUPPORTED}
    assert set(lightning.KEYS) - rest == {key for key in table if re.match(r"(trainer|model)\.\w+$|seed_ev", key)} - {
        "trainer.py"
    }
    for key, option in lightning.RENAMED.items():
        assert f"--{option}`" in table[key].here, f"{key} is --{option}"
    for name in lightning.SIZES:
        assert f"`--{name}`" in table[f"model.{name}"].here
    for key in lightning.NOT_NEEDED:
        assert table[key].here in ("no effect", "`evaluate_lm.py --input_file`")
    for callback in ("LearningRateMonitor", "GPUStatsMonitor"):
        assert callback in lightning.CALLBACKS_NOT_NEEDED
        assert callback in table["trainer.callbacks"].differs


SAMPLE_VALUES = {"trainer.precision": "16", "trainer.max_time": "00:12:00:00", "trainer.logger": "false"}
WITHOUT_MEANING = {"trainer.callbacks", "trainer.accelerator", "trainer.distributed_backend"}


@pytest.mark.parametrize("key", sorted(set(lightning.KEYS) - {f"trainer.{name}" for name in lightning.UNSUPPORTED}))
def test_a_key_becomes_what_the_table_says(key: str) -> None:
    """Translated alone, a key sets the options in its row and no others."""
    if key in WITHOUT_MEANING | set(lightning.NOT_NEEDED) | {"trainer.resume_from_checkpoint"}:
        return
    given = Entry(key, [SAMPLE_VALUES.get(key, "3")], key, "config.yaml")
    entries, _ = lightning.translate([given])
    row = next(row for row in rows("gpt2") if key in spans(row.there))
    meant = {entry.key for entry in entries if entry.origin == "config.yaml"}
    assert meant
    assert meant <= {option for span in spans(row.here) for option in re.findall(r"--(\w+)", span)}


def test_older_names_of_the_japanese_scripts() -> None:
    known = {"run_pretraining.py": language_pretraining.PRETRAINING}
    known["train_tokenizer.py"] = language_pretraining.TOKENIZER
    known["prepare_corpus.py"] = language_pretraining.PREPARATION
    checked = set()
    for row in rows("japanese"):
        names = known.get(row.script, {})
        for option in (span.split()[0].removeprefix("--") for span in spans(row.there)):
            if option in names.get("renamed", {}):
                assert f"`--{names['renamed'][option]}`" in row.here, row
                checked.add(option)
            elif option in names.get("accepted_unused", {}):
                assert row.here == "no effect", row
                checked.add(option)
            assert not (row.here == "no effect" and option not in names["accepted_unused"]), row
    assert {"mecab_dic_type", "disable_overwrite_cache", "local_rank"} <= checked


def test_files_that_runs_write() -> None:
    """Names of outputs on the page are names in the code."""
    code = "".join(
        file.read_text(encoding="utf-8") for file in [*ROOT.glob("lmscripts/**/*.py"), *SCRIPTS.glob("*.py")]
    )
    for name in ("checkpoint-", "final", "generator", "discriminator", "log.jsonl", "curves.png", "token_store-"):
        assert name in PAGE
        assert re.search(rf"[\"'/({{]{re.escape(name)}", code), name


@pytest.mark.parametrize("command", [line for line in commands() if ".py" in line], ids=lambda line: line[:60])
def test_commands_are_understood(command: str, tmp_path: Path) -> None:
    """Every line of the code blocks is parsed by its script, the launcher's part by Accelerate or `launch.py`."""
    words = shlex.split(command)
    place = next(number for number, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[place]).exists(), words[place]
    if words[0] == "accelerate":
        assert words[1] == "launch"
        given = launch_command_parser().parse_args(words[2:])
        assert (ROOT / given.config_file).exists()
    if words[place] == "scripts/launch.py":
        launched = next(number for number in range(place + 1, len(words)) if words[number].endswith(".py"))
        # The nodes of the example are no machine here; nor has this one GPUs.
        how = ["--dry_run", *(["--node_rank", "1"] if "--cluster" in words else ["--here_gpus", "3"]), "--cpu"]
        line = [sys.executable, *words[place : place + 1], *how, *words[place + 1 : launched], words[launched]]
        done = forked.run(line, cwd=ROOT, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        place = launched
    (tmp_path / "config.yaml").write_text("trainer: {max_epochs: 1}\nmodel: {train_file: a.txt}\n", encoding="utf-8")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    line = [sys.executable, str(ROOT / words[place]), *words[place + 1 :], "--print_config"]
    done = forked.run(line, cwd=tmp_path, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_the_tables_see_a_fault() -> None:
    """The checks above read what they should: scripts, options and rows are found."""
    assert {"input_file", "mecab_dic", "print_config"} <= options_of("train_tokenizer.py")
    assert "mecab_dic_type" not in options_of("train_tokenizer.py")
    assert {"main_process_ip", "rdzv_conf", "gpu_ids"} <= launcher_options()
    assert len(commands()) >= 12
    assert [len(rows(name)) > 20 for name in SECTIONS] == [True] * len(SECTIONS)
    real = {field.name for field in fields(runpy.run_path(str(SCRIPTS / "run_pretraining.py"))["Options"])}
    assert real - options_of("run_pretraining.py") == set()
