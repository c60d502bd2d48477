"""Documents to rows of the SQLite file, in this process or in several, with the same result."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from lmscripts.data.folding import Folder, FoldSettings
from lmscripts.data.stored import row_checks
from lmscripts.errors import UserError
from lmscripts.tokenizer.encoder import Encoder

Documents = list[tuple[int, str]]  # (doc_id, text)
FoldRow = tuple[int, int, int, int, int, bytes, int]  # (doc_id, idx, n, char_start, char_end, ids, row_check)


def _fold_rows(folder: Folder, batch: Documents) -> list[list[FoldRow]]:
    """For each document the values of its rows."""
    folds = folder([text for _, text in batch])
    rows = [
        (doc_id, f.idx, f.n, f.char_start, f.char_end, f.ids.astype("<i4").tobytes())
        for (doc_id, _), each in zip(batch, folds)
        for f in each
    ]
    *numbers, blobs = zip(*rows) if rows else ((),) * 6
    checked = ((*row, check) for row, check in zip(rows, row_checks(numbers, blobs).tolist()))
    return [list(itertools.islice(checked, len(each))) for each in folds]


def fold_in_order(folder: Folder, batches: Iterable[Documents], num_workers: int) -> Iterator[list[list[FoldRow]]]:
    """Fold batches in `num_workers` processes, give them back in order, and hold only a few at a time.

    Yields:
        For each batch, for each of its documents, its rows.

    Raises:
        UserError: a process was killed.
    """
    if num_workers <= 1:
        yield from (_fold_rows(folder, batch) for batch in batches)
        return
    # Not forked: a child would hold the lock of `only_builder` beyond the death of its parent.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, spawn, _start_worker, (folder.encoder, folder.settings)) as pool:
        waiting: deque[Future[list[list[FoldRow]]]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_fold_in_worker, batch))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a tokenising process was killed, probably for memory: give fewer --num_workers") from None


_worker: Folder | None = None


def _start_worker(encoder: Encoder, settings: FoldSettings) -> None:
    """Make the folder of this worker process; interrupts are the parent's business."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Folder(encoder, settings)


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _fold_in_worker(batch: Documents) -> list[list[FoldRow]]:
    assert _worker is not None
    return _fold_rows(_worker, batch)
