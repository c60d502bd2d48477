"""Getting batches ready in the background while the model computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class Prefetcher(Iterator[Item]):
    """Runs an iterator in a thread, a few items ahead; its errors are raised where the items are taken."""

    def __init__(self, items: Iterator[Item], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Item:
        item, error = self._queue.get()
        if error is not None:
            raise error
        assert item is not None
        return item

    def close(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        self._thread.join()


def pin(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a batch to page-locked memory, from where a GPU can fetch it without blocking."""
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Start copying a batch to the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
