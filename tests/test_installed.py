"""An install without a clone: the wheel, its command, and what the command finds, copies and refuses."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import PATIENCE, ROOT

from lmscripts import commands
from lmscripts.files import project_folder

# What is left out of a copy of the project: of what somebody built or ran in it nothing may come into the wheel.
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "tests", "benchmarks", "runs", "demo_*")
SHIPPED = ("scripts/*.py", "recipes/*.yaml", "accelerate_configs/**/*.yaml", "sample_data/*.*", "docs/*.md")


def called(command, cwd, home=None):
    env = {**os.environ} if home is None else {**os.environ, "PYTHONPATH": str(home)}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "project", ignore=LEFT_OUT)
    words = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, folder / "project"]
    done = called([sys.executable, "-m", "pip", *words], folder)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def home(wheel):
    """The folder in which the package lies as after its installation, and none of the repository."""
    home = wheel.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home)
    return home


@pytest.fixture
def lmscripts(home, tmp_path):
    """The command, run in an empty folder."""
    (tmp_path / "empty").mkdir()
    entry = (home / "lmscripts-0.1.0.dist-info" / "entry_points.txt").read_text(encoding="utf-8")
    module, function = re.search(r"^lmscripts = ([\w.]+):(\w+)$", entry, re.MULTILINE).groups()
    start = [sys.executable, "-c", f"from {module} import {function}; {function}()"]
    return lambda *words: called([*start, *words], tmp_path / "empty", home)


def test_the_wheel_holds_what_is_needed_and_nothing_twice(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    of_package = [f for f in (ROOT / "lmscripts").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    wanted = {file.relative_to(ROOT).as_posix() for file in of_package}
    shipped = {ROOT / "parameter.json", *(file for pattern in SHIPPED for file in ROOT.glob(pattern))}
    wanted |= {f"lmscripts/shipped/{file.relative_to(ROOT).as_posix()}" for file in shipped}
    assert names == wanted


def test_the_command_lists_the_scripts_and_runs_them_by_name(lmscripts, home):
    listed = lmscripts().stdout
    assert listed == lmscripts("--help").stdout
    for script in (ROOT / "scripts").glob("*.py"):
        assert re.search(rf"^  {script.stem} +\w", listed, re.MULTILINE)
    assert lmscripts("--version").stdout == "lmscripts 0.1.0\n"
    helped = lmscripts("prepare-corpus", "--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith("usage: prepare_corpus.py")
    script = home / "lmscripts" / "shipped" / "scripts" / "prepare_corpus.py"
    assert helped.stdout == called([sys.executable, script, "--help"], home, home).stdout
    refused = lmscripts("prepare_corpus", "--input_fil", "x")
    assert (refused.returncode, "did you mean --input_file?" in refused.stderr) == (2, True)


def test_names_that_are_not_there(lmscripts):
    for words, answer in {
        ("run_pretrainin",): "there is no command run_pretrainin: did you mean run_pretraining?",
        ("path", "encoder_smal"): "there is no encoder_smal: did you mean encoder_small?",
        ("path", "nothing.at.all"): "there is no nothing.at.all: `lmscripts path` lists what there is",
        ("copy",): "copy takes what to copy and where to",
        ("copy", "recipes"): "there is no recipes",
        ("path", "two_phases_smal"): "did you mean two_phases_small?",
    }.items():
        done = lmscripts(*words)
        assert done.returncode == 2
        assert answer in done.stderr
        assert "Traceback" not in done.stderr


def test_a_copy_runs_where_it_is_and_is_not_overwritten(lmscripts, home, tmp_path):
    copy = tmp_path / "empty" / "mine" / "my.py"
    assert "next: " in lmscripts("copy", "run-pretraining", "mine/my.py").stdout
    assert copy.read_bytes() == (ROOT / "scripts" / "run_pretraining.py").read_bytes()
    copy.write_text(copy.read_text(encoding="utf-8").replace("Pretrain a language model", "Mine"), encoding="utf-8")
    changed = copy.read_bytes()
    for words in (["mine/my.py"], ["mine/my.py", "--force"]):
        done = lmscripts("copy", "run_pretraining", *words)
        assert (done.returncode == 0) == ("--force" in words)
        assert (copy.read_bytes() == changed) == ("--force" not in words)
    lmscripts("copy", "recipes/demo.yaml")
    assert (tmp_path / "empty" / "demo.yaml").read_bytes() == (ROOT / "recipes" / "demo.yaml").read_bytes()
    assert "\nPretrain a language model" in called([sys.executable, "my.py", "--help"], copy.parent, home).stdout
    asked = "from lmscripts.options.presets import default_parameter_file as f; print(f())"
    presets = called([sys.executable, "-c", asked], copy.parent, home).stdout
    assert presets == f"{home / 'lmscripts' / 'shipped' / 'parameter.json'}\n"


def test_files_are_found_in_the_package(lmscripts, home):
    shipped = home / "lmscripts" / "shipped"
    names = lmscripts("path").stdout.splitlines()
    assert {"parameter.json", "scripts/launch.py", "recipes/demo.yaml", "sample_data/articles.txt"} <= {*names}
    asked = {"run_pretraining": "scripts/run_pretraining.py", "gpu1-bf16": "accelerate_configs/gpu1_bf16.yaml"}
    asked |= {"parameter.json": "parameter.json", "recipes/demo": "recipes/demo.yaml"}
    assert lmscripts("path", *asked).stdout.splitlines() == [str(shipped / place) for place in asked.values()]


def test_a_recipe_of_the_package_is_taken_where_the_folder_has_none(lmscripts, home, tmp_path):
    own = home / "lmscripts" / "shipped" / "recipes" / "two_phases_small.yaml"
    line = ["run_pretraining", "--config", "recipes/two_phases_small.yaml", "--print_config"]
    done = lmscripts(*line)
    assert f"{own} is taken" in done.stderr
    assert re.search(r"^phase_steps: \[900, 100\]", done.stdout, re.MULTILINE)
    (tmp_path / "empty" / "recipes").mkdir()
    (tmp_path / "empty" / line[2]).write_text("model_type: bert-base\nphase_steps: [7, 8]\n", encoding="utf-8")
    done = lmscripts(*line)
    assert (done.stderr, "phase_steps: [7, 8]" in done.stdout) == ("", True)
    assert lmscripts("run_pretraining", "--config", "recipes/none.yaml").returncode == 2


SMALL = {
    "train_tokenizer": "train_tokenizer --vocab_size 2048 --num_workers 1",
    "--model_dir runs/encoder": "--model_dir runs/encoder --max_steps 2 --warmup_steps 1 --batch_size 4 --tracker none",
    "lmscripts launch": "lmscripts launch --cpu --here_gpus 1",
}


@pytest.mark.slow
@pytest.mark.launch
def test_the_lines_of_the_readme_from_text_to_a_model(lmscripts, home, tmp_path):
    block = re.search(r"^```\n(lmscripts .*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    for there, here in SMALL.items():
        assert there in block
        block = block.replace(there, here)
    folder, bins = tmp_path / "empty", tmp_path / "bin"
    shutil.copy(ROOT / "sample_data" / "articles.txt", folder / "corpus.txt")
    bins.mkdir()
    program = f"#!{sys.executable}\nfrom lmscripts.commands import main\nmain()\n"
    (bins / "lmscripts").write_text(program, encoding="utf-8")
    (bins / "lmscripts").chmod(0o755)
    path = os.pathsep.join([str(bins), os.path.dirname(sys.executable), os.environ["PATH"]])
    done = called(["env", f"PATH={path}", "bash", "-euxc", block], folder, home)
    assert done.returncode == 0, done.stderr
    assert "\n  lmscripts prepare_corpus " in done.stdout
    assert (folder / "runs" / "encoder" / "final" / "model.safetensors").exists()
    assert f"next: {sys.executable} my_pretraining.py --help" in done.stdout


def test_in_a_clone_the_files_are_those_of_the_clone():
    assert project_folder() == ROOT
    assert commands.find("run-pretraining.py") == ROOT / "scripts" / "run_pretraining.py"
