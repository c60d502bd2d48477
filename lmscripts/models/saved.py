"""Saved models to evaluate: checked and loaded so that nobody scores what was never trained without knowing it.

Of weights that are whole (see `lmscripts.models.loading`) those still as initialisation makes them are named. And a
configuration says little: transformers builds a causal model from the weights of a masked one, of a classifier or of a
bare body, and a model that sees what it is to predict has a wonderful perplexity.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lmscripts.errors import UserError, shortened
from lmscripts.files import file_sha256
from lmscripts.models import decoder
from lmscripts.models.families import family, names
from lmscripts.models.finding import STATE, checkpoint_step, find_model, read_state, weight_files
from lmscripts.models.fitting import OFFSET_POSITIONS, longest_input
from lmscripts.models.loading import check_vocabulary, load_model, read_config, tokenizer_of
from lmscripts.models.untrained import signs_of_no_training
from lmscripts.tokenizer.encoder import Encoder

# As causal models are called: GPT2DoubleHeadsModel has the head as well, and files of 2023 say LLaMAForCausalLM.
_CAUSAL_NAME = re.compile(r"(ForCausalLM|LMHeadModel|WithLMHead|DoubleHeadsModel)$")
_ROUNDING = 3e-5  # of the highest logit; looking ahead changes a fresh model by 5e-4, a trained one by far more


@dataclass(frozen=True)
class SavedModel:
    """A model that was loaded, with what has to be known of it.

    Attributes:
        name: as it was given, and for the folder of a run what was taken of it.
        objective: name of what it predicts, see `lmscripts.objectives`.
        family: module with the functions that run it, see `lmscripts.models.families`.
        model_type: of its configuration.
        models: in evaluation mode, by subfolder.
        encoder: its tokenizer.
        weights: sha256 by file.
        step: optimizer steps done; None where nothing says.
        untrained: why it counts as never trained; empty for a trained model.
        longest: tokens of its longest input with special tokens; None where its configuration says none.
        notices: sentences for the user.
    """

    name: str
    objective: str
    family: Any
    model_type: str
    models: dict[str, PreTrainedModel]
    encoder: Encoder
    weights: dict[str, str]
    step: int | None
    untrained: list[str]
    longest: int | None
    notices: list[str]


def open_model(
    name: str, objectives: Collection[str], generator_dir: str | None = None, tokenizer_dir: str | None = None
) -> SavedModel:
    """Load a model and its tokenizer, and check that they are whole, fit together, and were trained.

    Args:
        name: see `lmscripts.models.finding.find_model`.
        objectives: what it may predict.
        generator_dir: ELECTRA: the generator, where it is not in the subfolder generator/.
        tokenizer_dir: the tokenizer, where the model's folder has none.

    Raises:
        UserError: no weights, or weights that do not fill the model; a damaged checkpoint; a tokenizer that does not
            suit the model; a model of a kind that is not evaluated, or one that looks ahead; an option without effect.
    """
    place, notices = find_model(name)
    hub = not Path(name).expanduser().is_dir()
    config = read_config(place)
    module, objective = what_it_predicts(place, config, objectives)
    heads = {"": config_head(config)} if objective == "causal" else module.heads[objective]
    folders = {"": (name if hub else str(place))}
    for part in (part for part in heads if part):
        folders[part] = str(_other_half(place, part, generator_dir))
        notices = [*notices, *([f"the {part} is {folders[part]}"] if generator_dir else [])]
    if generator_dir is not None and len(heads) == 1:
        raise UserError(f"--generator_dir {generator_dir} has no effect: {place} is no discriminator of ELECTRA")
    models = {part: _load(folders[part], heads[part]) for part in heads}
    lengths = [length for model in models.values() if (length := longest_input(model.config)) is not None]
    encoder = tokenizer_of(folders[""], place, tokenizer_dir)
    _check_vocabulary(models, encoder, place)
    notices += _check_special_ids(models, encoder, objective, place, chosen=tokenizer_dir is not None)
    if objective == "causal":
        check_looks_back(models[""], _ordinary_ids(models[""], encoder), min(lengths, default=None), place)
    weights: dict[str, str] = {}
    for part, folder in folders.items():
        files = weight_files(Path(folder) if part else place)
        weights |= {str(Path(part, file.name)): file_sha256(file) for file in files}
    step, untrained = _state(place)
    for part, model in models.items():
        signs, what = signs_of_no_training(model, step), part or "the model"
        untrained += [f"{what}: {why}" for why in signs.untrained]
        notices += [f"it cannot be told whether {what} was trained: {why}" for why in signs.doubts]
    return SavedModel(
        name=name if place == Path(name).expanduser() or hub else f"{name} ({place.name})",
        objective=objective,
        family=module,
        model_type=str(config.model_type),
        models=models,
        encoder=encoder,
        weights=weights,
        step=step,
        untrained=untrained,
        longest=min(lengths, default=None),
        notices=notices,
    )


# ---- what it is ----------------------------------------------------------------------------------------------------


def what_it_predicts(place: Path, config: Any, objectives: Collection[str]) -> tuple[Any, str]:
    """The family whose functions run a saved model, and the objective that it was trained on.

    Raises:
        UserError: its type is not evaluated, or it was saved as something that predicts no tokens.
    """
    saved_as, model_type = list(getattr(config, "architectures", None) or []), str(config.model_type)
    is_causal = bool(getattr(config, "is_decoder", False)) or any(map(_CAUSAL_NAME.search, saved_as))
    if model_type in names() and not is_causal:
        module = family(model_type)
        heads = {objective: head for objective, head in module.heads.items() if objective in objectives}
        by_name = [objective for objective, head in heads.items() if head[""] in saved_as]
        objective = by_name[0] if by_name else module.default_objective
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        module, objective = decoder, "causal"
    else:
        raise UserError(
            f"{place} is a model of the type {model_type}; evaluated are {_masked_types()} and causal language models"
        )
    if objective == "causal" and saved_as and not any(map(_CAUSAL_NAME.search, saved_as)):
        flag = " with is_decoder" if getattr(config, "is_decoder", False) else ""
        raise UserError(
            f"{place} was saved as {', '.join(map(str, saved_as))}{flag}, and that is not what is scored of the type "
            f"{model_type}: architectures in config.json has to name {config_head(config)}; masked language models are "
            f"evaluated of the types {_masked_types()}"
        )
    return module, objective


def config_head(config: Any) -> str:
    """Name of the class that AutoModelForCausalLM takes for a configuration."""
    return str(decoder.causal_class(config.model_type, config).__name__)


def _masked_types() -> str:
    return ", ".join(name for name in names() if "causal" not in family(name).heads)


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
    drawn = torch.randint(len(ordinary), (2, length), generator=torch.Generator().manual_seed(0))
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
        raise UserError(
            f"{place}: a {type(model).__name__} cannot be run on tokens alone ({shortened(error)})"
        ) from error
    before, after = logits
    moved = max(float((before - after)[row, :at].abs().max()) for row, at in enumerate(places))
    moved /= float(before.abs().max()) or 1.0
    if moved > _ROUNDING:
        raise UserError(
            f"{place} looks ahead: a later token changes the logits before it, by {moved:.1e} of the highest, so a "
            f"{type(model).__name__} with this configuration is no causal language model and its perplexity would mean "
            "nothing"
        )


# ---- loading -------------------------------------------------------------------------------------------------------


def _other_half(place: Path, part: str, generator_dir: str | None) -> Path:
    """The folder of the model beside a discriminator."""
    own = place / part
    if (own / "config.json").is_file():
        if generator_dir is not None:
            raise UserError(f"--generator_dir {generator_dir} has no effect: {place} has its own in {own}")
        return own
    if generator_dir is None:
        raise UserError(
            f"{place} is an ELECTRA discriminator without its generator, whose samples it is to find: give "
            "--generator_dir"
        )
    return find_model(generator_dir)[0]


def _load(folder: str, head: str) -> PreTrainedModel:
    architecture: Any = AutoModelForCausalLM if _CAUSAL_NAME.search(head) else getattr(transformers, head)
    return load_model(folder, architecture, read_config(folder, architecture))[0]


def _check_vocabulary(models: dict[str, PreTrainedModel], encoder: Encoder, place: Path) -> None:
    rooms = {part: _room(model) for part, model in models.items()}
    for part, room in rooms.items():
        check_vocabulary(encoder, room, place / part)
    if len(set(rooms.values())) > 1:
        raise UserError(
            f"the generator has {rooms['generator']} entries in its vocabulary, the discriminator {rooms['']}: they "
            "are no pair"
        )


def _check_special_ids(
    models: dict[str, PreTrainedModel], encoder: Encoder, objective: str, place: Path, *, chosen: bool
) -> list[str]:
    """Compare the special tokens that a score depends on with what config.json says of them.

    Many configurations say nothing, or what their class says of itself (an id beyond the vocabulary): that proves
    nothing. Of the padding only RoBERTa's kin depends, by their positions; elsewhere it often differs.
    """
    notices, causal = [], objective == "causal"
    for part, model in models.items():
        important = {"bos", "eos"} if causal else {"cls", "sep", "mask"}
        important |= {"pad"} if model.config.model_type in OFFSET_POSITIONS else set()
        for name in ("pad", "bos", "eos", "cls", "sep", "mask"):
            ours, said = getattr(encoder, f"{name}_id"), getattr(model.config, f"{name}_token_id", None)
            allowed = [each for each in (said if isinstance(said, list) else [said]) if isinstance(each, int)]
            if ours is None or ours in allowed or not any(0 <= each < _room(model) for each in allowed):
                continue
            sentence = (
                f"the {name} token has the id {ours} in the tokenizer {encoder.folder}, but {place / part} says "
                f"{said} in its config.json"
            )
            if chosen and name in important:
                raise UserError(f"{sentence}: it is the tokenizer of another model, or config.json has to be corrected")
            notices += [sentence] if name in important or not causal else []
    if chosen:
        notices.append(
            f"nothing proves that the tokenizer {encoder.folder} is that of {place}: only the size of the vocabulary "
            "and the ids of special tokens could be compared"
        )
    return list(dict.fromkeys(notices))


def _room(model: PreTrainedModel) -> int:
    """Entries of the vocabulary that the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _ordinary_ids(model: PreTrainedModel, encoder: Encoder) -> set[int]:
    """Ids of tokens that stand for nothing but text."""
    special: set[Any] = set(encoder.special_ids)
    for key, value in model.config.to_dict().items():
        if key.endswith(("_token_id", "_token_index")):
            special |= set(value) if isinstance(value, list) else {value}
    return set(encoder.tokenizer.get_vocab().values()) - special


def _state(place: Path) -> tuple[int | None, list[str]]:
    """Steps done, and why the state says that nothing was trained."""
    if not (place / STATE).is_file():
        return checkpoint_step(place), []
    progress = read_state(place)["progress"]
    step = int(progress["step"])
    begun_anew = step == 0 and not progress.get("origin")  # else the weights are those of an earlier training
    return step, [f"{STATE} says step 0"] if begun_anew else []
