"""Scripts are made to be copied: a copy elsewhere, with an option less, another rate and other names, still trains."""

import ast
import json
import os
import re
import sys

import forked
import pytest
from conftest import PATIENCE, ROOT
from runs import log_of
from transformers import BertConfig, BertForMaskedLM

SCHEDULE = re.compile(r"rate = optim\.Schedule\((?:[^()]|\([^()]*\))*\)")


def rate_of(step):
    return 3e-4 + 1e-5 * step


def renamed(text):
    """The script with other names for what its loop assigns, but for some that stand deep inside of f-strings."""
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    run = next(each for each in functions if any(isinstance(node, ast.While) for node in ast.walk(each)))
    names = [node for node in ast.walk(run) if isinstance(node, ast.Name)]
    kept = {
        each.arg for node in ast.walk(run) if isinstance(node, ast.arguments) for each in node.args + node.kwonlyargs
    }
    in_strings = [node for node in ast.walk(run) if isinstance(node, ast.FormattedValue)]
    for node in in_strings:
        inside = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        kept |= {name for name in inside if not re.match(rf"{name}\b", ast.unparse(node.value))}
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)} - kept
    assert {"state", "batches", "targets", "norm", "meter", "learning_rate"} <= assigned
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    hidden = {
        id(each) for node in in_strings for each in ast.walk(node)
    }  # whose places are not told before Python 3.12
    for node in sorted(names, key=lambda node: (node.lineno, -node.col_offset)):
        if node.id in assigned and id(node) not in hidden:
            line, end = lines[node.lineno - 1], node.col_offset + len(node.id)
            lines[node.lineno - 1] = line[: node.col_offset] + f"my_{node.id}".encode() + line[end:]
    within = range(run.lineno - 1, run.end_lineno)
    changed = [line.decode() for line in lines]
    for number in within:
        for name in assigned if re.search(r"\bf\"", changed[number]) else ():
            changed[number] = re.sub(rf"\{{{name}\b", f"{{my_{name}", changed[number])
    return "".join(changed)


def copied(name, folder, without):
    """A copy of a script in an empty folder, without some options, each given as (name, its use, what stands there)."""
    text = (ROOT / "scripts" / name).read_text(encoding="utf-8")
    for option, use, instead in without:
        text, fields = re.subn(rf"^    {option}: .*\n", "", text, flags=re.MULTILINE)
        assert (fields, text.count(use)) == (1, 1), option
        text = text.replace(use, instead)
    text, schedules = SCHEDULE.subn("def rate(step):\n        return 3e-4 + 1e-5 * step\n", text)
    assert schedules == 1
    folder.mkdir()
    copy = folder / f"my_{name}"
    copy.write_text(renamed(text), encoding="utf-8")
    return copy


def run(copy, *arguments):
    """Run a copy where it stands; nothing says where presets are."""
    command = [sys.executable, copy.name, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = forked.run(command, copy.parent, env, PATIENCE)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_rates(said, run_dir, steps):
    """Plan, log and checkpoint agree with the rate that the copy trains at."""
    planned = re.findall(r"step ([\d,]+) (\d\.\d+e-\d+)", said)
    assert {int(step.replace(",", "")) for step, _ in planned} >= {1, steps}
    for step, rate in planned:
        assert float(rate) == pytest.approx(rate_of(int(step.replace(",", "")) - 1), rel=5e-3)
    logged = {record["step"]: record["learning_rate"] for record in log_of(run_dir) if "learning_rate" in record}
    assert logged == {step: rate_of(step - 1) for step in range(1, steps + 1)}
    facts = json.loads((run_dir / f"checkpoint-{steps}" / "training_state.json").read_text(encoding="utf-8"))
    assert facts["learning_rate"] == rate_of(steps - 1)
    assert facts["schedule"] == {"schedule": "rate"}


def test_a_copy_of_pretraining_trains_at_its_own_rate(store_dir, tmp_path):
    without = [
        ("keep_every", "options.keep_last, options.keep_every", "options.keep_last"),
        ("max_grad_norm", "options.max_grad_norm or inf", "inf"),
    ]
    copy = copied("run_pretraining.py", tmp_path / "mine", without)
    given = ["--dataset_dir", store_dir, "--model_type", "bert-tiny", "--model_dir", "run", "--max_steps", 3]
    given += ["--logging_steps", 1, "--batch_size", 4, "--sequence_length", 64]
    check_rates(run(copy, *given), copy.parent / "run", 3)
    assert "--keep_every" not in run(copy, "--help")
    assert (copy.parent / "run" / "final" / "model.safetensors").exists()


def test_a_copy_of_finetuning_trains_at_its_own_rate(tokenizer_dir, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=2048, **sizes)).save_pretrained(tmp_path / "model")
    rows = [f"{'よい' if number % 2 else '悪い'}日の{number}番目の文。,{number % 2}" for number in range(50)]
    (tmp_path / "table.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    without = [
        ("max_grad_norm", "options.max_grad_norm or inf", "inf"),
        ("keep_last", "options.keep_last", "1"),
    ]
    copy = copied("finetune_classifier.py", tmp_path / "mine", without)
    given = [tmp_path / "table.csv", "--model_name_or_path", tmp_path / "model", "--tokenizer_dir", tokenizer_dir]
    given += ["--batch_size", 10, "--epochs", 2, "--logging_steps", 1, "--tracker", "none", "--output_dir", "."]
    check_rates(run(copy, *given), copy.parent / "table_training", 8)
    assert "--keep_last" not in run(copy, "--help")
    assert (copy.parent / "table_trained_model" / "model.safetensors").exists()
