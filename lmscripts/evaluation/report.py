"""The report of a run as one HTML page that needs nothing else, and cells of CSV that stay text.

Every text that comes from data (labels, names, documents, options) passes `escape`; `Markup` marks what is HTML
already. The page holds no script and forbids itself the network, so it can be passed on.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lmscripts.evaluation.charts import MOST_LABELS_IN_MATRIX, STYLE
from lmscripts.evaluation.markup import Markup, escape, percent, table
from lmscripts.evaluation.mistakes import wrong_document

Numbers = Mapping[str, Any]
Section = tuple[str, str, str]  # id, title, HTML

METRICS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "mcc": "Matthews correlation",
    "subset_accuracy": "Subset accuracy",
    "micro_f1": "Micro F1",
}
_LONGEST_VALUE = 300
_FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def safe_cell(value: Any) -> Any:
    """A value for a cell of a CSV file that no spreadsheet takes for a formula.

    Numbers stay numbers, also when they are written as text ("-1.5"). Other text that begins with = + - @, their wide
    forms, or a tab or line end gets an apostrophe in front, which spreadsheets show as text.
    """
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def confusion_table(numbers: Numbers) -> list[list[Any]]:
    """Every pair of true and predicted label that occurs, however many labels there are."""
    level, names = numbers["levels"][numbers["level"]], numbers["labels"]
    rows: list[list[Any]] = [["true", "predicted", f"{numbers['level']}s", "share of the true label"]]
    for line, (counts, shares) in enumerate(zip(level["confusion"], level["confusion_by_row"], strict=True)):
        rows += [[names[line], names[column], n, f"{shares[column]:.6f}"] for column, n in enumerate(counts) if n]
    return rows


def csv_text(rows: list[list[Any]]) -> str:
    """Rows as CSV in which no cell is a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([safe_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def page(numbers: Numbers, charts: Mapping[str, str], wrong: Sequence[Numbers]) -> str:
    """The whole page.

    Args:
        numbers: what `scripts/analyze_results.py` writes as JSON.
        charts: name -> SVG.
        wrong: wrong documents as `wrong_document` takes them.
    """
    sections = [
        ("summary", "Summary", _summary(numbers)),
        ("model", "What was trained", _model(numbers)),
        ("data", "Data and split", _data(numbers)),
        ("training", "Training", _training(numbers, charts)),
        ("results", "Documents and fragments", _levels(numbers)),
        ("labels", "Each label", _labels(numbers)),
        ("confusions", "Confusions", _confusions(numbers, charts)),
        ("calibration", "Calibration", _calibration(numbers, charts)),
        ("coverage", "Leaving out the unsure", _coverage(numbers, charts)),
        ("baselines", "Baselines", _baselines(numbers)),
        ("comparison", "The other run", _comparison(numbers)),
        ("wrong", "Most wrong documents", "".join(map(wrong_document, wrong))),
        ("notes", "How to read this", _notes(numbers)),
    ]
    sections = [section for section in sections if section[2]]
    title, ended = escape(_title(numbers["run"])), escape(numbers["run"]["ended"])
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{text}</section>' for name, heading, text in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1><p class="dim">{escape(numbers["database"])}, {ended}</p></header>
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main>{body}</main>
</body>
</html>
"""


# ---- sections ----------------------------------------------------------------------------------------------------


def _title(run: Numbers) -> str:
    return f"Run {run['run_id']}" + (f": {run['name']}" if run["name"] else "")


def _summary(numbers: Numbers) -> str:
    level = numbers["levels"][numbers["level"]]
    tiles = "".join(
        f'<div class="tile"><span>{METRICS[name]}</span><b>{_shown(name, found["value"])}</b>'
        f"{_range(found)}<small>{_between(name, found)}</small></div>"
        for name, found in level["metrics"].items()
    )
    main = next(iter(level["metrics"]))
    groups = "" if level["units"] == level["documents"] else f" in {level['units']:,} groups"
    sentence = f"{level['documents']:,} test documents{groups}, {len(numbers['labels'])} labels."
    sentence = sentence if numbers["level"] == "document" else f"{level['rows']:,} fragments of {sentence}"
    for baseline in numbers["baselines"]:
        gap = with_interval(main, baseline["difference"][main], signed=True)
        right = percent(baseline["metrics"][main]["value"])
        sentence += f" Baseline, {baseline['name']}: {right}; this run {gap} points."
    notices = "".join(f"<li>{escape(notice)}</li>" for notice in numbers["notices"])
    notices = f'<ul class="notices">{notices}</ul>' if notices else ""
    return f'<div class="tiles">{tiles}</div><p>{escape(sentence)}</p>{notices}'


def _model(numbers: Numbers) -> str:
    run = numbers["run"]
    names = ("status", "model_dir", "started", "ended", "tokenizer", "tokenizer_fingerprint")
    rows = [(name.replace("_", " "), run[name]) for name in names if run[name] is not None]
    rows += [(f"folding: {name}", value) for name, value in _flat(run["folding"])]
    chosen = ("best_epoch", "metric", "steps", "parameters", "processes")
    rows += [(name.replace("_", " "), run["facts"][name]) for name in chosen if name in run["facts"]]
    facts = f"<details><summary>Facts</summary>{_facts(_flat(run['facts']))}</details>"
    return _facts(rows) + facts + f"<details><summary>Options</summary>{_facts(_flat(run['options']))}</details>"


def _data(numbers: Numbers) -> str:
    parts = {name: part for name, part in numbers["split"].items() if part["documents"]}
    head = ["label", *(f"{name} {what}" for name in parts for what in ("", "share"))]
    rows = [["all documents", *(c for part in parts.values() for c in (f"{part['documents']:,}", ""))]]
    for number, label in enumerate(numbers["labels"]):
        counts = [(part["labels"][number], part["documents"]) for part in parts.values()]
        rows.append([label, *(c for count, total in counts for c in (f"{count:,}", percent(count / total)))])
    settings = [(f"split: {name}", value) for name, value in _flat(numbers["run"]["split"])]
    hidden = ("rows_of_labels", "sources")  # the first is the table above; the second repeats the hashes
    facts = [(name, value) for name, value in _flat(numbers["data"]) if not name.startswith(hidden)]
    counts = [(name, value) for name, value in facts if name.startswith("num_")]
    whole = f"<details><summary>How it was read and split</summary>{_facts([*facts, *settings])}</details>"
    return table(head, rows) + _facts(counts) + whole


def _training(numbers: Numbers, charts: Mapping[str, str]) -> str:
    records = numbers["epochs"]
    if not records:
        return ""
    columns = sorted({(r["metric"], r["part"]) for r in records}, key=lambda c: ("loss" not in c[0], *c))
    found = {(r["epoch"], r["metric"], r["part"]): f"{r['value']:.4f}" for r in records if r["value"] is not None}
    head = ["epoch", *(f"{part} {metric.replace('_', ' ')}" for metric, part in columns)]
    rows = [
        [epoch, *(found.get((epoch, metric, part), "–") for metric, part in columns)]
        for epoch in sorted({r["epoch"] for r in records})
    ]
    return _figure(charts, "training") + table(head, rows)


def _levels(numbers: Numbers) -> str:
    levels = numbers["levels"]
    head = ["", *(f"{level}s" for level in levels)]
    rows = [["test rows", *(f"{found['rows']:,}" for found in levels.values())]]
    for name in next(iter(levels.values()))["metrics"]:
        rows.append([METRICS[name], *(with_interval(name, found["metrics"][name]) for found in levels.values())])
    return table(head, rows)


def _labels(numbers: Numbers) -> str:
    level = numbers["levels"][numbers["level"]]
    rows, counts = [], []
    for number, (label, found) in enumerate(zip(numbers["labels"], level["per_label"], strict=True)):
        support, predicted, hits = (found[name] for name in ("support", "predicted", "hits"))
        row = [label, *(with_interval(name, found[name]) for name in ("precision", "recall", "f1"))]
        rows.append([*row, _range(found["f1"]), f"{support:,}", f"{predicted:,}"])
        four = (hits, predicted - hits, support - hits, level["rows"] - support - predicted + hits)
        limit = f"{numbers['thresholds'][number]:.3f}" if numbers["multi_label"] else ""
        counts.append([label, *(f"{count:,}" for count in four), limit])
    text = table(["label", "precision", "recall", "F1", "", "support", "predicted"], rows)
    if numbers["multi_label"]:
        head = ["label", "rightly given", "wrongly given", "missed", "rightly not given", "threshold"]
        text = Markup(text + table(head, counts, 1, f"{numbers['level']}s"))
    return text


def _confusions(numbers: Numbers, charts: Mapping[str, str]) -> str:
    level, names = numbers["levels"][numbers["level"]], numbers["labels"]
    if numbers["multi_label"]:
        return ""
    parts = []
    if len(names) > MOST_LABELS_IN_MATRIX:
        said = f"{len(names):,} labels are too many for a table of numbers: the picture shows the share of each true "
        said += "label, and the file that ends in _confusion.csv has every cell that is not empty."
        parts.append(f"<p>{said}</p>{_figure(charts, 'confusion')}")
    else:
        for values, caption in (
            (level["confusion"], f"{numbers['level']}s"),
            (level["confusion_by_row"], "share of the true label"),
        ):
            rows = []
            for line, name in enumerate(names):
                cells = []
                for column, value in enumerate(values[line]):
                    share, kind = level["confusion_by_row"][line][column] or 0.0, "hit" if line == column else "miss"
                    text = f"{value:,}" if isinstance(value, int) else percent(value)
                    cells.append(Markup(f'<span class="{kind}" style="--p:{share:.4f}">{text}</span>'))
                rows.append([name, *cells])
            matrix = table(["true \\ predicted", *names], rows, 1, caption)
            parts.append(matrix.replace("<table>", '<table class="matrix">', 1))
    pairs = [(n, t, p) for t, row in enumerate(level["confusion"]) for p, n in enumerate(row) if n and t != p]
    shares = level["confusion_by_row"]
    most = [(names[t], names[p], n, percent(shares[t][p])) for n, t, p in sorted(pairs, key=lambda x: (-x[0], x))[:10]]
    head = ["true", "predicted", f"{numbers['level']}s", "of the true label"]
    return "".join(parts) + (table(head, most, 2, "most frequent confusions") if len(names) > 2 and most else "")


def _calibration(numbers: Numbers, charts: Mapping[str, str]) -> str:
    found = numbers["calibration"]
    rows = [
        [title, f"{found[key]['ece']:.4f}", f"{found[key]['nll']:.4f}"]
        for key, title in (("before", "before the temperature"), ("after", "as stored"))
        if found[key] is not None
    ]
    known = isinstance(found["temperature"], (int, float))
    said = f"{found['temperature']:.3f}" if known else "not recorded by the run"
    text = f"Temperature: {said}. A calibrated model is right in 80 % of what it is 80 % sure of."
    head = ["", "ECE, 15 bins", "negative log-likelihood (nats)"]
    return f"<p>{text}</p>" + _figure(charts, "calibration") + table(head, rows)


def _coverage(numbers: Numbers, charts: Mapping[str, str]) -> str:
    head = ["decided", f"{numbers['level']}s", "least confidence", "right among them"]
    rows = [
        [percent(point["coverage"]), f"{point['rows']:,}", f"{point['confidence']:.3f}", percent(point["accuracy"])]
        for point in numbers["coverage"]
    ]
    return (_figure(charts, "coverage") + table(head, rows)) if rows else ""


def _baselines(numbers: Numbers) -> str:
    if not numbers["baselines"]:
        return ""
    level = numbers["levels"]["document"]
    names = list(level["metrics"])
    rows: list[list[Any]] = [["this run", *(with_interval(name, level["metrics"][name]) for name in names)]]
    differences = []
    for baseline in numbers["baselines"]:
        rows.append([baseline["name"], *(with_interval(name, baseline["metrics"][name]) for name in names)])
        gaps = [with_interval(name, baseline["difference"][name], signed=True) for name in names]
        differences.append([f"against {baseline['name']}", *gaps, f"{baseline['mcnemar']['p']:.2g}"])
    head = ["", *(METRICS[name] for name in names)]
    title = "this run less the baseline, in points, on the same documents; p of McNemar's test"
    return table(head, rows) + table([*head, "p"], differences, 1, title)


def _comparison(numbers: Numbers) -> str:
    found = numbers["comparison"]
    if not found:
        return ""
    other, test = found["run"], found["mcnemar"]
    head = ["", _title(numbers["run"]), f"{_title(other)} ({found['database']})", "difference"]
    rows = []
    for name in found["first"]:
        both = (with_interval(name, found[key][name]) for key in ("first", "second"))
        rows.append([METRICS[name], *both, with_interval(name, found["difference"][name], signed=True)])
    text = f"Right in both: {test['both']:,}; only in the first: {test['only_first']:,}; only in the second: "
    text += f"{test['only_second']:,}; in neither: {test['neither']:,}. McNemar's exact test: p = {test['p']:.3g}."
    changed = table(["option", "first", "second"], found["options"], 3) if found["options"] else ""
    return table(head, rows) + f"<p>{text}</p>" + (changed and f"<h3>Options that differ</h3>{changed}")


def _notes(numbers: Numbers) -> str:
    level = numbers["levels"]["document"]
    grouped = level["units"] < level["documents"]
    apart = (
        f""", so that p is too small where they are alike, as in the \
{level["units"]:,} groups here: go by the intervals"""
        if grouped
        else ""
    )
    text = f"""Intervals hold the middle 95 % of {numbers["resamples"]:,} samples of the test documents, drawn with \
replacement (seed {numbers["seed"]}). Documents of one group, text or name are drawn together, as the split keeps them \
together, and so are the fragments of a document. An interval without width says only that no sample differed, not \
that the number is certain.
Differences are taken on the same samples for both sides; p is McNemar's exact test, two-sided, which takes documents \
for independent{apart}.
A dash stands where a number has no meaning: the precision of a label that was never given, the recall of one that no \
test document has, balanced accuracy and Matthews correlation where all test documents have one label. Such labels do \
not count in the means.
Matthews correlation is 0 for guessing and 1 for no mistake; balanced accuracy is the mean recall.
Baselines were fitted on the training part of this split and judged on the same test documents; those on TF-IDF are \
logistic regressions (C = 10) on n-grams of 2 to 4 characters, or 1 to 2 words."""
    return "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in text.split("\n")) + "</ul>"


# ---- pieces ------------------------------------------------------------------------------------------------------


def _shown(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if name == "mcc" else percent(value)


def _between(name: str, found: Numbers, signed: bool = False) -> str:
    if found["interval"] is None:
        return ""
    factor, digits = (1.0, 3) if name == "mcc" else (100.0, 1)
    return " to ".join(f"{factor * bound:{'+' if signed else ''}.{digits}f}" for bound in found["interval"])


def with_interval(name: str, found: Numbers, signed: bool = False) -> str:
    """A number with its interval; per cent, or for differences points."""
    text = _shown(name, found["value"])
    if signed and found["value"] is not None:
        text = f"{found['value']:+.3f}" if name == "mcc" else f"{100 * found['value']:+.1f}"
    between = _between(name, found, signed)
    return f"{text} ({between})" if between else text


def _range(found: Numbers) -> Markup:
    """A number and its interval as a small picture from 0 to 1."""
    if found["value"] is None:
        return Markup("")
    low, high = (min(1.0, max(0.0, bound)) for bound in found["interval"] or (found["value"],) * 2)
    at = min(1.0, max(0.0, found["value"]))
    return Markup(f'<span class="range" style="--low:{low:.4f};--high:{high:.4f};--at:{at:.4f}"></span>')


def _figure(charts: Mapping[str, str], name: str) -> str:
    return f"<figure>{charts[name]}</figure>" if name in charts else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def _facts(rows: Sequence[tuple[str, Any]]) -> str:
    if not rows:
        return ""
    given = [(name, str(value)) for name, value in rows if value not in ("", [], None)]
    rows = [(name, textwrap.shorten(value, _LONGEST_VALUE, placeholder="…")) for name, value in given]
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows) + "</dl>"
