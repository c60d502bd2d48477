"""What a saved model predicts: by the type and the name it was saved under, and by what it really does.

A configuration says little: transformers builds a causal model from the weights of a masked one, of a classifier or of
a bare body, and fills up or ties what is lacking. A model that sees what it is to predict has a wonderful perplexity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import ElectraForMaskedLM, ElectraForPreTraining, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lmscripts.errors import UserError
from lmscripts.models import DECODERS, FAMILIES

Kind = Literal["causal", "masked", "electra"]
# Types whose positions are counted from the padding id + 1: they read so many tokens fewer than they have places for.
OFFSET_POSITIONS: tuple[str, ...] = ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm")
OFFSET_POSITIONS += ("longformer", "xmod", "data2vec-text")
# As causal models are called: GPT2DoubleHeadsModel has the head as well, and files of 2023 say LLaMAForCausalLM.
_CAUSAL_NAME = re.compile(r"(ForCausalLM|LMHeadModel|WithLMHead|DoubleHeadsModel)$")
_ALSO_WHOLE = {"BertForMaskedLM": ["BertForPreTraining"]}  # what brings the same head among others
_ROUNDING = (
    3e-5  # of the highest logit; looking ahead changes a fresh model by 5e-4 and more, a trained one by far more
)


def kind_of(place: Path, config: Any) -> tuple[Kind, str]:
    """What the model predicts, and the family whose functions run it.

    Raises:
        UserError: its type is not evaluated, or it was saved as something that predicts no tokens.
    """
    family, names = str(config.model_type), list(getattr(config, "architectures", None) or [])
    decodes = bool(getattr(config, "is_decoder", False)) or any(map(_CAUSAL_NAME.search, names))
    if family in FAMILIES and family not in DECODERS and not decodes:
        if family != "electra":
            return "masked", family
        return ("masked" if names == ["ElectraForMaskedLM"] else "electra"), family
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "causal", family if family in DECODERS else DECODERS[0]
    raise UserError(
        f"{place} is a model of the type {family}; evaluated are {_masked_types()} and causal language models"
    )


def architecture_of(kind: Kind, family: str, config: Any) -> Any:
    """The class of transformers that the weights must fill."""
    if kind == "causal":
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if family == "electra":
        return ElectraForPreTraining if kind == "electra" else ElectraForMaskedLM
    return FAMILIES[family].architecture


def check_saved_as(place: Path, config: Any, architecture: Any) -> None:
    """Refuse what was saved as another architecture than one that brings all of the wanted one.

    Args:
        place: the folder.
        config: its configuration; where it names no architecture, the check of the weights has to do.
        architecture: from `architecture_of`.

    Raises:
        UserError: a classifier, a bare body, a model of another kind.
    """
    names, family, wanted = list(getattr(config, "architectures", None) or []), config.model_type, architecture.__name__
    masked = [each.architecture.__name__ for name, each in FAMILIES.items() if name not in DECODERS]
    causal = wanted not in (*masked, ElectraForMaskedLM.__name__)
    accepted = [wanted, *([] if causal else _ALSO_WHOLE.get(wanted, []))]
    if not names or any(name in accepted or (causal and _CAUSAL_NAME.search(name)) for name in names):
        return
    decoder = " with is_decoder" if getattr(config, "is_decoder", False) else ""
    others = f"; masked language models are evaluated of the types {_masked_types()}" if causal else ""
    raise UserError(
        f"{place} was saved as {', '.join(map(str, names))}{decoder}, and that is not what is scored of the type "
        f"{family}: architectures in config.json has to name {' or '.join(accepted)}{others}"
    )


def _masked_types() -> str:
    return ", ".join(name for name in FAMILIES if name not in DECODERS)


@torch.no_grad()
def check_looks_back(model: PreTrainedModel, ids: Iterable[int], longest: int | None, place: Path) -> None:
    """Prove that no logit of a causal model depends on a later token.

    Two rows of random tokens are read twice, the second time with one token changed: the last, and one in the middle.
    Before it nothing may change but by rounding. What depends on how many tokens of a batch go one way (mixtures of
    experts) rounds differently at most, because no model of transformers drops tokens there when it is evaluated.

    Args:
        model: in evaluation mode.
        ids: of ordinary tokens.
        longest: tokens that the model reads; None where nothing says.
        place: its folder, for the sentence.

    Raises:
        UserError: it looks ahead, or it cannot be run on token ids alone.
    """
    ordinary = torch.tensor(sorted(ids))
    length = min(24, longest or 24)
    if len(ordinary) < 2 or length < 2:
        raise UserError(f"{place} reads {length} tokens of {len(ordinary)} kinds: too few to score")
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ordinary), (2, length), generator=random)
    changed, places = drawn.clone(), [length - 1, length // 2]
    for row, at in enumerate(places):
        changed[row, at] = (drawn[row, at] + 1) % len(ordinary)
    logits = []
    try:
        for rows in (drawn, changed):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # a few draw random numbers even in evaluation mode (Reformer's hashes)
                logits.append(model(input_ids=ordinary[rows].to(model.device), use_cache=False).logits.float())
    except Exception as error:  # an architecture of any kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: a {type(model).__name__} cannot be run on tokens alone ({reason})") from error
    before, after = logits
    moved = max(float((before - after)[row, :at].abs().max()) for row, at in enumerate(places))
    moved /= float(before.abs().max()) or 1.0
    if moved > _ROUNDING:
        raise UserError(
            f"{place} looks ahead: a later token changes the logits before it, by {moved:.1e} of the highest, so a "
            f"{type(model).__name__} with this configuration is no causal language model and its perplexity would mean "
            "nothing"
        )


def longest_input(configs: Iterable[Any]) -> int | None:
    """Tokens of the longest input with special tokens that all the models read; None where nothing says."""
    lengths = []
    for config in configs:
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:  # -1 is XLNet's word for any length
            offset = config.model_type in OFFSET_POSITIONS
            lengths.append(positions - ((config.pad_token_id or 0) + 1 if offset else 0))
    return min(lengths, default=None)
