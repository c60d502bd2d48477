"""Sentence pairs beside masked tokens: next-sentence prediction (arXiv:1810.04805, section 3.1) or sentence order.

Whether the second part of a pair is what came next is said of the hidden state at its [CLS]; see `lmscripts.data.pairs`
for how pairs are drawn, and for the order of sentences (arXiv:1909.11942, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lmscripts.errors import UserError
from lmscripts.objectives import Export, masked, ratio
from lmscripts.objectives.masked import answers, examples, plan, prepare, read, resolved, slots
from lmscripts.options.checks import check_numbers
from lmscripts.options.parsing import option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lmscripts.data.masking import MaskingPlan
    from lmscripts.data.packing import Packing
    from lmscripts.data.pairs import PairRows
    from lmscripts.data.steps import Made
    from lmscripts.data.token_store import TokenStore
    from lmscripts.objectives.module import Batch, Objective, Sums

__all__ = ["answers", "examples", "plan", "prepare", "read", "resolved", "slots"]

TITLE = "a masked language model that judges pairs"
PARTS = {"": "model", "pairs": "pair_model"}
_USE = """from transformers import AutoModelForPreTraining, pipeline

model = pipeline("fill-mask", model="PATH")
# Of a BERT also with the scores of pairs, seq_relationship_logits; the second says "not what came next".
pairs = AutoModelForPreTraining.from_pretrained("PATH")"""
_USE_PAIRS = """from transformers import AutoModelForSequenceClassification

# The second label says "not what came next".
pairs = AutoModelForSequenceClassification.from_pretrained("PATH")"""
EXPORTS = (
    Export("model", "", "AutoModelForPreTraining", "fill-mask", _USE),
    Export("head for pairs", "pairs", "AutoModelForSequenceClassification", "", _USE_PAIRS),
)


@dataclass(frozen=True)
class Settings(masked.Settings):
    """Options of the objective."""

    pair_task: Literal["next", "order"] = option("next", help="is B what came next, or are A and B in their order")
    pair_weight: float | None = option(None, help="of the loss of pairs (1)")
    short_pairs: float = option(0.1, help="share of documents whose pairs have a random shorter length")
    pair_passes: int = option(1, help="passes over the text, each with pairs of its own, before they come again")

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = {"positive": ("pair_passes",), "not_negative": ("pair_weight",), "below_one": ("short_pairs",)}
        check_numbers(vars(self), **bounds)


def rows(
    store: TokenStore, part: str, tokenizer: Any, sequence_length: int, packing: Packing, settings: Settings
) -> PairRows | None:
    """Rows of [CLS] A [SEP] B [SEP], of a tokenizer that has these; pairs never see each other."""
    from lmscripts.data.packing import Layout
    from lmscripts.data.pairs import PairSettings, open_pairs

    if packing != "isolated":
        raise UserError(f"--packing {packing} is not for pairs, which must not see each other")
    ids = masked.special_ids(tokenizer)
    layout = Layout(sequence_length, packing, ids["cls"], ids["sep"], ids["pad"])
    drawn = PairSettings(settings.pair_task, settings.short_pairs, settings.pair_passes)
    return open_pairs(store, part, layout, drawn)


def words(plan: MaskingPlan, source: PairRows) -> str:
    """What is predicted, for people."""
    facts = source.facts
    labelled = facts["pairs"] - facts["unlabelled"]
    said = f"{masked.words(plan, source)}; {facts['pairs']:,} pairs, "
    said += f"{facts['negatives'] / max(1, labelled):.1%} negative"
    said += f", {facts['unlabelled']:,} without an answer" * bool(facts["unlabelled"])
    return f"{said}; {facts['cut_tokens']:,} tokens cut off"


def batches(
    source: PairRows,
    rows: NDArray[np.int64],
    epochs: NDArray[np.int64],
    seed: int,
    sizes: list[int],
    plan: MaskingPlan,
    with_ends: bool = False,
) -> Made:
    """As `lmscripts.objectives.masked.batches`, with what `PairRows.read_pairs` gives; Q pairs a row at most.

    Returns:
        In each batch also token_types (B, T) int64, pair_places (B, Q) int64 flat positions, pair_labels (B * Q,) int64
        and pair_weights (B * Q,) fp32; among the counts the targets of the term "pairs".
    """
    made = masked.batches(source, rows, epochs, seed, sizes, plan, with_ends, source.read_pairs(rows))
    return [(batch, counts | {"pairs": float(batch["pair_weights"].sum())}) for batch, counts in made]


def weights(settings: Settings) -> dict[str, float]:
    """Terms "mlm" (masked tokens) and "pairs"."""
    return {"mlm": 1.0, "pairs": 1.0 if settings.pair_weight is None else settings.pair_weight}


def forward(trained: Objective, batch: Batch) -> dict[str, Tensor]:
    """Sums over the used prediction slots and over the pairs of a batch, () fp32 each.

    "mlm" and "pairs": of cross-entropies; "pairs_correct": right answers; in eval mode also "mlm_correct".
    """
    import torch
    from torch.nn.functional import cross_entropy

    model: Any = trained.model
    number, labels = len(batch["input_ids"]), batch["pair_labels"]
    inputs = trained.attention_inputs(model, batch)
    if getattr(model.config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = batch["token_types"]
    wanted = torch.cat([batch["slots"].view(number, -1), batch["pair_places"]], 1)
    hidden = trained.family.encode(model, batch["input_ids"], batch["position_ids"], inputs, wanted.flatten())
    masked_states, pair_states = hidden.view(number, wanted.shape[1], -1).split(
        [batch["slots"].numel() // number, batch["pair_places"].shape[1]], 1
    )
    logits = trained.family.predict(model, masked_states.flatten(0, 1)).float()
    trained.draws.places = batch["pair_places"].flatten()
    scores = trained.family.pair_scores(trained.models, pair_states.flatten(0, 1)).float()
    return masked.slot_sums(trained, logits, batch) | {
        "pairs": (cross_entropy(scores, labels, reduction="none") * batch["pair_weights"]).sum(),
        "pairs_correct": ((scores.argmax(-1) == labels) * batch["pair_weights"]).sum(),
    }


def metrics(trained: Objective, sums: Sums, counts: Sums) -> dict[str, float]:
    """Weighted loss; loss of both terms; share of right answers for pairs and, where counted, for masked tokens."""
    terms = {term: ratio(sums[term], counts[term]) for term in ("mlm", "pairs")}
    found = {"loss": sum(weight * terms[term] for term, weight in trained.weights.items())}
    found |= {"masked_loss": terms["mlm"], "pair_loss": terms["pairs"]}
    if "mlm_correct" in sums:
        found["masked_accuracy"] = ratio(sums["mlm_correct"], counts["mlm"])
    return found | {"pair_accuracy": ratio(sums["pairs_correct"], counts["pairs"])}
