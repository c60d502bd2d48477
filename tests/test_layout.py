"""The shape of the project: which way imports run, how long functions may be, what text may say."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

LIBRARY = sorted((ROOT / "lmscripts").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def functions(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("file", LIBRARY, ids=lambda file: file.name)
def test_library_does_not_know_scripts_and_neither_prints_nor_parses(file):
    assert not any(name.split(".")[0] in ("scripts", "tests", "benchmarks", "argparse") for name in imports(file)) or (
        file.name == "parsing.py"
    )
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_import_no_script(file):
    names = {script.stem for script in SCRIPTS}
    assert not any(name.split(".")[0] in names | {"scripts"} for name in imports(file))


@pytest.mark.parametrize("file", LIBRARY + SCRIPTS, ids=lambda file: file.name)
def test_functions_fit_on_a_screen(file):
    for function in functions(file):
        if not (function.name == "run" and file in SCRIPTS):  # the visible loop
            length = function.end_lineno - function.lineno + 1
            assert length <= 60, f"{function.name} has {length} lines"


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_help_answers_without_the_heavy_imports(file):
    program = f"""
import runpy, sys
sys.argv = [{str(file)!r}, "--help"]
try:
    runpy.run_path({str(file)!r}, run_name="__main__")
except SystemExit:
    pass
heavy = [n for n in ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy") if n in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout


def test_library_names_only_optional_packages_lazily():
    """A GPU image may lack these: they are imported where they are used."""
    for file in LIBRARY:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("fugashi", "datasets", "sudachipy", "sentencepiece", "ipadic"), file


def test_nothing_loads_pickles():
    for file in LIBRARY + SCRIPTS:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"pickle\.load|torch\.load\((?!.*weights_only=True)|trust_remote_code=True", text), file


def test_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(
        r"(?<!lm)(?:lmscripts|scripts|accelerate_configs|recipes|sample_data|benchmarks|docs)/[\w/.]+\.\w+", text
    ):
        assert (ROOT / path).exists(), path
    known = {"--config_file", "--num_processes", "--machine_rank", "--logdir", "--main_process_ip", "--upgrade"}
    library = ROOT / "lmscripts"
    with_options = [*SCRIPTS, library / "options" / "parsing.py", *(library / "objectives").glob("*.py")]
    options = "".join(file.read_text(encoding="utf-8") for file in with_options)
    for flag in set(re.findall(r"--[a-z][\w]+", text)) - known:
        assert re.search(rf"\b{flag[2:].removeprefix('no_')}\b", options), flag
