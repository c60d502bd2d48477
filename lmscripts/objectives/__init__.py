"""Objectives of training, one file each; one can be chosen for pretraining when its file is here. See `PARTS` below.

What is true of one objective only stands in its file: its options, its rows and batches, its loss, its metrics, what it
exports. No optimizer, no folder, no log; imports from models and the rooms below it. Families say in `heads` which of
them they can be trained on; begin with a copy of `causal.py`. In each file the same names:

    Settings    frozen dataclass of its options, from which flags are made, a tuple where each phase may have its own;
                `resolved(settings, preset)` fills defaults
    PARTS       subfolder a model is saved in -> its attribute in the trained module, in the order of the parameters
    EXPORTS     what stands alone at the end: see `Export`
    TITLE       what it trains, for people
    KIND        its name in results of evaluate_lm.py, where it has another there
    SCORES      how a text is scored: "windows", "masks"; not there where evaluate_lm.py cannot
    rows        (store, part, tokenizer, sequence_length, packing, settings) -> rows, None for an empty part
    batches     (source, rows, epochs, seed, sizes, plan, with_ends) -> batches of `sizes` rows with their counts, from
                `lmscripts.objectives.module.cut`; `rows` (N,) says which, `epochs` (N,) in which epoch, `with_ends`
                asks for "segment_ends". What is random depends on seed, epoch and row only (`lmscripts.counters`).
                Counts: the targets of each term of `weights`, and real (text) "tokens". Floating-point tensors of a
                batch are what its targets count: an idle process gets them zeroed
    plan        (tokenizer, layout, settings) -> what is fixed for all rows, such as how they are masked
    slots       (plan, layout) -> prediction slots of a row, 0 if the head looks at every position
    words       (plan, source) -> what is predicted, for people
    weights     (settings) -> loss terms and their weights
    prepare     (trained) -> None: fits the models to the loss, as by narrowing a last layer; their configurations
                stay as the family's `config` made them
    forward     (trained, batch) -> sums, never means, of each term of `weights` at least: the loop divides each once,
                by its targets over all processes and micro-batches of the step
    metrics     (trained, sums, counts) -> named numbers
    examples    (models, tokenizer, phase) -> lines for the model card
    read        (text, encoder, longest) -> ids of a prompt of at most so many tokens; a UserError where it is none
    answers     (trained, ids, tokenizer, seed) -> lines: what the models in training make of a prompt

Nothing heavy is imported before a function is called: `--help` reads the Settings of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from lmscripts.errors import UserError

if TYPE_CHECKING:
    from lmscripts.objectives.module import Objective

_NO_OBJECTIVES = ("choice", "labels", "module", "sampling")  # what stands beside them


@dataclass(frozen=True)
class Export:
    """A folder that a finished run leaves.

    Attributes:
        subfolder: of final/ and of every checkpoint; "" for the folder itself.
        auto: class of transformers that loads it.
        task: name of its task in transformers' pipeline; empty for none.
        use: Python lines for the model card, with PATH for the folder.
    """

    name: str
    subfolder: str
    auto: str
    task: str
    use: str


def ratio(part: float, whole: float) -> float:
    """A share or a mean; of nothing it is 0."""
    return part / max(1.0, whole)


def names() -> tuple[str, ...]:
    """Objectives of pretraining."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if module.name not in _NO_OBJECTIVES))


def objective(name: str) -> Any:
    """The module of an objective; a UserError where there is none of that name."""
    if name not in names():
        raise UserError(f"there is no --objective {name}: choose among {', '.join(names())}")
    return import_module(f"{__name__}.{name}")


def read_prompts(given: Sequence[str], module: Any, tokenizer: Any, longest: int) -> dict[str, list[int]]:
    """Ids of prompts of at most so many tokens, by their text; what is the name of a file stands for its lines.

    Raises:
        UserError: one of them is no prompt for this objective, or there is no such file.
    """
    from lmscripts.text.reading import check_file
    from lmscripts.tokenizer.encoder import Encoder

    texts = list[str]()
    for text in given:
        file = Path(text)
        if file.suffix == ".txt" or (len(text.encode("utf-8", "replace")) < 256 and file.is_file()):
            check_file(file, "file of prompts")
            texts += filter(str.strip, file.read_text(encoding="utf-8-sig", errors="replace").splitlines())
        else:
            texts.append(text)
    encoder = Encoder(Path(tokenizer.name_or_path), tokenizer) if texts else None
    return {text: module.read(text, encoder, longest) for text in texts}


def trained(name: str, family: Any, models: Mapping[str, Any], attention: str, settings: Any) -> Objective:
    """The module that is trained on an objective of this name, see `lmscripts.objectives.module`."""
    from lmscripts.objectives.module import Objective

    return Objective(objective(name), family, models, attention, settings)  # type: ignore[arg-type]
