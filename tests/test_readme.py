"""Every block of the README, one after the other in one folder that holds a user's files, with small sizes."""

import csv
import re
import shlex
import shutil

import forked
import pytest
import yaml
from conftest import ROOT, SAMPLE, run_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# By how they begin: blocks that are not run, and why.
NOT_RUN = {
    "make demo": "installs an environment from the network",
    "scripts/\n": "a list of files",
    "lmscripts train_tokenizer": "of an installed package: tests/test_installed.py runs it",
}
# Lines that are not run, and why.
NOT_RUN_LINES = {"source .venv/bin/activate": "the environment is that of the tests"}
SMALL = "--sequence_length 64 --batch_size 8 --max_steps 12 --warmup_steps 2 --eval_rows 8 --tracker none"
# What is made small, in the order of the README; each has to be there.
SUBSTITUTIONS = {
    "train_tokenizer.py ": "train_tokenizer.py --vocab_size 2048 --num_workers 1 ",
    "prepare_corpus.py ": "prepare_corpus.py --num_workers 1 ",
    "--model_type bert-small": f"--model_type bert-tiny {SMALL}",
    "--model_type electra-small": f"--model_type electra-tiny {SMALL}",
    "--model_type gpt2-small": f"--model_type gpt2-tiny {SMALL}",
    "--stride 512": "--stride 32",
    "--num_records 20000": "--num_records 1280",
    "leanings.csv --model_name_or_path": "leanings.csv --epochs 1 --max_length 64 --model_name_or_path",
}


def commands():
    """Lines of the blocks that are run, made small, with the block they stand in."""
    found, used = [], set()
    for block in BLOCKS:
        if any(block.startswith(begin) for begin in NOT_RUN):
            continue
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            if line in NOT_RUN_LINES:
                continue
            for there, here in SUBSTITUTIONS.items():
                used |= {there} if there in line else set()
                line = line.replace(there, here)
            found.append(line)
    assert used == set(SUBSTITUTIONS), "the README says it otherwise now: change the table of substitutions"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the README takes for granted, and the project's own beside them."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("scripts", "accelerate_configs", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(SAMPLE / "articles.txt", folder / "corpus.txt")
    text = (SAMPLE / "articles.txt").read_text(encoding="utf-8").split("\n\n")
    (folder / "test.txt").write_text("\n\n".join(text[:2]) + "\n", encoding="utf-8")
    rows = list(csv.DictReader((SAMPLE / "topics.csv").open(encoding="utf-8", newline="")))[::4]
    for name, columns in (("leanings.csv", ("text", "label")), ("new.csv", ("text",))):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([columns, *([row[column] for column in columns] for row in rows)])
    return folder


def run(line, folder):
    """One line as a shell would run it; a launcher whose file asks for one process is left out."""
    words = shlex.split(line)
    if words[:2] == ["accelerate", "launch"]:
        assert words[2] == "--config_file"
        assert yaml.safe_load((folder / words[3]).read_text(encoding="utf-8"))["num_processes"] == 1
        words = ["python", *words[4:]]
    assert words[0] == "python", line
    if words[1] != "-c":
        assert (folder / words[1]).is_file()
        done = run_script(words[1].removeprefix("scripts/"), *words[2:], cwd=folder)
        assert "[transformers]" not in done.stderr, f"{line}\n{done.stderr}"
        return done.stdout
    program = folder / "program.py"
    program.write_text(words[2], encoding="utf-8")
    done = forked.run(["python", str(program)], folder, forked.os.environ, 120)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def test_every_block_runs_after_those_before_it(folder):
    said = {line: run(line, folder) for line in commands()}
    for place in ("runs/bert/final", "runs/electra/final", "runs/gpt2/final", "extracted/generator", "result.json"):
        assert (folder / place).exists(), place
    for place in ("leanings.sqlite", "leanings_trained_model", "labels.csv"):
        assert (folder / place).exists(), place
    for place in ("decisions", "runs/policy/final", "policy.json", "answers.jsonl"):
        assert (folder / place).exists(), place
    assert not [line for line, text in said.items() if "loses text" in text]
    assert sum("'token_str'" in text or "'generated_text': 'むかし" in text for text in said.values()) == 2


def test_what_is_not_run_is_there():
    for begin in NOT_RUN:
        assert [block for block in BLOCKS if block.startswith(begin)], begin
    lines = {line for block in BLOCKS for line in block.splitlines()}
    assert set(NOT_RUN_LINES) <= lines


def test_a_causal_model_on_text_that_was_lost_says_so(folder):
    """It works, as a masked store serves every objective, but it can only write what the tokenizer left."""
    line = (
        f"python scripts/run_pretraining.py --dataset_dir store --model_dir runs/lossy --model_type gpt2-tiny {SMALL}"
    )
    assert "warning: the tokenizer loses text: 'Two  Spaces' comes back as" in run(f"{line} --dry_run", folder)
