"""What a run would fail of at its end, or be silently wrong with, found out in its first second.

A packed row gives each document the logits that it has alone, for every family; a padded row of a classifier likewise;
and the folder that will be exported loads with the Auto classes.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lmscripts.data.folding import special_tokens_around
from lmscripts.data.packing import Layout, Packing, segment_ends
from lmscripts.errors import UserError, shortened
from lmscripts.models.attention import AttentionPath, attention_paths, use_attention
from lmscripts.models.dropout import probe
from lmscripts.models.loading import quiet_loading
from lmscripts.tokenizer.encoder import Encoder, load_tokenizer, segmentation_difference
from lmscripts.tokenizer.folder import copy_tokenizer

# ---- isolation ---------------------------------------------------------------------------------------------------


def check_isolation(family: Any, model: Any, path: AttentionPath, layout: Layout) -> None:
    """Prove that a model keeps the documents of a row apart and gives its own logits here.

    Position ids and a mask are not understood by all models alike (some have no position ids, some overlay a window,
    some scale their logits), so two documents in one row are compared with each of them alone, and a row that is one
    document with the same given to the model itself. That is done again with an output matrix many times as large: a
    cap on the logits does not show before they are large. Then one document is changed, and the next must not move.

    Documents that share a "contiguous" row are not to be kept apart. The model is the same afterwards, to the bit.

    Raises:
        UserError: the logits differ, or the model cannot be called this way; it says what the model can.
    """
    packing, fits = layout.packing, layout.sequence_length > 1  # or there are no two documents
    if not fits or (problem := _problem(family, model, path, layout, packing)) is None:
        return
    paths = attention_paths(type(model)) if type(model)._can_set_attn_implementation() else (path,)
    nearest: list[tuple[AttentionPath, Packing]] = [(other, packing) for other in paths if other != path]
    nearest += [] if packing == "contiguous" else [(path, "contiguous")]
    said: list[str] = []
    for ways in (nearest, [(other, "contiguous") for other in paths if packing == "isolated"]):
        said = said or [
            " ".join([f"--attention {other}"] * (other != path) + [f"--packing {rows}"] * (rows != packing))
            for other, rows in ways
            if _problem(family, model, other, layout, rows) is None  # type: ignore[arg-type]
        ]
    way_out = f"it can be trained with {' or '.join(said)}" if said else "it cannot be trained here"
    raise UserError(f"a {type(model).__name__} {problem}; {way_out}")


@torch.no_grad()
def _problem(family: Any, model: Any, path: AttentionPath, layout: Layout, packing: Packing) -> str | None:
    """Why rows of this packing are not right with a model; None where they are."""
    was_training, implementation = model.training, model.config._attn_implementation
    reference = next(way for way in ("sdpa", "eager") if way in attention_paths(type(model)))
    # One of the documents is longer than a window of attention, if rows can be.
    window, second = getattr(model.config, "sliding_window", None), min(14, layout.sequence_length // 2)
    first = min(max(9, window + 5) if type(window) is int else 9, layout.sequence_length - second)
    ids, lengths = random_ids(model, first + second), [first, second]
    changed = torch.cat([ids[:, :first].flip(1).roll(1, 1), ids[:, first:]], 1)
    head = model.get_output_embeddings()
    matrix: Any = getattr(head, "weight", None)
    factor = 1.0
    model.eval()
    try:
        with quiet_loading():  # of classes that are built with one way of attention and keep it
            for _ in range(1 if head is None else 2):
                if factor > 1:  # not of the embeddings that it may be tied to
                    head.weight = nn.Parameter(matrix * factor, requires_grad=False)
                model.set_attn_implementation(use_attention(path))
                ours, leak = [_logits(family, model, path, ids, [first + second])], 0.0
                if packing == "isolated":
                    ours += [_logits(family, model, path, row, lengths) for row in (ids, changed)]
                    leak = relative_difference(ours[1][first:], ours.pop()[first:])
                model.set_attn_implementation(reference)  # as anybody would call it
                whole = plain_logits(model, ids)
                alone = torch.cat([plain_logits(model, document) for document in torch.split(ids, lengths, 1)])
                for logits, expected in zip(ours, (whole, alone), strict=False):
                    if not (difference := relative_difference(logits, expected)) < 1e-3:
                        if factor > 1:  # as small as they are at first, its logits show nothing of it
                            return "caps or scales its logits, which the loss here does not"
                        return f"gives other logits in packed rows than alone, by {difference:.1e} of the highest"
                # Less than comparisons show. Computed in one way, only experts of varying load round otherwise.
                if leak > 1e-5:
                    return f"lets a document see the one before it in a row, which changes its logits by {leak:.1e}"
                factor = max(1.0, 1e4 / float(whole.abs().max()))
    except Exception as error:  # an architecture of any kind
        return f"does not understand packed rows ({shortened(error)})"
    finally:
        if head is not None:
            head.weight = matrix
        with quiet_loading():
            model.set_attn_implementation(implementation)
        model.train(was_training)
    return None


def _logits(family: Any, model: Any, path: AttentionPath, ids: Tensor, lengths: list[int]) -> Tensor:
    """(T, ...) logits as an objective computes them, of a row (1, T) of documents of these lengths."""
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    batch = {"input_ids": ids, "segment_ends": segment_ends(segments)}
    batch |= {"segments": segments} if len(lengths) > 1 else {}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    hidden = family.encode(model, ids, positions, family.attention(model, path, batch, model.dtype))
    return family.predict(model, hidden)[0]  # type: ignore[no-any-return]


@torch.no_grad()
def plain_logits(model: Any, ids: Tensor) -> Tensor:
    """(T, ...) the first logits that the model gives for (1, T) ids and nothing else."""
    cache = {"use_cache": False} if model.can_generate() else {}
    return model(input_ids=ids, return_dict=True, **cache)[0][0]  # type: ignore[no-any-return]


def drops_something(family: Any, model: Any, path: AttentionPath) -> tuple[bool, bool]:
    """See `lmscripts.models.dropout.probe`."""
    ids = random_ids(model, 23)
    model.draws.length = ids.shape[1]
    return probe(model, 1, lambda: _logits(family, model, path, ids, [ids.shape[1]]))


def random_ids(model: Any, number: int) -> Tensor:
    """(1, number) ids, the same each time, none of them for padding."""
    vocabulary, padding = len(model.get_input_embeddings().weight), model.config.pad_token_id
    ids = torch.randint(0, vocabulary, (1, number), generator=torch.Generator().manual_seed(0))
    return torch.where(ids == padding, (ids + 1) % vocabulary, ids) if padding is not None else ids


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Of the highest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def check_looks_back(model: Any, ids: Iterable[int], longest: int | None, place: Path) -> None:
    """Prove that no logit of a causal model depends on a later token: those after the middle of a row are changed.

    Before it nothing may change but by rounding. What depends on how many tokens of a batch go one way (mixtures of
    experts) rounds differently at most, because no model of transformers drops tokens there when it is evaluated. Rows
    are of ordinary ids, and not longer than the model reads, where something says how long that is.

    Raises:
        UserError: it looks ahead, or it cannot be run on token ids alone.
    """
    ordinary = torch.tensor(sorted(ids))
    length = min(24, longest or 24)
    if len(ordinary) < 2 or length < 2:
        raise UserError(f"{place} reads {length} tokens of {len(ordinary)} kinds: too few to score")
    drawn = torch.randint(len(ordinary), (1, length), generator=torch.Generator().manual_seed(0))
    changed = (drawn + (torch.arange(length) >= length // 2)) % len(ordinary)
    logits = []
    try:
        for row in (drawn, changed):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # a few draw random numbers even in evaluation mode (Reformer's hashes)
                logits.append(plain_logits(model, ordinary[row])[: length // 2].float())
    except Exception as error:  # an architecture of any kind
        raise UserError(
            f"{place}: a {type(model).__name__} cannot be run on tokens alone ({shortened(error)})"
        ) from error
    # Looking ahead changes a fresh model by 5e-4 of the highest logit, a trained one by far more.
    if (moved := relative_difference(logits[1], logits[0])) > 3e-5:
        raise UserError(
            f"{place} looks ahead: a later token changes the logits before it, by {moved:.1e} of the highest, so a "
            f"{type(model).__name__} with this configuration is no causal language model and its perplexity would mean "
            "nothing"
        )


# ---- padding -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_padding(model: Any, encoder: Encoder, pad_id: int, longest: int | None) -> None:
    """See that a row has the same logits alone and beside a longer one, to whose length it is filled up on the right.

    XLNet, for one, reads its answer off the last place, whatever the attention mask says of it. `longest` is in tokens,
    None where nothing says. The model, on the CPU, is left in the mode that it was in.

    Raises:
        UserError: the logits differ, or the model cannot compute them.
    """
    before, after = special_tokens_around(encoder.tokenizer)
    special = {*encoder.special_ids, *encoder.reserved_ids}
    words = [number for number in sorted(encoder.tokenizer.get_vocab().values()) if number not in special][:9]
    room = len(words) if longest is None else min(len(words), longest - len(before) - len(after))
    if room < 2:  # no row can be longer than another
        return
    long, short = ([*before.tolist(), *words[:number], *after.tolist()] for number in (room, (room + 1) // 3))
    filler = len(long) - len(short)
    ids = torch.tensor([[*short, *[pad_id] * filler], long])
    mask = torch.tensor([[1] * len(short) + [0] * filler, [1] * len(long)])
    was_training, kind = model.training, model.config.model_type
    model.eval()
    try:
        rows = (ids, mask), (ids[:1, : len(short)], mask[:1, : len(short)])
        padded, alone = (model(input_ids=row, attention_mask=seen).logits[0].float() for row, seen in rows)
    except Exception as error:  # whatever a model that is not made for this raises
        raise UserError(
            f"a model of the type {kind}, as its config.json has it, cannot answer rows of {encoder.folder} "
            f"({shortened(error)})"
        ) from error
    finally:
        model.train(was_training)
    difference, scale = float((padded - alone).abs().max()), float(alone.abs().max())
    if difference > 2e-3 * scale + 1e-6:  # float32 stays far below, another place read lies far above
        raise UserError(
            f"a model of the type {kind} cannot be a classifier here: its logits of a row change by {difference:.2g} "
            "when it is filled up to the length of another, so they would depend on the batch; take another type"
        )


# ---- what will be exported -----------------------------------------------------------------------------------------

# For some types of models AutoTokenizer takes the class of their own tokenizer, whatever tokenizer_config.json says,
# unless that names code of the folder; which nobody has to trust, as the class of transformers of that name is taken.
_DECLARATION = "tokenization_declared.py"
_DECLARED = """# Names the class in tokenizer_config.json for AutoTokenizer; it is that of transformers.
from transformers import {0}

__all__ = ["{0}"]
"""


def check_exports(models: Mapping[str, Any], autos: Mapping[str, str], encoder: Encoder) -> dict[str, bytes]:
    """Load what will be exported once, without weights: each configuration with its Auto class, and the tokenizer.

    Returns:
        Files to write over those of the tokenizer, by name; none unless AutoTokenizer would make another one of it.

    Raises:
        UserError: an Auto class makes another model of a configuration, or another tokenizer comes back.
    """
    files: dict[str, bytes] = {}
    for part, model in models.items():
        with tempfile.TemporaryDirectory() as folder, quiet_loading():
            place = Path(folder)
            copy_tokenizer(encoder.folder, place)
            model.config.save_pretrained(folder)
            if part in autos:
                _check_auto_class(model, autos[part], folder)
            difference = _other_tokenizer(encoder, folder)
            settings = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8")) if difference else {}
            if name := settings.get("tokenizer_class"):
                files = _declared(model, settings, name)
                for file, content in files.items():
                    (place / file).write_bytes(content)
                difference = _other_tokenizer(encoder, folder)
            if difference:
                raise UserError(
                    f"beside a {model.config.model_type} AutoTokenizer makes another tokenizer of {encoder.folder}: "
                    f"{difference}; take a tokenizer of another type"
                )
    return files


def check_classes(models: Mapping[str, Any], autos: Mapping[str, str]) -> None:
    """Load the configuration of what will be exported, where there is no tokenizer, once with its Auto class.

    Raises:
        UserError: an Auto class makes another model of a configuration.
    """
    for part, auto in autos.items():
        with tempfile.TemporaryDirectory() as folder, quiet_loading():
            models[part].config.save_pretrained(folder)
            _check_auto_class(models[part], auto, folder)


def _declared(model: Any, settings: dict[str, Any], name: str) -> dict[str, bytes]:
    """Files with which AutoTokenizer takes the class that tokenizer_config.json names, and the inputs of the model."""
    settings["auto_map"] = {"AutoTokenizer": [f"{Path(_DECLARATION).stem}.{name}", None]}
    inputs = inspect.signature(model.forward).parameters
    if named := settings.get("model_input_names"):
        settings["model_input_names"] = [each for each in named if each in inputs]
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    return {"tokenizer_config.json": text.encode(), _DECLARATION: _DECLARED.format(name).encode()}


def _check_auto_class(model: Any, auto: str, folder: str) -> None:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            found = type(getattr(transformers, auto).from_config(config))
    except Exception as error:  # whatever a configuration makes transformers raise
        raise UserError(
            f"{auto} cannot load a {type(model).__name__} of this configuration ({shortened(error)})"
        ) from error
    if not issubclass(type(model), found) and not issubclass(found, type(model)):
        raise UserError(f"{auto} makes a {found.__name__} of what is saved as a {type(model).__name__}")


def _other_tokenizer(ours: Encoder, folder: str) -> str | None:
    """How the tokenizer that AutoTokenizer makes in a folder differs; None where it does not."""
    try:
        beside = load_tokenizer(Path(folder))
        if ours.tokenizer.get_vocab() != beside.get_vocab():
            return f"a vocabulary of {len(beside)} other entries"
        return segmentation_difference(ours.tokenizer, beside)
    except Exception as error:  # of the class that it takes instead
        return shortened(error)
