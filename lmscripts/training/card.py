"""The model card: what was trained, what was measured, how to use it, where it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import transformers

from lmscripts.data.steps import Phases
from lmscripts.training.log import SHARES, read_log, versions


def model_card(
    title: str, origin: str, use: str, rows: dict[str, str], options_yaml: str, examples: list[str], task: str = ""
) -> str:
    """Text of a model card.

    Args:
        title: heading.
        origin: what the training began with; empty for nothing.
        use: Python lines that load it.
        rows: table of what was measured, name to value.
        options_yaml: the options that repeat the run.
        examples: lines to show, such as fill-mask answers.
        task: name of the folder's task in transformers' pipeline; empty for none.
    """
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    shown = "\n".join(f"- {example}" for example in examples)
    began = f"Trained further from {origin}" if origin else "Trained from scratch"
    return f"""---
library_name: transformers
{f"pipeline_tag: {task}" if task else "tags: [lmscripts]"}
---

# {title}

{began} on raw text. Every number below was measured in this run.

| what | value |
|---|---|
{table}

## Examples

{shown}

## Use

```python
{use}
```

## Limits

The biases and gaps of the text are those of the model. The held-out text comes from the same corpus: how well the model
does on other text was not measured.

## How it was made

{used}; {sys.platform}

```yaml
{options_yaml.strip()}
```
"""


def pretraining_card(
    title: str, origin: str, objective: Any, data: Phases, log_file: Path, options_yaml: str, model_dir: Path
) -> str:
    """Model card of a pretrained model from its folder and the log of its run.

    Args:
        title: heading.
        origin: model or run that the training began with; empty for none.
        objective: its module, see `lmscripts.objectives`.
        data: of the run.
        log_file: log.jsonl of the run.
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
    records = read_log(log_file)
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
    return model_card(title, origin, "\n\n".join(use), rows, options_yaml, examples, exports[0].task)


def _shown(name: str, value: float, several: bool) -> str:
    if name.endswith(SHARES):
        return f"{value:.2%}"
    if not name.endswith("loss"):
        return f"{value:,.4f}"
    return f"{value:.4f} (weighted sum)" if several and name == "eval_loss" else f"{value:.4f} nats per target"
