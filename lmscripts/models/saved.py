"""Saved models to evaluate: found, checked and loaded so that nobody scores what was never trained without knowing it.

transformers fills up with random numbers what a folder lacks, and an older system scored a random model because it
passed over the checkpoint it was given. Here weights must be there, whole, and fill the architecture; and weights that
are still as initialisation makes them are named.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ElectraForMaskedLM, PreTrainedModel

from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.models.kind import (
    OFFSET_POSITIONS,
    Kind,
    architecture_of,
    check_looks_back,
    check_saved_as,
    kind_of,
    longest_input,
)
from lmscripts.models.pretrained import load_pretrained
from lmscripts.models.untrained import signs_of_no_training
from lmscripts.tokenizer.encoder import Encoder, load_encoder
from lmscripts.training.checkpoint import (
    CHECKSUMS,
    average_notice,
    checkpoint_step,
    find_damage,
    list_checkpoints,
    look_for_whole,
)
from lmscripts.training.folder import read_state

# In the order in which transformers looks for them; of a model in parts the index names the parts.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER_FILES: tuple[str, ...] = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
_TOKENIZER_FILES += ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


@dataclass(frozen=True)
class SavedModel:
    """A model that was loaded, with what has to be known of it.

    Attributes:
        name: as it was given, and for the folder of a run what was taken of it.
        kind: what it predicts: the next token, masked tokens, or (ELECTRA's pair) both masked and replaced tokens.
        family: a key of `lmscripts.models.FAMILIES`.
        model_type: of its configuration.
        models: in evaluation mode, by subfolder as in `lmscripts.models`.
        encoder: its tokenizer.
        weights: sha256 by file.
        step: optimizer steps done; None where nothing says.
        untrained: why it counts as never trained; empty for a trained model.
        longest: tokens of its longest input with special tokens; None where its configuration says none.
        notices: sentences for the user.
    """

    name: str
    kind: Kind
    family: str
    model_type: str
    models: dict[str, PreTrainedModel]
    encoder: Encoder
    weights: dict[str, str]
    step: int | None
    untrained: list[str]
    longest: int | None
    notices: list[str]


# ---- which folder ------------------------------------------------------------------------------------------------


_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # owner/name, which nobody is asked about if it is a path


def find_model(name: str) -> tuple[Path, list[str]]:
    """The folder of the model that is meant: of a run its final/, else its newest whole checkpoint.

    Nothing is renamed or removed: the run may be going on.

    Args:
        name: a model's folder, a checkpoint, the folder of a run, or a name on the Hub (from its cache when offline).

    Returns:
        The folder, and sentences for the user.

    Raises:
        UserError: there is none, or it is damaged.
    """
    place = Path(name).expanduser()
    if place.is_file():
        raise UserError(f"{place} is a file, not a folder: give the folder of the model")
    if not place.is_dir():
        if not _HUB_NAME.fullmatch(name) or name.endswith((".ckpt", ".pt", ".bin", ".safetensors")):
            raise UserError(f"the model folder {place} does not exist (seen from {Path.cwd()})")
        return _from_hub(name), []
    notices: list[str] = []
    if not (place / "config.json").is_file() and (list_checkpoints(place) or (place / "final").is_dir()):
        run = place
        if (run / "final" / "config.json").is_file():
            place = run / "final"
        else:
            newest, notices = look_for_whole(run)
            if newest is None:
                raise UserError(f"every checkpoint in {run} is damaged: {'; '.join(notices)}")
            place = newest
        notices = [*notices, f"{run} is the folder of a run: {place.name} is taken"]
    elif (place / "training_state.json").exists():
        notices = average_notice(place)
    of_training = (place / CHECKSUMS).exists() or (place / "training_state.json").exists()
    if (of_training or checkpoint_step(place) is not None) and (damage := find_damage(place)):
        raise UserError(f"the checkpoint {place} is damaged: {damage}; take another")
    return place, notices


def _from_hub(name: str) -> Path:
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(name, "config.json")
    except Exception as error:  # the Hub client raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is neither a folder (seen from {Path.cwd()}) nor a model of the Hub: {reason}"
        ) from None
    return Path(str(file)).parent


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers takes the weights of a folder from; empty where there are none.

    Raises:
        UserError: they are several, and their index is damaged.
    """
    for name in _WEIGHTS:
        if (file := folder / name).is_file():
            if not name.endswith(".json"):
                return [file]
            return [folder / part for part in _parts(file)]
    return []


def _parts(index: Path) -> list[str]:
    """Names of the files that the index of weights in several files speaks of."""
    try:
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: it is no index of weights ({type(error).__name__}: {error})") from None
    if not parts or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{index} is damaged: its weight_map names no files of weights")
    return sorted(parts)


# ---- loading -----------------------------------------------------------------------------------------------------


def open_model(name: str, generator_dir: str | None = None, tokenizer_dir: str | None = None) -> SavedModel:
    """Load a model and its tokenizer, and check that they are whole, fit together, and were trained.

    Args:
        name: see `find_model`.
        generator_dir: ELECTRA: the generator, where it is not in the subfolder generator/.
        tokenizer_dir: the tokenizer, where the model's folder has none.

    Raises:
        UserError: no weights, or weights that do not fill the model; a damaged checkpoint; a tokenizer that does not
            suit the model; a model of a kind that is not evaluated, or one that looks ahead; an option without effect.
    """
    place, notices = find_model(name)
    hub = not Path(name).expanduser().is_dir()
    config = _config(place)
    kind, family = kind_of(place, config)
    folders = {"": (name if hub else str(place), architecture_of(kind, family, config))}
    check_saved_as(place, config, folders[""][1])
    if generator := _generator(place, kind, generator_dir):
        folders["generator"] = (str(generator), ElectraForMaskedLM)
        check_saved_as(generator, _config(generator), ElectraForMaskedLM)
        notices = [*notices, *([f"the generator is {generator}"] if generator_dir else [])]
    if not hub:
        for folder, _ in folders.values():
            _check_has_weights(Path(folder))
    models = {subfolder: _load(kind, *what) for subfolder, what in folders.items()}
    longest = longest_input([model.config for model in models.values()])
    encoder = _tokenizer(name, place, tokenizer_dir, hub)
    _check_vocabulary(models, encoder, place)
    notices += _check_special_ids(models, encoder, kind, place, chosen=tokenizer_dir is not None)
    if kind == "causal":
        check_looks_back(models[""], _ordinary_ids(models[""], encoder), longest, place)
    weights: dict[str, str] = {}
    for subfolder, (folder, _) in folders.items():
        files = weight_files(Path(folder) if subfolder else place)
        weights |= {str(Path(subfolder, file.name)): file_sha256(file) for file in files}
    step, untrained = _state(place)
    for subfolder, model in models.items():
        signs, part = signs_of_no_training(model, step), subfolder or "the model"
        untrained += [f"{part}: {why}" for why in signs.untrained]
        notices += [f"it cannot be told whether {part} was trained: {why}" for why in signs.doubts]
    return SavedModel(
        name=name if place == Path(name).expanduser() or hub else f"{name} ({place.name})",
        kind=kind,
        family=family,
        model_type=str(config.model_type),
        models=models,
        encoder=encoder,
        weights=weights,
        step=step,
        untrained=untrained,
        longest=longest,
        notices=notices,
    )


def _generator(place: Path, kind: Kind, generator_dir: str | None) -> Path | None:
    """The folder of ELECTRA's other half; None for other models."""
    own = place / "generator"
    if kind != "electra" or (own / "config.json").is_file():
        if generator_dir is not None:
            why = f"{place} has its own in {own}" if kind == "electra" else f"{place} is no discriminator of ELECTRA"
            raise UserError(f"--generator_dir {generator_dir} has no effect: {why}")
        return own if kind == "electra" else None
    if generator_dir is None:
        raise UserError(
            f"{place} is an ELECTRA discriminator without its generator, whose samples it is to find: give "
            "--generator_dir"
        )
    return find_model(generator_dir)[0]


def _load(kind: Kind, folder: str, architecture: Any) -> PreTrainedModel:
    attention = "sdpa" if getattr(architecture, "_supports_sdpa", False) else "eager"
    settings: Any = {"attn_implementation": attention, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    loaded: Any = AutoModelForCausalLM if kind == "causal" else architecture
    model = load_pretrained(folder, loaded, **settings)
    model.train(False)
    return model


def _config(place: Path) -> Any:
    if not (place / "config.json").is_file():
        raise UserError(f"{place} holds no model: it has no config.json, and no checkpoint of a run")
    try:
        return AutoConfig.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # whatever a foreign or damaged file makes transformers raise
        raise UserError(f"{place / 'config.json'} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _check_has_weights(folder: Path) -> None:
    found = weight_files(folder)
    if not found:
        raise UserError(
            f"{folder} holds no weights (neither {_WEIGHTS[0]} nor {_WEIGHTS[2]}): a model made from its config.json "
            "alone would be random"
        )
    if missing := [file.name for file in found if not file.is_file()]:
        raise UserError(f"{folder} lacks {missing[0]}, one of the {len(found)} files of its weights")


def _tokenizer(name: str, place: Path, tokenizer_dir: str | None, hub: bool) -> Encoder:
    if hub and tokenizer_dir is None:
        AutoTokenizer.from_pretrained(name)  # type: ignore[no-untyped-call]  # brings its files to the cache
    has_own = any((place / file).is_file() for file in _TOKENIZER_FILES)
    if has_own and tokenizer_dir is not None:
        raise UserError(f"--tokenizer_dir {tokenizer_dir} has no effect: {place} has the tokenizer of the model")
    if not has_own and tokenizer_dir is None:
        raise UserError(f"{place} has no tokenizer beside the model: give --tokenizer_dir")
    return load_encoder(tokenizer_dir or place)


def _check_vocabulary(models: dict[str, PreTrainedModel], encoder: Encoder, place: Path) -> None:
    rooms = {}
    highest = max(encoder.tokenizer.get_vocab().values())
    for subfolder, model in models.items():
        rooms[subfolder] = _room(model)
        if highest >= rooms[subfolder]:
            raise UserError(
                f"the tokenizer {encoder.folder} has ids up to {highest}, but the vocabulary of {place / subfolder} "
                f"has {rooms[subfolder]} entries: it is the tokenizer of another model"
            )
    if len(set(rooms.values())) > 1:
        raise UserError(
            f"the generator has {rooms['generator']} entries in its vocabulary, the discriminator {rooms['']}: they "
            "are no pair"
        )


def _check_special_ids(
    models: dict[str, PreTrainedModel], encoder: Encoder, kind: Kind, place: Path, *, chosen: bool
) -> list[str]:
    """Compare the special tokens that a score depends on with what config.json says of them.

    Many configurations say nothing, or what their class says of itself (an id beyond the vocabulary): that proves
    nothing. Of the padding only RoBERTa's kin depends, by their positions; elsewhere it often differs.
    """
    notices = []
    for subfolder, model in models.items():
        important = {"bos", "eos"} if kind == "causal" else {"cls", "sep", "mask"}
        important |= {"pad"} if model.config.model_type in OFFSET_POSITIONS else set()
        for name in ("pad", "bos", "eos", "cls", "sep", "mask"):
            ours, said = getattr(encoder, f"{name}_id"), getattr(model.config, f"{name}_token_id", None)
            allowed = [each for each in (said if isinstance(said, list) else [said]) if isinstance(each, int)]
            if ours is None or ours in allowed or not any(0 <= each < _room(model) for each in allowed):
                continue
            sentence = (
                f"the {name} token has the id {ours} in the tokenizer {encoder.folder}, but {place / subfolder} says "
                f"{said} in its config.json"
            )
            if chosen and name in important:
                raise UserError(f"{sentence}: it is the tokenizer of another model, or config.json has to be corrected")
            notices += [sentence] if name in important or kind != "causal" else []
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
    if not (place / "training_state.json").is_file():
        return checkpoint_step(place), []
    progress = read_state(place)["progress"]
    step = int(progress["step"])
    begun_anew = step == 0 and not progress.get("origin")  # else the weights are those of an earlier training
    return step, ["training_state.json says step 0"] if begun_anew else []
