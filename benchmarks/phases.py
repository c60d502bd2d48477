"""Where the time of a training step goes, per token of text."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from search import Recipe
from torch import Tensor, nn
from turns import Watch
from ways import Material, make_trainer, optimizer_of, our_data, trained


def phases(recipe: Recipe, material: Material, dataset: Dataset | None, num_steps: int) -> dict[str, float]:
    """Microseconds per real token of each phase of a step, and what else a real token costs."""
    watch = Watch(lambda model: 0.0, 0.0)
    if dataset is None:
        data, network = our_data(material, recipe), material.model(recipe)
        objective = trained(recipe, network)
        optimizer: Any = optimizer_of(recipe, network)
        batches: Iterator[Any] = (micro_batches[0] for micro_batches, _ in data.step_batches(0, num_steps + 3, 0))

        def loss_of(batch: Any) -> Tensor:
            return objective(batch)["mlm"] / batch["weights"].sum()
    else:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(recipe, dataset, material, watch, folder)
        network, optimizer = trainer.model.train(), trainer.create_optimizer()
        batches = iter(trainer.get_train_dataloader())

        def loss_of(batch: Any) -> Tensor:
            return network(**batch).loss

    spent = np.zeros(4)
    counts: NDArray[np.int64] = np.zeros(3, np.int64)
    special = torch.tensor(material.tokenizer.all_special_ids)
    for step in range(num_steps + 3):
        times = [time.perf_counter()]
        batch = next(batches)
        times.append(time.perf_counter())
        loss = loss_of(batch)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        if step < 3:  # warming up
            continue
        spent += np.diff(times)
        masked = batch["input_ids"] == material.tokenizer.mask_token_id
        text = ~torch.isin(batch["input_ids"], special) | masked
        logits = batch["slots"].numel() if dataset is None else batch["input_ids"].numel()
        counts += [int(text.sum()), batch["input_ids"].numel(), logits]
    names = ("data", "forward", "backward", "optimizer")
    each = {name: round(float(value / counts[0] * 1e6), 2) for name, value in zip(names, spent)}
    return each | {
        "positions_per_real_token": round(float(counts[1] / counts[0]), 3),
        "logits_per_real_token": round(float(counts[2] / counts[0]), 3),
        "real_tokens_per_step": round(float(counts[0] / num_steps)),
    }
