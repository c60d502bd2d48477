"""Take an ELECTRA checkpoint apart: the generator and the discriminator, each a folder that transformers loads alone.

python scripts/extract_electra_model.py --input_dir runs/electra/final --output_dir runs/electra/extracted
python scripts/extract_electra_model.py --input_dir runs/electra/checkpoint-5000 --output_dir out --discriminator

Without --generator and --discriminator both are written. Needs no GPU and nothing but the checkpoint: sizes and
sequence length are read from it. With --model_type they are compared with a preset.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmscripts.errors import UserError, naming, user_errors
from lmscripts.files import file_sha256, new_folder, remove_leftovers, sync_folder
from lmscripts.objectives.replaced import EXPORTS
from lmscripts.options import option, parse_options

if TYPE_CHECKING:
    from lmscripts.models.saved import SavedModel
    from lmscripts.objectives import Export


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    input_dir: str = option(help="checkpoint-STEP or final of an ELECTRA run, or the run's folder", required=True)
    output_dir: str = option(help="gets the folders generator and discriminator", required=True, writes="folder")
    generator: bool | None = option(None, help="a flag: write the generator; without either flag both")
    discriminator: bool | None = option(None, help="a flag: write the discriminator")
    model_type: str | None = option(None, help="preset that the sizes must be those of")
    parameter_file: str | None = option(None, help="presets; default: the project's parameter.json")

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        if self.parameter_file is not None and self.model_type is None:
            raise UserError(
                f"--parameter_file {self.parameter_file} has no effect without --model_type, which names a preset "
                "in it; the sizes are in the checkpoint, so leave both out or give both"
            )
        if not self.halves():
            raise UserError("--no_generator and --no_discriminator leave nothing to write; leave one of them out")

    def halves(self) -> list[str]:
        """What to write: what was asked for; if nothing was, all that was not refused."""
        wanted = {"generator": self.generator, "discriminator": self.discriminator}
        asked = [name for name, value in wanted.items() if value]
        return asked or [name for name, value in wanted.items() if value is None]


def main() -> None:
    """Parse, then extract."""
    options = parse_options(Options, description=__doc__ or "")
    with user_errors(only_words=True):
        extract(options)


def extract(options: Options) -> None:
    """Check everything, then write each half into a folder of its name; all of them are whole, or none is there."""
    from transformers import logging

    from lmscripts.models.finding import find_saved

    logging.disable_progress_bar()
    output_dir = Path(options.output_dir)
    places = {output_dir / export.name: export for export in EXPORTS if export.name in options.halves()}
    folder, notices = find_saved(Path(options.input_dir), prefer="checkpoint")
    for place in places:
        if os.path.lexists(place):
            raise UserError(f"{place} exists already; nothing was changed. Choose another --output_dir")
        if folder.resolve() in place.resolve().parents:
            raise UserError(f"--output_dir {output_dir} lies in the checkpoint {folder}; choose a folder outside of it")
    pair = open_pair(folder)
    notices += [*pair.notices, *compare(pair, folder, options)]
    with naming(output_dir), ExitStack() as stack:
        if not output_dir.exists():
            output_dir.mkdir(parents=True)
            stack.callback(lambda: any(output_dir.iterdir()) or output_dir.rmdir())
        for place, export in places.items():
            remove_leftovers(place)
            aside = stack.enter_context(new_folder(place))
            write_half(pair, folder, export, aside)
            sync_folder(aside)  # a full disk shows here, before the first of two folders gets its name
    print(
        *notices,
        f"from {folder}, {steps_done(pair, folder)}, weights unchanged, up to {pair.longest} tokens:",
        sep="\n",
    )
    for place, export in places.items():
        number = pair.models[export.subfolder].num_parameters()
        print(f'{place}: {number:,} parameters; {export.auto}.from_pretrained("{place}") loads it')


# ---- checks ------------------------------------------------------------------------------------------------------


def open_pair(folder: Path) -> SavedModel:
    """Both halves of a checkpoint, as `lmscripts.models.saved.open_model` checks them, with the same embeddings."""
    from lmscripts import objectives
    from lmscripts.models.loading import read_config
    from lmscripts.models.saved import open_model, what_it_predicts

    config = read_config(folder)
    if what_it_predicts(folder, config, objectives.names())[1] != "replaced":
        saved_as = ", ".join(config.architectures or ["no architecture"])
        raise UserError(
            f"{folder} is no ELECTRA checkpoint with a discriminator: its config.json names {saved_as} and the "
            f"model_type {config.model_type}"
        )
    if missing := [each.name for each in EXPORTS if not (folder / each.subfolder / "config.json").is_file()]:
        raise UserError(f"{folder} has no {missing[0]}/config.json: it is one half alone, there is nothing to separate")
    if not (folder / "tokenizer_config.json").is_file():  # AutoTokenizer would take another class
        raise UserError(f"{folder} holds no tokenizer: tokenizer_config.json is missing")
    pair = open_model(str(folder), ("replaced",))
    first, second = (read_embeddings(folder / part, model) for part, model in pair.models.items())
    for name in sorted({*first, *second}):
        if name not in first or name not in second or not first[name].equal(second[name]):
            raise UserError(f"{folder}: {name} differs between the halves; they are not of one step of one run")
    return pair


def read_embeddings(folder: Path, model: Any) -> dict[str, Any]:
    """The embeddings in the weights of a half, all of which must be finite and what transformers loads of them."""
    from safetensors.torch import load_file

    from lmscripts.models.finding import weight_files
    from lmscripts.models.loading import read_config

    tensors, loaded, dtype = {}, model.state_dict(), read_config(folder).dtype
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            raise UserError(f"{file} is no safetensors file, and only such are read")
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        if wrong := int((~tensor.isfinite()).sum()):
            raise UserError(f"{folder}: {wrong:,} of {tensor.numel():,} weights of {name} are not finite")
        if dtype not in (None, tensor.dtype) or name not in loaded or not loaded[name].equal(tensor.float()):
            raise UserError(
                f"{folder}: transformers would not load {name} ({tensor.dtype}) as it was saved; look at dtype and "
                "tie_word_embeddings in config.json"
            )
    return {name: tensor for name, tensor in tensors.items() if f"{model.base_model_prefix}.embeddings." in name}


def compare(pair: SavedModel, folder: Path, options: Options) -> list[str]:
    """Refuse a checkpoint that has not the sizes of the named preset; sentences about what is no error."""
    if options.model_type is None:
        return []
    from lmscripts.data.packing import Layout
    from lmscripts.models.families import family, preset_keys
    from lmscripts.options.presets import default_parameter_file, load_preset

    file = options.parameter_file or default_parameter_file()
    preset, where = load_preset(file, options.model_type, preset_keys()), f"the preset {options.model_type} of {file}"
    if family(preset.family) is not pair.family:
        raise UserError(f"{where} is of the family {preset.family}, not {pair.model_type}")
    if preset.layers is None:
        return [f"{where} continues a pretrained model: it has no sizes to compare with"]
    length, differences = pair.models[""].config.max_position_embeddings, []
    layout = Layout(length, "isolated", begin_id=None, end_id=0, pad_id=0)
    for export in EXPORTS:
        found = pair.models[export.subfolder].config
        wanted = pair.family.config(preset, found.vocab_size, layout, export.subfolder)
        for name in (*preset.layer_sizes(), "embedding_size"):
            if (ours := getattr(wanted, name)) != (theirs := getattr(found, name)):
                differences.append(f"{name} of the {export.name} is {ours} by the preset and {theirs} here")
    if differences:
        raise UserError(f"{folder} is not of {where}: {'; '.join(differences)}")
    if preset.sequence_length not in (None, length):
        return [f"{where} has sequence-length {preset.sequence_length}, the checkpoint {length}; the latter holds"]
    return []


# ---- writing -----------------------------------------------------------------------------------------------------


def write_half(pair: SavedModel, folder: Path, export: Export, target: Path) -> None:
    """Config, weights and tokenizer of a half, whose tokenizer truncates where its positions end, and a card."""
    from lmscripts.models.finding import weight_files
    from lmscripts.tokenizer.folder import copy_tokenizer, write_json

    source = folder / export.subfolder
    copy_tokenizer(folder, target)
    (target / "config.yaml").unlink(missing_ok=True)  # it holds paths of the machine that trained the tokenizer
    for file in (source / "config.json", *source.glob("*.index.json"), *weight_files(source)):
        shutil.copyfile(file, target / file.name)
    sums = {str(Path(export.subfolder, file.name)): file_sha256(file) for file in weight_files(target)}
    if not sums.items() <= pair.weights.items():
        raise UserError(f"{source} changed while it was copied; is its run still writing there?")
    settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    positions = pair.models[export.subfolder].config.max_position_embeddings
    if (settings.get("model_max_length") or positions + 1) > positions:
        write_json(target / "tokenizer_config.json", settings | {"model_max_length": positions})
    (target / "README.md").write_text(card(pair, folder, export, sums), encoding="utf-8")


def card(pair: SavedModel, folder: Path, export: Export, sums: dict[str, str]) -> str:
    """Text of the model card of one half."""
    from lmscripts.training.card import About, metadata

    model, source = pair.models[export.subfolder], "/".join(folder.resolve().parts[-2:])
    rows = {"extracted from": f"`{source}`, {steps_done(pair, folder)}", "parameters": f"{model.num_parameters():,}"}
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "embedding_size")
    rows |= {name.removeprefix("num_").replace("_", " "): getattr(model.config, name) for name in names}
    rows |= {"longest input": f"{pair.longest} tokens", "tokenizer": pair.encoder.description}
    rows |= {f"sha256 of {Path(name).name}": f"`{sha256}`, here and in the checkpoint" for name, sha256 in sums.items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""{metadata(source, About(), task=export.task, tags=["electra"])}
# {source}: {export.name}

The {export.name} of an ELECTRA run ([arXiv:2003.10555](https://arxiv.org/abs/2003.10555)), in which a generator fills
masks and a discriminator learns to find what it filled in; both have the same embeddings. Config and weights were
copied from the checkpoint.

| what | value |
|---|---|
{table}

## Use

```python
{export.use.replace("PATH", "PATH/TO/THIS/FOLDER")}
```

## Limits

The biases and gaps of the text are those of the model. Nothing was measured when it was extracted; the numbers of the
training are in the folder of its run.
"""


def steps_done(pair: SavedModel, folder: Path) -> str:
    """Where the run stood, in words."""
    if pair.step is None:
        return "the end of its run" if folder.resolve().name == "final" else "step not recorded"
    return f"step {pair.step:,}"


if __name__ == "__main__":
    main()
