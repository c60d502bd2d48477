"""Seconds until the same held-out loss: lmscripts against transformers' Trainer doing what run_mlm does.

    python benchmarks/time_to_loss.py --text corpus.txt --tokenizer_dir tokenizer --work_dir work

On a machine that others use, put OMP_WAIT_POLICY=passive in front: threads then wait without burning time.

Four ways train the same BERT (2 layers x 128, 2 heads, ffn 512) from the same weights on the same documents, each at
the same rates (a); with `--best` (b), each as is best for it after the same search over its own options (`STAGES`),
models of both families and the same size open to all:

    ours          the loop of run_pretraining.py: packed rows of 128, logits at masked tokens only
    ours_by_line  the same on a store made with --document_per_line: no sentence sees another, as in line_by_line
    line_by_line  Trainer, a sentence a row, padded to the longest of the batch (run_mlm --line_by_line)
    group_texts   Trainer, sentences joined and cut into blocks of 128 (run_mlm without it)

All mask 15 % of the tokens, single ones; three constant learning rates per way, about 1,000 text tokens a step, AdamW
without decay, clipping at 1, dropout 0.1 (none in attention), two threads. Each run lasts `--minutes` of training; its
clocks stand still while it is scored and while others run: all runs take turns of a few seconds, so that other work on
the machine meets them alike. The score is the masked-token cross-entropy on the same masked sentences of held-out
documents, one a row. The target is the best loss that the slowest way reaches; how long each way took to get there is
interpolated between scorings. Tokenising is not part of the training time and is printed apart. `--tuning` scores on
other held-out sentences: settings are chosen there, by hand or by `--best`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from phases import phases
from search import Curve, Recipe, search
from transformers import AutoTokenizer
from turns import Scorer, Turns, Watch
from ways import LENGTH, OURS, ROWS, WAYS, Lines, Material, run_mlm_dataset, train_ours, train_theirs

from lmscripts.data.preparation import Source, prepare_store
from lmscripts.data.token_store import in_validation
from lmscripts.text.corpus import Span, read_documents
from lmscripts.text.report import TextReport

HELD_OUT = 0.02
SENTENCES = 1_000
Run = dict[str, object]
THEIRS = tuple(way for way in WAYS if way not in OURS)
RATES = dict.fromkeys(WAYS, (1e-3, 2e-3, 4e-3, 8e-3))
# What each way tries, in this order. Trainer has no Muon; bfloat16 is open to all.
STAGES: list[tuple[str, dict[str, tuple[object, ...]]]] = [
    ("model", dict.fromkeys(WAYS, ("bert", "modernbert"))),
    ("dropout", dict.fromkeys(WAYS, (0.0,))),
    ("learning_rate", RATES),
    ("optimizer", dict.fromkeys(OURS, ("muon",)) | dict.fromkeys(THEIRS, ("adafactor", "adamw_torch"))),
    ("learning_rate", RATES),
    ("rows", dict.fromkeys(WAYS, (0.5, 2.0, 4.0))),
    ("mask", dict.fromkeys(WAYS, (0.3,))),
    ("bf16", dict.fromkeys(WAYS, (True,))),
]


def prepare(options: argparse.Namespace) -> tuple[Material, Lines, dict[str, float]]:
    """Sample documents, tokenise them both ways (kept in the work folder); the material, held-out lines and times."""
    sample = options.work_dir / f"text_{options.megabytes}.txt"
    options.work_dir.mkdir(parents=True, exist_ok=True)
    documents = list(read_documents([Span(str(options.text))], TextReport()))
    random.Random(0).shuffle(documents)
    sizes = np.cumsum([sum(len(line.encode()) + 1 for line in document) for document in documents])
    documents = documents[: int(np.searchsorted(sizes, options.megabytes * 1e6)) + 1]
    write_documents(sample, documents)
    train_only = options.work_dir / f"train_{options.megabytes}.txt"
    write_documents(train_only, [document for document in documents if not in_validation(document, HELD_OUT)])
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_dir, local_files_only=True)
    cache = options.work_dir / f"lines_{options.megabytes}.npz"
    began, times = time.perf_counter(), {}
    source = Source((str(sample),), options.tokenizer_dir, validation_fraction=HELD_OUT)
    stores = {"ours": prepare_store(source, options.work_dir / f"store_{options.megabytes}", num_workers=1)}
    if not cache.exists():
        times["ours"] = time.perf_counter() - began
        texts = [line for document in documents for line in document]
        held_out = np.repeat([in_validation(d, HELD_OUT) for d in documents], [len(d) for d in documents])
        began = time.perf_counter()
        ids: Lines = []
        for start in range(0, len(texts), 1000):
            ids += tokenizer(texts[start : start + 1000], add_special_tokens=False, verbose=False)["input_ids"]
        times["transformers"] = time.perf_counter() - began
        lengths = [len(line) for line in ids]
        np.savez(cache, ids=np.concatenate(ids), lengths=lengths, held_out=held_out, times=json.dumps(times))
    with np.load(cache) as saved:
        lines = [row.tolist() for row in np.split(saved["ids"].astype(np.int64), np.cumsum(saved["lengths"])[:-1])]
        held_out, times = saved["held_out"], json.loads(str(saved["times"]))
    source = Source((str(train_only),), options.tokenizer_dir, validation_fraction=0.0, document_per_line=True)
    stores["ours_by_line"] = prepare_store(source, options.work_dir / f"lines_{options.megabytes}", num_workers=1)
    train = [line for line, out in zip(lines, held_out, strict=True) if line and not out]
    material = Material(stores, train, tokenizer)
    return material, [line for line, out in zip(lines, held_out, strict=True) if line and out], times


def write_documents(file: Path, documents: list[list[str]]) -> None:
    """A sentence a line, a blank line between documents."""
    file.write_text("\n".join("".join(f"{line}\n" for line in document) for document in documents), encoding="utf-8")


def seconds_to(curve: list[dict[str, float]], target: float, clock: str) -> float:
    """When a run first reached a loss, linear between scorings; infinity if it never did."""
    for before, after in zip([None, *curve], curve):
        if after["loss"] <= target:
            if before is None:
                return after[clock]
            share = (before["loss"] - target) / (before["loss"] - after["loss"])
            return before[clock] + share * (after[clock] - before[clock])
    return float("inf")


def summarise(runs: list[Run], targets_of: tuple[str, ...]) -> dict[str, object]:
    """For the best loss of each of the given ways: how long every way took with its best learning rate."""
    ways = [way for way in WAYS if any(run["way"] == way for run in runs)]
    best = {way: min(p["loss"] for run in runs if run["way"] == way for p in run["curve"]) for way in ways}
    summary: dict[str, object] = {"best_loss": best}
    for way in targets_of:
        table = {}
        for clock in ("wall", "cpu"):
            seconds = {
                other: min(
                    (round(seconds_to(run["curve"], best[way], clock), 2), run["learning_rate"])
                    for run in runs
                    if run["way"] == other
                )
                for other in ways
            }
            seconds = {other: pair for other, pair in seconds.items() if pair[0] < float("inf")}
            ratios = {
                f"{other} / {our}": round(seconds[other][0] / seconds[our][0], 2)
                for other in seconds
                for our in seconds
                if our in OURS and other not in OURS
            }
            table[clock] = {"seconds_and_rate": seconds, "ratios": ratios}
        summary[f"to the best loss of {way} ({best[way]:.3f})"] = table
    return summary


def show(result: dict[str, object]) -> None:
    """Print the tables."""
    print("\nway           rate     steps  real tokens/s  best loss  seconds")
    for run in result["runs"]:
        last, low = run["curve"][-1], min(point["loss"] for point in run["curve"])
        speed = last["real_tokens"] / last["wall"]
        head = f"{run['way']:<13} {run['learning_rate']:<7g} {last['steps']:>6,}"
        print(f"{head} {speed:>14,.0f} {low:>10.3f} {last['wall']:>8.0f}")
    for name, table in result["summary"].items():
        print(f"\n{name}")
        for key, value in table.items():
            print(f"  {key}: {value}")
    print("\nmicroseconds per real token")
    for way, spent in result["phases"].items():
        print(f"{way:<13}", "  ".join(f"{name} {value}" for name, value in spent.items()))


def race(
    plan: list[Recipe],
    *,
    material: Material,
    datasets: dict[str, Dataset],
    score: Scorer,
    minutes: dict[str, float],
    first_score: float = 2.0,
    options: argparse.Namespace,
) -> list[Curve]:
    """Train recipes in turns; the curve of each, from its `first_score`th second of training on."""
    turns = Turns(len(plan), options.turn_seconds)
    limits = [60 * minutes[recipe.way] for recipe in plan]
    watches = [Watch(score, limit, turns, number, due=first_score) for number, limit in enumerate(limits)]

    def job(recipe: Recipe, watch: Watch) -> None:
        if recipe.way in OURS:
            train_ours(recipe, material, watch)
        else:
            train_theirs(recipe, datasets[recipe.way], material, watch)
        print(f"{recipe.words()}: {watch.curve[-1]}", flush=True)

    turns.run([partial(job, *pair) for pair in zip(plan, watches, strict=True)], options.threads)
    return [watch.curve for watch in watches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a sentence a line, blank lines between documents")
    parser.add_argument("--tokenizer_dir", type=Path, required=True, help="WordPiece, about 8,192 entries")
    parser.add_argument("--work_dir", type=Path, required=True, help="for the sampled text, its store and its ids")
    parser.add_argument("--megabytes", type=float, default=20.0, help="of text, whole documents at random")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training per run")
    parser.add_argument("--ours_minutes", type=float, default=2.0, help="the same for ours, which needs less")
    for way in WAYS:
        parser.add_argument(f"--{way}_rates", type=float, nargs="*", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--turn_seconds", type=float, default=3.0, help="of a run before the next has its turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--best", action="store_true", help="compare the best of each way after the same search")
    parser.add_argument("--search_share", type=float, default=0.3, help="of its minutes that each that is tried gets")
    parser.add_argument("--tuning", action="store_true", help="score on the held-out sentences kept for tuning")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "time_to_loss.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    material, held_out, times = prepare(options)
    random.Random(1).shuffle(held_out)
    sentences = held_out[SENTENCES : 2 * SENTENCES] if options.tuning else held_out[:SENTENCES]
    score = Scorer(sentences, material.tokenizer, LENGTH)
    datasets = {way: run_mlm_dataset(way, material) for way in WAYS if way not in OURS}
    print(f"{len(material.lines):,} lines to train on, {score.targets:,} masked tokens to score", flush=True)
    minutes = dict.fromkeys(WAYS, options.minutes) | dict.fromkeys(OURS, options.ours_minutes)
    result: dict[str, object] = {
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {"minutes": minutes, "rows_of_a_step": ROWS, "megabytes": options.megabytes},
        "seconds_to_tokenise": {name: round(value, 1) for name, value in times.items()},
    }
    rates = {way: getattr(options, f"{way}_rates") for way in WAYS}
    longest = max(map(len, rates.values()))
    plan = [Recipe(way, rates[way][n]) for n in range(longest) for way in WAYS if n < len(rates[way])]
    if options.best:
        chosen = Scorer(held_out[SENTENCES : 2 * SENTENCES], material.tokenizer, LENGTH)
        limits = {way: options.search_share * most for way, most in minutes.items()}
        ends = partial(race, score=chosen, minutes=limits, first_score=math.inf)  # of a trial the end counts
        tune = partial(ends, material=material, datasets=datasets, options=options)
        best, result["tuning"] = search({way: Recipe(way) for way in WAYS if rates[way]}, STAGES, tune)
        plan = list(best.values())
    curves = race(plan, material=material, datasets=datasets, score=score, minutes=minutes, options=options)
    runs: list[Run] = [asdict(recipe) | {"curve": curve} for recipe, curve in zip(plan, curves, strict=True)]
    result["runs"] = runs
    of_way = {recipe.way: recipe for recipe in reversed(plan)}
    result["phases"] = {way: phases(r, material, datasets.get(way), num_steps=20) for way, r in of_way.items()}
    result["summary"] = summarise(runs, tuple(way for way in WAYS if way not in OURS and rates[way]))
    options.result.parent.mkdir(exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)


if __name__ == "__main__":
    main()
