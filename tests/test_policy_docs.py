"""docs/policy.md: its schema is the one that is shipped, its record is the first one, and its commands run."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

PAGE = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SMALL = {"--num_records 20000": "--num_records 640", "--model-preset tiny": "--model-preset tiny --dimension 16"}


def test_the_schema_of_the_page_is_the_one_that_is_shipped():
    shown = next(block for block in BLOCKS if block.startswith("{"))
    assert json.loads(shown) == json.loads((ROOT / "sample_data" / "offered_answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_run(number, tmp_path):
    block = [block for block in BLOCKS if block.startswith("python")][number]
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    for there, here in SMALL.items():
        assert there in block
        block = block.replace(there, here)
    said = ""
    for line in re.sub(r" *\\\n *", " ", block).splitlines():
        words = shlex.split(line)
        said += run_script(words[1].removeprefix("scripts/"), *words[2:], cwd=tmp_path).stdout
    if number:
        line, words = next(block for block in BLOCKS if "\t" in block).split("\n\n")
        assert (tmp_path / "answers.txt").read_text(encoding="utf-8").startswith(line)
        assert words in said
        records = tmp_path / "three.txt"
        records.write_text("".join((tmp_path / "answers.txt").open(encoding="utf-8").readlines()[:3]), encoding="utf-8")
        program = [sys.executable, str(ROOT / "sample_data" / "three_positions.py"), "result.json", "three.txt"]
        program += ["said.jsonl", "sample_data/offered_answers.json", "explain what was asked first"]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "The rule was to explain what was asked first. Of " in done.stdout
        assert done.stdout.count("<- what was chosen") >= 1
        assert "conversation so far: asks about repair" in done.stdout
