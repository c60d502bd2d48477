"""Masked language modelling (arXiv:1810.04805, section 3.1), with logits at the masked positions only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lmscripts.errors import UserError
from lmscripts.objectives import Export
from lmscripts.options.parsing import option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lmscripts.data.masking import MaskingPlan
    from lmscripts.data.packing import Layout, PackedRows, Packing, Rows
    from lmscripts.data.steps import Made, Phase
    from lmscripts.data.token_store import TokenStore
    from lmscripts.objectives.module import Batch, Objective, Sums
    from lmscripts.options.presets import Preset

TITLE = "a masked language model"
SCORES = "masks"
PARTS = {"": "model"}
EXPORTS = (
    Export(
        "model",
        "",
        "AutoModelForMaskedLM",
        "fill-mask",
        'from transformers import pipeline\n\nmodel = pipeline("fill-mask", model="PATH")',
    ),
)


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
    """Packed rows of [CLS] text [SEP].

    Raises:
        UserError: the tokenizer lacks a special token.
    """
    from lmscripts.data.packing import Layout, open_rows

    ids = special_ids(tokenizer)
    return open_rows(store, part, Layout(sequence_length, packing, ids["cls"], ids["sep"], ids["pad"]))


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens that masked rows need: pad, cls, sep and mask.

    Raises:
        UserError: the tokenizer lacks one.
    """
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask")}
    if missing := [name for name, number in ids.items() if number is None]:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no {missing[0]} token, which this objective needs")
    return ids


def plan(tokenizer: Any, layout: Layout, settings: Any, **corruption: Any) -> MaskingPlan:
    """BERT's corruption with a fixed number of slots per row.

    Args:
        tokenizer: from transformers.
        layout: of the rows.
        settings: resolved, with one probability.
        corruption: other fields of the plan.

    Raises:
        UserError: the probability is not in (0, 1).
    """
    import numpy as np

    from lmscripts.data.masking import MaskingPlan, prediction_slots
    from lmscripts.tokenizer.encoder import UNUSED

    (probability,) = settings.mask_probability
    if not 0 < probability < 1:
        raise UserError(f"--mask_probability must lie between 0 and 1, got {probability}")
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
    source: PackedRows,
    rows: NDArray[np.int64],
    epochs: NDArray[np.int64],
    seed: int,
    sizes: list[int],
    plan: MaskingPlan,
    with_ends: bool = False,
) -> Made:
    """Mask rows and lay them out, all at once, then cut them into batches.

    Args:
        source: of the rows.
        rows: (N,) which rows.
        epochs: (N,) in which epoch; number, epoch and seed decide the masks.
        seed: of the masks.
        sizes: rows of each batch, B; they sum to N.
        plan: how to mask, with K slots per row.
        with_ends: give "segment_ends" as well, see `lmscripts.data.steps.cut_rows`.

    Returns:
        See `masked_batches`.
    """
    from lmscripts.counters import stream_key
    from lmscripts.data.masking import row_keys

    keys = row_keys(stream_key(seed, 0x3A5C), epochs, rows)
    return masked_batches(source.read(rows), keys, sizes, plan, source.most_segments if with_ends else None)


def masked_batches(
    laid_out: Rows,
    keys: NDArray[np.uint64],
    sizes: list[int],
    plan: MaskingPlan,
    most_segments: int | None,
    more: Mapping[str, NDArray[Any]] | None = None,
) -> Made:
    """Laid out rows, masked and cut into batches.

    Args:
        laid_out: N rows of T tokens.
        keys: (N,) of the masks, from `lmscripts.data.masking.row_keys`.
        sizes: rows of each batch, B; they sum to N.
        plan: how to mask, with K slots per row.
        most_segments: see `lmscripts.data.steps.cut_rows`.
        more: (N, ...) what else is in a batch, by name.

    Returns:
        For each batch: input_ids (B, T) int32, slots (B * K,) int64 flat positions, labels (B * K,) int64, weights
        (B * K,) fp32, and draws (B * K,) fp32 with row_weights (B,) fp32 if the plan asks for them; and what
        `cut_rows` gives. Its counts: targets of the terms "mlm" and "rtd", and real (text) "tokens".
    """
    import numpy as np

    from lmscripts.data.masking import mask_rows
    from lmscripts.data.steps import cut_rows

    masks = mask_rows(laid_out.ids, laid_out.content, laid_out.word_starts, keys, plan)
    in_batch = np.concatenate([np.arange(size) for size in sizes])[:, None]
    arrays = {"input_ids": masks.input_ids, "slots": masks.positions + in_batch * laid_out.ids.shape[1], **(more or {})}
    arrays |= {"labels": masks.labels.astype(np.int64), "weights": masks.weights}
    if masks.draws is not None:
        arrays |= {"draws": masks.draws, "row_weights": np.ones(len(masks.weights), np.float32)}
    several = laid_out.segments[:, -1] != 0  # else one segment fills the row
    made, begin = [], 0
    for batch in cut_rows(laid_out, sizes, arrays, several, most_segments):
        part = slice(begin, begin + len(batch["input_ids"]))
        begin = part.stop
        batch |= {name: batch[name].reshape(-1) for name in ("slots", "labels", "weights", "draws") if name in batch}
        counts = {"mlm": float(masks.weights[part].sum()), "tokens": float(laid_out.content[part].sum())}
        if masks.draws is not None:
            counts["rtd"] = float((laid_out.segments[part] >= 0).sum())
        made.append((batch, counts))
    return made


# ---- loss --------------------------------------------------------------------------------------------------------


def weights(settings: Any) -> dict[str, float]:
    """One term."""
    return {"mlm": 1.0}


def prepare(trained: Objective) -> None:
    """Let the last layer skip what no prediction needs."""
    trained.family.narrow(trained.model)


def forward(trained: Objective, batch: Batch) -> dict[str, Tensor]:
    """Sums over the used prediction slots of a batch.

    Args:
        trained: the models.
        batch: from `batches`.

    Returns:
        "mlm": () fp32 sum of cross-entropies. In eval mode also "mlm_correct": () number of right predictions.
    """
    from torch.nn.functional import cross_entropy

    model: Any = trained.model
    logits = trained.logits_at_slots(model, batch, trained.attention_inputs(model, batch))
    losses = cross_entropy(logits, batch["labels"], reduction="none")
    sums = {"mlm": (losses * batch["weights"]).sum()}
    if not trained.training:
        sums["mlm_correct"] = ((logits.argmax(-1) == batch["labels"]) * batch["weights"]).sum()
    return sums


def metrics(trained: Objective, sums: Sums, counts: Sums) -> dict[str, float]:
    """Loss per masked token; where it was counted, the share of right predictions."""
    from lmscripts.objectives.module import ratio

    found = {"loss": ratio(sums["mlm"], counts["mlm"])}
    if "mlm_correct" in sums:
        found["accuracy"] = ratio(sums["mlm_correct"], counts["mlm"])
    return found


def examples(models: Mapping[str, Any], tokenizer: Any, phase: Phase) -> list[str]:
    """For the beginnings of held-out rows, the model's three best answers for one of their words."""
    return fill_mask_examples(models[""], tokenizer, phase)


def fill_mask_examples(
    model: Any, tokenizer: Any, phase: Phase, most_rows: int = 3, most_tokens: int = 40
) -> list[str]:
    """For the first segment of each row, the model's three best answers for one of its words.

    Args:
        model: a masked language model from transformers.
        tokenizer: of the model.
        phase: its rows; held-out ones if there are any.
        most_rows: rows to show.
        most_tokens: tokens of each row to show.
    """
    import numpy as np
    import torch

    source, found = phase.held_out or phase.train, []
    device, layout = next(model.parameters()).device, source.layout
    rows = source.read(np.arange(min(most_rows, source.num_rows)))
    for ids, content, segments in zip(rows.ids, rows.content, rows.segments, strict=True):
        text = [int(i) for i in ids[content & (segments == 0)][:most_tokens]]
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
