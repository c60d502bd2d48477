"""Rows with masks, ready for the model, in one process: lmscripts against DataCollatorForLanguageModeling.

    python benchmarks/masking.py --store store

Ours: `step_batches`, what a training run does: which rows come next, the rows, whole-word masks and prediction slots,
from the memory-mapped store to tensors. Theirs: token masks (the
whole-word option of the collator needs character offsets, which Japanese tokenizers do not give) by the collator of
transformers on the same rows, which wait in memory as lists, `special_tokens_mask` included; choosing and reading them
is not counted. One thread. Rows are 256 x 128 and 64 x 512 tokens.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from functools import partial
from pathlib import Path

import numpy as np
import torch
from paired import compare
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from lmscripts.data.steps import Batch, Phase, Shuffled
from lmscripts.data.token_store import open_store
from lmscripts.objectives import masked

SHAPES = ((256, 128), (64, 512))
SETTINGS = masked.Settings(mask_unit="word", mask_probability=(0.15,))


def measure(options: argparse.Namespace, num_rows: int, length: int) -> None:
    """Compare both ways at one shape and print the result."""
    store = open_store(options.store)
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir, local_files_only=True)
    opened = masked.rows(store, "train", tokenizer, length, "isolated", SETTINGS)
    if opened is None:
        raise SystemExit(f"{options.store} has no training text")
    plan = masked.plan(tokenizer, opened.layout, SETTINGS)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, return_tensors="pt")

    numbers = range(options.pairs * options.batches)
    order = Shuffled(opened.num_rows, num_rows, len(numbers) * num_rows, seed=0)
    chosen = [order.rows(np.arange(*order.bounds(n)))[0] for n in numbers]
    data = Phase(
        train=opened,
        held_out=None,
        make=partial(masked.batches, plan=plan),
        slots=plan.slots,
        words="",
        seed=0,
        batch_size=num_rows,
        shares=[num_rows],
        micro_batch_size=num_rows,
        total_rows=len(numbers) * num_rows,
        most_eval_rows=0,
    )

    # As in training, a batch is dropped when the next one is there; the last is given back to be checked.
    def ours(pair: int) -> Batch:
        for micro_batches, _ in data.step_batches(pair * options.batches, (pair + 1) * options.batches, 0):
            batch = micro_batches[0]
        return batch

    examples = []
    for number in chosen:
        rows = opened.read(number)
        ids, special = rows.ids.tolist(), (~rows.content).astype(int).tolist()
        examples.append([{"input_ids": i, "special_tokens_mask": s} for i, s in zip(ids, special)])

    def theirs(pair: int) -> Batch:
        for rows in examples[pair * options.batches : (pair + 1) * options.batches]:
            batch = dict(collate(rows))
        return batch

    def check(ours: Batch, theirs: Batch) -> None:
        share = float(ours["weights"].sum()) / float((theirs["labels"] != -100).sum())
        if ours["input_ids"].shape != theirs["input_ids"].shape or not 0.9 < share < 1.1:
            raise SystemExit(f"not the same work: {tuple(ours['input_ids'].shape)}, {share:.2f} times the targets")

    ours(0), theirs(0)
    pairs = compare(ours, theirs, options.pairs, check)
    print(f"\n{num_rows} rows of {length}, {options.pairs} pairs of {options.batches} batches")
    print(pairs.report(options.batches * num_rows * length / 1e6, "million tokens"))
    if options.profile:
        with cProfile.Profile() as profile:
            ours(0)
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="token store of prepare_corpus.py")
    parser.add_argument("--batches", type=int, default=20, help="batches of a pair")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="show where the time of ours goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for num_rows, length in SHAPES:
        measure(options, num_rows, length)


if __name__ == "__main__":
    main()
