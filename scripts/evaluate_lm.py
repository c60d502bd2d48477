"""Evaluate a saved language model on text: loss, perplexity, bits per byte, accuracy.

python scripts/evaluate_lm.py --model_dir runs/gpt2 --input_file held_out.txt --output_file result.json

Causal models (GPT-2 and whatever AutoModelForCausalLM loads): every document by itself, every token and its end once.
BERT and RoBERTa: loss and accuracy on fixed masks; --pseudo_perplexity masks every token once. ELECTRA: both halves.
Runs under `accelerate launch` too. A model without trained weights is refused, one that was never trained is named.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from lmscripts.config import option, parse_options
from lmscripts.errors import UserError, leave, user_errors
from lmscripts.files import file_sha256, write_text
from lmscripts.option_checks import check_numbers, check_useless

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.saved_models import SavedModel
    from lmscripts.token_store import Part


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model_dir: str = option(help="model folder, checkpoint, folder of a run, or a Hub name", required=True)
    input_file: tuple[str, ...] = option((), help="text files, globs or folders", required=True)
    output_file: str | None = option(None, help="JSON file for the result; replaced only by a whole result")
    tokenizer_dir: str | None = option(None, help="tokenizer, if the model folder has none")
    generator_dir: str | None = option(None, help="ELECTRA: the generator, if it is not in generator/")
    require_trained: bool = option(False, help="make it an error if the model was never trained")

    document_per_line: bool = option(False, help=".txt files hold one document a line, not one sentence", group="text")
    text_column: str = option("text", help="column of tables and JSON lines that holds the text", group="text")
    line_ends: Literal["keep", "drop"] | None = option(
        None, help="causal: line feeds between the lines of a document; default: as prepare_corpus.py", group="text"
    )
    num_workers: int = option(1, help="processes that tokenise", group="text")

    block_size: int | None = option(None, help="tokens of an input; default: the model's longest", group="scores")
    stride: int | None = option(
        None, help="causal: tokens from one window to the next; default: block_size, the quickest", group="scores"
    )
    mask_unit: Literal["token", "word", "span"] | None = option(
        None, help="masked: tokens (default), whole words or spans", group="scores"
    )
    mask_probability: float | None = option(None, help="masked: share to predict (0.15)", group="scores")
    pseudo_perplexity: bool = option(False, help="masked: also mask every token once, a row each", group="scores")
    max_documents: int | None = option(None, help="of --pseudo_perplexity: the first documents only", group="scores")
    batch_size: int = option(8, help="full inputs of one forward pass on one process", group="scores")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", help="of the matrix products", group="scores")
    cpu_threads: int = option(
        1, help="threads of a process without a GPU; the last digits depend on it", group="scores"
    )

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is done."""
        names = ("num_workers", "block_size", "stride", "max_documents", "batch_size", "cpu_threads")
        check_numbers(vars(self), positive=names)
        if not self.pseudo_perplexity:
            check_useless(vars(self), "without --pseudo_perplexity", "max_documents")
        if self.mask_probability is not None and not 0 < self.mask_probability < 1:
            raise UserError(f"--mask_probability must lie between 0 and 1, got {self.mask_probability}")


RENAMED = {"sequence_length": "block_size", "ckpt_path": "model_dir", "test_file": "input_file"}


def main() -> None:
    """Parse, evaluate, write."""
    options = parse_options(Options, description=__doc__ or "", renamed=RENAMED)
    try:
        with user_errors():
            evaluate(options)
    except Stopped as stopped:
        print(f"stopped by {signal.Signals(stopped.args[0]).name}; no result was written", file=sys.stderr)
        leave(128 + stopped.args[0])


def evaluate(options: Options) -> None:
    """Load and check everything, score, then print and write the result; ends the process."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, stop)
    output = open_output(options.output_file)
    import torch
    from transformers import AutoTokenizer, logging

    from lmscripts import distributed, evaluation, saved_models
    from lmscripts.preparation import Source
    from lmscripts.pretraining import open_family_rows
    from lmscripts.tracking import versions

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--precision fp16 needs a GPU, and this machine shows none: take fp32 or bf16")
    files, text = read_text(options)
    saved = saved_models.open_model(options.model_dir, options.generator_dir, options.tokenizer_dir)
    chosen = choose(options, saved)
    if saved.untrained and options.require_trained:
        raise UserError(
            f"{saved.name} was never trained ({'; '.join(saved.untrained)}), and --require_trained is given"
        )

    source = Source(
        tuple(map(str, files)),
        saved.encoder.folder,
        validation_fraction=0.0,
        document_per_line=options.document_per_line,
        text_column=options.text_column,
        line_ends=options.line_ends if saved.kind == "causal" else "drop",
    )
    with evaluation.temporary_store(source, options.num_workers) as store:
        tokenizer, rows = AutoTokenizer.from_pretrained(store.tokenizer_dir, local_files_only=True), None
        if saved.kind != "causal":
            rows = open_family_rows(store, "train", saved.family, tokenizer, chosen["block_size"], "isolated")
        accelerator = distributed.start_processes(mixed_precision=options.precision.replace("fp32", "no"))
        if (device := accelerator.device.type) == "cpu":
            torch.set_num_threads(options.cpu_threads)
            device = f"cpu, {options.cpu_threads} thread{'s' * (options.cpu_threads > 1)} per process"
        distributed.check_agreement({"the text": store.fingerprint, "the model": saved.weights, "options": chosen})
        accelerator.print("".join(f"{notice}\n" for notice in saved.notices), end="", flush=True)
        for model in saved.models.values():
            model.to(accelerator.device)
        counts = {name: store.manifest["parts"]["train"][name] for name in ("documents", "tokens", "text_bytes")}
        counts["raw_bytes"] = sum(file["bytes"] for file in text)
        score = score_causal if saved.kind == "causal" else score_masked
        metrics, found = score(accelerator, saved, (store.part("train"), rows, tokenizer), chosen, counts)
        check_finite(saved, metrics, options.precision)
        chosen["line_ends"] = store.manifest["options"].get("line_ends", "drop")
    result = {"model": describe(saved), "untrained": bool(saved.untrained), "untrained_because": saved.untrained}
    result |= {"text": text, "metrics": metrics, "counts": counts | found, "options": chosen}
    result["versions"] = versions() | {"device": device}
    if accelerator.is_main_process:
        report(result, saved, output)
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


def open_output(name: str | None) -> Path | None:
    """The file for the result, where one can be written: better said now than after hours."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"--output_file {path} is a folder: give the name of a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output_file {path} cannot be written: {path.parent} is no folder that may be written to")
    return path


def read_text(options: Options) -> tuple[list[Path], list[dict[str, Any]]]:
    """The files with their sizes and hashes; refuses a text without a document."""
    from lmscripts.corpus import Span, TextReport, find_files, read_documents
    from lmscripts.evaluation import raw_text_bytes

    files = find_files(options.input_file)
    sizes = raw_text_bytes(files, options.text_column)
    spans = [Span(str(path)) for path in files]
    form: dict[str, Any] = {"document_per_line": options.document_per_line, "text_column": options.text_column}
    if next(read_documents(spans, TextReport(), **form), None) is None:
        raise UserError(
            f"{' '.join(map(str, files))} holds no text: {sum(sizes)} bytes, not one line that is not empty"
        )
    facts = [
        {"file": path.name, "bytes": size, "sha256": file_sha256(path)} for path, size in zip(files, sizes, strict=True)
    ]
    return files, facts


def choose(options: Options, saved: SavedModel) -> dict[str, Any]:
    """The options that decide the numbers, with defaults filled in; refuses those without effect on this model."""
    kinds = {"causal": "a causal model", "masked": "a masked language model", "electra": "ELECTRA's pair"}
    why = f"on {kinds[saved.kind]} ({saved.model_type})"
    given, chosen = vars(options), {"batch_size": options.batch_size, "precision": options.precision}
    chosen |= {name: given[name] for name in ("document_per_line", "text_column")}
    chosen["block_size"] = size = options.block_size or saved.longest
    if size is None:
        raise UserError(f"the configuration of {saved.name} does not say its longest input: give --block_size")
    if saved.longest is not None and size > saved.longest:
        raise UserError(f"--block_size {size} is longer than the {saved.longest} positions of {saved.name}")
    if options.pseudo_perplexity and saved.kind != "masked":
        raise UserError(f"--pseudo_perplexity has no effect {why}: it is for one masked language model")
    if saved.kind == "causal":
        check_useless(given, why, "mask_unit", "mask_probability")
        chosen["stride"] = stride = options.stride or size
        if stride > size:
            raise UserError(f"--stride {stride} is longer than --block_size {size}: tokens would be left out")
        return chosen
    check_useless(given, why, "stride", "line_ends")
    chosen |= {"mask_unit": options.mask_unit or "token", "mask_probability": options.mask_probability or 0.15}
    return chosen | {name: given[name] for name in ("pseudo_perplexity", "max_documents")}


# ---- scores ------------------------------------------------------------------------------------------------------

Numbers = dict[str, float]
Scores = tuple[Numbers, Numbers]  # metrics and counts
Opened = tuple["Part", Any, Any]  # text, packed rows, tokenizer


def score_causal(
    accelerator: Accelerator, saved: SavedModel, opened: Opened, chosen: dict[str, Any], counts: Numbers
) -> Scores:
    """Loss, perplexity and bits per byte of documents under sliding windows."""
    from lmscripts import scoring
    from lmscripts.causal import boundary_ids

    part, _, tokenizer = opened
    sizes = {name: chosen[name] for name in ("block_size", "stride", "batch_size")}
    progress = Progress(accelerator, "windows")
    totals = scoring.score_causal(
        accelerator, saved.models[""], part, boundary_ids(tokenizer), **sizes, progress=progress
    )
    found = {name: int(totals[name]) for name in ("targets", "windows")}
    return scoring.per_text(totals, int(counts["raw_bytes"]), int(counts["text_bytes"])), found


def score_masked(
    accelerator: Accelerator, saved: SavedModel, opened: Opened, chosen: dict[str, Any], counts: Numbers
) -> Scores:
    """What the family's objective measures on fixed masks; on demand the pseudo-perplexity."""
    from lmscripts import objectives, scoring
    from lmscripts.pretraining import special_ids

    part, rows, tokenizer = opened
    if saved.kind == "electra":
        objective = objectives.build("electra", saved.models, "sdpa")
    else:
        objective = objectives.MaskedLanguageModel(saved.models[""], saved.family, "sdpa")
    masks = {"unit": chosen["mask_unit"], "probability": chosen["mask_probability"]}
    masks |= {"batch_size": chosen["batch_size"], "progress": Progress(accelerator, "rows")}
    metrics, targets = scoring.score_masks(accelerator, objective, rows, tokenizer, **masks)
    found: Numbers = {"rows": rows.num_rows, "masked": int(targets["mlm"])}
    if saved.kind == "electra":
        found["judged"] = int(targets["rtd"])
    if chosen["pseudo_perplexity"]:
        sizes = {"block_size": chosen["block_size"], "batch_size": chosen["batch_size"]}
        sizes |= {"most_documents": chosen["max_documents"], "progress": Progress(accelerator, "masks")}
        objective.eval()
        model = (objective.family, saved.models[""])
        totals = scoring.score_pseudo(accelerator, *model, part, special_ids(tokenizer), **sizes)
        metrics |= scoring.pseudo_metrics(totals)
        found["pseudo_tokens"] = int(totals["targets"])
    return metrics, found


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere; of the main process."""

    def __init__(self, accelerator: Accelerator, what: str) -> None:
        self.shown, self.what, self.said, self.bar = accelerator.is_main_process, what, time.monotonic(), None

    def __call__(self, done: int, passes: int) -> None:
        """Called after each forward pass."""
        if SIGNALS:  # one that came where no exception can be raised
            raise Stopped(SIGNALS[0])
        if not self.shown:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = self.bar or tqdm(total=passes, desc=self.what)
            self.bar.update()
            if done == passes:
                self.bar.close()
        elif time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            print(f"{self.what}: {done:,} of {passes:,} forward passes", file=sys.stderr, flush=True)


# ---- the result --------------------------------------------------------------------------------------------------


def describe(saved: SavedModel) -> dict[str, Any]:
    """The model in plain values."""
    from lmscripts.models import num_parameters

    facts: dict[str, Any] = {"name": saved.name, "type": saved.model_type, "kind": saved.kind, "step": saved.step}
    facts |= {"parameters": num_parameters(saved.models), "weights_sha256": saved.weights}
    return facts | {"tokenizer": saved.encoder.description}


def check_finite(saved: SavedModel, metrics: Numbers, precision: str) -> None:
    """Refuse a number that is none; all processes have the same numbers and so agree."""
    for name, value in metrics.items():
        if not isfinite(value):
            raise UserError(f"{name} of {saved.name} is {value}: damaged weights, or {precision} is too coarse")


def report(result: dict[str, Any], saved: SavedModel, output: Path | None) -> None:
    """Print the result and write it down."""
    print(table(result, saved))
    if output is not None:
        write_text(output, json.dumps(result, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
        print(f"the numbers are in {output}")


def table(result: dict[str, Any], saved: SavedModel) -> str:
    """The result for people."""
    step = "" if saved.step is None else f", step {saved.step:,}"
    size = sum(file["bytes"] for file in result["text"])
    lines = [("model", f"{saved.name}: {saved.model_type}{step}, {result['model']['parameters']:,} parameters")]
    lines += [(f"  {name}", f"sha256 {digest}") for name, digest in saved.weights.items()]
    lines += [("tokenizer", saved.encoder.description)]
    lines += [("text", f"{len(result['text'])} files, {size:,} bytes")]
    lines += [("options", ", ".join(f"{name} {value}" for name, value in result["options"].items()))]
    lines += [(name.replace("_", " "), f"{count:,}") for name, count in result["counts"].items()]
    shares = ("accuracy", "precision", "recall")
    for name, value in result["metrics"].items():
        lines.append((name.replace("_", " "), f"{value:.2%}" if name.endswith(shares) else f"{value:.4f}"))
    if saved.untrained:
        lines.append(
            ("UNTRAINED", f"THIS MODEL WAS NEVER TRAINED; the numbers are chance: {'; '.join(saved.untrained)}")
        )
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)


if __name__ == "__main__":
    main()
