"""Further pretraining: a saved model, checked, made to fit the rows and the tokenizer of a run.

transformers initialises at random what the weights lack, ignores what the model has no place for, and takes a
tokenizer without looking at the model; each is a warning at most. Here each is refused with a sentence.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lmscripts.errors import UserError
from lmscripts.tokenizer.encoder import Encoder
from lmscripts.tokenizer.folder import copy_tokenizer
from lmscripts.tokenizer.identity import segmentation_difference

TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)
TOKENIZER_FILES += ("sentencepiece.bpe.model", "tokenizer.model")
_SPECIAL = ("pad", "unk", "cls", "sep", "mask")
# What the configurations of transformers call them, decoders included.
_HIDDEN_DROPOUTS: tuple[str, ...] = ("hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_p", "mlp_dropout")
_HIDDEN_DROPOUTS += ("resid_pdrop", "embd_pdrop", "emb_pdrop", "resid_dropout", "embed_dropout")
_HIDDEN_DROPOUTS += ("residual_dropout", "embedding_dropout")
_ATTENTION_DROPOUTS: tuple[str, ...] = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
_ATTENTION_DROPOUTS += ("lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")
_LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


# ---- loading ----


def load_pretrained(
    name_or_path: str,
    architecture: type[PreTrainedModel],
    *,
    attn_implementation: str,
    hidden_dropout: float,
    attention_dropout: float,
) -> PreTrainedModel:
    """A model from a local folder or the Hub, whole, in float32 and in training mode like a freshly built one.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, or a name on the Hub (from its cache when offline).
        architecture: BertForMaskedLM, RobertaForMaskedLM, ElectraForMaskedLM, ElectraForPreTraining, or
            AutoModelForCausalLM for a decoder of any type.
        attn_implementation: from `lmscripts.models.attention.use_attention`.
        hidden_dropout: of the hidden states, whatever the saved configuration says.
        attention_dropout: of the attention weights, likewise.

    Raises:
        UserError: there is no such model, it is of another type, its weights lack a part of the model (a head that
            nobody trained would be random), or they hold layers that the model has not.
    """
    place = Path(name_or_path).expanduser()
    local = place.is_dir()
    source = str(place) if local else name_or_path
    loader: Any = architecture
    config = load_config(name_or_path, architecture)
    set_dropout(config, hidden_dropout, attention_dropout)
    with quiet_loading():
        try:
            model, info = loader.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                attn_implementation=attn_implementation,
                local_files_only=local,
                ignore_mismatched_sizes=True,  # refused below, with the sizes
                output_loading_info=True,
            )
        except Exception as error:  # whatever damaged or foreign weights make the libraries raise
            raise UserError(_not_loaded(source, local, "weights", error)) from error
    _check_loaded(source, model, info, config)
    trainable: PreTrainedModel = model.train()  # transformers hands it out with its dropout switched off
    return trainable


def set_dropout(config: Any, hidden: float, attention: float) -> list[str]:
    """Set the dropouts of a configuration under whichever names its family has for them.

    Layers are never dropped as a whole, and within the feed-forward layers no more than hidden states are.

    Args:
        config: of a model of any type; it is changed.
        hidden: of the hidden states.
        attention: of the attention weights.

    Returns:
        Sentences for the user: what has no effect on such a model.
    """
    parts = [config, *(part for part in (getattr(config, "attn_config", None),) if part is not None)]
    sentences = []
    for kind, names, value in (("hidden", _HIDDEN_DROPOUTS, hidden), ("attention", _ATTENTION_DROPOUTS, attention)):
        found = [_set_number(part, name, value) for part in parts for name in names]
        if value and not any(found):
            sentences.append(f"--{kind}_dropout {value} has no effect on a {config.model_type}")
    for name, most in {"activation_dropout": hidden, **dict.fromkeys(_LAYER_DROPS, 0.0)}.items():
        if (getattr(config, name, None) or 0.0) > most:
            setattr(config, name, most)
    return sentences


def _set_number(config: Any, name: str, value: float) -> bool:
    """Whether a configuration has this number; it is set."""
    saved = getattr(config, name, None)
    if not isinstance(saved, int | float):
        return False
    try:
        if saved != value:
            setattr(config, name, value)
    except Exception:  # MPT says int where a probability is meant, and transformers insists on it
        return False
    return True


def load_config(name_or_path: str, architecture: Any) -> PretrainedConfig:
    """The configuration of a saved model, which must be of the architecture's type.

    Raises:
        UserError: there is none, or it is of another type.
    """
    place = Path(name_or_path).expanduser()
    local = place.is_dir()
    source = str(place) if local else name_or_path
    config_class: Any = getattr(architecture, "config_class", None)
    if config_class is None:  # of AutoModelForCausalLM
        try:
            of_any_type: PretrainedConfig = AutoConfig.from_pretrained(source, local_files_only=local)
            return of_any_type
        except Exception as error:
            raise UserError(_not_loaded(source, local, "config.json", error)) from error
    try:
        settings, _ = PretrainedConfig.get_config_dict(source, local_files_only=local)
    except Exception as error:
        raise UserError(_not_loaded(source, local, "config.json", error)) from error
    if not settings:
        raise UserError(_not_loaded(source, local, "config.json", None))
    saved_type, wanted = settings.get("model_type"), config_class.model_type
    if saved_type not in (wanted, None):  # where an old file is silent, the names of the tensors decide
        raise UserError(
            f"{source} is a model of the type {saved_type}, but {architecture.__name__} needs the type {wanted}"
        )
    config: PretrainedConfig = config_class.from_dict(settings)
    return config


def _not_loaded(source: str, local: bool, part: str, error: Exception | None) -> str:
    reason = f" ({' '.join(str(error).split())[:200]})" if error else ""
    if local:
        inside = [str(Path(source, name)) for name in ("final",) if Path(source, name, "config.json").is_file()]
        hint = f"; did you mean {inside[0]}?" if inside else f"; it has to hold what save_pretrained writes{reason}"
        return f"the folder {source} holds no usable {part}{hint}"
    offline = (
        "HF_HUB_OFFLINE is set, so only its cache was searched" if constants.HF_HUB_OFFLINE else reason.strip(" ()")
    )
    return f"{source} is neither a folder (seen from {Path.cwd()}) nor a model that the Hub gives: {offline}"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No report of transformers about what it leaves out: what matters is refused here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _check_loaded(source: str, model: Any, info: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Refuse weights that do not fill the model, or that hold more of its encoder than it has."""
    name, base = type(model).__name__, f"{model.base_model_prefix}."
    if mismatched := sorted(info["mismatched_keys"]):
        tensor, saved, built = mismatched[0]
        raise UserError(
            f"the weights of {source} do not fit its config.json: {tensor} has the shape {tuple(saved)}, not "
            f"{tuple(built)}"
        )
    if missing := sorted(info["missing_keys"]):
        saved_as = ", ".join(getattr(config, "architectures", None) or ["a model without this head"])
        part = "the head" if not any(key.startswith(base) for key in missing) else "a part"
        raise UserError(
            f"{source} (saved as {saved_as}) lacks {part} of {name}, {_some(missing)}: they would be random; take a "
            "model that was saved with them"
        )
    inside = [key.removeprefix(base) for key in info["unexpected_keys"] if not key.endswith("position_ids")]
    own = ("encoder.", "embeddings.", *(f"{part}." for part, _ in model.base_model.named_children()))
    inside = [
        key for key in inside if not key.endswith((".attn.bias", ".attn.masked_bias"))
    ]  # masks of old GPT-2 files
    if unused := sorted(key for key in inside if key.startswith(own)):
        raise UserError(
            f"{source} holds tensors for which {name} has no place, {_some(unused)}: it would differ from it"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- tokenizer ----


def adopt_tokenizer(
    models: PreTrainedModel | Sequence[PreTrainedModel], name_or_path: str, tokenizer: Any
) -> list[str]:
    """Check that a run's tokenizer is the one that the model was trained with, or that one with new words.

    Every token must have the id it had. New words may stand where the model's tokenizer has an unused token or
    none; their embeddings (and output rows and biases) become the mean of those of the pieces that the model's
    tokenizer gives for the word. Nothing is changed unless all of it fits.

    Args:
        models: the model, or generator and discriminator.
        name_or_path: where the model and its tokenizer come from; for ELECTRA the discriminator's.
        tokenizer: the run's, from transformers.

    Returns:
        Sentences for the user; none when the tokenizers agree.

    Raises:
        UserError: the tokenizers differ in any other way, or the model has no room for the vocabulary.
    """
    models = [models] if isinstance(models, PreTrainedModel) else list(models)
    ours = Encoder(Path(tokenizer.name_or_path), tokenizer)
    tokens: dict[int, str] = {number: token for token, number in tokenizer.get_vocab().items()}
    for model in models:
        if (needed := max(tokens) + 1) > (room := len(_word_table(model))):
            raise UserError(
                f"the tokenizer {ours.folder} has {needed} entries, but the model {name_or_path} has room for {room}"
            )
    theirs = _tokenizer_beside(name_or_path)
    if theirs is None:
        _check_loads_again(models[0], ours, name_or_path)
        sentences = [
            f"{name_or_path} has no tokenizer beside it: only the size of the vocabulary could be checked "
            f"({max(tokens) + 1:,} entries, room for {len(_word_table(models[0])):,})"
        ]
        return sentences + _adopt_padding(models, name_or_path, ours.pad_id, confirmed=False)
    _check_special(theirs, ours, name_or_path)
    if difference := segmentation_difference(ours.tokenizer, theirs.tokenizer):
        raise UserError(
            f"the tokenizer {ours.folder} cuts text in another way than that of {name_or_path}: {difference}"
        )
    words = _new_words(theirs, tokens, ours, name_or_path)
    sentences = _adopt_padding(models, name_or_path, ours.pad_id, confirmed=theirs.pad_id == ours.pad_id)
    return sentences + _start_words(models, theirs, words)


def _tokenizer_beside(name_or_path: str) -> Encoder | None:
    """The tokenizer saved with a model; None when there is none."""
    place = Path(name_or_path).expanduser()
    local = place.is_dir()
    if local and not any((place / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with quiet_loading():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(place) if local else name_or_path, local_files_only=local
            )
        encoder = Encoder(place, tokenizer)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the tokenizer beside the model {name_or_path} cannot be loaded ({reason})") from error
    # Without any vocabulary transformers makes a tokenizer of special tokens alone.
    return encoder if set(tokenizer.get_vocab().values()) - set(encoder.special_ids) else None


def _check_loads_again(model: PreTrainedModel, ours: Encoder, name_or_path: str) -> None:
    """Refuse a tokenizer that would be another one beside this model.

    For some types of models AutoTokenizer takes the class of their own tokenizer, whatever tokenizer_config.json says.
    """
    with tempfile.TemporaryDirectory() as folder, quiet_loading():
        copy_tokenizer(Path(ours.folder), Path(folder))
        model.config.save_pretrained(folder)
        try:
            beside: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            difference = segmentation_difference(ours.tokenizer, beside)
        except Exception as error:  # of the class that it takes instead
            difference = " ".join(str(error).split())[:200]
        if difference:
            raise UserError(
                f"beside a {model.config.model_type} such as {name_or_path} AutoTokenizer makes another tokenizer of "
                f"{ours.folder}: {difference}"
            )


def _check_special(theirs: Encoder, ours: Encoder, name_or_path: str) -> None:
    for name in _SPECIAL:
        old, new = getattr(theirs, f"{name}_id"), getattr(ours, f"{name}_id")
        if old is not None and old != new:
            raise UserError(
                f"the {name} token has the id {new} in the tokenizer {ours.folder}, but {old} in that of {name_or_path}"
            )


def _new_words(theirs: Encoder, tokens: Mapping[int, str], ours: Encoder, name_or_path: str) -> dict[int, str]:
    """Our words where the model's tokenizer has an unused token or none; refuses every other difference."""
    old: dict[int, str] = {number: token for token, number in theirs.tokenizer.get_vocab().items()}
    free, unused = set(theirs.reserved_ids), set(ours.reserved_ids)
    words: dict[int, str] = {}
    different = []
    for number in sorted({*old, *tokens}):
        before, now = old.get(number), tokens.get(number)
        if before == now or ((before is None or number in free) and (now is None or number in unused)):
            continue
        if now is not None and number not in unused and (before is None or number in free):
            words[number] = now
        else:
            different.append(number)
    if different:
        first = different[0]
        raise UserError(
            f"the tokenizer {ours.folder} is not that of {name_or_path}: {len(different):,} ids mean other tokens, "
            f"first id {first}: {tokens.get(first, 'nothing')!r} instead of {old.get(first, 'nothing')!r}"
        )
    return words


def _adopt_padding(
    models: Sequence[PreTrainedModel], name_or_path: str, pad_id: int | None, confirmed: bool
) -> list[str]:
    """Make the configuration name the padding token, where both tokenizers say that it names another one.

    Models from before 2023 had [PAD] elsewhere than at id 0 and a configuration that said 0: the embedding there, of
    [UNK], was never trained. RoBERTa's positions depend on the id, so there it must be right.
    """
    masked = [model for model in models if not model.can_generate()]  # a decoder meets no padding before its text
    wrong = [model for model in masked if model.config.pad_token_id != pad_id]
    if not wrong:
        return []
    saved = wrong[0].config.pad_token_id
    if pad_id is None or not confirmed or any(model.config.model_type == "roberta" for model in wrong):
        raise UserError(f"the padding token has the id {pad_id}, but config.json of {name_or_path} says {saved}")
    for model in wrong:
        model.config.pad_token_id = pad_id
        embeddings: Any = model.get_input_embeddings()
        embeddings.padding_idx = pad_id  # the row that gets no gradient
    return [f"config.json of {name_or_path} took id {saved} for padding; it is id {pad_id}, as both tokenizers say"]


@torch.no_grad()
def _start_words(models: Sequence[PreTrainedModel], theirs: Encoder, words: Mapping[int, str]) -> list[str]:
    """Set the rows of new words to the mean of their pieces', or of all words' where no piece is known."""
    if not words:
        return []
    rows = theirs.encode(list(words.values())).rows()
    known = [[number for number in row.tolist() if number != theirs.unk_id] for row in rows]
    not_words = {*theirs.special_ids, *theirs.reserved_ids}
    ordinary = sorted(set(theirs.tokenizer.get_vocab().values()) - not_words)
    for tensor in _tables(models):
        for number, pieces in zip(words, known, strict=True):
            tensor[number] = tensor[pieces or ordinary].mean(0)
    sentences = [
        f"{len(words)} new words took the place of unused tokens; their embeddings are the mean of their pieces'"
    ]
    if unknown := [word for word, pieces in zip(words.values(), known, strict=True) if not pieces]:
        sentences.append(
            f"the model's tokenizer knows no piece of {_some(unknown)}: there it is the mean of all words'"
        )
    return sentences


def _word_table(model: PreTrainedModel) -> Tensor:
    """(V, H) input embeddings."""
    embeddings: Any = model.get_input_embeddings()
    table: Tensor = embeddings.weight
    return table


def _tables(models: Sequence[PreTrainedModel]) -> list[Tensor]:
    """What has an entry for each token, without repetition: input embeddings, output embeddings, output biases."""
    tables: dict[int, Tensor] = {}
    for model in models:
        output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        found = [_word_table(model), *([output.weight, output.bias] if output is not None else [])]
        tables |= {id(tensor): tensor for tensor in found if tensor is not None}
    return list(tables.values())
