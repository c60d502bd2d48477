"""Further pretraining: a saved model made to fit the dropout and the tokenizer of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lmscripts.errors import UserError
from lmscripts.models.fitting import OFFSET_POSITIONS
from lmscripts.models.loading import check_vocabulary, some_of, tokenizer_beside
from lmscripts.tokenizer.encoder import Encoder, segmentation_difference

# What the configurations of transformers call them, decoders included.
_HIDDEN_DROPOUTS: tuple[str, ...] = ("hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_p", "mlp_dropout")
_HIDDEN_DROPOUTS += ("resid_pdrop", "embd_pdrop", "emb_pdrop", "resid_dropout", "embed_dropout")
_HIDDEN_DROPOUTS += ("residual_dropout", "embedding_dropout")
_ATTENTION_DROPOUTS: tuple[str, ...] = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
_ATTENTION_DROPOUTS += ("lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")


# ---- dropout ----


def set_dropout(config: Any, hidden: float, attention: float) -> list[str]:
    """Set the dropouts of a configuration of any type, under whichever names it has; sentences say what has no effect.

    Layers are never dropped as a whole, and within the feed-forward layers no more than hidden states are.
    """
    parts = [config, *(part for part in (getattr(config, "attn_config", None),) if part is not None)]
    sentences = []
    for kind, names, value in (("hidden", _HIDDEN_DROPOUTS, hidden), ("attention", _ATTENTION_DROPOUTS, attention)):
        found = [_set_number(part, name, value) for part in parts for name in names]
        if value and not any(found):
            sentences.append(f"--{kind}_dropout {value} has no effect on a {config.model_type}")
    layers = dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0)
    for name, most in {"activation_dropout": hidden, **layers}.items():
        if (getattr(config, name, None) or 0.0) > most:
            setattr(config, name, most)
    return sentences


def dropouts(config: Any) -> tuple[float, float]:
    """The dropouts of hidden states and of attention weights that a configuration of any type says, at most."""

    def said(name: str) -> float:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) else 0.0

    return max(map(said, _HIDDEN_DROPOUTS)), max(map(said, _ATTENTION_DROPOUTS))


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


# ---- tokenizer ----


def adopt_tokenizer(models: Sequence[Any], name_or_path: str, tokenizer: Any) -> list[str]:
    """Check that a run's tokenizer is the one that the model was trained with, or that one with new words.

    Every token must have the id it had. New words may stand where the model's tokenizer has an unused token or
    none; their embeddings (and output rows and biases) become the mean of those of the pieces that the model's
    tokenizer gives for the word. Nothing is changed unless all of it fits. Returns sentences for the user.

    Raises:
        UserError: the tokenizers differ in any other way, or the model has no room for the vocabulary.
    """
    ours = Encoder(Path(tokenizer.name_or_path), tokenizer)
    tokens: dict[int, str] = {number: token for token, number in tokenizer.get_vocab().items()}
    for model in models:
        check_vocabulary(ours, len(model.get_input_embeddings().weight), name_or_path)
    theirs = tokenizer_beside(name_or_path)
    if theirs is None:
        room = len(models[0].get_input_embeddings().weight)
        said = f"{name_or_path} has no tokenizer beside it: only the size of the vocabulary could be checked "
        said += f"({max(tokens) + 1:,} entries, room for {room:,})"
        return [said, *_adopt_padding(models, name_or_path, ours.pad_id, confirmed=False)]
    for name in ("pad", "unk", "cls", "sep", "mask"):
        old, new = getattr(theirs, f"{name}_id"), getattr(ours, f"{name}_id")
        if old is not None and old != new:
            raise UserError(
                f"the {name} token has the id {new} in the tokenizer {ours.folder}, but {old} in that of {name_or_path}"
            )
    if difference := segmentation_difference(ours.tokenizer, theirs.tokenizer):
        raise UserError(
            f"the tokenizer {ours.folder} cuts text in another way than that of {name_or_path}: {difference}"
        )
    words = _new_words(theirs, tokens, ours, name_or_path)
    sentences = _adopt_padding(models, name_or_path, ours.pad_id, confirmed=theirs.pad_id == ours.pad_id)
    return sentences + _start_words(models, theirs, words)


def _new_words(theirs: Encoder, tokens: Mapping[int, str], ours: Encoder, name_or_path: str) -> dict[int, str]:
    """Our words where the model's tokenizer has an unused token or none; refuses every other difference."""
    old: dict[int, str] = {number: token for token, number in theirs.tokenizer.get_vocab().items()}
    free = {number for number in tokens if number not in old} | set(theirs.reserved_ids)
    unused = {number for number in old if number not in tokens} | set(ours.reserved_ids)
    changed = [number for number in sorted({*old, *tokens}) if old.get(number) != tokens.get(number)]
    if different := [number for number in changed if number not in free]:
        first = different[0]
        raise UserError(
            f"the tokenizer {ours.folder} is not that of {name_or_path}: {len(different):,} ids mean other tokens, "
            f"first id {first}: {tokens.get(first, 'nothing')!r} instead of {old.get(first, 'nothing')!r}"
        )
    return {number: tokens[number] for number in changed if number not in unused}


def _adopt_padding(models: Sequence[Any], name_or_path: str, pad_id: int | None, confirmed: bool) -> list[str]:
    """Make the configuration name the padding token, where both tokenizers say that it names another one.

    Models from before 2023 had [PAD] elsewhere than at id 0 and a configuration that said 0: the embedding there, of
    [UNK], was never trained. Where positions depend on the id it must be right.
    """
    masked = [model for model in models if not model.can_generate()]  # a decoder meets no padding before its text
    wrong = [model for model in masked if model.config.pad_token_id != pad_id]
    if not wrong:
        return []
    saved = wrong[0].config.pad_token_id
    if pad_id is None or not confirmed or any(model.config.model_type in OFFSET_POSITIONS for model in wrong):
        raise UserError(f"the padding token has the id {pad_id}, but config.json of {name_or_path} says {saved}")
    for model in wrong:
        model.config.pad_token_id = pad_id
        model.get_input_embeddings().padding_idx = pad_id  # the row that gets no gradient
    return [f"config.json of {name_or_path} took id {saved} for padding; it is id {pad_id}, as both tokenizers say"]


@torch.no_grad()
def _start_words(models: Sequence[Any], theirs: Encoder, words: Mapping[int, str]) -> list[str]:
    """Set the rows of new words to the mean of their pieces', or of all words' where no piece is known."""
    if not words:
        return []
    rows = theirs.encode(list(words.values())).rows()
    known = [[number for number in row.tolist() if number != theirs.unk_id] for row in rows]
    not_words = {*theirs.special_ids, *theirs.reserved_ids}
    ordinary = sorted(set(theirs.tokenizer.get_vocab().values()) - not_words)
    tables: list[Any] = [model.get_input_embeddings().weight for model in models]
    heads = (model.get_output_embeddings() for model in models)
    tables += [tensor for head in heads if head is not None for tensor in (head.weight, head.bias)]
    for tensor in {id(tensor): tensor for tensor in tables if tensor is not None}.values():  # each of them once
        for number, pieces in zip(words, known, strict=True):
            tensor[number] = tensor[pieces or ordinary].mean(0)
    said = f"{len(words)} new words took the place of unused tokens; their embeddings are the mean of their pieces'"
    if unknown := [word for word, pieces in zip(words.values(), known, strict=True) if not pieces]:
        return [said, f"the model's tokenizer knows no piece of {some_of(unknown)}: there it is the mean of all words'"]
    return [said]
