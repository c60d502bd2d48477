"""From the rows of a document to one answer: how their logits become those of the document.

Probabilities are a softmax where a document has one label and sigmoids where it may have several. What is combined as
probabilities is given back as logits (their logarithm, or log odds), so that a temperature can be applied to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscripts.evaluation.calibration import decisions, probabilities_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LEAST = 1e-9


def document_logits(
    logits: NDArray[Any], owners: Ints, num_documents: int, how: str, multi_label: bool, num_tokens: NDArray[Any]
) -> Floats:
    """Logits of documents from those of their rows.

    - "mean_probabilities": the mean of the rows' probabilities.
    - "mean_logits": the mean of the rows' logits.
    - "max": for each label the highest probability of any row; with one label each, divided by their sum.
    - "token_weighted": the mean of the probabilities, a row counting by the tokens that the model read in it: those
      of an overlap, which it read twice, count in both rows, and the special ones count too.

    Args:
        logits: (R, K) of the rows.
        owners: (R,) the document of each row.
        num_documents: D.
        how: one of `lmscripts.models.classifier.AGGREGATES`.
        multi_label: a document may have several labels.
        num_tokens: (R,) tokens of the rows.

    Returns:
        (D, K); NaN for a document without rows.
    """
    values = np.asarray(logits, dtype=np.float64)
    weights = np.asarray(num_tokens, np.float64) if how == "token_weighted" else np.ones(len(values))
    combined = values if how == "mean_logits" else probabilities_of(values, multi_label)
    num_labels = values.shape[1]
    if how == "max":
        found = np.full((num_documents, num_labels), -np.inf)
        np.maximum.at(found, owners, combined)
        found[np.isneginf(found)] = np.nan
    else:
        sums, totals = np.zeros((num_documents, num_labels)), np.zeros(num_documents)
        np.add.at(sums, owners, combined * weights[:, None])
        np.add.at(totals, owners, weights)
        found = np.full_like(sums, np.nan)
        np.divide(sums, totals[:, None], out=found, where=totals[:, None] > 0)
    if how == "mean_logits":
        return found
    if multi_label:
        bounded = np.clip(found, _LEAST, 1 - _LEAST)
        return np.asarray(np.log(bounded) - np.log1p(-bounded))
    bounded = np.maximum(found, _LEAST)
    return np.asarray(np.log(bounded / bounded.sum(1, keepdims=True)))


def calibrated(logits: Floats, multi_label: bool, temperature: float) -> Floats:
    """(N, K) probabilities after the temperature, as precise as they are stored (float32); NaN stays NaN."""
    return probabilities_of(logits, multi_label, temperature).astype(np.float32).astype(np.float64)


def names_of(probabilities: Floats, labels: list[str], thresholds: NDArray[Any] | None) -> list[list[str]]:
    """Names of the labels given to each of (N, K) probabilities; none where they are NaN."""
    known = ~np.isnan(probabilities).any(1)
    decided = np.zeros(probabilities.shape, np.bool_)
    if known.any():
        decided[known] = decisions(probabilities[known], thresholds)
    return [[labels[place] for place in np.flatnonzero(row)] for row in decided]
