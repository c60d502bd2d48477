"""Evaluate a saved language model on text: loss, perplexity, bits per byte, accuracy.

python scripts/evaluate_lm.py --model_dir runs/gpt2 --input_file held_out.txt --output_file result.json

Causal models (GPT-2 and whatever AutoModelForCausalLM loads): every document by itself, every token and its end once.
BERT and RoBERTa: loss and accuracy on fixed masks; --pseudo_perplexity masks every token once. ELECTRA: both halves.
Runs under `accelerate launch` too. A model without trained weights is refused, one that was never trained is named.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO

from lmscripts import objectives
from lmscripts.errors import UserError, leave, user_errors
from lmscripts.files import write_text
from lmscripts.options import EVALUATION, check_numbers, check_useless, option, parse_options

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.data.token_store import Part, TokenStore
    from lmscripts.models.saved import SavedModel
    from lmscripts.text.records import TableOptions


INPUTS = ("model_dir", "input_file", "tokenizer_dir", "generator_dir")


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model_dir: str = option(help="model folder, checkpoint, folder of a run, or a Hub name", required=True)
    input_file: tuple[str, ...] = option((), help="text files, globs or folders", required=True)
    output_file: str | None = option(
        None, help="JSON file for the result; replaced only by a whole result", writes="file"
    )
    tokenizer_dir: str | None = option(None, help="tokenizer, if the model folder has none")
    generator_dir: str | None = option(None, help="ELECTRA: the generator, if it is not in generator/")
    require_trained: bool = option(False, help="make it an error if the model was never trained")

    document_per_line: bool = option(False, help=".txt files hold one document a line, not one sentence", group="text")
    text_column: str | None = option(None, help="column of tables and JSON lines; default: text", group="text")
    delimiter: str | None = option(None, help="of csv and tsv; default: found in the header", group="text")
    quotes: bool = option(True, help="csv: a field may stand in double quotes", group="text")
    input_format: Literal["txt", "csv", "tsv", "jsonl", "parquet"] | None = option(
        None, help="of every file; default: by its name, and JSON lines by their content", group="text"
    )
    line_ends: Literal["keep", "drop"] | None = option(
        None, help="causal: line ends and white space around lines; default: as prepare_corpus.py", group="text"
    )
    num_workers: int = option(1, help="processes that tokenise", group="text", most=1024)

    block_size: int | None = option(
        None, help="tokens of an input; default: the model's longest", group="scores", most=10**6
    )
    stride: int | None = option(
        None, help="causal: tokens from one window to the next; default: block_size, the quickest", group="scores"
    )
    mask_unit: Literal["token", "word", "span"] | None = option(
        None, help="masked: tokens (default), whole words or spans", group="scores"
    )
    mask_probability: float | None = option(None, help="masked: share to predict (0.15)", group="scores")
    pseudo_perplexity: bool = option(False, help="masked: also mask every token once, a row each", group="scores")
    max_documents: int | None = option(None, help="of --pseudo_perplexity: the first documents only", group="scores")
    batch_size: int = option(8, help="full inputs of one forward pass on one process", group="scores", most=10**9)
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", help="of the matrix products", group="scores")
    cpu_threads: int = option(
        1, help="threads of a process without a GPU; the last digits depend on it", group="scores", most=1024
    )
    send_inputs: bool = option(
        False, help="hand what only the first machine has of the inputs to the others", group="scores"
    )
    timeout: int = option(600, help="seconds that a process may keep the others waiting", group="scores")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is done."""
        names = ("num_workers", "block_size", "stride", "max_documents", "batch_size", "cpu_threads", "timeout")
        check_numbers(vars(self), positive=names)
        if not self.pseudo_perplexity:
            check_useless(vars(self), "without --pseudo_perplexity", "max_documents")
        if self.mask_probability is not None and not 0 < self.mask_probability < 1:
            raise UserError(f"--mask_probability must lie between 0 and 1, got {self.mask_probability}")


def main() -> None:
    """Parse, evaluate, write."""
    from lmscripts.training.processes import agree, join

    try:
        with user_errors(), join():
            options = parse_options(Options, description=__doc__ or "", **EVALUATION)
            evaluate(replace(options, **agree(vars(options), INPUTS)))
    except Stopped as stopped:
        print(f"stopped by {signal.Signals(stopped.args[0]).name}; no result was written", file=sys.stderr)
        leave(128 + stopped.args[0])


def evaluate(options: Options) -> None:
    """Load and check everything, score, then print and write the result; ends the process."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show costs no result
    from lmscripts.evaluation.result import check_output
    from lmscripts.text.corpus import find_files

    files = find_files(options.input_file)
    output = check_output(options.output_file, files)
    import torch
    from transformers import logging

    from lmscripts.evaluation import sums as evaluation
    from lmscripts.models import saved as saved_models
    from lmscripts.training import processes as distributed
    from lmscripts.training.log import versions

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--precision fp16 needs a GPU, and this machine shows none: take fp32 or bf16")
    text = evaluation.text_facts(files, table_of(options), options.document_per_line)
    scored = [name for name in objectives.names() if hasattr(objectives.objective(name), "SCORES")]
    saved = saved_models.open_model(options.model_dir, scored, options.generator_dir, options.tokenizer_dir)
    kind = objectives.objective(saved.objective)
    chosen = choose(options, saved)
    if saved.untrained and options.require_trained:
        raise UserError(
            f"{saved.name} was never trained ({'; '.join(saved.untrained)}), and --require_trained is given"
        )
    with evaluation.temporary_store(store_maker(options, saved)) as store:
        tokenizer, rows = store.load_tokenizer(), None
        if kind.SCORES == "masks":
            rows = kind.rows(store, "train", tokenizer, chosen["block_size"], "isolated", kind.Settings())
        how = {"mixed_precision": options.precision.replace("fp32", "no"), "timeout_seconds": options.timeout}
        accelerator = distributed.start_processes(**how, exact=True)
        if (device := accelerator.device.type) == "cpu":
            torch.set_num_threads(options.cpu_threads)
            device = f"cpu, {options.cpu_threads} thread{'s' * (options.cpu_threads > 1)} per process"
        distributed.check_agreement({"the text": store.fingerprint, "the model": saved.weights, "options": chosen})
        if accelerator.is_main_process:
            say("\n".join([*saved.notices, *notices(options, store)]))
        for model in saved.models.values():
            model.to(accelerator.device)
        counts = {name: store.manifest["parts"]["train"][name] for name in ("documents", "tokens", "text_bytes")}
        counts["raw_bytes"] = sum(file["bytes"] for file in text)
        score = score_masked if kind.SCORES == "masks" else score_causal
        metrics, found = score(accelerator, saved, (store.part("train"), rows, tokenizer), chosen, counts)
        check_finite(saved, metrics, options.precision)
        chosen["line_ends"], read = store.manifest["options"].get("line_ends", "drop"), store.manifest["text"]
    result = {"model": describe(saved), "untrained": bool(saved.untrained), "untrained_because": saved.untrained}
    result |= {"text": text, "metrics": metrics, "counts": counts | found, "options": chosen}
    result |= {"text_report": read, "versions": versions() | {"device": device}}
    if accelerator.is_main_process:
        report(result, output)
    accelerator.wait_for_everyone()
    leave(0)


class Stopped(BaseException):
    """A signal to end; not an Exception, which libraries that try things out would swallow."""


SIGNALS: list[int] = []


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End in an orderly way: what is temporary is removed, no result is written."""
    SIGNALS.append(number)
    raise Stopped(number)


# ---- what is asked for -------------------------------------------------------------------------------------------


def choose(options: Options, saved: SavedModel) -> dict[str, Any]:
    """The options that decide the numbers, with defaults filled in; refuses those without effect on this model."""
    from lmscripts.evaluation import sums as evaluation

    kind = objectives.objective(saved.objective)
    why = f"on {kind.TITLE} ({saved.model_type})"
    given, chosen = vars(options), {"batch_size": options.batch_size, "precision": options.precision}
    chosen |= {"document_per_line": options.document_per_line}
    chosen |= {"text_column": options.text_column or "text"}
    chosen |= {n: given[n] for n in ("delimiter", "quotes", "input_format") if given[n] not in (None, True)}
    chosen["block_size"] = size = options.block_size or saved.longest
    if size is None:
        raise UserError(f"the configuration of {saved.name} does not say its longest input: give --block_size")
    if saved.longest is not None and size > saved.longest:
        raise UserError(f"--block_size {size} is longer than the {saved.longest} positions of {saved.name}")
    if kind.SCORES == "masks" and size < evaluation.SHORTEST_ROW:
        raise UserError(f"--block_size {size} is too short {why}: it must be at least {evaluation.SHORTEST_ROW}")
    if options.pseudo_perplexity and (kind.SCORES != "masks" or len(saved.models) > 1):
        raise UserError(f"--pseudo_perplexity has no effect {why}: it is for one masked language model")
    if kind.SCORES == "windows":
        check_useless(given, why, "mask_unit", "mask_probability")
        chosen["stride"] = stride = options.stride or size
        if stride > size:
            raise UserError(f"--stride {stride} is longer than --block_size {size}: tokens would be left out")
        return chosen
    check_useless(given, why, "stride", "line_ends")
    chosen |= {"mask_unit": options.mask_unit or "token", "mask_probability": options.mask_probability or 0.15}
    return chosen | {name: given[name] for name in ("pseudo_perplexity", "max_documents")}


def table_of(options: Options) -> TableOptions:
    """How tables of texts are read."""
    from lmscripts.text.records import corpus_table

    return corpus_table(options.text_column, options.delimiter, options.quotes, options.input_format)


def store_maker(options: Options, saved: SavedModel) -> Callable[[Path], TokenStore]:
    """What makes a store of the text, all of it, as the model reads it."""
    from lmscripts.data.preparation import Source, prepare_beside

    source = Source(
        options.input_file,
        saved.encoder.folder,
        validation_fraction=0.0,
        document_per_line=options.document_per_line,
        table=table_of(options),
        line_ends=options.line_ends if objectives.objective(saved.objective).SCORES == "windows" else "drop",
    )
    return partial(prepare_beside, source, num_workers=options.num_workers)


# ---- scores ------------------------------------------------------------------------------------------------------

Numbers = dict[str, float]
Scores = tuple[Numbers, Numbers]  # metrics and counts
Opened = tuple["Part", Any, Any]  # text, packed rows, tokenizer


def score_causal(
    accelerator: Accelerator, saved: SavedModel, opened: Opened, chosen: dict[str, Any], counts: Numbers
) -> Scores:
    """Loss, perplexity and bits per byte of documents under sliding windows."""
    from lmscripts.evaluation import scoring
    from lmscripts.objectives.causal import boundary_ids

    part, _, tokenizer = opened
    settings = {name: chosen[name] for name in ("block_size", "stride", "batch_size")}
    settings |= {"unknown_id": scoring.unknown_id(tokenizer), "progress": Progress(accelerator, "windows")}
    totals = scoring.score_causal(accelerator, saved.models[""], part, boundary_ids(tokenizer), **settings)
    found = {name: int(totals[name]) for name in ("targets", "windows")}
    found["unknown_tokens"] = int(totals["unknown"])
    sizes = {"bits_per_byte": int(counts["raw_bytes"]), "bits_per_text_byte": int(counts["text_bytes"])}
    metrics = scoring.per_target(totals, **sizes)
    return metrics | {"unknown_share": totals["unknown"] / totals["targets"]}, found


def score_masked(
    accelerator: Accelerator, saved: SavedModel, opened: Opened, chosen: dict[str, Any], counts: Numbers
) -> Scores:
    """What the family's objective measures on fixed masks; on demand the pseudo-perplexity."""
    from lmscripts.evaluation import scoring
    from lmscripts.objectives.masked import special_ids

    part, rows, tokenizer = opened
    masks = {"mask_unit": chosen["mask_unit"], "mask_probability": (chosen["mask_probability"],)}
    kind = objectives.objective(saved.objective)
    objective = objectives.trained(saved.objective, saved.family, saved.models, "sdpa", kind.Settings(**masks))
    settings = {"batch_size": chosen["batch_size"], "unknown_id": scoring.unknown_id(tokenizer)}
    progress = Progress(accelerator, "rows")
    metrics, targets = scoring.score_masks(accelerator, objective, rows, tokenizer, **settings, progress=progress)
    metrics["unknown_share"] = targets["unknown"] / targets["mlm"]
    found: Numbers = {"rows": rows.num_rows, "masked": int(targets["mlm"])}
    found["unknown_tokens"] = int(targets["unknown"])
    if "rtd" in targets:
        found["judged"] = int(targets["rtd"])
    if chosen["pseudo_perplexity"]:
        sizes = {**settings, "block_size": chosen["block_size"], "progress": Progress(accelerator, "masks")}
        sizes |= {"most_documents": chosen["max_documents"]}
        objective.eval()
        model = (objective.family, saved.models[""])
        totals = scoring.score_pseudo(accelerator, *model, part, special_ids(tokenizer), **sizes)
        metrics |= {f"pseudo_{name}": value for name, value in scoring.per_target(totals).items()}
        found |= {"pseudo_tokens": int(totals["targets"]), "pseudo_unknown_tokens": int(totals["unknown"])}
    return metrics, found


class Progress:
    """What `sums.Shown` shows, unless a signal came where no exception could be raised."""

    def __init__(self, accelerator: Accelerator, what: str) -> None:
        from lmscripts.evaluation.sums import Shown

        self.show = Shown(accelerator, what)

    def __call__(self, done: int, passes: int) -> None:
        """Called after each forward pass."""
        if SIGNALS:
            raise Stopped(SIGNALS[0])
        self.show(done, passes)


def notices(options: Options, store: TokenStore) -> list[str]:
    """What is to be known before the numbers: the precision, and what was read and repaired of the text."""
    from lmscripts.text.report import TextReport

    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    said = TextReport.from_dict(store.manifest["text"]).sentences()
    if launched in ("no", options.precision):
        return said
    return [
        f"the launch says mixed precision {launched}; the numbers are those of --precision {options.precision}",
        *said,
    ]


def say(text: str, stream: TextIO | None = None) -> None:
    """Print at once; a reader that has gone (`| head`) costs no result."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- the result --------------------------------------------------------------------------------------------------


def describe(saved: SavedModel) -> dict[str, Any]:
    """The model in plain values."""
    from lmscripts.models.building import num_parameters

    kind = getattr(objectives.objective(saved.objective), "KIND", saved.objective)
    facts: dict[str, Any] = {"name": saved.name, "type": saved.model_type, "kind": kind, "step": saved.step}
    facts |= {"parameters": num_parameters(saved.models), "weights_sha256": saved.weights}
    return facts | {"tokenizer": saved.encoder.description, "notices": saved.notices}


def check_finite(saved: SavedModel, metrics: Numbers, precision: str) -> None:
    """Refuse a number that is none; all processes have the same numbers and so agree."""
    for name, value in metrics.items():
        if not isfinite(value):
            raise UserError(f"{name} of {saved.name} is {value}: damaged weights, or {precision} is too coarse")


def report(result: dict[str, Any], output: Path | None) -> None:
    """Write the result down, then print it: also where it cannot be written, and where nobody reads what is printed."""
    from lmscripts.evaluation.result import as_json, remarks, table

    try:
        if output is not None:
            write_text(output, as_json(result))
    finally:
        say("\n".join([table(result), *remarks(result)]))
    if output is not None:
        say(f"the numbers are in {output}")


if __name__ == "__main__":
    main()
