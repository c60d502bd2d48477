"""One training step of ELECTRA: lmscripts' objective against transformers' two models called one after the other.

    python benchmarks/electra_step.py --store store

Discriminator of 12 layers x 256, 4 heads, embeddings of 128 shared with the generator; fp32, no dropout; forward,
sampling, backward, clipping and fused AdamW on the same masked rows, from the same weights, each way with its own copy.

Theirs is `ElectraForMaskedLM(labels=...)`, logits everywhere; then a token drawn for every masked position; then
`ElectraForPreTraining(labels=...)`. It is timed twice, because what it costs depends on where it draws:

    masked      Gumbel noise on the logits of the masked positions, which are picked out first: what the older Japanese
                system does, and anybody would who took care. This is the ratio to quote.
    everywhere  Gumbel noise on all logits, of which the masked positions are then used: shorter to write, the same
                distribution.

Each row is filled by one document, as `ElectraForPreTraining(labels=...)` takes no 4-D mask. `--masked_rows` takes rows
of several documents or with an empty end: with the mask in both ways, and their second loss computed from their logits.

Same work. First, untimed, both ways take three steps on from the same weights, theirs drawing with our random numbers
(by inverse CDF in double precision from its own logits): the drawn tokens and both losses are compared. In the timed
pairs theirs draws with its own noise, so its second loss and its gradient are of other tokens; therefore it gets our
weights and optimizer state after every pair, outside the clock, and the first loss must agree to 1e-4 on every pair.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from paired import compare
from torch import Tensor, nn
from transformers import AutoTokenizer, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from lmscripts import objectives
from lmscripts.data.steps import Batch, Shuffled
from lmscripts.data.token_store import open_store
from lmscripts.models.attention import attention_inputs
from lmscripts.models.families import electra
from lmscripts.objectives import replaced
from lmscripts.training.optim import build_optimizer

LENGTH = 128
CHECKED_STEPS = 3
TOLERANCE = 1e-4
DISCRIMINATOR_WEIGHT = 50.0  # arXiv:2003.10555, section 2
SETTINGS = replaced.Settings(mask_unit="token", mask_probability=(0.15,))
Losses = tuple[Tensor, Tensor]
# (N, V) logits of the masked positions in the order of the text, and the batch -> (N,) drawn ids.
Draw = Callable[[Tensor, Batch], Tensor]


def make_batches(options: argparse.Namespace) -> list[Batch]:
    """Masked rows, one batch per pair and one to warm up."""
    store = open_store(options.store)
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir, local_files_only=True)
    opened = replaced.rows(store, "train", tokenizer, LENGTH, "isolated", SETTINGS)
    if opened is None:
        raise SystemExit(f"{options.store} has no training text")
    rows, epochs = Shuffled(opened.num_rows, 1, opened.num_rows, seed=0).rows(np.arange(opened.num_rows))
    first = opened.first_segment[rows]
    full = opened.segment_length[first] == opened.layout.most_real_tokens  # then it is the only segment
    rows = rows[~full if options.masked_rows else full]
    size = options.rows
    if rows.size < size * (options.pairs + 1):
        raise SystemExit(f"{options.store} has {rows.size} rows to use, {options.pairs + 1} batches need {size} each")
    plan = replaced.plan(tokenizer, opened.layout, SETTINGS)

    def batch(taken: NDArray[np.int64]) -> Batch:
        return replaced.batches(opened, taken, epochs[: taken.size], 0, [taken.size], plan)[0][0]

    return [batch(rows[number * size : (number + 1) * size]) for number in range(options.pairs + 1)]


def make_models(vocab_size: int, fraction: Fraction) -> nn.ModuleDict:
    """Generator and discriminator on one embeddings module; the generator is as deep and `fraction` as wide."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    small = {name: size * fraction for name, size in sizes.items()}
    if any(size.denominator != 1 for size in small.values()):
        raise SystemExit(f"generator size {fraction} does not divide {', '.join(map(str, sizes.values()))}")
    shared = {
        "vocab_size": vocab_size,
        "embedding_size": 128,
        "num_hidden_layers": 12,
        "max_position_embeddings": LENGTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    generator = ElectraForMaskedLM(ElectraConfig(**shared, **{name: int(size) for name, size in small.items()}))
    discriminator = ElectraForPreTraining(ElectraConfig(**shared, **sizes))
    electra.join({"generator": generator, "": discriminator})
    return nn.ModuleDict({"generator": generator, "discriminator": discriminator})


def scatter(values: Tensor, batch: Batch, empty: float) -> Tensor:
    """(B, T) the values of the used slots at their positions, `empty` elsewhere."""
    whole = torch.full((batch["input_ids"].numel(),), empty, dtype=values.dtype)
    used = batch["weights"] > 0
    whole[batch["slots"][used]] = values[used]
    return whole.view(batch["input_ids"].shape)


def gumbel_argmax(logits: Tensor) -> Tensor:
    """(...) ids drawn from the softmax of (..., V) logits."""
    noise = torch.empty_like(logits).exponential_().log_().neg_()
    return noise.add_(logits).argmax(-1)


def draw_masked(logits: Tensor, batch: Batch) -> Tensor:
    """Noise where a token is needed."""
    masked = scatter(batch["labels"], batch, -100) != -100
    return gumbel_argmax(logits[masked])


def draw_everywhere(logits: Tensor, batch: Batch) -> Tensor:
    """Noise at every position."""
    masked = scatter(batch["labels"], batch, -100) != -100
    return gumbel_argmax(logits)[masked]


def draw_as_ours(logits: Tensor, batch: Batch) -> Tensor:
    """The token at which the cumulative probability passes our random number."""
    masked = scatter(batch["labels"], batch, -100) != -100
    cumulative = logits[masked].double().softmax(-1).cumsum(-1)
    uniform = scatter(batch["draws"], batch, 0.0)[masked].double()
    found = torch.searchsorted(cumulative, uniform[:, None], right=True).squeeze(-1)
    return found.clamp_(max=logits.shape[-1] - 1)


class Way:
    """One way of taking a step.

    Attributes:
        network: holds "generator" and "discriminator".
        losses: mean losses of both.
    """

    def __init__(self, network: nn.Module, losses: Callable[[nn.Module, Batch], Losses]):
        self.network, self.losses = network.train(), losses
        self.optimizer = build_optimizer(
            "adamw", network, learning_rate=5e-4, betas=(0.9, 0.999), epsilon=1e-6, weight_decay=0.01
        )

    def step(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step; the mean losses of generator and discriminator."""
        generator_loss, discriminator_loss = self.losses(self.network, batch)
        (generator_loss + DISCRIMINATOR_WEIGHT * discriminator_loss).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return generator_loss.item(), discriminator_loss.item()

    def become(self, other: Way) -> None:
        """Take over the weights and the state of the optimizer."""
        self.network.load_state_dict(other.network.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))


def our_way(models: nn.ModuleDict) -> Way:
    """The objective of lmscripts on a copy of the models."""
    copied = copy.deepcopy(models)
    parts = {"generator": copied["generator"], "": copied["discriminator"]}
    return Way(objectives.trained("replaced", electra, parts, "sdpa", SETTINGS), our_losses)


def their_way(models: nn.ModuleDict, draw: Draw) -> Way:
    """A copy of the models called one after the other."""
    return Way(copy.deepcopy(models), their_losses(draw))


def our_losses(objective: nn.Module, batch: Batch) -> Losses:
    """The two terms, each divided by the number of its targets, as the training loop does."""
    sums = objective(batch)
    targets = batch["input_ids"].numel()
    if "segments" in batch:
        targets = int((batch["segments"] >= 0).sum())
    return sums["mlm"] / batch["weights"].sum(), sums["rtd"] / targets


def their_losses(draw: Draw) -> Callable[[nn.Module, Batch], Losses]:
    """The losses of transformers' models, given how tokens are drawn."""

    def losses(models: nn.ModuleDict, batch: Batch) -> Losses:
        mask = attention_inputs("sdpa", batch, torch.float32)["attention_mask"]
        inputs = {"position_ids": batch["position_ids"], "attention_mask": mask}
        labels = scatter(batch["labels"], batch, -100)
        masked = labels != -100
        generated = models["generator"](input_ids=batch["input_ids"], labels=labels, **inputs)
        with torch.no_grad():
            drawn = draw(generated.logits, batch)
            seen = batch["input_ids"].long()
            seen[masked] = drawn
            replaced = torch.zeros_like(seen)
            replaced[masked] = (drawn != labels[masked]).long()
        if mask is None:
            found = models["discriminator"](input_ids=seen, labels=replaced, **inputs)
            return generated.loss, found.loss
        logits = models["discriminator"](input_ids=seen, **inputs).logits
        real = batch["segments"] >= 0
        return generated.loss, nn.functional.binary_cross_entropy_with_logits(logits[real], replaced[real].float())

    return losses


def check_same_work(models: nn.ModuleDict, batches: list[Batch]) -> str:
    """Take a few steps both ways with the same random numbers; what was compared, as text.

    Raises:
        SystemExit: losses differ by more than 1e-4, or more than one drawn token in a hundred.
    """
    ours, theirs = our_way(models), their_way(models, draw_as_ours)
    seen: dict[str, Tensor] = {}
    for name, way in (("ours", ours), ("theirs", theirs)):

        def remember(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], name: str = name) -> None:
            seen[name] = args[0] if args else named["input_ids"]

        way.network.get_submodule("discriminator.electra").register_forward_pre_hook(remember, with_kwargs=True)
    drawn = different = 0
    worst = torch.zeros(2)
    for batch in batches[:CHECKED_STEPS]:
        losses = torch.tensor([ours.step(batch), theirs.step(batch)])
        worst = torch.maximum(worst, (losses[0] - losses[1]).abs())
        drawn += int(batch["weights"].sum())
        different += int((seen["ours"] != seen["theirs"]).sum())
    differences = f"generator losses differ by at most {worst[0]:.1e}, discriminator losses by {worst[1]:.1e}"
    text = f"{differences}; {drawn - different} of {drawn} drawn tokens equal, in {CHECKED_STEPS} steps"
    if worst.max() > TOLERANCE or different > drawn / 100:
        raise SystemExit(f"not the same work: {text}")
    return text


def measure(options: argparse.Namespace, models: nn.ModuleDict, draw: Draw, batches: list[Batch]) -> None:
    """Compare both ways on the batches and print the result."""
    ours, theirs = our_way(models), their_way(models, draw)
    ours.step(batches[-1]), theirs.step(batches[-1])
    theirs.become(ours)
    worst = 0.0

    def check(mine: tuple[float, float], other: tuple[float, float]) -> None:
        nonlocal worst
        worst = max(worst, abs(mine[0] - other[0]))
        theirs.become(ours)

    pairs = compare(
        lambda pair: ours.step(batches[pair]), lambda pair: theirs.step(batches[pair]), options.pairs, check
    )
    if worst > TOLERANCE:
        raise SystemExit(f"the generator losses differ by {worst:.1e}")
    print(pairs.report(options.rows * LENGTH, "tokens"))
    print(f"generator losses differ by at most {worst:.1e} over {options.pairs} steps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="token store of prepare_corpus.py")
    parser.add_argument(
        "--generator_sizes",
        type=Fraction,
        nargs="+",
        default=[Fraction(1, 4), Fraction(1)],
        help="width of the generator over that of the discriminator, such as 1/4",
    )
    parser.add_argument("--masked_rows", action="store_true", help="rows that need the 4-D mask, both ways")
    parser.add_argument("--rows", type=int, default=32, help="rows of a step; run_pretraining.py takes 32 at once")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.pairs < CHECKED_STEPS:
        raise SystemExit(f"--pairs is {options.pairs}, must be at least {CHECKED_STEPS}")
    torch.set_num_threads(options.threads)
    vocab_size = open_store(options.store).manifest["tokenizer"]["vocab_size"]
    batches = make_batches(options)
    kind = "rows of several documents, 4-D mask" if options.masked_rows else "rows of one document, no mask"
    print(f"12 layers x 256, vocabulary {vocab_size:,}, {options.rows} x {LENGTH} tokens, {options.threads} threads")
    print(kind)
    for fraction in options.generator_sizes:
        models = make_models(vocab_size, fraction)
        print(f"\ngenerator {fraction.numerator}/{fraction.denominator}")
        print(check_same_work(models, batches), flush=True)
        for name, draw in (("masked", draw_masked), ("everywhere", draw_everywhere)):
            print(f"theirs draws {name}")
            measure(options, models, draw, batches)


if __name__ == "__main__":
    main()
