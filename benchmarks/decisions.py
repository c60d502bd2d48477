"""Decisions: text, the prepared form, and the loop of a policy, against a plain parser and a plain PyTorch loop.

    python scripts/make_annotations.py --output_file made.txt --num_records 20000 --rule sequence
    python scripts/prepare_annotations.py --input_file made.txt --output_dir made --validation_share 0
    python benchmarks/decisions.py --text made.txt --store made

Text: `parse` against splitting and converting line by line into arrays of the greatest length. Prepared form: batches
in the order of training, from the memory-mapped store to tensors, against the same parser; alone, as the parser reads,
and handed over by the thread that makes them ahead, for which a loop that does nothing else waits. Loop: what
`train_policy.py` does in a step on one process, against a `DataLoader` over records that wait in memory, filled up to
33 + 6 + 113 + 32 positions, and `torch.nn.TransformerEncoder`: the older trainer's network, the same weights, optimizer
and number of records, padding masked, no dropout. One batch is given to both first: the losses are equal.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from paired import compare
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lmscripts.data.decision_rows import Steps, make_batch
from lmscripts.data.decisions import open_decisions, parse
from lmscripts.data.schema import load_schema
from lmscripts.models import policy
from lmscripts.objectives import choice
from lmscripts.training.optim import build_optimizer

SCHEMA = load_schema("kanachan-v1")
WIDTHS = (33, 6, 113, 32)
PADS = (526, 0, 2165, 547)
SCALES = np.array([1, 1, 10000, 10000, 10000, 10000], np.float32)


# ---- what one would write ----------------------------------------------------------------------------------------


def plain_record(line: str) -> list[np.ndarray]:
    """Set, numbers, events, candidates and label of a line, filled up."""
    fields = line.rstrip("\n").split("\t")
    columns = [[int(number) for number in field.split(",")] for field in fields[1:]]
    arrays = []
    for column, width, pad in zip(columns, WIDTHS, PADS):
        if len(column) > width or (pad and max(column) >= pad):
            raise ValueError(line)
        arrays.append(np.array(column + [pad] * (width - len(column)), np.int64))
    arrays[1] = arrays[1] / SCALES
    return [*arrays, np.array(columns[4][0], np.int64)]


def plain_batch(lines: list[str]) -> list[Tensor]:
    """Records of lines as tensors, a column each."""
    return [torch.from_numpy(np.stack(column)) for column in zip(*map(plain_record, lines))]


class PlainEncoder(nn.Module):
    """The older network as torch's modules build it, names as there; padding is masked."""

    def __init__(self, width: int, heads: int, inner: int, layers: int) -> None:
        super().__init__()
        self.sparse_embedding = nn.Embedding(527, width, padding_idx=526)
        self.numeric_embedding = nn.Parameter(torch.randn(6, width - 1))
        self.progression_embedding = nn.Embedding(2166, width, padding_idx=2165)
        self.candidates_embedding = nn.Embedding(548, width, padding_idx=547)
        layer = nn.TransformerEncoderLayer(width, heads, inner, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        angles = torch.arange(113)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("sinusoids", torch.stack([angles.sin(), angles.cos()], -1).flatten(1), persistent=False)

    def forward(self, features: Tensor, numbers: Tensor, events: Tensor, candidates: Tensor) -> Tensor:
        """(B, 184, H)."""
        vectors = self.numeric_embedding.expand(len(numbers), -1, -1)
        states = [
            self.sparse_embedding(features),
            torch.cat([numbers[..., None].float(), vectors], 2),
            self.progression_embedding(events) + self.sinusoids,
            self.candidates_embedding(candidates),
        ]
        padding = [features == 526, torch.zeros_like(numbers, dtype=torch.bool), events == 2165, candidates == 547]
        return self.encoder(torch.cat(states, 1), src_key_padding_mask=torch.cat(padding, 1))


class PlainPolicy(nn.Module):
    """Encoder and head."""

    def __init__(self, width: int, heads: int, inner: int, layers: int) -> None:
        super().__init__()
        self.encoder = PlainEncoder(width, heads, inner, layers)
        self.decoder = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, 1))

    def forward(self, features: Tensor, numbers: Tensor, events: Tensor, candidates: Tensor) -> Tensor:
        """(B, 32) logits."""
        scores = self.decoder(self.encoder(features, numbers, events, candidates)[:, -32:])[..., 0]
        return scores.masked_fill(candidates == 547, -torch.inf)


# ---- text and the prepared form ----------------------------------------------------------------------------------


def reading(options: argparse.Namespace) -> None:
    """Records per second of text and of a store."""
    raw = options.text.read_bytes().splitlines()
    text = [line.decode() for line in raw]
    part = open_decisions(options.store).part("train")
    steps = Steps(part, SCHEMA, False, batch_size=256, micro_batch_size=256, shares=[256], seed=0)
    number = min(len(raw), options.records) // 1280 * 1280  # of blocks as prepare_annotations.py has them
    per_pair = number // 256

    def blocks(lines: list) -> list:
        return [lines[begin : begin + 256] for begin in range(0, number, 256)]

    def parsed(pair: int) -> int:
        return sum(parse(raw[begin : begin + 1280], SCHEMA)[0].num_records for begin in range(0, number, 1280))

    def prepared(pair: int) -> int:
        batches = steps.step_batches(pair * per_pair, (pair + 1) * per_pair, 0)
        return sum(len(each["labels"]) for made, _ in batches for each in made)

    def ahead(pair: int) -> int:
        batches = steps.prefetch(pair * per_pair, (pair + 1) * per_pair, 0)
        done = sum(len(each["labels"]) for made, _ in itertools.islice(batches, per_pair) for each in made)
        batches.close()
        return done

    def plain(pair: int) -> int:
        return sum(len(plain_batch(lines)[-1]) for lines in blocks(text))

    ways = {"text": parsed, "prepared form": prepared, "the same through the thread that makes batches ahead": ahead}
    for name, ours in ways.items():
        ours(0)  # pages of the store and imports
        pairs = compare(ours, plain, options.pairs)
        print(f"\n{name}: {number:,} records, one process, against a plain parser of lines")
        print(pairs.report(number, "records"))


# ---- the loop ----------------------------------------------------------------------------------------------------


def loop(options: argparse.Namespace) -> None:
    """Steps per second of both loops."""
    sizes = policy.sizes(options.preset)
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    model = policy.build(SCHEMA, sizes, seed=0, original=True, dropout=0.0)
    model.encoder.dropout.p = 0.0  # that of the sequence, which no option reaches
    torch.manual_seed(0)
    plain = PlainPolicy(*(sizes[name] for name in names))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("encoder", "decoder"):
            torch.save(getattr(plain, name).state_dict(), f"{folder}/{name}.pth")
        policy.load_parts(model, f"{folder}/encoder.pth", f"{folder}/decoder.pth")
    objective = choice.trained(model, choice.Settings())

    text = options.text.read_text(encoding="utf-8").splitlines()[: options.records]
    records, part = plain_batch(text), open_decisions(options.store).part("train")
    given = make_batch(
        parse([line.encode() for line in text[: options.rows]], SCHEMA)[0], np.arange(options.rows), SCHEMA, False
    )
    with torch.no_grad():
        ours_loss = float(objective(given)["choice"]) / options.rows
        *columns, labels = (each[: options.rows] for each in records)
        theirs_loss = float(cross_entropy(plain(*columns), labels))
    print(f"\nlosses of the same batch: {ours_loss:.6f} and {theirs_loss:.6f}")
    if abs(ours_loss - theirs_loss) > 1e-4:
        raise SystemExit("not the same network")

    settings = {"learning_rate": 1e-4, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.0}
    optimizers = [build_optimizer("adam", each, **settings) for each in (objective, plain)]
    steps = Steps(
        part,
        SCHEMA,
        False,
        batch_size=options.rows,
        micro_batch_size=options.rows,
        shares=[options.rows],
        seed=0,
    )
    loader = itertools.chain.from_iterable(
        DataLoader(TensorDataset(*records), options.rows, shuffle=True, drop_last=True) for _ in itertools.count()
    )

    def ours(pair: int) -> float:
        batches, positions = steps.prefetch(pair * options.steps, (pair + 1) * options.steps, 0), 0
        for (batch,), counts in itertools.islice(batches, options.steps):
            objective.loss(objective(batch), counts).backward()
            finish(objective, optimizers[0])
            positions += batch["input_ids"].shape[1]
        batches.close()
        return positions / options.steps

    def theirs(pair: int) -> float:
        for *columns, labels in itertools.islice(loader, options.steps):
            cross_entropy(plain(*columns), labels).backward()
            finish(plain, optimizers[1])
        return float(sum(WIDTHS))

    lengths = []
    ours(0), theirs(0)
    pairs = compare(ours, theirs, options.pairs, lambda ours, theirs: lengths.append(ours))
    print(f"{options.preset}, {options.rows} records a step, {np.mean(lengths):.0f} and {sum(WIDTHS)} positions")
    print(pairs.report(options.steps, "steps"))


def finish(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip, step, forget."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="records of kanachan-v1")
    parser.add_argument("--store", type=Path, required=True, help="the same, by prepare_annotations.py")
    parser.add_argument("--records", type=int, default=20_000, help="of the text that are read")
    parser.add_argument("--preset", default="mini", choices=policy.PRESETS)
    parser.add_argument("--rows", type=int, default=64, help="records of a step")
    parser.add_argument("--steps", type=int, default=10, help="of a pair")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reading(options)
    loop(options)


if __name__ == "__main__":
    main()
