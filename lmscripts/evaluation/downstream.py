"""Downstream tasks of a pretraining run: a linear probe of frozen states on the way, a short fine-tuning at the end.

A task is a table of texts with one label each, of which a sample of at most 2,000 documents is taken, and of a document
two rows of 128 tokens: enough to see whether a run learns something that is of use, in seconds. It is divided once, as
the classifier divides (groups and equal texts on one side), and the same documents are judged by the probe, at every
evaluation, and by the classifier at the end. All of it is done by the main process while the others wait for its word,
however long that takes; nothing here draws a number that training draws from, and what fails is said and ends no run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmscripts.data.folding import Folder, FoldSettings
from lmscripts.data.packing import segment_ends
from lmscripts.data.splits import SplitDocument, SplitSettings, split_documents, text_hash, units_of_documents
from lmscripts.errors import UserError
from lmscripts.evaluation.baselines import majority_decisions, regress
from lmscripts.evaluation.metrics import measured, one_hot, overall, tally
from lmscripts.evaluation.sums import evaluate, judging
from lmscripts.files import project_folder, write_text
from lmscripts.text.labels import check_classes, order_labels
from lmscripts.text.records import PARTS, BadRow, Row, TableOptions, read_table
from lmscripts.tokenizer.encoder import Encoder
from lmscripts.training import joining
from lmscripts.training.log import read_log

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.objectives.module import Objective

__all__ = ["evaluate"]  # what else is measured on the way

MOST_DOCUMENTS, FEWEST_DOCUMENTS = 2000, 50
_MOST_READ = 200_000  # rows of a table from which the sample is drawn
ROW_TOKENS, MOST_ROWS = 128, 2  # of a document
SPLIT = SplitSettings(train=0.6, validation=0.15, test=0.25)  # much to judge, for narrow intervals
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse ones of the regularisation
_TOKENS_AT_ONCE = 8192
_STEPS, _BATCH_SIZE = 300, 16  # of the fine-tuning
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_WAY_OUT = re.compile(r"give --(text \(--text_column for a corpus\)|label|group_column)")
_OF_LAUNCHER = re.compile("RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC|PET|LMS|FSDP|ACCELERATE)_")

Integers = NDArray[np.int64]
Scored = list[tuple[dict[str, float], str]]  # records for the log, each with its words
States = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class EvalTask:
    """A task of N documents and K labels."""

    name: str
    documents: list[Row]
    labels: list[str]  # (K,) their names
    truth: Integers  # (N,) number of each document's label
    parts: NDArray[np.str_]  # (N,) train, validation or test
    units: Integers  # (N,) what is drawn together where an interval is found
    rows: list[NDArray[np.int32]] = field(default_factory=list)  # (M,) ids of each row, see `with_rows`
    owners: list[int] = field(default_factory=list)  # (M,) the documents that they are of
    around: tuple[int, int] = (0, 0)  # special tokens before and behind the text of a row

    def trivial(self) -> dict[str, float]:
        """Accuracy of the most frequent label of the training part, and of guessing."""
        truth, train = one_hot(self.truth, len(self.labels)), self.parts == "train"
        test = truth[self.parts == "test"]
        majority = overall(tally(test, majority_decisions(truth[train], len(test))), False)["accuracy"]
        return {"majority": float(majority), "chance": 1 / len(self.labels)}

    def __str__(self) -> str:
        sizes = Counter(self.parts.tolist())
        sized = ", ".join(f"{sizes[part]:,} for {use}" for part, use in zip(PARTS, ("training", "choice", "judging")))
        shown = ", ".join(f"{name} {value:.1%}" for name, value in self.trivial().items())
        return f"task {self.name}: {len(self.truth):,} documents ({sized}), {len(self.labels)} labels ({shown})"


# ---- what is asked for ---------------------------------------------------------------------------------------------


def read_tasks(given: Sequence[str], script: Path) -> list[EvalTask]:
    """The tasks that `--eval_task` names, read and divided; nothing on other processes than the main one.

    Args:
        given: [NAME=]FILE:TEXT:LABEL[:GROUP] each, the last three being columns.
        script: the training script, beside which that of the classifier is looked for.

    Raises:
        UserError: what is given cannot be read as that, or the table cannot be used; naming it.
    """
    if not given or os.environ.get("RANK", "0") != "0":
        return []
    _classifier(script)
    tasks = dict[str, EvalTask]()
    for text in given:
        named = _NAMED.fullmatch(text)
        file, *columns = (named[2] if named else text).split(":")
        name = named[1] if named else re.sub(r"[^\w-]", "_", Path(file).name.partition(".")[0])
        if len(columns) not in (2, 3) or not all((file, name, *columns)):
            raise UserError(f"--eval_task {text} is not FILE:TEXT:LABEL, or NAME=FILE:TEXT:LABEL:GROUP with columns")
        if name in tasks:
            raise UserError(f"two of --eval_task have the name {name}: give one of them another, {name}2={text}")
        try:
            tasks[name] = _read(name, file, TableOptions(columns[0], columns[1], group="".join(columns[2:])))
        except UserError as error:
            raise UserError(f"--eval_task {text}: {_WAY_OUT.sub('name that one', str(error))}") from None
    return list(tasks.values())


def _classifier(script: Path) -> Path:
    """The script that fine-tunes: beside a training script, which may be a user's copy, or where the library is."""
    name, home = "finetune_classifier.py", project_folder() / "scripts"
    for folder in (script.parent, home):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--eval_task needs {name}, which is neither beside {script} nor in {home}: copy it there")


def _read(name: str, file: str, table: TableOptions) -> EvalTask:
    rows, reasons = list[Row](), Counter[str]()
    for row in islice(read_table(file, table), _MOST_READ):
        if isinstance(row, BadRow):
            reasons[row.reason] += 1
        else:
            rows.append(row)
    check_classes(file, Counter(row.labels[0] for row in rows), len(rows), reasons, table.label)
    if len(rows) > MOST_DOCUMENTS:
        chosen = np.random.default_rng(0).choice(len(rows), MOST_DOCUMENTS, replace=False)
        rows = [rows[number] for number in np.sort(chosen)]
    labels = order_labels({row.labels[0] for row in rows})
    truth = np.array([labels.index(row.labels[0]) for row in rows], np.int64)
    hashed = zip(truth.tolist(), rows, strict=True)
    documents = [SplitDocument((label,), text_hash(row.text), row.group) for label, row in hashed]
    units = np.unique(units_of_documents(documents, use_groups=True), return_inverse=True)[1]
    if len(rows) < FEWEST_DOCUMENTS:
        raise UserError(f"{len(rows)} documents are too few to say anything: {FEWEST_DOCUMENTS} are the fewest")
    return EvalTask(name, rows, labels, truth, np.array(split_documents(documents, SPLIT, labels)), units)


def with_rows(tasks: list[EvalTask], tokenizer: Any, longest: int) -> list[EvalTask]:
    """The same tasks with their documents as rows of a tokenizer of transformers, no longer than `longest` tokens."""
    for task in tasks:
        fold = Folder(
            Encoder(Path(tokenizer.name_or_path), tokenizer),
            FoldSettings(min(longest, ROW_TOKENS), most_folds=MOST_ROWS),
        )
        folded = fold([row.text for row in task.documents])
        task.rows = [row.ids for rows in folded for row in rows]
        task.owners = [number for number, rows in enumerate(folded) for _ in rows]
        task.around = len(fold.before), len(fold.after)
    return tasks


# ---- the probe -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_states(
    states: States,
    rows: Sequence[Sequence[int] | NDArray[np.int32]],
    owners: Sequence[int],
    around: tuple[int, int],
    num_texts: int,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """(N, H) last hidden states averaged over the tokens of each of N texts, those `around` the text left out.

    Rows of one length are computed together, so that nothing is padded and no mask is needed. `states` gives (B, T, H)
    for (B, T) ids on the device; `owners` are the texts of the M rows. A text without rows gets zeros.
    """
    lengths, texts, (before, behind) = np.array([len(row) for row in rows]), np.array(owners), around
    sums, counts = np.zeros((num_texts, 0)), np.zeros((num_texts, 1))
    for length in np.unique(lengths)[::-1]:
        same = np.flatnonzero(lengths == length)
        for taken in np.array_split(same, -(-same.size * length // _TOKENS_AT_ONCE)):
            ids = torch.tensor(np.array([rows[number] for number in taken]), dtype=torch.int64, device=device)
            hidden = states(ids)[:, before : length - behind].float().sum(1).cpu().double().numpy()
            sums = sums if sums.size else np.zeros((num_texts, hidden.shape[1]))
            np.add.at(sums, texts[taken], hidden)
            np.add.at(counts, texts[taken], float(length - before - behind))
    return (sums / np.maximum(counts, 1)).astype(np.float32)


def probe(
    accelerator: Accelerator, objective: Objective, tasks: list[EvalTask], stop_requested: Callable[[], bool]
) -> Scored | None:
    """Every task by a linear classifier on the states of the model that is trained; every process calls it.

    How strongly it is regularised is chosen on the validation part. A task that fails is said, and left out from then
    on. Returns nothing on other processes than the main one; None on all when that was asked to stop meanwhile.
    """
    found, stopped = Scored(), False
    for task in list(tasks):
        if stopped := stopped or stop_requested():
            break
        try:
            with judging(objective), accelerator.autocast():
                found.append(
                    _probed(
                        task,
                        mean_states(
                            _states(objective), task.rows, task.owners, task.around, len(task.truth), accelerator.device
                        ),
                    )
                )
        except Exception as error:
            tasks.remove(task)
            accelerator.print(f"warning: the probe of task {task.name} failed ({error!r:.200}): it is left out")
    return None if _of_main("probes", stopped) else found


def _states(objective: Objective) -> States:
    """Last hidden states of rows of one text each."""
    model = objective.models[""]

    def states(ids: torch.Tensor) -> torch.Tensor:
        batch, positions = {"input_ids": ids}, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if objective.attention == "varlen":
            batch["segment_ends"] = segment_ends(np.zeros(ids.shape)).to(ids.device)
        found: torch.Tensor = objective.family.encode(model, ids, positions, objective.attention_inputs(model, batch))
        return found

    return states


def _probed(task: EvalTask, states: NDArray[np.float32]) -> tuple[dict[str, float], str]:
    from threadpoolctl import threadpool_limits

    if not np.isfinite(states).all():
        raise UserError("its states are no finite numbers")
    train, validation, test = (np.flatnonzero(task.parts == part) for part in PARTS)
    with threadpool_limits(1, user_api="blas"):  # for small matrices a second thread costs more than it gives
        tried = (regress(states[train], task.truth[train], states[validation], c) for c in _STRENGTHS)
        right = [int((each == task.truth[validation]).sum()) for each in tried]
        both, strength = np.concatenate([train, validation]), _STRENGTHS[right.index(max(right))]
        decided = regress(states[both], task.truth[both], states[test], strength)
    truth, given = one_hot(task.truth[test], len(task.labels)), one_hot(decided, len(task.labels))
    return _record(task, "probe", measured(truth, given, task.units[test], False, resamples=1000)[0]["metrics"])


def _record(task: EvalTask, what: str, metrics: dict[str, Any], **more: float) -> tuple[dict[str, float], str]:
    """Numbers of a task for the log, and in words."""
    record = {}
    for name in ("accuracy", "macro_f1"):
        record[name] = metrics[name]["value"]
        record |= dict(zip((f"{name}_low", f"{name}_high"), metrics[name]["interval"] or ()))
    record |= task.trivial() | more
    return {
        f"{what}_{task.name}_{name}": value for name, value in record.items()
    }, f"{what} {task.name}: {_words(record)}"


def _words(record: dict[str, float]) -> str:
    """Such as "accuracy 71.2% (64.0% to 78.1%), macro f1 70.1% (62.9% to 77.0%); majority 25.0%, chance 20.0%"."""
    bounds = {n: f" ({record[f'{n}_low']:.1%} to {record[f'{n}_high']:.1%})" for n in record if f"{n}_low" in record}
    measures = ", ".join(f"{n.replace('_', ' ')} {record[n]:.1%}{bounds.get(n, '')}" for n in ("accuracy", "macro_f1"))
    others = [n for n in ("majority", "chance", "tfidf") if n in record]
    return f"{measures}; {', '.join(f'{n} {record[n]:.1%}' for n in others)}"


def _of_main(what: str, value: Any) -> Any:
    """What the main process gives, on every process, which wait for it however long it works."""
    met = joining.world()
    return value if met is None else met.exchange(what, value)[0]


# ---- the fine-tuning -----------------------------------------------------------------------------------------------


def finetune(
    accelerator: Accelerator,
    tasks: list[EvalTask],
    run_dir: Path,
    script: Path,
    step: int,
    width: int,
    stop_requested: Callable[[], bool],
) -> bool:
    """Fine-tune final/ on every task by scripts of their own; every process calls it; whether it was stopped.

    What comes of it stands in RUN/eval_tasks/NAME, in the log and with the trackers; a task that was done after the
    same `step` is not done again. The learning rate goes by the `width` of the model: 1e-3 at 128, 7e-5 at 768.
    """
    for task in tasks:
        if stop_requested():
            break
        folder, epochs = run_dir / "eval_tasks" / task.name, round(_STEPS * _BATCH_SIZE / max(1, len(task.rows)))
        given = {"model_name_or_path": run_dir / "final", "group_column": "group", "split_column": "part"}
        given |= {"max_length": max(map(len, task.rows), default=ROW_TOKENS), "most_folds": MOST_ROWS}
        given |= {"learning_rate": min(1e-3, 1.45 / width**1.5), "epochs": min(20, max(3, epochs))}
        given |= {"batch_size": _BATCH_SIZE, "micro_batch_size": _BATCH_SIZE, "tracker": "none"}
        try:
            record, words = _finetuned(task, folder, _classifier(script), given, step, stop_requested)
            if words:
                with open(run_dir / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps({"step": step, **record}) + "\n")
                accelerator.log(record, step=step)
                accelerator.print(f"{words} ({folder})", flush=True)
        except Exception as error:
            accelerator.print(f"warning: the fine-tuning on task {task.name} failed ({error!r:.200})", flush=True)
    return bool(_of_main("fine-tuning", stop_requested()))


def _finetuned(
    task: EvalTask, folder: Path, script: Path, given: dict[str, Any], step: int, stop_requested: Callable[[], bool]
) -> tuple[dict[str, float], str]:
    """A record for the log and its words; neither where it is done already, or was stopped."""
    lines = (
        {"text": row.text, "label": row.labels[0], "group": str(unit), "part": str(part)}
        for row, unit, part in zip(task.documents, task.units, task.parts, strict=True)
    )
    table, text = folder / "table.jsonl", "".join(json.dumps(line) + "\n" for line in lines)
    logged = any(
        f"finetuned_{task.name}_accuracy" in r
        for r in read_log(folder.parents[1] / "log.jsonl")
        if r.get("step") == step
    )
    if logged and table.is_file() and table.read_text(encoding="utf-8") == text:
        return {}, ""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(table, text)
    words = [f"--{name}={value}" for name, value in given.items()]
    env = {name: value for name, value in os.environ.items() if not _OF_LAUNCHER.match(name)}
    for call in ([script, table, *words], [script.with_name("analyze_results.py"), table.with_suffix(".sqlite")]):
        with open(folder / "output.txt", "ab") as output:
            process = subprocess.Popen([sys.executable, *map(str, call)], env=env, stdout=output, stderr=output)
        while process.poll() is None:
            time.sleep(0.1)
            if stop_requested():
                process.kill()  # all that it made is made anew
        if stop_requested():
            return {}, ""
        if process.returncode:
            raise UserError(f"{script.name} or the report ended with code {process.returncode}: {output.name} says why")
    shutil.rmtree(folder / "table_training")  # checkpoints, several times as large as the model
    report = json.loads((folder / "table_report" / "run_1.json").read_text(encoding="utf-8"))
    tfidf = {each["name"]: each["metrics"]["accuracy"]["value"] for each in report["baselines"]}["TF-IDF of characters"]
    return _record(task, "finetuned", report["levels"]["document"]["metrics"], tfidf=tfidf)


def card_rows(run_dir: Path) -> dict[str, str]:
    """Rows of the model card: the last numbers of every task, and what the probe said before any training."""
    rows, before = dict[str, str](), dict[str, str]()
    for record in read_log(run_dir / "log.jsonl"):
        for found in filter(None, map(re.compile("(probe|finetuned)_(.+)_accuracy").fullmatch, record)):
            row, own = "{}, task {}".format(*found.groups()), f"{found[1]}_{found[2]}_"
            words = _words({name.removeprefix(own): value for name, value in record.items() if name.startswith(own)})
            before |= {row: f"; before training {record[found[0]]:.1%}"} if record["step"] == 0 else {}
            rows[row] = words + before.get(row, "")
    return rows
