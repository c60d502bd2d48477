"""Compare runs: their held-out loss in one picture, what differs in their options, what each needed to an equal loss.

python scripts/compare_runs.py runs/bert runs/modernbert runs/bert_muon
python scripts/compare_runs.py runs/a runs/b --loss 3.5 --output_file comparison.json

Reads log.jsonl and config.yaml of each folder and changes nothing in it. The equal loss is the worst at the end of any
of the runs, so that all have reached it; between two evaluations it is taken to fall evenly. Seconds are those of
training, by the speed in the log, without evaluations and checkpoints. What makes losses incomparable is told.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from lmscripts.errors import UserError, user_errors
from lmscripts.files import write_bytes, write_text
from lmscripts.options import check_numbers, option, parse_options

LOWER = ("loss", "perplexity", "byte")  # how measures end that fall while a model learns
AMOUNTS = ("tokens", "records")  # what logs count beside steps
OF_JOB = ("model_dir", "do_continue", "dry_run", "experiment_name", "output_prefix", "resume")
# Of the settings that a checkpoint keeps, those that decide what is predicted from what.
PREDICTED = ("objective", "token store", "sequence_length", "packing", "mask_unit", "mask_probability", "pair_task")
Point = tuple[float, float]


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    run: tuple[str, ...] = option((), help="folders of runs, two or more", required=True, positional=True)
    metric: str | None = option(None, help="held-out measure; default: eval_loss, of a classifier validation_loss")
    loss: float | None = option(None, help="equal loss; default: the worst at the end of any of the runs")
    picture: str = option("comparison.png", help="where the curves are drawn; is replaced", writes="file")
    output_file: str | None = option(None, help="JSON file for the numbers; is replaced", short="o", writes="file")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is read."""
        check_numbers(vars(self), positive=("loss",))
        if 0 < len(set(self.run)) < 2:
            raise UserError(f"one run, {self.run[0]}, cannot be compared: give the folders of two or more")
        if self.metric is not None and not self.metric.endswith(LOWER):
            raise UserError(f"--metric {self.metric} does not fall with learning: give one that ends in {LOWER}")


@dataclass
class Run:
    """What is read of a run. Points are (amount, held-out measure), in the order of the steps."""

    name: str
    folder: str
    metric: str
    steps: list[Point]
    amounts: dict[str, list[Point]]  # tokens, records, seconds: those that the log has
    options: dict[str, str] | None = None  # None where there is no config.yaml
    facts: dict[str, Any] = field(default_factory=dict)  # what decides whether losses can be compared


def main() -> None:
    """Parse, compare, draw, print."""
    options = parse_options(Options, description=__doc__ or "")
    with user_errors():
        compare(options)


def compare(options: Options) -> None:
    """Everything, from top to bottom."""
    given = list(dict.fromkeys(options.run))
    names = [Path(folder).resolve().name for folder in given]
    names = names if len(set(names)) == len(names) else given
    runs = [read_run(name, Path(folder), options.metric) for name, folder in zip(names, given, strict=True)]
    if len({run.metric for run in runs}) > 1:
        raise UserError(f"{runs[0].name} has {runs[0].metric} and others have not: give a --metric that all have")
    equal = max(run.steps[-1][1] for run in runs) if options.loss is None else options.loss
    told = [
        *warnings_of(runs),
        *(f"{r.name} has no config.yaml: its options are unknown" for r in runs if not r.options),
    ]
    rows = [summary(run, equal) for run in runs]
    differing = differences(runs)
    for sentence in told:
        print(f"warning: {sentence}", file=sys.stderr)
    print(table(rows, runs[0].metric, equal))
    if differing:
        print("\n" + grid([["option", *names], *([name, *values] for name, values in differing.items())]))
    write_bytes(Path(options.picture), drawn(runs, equal))
    print(f"\nthe curves are in {options.picture}")
    if options.output_file is not None:
        result = {"metric": runs[0].metric, "equal": equal, "runs": rows, "options": differing, "warnings": told}
        write_text(Path(options.output_file), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"the numbers are in {options.output_file}")


# ---- reading -----------------------------------------------------------------------------------------------------


def read_run(name: str, folder: Path, metric: str | None) -> Run:
    """The log, the options and the facts of a run; a UserError where it has no log or never judged held-out text."""
    import numpy as np

    from lmscripts.options.yaml_text import read_yaml
    from lmscripts.training.log import read_log

    if not (folder / "log.jsonl").is_file():
        near = folder.parent / "log.jsonl"
        hint = f", such as {folder.parent}" if near.is_file() else f" (seen from {Path.cwd()})"
        raise UserError(f"{folder} has no log.jsonl: give the folder of a run{hint}")
    records = read_log(folder / "log.jsonl")
    measures = {name for record in records for name in record if name.startswith(("eval_", "validation_"))}
    metric = metric or next((each for each in ("eval_loss", "validation_loss") if each in measures), None)
    steps = [(float(r["step"]), r[metric]) for r in records if isinstance(r.get(metric), float | int)] if metric else []
    if not steps:
        known = ", ".join(sorted(each for each in measures if each.endswith(LOWER))) or "nothing that falls"
        raise UserError(f"the log of {folder} has no held-out {metric or 'loss'}; it has {known}")
    at, values = zip(*steps)
    found = {  # at steps between log lines as on a straight line
        what: list(zip(np.interp(at, *zip(*line)).tolist(), values, strict=True))
        for what, line in amounts(records).items()
    }
    file = folder / "config.yaml"
    said = {entry.key: entry.shown for entry in read_yaml(str(file))} if file.is_file() else None
    return Run(name, str(folder), metric, steps, found, said, facts_of(folder))


def amounts(records: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """(step, amount) of what the log counts, from (0, 0) on; seconds are tokens by their speed."""
    found: dict[str, list[Point]] = {}
    for what in AMOUNTS:
        line = [(float(r["step"]), float(r[what])) for r in records if what in r]
        if line:
            found[what] = [(0.0, 0.0), *line]
    trained = [r for r in records if "tokens" in r and r.get("tokens_per_second")]
    if trained:
        before, seconds, line = 0.0, 0.0, [(0.0, 0.0)]
        for record in trained:
            seconds += (record["tokens"] - before) / record["tokens_per_second"]
            before = record["tokens"]
            line.append((float(record["step"]), seconds))
        found["seconds"] = line
    return found


def facts_of(folder: Path) -> dict[str, Any]:
    """What decides whether losses can be compared: of the newest checkpoint, and the tokenizer beside the weights."""
    from lmscripts.models.families import family, names
    from lmscripts.models.finding import STATE, list_checkpoints, read_state
    from lmscripts.tokenizer.encoder import load_encoder

    checkpoints, facts = list_checkpoints(folder)[::-1], dict[str, Any]()
    if checkpoints and (checkpoints[0] / STATE).is_file():
        fixed = read_state(checkpoints[0], "fixed")["fixed"]
        facts = {name: json.dumps(fixed[name]) for name in PREDICTED if name in fixed}
    place = next((each for each in (folder / "final", *checkpoints) if (each / "config.json").is_file()), None)
    if place is not None and facts.get("objective", '""') == '""':  # as a family has it
        kind = json.loads((place / "config.json").read_text(encoding="utf-8")).get("model_type")
        facts["objective"] = family(kind).default_objective if kind in names() else str(kind)
    if place is not None and (place / "tokenizer_config.json").is_file():
        facts["tokenizer"] = load_encoder(place).fingerprint[:16]
    return facts


def warnings_of(runs: list[Run]) -> list[str]:
    """Why the losses of runs do not compare, a sentence each."""

    def differ(name: str) -> str:
        values = [str(run.facts.get(name, "unknown")) for run in runs]
        pairs = (f"{run.name}: {value:.40}" for run, value in zip(runs, values, strict=True))
        return ", ".join(pairs) if len(set(values)) > 1 else ""

    found = []
    if (said := differ("tokenizer")) and not runs[0].metric.endswith("byte"):
        way = "--metric eval_bits_per_text_byte does, where all logs have it"
        found.append(f"the tokenizers differ ({said}): losses per token do not compare; {way}")
    if said := differ("objective"):
        found.append(f"the objectives differ ({said}): their losses measure different things")
    if said := differ("token store"):
        found.append("the token stores differ, and with them the held-out text")
    for name in PREDICTED[2:] if not differ("objective") else ():
        if said := differ(name):
            found.append(f"{name} differs ({said}): the held-out loss is measured with each run's own")
    return found


# ---- comparing ---------------------------------------------------------------------------------------------------


def reached(points: list[Point], equal: float) -> float | None:
    """The amount at which a curve first comes down to a value, evenly between two points; None where it does not."""
    for number, (amount, value) in enumerate(points):
        if value <= equal:
            if number == 0:
                return amount
            before, above = points[number - 1]
            return before + (amount - before) * (above - equal) / (above - value)
    return None


def summary(run: Run, equal: float) -> dict[str, Any]:
    """A run in numbers."""
    curves = {"steps": run.steps, **run.amounts}
    row: dict[str, Any] = {"name": run.name, "folder": run.folder}
    row |= {what: points[-1][0] for what, points in curves.items()}
    row |= {"last": run.steps[-1][1], "best": min(value for _, value in run.steps), "facts": run.facts}
    return row | {"to_equal": {what: reached(points, equal) for what, points in curves.items()}}


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """Options that are not the same in all runs, with the value of each."""
    known = [run.options or {} for run in runs]
    names = dict.fromkeys(name for each in known for name in each if name not in OF_JOB)
    values = {name: [each.get(name, "-") for each in known] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


# ---- showing -----------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], metric: str, equal: float) -> str:
    """The runs as a table for people."""
    kinds = [what for what in ("steps", *AMOUNTS, "seconds") if any(what in row for row in rows)]
    head = ["run", metric, "best", *kinds, *(f"{what} to {equal:.4f}" for what in kinds)]
    lines = [head]
    for row in rows:
        cells = [row["name"], f"{row['last']:.4f}", f"{row['best']:.4f}"]
        cells += [number(row.get(what)) for what in kinds]
        lines.append([*cells, *(number(row["to_equal"].get(what)) for what in kinds)])
    return grid(lines)


def number(value: float | None) -> str:
    """A count, or a dash where there is none."""
    return "-" if value is None else f"{value:,.1f}" if value < 100 and value % 1 else f"{value:,.0f}"


def grid(lines: list[list[str]]) -> str:
    """Cells in columns; those after the first stand at the right."""
    shown = [[cell if len(cell) <= 40 else f"{cell[:37]}..." for cell in line] for line in lines]
    wide = [[len(cell) + sum(east_asian_width(sign) in "WF" for sign in cell) for cell in line] for line in shown]
    widths = [max(column) for column in zip(*wide, strict=True)]
    found = []
    for line, sizes in zip(shown, wide, strict=True):
        blanks = [" " * (width - size) for width, size in zip(widths, sizes, strict=True)]
        found.append(
            "  ".join([line[0] + blanks[0], *(b + c for b, c in zip(blanks[1:], line[1:], strict=True))]).rstrip()
        )
    return "\n".join(found)


def drawn(runs: list[Run], equal: float) -> bytes:
    """Held-out curves as a PNG: over what all logs count, and over seconds where any has them."""
    import io

    from matplotlib.figure import Figure

    by = next((what for what in AMOUNTS if all(what in run.amounts for run in runs)), "steps")
    axes = [by, *(["seconds"] if any("seconds" in run.amounts for run in runs) else [])]
    figure = Figure(figsize=(7.5 * len(axes), 4.8), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for panel, what in zip(panels, axes, strict=True):
        for place, run in enumerate(runs):
            points = run.steps if what == "steps" else run.amounts.get(what)
            if points:
                style = ("o-", "s--", "^-.", "D:")[place % 4]  # so that one behind another is seen
                panel.plot(*zip(*points), style, label=run.name, color=f"C{place % 10}", markersize=4, linewidth=1.5)
        panel.axhline(equal, color="gray", linestyle=":", linewidth=1)
        panel.set_xlabel("seconds of training" if what == "seconds" else what)
        panel.set_ylabel(runs[0].metric.replace("eval_", "held-out ").replace("_", " "))
        panel.grid(alpha=0.3)
    panels[0].legend()
    stored = io.BytesIO()
    figure.savefig(stored, dpi=110)
    return stored.getvalue()


if __name__ == "__main__":
    main()
