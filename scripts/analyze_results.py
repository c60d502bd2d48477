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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmscripts.errors import UserError, user_errors
from lmscripts.files import write_bytes
from lmscripts.options import check_numbers, option, parse_options

if TYPE_CHECKING:
    from lmscripts.evaluation.comparison import Run

    Versus = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    input_file: tuple[str, ...] = option(
        (), help="database of a run, or two to compare", required=True, positional=True
    )
    run: int | None = option(None, help="number of the run; default: what the input says, else the newest finished")
    other_run: int | None = option(None, help="run to compare with, in the second database or, without one, the first")
    output_dir: str | None = option(
        None, help="folder for the report; default: NAME_report beside the database", writes="folder"
    )
    level: Literal["document", "fragment"] = option("document", help="what tables and charts are about")
    resamples: int = option(2000, help="samples of the test documents behind each interval", most=10**6)
    seed: int = option(0, help="of the samples, and of the training documents that baselines see", most=2**63 - 1)
    most_wrong: int = option(20, help="wrong documents to show with their text")
    spreadsheet_safe: bool = option(False, help="tables for a spreadsheet: no cell is a formula, with a BOM")
    baselines: bool = option(True, help="fit TF-IDF and logistic regression on the same split")
    baseline_documents: int = option(20_000, help="training documents that baselines see at most")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is read."""
        check_numbers(vars(self), positive=("resamples", "baseline_documents"), not_negative=("most_wrong", "seed"))
        if len(self.input_file) > 2:
            raise UserError(f"one database, or two to compare, not {len(self.input_file)}")


def main() -> None:
    """Parse, analyse, write."""
    drawn = "the report has all charts, and so have the PNG files beside it"
    options = parse_options(Options, description=__doc__ or "", accepted_unused={"charts": drawn, "c": drawn})
    with user_errors(only_words=True):
        analyze(options)


def analyze(options: Options) -> None:
    """Read one run or two, compute everything, write the report."""
    from lmscripts.evaluation import comparison, report
    from lmscripts.evaluation.charts import draw_all

    files = [Path(name) for name in options.input_file]
    run, other = comparison.read_results(files[0], options.run), None
    file = run.database.path
    if len(files) > 1 or options.other_run is not None:
        place = files[1] if len(files) > 1 else file
        other = comparison.read_results(place, options.other_run, "--other_run")
        same_file = other.database.path.resolve() == file.resolve()
        if same_file and other.record["run_id"] == run.record["run_id"]:
            raise UserError(f"both are run {run.record['run_id']} of {file}: choose another with --other_run")
    folder = Path(options.output_dir) if options.output_dir else file.with_name(f"{file.stem}_report")

    notices: list[str] = []
    decided, thresholds = decide(run, notices)
    if options.level not in decided:
        raise UserError(f"{run} has no predictions of fragments")
    numbers, versus = numbers_of(run, decided, options)
    numbers |= {"thresholds": thresholds, "notices": notices}
    add_confidence(numbers, run)
    add_notices(numbers, run, decided)
    add_baselines(numbers, versus, run, options)
    if other is not None:
        add_comparison(numbers, versus, run, other)
    numbers["wrong"], wrong = report.find_mistakes(run, decided["document"], options.most_wrong)
    charts, images = draw_all(numbers)
    name = f"run_{run.record['run_id']}" + ("" if other is None else f"_and_{other.record['run_id']}")
    page = report.page(numbers, charts, wrong)
    tables = {"wrong": report.wrong_table(numbers)}
    tables |= {} if run.multi_label else {"confusion": report.confusion_table(numbers)}
    text = json.dumps(numbers, ensure_ascii=False, indent=1, allow_nan=False)
    contents = {".html": page.encode(), ".json": f"{text}\n".encode()}
    contents |= {
        f"_{table}.csv": report.csv_text(rows, options.spreadsheet_safe).encode() for table, rows in tables.items()
    }
    contents |= {f"_{chart}.png": image for chart, image in images.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for ending, content in contents.items():  # written aside: an earlier report is never half overwritten
        write_bytes(folder / f"{name}{ending}", content)
    print(report.summary(numbers), f"report: {folder / f'{name}.html'}", sep="\n")


# ---- numbers -----------------------------------------------------------------------------------------------------


def decide(run: Run, notices: list[str]) -> tuple[dict[str, Any], list[float] | None]:
    """Labels given to test documents and fragments, {level: (N, K)}, and the thresholds where there are any."""
    from lmscripts.evaluation.calibration import choose_thresholds, decisions

    thresholds, validation = None, run.predictions.get(("validation", "document"))
    if run.multi_label:
        tuned_on = None if validation is None else (validation.probabilities, validation.truth)
        thresholds, notice = choose_thresholds(run.record["facts"].get("thresholds"), run.labels, tuned_on)
        notices += [notice] if notice and notice not in notices else []
    tested = {level: found.probabilities for (part, level), found in run.predictions.items() if part == "test"}
    decided = {level: decisions(probabilities, thresholds) for level, probabilities in tested.items()}
    return decided, None if thresholds is None else thresholds.tolist()


def numbers_of(run: Run, decided: dict[str, Any], options: Options) -> tuple[dict[str, Any], Versus]:
    """Everything about one run in values for JSON, and what compares another's decisions with its own."""
    import numpy as np

    from lmscripts.evaluation.comparison import mcnemar, units_of
    from lmscripts.evaluation.metrics import by_row, confusion_matrix, differences, measured, plain

    test = run.predictions["test", "document"]
    units, levels, samples = units_of(run, test.doc_ids), dict[str, Any](), dict[str, Any]()
    settings = (run.multi_label, options.resamples, options.seed)
    for level, given in decided.items():
        found = run.predictions["test", level]
        drawn_together = units[np.searchsorted(test.doc_ids, found.doc_ids)]
        judged, samples[level] = measured(found.truth, given, drawn_together, *settings)
        levels[level] = {"documents": len(np.unique(found.doc_ids)), **judged}
        if not run.multi_label:
            matrix = confusion_matrix(found.truth.argmax(1), given.argmax(1), len(run.labels))
            levels[level] |= {"confusion": plain(matrix), "confusion_by_row": plain(by_row(matrix))}

    def versus(given: Any) -> dict[str, Any]:
        """Other decisions on the same documents and the same samples of them, and what this run is better by."""
        judged, drawn = measured(test.truth, given, units, *settings)
        gaps = differences((levels["document"], samples["document"]), (judged, drawn))
        right = ((one == test.truth).all(1) for one in (decided["document"], given))
        return {"metrics": judged["metrics"], "difference": gaps, "mcnemar": mcnemar(*right)}

    split = {part: {"documents": len(flags), "labels": plain(flags.sum(0))} for part, flags in run.part_truth.items()}
    times = {name: run.record[name] for name in ("started", "ended") if run.record[name] is not None}
    shown = {name: datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds") for name, at in times.items()}
    return {
        "format": 2,
        "database": run.database.path.name,
        "run": plain({**run.record, **shown}),
        "data": {name: str(n) if name.startswith("num_") else n for name, n in plain(run.meta).items()},  # older way
        "labels": list(run.labels),
        "multi_label": run.multi_label,
        "split": split,
        "epochs": plain(run.epochs),
        "level": options.level,
        "resamples": options.resamples,
        "seed": options.seed,
        "levels": levels,
        "stored_metrics": plain({f"{level} {name}": value for (level, name), value in run.stored_metrics.items()}),
        "baselines": [],
        "comparison": None,
    }, versus


def add_confidence(numbers: dict[str, Any], run: Run) -> None:
    """Calibration before and after the temperature, and accuracy over coverage."""
    from lmscripts.evaluation import calibration

    found = run.predictions["test", numbers["level"]]
    labels = found.truth if run.multi_label else found.truth.argmax(1)
    before = None if found.logits is None else calibration.probabilities_of(found.logits, run.multi_label)
    numbers["calibration"] = {
        "temperature": run.record["facts"].get("temperature"),
        "before": None if before is None else calibration.judged(before, labels),
        "after": calibration.judged(found.probabilities, labels),
    }
    points = ([], None) if run.multi_label else calibration.coverage_points(found.probabilities, labels)
    numbers["coverage"], numbers["coverage_curve"] = points


def add_notices(numbers: dict[str, Any], run: Run, decided: dict[str, Any]) -> None:
    """What a reader must know before believing a number."""
    from lmscripts.evaluation.charts import without_font
    from lmscripts.evaluation.judging import LAST_EPOCH, told_apart

    notices, tested = numbers["notices"], numbers["levels"]["document"]
    labels = dict(zip(run.labels, tested["per_label"], strict=True))
    absent = [label for label, found in labels.items() if not found["support"]]
    if absent:
        more = f" or one of {len(absent) - 5:,} others" if len(absent) > 5 else ""
        notices.append(f"No test document has the label {' or '.join(map(repr, absent[:5]))}{more}.")
    notices += told_apart(run.predictions["test", "document"].truth, decided["document"], list(run.labels))
    if not run.multi_label and len(labels) - len(absent) == 1:
        notices.append("All test documents have one label: only accuracy says something.")
    if run.record["facts"].get("best_epoch") == max((record["epoch"] for record in run.epochs), default=0) > 0:
        notices.append(LAST_EPOCH)
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
    if not run.multi_label:
        notices += without_font(run.labels)
    for (level, name), value in run.stored_metrics.items():
        now = numbers["levels"].get(level, {}).get("metrics", {}).get(name, {}).get("value")
        if now is not None and value is not None and abs(now - value) > 1e-6:
            notices.append(f"The run wrote down {name} {value:.4f} of {level}s; its predictions give {now:.4f}.")


def add_baselines(numbers: dict[str, Any], versus: Versus, run: Run, options: Options) -> None:
    """Simple classifiers on the same split, judged on the same documents and the same samples of them."""
    from lmscripts.evaluation import baselines

    notices, trained = numbers["notices"], len(run.parts["train"])
    if not trained:
        notices.append("The split has no training part: there are no baselines.")
        return
    rows = len(run.predictions["test", "document"].doc_ids)
    found = {"most frequent label": baselines.majority_decisions(run.part_truth["train"], rows)}
    if options.baselines:
        learnt, seen = baselines.baseline_decisions(run, options.baseline_documents, options.seed)
        found |= learnt
        if seen < trained:
            notices.append(f"The TF-IDF baselines saw {seen:,} of {trained:,} training documents.")
    numbers["baselines"] = [{"name": name, **versus(decided)} for name, decided in found.items()]
    for baseline in numbers["baselines"]:
        gap = next(iter(baseline["difference"].values()))["interval"]
        if gap is not None and gap[1] < 0:
            notices.append(f"{baseline['name']} is better than this run.")


def add_comparison(numbers: dict[str, Any], versus: Versus, run: Run, other: Run) -> None:
    """Another run on the same test documents: paired differences, McNemar's test, options that differ."""
    from lmscripts.evaluation.comparison import places_of_same
    from lmscripts.evaluation.metrics import plain

    places = places_of_same(run, other)
    columns = [other.labels.index(label) for label in run.labels]
    found = versus(decide(other, numbers["notices"])[0]["document"][places][:, columns])
    given = run.record["options"], other.record["options"]
    changed = [[name, *(str(one.get(name, "–")) for one in given)] for name in sorted({*given[0], *given[1]})]
    numbers["comparison"] = {
        "database": other.database.path.name,
        "run": {name: plain(other.record[name]) for name in ("run_id", "name", "options", "facts")},
        "first": numbers["levels"]["document"]["metrics"],
        "second": found["metrics"],
        "difference": found["difference"],
        "mcnemar": found["mcnemar"],
        "options": [row for row in changed if row[1] != row[2]],
    }


if __name__ == "__main__":
    main()
