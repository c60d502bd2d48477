"""Judging a policy on decisions whose choice is known, and asking it about new ones.

Every record is measured by itself, in float64 from the logits on. Batches are the same whoever computes them, and what
was measured is added up in the order of the records: with one size of batches the figures have the same bits for any
number of processes. With another size the logits of a model, which are float32, may differ in their last bits, and the
figures by about 1e-6 with them; which candidates count as right differs only where two logits are that close.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from lmscripts.data.decision_rows import make_batch
from lmscripts.data.decisions import DecisionPart, parse
from lmscripts.data.labelled_rows import by_length
from lmscripts.data.schema import Schema
from lmscripts.data.steps import Batch, Ints, to_device
from lmscripts.errors import UserError
from lmscripts.evaluation import calibration
from lmscripts.evaluation.metrics import Floats
from lmscripts.evaluation.sums import Progress, judging, measure_batches
from lmscripts.objectives import choice
from lmscripts.objectives.module import Objective

_BLOCK = 1 << 16  # records that are sorted by length and added up together: no more of them are held
# What is measured of a record, in the order of the columns.
_MEASURED = ("loss", "rank", "confidence", "candidates", "chosen", "best", "value", "outcome")
_OF_TYPE = ("decisions", "loss", "top1_accuracy", "top3_accuracy", "chance_accuracy")


@dataclass(frozen=True)
class Judged:
    """Sums over decisions.

    Attributes:
        types: the kinds of candidates, as the schema names them.
        of_types: (types, 5) float64, over the decisions in which a candidate of a type was chosen: their number, their
            losses, how often it was the likeliest by the policy, how often among the three likeliest, and how often it
            would have been by chance.
        bins: `calibration.in_bins` of how sure the policy was of the likeliest.
        values: (5,) float64 of a policy that gives values: their losses as they are trained, absolute errors, squared
            errors, the outcomes, and the squares of these; None of one that gives none.
    """

    types: list[str]
    of_types: Floats
    bins: Floats
    values: Floats | None


# ---- decisions whose choice is known -----------------------------------------------------------------------------


def judge(
    accelerator: Accelerator,
    objective: Objective,
    part: DecisionPart,
    schema: Schema,
    micro_batch_size: int,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Progress = lambda done, passes: None,
) -> Judged | None:
    """How well a policy foresees the choices in a part; every process calls it and gets the same.

    The objective may be in any mode and is left in it. Memory does not grow with the number of records. For
    `stop_requested` and `progress` see `measure_batches`; None when a process was asked to stop before the end.

    Raises:
        UserError: there is no decision, or logits are not finite numbers.
    """
    if not part.num_records:
        raise UserError("there is no decision to judge a policy on")
    names = [schema.type_of(number) for number in range(schema.field("candidates").vocab_size)]
    types = list(dict.fromkeys(names))
    type_of = np.array([types.index(name) for name in names])
    of_types, values = np.zeros((len(types), len(_OF_TYPE))), np.zeros(5)
    bins = calibration.in_bins(*np.zeros((2, 0)))
    for found in measured(accelerator, objective, part, schema, micro_batch_size, stop_requested, progress):
        if found is None:
            return None
        rank, kinds = found["rank"], type_of[found["chosen"].astype(np.int64)]
        each = [np.ones(len(rank)), found["loss"], rank == 0, rank < 3, 1 / found["candidates"]]
        of_types += np.stack([np.bincount(kinds, weights=one, minlength=len(types)) for one in each], 1)
        bins += calibration.in_bins(found["confidence"], rank == 0)
        outcome, error = found["outcome"], np.abs(found["value"] - found["outcome"])
        huber = np.where(error < 1, error**2 / 2, error - 0.5)
        values += [each.sum() for each in (huber, error, error**2, outcome, outcome**2)]
    return Judged(types, of_types, bins, values if objective.settings.value else None)


def measured(
    accelerator: Accelerator,
    objective: Objective,
    part: DecisionPart,
    schema: Schema,
    micro_batch_size: int,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Progress = lambda done, passes: None,
) -> Iterator[dict[str, Floats] | None]:
    """What a policy makes of each decision, in the order of the records, some ten thousand at a time; see `judge`.

    Yields:
        (N,) float64 each: "loss", the cross entropy of the choice in nats; "rank", how many candidates the policy finds
        likelier (of equal ones those that stand before it); "confidence", the probability of the likeliest; how many
        "candidates" there were; the ids of the "chosen" one and of the likeliest, "best"; the "value" and the "outcome"
        of the record, 0 without a head for values. None, as the last, when a process was asked to stop.
    """
    at_once = micro_batch_size * accelerator.num_processes
    blocks = [(begin, min(begin + _BLOCK, part.num_records)) for begin in range(0, part.num_records, _BLOCK)]
    passes, done = sum(-(-(end - begin) // at_once) for begin, end in blocks), 0

    def advance(*_: int) -> None:
        nonlocal done
        done += 1
        progress(done, passes)

    for begin, end in blocks:
        rows = np.arange(begin, end)
        batches = by_length(part.lengths(rows), micro_batch_size)

        def measure(number: int, rows: Ints = rows, batches: list[Ints] = batches) -> Tensor:
            found = torch.zeros(micro_batch_size, len(_MEASURED), dtype=torch.float64)  # the last may have fewer rows
            found[: len(batches[number])] = _measure(accelerator, objective, part, rows[batches[number]], schema)
            return found.flatten()

        with judging(objective):
            numbers = measure_batches(accelerator, len(batches), measure, stop_requested, advance)
        if numbers is None:
            yield None
            return
        values = np.empty((len(rows), len(_MEASURED)))
        values[np.concatenate(batches)] = numbers.view(-1, len(_MEASURED))[: len(rows)].cpu().numpy()
        if wrong := int((~np.isfinite(values)).any(1).sum()):
            raise UserError(
                f"the policy gives logits that are not finite numbers for {wrong:,} of {len(rows):,} decisions: lower "
                "the learning rate or look at its weights"
            )
        yield dict(zip(_MEASURED, values.T, strict=True))


def _measure(accelerator: Accelerator, objective: Objective, part: DecisionPart, rows: Ints, schema: Schema) -> Tensor:
    """(B, 8) float64 what is measured of (B,) records."""
    batch = make_batch(part, rows, schema, objective.settings.value)
    with accelerator.autocast():
        logits, value = answer(objective, batch)
    _, rank = choice.row_losses(objective, logits, batch)
    labels, none = batch["labels"][:, None], torch.zeros(len(rows), dtype=torch.float64)
    ids = batch["input_ids"].gather(1, batch["candidates"]) - schema.first_id(schema.field("candidates"))
    best, shares = logits.argmax(1, keepdim=True), logits.log_softmax(1)
    found = {
        "loss": -shares.gather(1, labels)[:, 0],  # of the choice itself, however smooth the labels are in training
        "rank": rank,
        "confidence": shares.amax(1).exp(),
        "candidates": batch["candidate_mask"].sum(1),
        "chosen": ids.gather(1, labels)[:, 0],
        "best": ids.gather(1, best)[:, 0],
        "value": none if value is None else value,
        "outcome": batch.get("outcome", none),
    }
    return torch.stack([found[name].double() for name in _MEASURED], 1)


def answer(objective: Objective, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(B, K) float64 logits of the candidates of a batch, -inf where there is none, and (B,) values if it gives them.

    They come to the processor's memory: not every device knows float64.
    """
    said = choice.say(objective, to_device(batch, objective.models[""].device))
    logits, value = (None if each is None else each.float().cpu().double() for each in (said.logits, said.value))
    return logits, value  # type: ignore[return-value]


# ---- what is said of them ----------------------------------------------------------------------------------------


def report(judged: Judged) -> dict[str, Any]:
    """What decisions say of a policy, for JSON.

    Returns:
        "metrics": "loss" in nats, "perplexity", "top1_accuracy", "top3_accuracy", "chance_accuracy" (that of a guess),
        "calibration_error", of a policy with values "value_loss" as it is trained, "value_error", the mean absolute
        one, and "value_explained", the share of the variance of the outcomes; "counts": "decisions"; "types": by kind
        of the chosen candidate number, "share" of all, loss and accuracies; "bins": how sure against how right, see
        `calibration.reliability`.
    """
    totals, sure = judged.of_types.sum(0), calibration.reliability(judged.bins)
    number = float(totals[0])
    means = dict(zip(_OF_TYPE[1:], (totals[1:] / number).tolist(), strict=True))
    metrics = {"loss": means["loss"], "perplexity": math.exp(min(means["loss"], 700.0))} | means
    metrics["calibration_error"] = sure["ece"]
    if judged.values is not None:
        losses, errors, squares, outcomes, of_outcomes = judged.values.tolist()
        metrics |= {"value_loss": losses / number, "value_error": errors / number}
        if (spread := of_outcomes - outcomes**2 / number) > 1e-9 * of_outcomes:  # of equal outcomes nothing can be said
            metrics["value_explained"] = 1 - squares / spread
    types = {}
    for name, (count, *sums) in zip(judged.types, judged.of_types.tolist(), strict=True):
        if count:
            of_type = {what: total / count for what, total in zip(_OF_TYPE[1:], sums, strict=True)}
            types[name] = {"decisions": int(count), "share": count / number} | of_type
    return {"metrics": metrics, "counts": {"decisions": int(number)}, "types": types, "bins": sure["bins"]}


def in_words(reported: Mapping[str, Any]) -> str:
    """A line on what `report` says, and a table of the kinds of chosen candidates, the frequent ones first."""
    metrics = reported["metrics"]
    said = [f"loss {metrics['loss']:.4f}", f"top-1 {metrics['top1_accuracy']:.2%}"]
    said += [f"top-3 {metrics['top3_accuracy']:.2%}", f"chance {metrics['chance_accuracy']:.2%}"]
    said += [f"calibration error {metrics['calibration_error']:.4f}"]
    said += [f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in metrics if name.startswith("value")]
    lines = [f"{reported['counts']['decisions']:,} decisions: {', '.join(said)}"]
    rows = [("chosen", "decisions", "share", "top-1", "top-3", "chance", "loss")]
    for name, facts in sorted(reported["types"].items(), key=lambda item: -item[1]["decisions"]):
        shares = (f"{facts[what]:.2%}" for what in ("share", "top1_accuracy", "top3_accuracy", "chance_accuracy"))
        rows.append((name, f"{facts['decisions']:,}", *shares, f"{facts['loss']:.4f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return "\n".join(lines)


# ---- decisions that are still to be made -------------------------------------------------------------------------


def answer_lines(
    objective: Objective, schema: Schema, lines: Sequence[bytes], with_words: bool = False
) -> list[dict[str, Any]]:
    """What a policy would choose in records of text, for JSON: an answer for each line, in their order.

    What is known afterwards only, the choice and the extra numbers, may be empty, a question mark, or left out at the
    end of a line.

    Returns:
        Of a record its "id", if records have one; "best", the likeliest candidate; "chosen", where that is known; the
        "value" of a policy that gives values; "candidates", the likeliest first, each with its id as "candidate", its
        "probability", its "index" in the record, and where they are asked for its "words". Of a line that is no record
        its "error".
    """
    filled, known = zip(*(_filled(line, schema) for line in lines), strict=True)
    part, bad = parse(filled, schema)
    wrong = {each.line - 1: f"{each.reason}: {each.details}" for each in bad}
    answers: list[dict[str, Any]] = [{"error": wrong.get(place, "")} for place in range(len(lines))]
    if not part.num_records:
        return answers
    batch = make_batch(part, np.arange(part.num_records), schema, objective.settings.value)
    with judging(objective):
        logits, values = answer(objective, batch)
    shares, column = logits.softmax(1), schema.field("candidates")
    if not shares.isfinite().all():
        raise UserError("the policy gives logits that are not finite numbers: look at its weights")
    ids = batch["input_ids"].gather(1, batch["candidates"]) - schema.first_id(column)
    likeliest = logits.argsort(dim=1, descending=True, stable=True)
    name = next((place for place, each in enumerate(schema.fields) if each.kind == "id"), None)
    for row, place in enumerate(sorted(set(range(len(lines))) - wrong.keys())):
        found: dict[str, Any] = {}
        if name is not None:
            found["id"] = lines[place].split(b"\t")[name].decode("utf-8", "replace")
        order = likeliest[row, : batch["candidate_mask"][row].sum()].tolist()
        each: list[dict[str, Any]] = [{"candidate": int(ids[row, index]), "index": index} for index in order]
        for facts in each:
            facts["probability"] = round(float(shares[row, facts["index"]]), 6)
            if with_words:
                facts["words"] = schema.words(column, facts["candidate"])
        found["best"] = each[0]["candidate"]
        if known[place]:
            found["chosen"] = int(ids[row, batch["labels"][row]])
        if values is not None:
            found["value"] = round(float(values[row]), 6)
        answers[place] = found | {"candidates": each}
    return answers


def _filled(line: bytes, schema: Schema) -> tuple[bytes, bool]:
    """A record with zeros for what is not known yet, and whether its choice is known."""
    values, known = line.split(b"\t"), True
    later = [each.kind in ("label", "extra") for each in schema.fields]
    while len(values) < len(later) and later[len(values)]:
        values.append(b"")
    for place, (value, field) in enumerate(zip(values, schema.fields)):
        if later[place] and value.strip() in (b"", b"?"):
            known = known and field.kind != "label"
            values[place] = b",".join([b"0"] * field.min_length)
    return b"\t".join(values), known
