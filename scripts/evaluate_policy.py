"""Evaluate a saved policy on decisions whose choice is known: loss, top-1, top-3, calibration, by type of candidate.

python scripts/evaluate_policy.py --model runs/mine --data store --output_file result.json
python scripts/evaluate_policy.py --model runs/mine/snapshots/02 --data held_out.txt.gz 'shards/*.txt'

Decisions are a store of prepare_annotations.py, of which what was held out is taken, or records as text. Runs under
`accelerate launch` too, with the same bits for any number of processes. A model that was never trained is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmscripts.errors import UserError, leave, user_errors
from lmscripts.files import write_text
from lmscripts.options import check_numbers, check_useless, option, parse_options

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.data.decisions import DecisionStore
    from lmscripts.data.schema import Schema
    from lmscripts.models.saved import Saved
    from lmscripts.text.report import TextReport
    from lmscripts.training.processes import StopRequest


RENAMED = {"model_dir": "model", "input_file": "data", "validation_data": "data"}  # as other scripts have them


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model: str = option(help="folder of a policy, a snapshot, or the folder of a run")
    data: tuple[str, ...] = option(
        (), help="a store, or records: files, globs or folders, each also compressed", required=True
    )
    part: Literal["validation", "train"] | None = option(
        None, help="of a store; default: what is held out, where something is"
    )
    output_file: str | None = option(
        None, help="JSON file for the result; replaced only by a whole result", writes="file"
    )
    require_trained: bool = option(False, help="make it an error if the model was never trained")
    dry_run: bool = option(False, help="say what would be evaluated, and end")

    batch_size: int = option(256, help="records of one forward pass on one process", group="scores", most=10**6)
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", help="of the matrix products", group="scores")
    cpu_threads: int = option(
        1, help="threads of a process without a GPU; the last digits depend on it", group="scores", most=1024
    )
    send_inputs: bool = option(
        False, help="hand what only the first machine has of the inputs to the others", group="scores"
    )
    timeout: int = option(600, help="seconds that a process may keep the others waiting", group="scores")
    num_workers: int | None = option(None, help="processes that parse it (1)", group="text", most=1024)
    on_bad_row: Literal["fail", "skip"] | None = option(
        None, help="a line that is no record ends it all (fail, the default), or is left out and counted", group="text"
    )
    keep_duplicates: bool | None = option(
        None, help="count decisions that a game has more than once (one for each winner) as often", group="text"
    )

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is done."""
        check_numbers(vars(self), positive=("batch_size", "cpu_threads", "num_workers", "timeout"))


def main() -> None:
    """Parse, evaluate, write."""
    from lmscripts.training.processes import agree, join

    with user_errors(only_words=True), join():
        options = parse_options(Options, description=__doc__ or "", renamed=RENAMED)
        evaluate(replace(options, **agree(vars(options), ("model", "data"))))


def evaluate(options: Options) -> None:
    """Load and check everything, judge, then print and write the result; ends the process."""
    from lmscripts.evaluation.result import check_output

    output = check_output(options.output_file, [Path(name) for name in options.data])
    import torch
    from transformers import logging

    from lmscripts.models.saved import open_policy
    from lmscripts.text.report import TextReport
    from lmscripts.training import processes

    logging.disable_progress_bar()
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--precision fp16 needs a GPU, and this machine shows none: take fp32 or bf16")
    saved = open_policy(options.model)
    if saved.untrained and options.require_trained:
        raise UserError(
            f"{saved.name} was never trained ({'; '.join(saved.untrained)}), and --require_trained is given"
        )
    read = TextReport()
    with opened_data(options, saved, read) as store:
        accelerator = processes.start_processes(
            mixed_precision=options.precision.replace("fp32", "no"), timeout_seconds=options.timeout, exact=True
        )
        stop_asked = processes.StopRequest()
        for sentence in [*saved.notices, *read.sentences()[1:], *store.sentences()]:
            accelerator.print(sentence, flush=True)
        result = judge(options, saved, store, accelerator, stop_asked)
    if result is not None and accelerator.is_main_process:
        report(result, output)
    elif result is None and not options.dry_run:
        accelerator.print(f"stopped by {stop_asked.reason or 'a signal to another process'}; no result was written")
    accelerator.wait_for_everyone()
    leave(0 if result is not None or options.dry_run else processes.stopped_early())


def judge(
    options: Options, saved: Saved, store: DecisionStore, accelerator: Accelerator, stop_asked: StopRequest
) -> dict[str, Any] | None:
    """The result in plain values; None of a dry run, and when a process was asked to stop."""
    import torch

    from lmscripts.evaluation import decisions
    from lmscripts.evaluation.sums import Shown
    from lmscripts.objectives import choice
    from lmscripts.training import processes
    from lmscripts.training.log import versions

    name = options.part or ("validation" if store.part("validation").num_records else "train")
    part, schema, model, device = store.part(name), schema_of(saved), saved.models[""], accelerator.device.type
    if device == "cpu":
        torch.set_num_threads(options.cpu_threads)
        device = f"cpu, {options.cpu_threads} thread{'s' * (options.cpu_threads > 1)} per process"
    chosen = {"part": name, "batch_size": options.batch_size, "precision": options.precision}
    processes.check_agreement({"the data": store.fingerprint, "the model": saved.weights, "options": chosen})
    if options.dry_run:
        passes = -(-part.num_records // (options.batch_size * accelerator.num_processes))
        told = f"{name}: {part.num_records:,} decisions, {passes:,} forward passes of each process; processes: "
        accelerator.print(f"{told}{processes.in_words(accelerator)}; {model.num_parameters():,} parameters")
        return None
    objective = choice.trained(model.to(accelerator.device), choice.Settings(value=model.config.value_head))
    shown = Shown(accelerator, "decisions")
    judged = decisions.judge(accelerator, objective, part, schema, options.batch_size, stop_asked, shown)
    if judged is None:
        return None
    about = {"name": saved.name, "type": saved.model_type, "kind": "policy", "step": saved.step}
    about |= {"parameters": model.num_parameters(), "weights_sha256": saved.weights, "notices": saved.notices}
    data = {"data": " ".join(options.data), "schema": schema.name, "fingerprint": store.fingerprint}
    result = {"model": about, "untrained": bool(saved.untrained), "untrained_because": saved.untrained}
    result |= {"decisions": data, "text_report": store.manifest["report"], "options": chosen}
    return result | decisions.report(judged) | {"versions": versions() | {"device": device}}


def schema_of(saved: Saved) -> Schema:
    """What the records of a policy are."""
    from lmscripts.data.schema import Schema

    return Schema.from_json(saved.models[""].config.schema)


@contextmanager
def opened_data(options: Options, saved: Saved, read: TextReport) -> Iterator[DecisionStore]:
    """The store that was given, or one of the text for as long as it is needed; what was `read` is added there.

    Raises:
        UserError: the store is of another schema than the model, or options have no effect.
    """
    from lmscripts.data.decision_preparation import open_or_prepare
    from lmscripts.data.decisions import is_store
    from lmscripts.evaluation.sums import temporary_store

    on_text = {"keep_duplicates": bool(options.keep_duplicates), "on_bad_row": options.on_bad_row or "fail"}
    about = {"num_workers": options.num_workers or 1, "report": read, "validation_share": 0.0, **on_text}
    open_one = partial(open_or_prepare, options.data, schema_of(saved), **about)
    if any(is_store(Path(name)) for name in options.data):
        check_useless(vars(options), "on a store", "num_workers", "on_bad_row", "keep_duplicates")
        yield open_one(run_dir=Path())
        return
    check_useless(vars(options), "on text, all of which is evaluated", "part")
    with temporary_store(lambda run_dir: open_one(run_dir=run_dir)) as store:
        yield store


def report(result: dict[str, Any], output: Path | None) -> None:
    """Write the result down, then print it, also where it cannot be written.

    Raises:
        UserError: a number is none.
    """
    from lmscripts.evaluation.decisions import in_words
    from lmscripts.evaluation.result import as_json, table

    try:
        if output is not None:
            write_text(output, as_json(result))
    finally:
        print(f"{table(result)}\n\n{in_words(result)}", flush=True)
    if output is not None:
        print(f"the numbers are in {output}")


if __name__ == "__main__":
    main()
