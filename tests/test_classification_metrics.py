"""Numbers about a classifier: against scikit-learn, by hand, and where a number has no meaning."""

import json

import numpy as np
import pytest
from sklearn import metrics as reference

from lmscripts.errors import UserError
from lmscripts.evaluation import calibration, metrics
from lmscripts.evaluation.comparison import mcnemar


def guesses(rows=400, labels=4, skill=0.6, seed=0):
    random = np.random.default_rng(seed)
    truth = random.integers(0, labels, rows)
    return truth, np.where(random.random(rows) < skill, truth, random.integers(0, labels, rows))


def measured(truth, decided, documents=None, labels=None, multi_label=False, **settings):
    if not multi_label:
        labels = labels or int(max(truth.max(), decided.max())) + 1
        truth, decided = metrics.one_hot(truth, labels), metrics.one_hot(decided, labels)
    documents = np.arange(len(truth)) if documents is None else documents
    return metrics.measured(truth, decided, documents, multi_label, **settings)[0]


def values(found):
    return {name: number["value"] for name, number in found["metrics"].items()}


@pytest.mark.parametrize("seed", range(4))
def test_single_label_numbers_are_those_of_scikit_learn(seed):
    truth, decided = guesses(seed=seed, labels=2 + seed)
    found = measured(truth, decided)
    assert values(found) == pytest.approx(
        {
            "accuracy": reference.accuracy_score(truth, decided),
            "balanced_accuracy": reference.balanced_accuracy_score(truth, decided),
            "macro_f1": reference.f1_score(truth, decided, average="macro"),
            "mcc": reference.matthews_corrcoef(truth, decided),
        }
    )
    each = reference.precision_recall_fscore_support(truth, decided)
    for number, label in enumerate(found["per_label"]):
        assert label["precision"]["value"] == pytest.approx(each[0][number])
        assert label["recall"]["value"] == pytest.approx(each[1][number])
        assert label["f1"]["value"] == pytest.approx(each[2][number])
        assert label["support"] == each[3][number]
    np.testing.assert_array_equal(
        metrics.confusion_matrix(truth, decided, 2 + seed), reference.confusion_matrix(truth, decided)
    )


def test_multi_label_numbers_are_those_of_scikit_learn():
    random = np.random.default_rng(3)
    truth = random.random((300, 5)) < 0.3
    decided = truth ^ (random.random((300, 5)) < 0.15)
    found = measured(truth, decided, multi_label=True)
    assert values(found) == pytest.approx(
        {
            "subset_accuracy": reference.accuracy_score(truth, decided),
            "micro_f1": reference.f1_score(truth, decided, average="micro"),
            "macro_f1": reference.f1_score(truth, decided, average="macro"),
        }
    )


def test_by_hand():
    """Ten documents: four of a, of which three are found; six of b, of which one is taken for a and one for c."""
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    decided = np.array([0, 0, 0, 1, 0, 2, 1, 1, 1, 1])
    found = measured(truth, decided)
    assert values(found)["accuracy"] == pytest.approx(0.7)
    assert values(found)["balanced_accuracy"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    a, b, c = found["per_label"]
    assert (a["precision"]["value"], b["precision"]["value"]) == (pytest.approx(3 / 4), pytest.approx(4 / 5))
    assert c == {
        **{"support": 0, "predicted": 1, "hits": 0},
        "precision": {"value": 0.0, "interval": [0.0, 0.0]},
        "recall": {"value": None, "interval": None},
        "f1": {"value": 0.0, "interval": [0.0, 0.0]},
    }
    shares = metrics.by_row(metrics.confusion_matrix(truth, decided, 3))
    np.testing.assert_allclose(shares[:2], [[0.75, 0.25, 0], [1 / 6, 4 / 6, 1 / 6]])  # not rounded to tens
    assert np.isnan(shares[2]).all()


@pytest.mark.parametrize(
    ("truth", "decided", "labels"),
    [([0, 0, 0], [0, 0, 0], 1), ([0, 0, 0], [0, 1, 0], 4), ([2], [2], 3), ([2], [0], 3)],
    ids=["one label", "absent labels", "one document, right", "one document, wrong"],
)
def test_what_has_no_meaning_is_none_and_never_nan(truth, decided, labels):
    found = measured(np.array(truth), np.array(decided), labels=labels)
    json.dumps(found, allow_nan=False)
    assert values(found)["mcc"] is values(found)["balanced_accuracy"] is None
    assert found["metrics"]["mcc"]["interval"] is None
    assert values(found)["accuracy"] == pytest.approx(np.mean(np.array(truth) == np.array(decided)))
    if len(truth) == 1:
        assert found["metrics"]["accuracy"]["interval"] is None


def test_truth_of_one_label_tells_nothing_about_telling_labels_apart():
    """Such a number was 0 in every epoch, so that the first epoch was the best for ever."""
    for decided in ([1, 1, 1, 1], [0, 1, 1, 0]):
        flags = [metrics.one_hot(np.array(numbers), 2) for numbers in ([1, 1, 1, 1], decided)]
        found = metrics.overall(metrics.tally(*flags), multi_label=False)
        assert np.isnan([found["mcc"], found["balanced_accuracy"]]).all()
        assert np.isfinite([found["accuracy"], found["macro_f1"]]).all()
    flags = [metrics.one_hot(np.array(numbers), 2) for numbers in ([0, 1, 1, 1], [1, 1, 1, 1])]
    found = metrics.overall(metrics.tally(*flags), multi_label=False)
    assert (found["mcc"], found["balanced_accuracy"]) == (0.0, 0.5)  # one label given to rows of two is guessing


def test_interval_is_as_wide_as_theory_says():
    truth, decided = guesses(rows=1000, skill=0.7)
    found = measured(truth, decided, resamples=4000)["metrics"]["accuracy"]
    expected = 1.96 * np.sqrt(found["value"] * (1 - found["value"]) / 1000)
    low, high = found["interval"]
    assert (high - low) / 2 == pytest.approx(expected, rel=0.06)
    assert low < found["value"] < high


def test_fragments_of_a_document_are_drawn_together():
    """Ten alike fragments a document say no more than one: the interval must not become narrower."""
    truth, decided = guesses(rows=200)
    alone = measured(truth, decided)["metrics"]["accuracy"]
    tenfold = [np.repeat(array, 10) for array in (truth, decided, np.arange(200))]
    together = measured(*tenfold)["metrics"]["accuracy"]
    assert together["interval"] == pytest.approx(alone["interval"])
    independent = measured(*tenfold[:2])["metrics"]["accuracy"]
    assert np.diff(independent["interval"]) < 0.5 * np.diff(together["interval"])


def test_an_interval_holds_the_truth_when_what_is_alike_is_drawn_together():
    """40 authors of 25 texts; who wrote a text decides whether it is right, in 60 % of the texts there are."""
    random, covered = np.random.default_rng(0), {"texts": 0, "authors": 0}
    truth, authors = random.integers(0, 2, 1000), np.repeat(np.arange(40), 25)
    for draw in range(60):
        right = (random.random((40, 25)) < random.beta(1.5, 1.0, (40, 1))).ravel()
        for name, units in (("texts", np.arange(1000)), ("authors", authors)):
            found = measured(truth, np.where(right, truth, 1 - truth), units, resamples=200, seed=draw)
            low, high = found["metrics"]["accuracy"]["interval"]
            covered[name] += low <= 0.6 <= high
    assert covered["authors"] > 0.87 * 60
    assert covered["texts"] < 0.75 * 60


def test_resamples_are_those_of_a_plain_loop():
    """Every sample's numbers are what scikit-learn says about the documents that were drawn."""
    truth, decided = guesses(rows=60, labels=3)
    flags = [metrics.one_hot(array, 3) for array in (truth, decided)]
    drawn = metrics.resampled_tally(*flags, np.arange(60), resamples=20, seed=5)
    found = metrics.overall(drawn, multi_label=False)
    samples = np.random.default_rng(5).integers(0, 60, (20, 60))
    for number, sample in enumerate(samples):
        assert found["accuracy"][number] == pytest.approx((truth[sample] == decided[sample]).mean())
        assert found["mcc"][number] == pytest.approx(reference.matthews_corrcoef(truth[sample], decided[sample]))


def test_the_seed_decides(monkeypatch):
    truth, decided = guesses()
    first, same, other = (measured(truth, decided, seed=seed) for seed in (1, 1, 2))
    assert first == same != other
    monkeypatch.setattr(metrics, "_CELLS_AT_ONCE", 1000)  # memory is not the statistics' business
    assert measured(truth, decided, seed=1) == first


def test_paired_differences_are_narrower_than_unpaired():
    truth, decided = guesses(rows=500, labels=3)
    better = decided.copy()
    better[np.flatnonzero(decided != truth)[:20]] = truth[np.flatnonzero(decided != truth)[:20]]
    documents = np.arange(500)
    judged = [
        metrics.measured(metrics.one_hot(truth, 3), metrics.one_hot(one, 3), documents, False)
        for one in (better, decided)
    ]
    gap = metrics.differences(*judged)["accuracy"]
    assert gap["value"] == pytest.approx(20 / 500)
    assert gap["interval"][0] > 0
    own = judged[0][0]["metrics"]["accuracy"]["interval"]
    assert np.diff(gap["interval"]) < 0.6 * np.diff(own)


def test_surest_mistake_comes_first_and_names_the_wrong_label():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.05, 0.95]])
    truth = metrics.one_hot(np.array([1, 1, 0]), 2)
    decided = metrics.one_hot(probabilities.argmax(1), 2)
    assert metrics.surest_mistakes(probabilities, truth, decided, False) == [(2, 1), (0, 0)]


def test_labels_that_were_missed_are_mistakes_too():
    """A document whose only fault is a missed label was in no list of mistakes."""
    probabilities = np.array([[0.9, 0.01, 0.2], [0.9, 0.9, 0.8], [0.6, 0.4, 0.1], [0.9, 0.1, 0.1]])
    truth = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]], bool)
    decided = probabilities >= 0.5
    # Missed at 0.01; wrongly given at 0.8; both, and surer of what it missed no more than of what it gave; right.
    assert metrics.surest_mistakes(probabilities, truth, decided, True) == [(0, 1), (1, 2), (2, 0)]


def test_mcnemar_is_the_binomial_test():
    first = np.array([True] * 12 + [False] * 3 + [True] * 50 + [False] * 5)
    second = np.array([False] * 12 + [True] * 3 + [True] * 50 + [False] * 5)
    found = mcnemar(first, second)
    assert [found[name] for name in ("only_first", "only_second", "both", "neither")] == [12, 3, 50, 5]
    assert found["p"] == pytest.approx(2 * sum([1, 15, 105, 455]) / 2**15)
    assert mcnemar(first, first)["p"] == 1.0


def test_other_shapes_are_refused():
    with pytest.raises(UserError, match=r"\(3, 2\).*\(2, 2\)"):
        metrics.tally(np.zeros((3, 2), bool), np.zeros((2, 2), bool))
    with pytest.raises(UserError, match="0 to 3, but there are 3 labels"):
        metrics.one_hot(np.array([0, 3]), 3)


# ---- calibration -------------------------------------------------------------------------------------------------


def drawn_logits(rows=6000, labels=4, temperature=2.5, seed=0):
    """Logits that are right once they are divided by the temperature."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 4, (rows, labels))
    chances = calibration.probabilities_of(logits, False, temperature)
    return logits, (random.random((rows, 1)) > chances.cumsum(1)).sum(1).clip(max=labels - 1)


def test_temperature_is_found_again_and_repairs_calibration():
    logits, labels = drawn_logits()
    fitted = calibration.fit_temperature(logits, labels)
    assert fitted == pytest.approx(2.5, rel=0.05)
    before, after = (calibration.probabilities_of(logits, False, t) for t in (1.0, fitted))
    assert calibration.judged(before, labels)["ece"] > 0.1
    assert calibration.judged(after, labels)["ece"] < 0.02
    losses = [
        calibration.negative_log_likelihood(calibration.probabilities_of(logits, False, t), labels)
        for t in (fitted * 0.98, fitted, fitted * 1.02)
    ]
    assert losses[1] == min(losses)
    np.testing.assert_array_equal(before.argmax(1), after.argmax(1))


def test_temperature_of_sigmoids():
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (4000, 3))
    labels = random.random(logits.shape) < calibration.probabilities_of(logits, True, 0.6)
    assert calibration.fit_temperature(logits, labels) == pytest.approx(0.6, rel=0.06)


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [([[9.0, 0.0], [0.0, 9.0]], [0, 1], 0.05), ([[9.0, 0.0], [0.0, 9.0]], [1, 0], 20.0), ([[0.0, 0.0]], [1], 1.0)],
    ids=["all right", "all wrong", "nothing said"],
)
def test_temperature_stays_in_bounds(logits, labels, expected):
    assert calibration.fit_temperature(np.array(logits), np.array(labels)) == expected


def test_temperature_refuses_what_is_no_number():
    with pytest.raises(UserError, match="1 of 4 logits are not finite"):
        calibration.fit_temperature(np.array([[0.0, np.inf], [1.0, 0.0]]), np.array([0, 1]))
    with pytest.raises(UserError, match="no calibration"):
        calibration.fit_temperature(np.zeros((0, 3)), np.zeros(0, int))


def test_calibration_error_by_hand():
    """Two statements at 0.9, one true; two at 0.6, both true: (2 * 0.4 + 2 * 0.4) / 4."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert calibration.judged(probabilities, np.array([0, 1, 1, 1]))["ece"] == pytest.approx(0.4)
    sure = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert calibration.judged(sure, np.array([0, 0]))["ece"] == 0.0
    assert [one["count"] for one in calibration.judged(sure, np.array([0, 0]))["bins"]] == [0] * 14 + [2]


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_are_the_best_there_are(seed):
    random = np.random.default_rng(seed)
    probabilities = random.random((40, 2)).round(1)  # with ties
    labels = random.random((40, 2)) < probabilities
    found = calibration.tune_thresholds(probabilities, labels)
    for label in range(2):
        own, flags = probabilities[:, label], labels[:, label]
        best = max(reference.f1_score(flags, own >= t, zero_division=0) for t in np.linspace(0, 1, 401))
        assert reference.f1_score(flags, own >= found[label]) == pytest.approx(best)


def test_a_label_that_never_occurs_keeps_its_threshold():
    found = calibration.tune_thresholds(np.array([[0.1, 0.9], [0.2, 0.3]]), np.array([[False, True], [False, False]]))
    assert found[0] == 0.5
    assert found[1] == 0.5  # all between 0.3 and 0.9 are best, and the usual one is among them


def test_thresholds_of_a_run_come_first():
    validation = (np.array([[0.1, 0.9], [0.2, 0.3]]), np.array([[False, True], [True, False]]))
    own, said = calibration.choose_thresholds({"b": 0.4, "a": 0.2}, ("a", "b"), validation)
    assert (own.tolist(), said) == ([0.2, 0.4], "")
    assert "tuned on its validation" in calibration.choose_thresholds(None, ("a", "b"), validation)[1]
    assert "0.5 was taken" in calibration.choose_thresholds([0.1], ("a", "b"), None)[1]


def test_equally_sure_rows_are_decided_together():
    share, accuracy, confidence = calibration.coverage_accuracy([0.9, 0.6, 0.6, 0.3], [True, True, False, False])
    np.testing.assert_allclose(share, [0.25, 0.75, 1.0])
    np.testing.assert_allclose(accuracy, [1.0, 2 / 3, 0.5])
    np.testing.assert_allclose(confidence, [0.9, 0.6, 0.3])


def test_extreme_logits_give_probabilities():
    logits = np.array([[1e4, -1e4, 0.0]])
    for multi_label in (False, True):
        assert np.isfinite(calibration.probabilities_of(logits, multi_label)).all()
