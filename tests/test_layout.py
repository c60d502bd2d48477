"""The shape of the project: which way imports run, how long functions may be, what text may say."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from lmscripts.models import families

LIBRARY = sorted((ROOT / "lmscripts").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
# Each imports from those after it only, and from the files that stand beside the rooms.
ROOMS = (
    "commands", "evaluation", "training", "objectives", "models", "data", "tokenizer", "text", "cluster", "options",
    "beside"
)  # fmt: skip


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def room(parts):
    first = parts[0].removesuffix(".py") if parts else ""
    return first if first in ROOMS else "beside"


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


@pytest.mark.parametrize("file", LIBRARY, ids=lambda file: str(file.relative_to(ROOT / "lmscripts")))
def test_rooms_import_only_from_those_below(file):
    """Also inside functions and where only types are checked: what looks up is a knot."""
    here = room(file.relative_to(ROOT / "lmscripts").parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            package, *parts = name.split(".")
            if package == "lmscripts" and parts:
                assert ROOMS.index(room(parts)) >= ROOMS.index(here), f"{file}:{node.lineno} imports {name}"


def test_every_room_says_what_it_holds():
    rooms = {file.name for file in (ROOT / "lmscripts").iterdir() if (file / "__init__.py").exists()}
    assert rooms == set(ROOMS) - {"beside", "commands"}
    for name in rooms:
        docstring = ast.get_docstring(
            ast.parse((ROOT / "lmscripts" / name / "__init__.py").read_text(encoding="utf-8"))
        )
        assert len(docstring.splitlines()) >= 3, name
        assert f"  {name}/ " in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", LIBRARY + SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_models_know_families_by_name(file):
    """What differs between families is written in their files; nobody else asks which one it is."""
    if room(file.relative_to(ROOT / "lmscripts").parts if file in LIBRARY else ()) == "models":
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for side in [node.left, *node.comparators] if isinstance(node, ast.Compare) else []:
            compared = {each.value for each in ast.walk(side) if isinstance(each, ast.Constant)}
            assert not compared & set(families.names()), f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", LIBRARY, ids=lambda file: str(file.relative_to(ROOT / "lmscripts")))
def test_library_gets_values_never_the_options_of_a_script(file):
    for function in functions(file):
        taken = function.args
        names = {each.arg for each in [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]}
        assert "options" not in names, f"{file}:{function.lineno} {function.name}"


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_import_no_script(file):
    names = {script.stem for script in SCRIPTS}
    assert not any(name.split(".")[0] in names | {"scripts"} for name in imports(file))


@pytest.mark.parametrize("name", ["run_pretraining.py", "finetune_classifier.py", "train_policy.py"])
def test_training_scripts_call_at_most_ten_modules(name):
    """What is imported for type checkers alone does not count."""
    tree = ast.parse((ROOT / "scripts" / name).read_text(encoding="utf-8"))
    typing = {id(node) for each in tree.body if isinstance(each, ast.If) for node in ast.walk(each)}
    called, rooms = set(), {f"lmscripts.{room}" for room in ROOMS} - {"lmscripts.options"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lmscripts") and id(node) not in typing:
            inside = node.module == "lmscripts" or node.module in rooms
            called |= {f"{node.module}.{alias.name}" if inside else node.module for alias in node.names}
    assert len(called) <= 10, called


@pytest.mark.parametrize("file", LIBRARY + SCRIPTS, ids=lambda file: file.name)
def test_functions_fit_on_a_screen(file):
    for function in functions(file):
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
    parsing = ROOT / "lmscripts" / "options" / "parsing.py"
    files = [*SCRIPTS, parsing, *(ROOT / "lmscripts" / "objectives").glob("*.py")]
    options = "".join(file.read_text(encoding="utf-8") for file in files)
    for flag in set(re.findall(r"--[a-z][\w]+", text)) - known:
        assert re.search(rf"\b{flag[2:].removeprefix('no_')}\b", options), flag
