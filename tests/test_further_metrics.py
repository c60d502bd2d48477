"""Further metrics of a classifier: scikit-learn's scorers as metrics of `evaluate`, and scripts of one's own."""

from functools import partial

import numpy as np
import pytest
from sklearn import metrics as reference

from lmscripts.errors import UserError

further = pytest.importorskip("lmscripts.evaluation.further")
SCRIPT = """
import datasets
import evaluate

class Own(evaluate.Metric):
    def _info(self):
        features = datasets.Features(FEATURES)
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, references, **others):
        (given,) = others.values()
        return RESULT
"""


def answers(num_labels, several, documents=60):
    """(truth, given, probabilities) of made-up documents, some of them wrong."""
    random = np.random.default_rng(3)
    values = random.random((documents, num_labels))
    if several:
        return random.random(values.shape) < 0.4, values > 0.5, values
    values /= values.sum(1, keepdims=True)
    eye = np.eye(num_labels, dtype=bool)
    return eye[random.integers(0, num_labels, documents)], eye[values.argmax(1)], values


def asked(names, labels, several, truth, given, probabilities):
    found = further.FurtherMetrics(names)
    found.suit(labels, several)
    values = found(truth, given, probabilities)
    assert not found.problems
    return values


def script(folder, name, features, result):
    path = folder / f"{name}.py"
    path.write_text(SCRIPT.replace("FEATURES", features).replace("RESULT", result), encoding="utf-8")
    return str(path)


def test_every_scorer_is_scikit_learns_function():
    labels = ["a", "b", "c", "d"]
    truth, given, shares = answers(4, False)
    numbers = truth.argmax(1), given.argmax(1)
    functions = {"f1": reference.f1_score, "jaccard": reference.jaccard_score}
    functions |= {"precision": reference.precision_score, "recall": reference.recall_score}
    many = {
        f"{n}_{how}": partial(f, average=how) for n, f in functions.items() for how in ("macro", "micro", "weighted")
    }
    expected = {name: function(*numbers) for name, function in many.items()}
    expected |= {"roc_auc_ovr": reference.roc_auc_score(numbers[0], shares, multi_class="ovr")}
    expected |= {"roc_auc_ovo": reference.roc_auc_score(numbers[0], shares, multi_class="ovo")}
    weighted = reference.roc_auc_score(numbers[0], shares, multi_class="ovr", average="weighted")
    expected |= {"roc_auc_ovr_weighted": weighted, "neg_log_loss": -reference.log_loss(numbers[0], shares)}
    expected |= {"top_k_accuracy": reference.top_k_accuracy_score(numbers[0], shares)}
    expected |= {"average_precision": reference.average_precision_score(truth, shares)}
    assert asked([*expected], labels, False, truth, given, shares) == pytest.approx(expected, abs=1e-12)
    two = answers(2, False)
    numbers = two[0].argmax(1), two[1].argmax(1)
    expected = {name: function(*numbers) for name, function in functions.items()}
    expected |= {"roc_auc": reference.roc_auc_score(numbers[0], two[2][:, 1])}
    expected |= {"neg_brier_score": -reference.brier_score_loss(numbers[0], two[2][:, 1])}
    assert asked([*expected], labels[:2], False, *two) == pytest.approx(expected, abs=1e-12)
    assert {*expected, *many} < {*further.NAMES}
    several = answers(4, True)
    expected = {name: function(*several[:2]) for name, function in many.items()}
    expected |= {"roc_auc": reference.roc_auc_score(several[0], several[2])}
    assert asked([*expected], labels, True, *several) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "labels", "several", "sentence"),
    [
        ("f1", 3, False, "--metric f1 is not for this table \\(3 labels, one a document\\): .*average"),
        ("roc_auc", 3, False, "multi_class"),
        ("neg_log_loss", 3, True, "any number a document\\): it is for one label"),
        ("top_k_accuracy", 3, True, "not for this table"),
    ],
)
def test_what_cannot_judge_a_table_is_refused_before_it_is_learnt(name, labels, several, sentence):
    with pytest.raises(UserError, match=sentence):
        further.FurtherMetrics([name]).suit([f"label {n}" for n in range(labels)], several)


def test_unknown_names_are_answered_with_all_and_the_nearest():
    for name in ("f1_marco", "someone/f1_marco", "no/such/script.py"):
        with pytest.raises(UserError, match=f"--metric {name} cannot be loaded .*macro_f1, accuracy.*roc_auc"):
            further.FurtherMetrics([name])
    with pytest.raises(UserError, match=r"did you mean 'f1_macro'\?"):
        further.FurtherMetrics(["f1_marco"])


def test_scripts_get_what_their_types_say(tmp_path):
    truth, given, shares = answers(2, False)
    words = dict.fromkeys(("predictions", "references"), "datasets.Value('string')")
    pair = "{'predictions': %s, 'references': datasets.Value('int32')}"
    number, flags = "datasets.Value('float32')", "datasets.List(datasets.Value('float32'))"
    told = [
        script(tmp_path, "words", str(words).replace('"', ""), "{'same': references == given, 'first': ord(given[0])}"),
        script(tmp_path, "second", pair % number, "{'x': sum(given)}"),
        script(tmp_path, "all_of_them", pair % flags, "{'x': sum(map(sum, given))}"),
    ]
    values = asked(told, ["j", "n"], False, truth, given, shares)
    first = ord("jn"[given[0].argmax()])
    expected = {"words_same": 0.0, "words_first": first, "second": shares[:, 1].sum(), "all_of_them": len(shares)}
    assert values == pytest.approx(expected, rel=1e-5)
    for path, several, sentence in ((told[1], True, "one for each document"), (told[1], False, "second of two labels")):
        with pytest.raises(UserError, match=sentence):
            further.FurtherMetrics([path]).suit(["a", "b", "c"], several)
    other = script(tmp_path, "other", "{'sources': datasets.Value('string')}", "{}")
    taken = script(tmp_path, "loss", pair % number, "{'x': 1.0}")
    for path, sentence in ((other, "asks for sources"), (taken, "gives loss, which is there without it")):
        with pytest.raises(UserError, match=sentence):
            further.FurtherMetrics([path]).suit(["a", "b"], False)


def test_what_fails_later_ends_nothing(tmp_path):
    truth, given, shares = answers(4, False)
    found = further.FurtherMetrics(["roc_auc_ovr", "f1_macro"])
    found.suit(["a", "b", "c", "d"], False)
    kept = truth.argmax(1) < 2  # two labels that never occur
    values = found(truth[kept], given[kept], shares[kept])
    assert np.isnan(values["roc_auc_ovr"])
    assert values["f1_macro"] > 0
    assert [*found.problems] == ["roc_auc_ovr"]
