"""Saved models to evaluate: found, checked and loaded so that nobody scores what was never trained without knowing it.

transformers fills up with random numbers what a folder lacks, and an older system scored a random model because it
passed over the checkpoint it was given. Here weights must be there, whole, and fill the architecture; and weights that
are still as initialisation makes them are named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lmscripts.checkpoint import (
    CHECKSUMS,
    average_notice,
    checkpoint_step,
    find_damage,
    list_checkpoints,
    look_for_whole,
)
from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.models import DECODERS, FAMILIES
from lmscripts.pretrained import load_pretrained
from lmscripts.run_folder import read_state
from lmscripts.tokenization import Encoder, load_encoder

Kind = Literal["causal", "masked", "electra"]
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
    """The files that transformers takes the weights of a folder from; empty where there are none."""
    for name in _WEIGHTS:
        if (file := folder / name).is_file():
            if not name.endswith(".json"):
                return [file]
            parts = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / part for part in sorted(set(parts))]
    return []


# ---- loading -----------------------------------------------------------------------------------------------------


def open_model(name: str, generator_dir: str | None = None, tokenizer_dir: str | None = None) -> SavedModel:
    """Load a model and its tokenizer, and check that they are whole, fit together, and were trained.

    Args:
        name: see `find_model`.
        generator_dir: ELECTRA: the generator, where it is not in the subfolder generator/.
        tokenizer_dir: the tokenizer, where the model's folder has none.

    Raises:
        UserError: no weights, or weights that do not fill the model; a damaged checkpoint; a tokenizer that does not
            suit the model; a model of a kind that is not evaluated; an option without effect.
    """
    place, notices = find_model(name)
    hub = not Path(name).expanduser().is_dir()
    config = _config(place)
    kind, family = _kind_of(place, config)
    if kind != "electra" and generator_dir is not None:
        raise UserError(f"--generator_dir {generator_dir} has no effect: {place} is no discriminator of ELECTRA")
    folders = {"": (name if hub else str(place), _architecture(kind, family, config))}
    if kind == "electra":
        if generator_dir is None and not (place / "generator" / "config.json").is_file():
            raise UserError(
                f"{place} is an ELECTRA discriminator without its generator, whose samples it is to find: give "
                "--generator_dir"
            )
        generator = find_model(generator_dir)[0] if generator_dir else place / "generator"
        folders["generator"] = (str(generator), ElectraForMaskedLM)
    if not hub:
        for folder, _ in folders.values():
            _check_has_weights(Path(folder))
    models: dict[str, PreTrainedModel] = {}
    for subfolder, (folder, architecture) in folders.items():
        attention = "sdpa" if getattr(architecture, "_supports_sdpa", False) else "eager"
        settings: Any = {"attn_implementation": attention, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        loaded: Any = AutoModelForCausalLM if kind == "causal" else architecture
        models[subfolder] = load_pretrained(folder, loaded, **settings)
        models[subfolder].train(False)
    encoder = _tokenizer(name, place, tokenizer_dir, hub)
    _check_vocabulary(models, encoder, place)
    weights: dict[str, str] = {}
    for subfolder, (folder, _) in folders.items():
        files = weight_files(Path(folder) if subfolder else place)
        weights |= {str(Path(subfolder, file.name)): file_sha256(file) for file in files}
    step, untrained = _state(place)
    untrained += [
        f"{sub or 'the model'}: {why}" for sub, model in models.items() for why in signs_of_no_training(model)
    ]
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
        longest=_longest_input(family, [model.config for model in models.values()]),
        notices=notices,
    )


def _config(place: Path) -> Any:
    if not (place / "config.json").is_file():
        raise UserError(f"{place} holds no model: it has no config.json, and no checkpoint of a run")
    try:
        return AutoConfig.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # whatever a foreign or damaged file makes transformers raise
        raise UserError(f"{place / 'config.json'} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _kind_of(place: Path, config: Any) -> tuple[Kind, str]:
    """What the model predicts, and the family whose functions run it."""
    family = str(config.model_type)
    if family == "electra":
        generator = list(getattr(config, "architectures", None) or []) == ["ElectraForMaskedLM"]
        return ("masked" if generator else "electra"), family
    if family in FAMILIES and family not in DECODERS:
        return "masked", family
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "causal", family if family in DECODERS else DECODERS[0]
    known = ", ".join(name for name in FAMILIES if name not in DECODERS)
    raise UserError(f"{place} is a model of the type {family}; evaluated are {known} and causal language models")


def _architecture(kind: Kind, family: str, config: Any) -> Any:
    """The class of transformers that the weights must fill."""
    if family == "electra":
        return ElectraForPreTraining if kind == "electra" else ElectraForMaskedLM
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if kind == "causal" else FAMILIES[family].architecture


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
        embeddings: Any = model.get_input_embeddings()
        rooms[subfolder] = int(embeddings.weight.shape[0])
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


def _state(place: Path) -> tuple[int | None, list[str]]:
    """Steps done, and why the state says that nothing was trained."""
    if not (place / "training_state.json").is_file():
        return checkpoint_step(place), []
    progress = read_state(place)["progress"]
    step = int(progress["step"])
    begun_anew = step == 0 and not progress.get("origin")  # else the weights are those of an earlier training
    return step, ["training_state.json says step 0"] if begun_anew else []


def _longest_input(family: str, configs: Iterable[Any]) -> int | None:
    found = [getattr(config, "max_position_embeddings", None) for config in configs]
    lengths = [int(number) for number in found if number]
    if not lengths:
        return None
    return min(lengths) - ((next(iter(configs)).pad_token_id or 0) + 1 if family == "roberta" else 0)


# ---- was it trained? ---------------------------------------------------------------------------------------------


def signs_of_no_training(model: PreTrainedModel) -> list[str]:
    """Parts of a model whose weights are still as initialisation leaves them, in words; empty for a trained model.

    Initialisation sets the gains of normalisations and all biases to one value; the first optimizer step moves them.
    Where none has moved, the model is compared with a freshly initialised one, so that weights that were trained in
    another way (without gains and biases, or in a precision in which they could not move) are not called untrained.
    """
    body = f"{model.base_model_prefix}."
    constants = _gains_and_biases(model)
    in_head = [name for name in constants if not name.startswith(body)]
    untouched = {name for name, tensor in constants.items() if bool((tensor == tensor.reshape(-1)[0]).all())}
    parts = {"every part": list(constants), "the head": in_head}
    for part, names in parts.items():
        if names and untouched.issuperset(names):
            scope = [n for n, _ in model.named_parameters() if part == "every part" or not n.startswith(body)]
            if _looks_fresh(model, scope):
                what = f"{len(names)} biases and gains of normalisations" if part == "every part" else "its biases"
                return [f"{part} is as freshly initialised: {what} have not moved"]
    return []


def _gains_and_biases(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters that initialisation sets to one value: biases, and the weights of normalisations."""
    found = {}
    for name, tensor in model.named_parameters():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if tensor.ndim == 1 and tensor.numel() > 1 and (name.endswith("bias") or "norm" in owner.lower()):
            found[name] = tensor.detach()
    return found


def _looks_fresh(model: PreTrainedModel, names: list[str]) -> bool:
    """Whether the named parameters have mean and spread of those of a freshly initialised model, within chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        architecture: Any = type(model)
        fresh = dict(architecture(model.config).named_parameters())
    for name in names:
        ours, theirs = model.get_parameter(name).detach().double(), fresh[name].detach().double()
        if ours.numel() < 2:
            continue
        spread = float(theirs.std())
        # Six standard errors of a mean and of a standard deviation; nothing to spare for constants.
        room = 6 * spread / ours.numel() ** 0.5 + 1e-6
        if abs(float(ours.mean() - theirs.mean())) > 2 * room or abs(float(ours.std()) - spread) > 2 * room:
            return False
    return True
