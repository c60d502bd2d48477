"""What commit 17b4c52 wrote goes on working: its runs end as it ended them itself, everything else reads its folders.

tests/written_by_17b4c52/README.md says what is there.
"""

import csv
import importlib.metadata
import json
import math
import tarfile
from hashlib import sha256

import pytest
import torch
from conftest import ROOT, run_script
from runs import log_of
from safetensors.torch import load_file

from lmscripts.tokenizer.folder import RECORD_FILE

KEPT = ROOT / "tests" / "written_by_17b4c52"
EXPECTED = json.loads((KEPT / "expected.json").read_text(encoding="utf-8"))
OTHER_DROPOUT = 0.05  # then torch drew it, and since then it is drawn by rows


@pytest.fixture
def there(tmp_path):
    """A folder with all of it, to work in: every path in it is relative."""
    with tarfile.open(KEPT / "written.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def assert_as_before(before, now, where="", near=1e-6):
    """Everything that was there is there still, numbers nearly the same; there may be more."""
    if isinstance(before, dict):
        for name, value in before.items():
            assert name in now, f"{where}: {name} is missing"
            assert_as_before(value, now[name], f"{where}/{name}", near)
    elif isinstance(before, list):
        assert len(before) == len(now), where
        for number, values in enumerate(zip(before, now)):
            assert_as_before(*values, f"{where}/{number}", near)
    elif isinstance(before, float):
        assert math.isclose(before, now, rel_tol=near, abs_tol=near), f"{where}: {before} before, {now} now"
    else:
        assert before == now, f"{where}: {before} before, {now} now"


def assert_same_weights(before, folder):
    """Each file has the same bits, or each tensor the same norm and the same values at four places.

    Nearly, as another kind of CPU rounds otherwise; a step moves a weight by 1e-4 and more. The gradient of a bias of
    keys is nothing but rounding, of which Adam makes whole steps.
    """
    for name, was in before.items():
        if sha256((folder / name).read_bytes()).hexdigest() == was["sha256"]:
            continue
        now = {}
        for key, tensor in load_file(folder / name).items():
            flat = tensor.flatten()
            places = torch.linspace(0, len(flat) - 1, 4).long().unique()
            now[key] = [tensor.double().norm().item(), *flat[places].tolist()]
        assert now.keys() == was["tensors"].keys()
        kept = {key: values for key, values in was["tensors"].items() if not key.endswith("key.bias")}
        assert_as_before(kept, now, name, near=2e-5)


def logged(run_dir):
    """What a run logged, by step and name."""
    return {f"{record['step']} {name}": value for record in log_of(run_dir) for name, value in record.items()}


@pytest.mark.parametrize("name", EXPECTED["pretraining"])
def test_a_stopped_run_ends_as_it_would_have(there, name):
    """With the line that began it, or with the file of options that it left."""
    expected, run_dir = EXPECTED["pretraining"][name], there / "runs" / name
    arguments = expected["arguments"]
    if name.endswith("_without_dropout"):
        arguments = ["--config", f"runs/{name}/config.yaml", "--stop_at_step", 12]
    done = run_script("run_pretraining.py", *arguments, "--do_continue", cwd=there)
    assert f"going on from runs/{name}/checkpoint-{expected['stopped_at']}" in done.stdout
    assert "damaged" not in done.stdout
    assert "the model is in" in done.stdout
    if name.endswith("_without_dropout"):
        assert_as_before(expected["log"], logged(run_dir))
        assert_same_weights(expected["weights"], run_dir / "final")
    else:
        assert_as_before(expected["log"], logged(run_dir), near=OTHER_DROPOUT)


def test_a_branch_of_a_stopped_run_ends_as_it_would_have(there):
    expected = EXPECTED["branch"]
    run_script("run_pretraining.py", *expected["arguments"], cwd=there)
    assert_as_before(expected["log"], logged(there / "runs" / "branch"), near=OTHER_DROPOUT)


def test_a_stopped_classifier_ends_as_it_would_have(there):
    expected = EXPECTED["classifier"]
    done = run_script("finetune_classifier.py", *expected["arguments"], "--do_continue", cwd=there)
    assert "found all in topics.sqlite" in done.stdout
    assert f"going on from topics_training/checkpoint-{expected['stopped_at']}" in done.stdout
    assert_as_before(expected["log"], logged(there / "topics_training"))
    assert_same_weights(expected["weights"], there / "topics_trained_model")
    table = (there / "topics_testset_predictions.csv").read_text(encoding="utf-8-sig")
    assert_as_before(rows_of(expected["predictions"].replace("predicted_label", "prediction")), rows_of(table))
    stats = json.loads((there / "topics_train_test_stats.json").read_text(encoding="utf-8"))
    assert_as_before(expected["stats"], stats)


def rows_of(table):
    """Rows of a table of predictions, numbers as such."""

    def value(text):
        return float(text) if text.startswith(("0.", "1.")) else text

    return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(table.splitlines())]


@pytest.mark.parametrize("folder", EXPECTED["evaluations"])
def test_models_have_the_same_figures(there, folder):
    words = ["--model_dir", folder, "--input_file", "test.txt", "--output_file", "result.json"]
    run_script("evaluate_lm.py", *words, cwd=there)
    assert_as_before(EXPECTED["evaluations"][folder], json.loads((there / "result.json").read_text(encoding="utf-8")))


def test_an_electra_checkpoint_comes_apart(there):
    run_script("extract_electra_model.py", "--input_dir", "runs/electra", "--output_dir", "extracted", cwd=there)
    for name, digest in EXPECTED["extracted"].items():
        assert sha256((there / "extracted" / name).read_bytes()).hexdigest() == digest


def test_a_finished_classifier_answers(there):
    words = ["--model_dir", "finished_trained_model", "--input_file", "new.txt"]
    done = run_script("predict_classifier.py", *words, cwd=there)
    assert_as_before(rows_of(EXPECTED["predictions"]), rows_of(done.stdout), near=2e-6)  # six digits are written


def test_a_finished_classifier_is_reported(there):
    words = ["finished.sqlite", "--resamples", 200, "--output_dir", "report"]
    run_script("analyze_results.py", *words, cwd=there)
    report = json.loads((there / "report" / "run_1.json").read_text(encoding="utf-8"))
    assert_as_before(EXPECTED["report"], report)


@pytest.mark.parametrize("name", EXPECTED["again"])
def test_what_is_there_already_is_recognised(there, name):
    """Nothing is computed a second time, so fingerprints and settings are those of before.

    A tokenizer of other versions of the libraries that make it is another one, and that is said.
    """
    script, *words = EXPECTED["again"][name]
    other = {}
    if script == "train_tokenizer.py":
        record = json.loads((there / words[words.index("--model_dir") + 1] / RECORD_FILE).read_text(encoding="utf-8"))
        made = record["versions"]
        other = {package: v for package, v in made.items() if v != importlib.metadata.version(package)}
    done = run_script(script, *words, cwd=there, check=not other)
    if not other:
        assert "already" in done.stdout or "found all in" in done.stdout
    else:
        assert done.returncode == 2
        for package, version in other.items():
            assert f"{package} {version}, here it is {importlib.metadata.version(package)}" in done.stderr


def test_a_store_is_whole(there):
    done = run_script("prepare_corpus.py", "--inspect", "store", cwd=there)
    assert "every file has the hash that the manifest states" in done.stdout
