"""The report of a run as one HTML page that needs nothing else, its tables, and CSV.

The page is `report.html`, filled by jinja2, which escapes every text that comes from data (labels, names, documents,
options). It holds no script and forbids itself the network, so it can be passed on.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from lmscripts.evaluation.charts import MOST_LABELS_IN_MATRIX
from lmscripts.evaluation.comparison import Run
from lmscripts.evaluation.metrics import Flags, plain, surest_mistakes

Numbers = Mapping[str, Any]

METRICS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "mcc": "Matthews correlation",
    "subset_accuracy": "Subset accuracy",
    "micro_f1": "Micro F1",
}
_LOSSES = ("loss", "unweighted_loss", "document_loss")
_LONGEST_VALUE = 300
_LONGEST_TEXT = 20_000
_FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


# ---- tables ------------------------------------------------------------------------------------------------------


def csv_text(rows: Sequence[Sequence[Any]], spreadsheet_safe: bool = False, *, begins_file: bool = True) -> str:
    """Rows as CSV, exactly as they are: what a program reads from it is what was written.

    Safe for a spreadsheet is an apostrophe before text that would be a formula there (numbers in text, such as "-1.5",
    stay), and a byte order mark where these rows begin the file.
    """
    lines = ["\ufeff"] if spreadsheet_safe and begins_file else []
    for row in rows:
        text = io.StringIO()  # of its own for each row: "\r" is put into quotes only if it ends the lines
        cells = [f"'{cell}" if spreadsheet_safe and _is_formula(cell) else cell for cell in row]
        csv.writer(text, lineterminator="\r\n").writerow(cells)
        lines.append(f"{text.getvalue()[:-2]}\n")
    return "".join(lines)


def _is_formula(cell: Any) -> bool:
    return isinstance(cell, str) and bool(_FORMULA.match(cell)) and not _NUMBER.fullmatch(cell)


def _cells(numbers: Numbers) -> list[tuple[int, int, int, float]]:
    """(count, true label, predicted label, share of the true label) of every pair of labels that occurs."""
    level = numbers["levels"][numbers["level"]]
    lines = enumerate(zip(level.get("confusion", ()), level.get("confusion_by_row", ()), strict=True))
    return [(n, true, given, shares[given]) for true, (ns, shares) in lines for given, n in enumerate(ns) if n]


def confusion_table(numbers: Numbers) -> list[list[Any]]:
    """Every pair of true and predicted label that occurs, however many labels there are."""
    names, head = numbers["labels"], ["true", "predicted", f"{numbers['level']}s", "share of the true label"]
    return [head, *([names[true], names[given], n, f"{share:.6f}"] for n, true, given, share in _cells(numbers))]


def wrong_table(numbers: Numbers) -> list[list[Any]]:
    """Rows of all mistakes; labels of a document that has several stand with the separator of the run between them."""
    names = ["doc_id", "true", "predicted"]
    names += ["label", "missed", "probability"] if numbers["multi_label"] else ["probability", "true_probability"]
    names, between = [*names, "decisive"], numbers["run"]["options"].get("separator") or "|"
    joined = ({**found, **{name: between.join(found[name]) for name in names[1:3]}} for found in numbers["wrong"])
    return [names, *([found[name] for name in names] for found in joined)]


def find_mistakes(run: Run, decided: Flags, most_shown: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Test documents whose labels are wrong by those that (N, K) they were given, the surest mistake first.

    Returns:
        All of them in values for JSON: "doc_id", "true" and "predicted" (names of labels), "label" (the one that is
        most wrong) and whether it was "missed", its "probability", that of the true label where there is one
        ("true_probability"), "fragments" (probability of `label` in each) and "decisive", the fragment that speaks
        most for the mistake. And some for the page, the first of every confusion before the second of any ("rank"),
        with what `Database.read_document` says and the "span" of the decisive fragment.
    """
    found, fragments = run.predictions["test", "document"], run.predictions.get(("test", "fragment"))
    every, folds = list[dict[str, Any]](), list[int]()
    seen, ranks = Counter[Any](), list[int]()
    for row, label in surest_mistakes(found.probabilities, found.truth, decided, run.multi_label):
        doc_id, missed = int(found.doc_ids[row]), bool(found.truth[row, label])
        true, given = ([run.labels[place] for place in np.flatnonzero(flags[row])] for flags in (found.truth, decided))
        of_true = None if run.multi_label else plain(found.probabilities[row, found.truth[row].argmax()])
        mistake: dict[str, Any] = {"doc_id": doc_id, "true": true, "predicted": given}
        mistake |= {"label": run.labels[label], "missed": missed}
        mistake |= {"probability": plain(found.probabilities[row, label]), "true_probability": of_true}
        mistake |= {"fragments": [], "decisive": None}
        first, last = (0, 0) if fragments is None else np.searchsorted(fragments.doc_ids, (doc_id, doc_id + 1))
        if fragments is not None and last > first:
            each = fragments.probabilities[first:last, label]
            mistake |= {"fragments": plain(each), "decisive": int(each.argmin() if missed else each.argmax())}
        decisive = mistake["decisive"]
        folds.append(-1 if fragments is None or decisive is None else int(fragments.fold_idx[first + decisive]))
        every.append(mistake)
        kind = label, missed if run.multi_label else tuple(true)
        ranks.append(seen[kind])
        seen[kind] += 1
    shown = []
    for number in sorted(range(len(every)), key=ranks.__getitem__)[:most_shown]:
        place = run.database.read_document(every[number]["doc_id"])
        shown.append({**every[number], **place, "span": place["spans"].get(folds[number]), "rank": ranks[number]})
    return every, shown


# ---- HTML --------------------------------------------------------------------------------------------------------


def page(numbers: Numbers, charts: Mapping[str, str], wrong: Sequence[Numbers]) -> str:
    """The whole page, from what `scripts/analyze_results.py` writes as JSON, SVGs by name, and mistakes to be shown."""
    wrongly = sorted((cell for cell in _cells(numbers) if cell[1] != cell[2]), key=lambda cell: (-cell[0], cell))
    known = {("loss" not in record["metric"], record["metric"], record["part"]) for record in numbers["epochs"]}
    columns = [(part, metric) for _, metric, part in sorted(known)]
    here = {
        **numbers,
        "further": _further(numbers),
        "charts": charts,
        "wrong": wrong,
        "confusions": wrongly[:10],
        "columns": columns,
    }
    return environment().get_template("report.html").render(here)


def environment() -> jinja2.Environment:
    """The templates beside this file, and what they call."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=visible,
    )
    found.globals |= {"most_labels": MOST_LABELS_IN_MATRIX, "longest": _LONGEST_TEXT, "zip": zip}
    found.globals |= {"shown": _shown, "between": _between, "excerpts": _excerpts, "percent": percent}
    found.filters |= {"flat": _flat, "metric": METRICS.__getitem__}
    found.tests["holding"] = lambda text, pattern: re.search(pattern, text) is not None
    return found


def visible(value: Any) -> Any:
    """Text in which control characters, which HTML has no place for, are a visible sign."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", value)


def _further(numbers: Numbers) -> dict[str, str]:
    """Metrics of the test documents that the run was asked for beside those that are always there, in words."""
    stored = {tuple(name.split(" ", 1)): value for name, value in numbers["stored_metrics"].items()}
    found = {n: v for (level, n), v in stored.items() if level == "document" and n not in (*METRICS, *_LOSSES)}
    return {name: "undefined" if value is None else f"{value:.4f}" for name, value in found.items()}


def percent(value: float | None) -> str:
    """A share in per cent; a dash where it has no meaning."""
    return "–" if value is None else f"{100 * value:.1f} %"


def summary(numbers: Numbers) -> str:
    """The main numbers for the terminal."""
    judged = {f"{found['rows']:,} {level}s": found for level, found in numbers["levels"].items()}
    judged |= {baseline["name"]: baseline for baseline in numbers["baselines"]}
    first, *others = numbers["levels"]["document"]["metrics"]
    rows = [["", METRICS[first], *(METRICS[name] for name in others)]]
    for title, found in judged.items():
        alone = (_shown(name, found["metrics"][name]["value"]) for name in others)
        rows.append([title, _with_interval(first, found["metrics"][first]), *alone])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    if further := _further(numbers):
        lines.append(f"test documents: {', '.join(map(' '.join, further.items()))}")
    if other := numbers["comparison"]:
        gap, p = _with_interval(first, other["difference"][first], signed=True), other["mcnemar"]["p"]
        lines.append(f"{METRICS[first]}, this run less the other: {gap}; McNemar's test p = {p:.3g}")
    return "\n".join([*lines, *(f"note: {notice}" for notice in numbers["notices"])])


def _with_interval(name: str, found: Numbers, signed: bool = False) -> str:
    between = _between(name, found, signed)
    return _shown(name, found["value"], signed) + (f" ({between})" if between else "")


def _shown(name: str, value: float | None, signed: bool = False) -> str:
    if value is None or (name != "mcc" and not signed):
        return percent(value)
    return f"{value:{'+' if signed else ''}.3f}" if name == "mcc" else f"{100 * value:+.1f}"


def _between(name: str, found: Numbers, signed: bool = False) -> str:
    factor, digits = (1.0, 3) if name == "mcc" else (100.0, 1)
    return " to ".join(f"{factor * bound:{'+' if signed else ''}.{digits}f}" for bound in found["interval"] or ())


def _excerpts(document: Numbers) -> list[tuple[str, str, str]]:
    """A document in short and, if that is not all, in long: before, in and behind the fragment that decided."""
    text = document["text"]
    start, end = (len(document["fragments"]) > 1 and document["span"]) or (0, 0)

    def cut(end: int, first: int, last: int) -> tuple[str, str, str]:
        low, high = (min(max(place, first), last) for place in (start, end))
        dots = ("…" if first else "", "…" if last < len(text) else "")
        return dots[0] + text[first:low], text[low:high], text[high:last] + dots[1]

    first, last = max(0, start - 120), min(len(text), (end or 400) + 120)
    short = cut(min(end, start + 1200), first, min(last, start + 1320))
    return [short, cut(end, 0, _LONGEST_TEXT)] if len(text) > last - first else [short]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values, also of what is nested, without those that say nothing."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif value not in ("", [], None):
            rows.append((prefix + name, textwrap.shorten(str(value), _LONGEST_VALUE, placeholder="…")))
    return rows
