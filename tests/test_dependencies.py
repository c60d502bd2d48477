"""Everything that is imported anywhere is declared in pyproject.toml."""

import ast
import re
import sys
import tomllib
from importlib import metadata

import pytest
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOLDERS = ("lmscripts", "scripts", "sample_data", "benchmarks", "tests")
ASKED_IF_THERE = ("pynvml",)  # another way stands beside it


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras):
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}


def imported(folder):
    """Name of each module that is not of Python and not of here -> a place where it is imported."""
    files = sorted((ROOT / folder).rglob("*.py"))
    own = {"lmscripts", *(file.stem for room in FOLDERS for file in (ROOT / room).rglob("*.py"))}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("importorskip", "import_module"):
                names += [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
            for name in (name.partition(".")[0] for name in names):
                if name not in (*sys.stdlib_module_names, *ASKED_IF_THERE, *own):
                    yield name, f"{file.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("lmscripts", ("lamb", "lora", "sudachi", "unidic")),
        ("scripts", ()),
        ("sample_data", ()),
        ("benchmarks", ()),
        ("tests", tuple(EXTRAS)),
    ],
)
def test_every_import_is_declared(folder, extras):
    found, known = metadata.packages_distributions(), declared(*extras)
    for name, place in imported(folder):
        distributions = found.get(name, [name])
        assert known & set(map(normal, distributions)), f"{place} imports {name}, of {distributions}: not declared"
