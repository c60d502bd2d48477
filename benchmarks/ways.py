"""The ways of `time_to_loss.py`: what each trains on and how."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from turns import Watch

from lmscripts import objectives
from lmscripts.counters import stream_key
from lmscripts.data.steps import Phase, Prefetcher
from lmscripts.data.token_store import TokenStore
from lmscripts.models.families import bert
from lmscripts.objectives import masked
from lmscripts.training.optim import build_optimizer

LENGTH = 128
SETTINGS = masked.Settings(mask_unit="token", mask_probability=(0.15,))
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
        config: of the model.
        seed: of everything random.
    """

    stores: dict[str, TokenStore]
    lines: Lines
    tokenizer: Any
    config: BertConfig
    seed: int = 0

    def model(self) -> BertForMaskedLM:
        """A fresh model, the same every time."""
        torch.manual_seed(self.seed)
        return BertForMaskedLM(self.config)


def our_data(material: Material, way: str) -> Phase:
    """Packed rows with single tokens masked, as the collator of transformers masks them."""
    train = masked.rows(material.stores[way], "train", material.tokenizer, LENGTH, "isolated", SETTINGS)
    if train is None:
        raise SystemExit("no training text")
    plan = masked.plan(material.tokenizer, train.layout, SETTINGS)
    return Phase(
        train=train,
        held_out=None,
        make=partial(masked.batches, plan=plan),
        slots=plan.slots,
        words="",
        seed=material.seed,
        batch_size=ROWS[way],
        shares=[ROWS[way]],
        micro_batch_size=ROWS[way],
        total_rows=1_000_000 * ROWS[way],
        most_eval_rows=0,
    )


def train_ours(way: str, material: Material, learning_rate: float, watch: Watch) -> None:
    """The loop of run_pretraining.py in one process, at a constant learning rate."""
    data, network = our_data(material, way), material.model()
    objective = objectives.trained("masked", bert, {"": network}, "sdpa", SETTINGS).train()
    optimizer = build_optimizer(
        "adamw", network, learning_rate=learning_rate, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0
    )
    watch.start()
    batches = Prefetcher(data.step_batches(0, data.num_steps, 0))
    over = False
    while not over:
        micro_batches, counts = next(batches)
        torch.manual_seed(stream_key(material.seed, watch.steps, 0) >> 1)
        for batch in micro_batches:
            (objective(batch)["mlm"] / max(counts["mlm"], 1.0)).backward()
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

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: BertForMaskedLM, **_: Any) -> None:
        control.should_training_stop = self.watch.after_step(model)


def make_trainer(
    way: str, dataset: Dataset, material: Material, learning_rate: float, watch: Watch, folder: str
) -> Trainer:
    """Trainer as run_mlm makes it, at a constant learning rate."""
    collate = DataCollatorForLanguageModeling(material.tokenizer, mlm_probability=0.15)
    special = set(material.tokenizer.all_special_ids)

    def counting(features: list[dict[str, Any]]) -> dict[str, Any]:
        watch.real_tokens += sum(number not in special for row in features for number in row["input_ids"])
        return collate(features)

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=ROWS[way],
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_steps=1_000_000,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=material.seed,
    )
    return Trainer(material.model(), arguments, counting, dataset, callbacks=[_Watching(watch)])


def train_theirs(way: str, dataset: Dataset, material: Material, learning_rate: float, watch: Watch) -> None:
    """`Trainer.train`."""
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(way, dataset, material, learning_rate, watch, folder).train()
