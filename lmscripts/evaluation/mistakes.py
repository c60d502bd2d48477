"""Documents whose labels a run got wrong, the surest mistake first: found, as a table, and as HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmscripts.evaluation.comparison import Run, read_places
from lmscripts.evaluation.markup import Markup, escape, percent
from lmscripts.evaluation.metrics import Flags, plain, surest_mistakes

_LONGEST_TEXT = 20_000


def find_mistakes(run: Run, decided: Flags, most_shown: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Test documents whose labels are wrong, the surest mistake first.

    Args:
        run: with predictions of test documents.
        decided: (N, K) labels that they were given.
        most_shown: mistakes that are returned with their text.

    Returns:
        All of them in values for JSON: "doc_id", "true" and "predicted" (names of labels), "label" (the one that is
        most wrong) and whether it was "missed", its "probability", that of the true label where there is one
        ("true_probability"), "fragments" (probability of `label` in each) and "decisive", the fragment that speaks
        most for the mistake. And the first of them as `wrong_document` takes them.
    """
    found, fragments = run.predictions["test", "document"], run.predictions.get(("test", "fragment"))
    every, shown = list[dict[str, Any]](), list[dict[str, Any]]()
    for row, label in surest_mistakes(found.probabilities, found.truth, decided, run.multi_label):
        doc_id, missed = int(found.doc_ids[row]), bool(found.truth[row, label])
        names = [[run.labels[number] for number in np.flatnonzero(flags[row])] for flags in (found.truth, decided)]
        mistake: dict[str, Any] = {"doc_id": doc_id, "true": names[0], "predicted": names[1]}
        mistake |= {"label": run.labels[label], "missed": missed, "probability": plain(found.probabilities[row, label])}
        of_true = None if run.multi_label else plain(found.probabilities[row, found.truth[row].argmax()])
        mistake |= {"true_probability": of_true, "fragments": [], "decisive": None}
        index = -1
        first, last = (0, 0) if fragments is None else np.searchsorted(fragments.doc_ids, (doc_id, doc_id + 1))
        if fragments is not None and last > first:
            each = fragments.probabilities[first:last, label]
            mistake |= {"fragments": plain(each), "decisive": int(each.argmin() if missed else each.argmax())}
            index = int(fragments.fold_idx[first + mistake["decisive"]])
        every.append(mistake)
        if len(shown) < most_shown:
            place = read_places(run, doc_id)
            shown.append({**mistake, **place, "span": place["spans"].get(index)})
    return every, shown


def wrong_table(numbers: Mapping[str, Any]) -> list[list[Any]]:
    """Rows of a table of all mistakes, for the eyes of those who know the labels.

    Args:
        numbers: of a report. Labels of a document that has several stand with the separator of the run between them.
    """
    names = ["doc_id", "true", "predicted"]
    names += ["label", "missed", "probability"] if numbers["multi_label"] else ["probability", "true_probability"]
    between = numbers["run"]["options"].get("separator") or "|"
    rows = []
    for mistake in numbers["wrong"]:
        labels = {name: between.join(mistake[name]) for name in ("true", "predicted")}
        rows.append([{**mistake, **labels}[name] for name in (*names, "decisive")])
    return [[*names, "decisive"], *rows]


def wrong_document(document: Mapping[str, Any]) -> Markup:
    """A wrongly labelled document with the fragment that decided.

    Args:
        document: a mistake of `find_mistakes`, and "file", "line", "name", "text" and "span" (start and end of the
            decisive fragment in the text, or None).
    """
    several = document["decisive"] is not None and len(document["fragments"]) > 1
    text, (start, end) = document["text"], (several and document["span"]) or (0, 0)
    line = "" if document["line"] is None else f"line {document['line']}"
    where = ", ".join(filter(None, (f"document {document['doc_id']}", document["file"], line, document["name"])))
    strip = "".join(
        f'<i{" class=decisive" if number == document["decisive"] else ""} style="--p:{probability:.3f}" '
        f'title="fragment {number + 1}: {percent(probability)}"></i>'
        for number, probability in enumerate(document["fragments"])
    )
    fragments = ""
    if several:
        place, count = document["decisive"], len(document["fragments"])
        said = f"fragment {place + 1} of {count} decided: {percent(document['fragments'][place])}"
        fragments = f'<p class="dim strip">{strip} {said}</p>'
    first, last = max(0, start - 120), min(len(text), (end or 400) + 120)
    cut = _marked(text, start, min(end, start + 1200), first, min(last, start + 1320))
    whole = ""
    if len(text) > last - first:
        note = f" (its first {_LONGEST_TEXT:,} characters)" if len(text) > _LONGEST_TEXT else ""
        whole = f"<details><summary>whole text{note}</summary>{_marked(text, start, end, 0, _LONGEST_TEXT)}</details>"
    return Markup(
        f'<article><h3>{_headline(document)}</h3><p class="dim">{escape(where)}</p>{fragments}{cut}{whole}</article>'
    )


def _headline(document: Mapping[str, Any]) -> str:
    """What was said of a document, and the truth."""
    true, given = (escape(", ".join(document[name]) or "no label") for name in ("true", "predicted"))
    bad = f'<span class="bad">{escape(document["label"])}</span>'
    sure, good = f"<small>{percent(document['probability'])}</small>", f'<span class="good">{true}</span>'
    if document["true_probability"] is not None:
        return f"{bad} {sure}, in truth {good} <small>{percent(document['true_probability'])}</small>"
    what = "missed" if document["missed"] else "wrongly given"
    return f"{bad} {what} {sure}: given {given}, in truth {good}"


def _marked(text: str, start: int, end: int, first: int, last: int) -> str:
    """Characters `first` to `last` of a text with those from `start` to `end` highlighted."""
    start, end = (min(max(place, first), last) for place in (start, end))
    before, inside, behind = (escape(part) for part in (text[first:start], text[start:end], text[end:last]))
    language = ' lang="ja"' if re.search("[\u3041-\u30ff]", text[first:last]) else ""
    mark = f"<mark>{inside}</mark>" if inside else ""
    dots = ("…" if first else "", "…" if last < len(text) else "")
    return f"<blockquote{language}>{dots[0]}{before}{mark}{behind}{dots[1]}</blockquote>"
