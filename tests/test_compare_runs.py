"""scripts/compare_runs.py: curves, equal loss, what differs, and what makes losses incomparable."""

import json
import shutil

import pytest
from conftest import run_script


def write_run(folder, losses, fixed, tokens=1000.0, speed=500.0, **options):
    """A run's folder: held-out losses of every second step, trained on so many tokens a step, at so many a second."""
    checkpoint = folder / "checkpoint-8"
    checkpoint.mkdir(parents=True)
    (checkpoint / "training_state.json").write_text(json.dumps({"fixed": fixed}), encoding="utf-8")
    records = [{"step": 0, "eval_loss": losses[0]}, {"step": 0, "samples": {"a": ["b"]}}]
    for number, loss in enumerate(losses[1:], 1):
        step = 2 * number
        records.append({"step": step, "loss": loss, "tokens": step * tokens, "tokens_per_second": speed})
        records += [{"step": step, "eval_loss": loss}, {"step": step, "samples": {"a": ["b"]}}]
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    lines = "".join(f"{name}: {value}\n" for name, value in {"model_dir": folder, "seed": 1, **options}.items())
    (folder / "config.yaml").write_text(lines, encoding="utf-8")
    return folder


MASKED = {"objective": "masked", "token store": ["a"], "sequence_length": [128], "mask_probability": [0.15]}


@pytest.fixture
def slow(tmp_path):
    return write_run(tmp_path / "slow", [9.0, 8.0, 7.0, 6.0], MASKED, speed=250.0, learning_rate=0.001)


@pytest.fixture
def quick(tmp_path):
    return write_run(tmp_path / "quick", [9.0, 7.0, 5.0, 4.0], MASKED, learning_rate=0.002)


def compare(tmp_path, *arguments, check=True):
    files = ["--picture", tmp_path / "curves.png", "--output_file", tmp_path / "numbers.json"]
    return run_script("compare_runs.py", *arguments, *files, check=check)


def test_what_each_needed_to_the_loss_that_all_reached(tmp_path, slow, quick):
    done = compare(tmp_path, slow, quick)
    result = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    one, other = result["runs"]
    assert (result["metric"], result["equal"], result["warnings"]) == ("eval_loss", 6.0, [])
    assert one["to_equal"] == {"steps": 6.0, "tokens": 6000.0, "seconds": 24.0}
    assert other["to_equal"] == {"steps": 3.0, "tokens": 3000.0, "seconds": 6.0}  # half way between 7 and 5
    assert result["options"] == {"learning_rate": ["0.001", "0.002"]}
    assert "warning" not in done.stderr
    table = done.stdout.splitlines()
    assert table[1].split() == ["slow", "6.0000", "6.0000", "6", "6,000", "24", "6", "6,000", "24"]
    assert ["learning_rate", "0.001", "0.002"] in [line.split() for line in table]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_one_did_not_reach(tmp_path, slow, quick):
    done = compare(tmp_path, slow, quick, "--loss", 4.5)
    one, other = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))["runs"]
    assert set(one["to_equal"].values()) == {None}
    assert other["to_equal"]["tokens"] == 5000.0
    assert done.stdout.splitlines()[1].split()[-3:] == ["-", "-", "-"]


def test_what_does_not_compare_is_told(tmp_path, slow, tokenizer_dir):
    """Another objective, other masks, another tokenizer, of which one word stands elsewhere."""
    fixed = MASKED | {"mask_probability": [0.3], "token store": ["b"]}
    other = write_run(tmp_path / "other", [9.0, 8.0], fixed)
    words = (tokenizer_dir / "vocab.txt").read_text(encoding="utf-8").splitlines()
    for run, order in ((slow, words), (other, [*words[:-2], words[-1], words[-2]])):
        shutil.copytree(tokenizer_dir, run / "final")
        (run / "final" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
        (run / "final" / "vocab.txt").write_text("\n".join(order) + "\n", encoding="utf-8")
    causal = write_run(tmp_path / "causal", [9.0, 8.0], MASKED | {"objective": "causal"})
    said = compare(tmp_path, slow, other).stderr
    assert "the tokenizers differ" in said
    assert "losses per token do not compare" in said
    assert "the token stores differ" in said
    assert "mask_probability differs (slow: [0.15], other: [0.3])" in said
    assert 'the objectives differ (slow: "masked", causal: "causal")' in compare(tmp_path, slow, causal).stderr


def test_what_cannot_be_compared_is_one_sentence(tmp_path, slow, quick):
    (tmp_path / "quick" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    cases = [
        ([slow], "one run"),
        ([slow, slow / "checkpoint-8"], f"give the folder of a run, such as {slow}"),
        ([slow, quick], f"the log of {quick} has no held-out loss"),
        ([slow, quick, "--metric", "eval_accuracy"], "does not fall with learning"),
        ([slow, quick, "--metric", "eval_perplexity"], "has no held-out eval_perplexity; it has eval_loss"),
    ]
    for arguments, said in cases:
        done = compare(tmp_path, *arguments, check=False)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "curves.png").exists()
