"""docs/clusters.md: its commands name options and files that exist, its variables are those of slurm/."""

import re
import shlex
from functools import cache

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, run_script
from torch.distributed.run import get_args_parser

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in re.sub(r" *\\\n *", " ", block).splitlines() if line]
CHAIN = [line for line in COMMANDS if "slurm/chain.sh" in line]


@cache
def options_of(program):
    if program in ("accelerate", "torchrun"):
        parser = launch_command_parser() if program == "accelerate" else get_args_parser()
        return {word.lstrip("-").replace("-", "_") for word in parser._option_string_actions}
    return set(re.findall(r"--(\w+)", run_script(program, "--help").stdout))


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in CHAIN], ids=lambda line: line[:70])
def test_options_of_the_commands_exist(line):
    program = ""
    for word in shlex.split(line):
        if word in ("accelerate", "torchrun"):
            program = word
        elif word.startswith("scripts/"):
            assert (ROOT / word).is_file()
            program = word.removeprefix("scripts/")
        elif word.startswith("--"):
            assert word[2:].partition("=")[0].replace("-", "_") in options_of(program), f"{program} has no {word}"


@pytest.mark.parametrize("line", CHAIN)
def test_variables_of_the_chain_are_those_of_its_files(line):
    files = "".join((ROOT / "slurm" / name).read_text(encoding="utf-8") for name in ("chain.sh", "pretrain.sbatch"))
    before, after = line.split("slurm/chain.sh")
    for variable in (word.partition("=")[0] for word in shlex.split(before)):
        assert variable.startswith("SBATCH_") or f'{variable}="${{{variable}:-' in files, variable
    assert set(re.findall(r"--(\w+)", after)) <= options_of("run_pretraining.py")


def test_files_of_the_page_exist():
    named = re.findall(r"(?<![\w/-])(?:scripts|slurm|accelerate_configs|recipes|docs|tests)/[\w/.]*\w", PAGE)
    assert len(set(named)) >= 8
    for path in named:
        assert (ROOT / path).exists(), path


def test_options_in_the_text_exist():
    """Of the scripts and launchers that the page is about, or of docker, Slurm's commands and torch."""
    known = set.union(*map(options_of, ("launch.py", "run_pretraining.py", "accelerate", "torchrun")))
    known |= {"cpu_bind", "cpus_per_task", "open_mode", "network", "shm_size", "ipc"}
    for span in re.findall(r"`([^`\n]+)`", PAGE):
        for option in re.findall(r"(?<!\S)--([\w-]+)", span):
            assert option.replace("-", "_") in known, span
