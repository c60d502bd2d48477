"""Judge a finished classifier, or two: tables, charts, one HTML page that needs nothing else, the numbers as JSON.

python scripts/analyze_results.py leanings.sqlite
python scripts/analyze_results.py leanings.sqlite --run 3 --other_run 5
python scripts/analyze_results.py leanings.sqlite other.sqlite --output_dir report

Reads the database that finetune_classifier.py leaves and changes nothing in it. In place of it, the run's
*_train_test_stats.json or *_testset_predictions.csv may be named; that run is taken from the database that wrote it.
Every number is computed again from the predictions, with the interval that 95 % of samples of the test documents fall
into; documents that the split kept together (a group, equal texts) are drawn together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmscripts.errors import UserError, user_errors
from lmscripts.options.checks import check_numbers
from lmscripts.options.parsing import option, parse_options

if TYPE_CHECKING:
    from lmscripts.evaluation.comparison import Predictions, Run


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    input_file: tuple[str, ...] = option(
        (), help="database of a run, or two to compare", required=True, positional=True
    )
    run: int | None = option(None, help="number of the run; default: what the input says, else the newest finished")
    other_run: int | None = option(None, help="run to compare with, in the second database or, without one, the first")
    output_dir: str | None = option(None, help="folder for the report; default: NAME_report beside the database")
    level: Literal["document", "fragment"] = option("document", help="what tables and charts are about")
    resamples: int = option(2000, help="samples of the test documents behind each interval")
    seed: int = option(0, help="of the samples, and of the training documents that baselines see")
    most_wrong: int = option(20, help="wrong documents to show with their text")
    baselines: bool = option(True, help="fit TF-IDF and logistic regression on the same split")
    baseline_documents: int = option(20_000, help="training documents that baselines see at most")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is read."""
        check_numbers(vars(self), positive=("resamples", "baseline_documents"), not_negative=("most_wrong", "seed"))
        if len(self.input_file) > 2:
            raise UserError(f"one database, or two to compare, not {len(self.input_file)}")


def main() -> None:
    """Parse, analyse, write."""
    options = parse_options(Options, description=__doc__ or "")
    with user_errors():
        analyze(options)


def analyze(options: Options) -> None:
    """Read one run or two, compute everything, write the report."""
    import matplotlib

    from lmscripts.evaluation import comparison, mistakes, report
    from lmscripts.evaluation.charts import draw_all

    matplotlib.use("Agg")
    files = [Path(name) for name in options.input_file]
    run, other = comparison.read_results(files[0], options.run), None
    if len(files) > 1 or options.other_run is not None:
        place = files[1] if len(files) > 1 else run.file
        other = comparison.read_results(place, options.other_run, "--other_run")
        if (other.file.resolve(), other.record["run_id"]) == (run.file.resolve(), run.record["run_id"]):
            raise UserError(f"both are run {run.record['run_id']} of {run.file}: choose another with --other_run")
    folder = Path(options.output_dir) if options.output_dir else run.file.with_name(f"{run.file.stem}_report")

    numbers, samples = numbers_of(run, options)
    add_baselines(numbers, samples, run, options)
    if other is not None:
        add_comparison(numbers, run, other, options)
    numbers["wrong"], wrong = mistakes.find_mistakes(run, decide(run, "document", [])[0], options.most_wrong)
    charts, images = draw_all(numbers)
    name = f"run_{run.record['run_id']}" + ("" if other is None else f"_and_{other.record['run_id']}")
    page = report.page(numbers, charts, wrong)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.html", page.encode("utf-8"))
    text = json.dumps(numbers, ensure_ascii=False, indent=1, allow_nan=False)
    write(folder / f"{name}.json", f"{text}\n".encode())
    tables = {"wrong": mistakes.wrong_table(numbers)}
    tables |= {} if run.multi_label else {"confusion": report.confusion_table(numbers)}
    for table, rows in tables.items():
        write(folder / f"{name}_{table}.csv", report.csv_text(rows).encode("utf-8-sig"))
    for chart, image in images.items():
        write(folder / f"{name}_{chart}.png", image)
    print(summary(numbers))
    print(f"report: {folder / f'{name}.html'}")


# ---- numbers -----------------------------------------------------------------------------------------------------


def decide(run: Run, level: str, notices: list[str]) -> tuple[Any, Any]:
    """(N, K) labels given to test documents or fragments, and the thresholds behind them; None for one label each."""
    from lmscripts.evaluation.calibration import choose_thresholds, decisions

    thresholds, validation = None, run.predictions.get(("validation", "document"))
    if run.multi_label:
        tuned_on = None if validation is None else (validation.probabilities, validation.truth)
        thresholds, notice = choose_thresholds(run.record["facts"].get("thresholds"), run.labels, tuned_on)
        if notice and notice not in notices:
            notices.append(notice)
    return decisions(run.predictions["test", level].probabilities, thresholds), thresholds


def numbers_of(run: Run, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything about one run in values for JSON, and the resampled metrics of its documents."""
    import numpy as np

    from lmscripts.evaluation.comparison import units_of
    from lmscripts.evaluation.metrics import by_row, confusion_matrix, measured, plain

    notices: list[str] = []
    if options.level == "fragment" and ("test", "fragment") not in run.predictions:
        raise UserError(f"run {run.record['run_id']} in {run.file} has no predictions of fragments")
    tested = run.predictions["test", "document"].doc_ids
    units = units_of(run, tested)
    levels: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for level in ("document", "fragment"):
        if (found := run.predictions.get(("test", level))) is None:
            continue
        decided, _ = decide(run, level, notices)
        drawn_together = units[np.searchsorted(tested, found.doc_ids)]
        arguments = (found.truth, decided, drawn_together, run.multi_label, options.resamples, options.seed)
        judged, drawn = measured(*arguments)
        levels[level] = {"documents": len(np.unique(found.doc_ids)), **judged}
        samples = samples or drawn
        if not run.multi_label:
            matrix = confusion_matrix(found.truth.argmax(1), decided.argmax(1), len(run.labels))
            levels[level] |= {"confusion": plain(matrix), "confusion_by_row": plain(by_row(matrix))}
    split = {part: {"documents": len(flags), "labels": plain(flags.sum(0))} for part, flags in run.part_truth.items()}
    times = {name: run.record[name] for name in ("started", "ended") if run.record[name] is not None}
    shown = {name: datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds") for name, at in times.items()}
    numbers = {
        "format": 2,
        "database": run.file.name,
        "run": plain({**run.record, **shown}),
        "data": plain(run.meta),
        "labels": list(run.labels),
        "multi_label": run.multi_label,
        "thresholds": plain(decide(run, "document", [])[1]),
        "split": split,
        "epochs": plain(run.epochs),
        "level": options.level,
        "resamples": options.resamples,
        "seed": options.seed,
        "levels": levels,
        "stored_metrics": plain({f"{level} {name}": value for (level, name), value in run.stored_metrics.items()}),
        "baselines": [],
        "comparison": None,
        "notices": notices,
    }
    add_confidence(numbers, run, run.predictions["test", options.level])
    add_notices(numbers, run)
    return numbers, samples


def add_confidence(numbers: dict[str, Any], run: Run, found: Predictions) -> None:
    """Calibration before and after the temperature, and accuracy over coverage."""
    from lmscripts.evaluation import calibration

    labels = found.truth if run.multi_label else found.truth.argmax(1)
    before = None if found.logits is None else calibration.probabilities_of(found.logits, run.multi_label)
    numbers["calibration"] = {
        "temperature": run.record["facts"].get("temperature"),
        "before": None if before is None else calibration.judged(before, labels),
        "after": calibration.judged(found.probabilities, labels),
    }
    numbers["coverage"], numbers["coverage_curve"] = [], None
    if not run.multi_label:
        numbers["coverage"], numbers["coverage_curve"] = calibration.coverage_points(found.probabilities, labels)


def add_notices(numbers: dict[str, Any], run: Run) -> None:
    """What a reader must know before believing a number."""
    notices, tested = numbers["notices"], numbers["levels"]["document"]
    absent = [label for label, found in zip(run.labels, tested["per_label"], strict=True) if not found["support"]]
    if absent:
        more = f" or one of {len(absent) - 5:,} others" if len(absent) > 5 else ""
        notices.append(f"No test document has the label {' or '.join(map(repr, absent[:5]))}{more}.")
    if not run.multi_label and len(run.labels) - len(absent) == 1:
        notices.append("All test documents have one label: only accuracy says something.")
    documents, units = tested["documents"], tested["units"]
    if units == 1:
        what = "There is one test document" if documents == 1 else f"All {documents:,} test documents are of one group"
        notices.append(f"{what}: no interval can be stated.")
    elif units < 100:
        what = f"{units} test documents" if units == documents else f"{units} groups of test documents"
        notices.append(f"There are only {what}: mind the width of the intervals.")
    if 1 < units < 0.9 * documents:
        notices.append(
            f"The {documents:,} test documents are of {units:,} groups (by group, text or name), which are drawn as "
            "wholes for the intervals. McNemar's test takes documents for independent: its p is too small here."
        )
    if lacking := len(set(run.parts["test"].tolist()) - set(run.predictions["test", "document"].doc_ids.tolist())):
        notices.append(f"{lacking:,} of {len(run.parts['test']):,} documents of the test part have no prediction.")
    if len({int(doc) for part in run.parts.values() for doc in part}) < sum(map(len, run.parts.values())):
        notices.append("Some documents are in two parts of the split: the numbers are too good.")
    for (level, name), value in run.stored_metrics.items():
        now = numbers["levels"].get(level, {}).get("metrics", {}).get(name, {}).get("value")
        if now is not None and value is not None and abs(now - value) > 1e-6:
            notices.append(f"The run wrote down {name} {value:.4f} of {level}s; its predictions give {now:.4f}.")


def add_baselines(numbers: dict[str, Any], samples: dict[str, Any], run: Run, options: Options) -> None:
    """Simple classifiers on the same split, judged on the same documents and the same samples of them."""
    from lmscripts.evaluation import baselines, comparison
    from lmscripts.evaluation.metrics import differences, measured

    test, trained = run.predictions["test", "document"], len(run.parts["train"])
    if not trained:
        numbers["notices"].append("The split has no training part: there are no baselines.")
        return
    found = {"most frequent label": baselines.majority_decisions(run.part_truth["train"], len(test.doc_ids))}
    if options.baselines:
        learnt, seen = baselines.baseline_decisions(run, options.baseline_documents, options.seed)
        found |= learnt
        if seen < trained:
            numbers["notices"].append(f"The TF-IDF baselines saw {seen:,} of {trained:,} training documents.")
    own = numbers["levels"]["document"]["metrics"]
    right = (decide(run, "document", [])[0] == test.truth).all(1)
    settings = (comparison.units_of(run, test.doc_ids), run.multi_label, options.resamples, options.seed)
    for name, decided in found.items():
        judged, drawn = measured(test.truth, decided, *settings)
        gaps = differences(own, judged["metrics"], samples, drawn)
        row = {"name": name, "metrics": judged["metrics"], "difference": gaps}
        numbers["baselines"].append(row | {"mcnemar": comparison.mcnemar(right, (decided == test.truth).all(1))})
        gap = next(iter(gaps.values()))["interval"]
        if gap is not None and gap[1] < 0:
            numbers["notices"].append(f"{name} is better than this run.")


def add_comparison(numbers: dict[str, Any], run: Run, other: Run, options: Options) -> None:
    """Another run on the same test documents: paired differences, McNemar's test, options that differ."""
    from lmscripts.evaluation import comparison
    from lmscripts.evaluation.metrics import differences, measured, plain

    places = comparison.places_of_same(run, other)
    columns = [other.labels.index(label) for label in run.labels]
    test, judged = run.predictions["test", "document"], []
    settings = (comparison.units_of(run, test.doc_ids), run.multi_label, options.resamples, options.seed)
    for decided in (
        decide(run, "document", [])[0],
        decide(other, "document", numbers["notices"])[0][places][:, columns],
    ):
        judged.append(((decided == test.truth).all(1), *measured(test.truth, decided, *settings)))
    (right, first, drawn), (other_right, second, other_drawn) = judged
    given = run.record["options"], other.record["options"]
    changed = [[name, *(str(one.get(name, "–")) for one in given)] for name in sorted({*given[0], *given[1]})]
    numbers["comparison"] = {
        "database": other.file.name,
        "run": {name: plain(other.record[name]) for name in ("run_id", "name", "options", "facts")},
        "first": first["metrics"],
        "second": second["metrics"],
        "difference": differences(first["metrics"], second["metrics"], drawn, other_drawn),
        "mcnemar": comparison.mcnemar(right, other_right),
        "options": [row for row in changed if row[1] != row[2]],
    }


# ---- what is written ---------------------------------------------------------------------------------------------


def write(file: Path, content: bytes) -> None:
    """Write aside and rename, so that an earlier report is never half overwritten."""
    aside = file.with_name(f".{file.name}.part")
    aside.write_bytes(content)
    aside.replace(file)


def summary(numbers: dict[str, Any]) -> str:
    """The main numbers for the terminal."""
    from lmscripts.evaluation.report import METRICS, with_interval

    judged = {f"{found['rows']:,} {level}s": found for level, found in numbers["levels"].items()}
    judged |= {baseline["name"]: baseline for baseline in numbers["baselines"]}
    first, *others = numbers["levels"]["document"]["metrics"]
    rows = [["", METRICS[first], *(METRICS[name] for name in others)]]
    for title, found in judged.items():
        alone = ({**found["metrics"][name], "interval": None} for name in others)
        rows.append([title, with_interval(first, found["metrics"][first]), *map(with_interval, others, alone)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    if other := numbers["comparison"]:
        name = next(iter(other["first"]))
        gap = with_interval(name, other["difference"][name], signed=True)
        lines.append(f"{METRICS[name]}, this run less the other: {gap}; McNemar's test p = {other['mcnemar']['p']:.3g}")
    return "\n".join([*lines, *(f"note: {notice}" for notice in numbers["notices"])])


if __name__ == "__main__":
    main()
