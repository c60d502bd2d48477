"""Causal language modelling: every token, and the end of its document, from what stands before it in the document.

GPT-2; arXiv:2005.14165, section 2.1, trains the same way. The text is one stream of documents; logits are never all
there at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmscripts.errors import UserError
from lmscripts.objectives import Export, ratio
from lmscripts.options.checks import check_numbers
from lmscripts.options.parsing import option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lmscripts.data.packing import Layout, Packing
    from lmscripts.data.steps import Made, Phase
    from lmscripts.data.stream import StreamRows
    from lmscripts.data.token_store import TokenStore
    from lmscripts.objectives.module import Batch, Objective, Sums
    from lmscripts.options.presets import Preset

TITLE = "a causal model"
SCORES = "windows"
PARTS = {"": "model"}
_USE = """from transformers import pipeline

model = pipeline("text-generation", model="PATH")
print(model("...", do_sample=True, top_k=50, max_new_tokens=40)[0]["generated_text"])"""
EXPORTS = (Export("model", "", "AutoModelForCausalLM", "text-generation", _USE),)


@dataclass(frozen=True)
class Settings:
    """Options of the objective."""

    z_loss: float | None = option(None, help="weight of log(Z)^2, such as 1e-4 (0)")

    def __post_init__(self) -> None:
        check_numbers(vars(self), not_negative=("z_loss",))


def resolved(settings: Settings, preset: Preset) -> Settings:
    """The settings: no default is the preset's."""
    return settings


# ---- rows --------------------------------------------------------------------------------------------------------


def rows(
    store: TokenStore, part: str, tokenizer: Any, sequence_length: int, packing: Packing, settings: Any
) -> StreamRows | None:
    """The text as one stream, of a tokenizer that can separate documents; None for an empty part."""
    from lmscripts.data.packing import Layout
    from lmscripts.data.stream import open_stream

    begin, end = boundary_ids(tokenizer)
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return open_stream(store, part, Layout(sequence_length, packing, begin, end, pad))


def boundary_ids(tokenizer: Any) -> tuple[int, int]:
    """Ids of what stands before the first token of a document and of what is predicted after its last.

    Begin: bos, else eos, else cls. End: eos, else sep; a UserError without them. GPT-2's own are both <|endoftext|>.
    """
    begin = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id]
    end = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    found = [next((number for number in ids if number is not None), None) for ids in (begin, end)]
    if found[0] is None or found[1] is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no {'eos or sep' if found[0] is not None else 'bos or cls'} "
            "token, which separates the documents of a causal model"
        )
    return int(found[0]), int(found[1])


def plan(tokenizer: Any, layout: Layout, settings: Settings) -> None:
    """Nothing is masked."""


def slots(plan: None, layout: Layout) -> int:
    """Every position is predicted."""
    return layout.sequence_length


def words(plan: None, source: Any) -> str:
    """What is predicted, for people."""
    return "every token and the end of every document predicted from what stands before it"


def batches(
    source: StreamRows,
    rows: NDArray[np.int64],
    epochs: NDArray[np.int64],
    seed: int,
    sizes: list[int],
    plan: None,
    with_ends: bool = False,
) -> Made:
    """Rows of a stream; seed and epochs decide nothing.

    Returns:
        For each batch: input_ids (B, T) int32, labels (B * T,) int64 and weights (B * T,) fp32, 0 where a position is
        empty; and what `cut_rows` gives. Its counts: targets of the term "clm", and the "bytes" of text that they
        stand for.
    """
    import numpy as np

    from lmscripts.objectives.module import cut

    laid_out = source.read(rows)
    if laid_out.targets is None:
        raise ValueError("these rows have no targets")
    real = laid_out.segments >= 0
    arrays: dict[str, NDArray[Any]] = {"input_ids": laid_out.ids, "labels": laid_out.targets.astype(np.int64)}
    arrays["weights"] = real.astype(np.float32)
    several = np.any(laid_out.segments > 0, axis=1)  # what is empty comes last, where nothing sees it
    counted = {"clm": real, "tokens": laid_out.content}
    made = cut(laid_out, sizes, arrays, counted, several, source.usual_segments if with_ends else None)
    return [(batch, counts | {"bytes": counts["clm"] * source.bytes_per_target}) for batch, counts in made]


# ---- loss --------------------------------------------------------------------------------------------------------


def remarks(tokenizer: Any) -> list[str]:
    """A sentence where the tokenizer loses text, which the model then cannot write."""
    for text in ("Two  Spaces", "éÉ", "ｶﾅ①", "𠮷😀"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back.strip() != text:
            return [
                f"warning: the tokenizer loses text: {text!r} comes back as {back!r}, the model can write no other; "
                "train_tokenizer.py --objective causal makes one that loses nothing"
            ]
    return []


def weights(settings: Settings) -> dict[str, float]:
    """One term."""
    return {"clm": 1.0}


def prepare(trained: Objective) -> None:
    """Nothing: the model is untouched."""


def forward(trained: Objective, batch: Batch) -> dict[str, Tensor]:
    """Sums over the targets of a batch, () fp32 each.

    "clm": of cross-entropies and of the terms of the z-loss; "clm_entropy" and "clm_penalty": of either alone; in eval
    mode "clm_correct": right predictions.
    """
    from lmscripts.models.cross_entropy import chunked_cross_entropy

    model: Any = trained.model
    attention = trained.attention_inputs(model, batch)
    hidden = trained.family.encode(model, batch["input_ids"], batch["position_ids"], attention).flatten(0, 1)
    head = model.get_output_embeddings()
    loss, entropy, penalty, correct = chunked_cross_entropy(
        hidden,
        head.weight,
        head.bias,
        batch["labels"],
        batch["weights"],
        trained.settings.z_loss or 0.0,
        compiled=trained.is_compiled and hidden.device.type != "cpu",
    )
    sums = {"clm": loss, "clm_entropy": entropy, "clm_penalty": penalty}
    return sums if trained.training else sums | {"clm_correct": correct}


def metrics(trained: Objective, sums: Sums, counts: Sums) -> dict[str, float]:
    """Cross-entropy per target, perplexity, bits per byte of the text as read; where counted, right ones."""
    loss = ratio(sums["clm_entropy"], counts["clm"])
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    found["bits_per_text_byte"] = ratio(sums["clm_entropy"] / math.log(2), counts["bytes"])
    if trained.settings.z_loss:
        found["z_loss"] = ratio(sums["clm_penalty"], counts["clm"])
    if "clm_correct" in sums:
        found["accuracy"] = ratio(sums["clm_correct"], counts["clm"])
    return found


# ---- examples ----------------------------------------------------------------------------------------------------


def examples(models: Mapping[str, Any], tokenizer: Any, phase: Phase) -> list[str]:
    """How the model goes on from beginnings of documents."""
    return continuations(models[""], tokenizer, document_beginnings(phase))


def document_beginnings(phase: Phase, number: int = 3, most_tokens: int = 12) -> list[NDArray[np.int64]]:
    """(n,) ids of how documents begin: held-out ones, then those of the training text; again where there are fewer.

    Of each no more than half is taken, and no more than `most_tokens`, the begin token among them.
    """
    from itertools import cycle, islice

    import numpy as np

    found: list[NDArray[np.int64]] = []
    for source in (phase.held_out, phase.train):
        if source is None:
            continue
        tokens, ends = source.part.tokens, source.part.document_tokens
        for document in range(min(number, source.part.num_documents)):
            begin, size = int(ends[document]), int(ends[document + 1] - ends[document])
            text = tokens[begin : begin + min(most_tokens - 1, -(-size // 2))]
            found.append(np.array([source.layout.begin_id, *text], np.int64))
    return list(islice(cycle(found), number))


def continuations(model: Any, tokenizer: Any, prompts: list[NDArray[np.int64]]) -> list[str]:
    """How the model goes on from prompts of (n,) ids: sampled from its 50 likeliest tokens, always the same.

    A prompt that comes again is gone on from in another way.
    """
    from lmscripts.objectives.sampling import Sampling, go_on, text_after

    found, end = [], boundary_ids(tokenizer)[1]
    longest = getattr(model.config, "max_position_embeddings", max(map(len, prompts), default=0) + 40)
    for number, ids in enumerate(prompts):
        prompt = ids[: longest // 2].tolist()
        (written,) = go_on(model, prompt, [number], Sampling(), end, longest)
        parts: list[tuple[list[int], list[int]]] = [([], prompt), (prompt, written)]
        begun, added = (" ".join(text_after(tokenizer, *part).split()) for part in parts)
        found.append(f"{begun} **{added}**")
    return found


def read(text: str, encoder: Any, longest: int | None) -> list[int]:
    """Ids of a text with what stands before the first token of a document, and room for a token behind it."""
    ids = [boundary_ids(encoder.tokenizer)[0], *map(int, encoder.encode([text]).ids)]
    if len(ids) == 1:
        raise UserError(f"the prompt {text!r} is empty: give at least a word to go on from")
    if longest is not None and len(ids) >= longest:
        raise UserError(
            f"the prompt {text[:40]!r} has {len(ids)} tokens with the one that begins a text, and the model reads "
            f"{longest}: there is no room to go on; give a shorter one"
        )
    return ids


def answers(trained: Objective, ids: list[int], tokenizer: Any, seed: int) -> list[str]:
    """How a model in training goes on, in the way in which it is trained: without anything kept from token to token."""
    import torch

    from lmscripts.models.fitting import longest_input
    from lmscripts.objectives.sampling import Sampling, text_after

    how, end, model = Sampling(seed=seed), boundary_ids(tokenizer)[1], trained.models[""]
    choose, longest = how.chooser(ids, [0]), longest_input(model.config)
    row = torch.tensor([ids], device=next(model.parameters()).device)
    for _ in range(min(how.max_new_tokens, (longest or sys.maxsize) - len(ids))):
        scores = choose(row, trained.logits_of(model, row, [row.shape[1] - 1]))
        row = torch.cat([row, scores.argmax(-1, keepdim=True)], 1)
        if row[0, -1] == end:
            row = row[:, :-1]
            break
    return [text_after(tokenizer, ids, row[0, len(ids) :].tolist())]
