"""What a classifier has to beat to be worth its cost: simple classifiers on the split of a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscripts.evaluation.comparison import Run
from lmscripts.evaluation.metrics import Flags, one_hot

_BUCKETS = 2**20


def majority_decisions(train: Flags, rows: int) -> Flags:
    """(rows, K) the most frequent set of labels in (D, K) training documents, for every row."""
    sets, counts = np.unique(train, axis=0, return_counts=True)
    return np.repeat(sets[counts.argmax()][None], rows, axis=0)


def regress(
    seen: Any, labels: NDArray[Any], unseen: Any, strength: float, *, scaled: bool = True, most_steps: int = 500
) -> NDArray[Any]:
    """Labels of unseen features by multinomial logistic regression on seen ones, whose scale may be taken out.

    The strength is the inverse one of the regularisation.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scaler = "passthrough" if not scaled else StandardScaler()
    with warnings.catch_warnings():
        # Weak regularisation of separable classes has no finite optimum; stopped early it predicts as well.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = make_pipeline(scaler, LogisticRegression(C=strength, max_iter=most_steps)).fit(seen, labels)
    return np.asarray(model.predict(unseen))


def has_spaces(texts: Sequence[str]) -> bool:
    """Whether words are set apart by white space: at most 12 characters a word in half of the texts."""
    lengths = [len(text) / max(1, len(text.split())) for text in texts[:1000] if text.strip()]
    return bool(lengths) and float(np.median(lengths)) <= 12


def tfidf_decisions(
    train_texts: Sequence[str], train: Flags, texts: Sequence[str], *, words: bool, multi_label: bool
) -> Flags:
    """Decisions of logistic regression on TF-IDF of n-grams: what a model has to beat to be worth its cost.

    N-grams (characters 2 to 4, or words 1 to 2) are counted in 2**20 buckets of a hash, so memory does not grow with
    the vocabulary; those that occur in one training document are left out. Nothing is fitted on other documents than
    the training texts, whose labels are (D, K). With several labels a row, every label is decided by itself.
    """
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    grams = {"analyzer": "word", "ngram_range": (1, 2)} if words else {"analyzer": "char", "ngram_range": (2, 4)}
    counter = HashingVectorizer(n_features=_BUCKETS, alternate_sign=False, norm=None, **grams)
    seen, unseen = counter.transform(train_texts), counter.transform(texts)
    common = np.flatnonzero(seen.getnnz(0) >= 2)
    if not len(common):
        return majority_decisions(train, len(texts))
    weigh = TfidfTransformer(sublinear_tf=True)
    seen, unseen = weigh.fit_transform(seen[:, common]), weigh.transform(unseen[:, common])

    def decide(labels: NDArray[Any]) -> NDArray[Any]:
        if len(np.unique(labels)) == 1:
            return np.repeat(labels[:1], len(texts))
        return regress(seen, labels, unseen, 10.0, scaled=False, most_steps=200)

    if multi_label:
        return np.stack([decide(train[:, label]) for label in range(train.shape[1])], axis=1)
    return one_hot(decide(train.argmax(1)), train.shape[1])


def baseline_decisions(run: Run, most_documents: int, seed: int) -> tuple[dict[str, Flags], int]:
    """Decisions of TF-IDF and logistic regression on a run's split for its test documents.

    They are fitted on the training part, or on a sample of `most_documents` from it.

    Returns:
        {name: (D, K)}, with words only where text has spaces; and the number of training documents that were seen.
    """
    train, truth = run.parts["train"], run.part_truth["train"]
    if len(train) > most_documents:
        kept = np.sort(np.random.default_rng(seed).choice(len(train), most_documents, replace=False))
        train, truth = train[kept], truth[kept]
    seen, texts = map(run.database.read_texts, (train, run.predictions["test", "document"].doc_ids))
    found = {}
    for words in (False, True) if has_spaces(seen) else (False,):
        name = f"TF-IDF of {'words' if words else 'characters'}"
        found[name] = tfidf_decisions(seen, truth, texts, words=words, multi_label=run.multi_label)
    return found, len(train)
