"""Take an ELECTRA checkpoint apart: the generator and the discriminator, each a folder that transformers loads alone.

python scripts/extract_electra_model.py --input_dir runs/electra/final --output_dir runs/electra/extracted
python scripts/extract_electra_model.py --input_dir runs/electra/checkpoint-5000 --output_dir out --discriminator

Without --generator and --discriminator both are written. Needs no GPU and nothing but the checkpoint: sizes and
sequence length are read from it. With --model_type they are compared with a preset.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmscripts.errors import UserError, user_errors
from lmscripts.options.parsing import option, parse_options

if TYPE_CHECKING:
    from lmscripts.models.extraction import Half, Pair
    from lmscripts.options.presets import Preset

PRESETS = Path(__file__).resolve().parent.parent / "parameter.json"


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    input_dir: str = option(help="checkpoint-STEP or final of an ELECTRA run, or the run's folder", required=True)
    output_dir: str = option(help="gets the folders generator and discriminator", required=True)
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
    with user_errors():
        extract(options)


def extract(options: Options) -> None:
    """Check everything, then write."""
    preset = open_preset(options)
    from transformers import logging

    from lmscripts.models import extraction

    logging.disable_progress_bar()
    output_dir, names = Path(options.output_dir), options.halves()
    checkpoint, notices = extraction.find_checkpoint(Path(options.input_dir))
    extraction.check_output(output_dir, names, checkpoint)
    for notice in notices:
        print(notice)
    pair = extraction.open_pair(checkpoint)
    if preset is not None:
        for notice in extraction.check_preset(pair, preset, Path(options.parameter_file or PRESETS)):
            print(notice)
    folders = extraction.write_halves(pair, names, output_dir, card)

    print(f"from {checkpoint}, {steps_done(pair)}, weights unchanged:")
    for name, folder in zip(names, folders, strict=True):
        half = pair.halves[name]
        sizes = f"{half.config.num_hidden_layers} layers of width {half.config.hidden_size}"
        sizes += f", up to {half.config.max_position_embeddings} tokens"
        print(f"{name:<14} {folder}: {half.num_parameters:,} parameters in {half.dtype}, {sizes}")
    for name, folder in zip(names, folders, strict=True):
        loader = extraction.LOADERS[name].__name__
        print(f'load it with {loader}.from_pretrained("{folder}") and AutoTokenizer.from_pretrained("{folder}")')


def open_preset(options: Options) -> Preset | None:
    """The preset to compare with, if one is named."""
    if options.model_type is None:
        return None
    from lmscripts.options.presets import FAMILIES, default_parameter_file, family_of, load_preset

    if (family := family_of(options.model_type)) != "electra":
        raise UserError(f"--model_type {options.model_type} is a preset of the family {family}, not electra")
    file, known = options.parameter_file or default_parameter_file(), {"electra": FAMILIES["electra"]}
    return load_preset(file, options.model_type, families=known)


# ---- model cards -------------------------------------------------------------------------------------------------

GENERATOR = """The generator of an ELECTRA run ([arXiv:2003.10555](https://arxiv.org/abs/2003.10555)): a masked language
model that proposes words for masked places. In training its proposals were what the discriminator learned from. It is
for filling masks and for looking at what the run learned; to fine-tune, take the discriminator of the same checkpoint.

## Use

```python
from transformers import pipeline

fill = pipeline("fill-mask", model="PATH/TO/THIS/FOLDER")
for answer in fill(f"日本の{fill.tokenizer.mask_token}は東京です。"):
    print(answer["token_str"], answer["score"])
```"""
DISCRIMINATOR = """The discriminator of an ELECTRA run ([arXiv:2003.10555](https://arxiv.org/abs/2003.10555)): it says
of every token of a text whether something else stood there before. It is the half to fine-tune, for instance with
`AutoModelForSequenceClassification.from_pretrained("PATH/TO/THIS/FOLDER")`; it fills no masks.

## Use

```python
import torch
from transformers import AutoModelForPreTraining, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
model = AutoModelForPreTraining.from_pretrained("PATH/TO/THIS/FOLDER")
inputs = tokenizer("日本の首都は東京です。", truncation=True, return_tensors="pt")
with torch.no_grad():
    replaced = model(**inputs).logits[0].sigmoid()  # of each token, how likely it is not the original
print(list(zip(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()), replaced.tolist())))
```"""


def card(pair: Pair, half: Half) -> str:
    """Text of the model card of one half."""
    from lmscripts.training.log import versions

    config, is_generator = half.config, half.name == "generator"
    source = "/".join(pair.folder.resolve().parts[-2:])
    rows = {
        "extracted from": f"`{source}`, {steps_done(pair)}",
        "parameters": f"{half.num_parameters:,}, {half.dtype}",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "feed-forward size": config.intermediate_size,
        "embedding size": config.embedding_size,
        "vocabulary": f"{config.vocab_size:,}",
        "longest input": f"{config.max_position_embeddings} tokens",
        "tokenizer": pair.encoder.description,
        "sha256 of the weights": f"`{half.sha256}`, here and in the checkpoint",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"""---
library_name: transformers
pipeline_tag: {"fill-mask" if is_generator else "feature-extraction"}
---

# {source}: {half.name}

{GENERATOR if is_generator else DISCRIMINATOR}

## Facts

| what | value |
|---|---|
{table}

Both halves of the checkpoint hold the same embeddings, which they shared in training.

## Limits

The biases and gaps of the text are those of the model. Nothing was measured when it was extracted; the numbers of the
training are in the folder of its run.

## How it was made

Config and weights were copied from the checkpoint and loaded with {used}.
"""


def steps_done(pair: Pair) -> str:
    """Where the run stood, in words."""
    if pair.step is None:
        return "the end of its run" if pair.folder.resolve().name == "final" else "step not recorded"
    return f"step {pair.step:,}"


if __name__ == "__main__":
    main()
