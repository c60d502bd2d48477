"""The model card of what a run leaves."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import transformers

from lmscripts.data.steps import Phases
from lmscripts.training.log import SHARES, read_log, versions

_LIMITS = """The biases and gaps of the text are those of the model. The held-out text comes from the same corpus: how
well the model does on other text was not measured."""


def model_card(
    title: str,
    rows: Mapping[str, object],
    options_yaml: str,
    *,
    began: str,
    use: str,
    limits: str,
    examples: Sequence[str] = (),
    task: str = "",
) -> str:
    """Text of a model card.

    Args:
        title: heading.
        rows: table of what was measured, name to value.
        options_yaml: the options that repeat the run; what they mean stands in the run's folder.
        began: a sentence on what was trained, and from what.
        use: how it is used, as Markdown.
        limits: what it cannot be trusted with.
        examples: lines to show, such as fill-mask answers.
        task: name of the folder's task in transformers' pipeline; empty for none.
    """
    table = "\n".join(f"| {name} | {as_cell(value)} |" for name, value in rows.items())
    without_help = "\n".join(line for line in options_yaml.splitlines() if line and not line.startswith("#"))
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    shown = "\n".join(["", "## Examples", "", *(f"- {example}" for example in examples), ""]) if examples else ""
    return f"""---
library_name: transformers
{f"pipeline_tag: {task}" if task else "tags: [lmscripts]"}
---

# {as_cell(title)}

{began} Every number below was measured in this run.

| what | value |
|---|---|
{table}
{shown}
## Use

{use}

## Limits

{limits}

## How it was made

{used}; {sys.platform}

<details><summary>Options</summary>

{fenced(without_help, "yaml")}

</details>
"""


def as_cell(value: object) -> str:
    """A cell of Markdown that shows a value as it is, whatever signs of HTML or Markdown are in it."""
    text = html.escape(" ".join(str(value).split()))
    return re.sub(r"[|*`\[\]\\]", lambda found: f"&#{ord(found[0])};", text)


def fenced(text: str, language: str) -> str:
    """A block of code of Markdown, whatever is in it."""
    fence = "`" * max([3, *(len(found) + 1 for found in re.findall("`+", text))])
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def pretraining_card(
    title: str, origin: str, objective: Any, data: Phases, run_dir: Path, options_yaml: str, model_dir: Path
) -> str:
    """Model card of a pretrained model from its folder and the log of its run.

    Args:
        title: heading.
        origin: model or run that the training began with; empty for none.
        objective: its module, see `lmscripts.objectives`.
        data: of the run.
        run_dir: folder of the run, with its log.jsonl.
        options_yaml: the options that repeat it.
        model_dir: folder with model and tokenizer.
    """
    exports = [each for each in objective.EXPORTS if (model_dir / each.subfolder / "config.json").is_file()]
    models, rows, use = {}, {}, []
    for export in exports:
        place = model_dir / export.subfolder
        model = getattr(transformers, export.auto).from_pretrained(place, local_files_only=True)
        models[export.subfolder] = model
        what = "parameters" if len(exports) == 1 else f"parameters of the {export.name}"
        rows[what] = f"{model.num_parameters():,}"
        use.append(export.use.replace("PATH", str(Path("PATH/TO/THIS/FOLDER", export.subfolder))))
    records = read_log(run_dir / "log.jsonl")
    trained = [record for record in records if "tokens_per_second" in record]
    for number, phase in enumerate(data.phases):
        name = f" of phase {number + 1}" if len(data.phases) > 1 else ""
        rows[f"text{name}"] = f"{phase.train.real_tokens:,} tokens"
        shape = f"{phase.batch_size} rows of {phase.layout.sequence_length} tokens"
        rows[f"training{name}"] = f"{phase.num_steps:,} steps of {shape}"
    if trained:
        rows["real tokens seen"] = f"{trained[-1]['tokens']:,.0f}"
        rows["speed"] = f"{median(record['tokens_per_second'] for record in trained):,.0f} real tokens/s"
    for record in [record for record in records if "eval_loss" in record][-1:]:
        several = any(name.endswith("_loss") and name != "eval_loss" for name in record)
        for name in (name for name in record if name.startswith("eval_")):
            rows[f"held-out {name.removeprefix('eval_').replace('_', ' ')}"] = _shown(name, record[name], several)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)  # type: ignore[no-untyped-call]
    examples = objective.examples(models, tokenizer, data.phases[-1])
    return model_card(
        title,
        rows,
        options_yaml,
        began=f"Trained {f'further from {origin}' if origin else 'from scratch'} on raw text.",
        use=fenced("\n\n".join(use), "python"),
        limits=_LIMITS,
        examples=examples,
        task=exports[0].task,
    )


def _shown(name: str, value: float, several: bool) -> str:
    if name.endswith(SHARES):
        return f"{value:.2%}"
    if not name.endswith("loss"):
        return f"{value:,.4f}"
    return f"{value:.4f} (weighted sum)" if several and name == "eval_loss" else f"{value:.4f} nats per target"
