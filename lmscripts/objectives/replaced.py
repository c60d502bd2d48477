"""Replaced token detection (ELECTRA, arXiv:2003.10555): was this token put there by the generator?

The generator predicts the masked tokens; one sample of each prediction takes the token's place (no gradient flows
through it, section 2); the discriminator says of every token whether it was replaced, and the label is 1 only where the
sample differs from the original. Where the published code adds Gumbel noise to every logit and takes the highest, here
the sample is the first id whose cumulative probability exceeds one uniform number of the slot: the same distribution,
but the number is a hash of (seed, epoch, row, position), so the shape of the cluster does not change what is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lmscripts.objectives import Export, masked, ratio
from lmscripts.objectives.masked import batches, read, resolved, rows, slots, words
from lmscripts.options.checks import check_numbers
from lmscripts.options.parsing import option

if TYPE_CHECKING:
    from torch import Tensor

    from lmscripts.objectives.module import Batch, Objective, Sums

__all__ = ["batches", "read", "resolved", "rows", "slots", "words"]

TITLE = "ELECTRA's pair"
KIND = "electra"  # as results were written before objectives had names
SCORES = "masks"
PARTS = {"generator": "generator", "": "discriminator"}
_USE = """from transformers import AutoModelForPreTraining

# A logit for each token, above 0 where it thinks that the token was replaced. This is the half to fine-tune.
discriminator = AutoModelForPreTraining.from_pretrained("PATH")"""
_USE_GENERATOR = 'from transformers import pipeline\n\ngenerator = pipeline("fill-mask", model="PATH")'
EXPORTS = (
    Export("discriminator", "", "AutoModelForPreTraining", "", _USE),
    Export("generator", "generator", "AutoModelForMaskedLM", "fill-mask", _USE_GENERATOR),
)


@dataclass(frozen=True)
class Settings(masked.Settings):
    """Options of the objective; the weights are those of section 3.3."""

    generator_weight: float | None = option(None, help="of the generator's loss (1)")
    discriminator_weight: float | None = option(None, help="of the discriminator's loss (50)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(vars(self), not_negative=("generator_weight", "discriminator_weight"))


# The generator sees [MASK] or the token itself, never a random one; every slot has a number to sample with.
plan = partial(masked.plan, mask_share=0.85, random_share=0.0, draws=True)


def weights(settings: Settings) -> dict[str, float]:
    """Terms "mlm" (generator) and "rtd" (replaced token detection)."""
    given = {"mlm": (settings.generator_weight, 1.0), "rtd": (settings.discriminator_weight, 50.0)}
    return {term: usual if value is None else value for term, (value, usual) in given.items()}


def prepare(trained: Objective) -> None:
    """Let the generator's last layer skip what no prediction needs."""
    trained.family.narrow(trained.generator)


def forward(trained: Objective, batch: Batch) -> dict[str, Tensor]:
    """Sums over the masked slots (generator) and over all positions that are not empty (discriminator), () fp32 each.

    "mlm": of cross-entropies; "mlm_correct": right predictions; "rtd": of binary cross-entropies; "rtd_correct": right
    decisions; "rtd_replaced": positions with label 1; "rtd_flagged": positions that were called replaced; "rtd_hits":
    both at once.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    generator, discriminator = map(trained.get_submodule, ("generator", "discriminator"))
    attention = trained.attention_inputs(generator, batch)  # type: ignore[arg-type]
    logits = trained.logits_at_slots(generator, batch, attention)  # type: ignore[arg-type]
    losses = cross_entropy(logits, batch["labels"], reduction="none")
    used = batch["weights"] > 0
    with torch.no_grad():
        sampled, ids = sample(logits, batch["draws"]), batch["input_ids"].reshape(-1)
        # Unused slots all point at the row's first position, which is never masked: there they change nothing.
        seen = ids.scatter(0, batch["slots"], torch.where(used, sampled.to(ids.dtype), ids[batch["slots"]]))
        changed = (sampled != batch["labels"]) & used
        replaced = torch.zeros_like(ids, dtype=torch.bool).scatter(0, batch["slots"], changed)
        seen, replaced = seen.view_as(batch["input_ids"]), replaced.view_as(batch["input_ids"])
    hidden = trained.family.encode(discriminator, seen, batch["position_ids"], attention)
    scores = trained.family.predict(discriminator, hidden).float()
    real = batch["segments"] >= 0 if "segments" in batch else torch.ones_like(replaced)
    real = real & (batch["row_weights"][:, None] > 0)
    decisions = binary_cross_entropy_with_logits(scores, replaced.float(), reduction="none")
    flagged = (scores > 0) & real
    return {
        "mlm": (losses * batch["weights"]).sum(),
        "mlm_correct": ((logits.argmax(-1) == batch["labels"]) & used).sum().float(),
        "rtd": (decisions * real).sum(),
        "rtd_correct": (((scores > 0) == replaced) & real).sum().float(),
        "rtd_replaced": replaced.sum().float(),
        "rtd_flagged": flagged.sum().float(),
        "rtd_hits": (flagged & replaced).sum().float(),
    }


def sample(logits: Tensor, draws: Tensor) -> Tensor:
    """(N,) int64 first ids in rows of (N, V) fp32 logits whose cumulative probability exceeds the draw, from [0, 1)."""
    import torch

    if logits.device.type != "cpu":
        return by_groups(logits.softmax(-1), draws)
    cumulative = logits.softmax(-1).cumsum_(-1)  # in place: with a large vocabulary this is the peak of memory
    wanted = draws[:, None] * cumulative[:, -1:]  # the last entry is 1 up to rounding
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def by_groups(probabilities: Tensor, draws: Tensor) -> Tensor:
    """As `sample` of (N, V) probabilities, up to rounding, in a way that gives the same bits again on a GPU.

    A cumulative sum over a row does not there, and `--deterministic` would refuse it. So the sums of about V^(1/3)
    groups of ids are added up, then those within the group where the draw falls, and so once more.
    """
    import torch

    (rows, entries), width = probabilities.shape, 2
    while width**3 < entries:
        width += 1
    parts = torch.nn.functional.pad(probabilities, (0, width**3 - entries)).view(rows, width, -1)
    lower = torch.ones(width, width, device=parts.device).tril()
    found, left = torch.zeros_like(draws, dtype=torch.int64), draws
    for level in range(3):
        sums = parts.sum(-1)
        cumulative = (sums[:, None] * lower).sum(-1)
        total = cumulative[:, -1]
        # Rounding must not lead beyond the group, where nothing may be.
        left = left * total if level == 0 else torch.minimum(left.clamp(min=0), total * (1 - 2**-22))
        place = (cumulative <= left[:, None]).sum(-1, keepdim=True).clamp(max=width - 1)
        found = found * width + place.squeeze(1)
        left = left - (cumulative - sums).gather(1, place).squeeze(1)
        if level < 2:
            parts = parts.gather(1, place[..., None].expand(-1, 1, parts.shape[-1])).view(rows, width, -1)
    return found.clamp(max=entries - 1)


def metrics(trained: Objective, sums: Sums, counts: Sums) -> dict[str, float]:
    """Weighted loss; loss and accuracy of both halves; precision and recall of the discriminator's finds."""
    mlm, rtd = ratio(sums["mlm"], counts["mlm"]), ratio(sums["rtd"], counts["rtd"])
    return {
        "loss": trained.weights["mlm"] * mlm + trained.weights["rtd"] * rtd,
        "generator_loss": mlm,
        "generator_accuracy": ratio(sums["mlm_correct"], counts["mlm"]),
        "discriminator_loss": rtd,
        "discriminator_accuracy": ratio(sums["rtd_correct"], counts["rtd"]),
        "discriminator_precision": ratio(sums["rtd_hits"], sums["rtd_flagged"]),
        "discriminator_recall": ratio(sums["rtd_hits"], sums["rtd_replaced"]),
    }


# What it puts into masked places.
examples = partial(masked.examples, part="generator")
fill = partial(masked.fill, part="generator")
answers = partial(masked.answers, part="generator")
