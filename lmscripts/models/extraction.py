"""ELECTRA apart: the generator and the discriminator of a checkpoint as two folders that stand alone.

A checkpoint is the discriminator's folder with the generator in its subfolder `generator/`; both files hold the
embeddings that the two shared in training. Sizes come from the two configs, never from a default: length 128 is as
good as 512. Weights are copied, not converted, after both halves were loaded as anyone else will load them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, ElectraConfig
from transformers.utils import logging

from lmscripts.errors import UserError, naming
from lmscripts.files import file_sha256, new_folder, remove_leftovers, sync_folder
from lmscripts.options.presets import Preset
from lmscripts.tokenizer.encoder import Encoder, load_encoder
from lmscripts.tokenizer.folder import FOLDER_FILES, RECORD_FILE, read_record
from lmscripts.training.checkpoint import average_notice, checkpoint_step, find_damage, list_checkpoints, look_for_whole

HALVES = ("generator", "discriminator")
WEIGHTS = "model.safetensors"
LOADERS: dict[str, Any] = {"generator": AutoModelForMaskedLM, "discriminator": AutoModelForPreTraining}
_ARCHITECTURES = {"generator": "ElectraForMaskedLM", "discriminator": "ElectraForPreTraining"}
_EMBEDDINGS = "electra.embeddings."
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")
_OF_TRAINING = ("checksums.json", "training_state.json", "optimizer.safetensors")
# Keys of a preset, and what transformers calls them; the fraction of the generator applies to those marked.
_SIZES = {
    "number-of-layers": ("layers", "num_hidden_layers", False),
    "hidden-size": ("hidden_size", "hidden_size", True),
    "attention-heads": ("heads", "num_attention_heads", True),
    "ffn-inner-hidden-size": ("ffn_size", "intermediate_size", True),
    "embedding-size": ("embedding_size", "embedding_size", False),
}


@dataclass(frozen=True)
class Half:
    """One half of a checkpoint, checked.

    Attributes:
        name: "generator" or "discriminator".
        folder: where its config and weights lie.
        config: its sizes.
        num_parameters: tied ones counted once.
        dtype: of its weights.
        sha256: of its weights' file.
    """

    name: str
    folder: Path
    config: ElectraConfig
    num_parameters: int
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Pair:
    """A checked ELECTRA checkpoint.

    Attributes:
        folder: of the checkpoint.
        step: optimizer steps done, None where nothing says.
        halves: by name.
        encoder: its tokenizer.
    """

    folder: Path
    step: int | None
    halves: dict[str, Half]
    encoder: Encoder


# ---- which folder ------------------------------------------------------------------------------------------------


def find_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The checkpoint that is meant: `folder` itself, or, of the folder of a run, the newest whole one.

    Nothing is renamed or removed: the run may be going on.

    Returns:
        The folder, and sentences for the user.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {kind}; give a checkpoint or final/ of an ELECTRA run as --input_dir")
    if (folder / "config.json").exists() or not list_checkpoints(folder):
        of_training = any((folder / name).exists() for name in _OF_TRAINING)
        if (of_training or checkpoint_step(folder) is not None) and (damage := find_damage(folder)):
            raise UserError(f"{folder} is damaged ({damage}); take another checkpoint of the run")
        if not (folder / "config.json").exists() and (folder / "final" / "config.json").exists():
            return folder / "final", [f"{folder} is the folder of a run without checkpoints: final is taken"]
        return folder, average_notice(folder)
    newest, sentences = look_for_whole(folder)
    if newest is None:
        raise UserError(f"every checkpoint in {folder} is damaged: {'; '.join(sentences)}")
    return newest, [*sentences, f"{folder} is the folder of a run: {newest.name} is taken"]


def check_output(output_dir: Path, names: Sequence[str], source: Path) -> None:
    """Refuse an output folder where something would be lost or the checkpoint would change.

    Raises:
        UserError: a folder to be written exists, `output_dir` is a file, or it lies in `source`.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file; give a folder as --output_dir")
    for name in names:
        if os.path.lexists(output_dir / name):
            raise UserError(f"{output_dir / name} exists already; nothing was changed. Choose another --output_dir")
    if source.resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
        raise UserError(f"--output_dir {output_dir} lies in the checkpoint {source}; choose a folder outside of it")


# ---- checks ------------------------------------------------------------------------------------------------------


def open_pair(folder: Path) -> Pair:
    """Read a checkpoint and check everything that an extraction promises.

    Args:
        folder: from `find_checkpoint`.

    Raises:
        UserError: it is no ELECTRA checkpoint, a file is missing or damaged, a weight is not finite, transformers would
            load other weights than were saved, the embeddings of the halves differ, or vocabulary and tokenizer do not
            fit.
    """
    folders = {"generator": folder / "generator", "discriminator": folder}
    configs = {"discriminator": _read_config(folder, "discriminator")}
    if not folders["generator"].is_dir():
        raise UserError(f"{folder} has no folder generator/: it is a discriminator alone, there is nothing to separate")
    configs["generator"] = _read_config(folders["generator"], "generator")
    sizes = {name: configs[name].vocab_size for name in HALVES}
    if sizes["generator"] != sizes["discriminator"]:
        raise UserError(
            f"{folder}: the generator has a vocabulary of {sizes['generator']:,}, the discriminator one of "
            f"{sizes['discriminator']:,}; they are not of one run"
        )
    encoder = _load_tokenizer(folder)
    if encoder.vocab_size > sizes["discriminator"]:
        raise UserError(
            f"{folder}: the tokenizer has {encoder.vocab_size:,} entries, the models only {sizes['discriminator']:,}"
        )
    files = {name: folders[name] / WEIGHTS for name in HALVES}
    tensors = {name: _read_weights(files[name]) for name in HALVES}
    _check_embeddings(folder, tensors["generator"], tensors["discriminator"])
    halves = {}
    for name in HALVES:
        model = _load_as_anyone_would(name, folders[name], tensors[name])
        facts = {"num_parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch.")}
        halves[name] = Half(name, folders[name], configs[name], **facts, sha256=file_sha256(files[name]))
    return Pair(folder, _step_of(folder), halves, encoder)


def _read_config(folder: Path, name: str) -> ElectraConfig:
    """The config of one half.

    Raises:
        UserError: missing, damaged, or of something else.
    """
    file = folder / "config.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint: it has no config.json") from None
    except ValueError:
        raise UserError(f"{file} is damaged: it is not JSON") from None
    if not isinstance(facts, dict) or facts.get("model_type") != "electra":
        kind = facts.get("model_type") if isinstance(facts, dict) else None
        raise UserError(f"{folder} is no ELECTRA checkpoint: the model_type in its config.json is {kind}, not electra")
    wanted, found = _ARCHITECTURES[name], facts.get("architectures") or [_ARCHITECTURES[name]]
    if found != [wanted]:
        raise UserError(f"{folder} should hold the {name} ({wanted}), but its config.json names {', '.join(found)}")
    try:
        return ElectraConfig.from_dict(facts)  # type: ignore[no-any-return]
    except Exception as error:  # transformers checks the types with an exception class of its own
        raise UserError(f"{file} is damaged: {error}") from None


def _load_tokenizer(folder: Path) -> Encoder:
    """The tokenizer of a checkpoint.

    Raises:
        UserError: its files are missing or cut off, or transformers cannot load them.
    """
    # Where files are missing AutoTokenizer may make up a vocabulary of five entries and say nothing.
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} holds no tokenizer: tokenizer_config.json is missing")
    if not any(file.is_file() for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        raise UserError(f"{folder} holds no vocabulary: neither of {', '.join(_VOCABULARIES)} is there")
    encoder = load_encoder(folder)
    trained = (read_record(folder) or {}).get("vocab_size", 0)
    if encoder.vocab_size < trained:
        raise UserError(
            f"the tokenizer in {folder} is damaged: of the {trained:,} entries by {RECORD_FILE} only "
            f"{encoder.vocab_size:,} are left"
        )
    return encoder


def _read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        UserError: missing, damaged, or with a weight that is not finite.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing; only safetensors files are read")
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{file}: {wrong:,} of {tensor.numel():,} weights of {name} are not finite (NaN, infinity)")
    return tensors


def _check_embeddings(folder: Path, generator: dict[str, Tensor], discriminator: dict[str, Tensor]) -> None:
    """Raises a UserError unless both halves hold the same embeddings; both came from one module."""
    names = sorted(name for name in {*generator, *discriminator} if name.startswith(_EMBEDDINGS))
    for name in names:
        left, right = generator.get(name), discriminator.get(name)
        if left is None or right is None:
            raise UserError(f"{folder}: {name} is in one half only; they are not of one run")
        if left.shape != right.shape or left.dtype != right.dtype:
            raise UserError(f"{folder}: {name} is {_form(left)} in the generator, {_form(right)} in the discriminator")
        if not torch.equal(left, right):
            number = int((left != right).sum())
            raise UserError(
                f"{folder}: {number:,} of {left.numel():,} values of {name} differ between the halves, which "
                "share their embeddings; they are not of one step of one run"
            )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _load_as_anyone_would(name: str, folder: Path, tensors: dict[str, Tensor]) -> Any:
    """The half as its Auto class loads it.

    Raises:
        UserError: transformers takes other weights than are in the file, which it would do with a warning at most.
    """
    before = logging.get_verbosity()
    # The table of misfits that is logged is raised as one sentence below.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model, report = LOADERS[name].from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever a config with impossible sizes makes transformers raise
        raise UserError(f"{folder}: transformers cannot load the {name} ({error})") from error
    finally:
        logging.set_verbosity(before)
    if misfits := sorted(report["mismatched_keys"]):
        tensor, found, expected = misfits[0]
        raise UserError(f"{folder}: the shape of {tensor} is {tuple(found)}, but {tuple(expected)} by config.json")
    for problem, keys in (("is missing", report["missing_keys"]), ("is unknown", report["unexpected_keys"])):
        if keys:
            raise UserError(f"{folder / WEIGHTS} is not that of the {name}: {sorted(keys)[0]} {problem}")
    for key, loaded in model.state_dict().items():
        saved = tensors.get(key, loaded)  # what is tied stands in the file once
        if loaded.dtype != saved.dtype or not torch.equal(loaded, saved):
            raise UserError(
                f"{folder}: {key} is {_form(saved)} in {WEIGHTS}, but transformers loads other values, as "
                f"{_form(loaded)}; look at dtype and tie_word_embeddings in config.json"
            )
    return model


def _step_of(folder: Path) -> int | None:
    """Optimizer steps done, by the folder's name or its state."""
    step = checkpoint_step(folder.resolve())
    if step is None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            step = int(json.loads((folder / "training_state.json").read_text(encoding="utf-8"))["progress"]["step"])
    return step


# ---- a preset ----------------------------------------------------------------------------------------------------


def check_preset(pair: Pair, preset: Preset, parameter_file: Path) -> list[str]:
    """Compare the sizes of a checkpoint with those of a preset.

    Returns:
        Sentences for the user about what is no error.

    Raises:
        UserError: they differ; every key with both values.
    """
    where = f"the preset {preset.name} of {parameter_file}"
    if preset.layers is None:
        return [f"{where} continues a pretrained model: it has no sizes to compare with"]
    generator, discriminator = (pair.halves[name].config for name in HALVES)
    differences = []
    for key, (field, name, scaled) in _SIZES.items():
        wanted, found = getattr(preset, field), getattr(discriminator, name)
        if wanted != found:
            differences.append(f"{key} is {wanted} in the preset and {found} in the discriminator")
            continue
        wanted_small = wanted * preset.generator_fraction if scaled and preset.generator_fraction else wanted
        if wanted_small != (found_small := getattr(generator, name)):
            reason = f" times generator-size {preset.generator_fraction}" if scaled else ""
            differences.append(f"{key} {wanted}{reason} is {wanted_small}, but {found_small} in the generator")
    if differences:
        raise UserError(f"{pair.folder} is not of {where}: {'; '.join(differences)}")
    length = discriminator.max_position_embeddings
    if preset.sequence_length not in (None, length):
        return [f"{where} has sequence-length {preset.sequence_length}, the checkpoint {length}; the latter holds"]
    return []


# ---- writing -----------------------------------------------------------------------------------------------------


def write_halves(
    pair: Pair, names: Sequence[str], output_dir: Path, describe: Callable[[Pair, Half], str]
) -> list[Path]:
    """Write the named halves, each into a folder of its name; a folder is whole or absent.

    Args:
        pair: from `open_pair`.
        names: of the halves.
        output_dir: where the folders will be.
        describe: gives the text of a half's model card.

    Raises:
        UserError: see `check_output`; or a file changed while it was copied.
        OSError: the disk refused; nothing is left behind.
    """
    check_output(output_dir, names, pair.folder)
    is_new = not output_dir.exists()
    try:
        with naming(output_dir), ExitStack() as stack:
            for name in names:
                remove_leftovers(output_dir / name)
                aside = stack.enter_context(new_folder(output_dir / name))
                _write_half(pair, pair.halves[name], aside)
                (aside / "README.md").write_text(describe(pair, pair.halves[name]), encoding="utf-8")
                sync_folder(aside)  # a full disk shows here, before the first of two folders gets its name
    except BaseException:
        if is_new:
            with suppress(OSError):
                output_dir.rmdir()
        raise
    return [output_dir / name for name in names]


def _write_half(pair: Pair, half: Half, folder: Path) -> None:
    """Config, weights and tokenizer of one half."""
    for name in ("config.json", WEIGHTS):
        shutil.copyfile(half.folder / name, folder / name)
    if file_sha256(folder / WEIGHTS) != half.sha256:
        raise UserError(f"{half.folder / WEIGHTS} changed while it was copied; is its run still writing there?")
    of_tokenizer = FOLDER_FILES | set(pair.encoder.tokenizer.vocab_files_names.values())
    for name in sorted(of_tokenizer - {"config.yaml"}):  # which holds paths of the machine that trained it
        if (pair.folder / name).is_file():
            shutil.copyfile(pair.folder / name, folder / name)
    _limit_length(folder / "tokenizer_config.json", half.config.max_position_embeddings)
    if load_encoder(folder).fingerprint != pair.encoder.fingerprint:
        raise UserError(
            f"the tokenizer in {pair.folder} needs files that AutoTokenizer does not name; it was not copied"
        )


def _limit_length(file: Path, num_positions: int) -> None:
    """Let the tokenizer truncate where the position embeddings end, unless it does so earlier."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("model_max_length") is None or settings["model_max_length"] > num_positions:
        settings["model_max_length"] = num_positions
        file.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
