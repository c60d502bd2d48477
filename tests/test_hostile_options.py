"""Options, files of options and presets far out of range: one sentence and exit code 2, in little time."""

import functools
import importlib.util
import json
import sys

import pytest
from conftest import PATIENCE, ROOT, TINY_PRESET, cpu_seconds_below, run_script

from lmscripts.errors import UserError
from lmscripts.models.families import preset_keys
from lmscripts.options import parse_options
from lmscripts.options.parsing import _flags
from lmscripts.options.presets import load_preset

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


@functools.cache
def options_of(script):
    """The dataclasses of a script's options."""
    spec = importlib.util.spec_from_file_location(f"options_of_{script[:-3]}", ROOT / "scripts" / script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Options, getattr(module, "SETTINGS", [])


def refusal(script, capsys, *words):
    """The sentence with which a script refuses a line; what it needs besides is given."""
    own, more = options_of(script)
    line = [str(word) for word in words]
    for name, flag in _flags(own, *more).items():
        if flag.required and f"--{name}" not in line:
            line += [f"--{name}", "1" if int in flag.kinds else "given"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        parse_options(own, description="", argv=line, more=more)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("error: ") == 1
    return said


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_beyond_all_sense_are_refused_by_every_option(script, capsys):
    own, more = options_of(script)
    tried = 0
    for name, flag in _flags(own, *more).items():
        if flag.kinds & {int, float}:
            values = ["9" * 5000, "nan", "-inf", "1e999999", "0x10", "010", "1:30", "९x", ""]
            values += ["9" * 30, f"-{'9' * 30}"] if int in flag.kinds else []
            for value in values:
                assert f"--{name} " in refusal(script, capsys, f"--{name}", value), value
                tried += 1
    assert tried >= 8 or script == "extract_electra_model.py"


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "launch.py"])  # which writes nothing
def test_places_where_nothing_can_be_written_are_refused_before_the_work(script, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    own, more = options_of(script)
    places = {name: flag for name, flag in _flags(own, *more).items() if flag.writes}
    assert places
    bad = {"folder": ["file", "dangling", "loop", "file/inside", "dangling/inside", "x" * 300, "a\0b"]}
    bad["file"] = ["folder", "file/inside", "x" * 300, "a\0b"]
    before = sorted(tmp_path.iterdir())
    for name, flag in places.items():
        for place in bad[flag.writes]:
            said = refusal(script, capsys, f"--{name}", tmp_path / place)
            assert f"--{name} " in said
        for empty in ("", "  "):
            if empty != flag.default:
                assert f"--{name} is empty" in refusal(script, capsys, f"--{name}", empty)
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_on_a_disk_that_cannot_be_written_is_refused(capsys):
    said = refusal("prepare_corpus.py", capsys, "--output_dir", "/proc/self/store")
    assert "--output_dir /proc/self/store cannot be written" in said


# ---- files of options --------------------------------------------------------------------------------------------

DOUBLING = "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))])
CONFIGS = {
    "aliases": DOUBLING,
    "aliases of an older system": "trainer:\n" + "\n".join(f"  {line}" for line in DOUBLING.splitlines()),
    "aliases in a value": f"seed: &s [{'1, ' * 2000}1]\n" + "".join(f"k{n}: [{'*s, ' * 2000}*s]\n" for n in range(9)),
    "deep list": f"seed: {'[' * 50_000}",
    "deep mapping": "".join(f"{' ' * n}a:\n" for n in range(1200)),
    "deep flow": "seed: " + "{a: " * 20_000,
    "digits": f"seed: {'7' * 6000}",
    "float digits": f"weight_decay: 0.{'0' * 6000}1",
    "exponent": "weight_decay: 1e-999999999999",
    "twice": "seed: 1\nseed: 1",
    "twice in a block": "trainer: {max_steps: 4, max_steps: 4}",
    "twice within": "trainer: {callbacks: [{class_path: a.B, init_args: {x: 1, x: 2}}]}",
    "object": "seed: !!python/object/apply:os.system ['touch ran']",
    "tag": "seed: !!float 1",
    "itself": "seed: &a [*a]",
    "merge": "<<: {seed: 1}",
    "list": "- seed: 1",
    "two documents": "seed: 1\n---\nseed: 2",
    "NUL": "seed: \0",
    "tabs": "\tseed: 1",
    "bytes": b"\xff\xfe\x00",
    "large": "# " + "x" * (1 << 20),
    "key as list": "[a, b]: 1",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_files_of_options(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = CONFIGS[name]
    (tmp_path / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["--config", "c.yaml", "--model_dir", "run", "--model_type", "bert-tiny", "--dataset_dir", "store"]
    done = run_script("run_pretraining.py", *arguments, cwd=tmp_path, check=False, timeout=PATIENCE)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if "error: " in line]
    # Tags and exponents are no mistakes of the file: what is read goes on to the store, which is not there.
    assert "c.yaml" in sentence or name in ("tag", "exponent"), sentence
    assert len(sentence) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_a_pipe_without_an_end_is_no_file_of_options(tmp_path):
    arguments = ["--config", "/dev/zero", "--model_dir", tmp_path / "run"]
    done = run_script("run_pretraining.py", *arguments, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert "/dev/zero has over 1,048,576 bytes" in done.stderr


# ---- presets -----------------------------------------------------------------------------------------------------

WHOLE = {**TINY_PRESET, "embedding-size": 32, "generator-size": "1/2"}
PRESETS = {
    "digits": json.dumps(WHOLE)[:-1] + f', "save-steps": {"8" * 6000}}}',
    "large steps": {"train-steps": 10**20},
    "large sizes": {"hidden-size": 10**7},
    "layers": {"number-of-layers": 10**6},
    "rows": {"batch-size": {"-1": 10**12}},
    "length": {"sequence-length": 10**7},
    "tiny fraction": {"generator-size": "1e-888888888"},
    "large fraction": {"generator-size": "1e888888888"},
    "fraction of digits": {"generator-size": f"1/{'3' * 5000}"},
    "nothing": {"generator-size": "1/0"},
    "words": {"generator-size": "a quarter"},
    "NaN": json.dumps({**WHOLE, "learning-rate": float("nan")}),
    "infinity": json.dumps({**WHOLE, "learning-rate": float("inf")}),
    "list": {"hidden-size": [32]},
    "object": {"hidden-size": {"a": 32}},
    "null": {"hidden-size": None},
    "truth": {"hidden-size": True},
    "text": {"learning-rate": "1e-3"},
    "negative": {"warmup-steps": -1},
    "twice": json.dumps(WHOLE)[:-1] + ', "warmup-steps": 3}',
    "deep": "[" * 200_000,
    "deep value": '{"a":' * 50_000,
    "comma": json.dumps(WHOLE)[:-1] + ",}",
    "no preset": "[]",
}


@pytest.mark.parametrize("name", PRESETS)
def test_hostile_presets(name, tmp_path):
    file, content = tmp_path / "p.json", PRESETS[name]
    content = content if isinstance(content, str) else json.dumps({**WHOLE, **content})
    file.write_text(f'{{"electra-mine": {content}}}', encoding="utf-8")
    with cpu_seconds_below(30), pytest.raises(UserError, match=r"p\.json"):
        load_preset(file, "electra-mine", preset_keys())


def test_sizes_that_no_memory_holds_are_one_sentence(store_dir, tmp_path):
    arguments = ["--dataset_dir", store_dir, "--model_dir", tmp_path / "run", "--model_type", "bert-tiny"]
    done = run_script("run_pretraining.py", *arguments, "--n_embd", 200_000, "--n_head", 2, check=False)
    assert done.returncode == 2
    assert "GiB of memory: give smaller sizes" in done.stderr
    assert not (tmp_path / "run").exists()
