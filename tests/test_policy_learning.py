"""Rules are learnt, chance is not; and what was learnt is in what was saved."""

import json

import pytest
from conftest import ROOT, launch, run_script

ANSWERS = ROOT / "sample_data" / "offered_answers.json"
RATES = "--optimizer adam --learning-rate 0.002 --warmup_steps 50 --schedule linear --dropout 0 --tracker none"
SIZES = "--training-batch-size 64 --model-preset tiny --num-heads 4"


def learn(folder, rule, schema, number, sizes, config=None):
    """Result of evaluate_policy.py on decisions that were not seen, of a policy that was saved and loaded again."""
    for name, first, count in (("seen.txt", 0, number), ("others.txt", 10**6, 1000)):
        words = ["-o", name, "--num_records", count, "--first_record", first, "--rule", rule, "--schema", schema]
        run_script("make_annotations.py", *words, cwd=folder)
    run_script(
        "prepare_annotations.py", "--input_file", "seen.txt", "--schema", schema, "--output_dir", "s", cwd=folder
    )
    words = f"--training-data s {sizes} {RATES} --output-prefix . --experiment-name run".split()
    if config:
        launch(config, "train_policy.py", *words, cwd=folder)
    else:
        run_script("train_policy.py", *words, cwd=folder)
    run_script("evaluate_policy.py", "--model", "run", "--data", "others.txt", "--output_file", "r.json", cwd=folder)
    return json.loads((folder / "r.json").read_text(encoding="utf-8"))["metrics"]


@pytest.mark.parametrize("rule", ["draw", "numeric", "sequence"])
def test_a_rule_is_learnt_and_still_known_after_loading(rule, tmp_path):
    """The older trainer forgot the numbers when it saved: by the rule `numeric` it was at chance then."""
    found = learn(tmp_path, rule, ANSWERS, 9600, f"{SIZES} --dimension 64")
    assert found["top1_accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("rule", ["draw", "numeric", "sequence", "random"])
def test_two_processes_learn_the_rules_of_mahjong_and_nothing_from_chance(rule, tmp_path):
    found = learn(tmp_path, rule, "kanachan-v1", 20_000, SIZES, "cpu_2proc.yaml")
    if rule == "random":
        assert abs(found["top1_accuracy"] - found["chance_accuracy"]) < 0.05
    else:
        assert found["top1_accuracy"] > 0.95
