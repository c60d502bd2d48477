"""The ways of `time_to_loss.py`: what each trains on and how."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from search import Recipe
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments
from turns import Watch

from lmscripts import objectives
from lmscripts.counters import stream_key
from lmscripts.data.packing import Layout
from lmscripts.data.steps import Phase, Prefetcher
from lmscripts.data.token_store import TokenStore
from lmscripts.models import families, pretrained
from lmscripts.objectives import masked
from lmscripts.options.presets import load_preset
from lmscripts.training.optim import build_optimizer

LENGTH = 128
PRESETS = Path(__file__).resolve().parent.parent / "parameter.json"
# Rows of a step: about 1,000 text tokens for each way, as a sentence is about 30.
ROWS = {"ours": 8, "ours_by_line": 8, "line_by_line": 32, "group_texts": 8}
WAYS = tuple(ROWS)
OURS = ("ours", "ours_by_line")
Lines = list[list[int]]


@dataclass(frozen=True)
class Material:
    """What the ways need.

    Attributes:
        stores: token stores of the training text for our ways: of documents, and of lines as documents.
        lines: ids of each training line, without special tokens.
        tokenizer: of transformers.
        seed: of everything random.
    """

    stores: dict[str, TokenStore]
    lines: Lines
    tokenizer: Any
    seed: int = 0

    def model(self, recipe: Recipe) -> Any:
        """A fresh model of the family's tiny preset, the same every time, and for both sides."""
        preset = load_preset(PRESETS, f"{recipe.model}-tiny", families.preset_keys())
        ids = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id)
        config = families.family(recipe.model).config(preset, len(self.tokenizer), Layout(LENGTH, "isolated", *ids))
        pretrained.set_dropout(config, recipe.dropout, 0.0)
        config._attn_implementation = "sdpa"
        torch.manual_seed(self.seed)
        return families.architectures(recipe.model, "masked")[""](config)


def settings_of(recipe: Recipe) -> masked.Settings:
    """Single tokens are masked, as the collator of transformers masks them."""
    return masked.Settings(mask_unit="token", mask_probability=(recipe.mask,))


def rows_of(recipe: Recipe) -> int:
    """Rows of a step."""
    return round(ROWS[recipe.way] * recipe.rows)


def our_data(material: Material, recipe: Recipe) -> Phase:
    """Packed rows."""
    settings, rows = settings_of(recipe), rows_of(recipe)
    train = masked.rows(material.stores[recipe.way], "train", material.tokenizer, LENGTH, "isolated", settings)
    if train is None:
        raise SystemExit("no training text")
    plan = masked.plan(material.tokenizer, train.layout, settings)
    return Phase(
        train=train,
        held_out=None,
        make=partial(masked.batches, plan=plan),
        slots=plan.slots,
        words="",
        seed=material.seed,
        batch_size=rows,
        shares=[rows],
        micro_batch_size=rows,
        total_rows=1_000_000 * rows,
        most_eval_rows=0,
    )


def trained(recipe: Recipe, network: Any) -> Any:
    """A model with the loss of run_pretraining.py."""
    family = families.family(recipe.model)
    return objectives.trained("masked", family, {"": network}, "sdpa", settings_of(recipe)).train()


def optimizer_of(recipe: Recipe, network: Any) -> torch.optim.Optimizer:
    """Ours, without decay."""
    adam = {"learning_rate": recipe.learning_rate, "betas": (0.9, 0.999), "epsilon": 1e-8}
    return build_optimizer(recipe.optimizer or "adamw", network, weight_decay=0.0, **adam)  # type: ignore[arg-type]


def train_ours(recipe: Recipe, material: Material, watch: Watch) -> None:
    """The loop of run_pretraining.py in one process, at a constant learning rate."""
    data, network = our_data(material, recipe), material.model(recipe)
    objective, optimizer = trained(recipe, network), optimizer_of(recipe, network)
    watch.start()
    batches = Prefetcher(data.step_batches(0, data.num_steps, 0))
    over = False
    while not over:
        micro_batches, counts = next(batches)
        torch.manual_seed(stream_key(material.seed, watch.steps, 0) >> 1)
        for batch in micro_batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                loss = objective(batch)["mlm"] / max(counts["mlm"], 1.0)
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.real_tokens += int(counts["tokens"])
        over = watch.after_step(network)
    batches.close()


def run_mlm_dataset(way: str, material: Material) -> Dataset:
    """What run_mlm trains on: each line cut to LENGTH, or all lines joined and cut into blocks of LENGTH."""
    begin, end = material.tokenizer.cls_token_id, material.tokenizer.sep_token_id
    if way == "line_by_line":
        rows = [[begin, *line[: LENGTH - 2], end] for line in material.lines]
    else:
        rows = []
        for start in range(0, len(material.lines), 1000):  # run_mlm groups within batches of 1,000 lines
            joined = list(chain.from_iterable([begin, *line, end] for line in material.lines[start : start + 1000]))
            rows += [joined[at : at + LENGTH] for at in range(0, len(joined) - LENGTH + 1, LENGTH)]
    special = {begin, end}
    return Dataset.from_dict(
        {
            "input_ids": rows,
            "token_type_ids": [[0] * len(row) for row in rows],
            "attention_mask": [[1] * len(row) for row in rows],
            "special_tokens_mask": [[int(number in special) for number in row] for row in rows],
        }
    )


class _Watching(TrainerCallback):
    """Scores in the course of `Trainer.train`."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        control.should_training_stop = self.watch.after_step(model)


def make_trainer(recipe: Recipe, dataset: Dataset, material: Material, watch: Watch, folder: str) -> Trainer:
    """Trainer as run_mlm makes it, at a constant learning rate."""
    collate = DataCollatorForLanguageModeling(material.tokenizer, mlm_probability=recipe.mask)
    special = set(material.tokenizer.all_special_ids)

    def counting(features: list[dict[str, Any]]) -> dict[str, Any]:
        watch.real_tokens += sum(number not in special for row in features for number in row["input_ids"])
        return collate(features)

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=rows_of(recipe),
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
        seed=material.seed,
    )
    return Trainer(material.model(recipe), arguments, counting, dataset, callbacks=[_Watching(watch)])


def train_theirs(recipe: Recipe, dataset: Dataset, material: Material, watch: Watch) -> None:
    """`Trainer.train`."""
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(recipe, dataset, material, watch, folder).train()
