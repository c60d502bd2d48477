"""One training step of BERT: lmscripts' masked-only logits against BertForMaskedLM with logits everywhere.

    python benchmarks/training_step.py --store store

12 layers x 256, 4 heads, fp32, no dropout; forward, backward, clipping and fused AdamW on the same masked rows, from
the same weights, each way with its own copy. Twice: packed rows with the 4-D additive mask that keeps documents apart,
built in the step by both ways; and rows that one document fills, without a mask. The losses of every pair must agree
to 1e-4. Then: what building and using the mask costs in a step of ours.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from paired import Pairs, compare
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from lmscripts import objectives
from lmscripts.data.steps import Batch, Shuffled
from lmscripts.data.token_store import open_store
from lmscripts.models.attention import attention_inputs
from lmscripts.models.families import bert
from lmscripts.objectives import masked
from lmscripts.training.optim import build_optimizer

LENGTH = 128
SETTINGS = masked.Settings(mask_unit="word", mask_probability=(0.15,))
Step = Callable[[Batch], float]


def make_batches(options: argparse.Namespace, full_only: bool) -> list[Batch]:
    """Masked rows, one batch per pair and one to warm up."""
    store = open_store(options.store)
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir, local_files_only=True)
    opened = masked.rows(store, "train", tokenizer, LENGTH, "isolated", SETTINGS)
    if opened is None:
        raise SystemExit(f"{options.store} has no training text")
    rows, epochs = Shuffled(opened.num_rows, 1, opened.num_rows, seed=0).rows(np.arange(opened.num_rows))
    if full_only:
        first = opened.first_segment[rows]
        alone = opened.first_segment[rows + 1] - first == 1
        rows = rows[alone & (opened.segment_length[first] == opened.layout.most_real_tokens)]
    plan = masked.plan(tokenizer, opened.layout, SETTINGS)

    def batch(taken: NDArray[np.int64]) -> Batch:
        return masked.batches(opened, taken, epochs[: taken.size], 0, [taken.size], plan)[0][0]

    size = options.rows
    return [batch(rows[number * size : (number + 1) * size]) for number in range(options.pairs + 1)]


def full_labels(batch: Batch) -> torch.Tensor:
    """(B, T) labels for BertForMaskedLM: -100 where nothing is to be predicted."""
    labels = torch.full((batch["input_ids"].numel(),), -100)
    used = batch["weights"] > 0
    labels[batch["slots"][used]] = batch["labels"][used]
    return labels.view(batch["input_ids"].shape)


def make_steps(model: BertForMaskedLM) -> tuple[Step, Step]:
    """One optimizer step of each way; both return the loss."""
    objective = objectives.trained("masked", bert, {"": copy.deepcopy(model)}, "sdpa", masked.Settings())
    theirs = copy.deepcopy(model)

    def our_loss(batch: Batch) -> torch.Tensor:
        return objective(batch)["mlm"] / batch["weights"].sum()

    def their_loss(batch: Batch) -> torch.Tensor:
        mask = attention_inputs("sdpa", batch, torch.float32)["attention_mask"]
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
        return theirs(**inputs, labels=full_labels(batch)).loss

    def step_of(network: nn.Module, loss_of: Callable[[Batch], torch.Tensor]) -> Step:
        network.train()
        optimizer = build_optimizer(
            "adamw", network, learning_rate=1e-4, betas=(0.9, 0.999), epsilon=1e-6, weight_decay=0.01
        )

        def step(batch: Batch) -> float:
            loss = loss_of(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    return step_of(objective, our_loss), step_of(theirs, their_loss)


def measure(options: argparse.Namespace, model: BertForMaskedLM, batches: list[Batch]) -> Pairs:
    """Compare both ways on the batches and print the result."""
    ours, theirs = make_steps(model)
    ours(batches[-1]), theirs(batches[-1])
    differences = []
    pairs = compare(
        lambda pair: ours(batches[pair]),
        lambda pair: theirs(batches[pair]),
        options.pairs,
        check=lambda mine, other: differences.append(abs(mine - other)),
    )
    if max(differences) > 1e-4:
        raise SystemExit(f"the losses differ by {max(differences):.1e}")
    print(pairs.report(options.rows * LENGTH, "tokens"))
    print(f"losses differ by at most {max(differences):.1e} over {options.pairs} steps")
    return pairs


def mask_share(options: argparse.Namespace, model: BertForMaskedLM, batches: list[Batch]) -> str:
    """What the mask costs in a step of ours: rows as they are against the same rows as if nothing had to be masked."""
    without_mask = [{name: array for name, array in batch.items() if name != "segments"} for batch in batches]
    (step, _), (unmasked_step, _) = make_steps(model), make_steps(model)
    step(batches[-1]), unmasked_step(without_mask[-1])
    using = compare(
        lambda pair: unmasked_step(without_mask[pair]), lambda pair: step(batches[pair]), options.pairs
    ).ratios()
    building = compare(
        lambda pair: attention_inputs("sdpa", batches[pair], torch.float32),
        lambda pair: step(batches[pair]),
        options.pairs,
    ).ratios()
    return "\n".join(
        f"{clock:<5} mask: {1 - 1 / np.median(using[clock]):.1%} of a step in all, "
        f"{1 / np.median(building[clock]):.3%} to build it"
        for clock in ("wall", "cpu")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="token store of prepare_corpus.py")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vocab_size = open_store(options.store).manifest["tokenizer"]["vocab_size"]
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    model = BertForMaskedLM(config)
    packed = make_batches(options, full_only=False)
    print(f"12 layers x 256, vocabulary {vocab_size:,}, {options.rows} x {LENGTH} tokens, {options.threads} threads")
    print("\npacked rows, 4-D mask")
    measure(options, model, packed)
    print("\nrows of one document, no mask")
    measure(options, model, make_batches(options, full_only=True))
    print(f"\n{mask_share(options, model, packed)}")


if __name__ == "__main__":
    main()
