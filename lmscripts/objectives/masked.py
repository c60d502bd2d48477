"""Masked language modelling (arXiv:1810.04805, section 3.1), with logits at the masked positions only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lmscripts.errors import UserError
from lmscripts.objectives import Export, ratio
from lmscripts.options.parsing import option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lmscripts.data.masking import MaskingPlan
    from lmscripts.data.packing import Layout, PackedRows, Packing, Rows
    from lmscripts.data.pairs import PairRows
    from lmscripts.data.steps import Made, Phase
    from lmscripts.data.token_store import TokenStore
    from lmscripts.objectives.module import Batch, Objective, Sums
    from lmscripts.options.presets import Preset

TITLE = "a masked language model"
SCORES = "masks"
PARTS = {"": "model"}
_USE = 'from transformers import pipeline\n\nmodel = pipeline("fill-mask", model="PATH")'
EXPORTS = (Export("model", "", "AutoModelForMaskedLM", "fill-mask", _USE),)


@dataclass(frozen=True)
class Settings:
    """Options of the objective, and of others that mask."""

    do_whole_word_mask: bool = option(False, help="the same as --mask_unit word")
    mask_unit: Literal["token", "word", "span"] | None = option(
        None, help="mask single tokens (default), words or spans"
    )
    mask_probability: tuple[float, ...] = option((), help="share to predict; or the preset's")

    def __post_init__(self) -> None:
        if self.do_whole_word_mask and self.mask_unit not in (None, "word"):
            raise UserError(f"--do_whole_word_mask and --mask_unit {self.mask_unit} contradict each other: give one")


def resolved(settings: Any, preset: Preset) -> Any:
    """The settings with defaults filled in, those of the preset among them."""
    unit = settings.mask_unit or ("word" if settings.do_whole_word_mask else "token")
    probability = settings.mask_probability or (preset.mask_probability,)
    return replace(settings, do_whole_word_mask=False, mask_unit=unit, mask_probability=probability)


# ---- rows --------------------------------------------------------------------------------------------------------


def rows(
    store: TokenStore, part: str, tokenizer: Any, sequence_length: int, packing: Packing, settings: Any
) -> PackedRows | None:
    """Packed rows of [CLS] text [SEP], of a tokenizer that has these."""
    from lmscripts.data.packing import Layout, open_rows

    ids = special_ids(tokenizer)
    return open_rows(store, part, Layout(sequence_length, packing, ids["cls"], ids["sep"], ids["pad"]))


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens that masked rows need, pad, cls, sep and mask; a UserError where one is missing."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask")}
    if missing := [name for name, number in ids.items() if number is None]:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no {missing[0]} token, which this objective needs")
    return ids


def plan(tokenizer: Any, layout: Layout, settings: Any, **corruption: Any) -> MaskingPlan:
    """BERT's corruption with a fixed number of slots per row, or what other fields of the plan say."""
    import numpy as np

    from lmscripts.data.masking import MaskingPlan, prediction_slots
    from lmscripts.tokenizer.encoder import UNUSED

    (probability,) = settings.mask_probability
    if not 0 < probability < 1:
        raise UserError(f"--mask_probability must lie between 0 and 1, got {probability}")
    if (per_row := probability * layout.most_real_tokens) < 0.01:
        raise UserError(
            f"--mask_probability {probability} of rows of {layout.sequence_length} tokens masks one token in "
            f"{1 / per_row:,.0f} rows: nothing would be learnt"
        )
    special = set(tokenizer.all_special_ids)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    ordinary = sorted(i for token, i in vocabulary.items() if i not in special and not UNUSED.fullmatch(token))
    return MaskingPlan(
        probability,
        prediction_slots(probability, layout.most_real_tokens),
        tokenizer.mask_token_id,
        np.array(ordinary, np.int32),
        settings.mask_unit,
        **corruption,
    )


def slots(plan: MaskingPlan, layout: Layout) -> int:
    """Prediction slots of a row."""
    return plan.slots


def words(plan: MaskingPlan, source: Any) -> str:
    """What is predicted, for people."""
    unit = {"token": "single tokens", "word": "whole words", "span": "spans of words"}[plan.unit]
    return f"{plan.probability:.0%} of the tokens masked as {unit}, {plan.slots} slots a row"


def batches(
    source: PackedRows | PairRows,
    rows: NDArray[np.int64],
    epochs: NDArray[np.int64],
    seed: int,
    sizes: list[int],
    plan: MaskingPlan,
    with_ends: bool = False,
    read: tuple[Rows, Mapping[str, NDArray[Any]]] | None = None,
) -> Made:
    """Rows masked by seed, epoch and number; or `read`, these rows laid out and what else (N, ...) is in a batch.

    Returns:
        For each batch: input_ids (B, T) int32, slots (B * K,) int64 flat positions, labels (B * K,) int64, weights
        (B * K,) fp32, and draws (B * K,) fp32 with row_weights (B,) fp32 if the plan asks for them; and what
        `cut_rows` gives. Its counts: targets of the terms "mlm" and "rtd".
    """
    import numpy as np

    from lmscripts.counters import stream_key
    from lmscripts.data.masking import mask_rows, row_keys
    from lmscripts.objectives.module import cut

    laid_out, more = read or (source.read(rows), {})
    keys = row_keys(stream_key(seed, 0x3A5C), epochs, rows)
    masks = mask_rows(laid_out.ids, laid_out.content, laid_out.word_starts, keys, plan)
    arrays = {"input_ids": masks.input_ids, "slots": masks.positions, **more}
    arrays |= {"labels": masks.labels.astype(np.int64), "weights": masks.weights}
    counted: dict[str, NDArray[Any]] = {"mlm": masks.weights, "tokens": laid_out.content}
    if masks.draws is not None:
        arrays |= {"draws": masks.draws, "row_weights": np.ones(len(masks.weights), np.float32)}
        counted["rtd"] = laid_out.segments >= 0
    several = laid_out.segments[:, -1] != 0  # else one segment fills the row
    return cut(laid_out, sizes, arrays, counted, several, source.usual_segments if with_ends else None)


# ---- loss --------------------------------------------------------------------------------------------------------


def weights(settings: Any) -> dict[str, float]:
    """One term."""
    return {"mlm": 1.0}


def prepare(trained: Objective) -> None:
    """Let the last layer skip what no prediction needs."""
    trained.family.narrow(trained.model)


def forward(trained: Objective, batch: Batch) -> dict[str, Tensor]:
    """See `slot_sums`."""
    model: Any = trained.model
    return slot_sums(trained, trained.logits_at_slots(model, batch, trained.attention_inputs(model, batch)), batch)


def slot_sums(trained: Objective, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Over the used slots "mlm", () fp32 sum of cross-entropies, and in eval mode "mlm_correct", right predictions."""
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(logits, batch["labels"], reduction="none")
    sums = {"mlm": (losses * batch["weights"]).sum()}
    if not trained.training:
        sums["mlm_correct"] = ((logits.argmax(-1) == batch["labels"]) * batch["weights"]).sum()
    return sums


def metrics(trained: Objective, sums: Sums, counts: Sums) -> dict[str, float]:
    """Loss per masked token; where it was counted, the share of right predictions."""
    found = {"loss": ratio(sums["mlm"], counts["mlm"])}
    if "mlm_correct" in sums:
        found["accuracy"] = ratio(sums["mlm_correct"], counts["mlm"])
    return found


def examples(models: Mapping[str, Any], tokenizer: Any, phase: Phase, part: str = "") -> list[str]:
    """For the beginnings of three held-out rows, the three best answers of a masked model for one of their words."""
    import numpy as np
    import torch

    model, source, found = models[part], phase.held_out or phase.train, []
    device, layout = next(model.parameters()).device, source.layout
    rows = source.read(np.arange(min(3, source.num_rows)))
    for ids, content, segments in zip(rows.ids, rows.content, rows.segments, strict=True):
        text = [int(i) for i in ids[content & (segments == 0)][:40]]
        if len(text) < 5:
            continue
        place = len(text) // 2
        answer, text[place] = text[place], tokenizer.mask_token_id
        begin = [] if layout.begin_id is None else [layout.begin_id]
        inputs = torch.tensor([[*begin, *text, layout.end_id]], device=device)
        with torch.no_grad():
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs))[0][0, len(begin) + place]
        best = tokenizer.convert_ids_to_tokens(logits.topk(3).indices.tolist())
        right = tokenizer.convert_ids_to_tokens(answer)
        found.append(f"{tokenizer.decode(text)} → {', '.join(best)} (the text has {right})")
    return found


def read(text: str, encoder: Any, longest: int | None) -> list[int]:
    """Ids of a text between the special tokens of a row; the mask token stands where a token is asked for."""
    tokenizer, ids = encoder.tokenizer, special_ids(encoder.tokenizer)
    row = [ids["cls"], *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], ids["sep"]]
    if ids["mask"] not in row:
        wanted = f"write {tokenizer.mask_token} where a token is asked for"
        raise UserError(f"{'the prompt is empty' if not text.strip() else f'no mask in {text[:40]!r}'}: {wanted}")
    if longest is not None and len(row) > longest:
        raise UserError(f"{text[:40]!r} has {len(row)} tokens with its special ones, and the model reads {longest}")
    return row


def fill(trained: Objective, ids: list[int], mask_id: int, most: int, part: str = "") -> list[list[tuple[int, float]]]:
    """For each mask of a row the ids with the highest probabilities, alone, the others being masked."""
    import torch

    model: Any = trained.models[part]
    row = torch.tensor([ids], device=next(model.parameters()).device)
    logits = trained.logits_of(model, row, [place for place, number in enumerate(ids) if number == mask_id])
    best = logits.softmax(-1).topk(min(most, logits.shape[-1]))
    return [list(zip(*both, strict=True)) for both in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def answers(trained: Objective, ids: list[int], tokenizer: Any, seed: int, part: str = "") -> list[str]:
    """For each mask of a row the five best tokens with their probabilities."""
    filled = fill(trained, ids, tokenizer.mask_token_id, 5, part)
    return [", ".join(f"{tokenizer.convert_ids_to_tokens(i)} {p:.1%}" for i, p in best) for best in filled]
