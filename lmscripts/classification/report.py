"""The report of a run as one HTML page that needs nothing else, and cells of CSV that stay text.

Every text that comes from data (labels, names, documents, options) passes `escape`; `Markup` marks what is HTML
already. The page holds no script and forbids itself the network, so it can be passed on.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lmscripts.classification.charts import STYLE

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
_MOST_LABELS_IN_MATRIX = 40
_LONGEST_TEXT = 20_000
_LONGEST_VALUE = 300
_FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Markup(str):
    """Text that is HTML already."""


def safe_cell(value: Any) -> Any:
    """A value for a cell of a CSV file that no spreadsheet takes for a formula.

    Numbers stay numbers, also when they are written as text ("-1.5"). Other text that begins with = + - @, their wide
    forms, or a tab or line end gets an apostrophe in front, which spreadsheets show as text.
    """
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def escape(value: Any) -> Markup:
    """HTML of any value; control characters, which HTML has no place for, become a visible sign."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(value))
    return Markup(html.escape(text, quote=True))


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent; a dash where it has no meaning."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], text_columns: int = 1, caption: str = "") -> Markup:
    """A table whose first columns are text and whose others are numbers."""

    def line(cells: Sequence[Any], kind: str) -> str:
        marks = ["" if number < text_columns else ' class="n"' for number in range(len(cells))]
        return "<tr>" + "".join(f"<{kind}{m}>{escape(c)}</{kind}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line(row, "td") for row in rows)
    return Markup(
        f'<div class="wide"><table>{title}<thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'
    )


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
        ("confusions", "Confusions", _confusions(numbers)),
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


def wrong_document(document: Numbers) -> Markup:
    """A wrongly labelled document with the fragment that decided.

    Args:
        document: "doc_id", "line", "name", "true", "predicted" (names), "confidence", "true_probability", "text",
            "span" (start and end of the decisive fragment in the text, or None), "fragments" (probability of the
            predicted label in each) and "decisive" (its number, or None).
    """
    several = document["decisive"] is not None and len(document["fragments"]) > 1
    text, (start, end) = document["text"], (several and document["span"]) or (0, 0)
    line = "" if document["line"] is None else f"line {document['line']}"
    where = ", ".join(filter(None, (f"document {document['doc_id']}", line, document["name"])))
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
    sure, other = percent(document["confidence"]), percent(document["true_probability"])
    return Markup(
        f'<article><h3><span class="bad">{escape(document["predicted"])}</span> <small>{sure}</small>, '
        f'in truth <span class="good">{escape(document["true"])}</span> <small>{other}</small></h3>'
        f'<p class="dim">{escape(where)}</p>{fragments}{cut}{whole}</article>'
    )


def _marked(text: str, start: int, end: int, first: int, last: int) -> str:
    """Characters `first` to `last` of a text with those from `start` to `end` highlighted."""
    start, end = (min(max(place, first), last) for place in (start, end))
    before, inside, behind = (escape(part) for part in (text[first:start], text[start:end], text[end:last]))
    language = ' lang="ja"' if re.search("[\u3041-\u30ff]", text[first:last]) else ""
    mark = f"<mark>{inside}</mark>" if inside else ""
    dots = ("…" if first else "", "…" if last < len(text) else "")
    return f"<blockquote{language}>{dots[0]}{before}{mark}{behind}{dots[1]}</blockquote>"


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
    sentence = f"{level['documents']:,} test documents, {len(numbers['labels'])} labels."
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
    facts = f"<details open><summary>Facts</summary>{_facts(_flat(run['facts']))}</details>"
    return _facts(rows) + facts + f"<details><summary>Options</summary>{_facts(_flat(run['options']))}</details>"


def _data(numbers: Numbers) -> str:
    parts = {name: part for name, part in numbers["split"].items() if part["documents"]}
    head = ["label", *(f"{name} {what}" for name in parts for what in ("", "share"))]
    rows = [["all documents", *(c for part in parts.values() for c in (f"{part['documents']:,}", ""))]]
    for number, label in enumerate(numbers["labels"]):
        counts = [(part["labels"][number], part["documents"]) for part in parts.values()]
        rows.append([label, *(c for count, total in counts for c in (f"{count:,}", percent(count / total)))])
    settings = [(f"split: {name}", value) for name, value in _flat(numbers["run"]["split"])]
    facts = [(name, value) for name, value in _flat(numbers["data"]) if not name.startswith("rows_of_labels")]
    return table(head, rows) + _facts([*facts, *settings])


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


def _confusions(numbers: Numbers) -> str:
    level, names = numbers["levels"][numbers["level"]], numbers["labels"]
    if numbers["multi_label"]:
        return ""
    parts = []
    if len(names) <= _MOST_LABELS_IN_MATRIX:
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
    text = f"""Intervals hold the middle 95 % of {numbers["resamples"]:,} samples of the test documents, drawn with \
replacement (seed {numbers["seed"]}); the fragments of a document are drawn together. An interval without width says \
only that no sample differed, not that the number is certain.
Differences are taken on the same samples for both sides; p is McNemar's exact test, two-sided.
A dash stands where a number has no meaning: the precision of a label that was never given, the recall of one that no \
test document has. Such labels do not count in the means.
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
