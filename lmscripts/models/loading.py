"""Loading a saved model so that it is the one that was saved: its configuration, its weights, its tokenizer.

transformers initialises at random what the weights lack, ignores what the model has no place for, and makes up a
tokenizer where there is none; each is a warning at most. Here each is refused with a sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lmscripts.errors import UserError, shortened
from lmscripts.models.finding import WEIGHTS, find_model, weight_files
from lmscripts.tokenizer.encoder import Encoder, load_encoder
from lmscripts.tokenizer.folder import RECORD_FILE, read_record

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model")
_OLD_BUFFERS = ("position_ids", ".attn.bias", ".attn.masked_bias")  # in weights of years ago; they are computed now


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No report of transformers about what it leaves out: what matters is refused here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


# ---- configuration ---------------------------------------------------------------------------------------------------


def read_config(name: str | Path, architecture: Any = None) -> Any:
    """The configuration of a saved model, of the type that `architecture` is for, where that is for one.

    Raises:
        UserError: there is no such model, its configuration cannot be read, or it is of another type.
    """
    place = _folder(name)
    if not (place / "config.json").is_file():
        final = place / "final"
        hint = f"; did you mean {final}?" if (final / "config.json").is_file() else ", and no checkpoint of a run"
        raise UserError(f"{place} holds no model: it has no config.json{hint}")
    of_type: Any = getattr(architecture, "config_class", None)
    try:
        if of_type is None:
            return AutoConfig.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
        settings, _ = PretrainedConfig.get_config_dict(str(place), local_files_only=True)
        saved_type = settings.get("model_type", of_type.model_type)  # old files are silent: the weights will tell
        config = of_type.from_dict(settings)
    except Exception as error:  # whatever a foreign or damaged file makes transformers raise
        raise UserError(f"{place / 'config.json'} cannot be read: {shortened(error)}") from error
    if saved_type != of_type.model_type:
        raise UserError(
            f"{name} is a model of the type {saved_type}, but {architecture.__name__} needs the type "
            f"{of_type.model_type}"
        )
    return config


def _folder(name: str | Path) -> Path:
    """A model's folder; of a name on the Hub that of its cached files."""
    place = Path(name).expanduser()
    return place if place.is_dir() else find_model(str(name))[0]


# ---- weights ---------------------------------------------------------------------------------------------------------


def load_model(
    name: str | Path, architecture: Any, config: Any = None, *, may_be_new: Callable[[Any, str], bool] | None = None
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model with its saved weights, in float32, which fill it and hold no more of its body than it has.

    `may_be_new` says of the model and a parameter whether the weights may lack it or have it in another shape, as a
    head for other labels. What they hold besides is then not looked at.

    Returns:
        The model in evaluation mode, and what transformers tells of its weights.

    Raises:
        UserError: the weights are not there, not whole, damaged, or those of another model.
    """
    place = Path(name).expanduser()
    local = place.is_dir()
    files = weight_files(place)
    if local and not files:
        raise UserError(
            f"{place} holds no weights (neither {WEIGHTS[0]} nor {WEIGHTS[2]}): a model made from its config.json "
            "alone would be random"
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{place} lacks {missing[0]}, one of the {len(files)} files of its weights")
    with quiet_loading():
        try:
            model, info = architecture.from_pretrained(
                str(place if local else name),
                config=config,
                dtype=torch.float32,
                local_files_only=local,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # refused below, with the sizes
                output_loading_info=True,
            )
        except Exception as error:  # whatever damaged or foreign weights make the libraries raise
            raise UserError(
                f"{name} holds no usable weights, or none that its config.json suits ({shortened(error)})"
            ) from error
    _check_weights(name, model, info, may_be_new)
    return model, info


def _check_weights(name: str | Path, model: Any, info: Mapping[str, Any], may_be_new: Any) -> None:
    """Refuse weights that leave a part of a model random, or hold more of its body; other heads do not matter."""
    shapes = {key: sizes for key, *sizes in info["mismatched_keys"]}
    lacking = sorted(key for key in {*info["missing_keys"], *shapes} if not (may_be_new and may_be_new(model, key)))
    if misfits := [key for key in lacking if key in shapes]:
        saved, built = map(tuple, shapes[misfits[0]])
        raise UserError(
            f"the weights of {name} do not fit its config.json: {misfits[0]} has the shape {saved}, not {built}"
        )
    if lacking:
        saved_as = ", ".join(model.config.architectures or ["a model without this head"])
        part = "a part" if any(key.startswith(f"{model.base_model_prefix}.") for key in lacking) else "the head"
        raise UserError(
            f"{name} (saved as {saved_as}) lacks {part} of {type(model).__name__}, {some_of(lacking)}: they would be "
            "random; take a model that was saved with them"
        )
    unused = (key for key in info["unexpected_keys"] if may_be_new is None and not key.endswith(_OLD_BUFFERS))
    own = ("encoder.", "embeddings.", *(f"{part}." for part, _ in model.base_model.named_children()))
    inside = (key.removeprefix(f"{model.base_model_prefix}.") for key in unused)
    if found := sorted(key for key in inside if key.startswith(own)):
        raise UserError(
            f"{name} holds tensors for which {type(model).__name__} has no place, {some_of(found)}: it would differ "
            "from it"
        )


def some_of(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def tokenizer_beside(name: str | Path) -> Encoder | None:
    """The tokenizer saved with a model; None when there is none.

    Raises:
        UserError: it cannot be loaded, or a part of its vocabulary is gone.
    """
    place = _folder(name)
    if not Path(name).expanduser().is_dir():
        try:
            AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # type: ignore[no-untyped-call]  # brings its files to the cache
        except Exception as error:
            raise UserError(f"the tokenizer of {name} cannot be loaded ({shortened(error)})") from error
    if not any(file.is_file() for name in TOKENIZER_FILES for file in place.glob(name)):
        return None
    with quiet_loading():
        encoder = load_encoder(place)
    size, trained = encoder.vocab_size, (read_record(place) or {}).get("vocab_size", 0)
    # Without any vocabulary transformers makes a tokenizer of special tokens alone.
    if not set(encoder.tokenizer.get_vocab().values()) - set(encoder.special_ids):
        return None
    if size < trained:
        raise UserError(
            f"the tokenizer in {place} is damaged: of the {trained:,} entries by {RECORD_FILE} only {size:,} are left"
        )
    return encoder


def tokenizer_of(name: str, place: Path, tokenizer_dir: str | None) -> Encoder:
    """The tokenizer of a saved model with files in `place`: its own, or that of `tokenizer_dir` where it has none.

    Raises:
        UserError: there is none, there are two, or it cannot be loaded.
    """
    own = tokenizer_beside(place if tokenizer_dir else name)
    if own is not None and tokenizer_dir is not None:
        raise UserError(f"--tokenizer_dir {tokenizer_dir} has no effect: {place} has the tokenizer of the model")
    if own is None and tokenizer_dir is None:
        raise UserError(
            f"{place} has no tokenizer beside the model: give --tokenizer_dir where there is this option, or copy the "
            "tokenizer into the folder"
        )
    return own or load_encoder(str(tokenizer_dir))


def check_vocabulary(encoder: Encoder, room: int, name: str | Path) -> None:
    """Refuse a tokenizer with ids beyond the vocabulary of a model, which has room for so many."""
    if (highest := max(encoder.tokenizer.get_vocab().values())) >= room:
        raise UserError(
            f"the tokenizer {encoder.folder} has ids up to {highest}, but the vocabulary of {name} has {room} "
            "entries: it is the tokenizer of another model"
        )
