"""Saved models to evaluate: checked and loaded so that nobody scores what was never trained without knowing it.

Of weights that are whole (see `lmscripts.models.loading`) those still as initialisation makes them are named. And a
configuration says little: transformers builds a causal model from the weights of a masked one, of a classifier or of a
bare body, and a model that sees what it is to predict has a wonderful perplexity.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.models import decoder
from lmscripts.models.checks import check_looks_back
from lmscripts.models.families import architectures, family, names
from lmscripts.models.finding import STATE, checkpoint_step, find_model, read_state, weight_files
from lmscripts.models.fitting import OFFSET_POSITIONS, longest_input
from lmscripts.models.loading import check_vocabulary, load_model, read_config, tokenizer_of
from lmscripts.models.policy import PolicyModel
from lmscripts.tokenizer.encoder import Encoder

# As causal models are called: GPT2DoubleHeadsModel has the head as well, and files of 2023 say LLaMAForCausalLM.
_CAUSAL_NAME = re.compile(r"(ForCausalLM|LMHeadModel|WithLMHead|DoubleHeadsModel)$")


@dataclass(frozen=True)
class Saved:
    """Models that were loaded, with what has to be known of them.

    Attributes:
        name: as it was given, and for the folder of a run what was taken of it.
        model_type: as their configuration says.
        models: in evaluation mode, by subfolder.
        weights: sha256 by file.
        step: optimizer steps done; None where nothing says.
        untrained: why it counts as never trained; empty for a trained model.
        notices: sentences for the user.
    """

    name: str
    model_type: str
    models: dict[str, PreTrainedModel]
    weights: dict[str, str]
    step: int | None
    untrained: list[str]
    notices: list[str]


@dataclass(frozen=True)
class SavedModel(Saved):
    """A language model that was loaded.

    Attributes:
        objective: what it predicts.
        family: module with the functions that run it, see `lmscripts.models.families`.
        encoder: its tokenizer.
        longest: tokens of its longest input with special tokens; None where its configuration says none.
    """

    objective: str
    family: Any
    encoder: Encoder
    longest: int | None


def open_model(
    name: str, objectives: Collection[str], generator_dir: str | None = None, tokenizer_dir: str | None = None
) -> SavedModel:
    """Load a model and its tokenizer, and check that they are whole, fit together, and were trained.

    Args:
        name: see `lmscripts.models.finding.find_model`.
        objectives: what it may predict.
        generator_dir: of ELECTRA, where it is not in the subfolder generator/.
        tokenizer_dir: the tokenizer, where the model's folder has none.

    Raises:
        UserError: no weights, or weights that do not fill the model; a damaged checkpoint; a tokenizer that does not
            suit the model; a model of a kind that is not evaluated, or one that looks ahead; an option without effect.
    """
    place, notices = find_model(name)
    hub = not Path(name).expanduser().is_dir()
    config = read_config(place)
    module, objective = what_it_predicts(place, config, objectives)
    heads = {"": AutoModelForCausalLM} if objective == "causal" else architectures(config.model_type, objective)
    folders = {"": (name if hub else str(place))}
    for part in (part for part in heads if part):
        folders[part] = str(_other_half(place, part, generator_dir))
        notices = [*notices, *([f"the {part} is {folders[part]}"] if generator_dir else [])]
    if generator_dir is not None and len(heads) == 1:
        raise UserError(f"--generator_dir {generator_dir} has no effect: {place} is no discriminator of ELECTRA")
    models = {
        part: load_model(folders[part], head, read_config(folders[part], head))[0] for part, head in heads.items()
    }
    lengths = [length for model in models.values() if (length := longest_input(model.config)) is not None]
    encoder = tokenizer_of(folders[""], place, tokenizer_dir)
    rooms = {part: _room(model) for part, model in models.items()}
    for part, room in rooms.items():
        check_vocabulary(encoder, room, place / part)
        if room != rooms[""]:
            raise UserError(
                f"the {part} has {room} entries in its vocabulary, the discriminator {rooms['']}: they are no pair"
            )
    notices += _check_special_ids(models, encoder, objective, place, chosen=tokenizer_dir is not None)
    if objective == "causal":
        check_looks_back(models[""], _ordinary_ids(models[""], encoder), min(lengths, default=None), place)
    return SavedModel(
        **_facts(name, place, folders, models, notices),
        objective=objective,
        family=module,
        encoder=encoder,
        longest=min(lengths, default=None),
    )


def open_policy(name: str) -> Saved:
    """Load a policy, see `lmscripts.models.policy`, and check that it is whole and was trained; as `open_model`."""
    place, notices = find_model(name)
    folder = str(place) if Path(name).expanduser().is_dir() else name
    model, _ = load_model(folder, PolicyModel, read_config(place, PolicyModel))
    return Saved(**_facts(name, place, {"": folder}, {"": model}, notices))


def _facts(
    name: str, place: Path, folders: dict[str, str], models: dict[str, PreTrainedModel], notices: list[str]
) -> dict[str, Any]:
    """What is known of models, by subfolder, from their folders and their weights; see `Saved`."""
    files = {part: weight_files(Path(folder) if part else place) for part, folder in folders.items()}
    step, untrained = _state(place)
    for part, model in models.items():
        never, doubt = signs_of_no_training(model, step)
        untrained += [f"{part or 'the model'}: {never}"] if never else []
        notices = [*notices, *([f"it cannot be told whether {part or 'the model'} was trained: {doubt}"] * bool(doubt))]
    hub = not Path(name).expanduser().is_dir()
    return {
        "name": name if place == Path(name).expanduser() or hub else f"{name} ({place.name})",
        "model_type": str(models[""].config.model_type),
        "models": models,
        "weights": {str(Path(part, file.name)): file_sha256(file) for part in files for file in files[part]},
        "step": step,
        "untrained": untrained,
        "notices": notices,
    }


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
        for other, head in module.heads.items():  # which may bring along the head of one that is scored
            if other not in heads and head[""] in saved_as and not getattr(transformers, head[""])._tied_weights_keys:
                raise UserError(f"{place} was trained on the objective {other}, which has no scores of a text")
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
            f"{model_type}: architectures in config.json has to name "
            f"{decoder.causal_class(model_type, config).__name__}; masked language models are evaluated of the types "
            f"{_masked_types()}"
        )
    return module, objective


def _masked_types() -> str:
    return ", ".join(name for name in names() if "causal" not in family(name).heads)


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


def _room(model: Any) -> int:
    """Entries of the vocabulary that the model has embeddings for."""
    return len(model.get_input_embeddings().weight)


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
    progress = read_state(place, "progress")["progress"]
    step = int(progress["step"])
    begun_anew = step == 0 and not progress.get("origin")  # else the weights are those of an earlier training
    return step, [f"{STATE} says step 0"] if begun_anew else []


# ---- was it trained ------------------------------------------------------------------------------------------------


def signs_of_no_training(model: PreTrainedModel, steps: int | None = None) -> tuple[str, str]:
    """Why a model counts as never trained, all of it or its head, and why that cannot be told; empty where not so.

    Gains of normalisations begin as ones and biases as zeros, and the first optimizer step moves them. Matrices begin
    with random numbers and prove nothing, so a model without gains and biases, or with random ones, is never named. One
    whose gains and biases were all frozen while its matrices were trained looks as a fresh one does, and is named
    unless its steps are on record.

    A doubt it is where steps of training are on record, and where weights were saved in half precision and only gains
    could have moved: there 1 stays 1 under small steps.
    """
    matrices = [tensor.detach() for tensor in model.parameters() if tensor.ndim > 1]
    if matrices and all(map(_is_constant, matrices)):
        return f"each of its {len(matrices)} matrices holds one value, which no training leaves", ""
    vectors = {name: each.detach() for name, each in model.named_parameters() if each.ndim == 1 and each.numel() > 1}
    body = f"{model.base_model_prefix}."
    head = [tensor for name, tensor in vectors.items() if not name.startswith(body)]
    for part, tensors in (("every part", list(vectors.values())), ("the head", head)):
        if not tensors or not all(_is_constant(tensor) and float(tensor[0]) in (0.0, 1.0) for tensor in tensors):
            continue
        why = f"{part} is as freshly initialised: {len(tensors)} biases and gains of normalisations have not moved"
        if steps:
            counted = f"{steps:,} steps of training are" if steps > 1 else "1 step of training is"
            return "", f"{why}, although {counted} on record"
        some = matrices[0].reshape(-1)[:4096] if matrices else torch.full((1,), 1e-9)
        half = any(torch.equal(some.to(precision).to(some), some) for precision in (torch.bfloat16, torch.float16))
        if half and all(bool(tensor.any()) for tensor in tensors):
            return "", f"{why}, but in half precision small steps would not show"
        return why, ""
    return "", ""


def _is_constant(tensor: Tensor) -> bool:
    values = tensor.reshape(-1)
    return bool((values[:1000] == values[0]).all()) and bool((values == values[0]).all())
