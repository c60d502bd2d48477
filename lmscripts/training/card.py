"""The model card of what a run leaves."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path, PurePath
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers
from huggingface_hub import EvalResult, ModelCardData, metadata_load

from lmscripts.data.steps import Phases
from lmscripts.data.token_store import TokenStore
from lmscripts.objectives import Export
from lmscripts.text.corpus import HUB
from lmscripts.text.words import MECAB_DEFAULTS, MECAB_DICTIONARIES, SUDACHI_DEFAULTS
from lmscripts.training.log import SHARES, read_log, versions

if TYPE_CHECKING:
    from lmscripts.training.hub import Hub

_LIMITS = """The biases and gaps of the text are those of the model. The held-out text comes from the same corpus: how
well the model does on other text was not measured."""
_OF_JOB = ("#", "do_continue:", "resume:", "dry_run:")  # help, and what is another in a run that goes on
_PLACE = "PATH/TO/THIS/FOLDER"
_NONE: Mapping[str, float] = MappingProxyType({})
# A text in quotation marks, or a path without them, as options are written down.
_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|(?<=[\[ ])[./~][\w./-]*(?=[,\]]|$)', re.MULTILINE)


class About(NamedTuple):
    """What a user says of a model.

    Attributes:
        hub: where it is going to be; None for nowhere.
        language: codes of the text's languages; where none is said, Japanese if the tokenizer knows no other.
        license: as the Hub names it; None for nothing said.
    """

    hub: Hub | None = None
    language: Sequence[str] = ()
    license: str | None = None

    @property
    def repo(self) -> str:
        """USER/NAME on the Hub; empty for nowhere."""
        return self.hub.repo if self.hub else ""


def model_card(
    title: str,
    rows: Mapping[str, object],
    options_yaml: str,
    *,
    began: str,
    use: str,
    limits: str,
    examples: Sequence[str] = (),
    about: About,
    model_dir: Path | None = None,
    **facts: Any,
) -> str:
    """Text of a model card.

    Args:
        title: heading.
        rows: table of what was measured, name to value.
        options_yaml: the options that repeat the run; what they mean, and whole paths, stand in the run's folder.
        began: a sentence on what was trained, and from what.
        use: how it is used, as Markdown.
        limits: what it cannot be trusted with.
        examples: lines to show, such as fill-mask answers.
        about: what the user says.
        model_dir: its folder, for what its tokenizer needs; None for a model without one.
        facts: those of `metadata`.
    """
    install, language = ("", ()) if model_dir is None else _of_words(model_dir)
    needs = f"The tokenizer needs more than transformers: `{install}`.\n\n" if install else ""
    table = "\n".join(f"| {name} | {as_cell(value)} |" for name, value in rows.items())
    without_help = "\n".join(line for line in options_yaml.splitlines() if line and not line.startswith(_OF_JOB))
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    shown = "\n".join(["", "## Examples", "", *(f"- {example}" for example in examples), ""]) if examples else ""
    return f"""{metadata(title, about._replace(language=about.language or language), **facts)}
# {as_cell(title)}

{began} Every number below was measured in this run.

| what | value |
|---|---|
{table}
{shown}
## Use

{needs}{use.replace(f'"{_PLACE}', f'"{about.repo or _PLACE}')}

## Limits

{limits}

## How it was made

{used}; {sys.platform}

<details><summary>Options</summary>

{fenced(_VALUE.sub(_without_place, without_help), "yaml")}

</details>
"""


def metadata(
    title: str,
    about: About,
    *,
    task: str = "",
    tags: Sequence[str] = (),
    library: str = "transformers",
    began_with: Sequence[str] = (),
    datasets: Sequence[str] = (),
    results: Mapping[str, float | None] = _NONE,
    measured_on: str = "held-out text",
) -> str:
    """The head of a card, as the Hub reads it.

    Args:
        title: the model's name where it is nowhere on the Hub.
        about: what the user says.
        task: name of its task in transformers' pipeline; empty for none.
        tags: what it is, for those who search.
        library: that loads it.
        began_with: models, folders or runs that the training began with.
        datasets: on the Hub, that it was trained on.
        results: metric to value; what was not measured is left out.
        measured_on: name of the data.
    """
    measured = [
        EvalResult(task or "other", "held-out", measured_on, name, round(value, 6), metric_name=name.replace("_", " "))
        for name, value in results.items()
        if value is not None and isfinite(value)
    ]
    data = ModelCardData(
        language=[*about.language] or None,
        license=about.license,
        library_name=library,
        pipeline_tag=task or None,
        tags=["lmscripts", *tags],
        base_model=[name for name in map(_on_hub, began_with) if name] or None,
        datasets=[*datasets] or None,
        model_name=about.repo or title if measured else None,
        eval_results=measured or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def named(place: str) -> str:
    """The last part of a path that tells how somebody's disk is laid out: absolute, of a home or from above."""
    path = PurePath(place)
    return path.name or place if path.is_absolute() or path.parts[:1] == ("~",) or ".." in path.parts else place


def _without_place(value: re.Match[str]) -> str:
    if value[0].startswith('"'):
        return json.dumps(named(json.loads(value[0])), ensure_ascii=False)
    return named(value[0])


def _of_words(model_dir: Path) -> tuple[str, tuple[str, ...]]:
    """What installs the analyser of words that a tokenizer needs, and its language; empty for none."""
    settings: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        settings = json.loads((model_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    kind = settings.get("word_tokenizer_type")
    if kind == "mecab":
        dictionary = (MECAB_DEFAULTS | (settings.get("mecab_kwargs") or {}))["mecab_dic"]  # a folder has no name
        return MECAB_DICTIONARIES.get(dictionary, "pip install").replace("install", "install fugashi", 1), ("ja",)
    if kind == "sudachi":
        dictionary = (SUDACHI_DEFAULTS | (settings.get("sudachi_kwargs") or {}))["sudachi_dict_type"]
        return f"pip install SudachiPy sudachidict_{dictionary}", ("ja",)
    return ("pip install rhoknp", ("ja",)) if kind == "jumanpp" else ("", ())


def _on_hub(name: str) -> str:
    """The Hub's name of a model that was begun with; of a folder or a run what its card says; empty for none."""
    for place in (Path(name), Path(name, "final")):
        with suppress(Exception):  # of another's card, whatever it holds
            own = str((metadata_load(place / "README.md") or {})["model-index"][0]["name"])
            return own if re.fullmatch(r"[\w.-]+/[\w.-]+", own, re.ASCII) else ""
    return name if not Path(name).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) else ""


def as_cell(value: object) -> str:
    """A cell of Markdown that shows a value as it is, whatever signs of HTML or Markdown are in it."""
    text = html.escape(" ".join(str(value).split()))
    return re.sub(r"[|*`\[\]\\]", lambda found: f"&#{ord(found[0])};", text)


def fenced(text: str, language: str) -> str:
    """A block of code of Markdown, whatever is in it."""
    fence = "`" * max([3, *(len(found) + 1 for found in re.findall("`+", text))])
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def pretraining_card(
    title: str,
    origin: str,
    objective: Any,
    data: Phases,
    stores: Sequence[TokenStore],
    run_dir: Path,
    options_yaml: str,
    about: About,
    model_dir: Path,
    more: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """Model card of a pretrained model from its folder and the log of its run.

    Args:
        title: heading.
        origin: model or run that the training began with; empty for none.
        objective: its module, see `lmscripts.objectives`.
        data: of the run.
        stores: its text.
        run_dir: folder of the run, with its log.jsonl.
        options_yaml: the options that repeat it.
        about: what the user says.
        model_dir: folder with model and tokenizer.
        more: rows of what else was measured.
    """
    exports = [each for each in objective.EXPORTS if (model_dir / each.subfolder / "config.json").is_file()]
    models, rows, use = {}, dict[str, object](), list[str]()
    for export in exports:
        place = model_dir / export.subfolder
        model = getattr(transformers, export.auto).from_pretrained(place, local_files_only=True)
        models[export.subfolder] = model
        what = "parameters" if len(exports) == 1 else f"parameters of the {export.name}"
        rows[what] = f"{model.num_parameters():,}"
        use.append(_use(export, about.repo))
    measured, results = _of_run(data, read_log(run_dir / "log.jsonl"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)  # type: ignore[no-untyped-call]
    examples = objective.examples(models, tokenizer, data.phases[-1])
    files = [*dict.fromkeys(name for store in stores for name in store.manifest["source"]["files"])]
    origins = origin.split(" and ") if origin else []
    said = " and ".join(map(named, origins))
    return model_card(
        title,
        {**rows, **measured, **more},
        options_yaml,
        began=f"Trained {f'further from {said}' if origin else 'from scratch'} on raw text.",
        use=fenced("\n\n".join(use), "python"),
        limits=_LIMITS,
        examples=examples,
        about=about,
        model_dir=model_dir,
        task=exports[0].task,
        tags=[models[exports[0].subfolder].config.model_type, objective.__name__.rpartition(".")[2]],
        began_with=origins,
        datasets=[name.removeprefix(HUB).split(":")[0].split("@")[0] for name in files if name.startswith(HUB)],
        results=results,
        measured_on=f"held-out text of {', '.join(map(named, files)) if len(files) < 4 else f'{len(files)} files'}",
    )


def _use(export: Export, repo: str) -> str:
    """How an exported model is loaded from a folder; one of a subfolder also from its repository."""
    if not repo or not export.subfolder:
        return export.use.replace("PATH", str(Path(_PLACE, export.subfolder)))
    load = f'{export.auto}.from_pretrained("{repo}", subfolder="{export.subfolder}")'
    return f"from transformers import {export.auto}\n\n{export.name.replace(' ', '_')} = {load}"


def _of_run(data: Phases, records: list[dict[str, Any]]) -> tuple[dict[str, object], dict[str, float]]:
    """Rows on text, steps, speed and the last held-out numbers of a log, and these numbers."""
    rows, results = dict[str, object](), dict[str, float]()
    for number, phase in enumerate(data.phases):
        name = f" of phase {number + 1}" if len(data.phases) > 1 else ""
        rows[f"text{name}"] = f"{phase.train.real_tokens:,} tokens"
        shape = f"{phase.batch_size} rows of {phase.layout.sequence_length} tokens"
        rows[f"training{name}"] = f"{phase.num_steps:,} steps of {shape}"
    trained = [record for record in records if "tokens_per_second" in record]
    if trained:
        rows["real tokens seen"] = f"{trained[-1]['tokens']:,.0f}"
        rows["speed"] = f"{median(record['tokens_per_second'] for record in trained):,.0f} real tokens/s"
    for record in [record for record in records if "eval_loss" in record][-1:]:
        several = any(name.endswith("_loss") and name != "eval_loss" for name in record)
        results = {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}
        rows |= {f"held-out {name.replace('_', ' ')}": _shown(name, v, several) for name, v in results.items()}
    return rows, results


def _shown(name: str, value: float, several: bool) -> str:
    if name.endswith(SHARES):
        return f"{value:.2%}"
    if not name.endswith("loss"):
        return f"{value:,.4f}"
    return f"{value:.4f} (weighted sum)" if several and name == "loss" else f"{value:.4f} nats per target"
