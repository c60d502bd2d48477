"""The text as a vocabulary is trained on: cut into splits at document ends, cleaned, segmented in parallel, on disk.

Split `i` is `<i>.txt` (a sentence a line, words joined by single spaces) with `<i>.json` beside it, which says from
which source, span and settings it was made. A split that is there already for the same of these is kept.
"""

from __future__ import annotations

import json
import multiprocessing
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lmscripts.files import folder_aside, new_text, remove_leftovers, write_text
from lmscripts.text.corpus import Span, lines_before, read_documents
from lmscripts.text.records import TEXTS, TableOptions
from lmscripts.text.report import MAX_EXAMPLES, TextReport
from lmscripts.text.words import WordTokenizer, make_segmenter, numeral_run_finder
from lmscripts.tokenizer.training import most_frequent
from lmscripts.workers import DIED, given_up, in_order

_DIED = f"{DIED}; finished splits are kept in --intermediate_dir"
_REPORT_EVERY_BYTES = 1 << 18


@contextmanager
def splits_folder(model_dir: Path, intermediate_dir: str) -> Iterator[Path]:
    """The folder for the segmented text: `intermediate_dir`, or one beside the tokenizer that is removed again."""
    if intermediate_dir:
        Path(intermediate_dir).mkdir(parents=True, exist_ok=True)
        yield Path(intermediate_dir)
        return
    remove_leftovers(model_dir)
    with folder_aside(model_dir) as folder:
        yield folder


@dataclass(frozen=True)
class SplitTask:
    """One split of the text and all that decides its content.

    Attributes:
        index, folder: its place.
        spans: what it holds.
        source: fingerprint of the whole text.
        words: how lines are cut into words.
        segmented: write words joined by spaces; otherwise the (normalised) lines.
        table, reading: how tables are read, and the keyword arguments of `read_documents`.
    """

    index: int
    spans: tuple[Span, ...]
    folder: Path
    source: str
    words: WordTokenizer
    segmented: bool
    table: TableOptions = TEXTS
    reading: dict[str, bool] = field(default_factory=dict)

    @property
    def text_file(self) -> Path:
        """The segmented text."""
        return self.folder / f"{self.index}.txt"

    def settings(self) -> dict[str, Any]:
        """What decides the content, as plain values; not the place of the source."""
        return {
            "source": self.source,
            "spans": [[Path(span.path).name, span.start, span.end] for span in self.spans],
            "words": self.words.description(),
            "segmented": self.segmented,
            "table": json.loads(json.dumps(asdict(self.table))),  # as it is read back
            **self.reading,
        }


@dataclass
class SplitResult:
    """What was found while a split was written; `numeral_runs` are suspicious words of ipadic with their counts."""

    report: TextReport
    numeral_runs: Counter[str]
    was_there: bool = False


def finished_split(task: SplitTask) -> SplitResult | None:
    """The result of a split that an earlier run has written with the same settings, or None."""
    try:
        record = json.loads(task.text_file.with_suffix(".json").read_text(encoding="utf-8"))
        if record["settings"] == task.settings() and record["size"] == task.text_file.stat().st_size:
            return SplitResult(TextReport.from_dict(record["report"]), Counter(record["numeral_runs"]), True)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not written by this program
    return None


def write_split(task: SplitTask, progress: Callable[[int], None]) -> SplitResult:
    """Read, clean and segment one split, and write it aside and rename it.

    `progress` is called now and then with the bytes of text done since the last call; it may raise to stop.
    """
    for left_over in task.folder.glob(f".{task.text_file.name}.*"):
        left_over.unlink(missing_ok=True)
    report, runs = TextReport(), Counter[str]()
    if task.segmented:
        segment, numeral_runs = make_segmenter(task.words), numeral_run_finder(task.words)

    def to_line(line: str) -> str:
        if not task.segmented:
            return f"{line if task.words.normalization == 'none' else unicodedata.normalize('NFKC', line).strip()}\n"
        words = " ".join(segment(line))
        runs.update(numeral_runs(words))
        return f"{words}\n"

    reported = 0
    with new_text(task.text_file) as file:
        for document in read_documents(task.spans, report, task.table, **task.reading):
            file.writelines(map(to_line, document))
            if report.num_bytes - reported >= _REPORT_EVERY_BYTES:
                progress(report.num_bytes - reported)
                reported = report.num_bytes
        progress(report.num_bytes - reported)
        # The record of an earlier text must not vouch for this one, should the process end between the two.
        task.text_file.with_suffix(".json").unlink(missing_ok=True)
    size = task.text_file.stat().st_size
    record = {"settings": task.settings(), "size": size, "report": report.as_dict(), "numeral_runs": runs}
    write_text(task.text_file.with_suffix(".json"), json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    return SplitResult(report, runs)


def write_splits(
    tasks: Sequence[SplitTask], num_workers: int, progress: Callable[[int, int], None]
) -> list[SplitResult]:
    """Write all splits that are not there yet, in worker processes; results in the order of the tasks.

    `progress` is called about every second in this process with (bytes of text done, splits done).

    Raises:
        UserError: what a worker raised, or a worker was killed.
    """
    results = {task.index: result for task in tasks if (result := finished_split(task))}
    missing = [task for task in tasks if task.index not in results]
    done = multiprocessing.get_context("spawn").Value("q", 0)  # bytes of text
    num_workers = min(num_workers, len(missing))

    def show() -> None:
        progress(done.value, len(results))

    write = partial(_write, done=done, show=show if num_workers == 1 else None)
    done_splits = in_order(write, missing, num_workers, tick=show, place=_place, if_died=_DIED)
    for result, task in zip(done_splits, missing):
        results[task.index] = result
        show()
    return [results[task.index] for task in tasks]


def _place(task: SplitTask) -> Callable[[], str]:
    return lambda: "".join(f"from {s.path}:{lines_before(s.path, s.start) + 1} on" for s in task.spans[:1])


def _write(task: SplitTask, done: Any, show: Callable[[], None] | None) -> SplitResult:
    """Write a split, count what is done in memory that all workers share, and show it if that is this process's."""

    def count(num_bytes: int) -> None:
        if given_up():
            raise InterruptedError  # nobody reads it
        with done.get_lock():
            done.value += num_bytes
        if show is not None:
            show()

    return write_split(task, count)


def numeral_run_warning(results: Sequence[SplitResult]) -> str | None:
    """One sentence about the fault of ipadic where the text shows it."""
    runs = sum((result.numeral_runs for result in results), Counter[str]())
    if not runs:
        return None
    examples = ", ".join(most_frequent(runs, MAX_EXAMPLES))
    return (
        f"ipadic took runs of kanji behind a numeral for single words {runs.total():,} times ({examples}): for text of "
        "this kind --mecab_dic unidic_lite segments better"
    )
