"""Seconds until the same held-out bits per byte: GPT-2 here and with transformers' Trainer doing what run_clm does.

    python benchmarks/causal_time_to_loss.py --text wikitext2.valid.txt --held_out wikitext2.test.txt --work_dir work

On a machine that others use, put OMP_WAIT_POLICY=passive in front: threads then wait without burning time.

Both train the same GPT-2 (2 layers x 128, 2 heads) from the same weights, with the same byte-level BPE, on the same
text, 8 rows of 128 tokens a step, AdamW without decay, clipping at 1, dropout 0.1, at the same constant learning rates
(a); with `--best` (b), each as is best for it after the same search over its own options (`STAGES`), which is judged on
a part of the held-out text that the comparison does not score:

    ours         the loop of run_pretraining.py: documents isolated, each begun by <s>, its end predicted
    group_texts  Trainer: lines joined within 1,000 of them and cut into blocks of 128 (run_clm)

A run's clocks stand still while it is scored and while the other runs: they take turns of a few seconds. Each is scored
on the same held-out text, laid out as it trains: bits per byte = nats of all targets / ln 2 / bytes of the text. White
space around lines is taken away for both; a blank line between documents is two line feeds there, an end token here.
`group_texts` predicts neither the first token of a block nor what is left over; it is charged its mean for them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from search import Curve, Recipe, search
from time_to_loss import seconds_to, write_documents
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from turns import Turns, Watch

from lmscripts import objectives
from lmscripts.counters import stream_key
from lmscripts.data.preparation import Source, prepare_store
from lmscripts.data.steps import Phase, Prefetcher, fixed_batch
from lmscripts.data.stream import StreamRows
from lmscripts.models.families import gpt2
from lmscripts.models.fitting import fuse_activations
from lmscripts.objectives import causal
from lmscripts.objectives.module import Objective
from lmscripts.text.corpus import Span, read_documents
from lmscripts.text.report import TextReport
from lmscripts.training.optim import build_optimizer

LENGTH, ROWS = 128, 8
WAYS = ("ours", "group_texts")
MAKE = partial(causal.batches, plan=None)
RATES = dict.fromkeys(WAYS, (1e-3, 2e-3, 4e-3, 8e-3))
STAGES: list[tuple[str, dict[str, tuple[object, ...]]]] = [
    ("dropout", dict.fromkeys(WAYS, (0.0,))),
    ("learning_rate", RATES),
    ("optimizer", {"ours": ("muon",), "group_texts": ("adafactor", "adamw_torch")}),
    ("learning_rate", RATES),
    ("rows", dict.fromkeys(WAYS, (0.5, 2.0, 4.0))),
    ("bf16", dict.fromkeys(WAYS, (True,))),
]


@dataclass(frozen=True)
class Material:
    """What both ways need: tokenizer, rows of the text and of the held-out text, blocks of both, bytes to score."""

    tokenizer: Any
    rows: dict[str, StreamRows]
    blocks: dict[str, list[list[int]]]
    tokens: dict[str, int]
    bytes: dict[str, int]

    def model(self, recipe: Recipe) -> GPT2LMHeadModel:
        """A fresh model, the same every time."""
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_embd": 128, "n_head": 2, "n_positions": LENGTH}
        drops = {"resid_pdrop": recipe.dropout, "embd_pdrop": recipe.dropout}
        ids = {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.tokenizer.eos_token_id}
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(self.tokenizer), attn_pdrop=0.0, **drops, **sizes, **ids))


def prepare(options: argparse.Namespace) -> Material:
    """Token stores for ours, blocks for theirs."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_dir, local_files_only=True)
    rows, blocks, tokens, sizes = {}, {}, {}, {}
    options.work_dir.mkdir(parents=True, exist_ok=True)
    held_out = list(read_documents([Span(str(options.held_out))], TextReport()))
    ends = np.cumsum([sum(len(line.encode()) + 1 for line in document) for document in held_out])
    first, last = (int(np.searchsorted(ends, n * options.held_out_kilobytes * 1000)) + 1 for n in (1, 2))
    if options.best and first == last:
        raise SystemExit("give more --held_out text, of which one part tunes, or fewer --held_out_kilobytes")
    parts = {"train": list(read_documents([Span(str(options.text))], TextReport())), "held_out": held_out[:first]}
    for name, documents in (parts | ({"tuning": held_out[first:last]} if options.best else {})).items():
        text = options.work_dir / f"{name}.txt"
        write_documents(text, documents)
        source = Source((str(text),), options.tokenizer_dir, validation_fraction=0.0)
        store = prepare_store(source, options.work_dir / f"store_{name}", num_workers=1)
        rows[name] = causal.rows(store, "train", tokenizer, LENGTH, "isolated", causal.Settings())
        lines = text.read_text(encoding="utf-8").splitlines(keepends=True)  # run_clm keeps line breaks
        ids = tokenizer(lines, add_special_tokens=False)["input_ids"]
        blocks[name], tokens[name], sizes[name] = [], sum(map(len, ids)), text.stat().st_size
        for start in range(0, len(ids), 1000):
            joined = list(chain.from_iterable(ids[start : start + 1000]))
            blocks[name] += [joined[at : at + LENGTH] for at in range(0, len(joined) - LENGTH + 1, LENGTH)]
    return Material(tokenizer, rows, blocks, tokens, sizes)


def trained(model: GPT2LMHeadModel) -> Objective:
    """A model with the loss of run_pretraining.py."""
    return objectives.trained("causal", gpt2, {"": model}, "sdpa", causal.Settings())


class Score:
    """Bits per byte of the held-out text, as each way lays it out."""

    def __init__(self, way: str, material: Material, part: str) -> None:
        self.way, self.material, self.part = way, material, part

    @torch.no_grad()
    def __call__(self, model: GPT2LMHeadModel) -> float:
        """The score of a model, which is left in the mode it had."""
        was_training, material = model.training, self.material
        model.eval()
        nats = self._ours(model) if self.way == "ours" else self._blocks(model)
        model.train(was_training)
        return nats / math.log(2) / material.bytes[self.part]

    def _ours(self, model: GPT2LMHeadModel) -> float:
        rows, objective = self.material.rows[self.part], trained(model).eval()
        total = 0.0
        for start in range(0, rows.num_rows, 64):
            batch, _ = fixed_batch(rows, MAKE, np.arange(start, min(start + 64, rows.num_rows)))
            total += float(objective(batch)["clm_entropy"])
        return total

    def _blocks(self, model: GPT2LMHeadModel) -> float:
        blocks = torch.tensor(self.material.blocks[self.part])
        total = 0.0
        for part in blocks.split(64):
            logits: Tensor = model(input_ids=part, use_cache=False).logits[:, :-1]
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        return total / (len(blocks) * (LENGTH - 1)) * self.material.tokens[self.part]


def train_ours(material: Material, recipe: Recipe, watch: Watch) -> None:
    """The loop of run_pretraining.py in one process, at a constant learning rate."""
    num_rows = round(ROWS * recipe.rows)
    data = Phase(
        train=material.rows["train"],
        held_out=None,
        make=MAKE,
        slots=LENGTH,
        words="",
        seed=0,
        batch_size=num_rows,
        shares=[num_rows],
        micro_batch_size=num_rows,
        total_rows=1_000_000 * num_rows,
        most_eval_rows=0,
    )
    network = material.model(recipe)
    fuse_activations(network)
    objective = trained(network).train()
    adam = {"learning_rate": recipe.learning_rate, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.0}
    optimizer = build_optimizer(recipe.optimizer or "adamw", network, **adam)
    watch.start()
    batches = Prefetcher(data.step_batches(0, data.num_steps, 0))
    over = False
    while not over:
        micro_batches, counts = next(batches)
        torch.manual_seed(stream_key(0, watch.steps, 0) >> 1)
        for batch in micro_batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                loss = objective(batch)["clm"] / counts["clm"]
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.real_tokens += int(counts["tokens"])
        over = watch.after_step(network)
    batches.close()


class _Watching(TrainerCallback):
    """Scores in the course of `Trainer.train`."""

    def __init__(self, watch: Watch, num_rows: int) -> None:
        self.watch, self.num_rows = watch, num_rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: GPT2LMHeadModel, **_: Any) -> None:
        self.watch.real_tokens += self.num_rows * LENGTH
        control.should_training_stop = self.watch.after_step(model)


def train_theirs(material: Material, recipe: Recipe, watch: Watch) -> None:
    """`Trainer.train` as run_clm calls it, at a constant learning rate."""
    num_rows, rows = round(ROWS * recipe.rows), material.blocks["train"]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * LENGTH] * len(rows), "labels": rows})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=num_rows,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="constant",
            bf16=recipe.bf16,
            **({"optim": recipe.optimizer} if recipe.optimizer else {}),
            max_steps=1_000_000,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        model, callbacks = material.model(recipe), [_Watching(watch, num_rows)]
        Trainer(model, arguments, default_data_collator, dataset, callbacks=callbacks).train()


def race(
    plan: list[Recipe],
    *,
    material: Material,
    part: str,
    minutes: float,
    first_score: float = 2.0,
    options: argparse.Namespace,
) -> list[Curve]:
    """Train recipes in turns; the curve of each, from its `first_score`th second of training on."""
    turns = Turns(len(plan), options.turn_seconds)
    watches = [
        Watch(Score(recipe.way, material, part), 60 * minutes, turns, number, due=first_score)
        for number, recipe in enumerate(plan)
    ]
    ways = {"ours": train_ours, "group_texts": train_theirs}
    jobs = [partial(ways[recipe.way], material, recipe, watch) for recipe, watch in zip(plan, watches, strict=True)]
    turns.run(jobs, options.threads)
    return [watch.curve for watch in watches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="blank lines between documents")
    parser.add_argument("--held_out", type=Path, required=True, help="text of the same kind to score on")
    parser.add_argument("--tokenizer_dir", type=Path, required=True, help="of train_tokenizer.py --objective causal")
    parser.add_argument("--work_dir", type=Path, required=True, help="for the token stores")
    parser.add_argument("--held_out_kilobytes", type=float, default=150.0, help="of the held-out text to score on")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training per run")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3])
    parser.add_argument("--best", action="store_true", help="compare the best of each way after the same search")
    parser.add_argument("--search_share", type=float, default=0.3, help="of --minutes that each that is tried gets")
    parser.add_argument("--turn_seconds", type=float, default=3.0, help="of a run before the next has its turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "causal_time_to_loss.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    material = prepare(options)
    plan, tried = [Recipe(way, rate, "gpt2") for rate in options.rates for way in WAYS], list[dict[str, Any]]()
    if options.best:
        minutes = options.search_share * options.minutes
        ends = partial(race, part="tuning", minutes=minutes, first_score=math.inf)  # of a trial the end counts
        tune = partial(ends, material=material, options=options)
        best_of, tried = search({way: Recipe(way, model="gpt2") for way in WAYS}, STAGES, tune)
        plan = list(best_of.values())
    curves = race(plan, material=material, part="held_out", minutes=options.minutes, options=options)
    runs = [asdict(recipe) | {"curve": curve} for recipe, curve in zip(plan, curves, strict=True)]
    print("way           rate     steps  real tokens/s  best bits/byte")
    for run in runs:
        last, low = run["curve"][-1], min(point["loss"] for point in run["curve"])
        speed = last["real_tokens"] / last["wall"]
        print(f"{run['way']:<13} {run['learning_rate']:<7g} {last['steps']:>6,} {speed:>14,.0f} {low:>14.4f}")
    best = {way: min(p["loss"] for run in runs if run["way"] == way for p in run["curve"]) for way in WAYS}
    summary = {"best_bits_per_byte": best}
    target = max(best.values())  # what both reach
    for clock in ("wall", "cpu"):
        seconds = {
            way: min(seconds_to(run["curve"], target, clock) for run in runs if run["way"] == way) for way in WAYS
        }
        ratio = seconds["group_texts"] / seconds["ours"]
        summary[clock] = {**{way: round(value, 1) for way, value in seconds.items()}, "ratio": round(ratio, 2)}
        print(f"{clock} seconds to {target:.4f} bits per byte: {summary[clock]}")
    result = {
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tuning": tried,
        "runs": runs,
        "summary": summary,
    }
    options.result.parent.mkdir(exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
