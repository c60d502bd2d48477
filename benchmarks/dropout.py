"""What dropout costs in a training step: drawn by rows, drawn by torch, or none.

    python benchmarks/dropout.py

12 layers x 256, 4 heads, fp32, hidden dropout 0.1, no masks; forward, backward and fused AdamW of BertForMaskedLM on
random ids. Step after step in turn: torch's dropout against ours, then no dropout against ours.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from paired import compare
from torch.optim import AdamW
from transformers import BertConfig, BertForMaskedLM

from lmscripts.models.dropout import install
from lmscripts.training.processes import keep_memory

LENGTH, VOCABULARY = 128, 8192


def make_step(model: BertForMaskedLM, rows: int, by_rows: bool, p: float) -> Callable[[int], None]:
    """An optimizer step with a copy of the model."""
    network = copy.deepcopy(model).train()
    for module in network.modules():
        if type(module) is torch.nn.Dropout and module.p > 0:  # not that of the attention
            module.p = p
    if by_rows:
        install([network], of_weights=False)
    optimizer = AdamW(network.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))

    def step(number: int) -> None:
        if by_rows:
            network.draws.keys = torch.stack([torch.arange(rows), torch.full((rows,), number)], 1).int()
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(0)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_memory()  # as pretraining does
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 1024}
    dropouts = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes, **dropouts))
    ours = make_step(model, options.rows, by_rows=True, p=0.1)
    for title, p in (("torch's dropout 0.1 (theirs)", 0.1), ("no dropout (theirs)", 0.0)):
        print(f"\n{title} against dropout 0.1 by rows (ours)")
        theirs = make_step(model, options.rows, by_rows=False, p=p)
        print(compare(ours, theirs, options.pairs).report(options.rows * LENGTH, "tokens"))


if __name__ == "__main__":
    main()
