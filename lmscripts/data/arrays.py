"""Arrays as files of a store: written piece by piece with their hashes, checked, memory-mapped."""

from __future__ import annotations

import hashlib
import mmap
import resource
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmscripts.errors import UserError
from lmscripts.files import file_sha256


class ArrayWriter:
    """Appends to the arrays of a new folder, `NAME.bin` each."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        folder.mkdir()
        self.files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in names}
        self.hashes = {name: hashlib.sha256() for name in self.files}
        self.sizes = dict.fromkeys(self.files, 0)

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Append an array as it lies in memory."""
        data = np.ascontiguousarray(array).tobytes()
        self.files[name].write(data)
        self.hashes[name].update(data)
        self.sizes[name] += len(data)

    def close(self) -> dict[str, dict[str, Any]]:
        """Finish the files; returns what a manifest says of each: "bytes" and "sha256"."""
        for file in self.files.values():
            file.close()
        return {name: {"bytes": self.sizes[name], "sha256": self.hashes[name].hexdigest()} for name in self.files}


def map_array(path: Path, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Memory-map a file; an empty file, which cannot be mapped, gives an empty array."""
    if size == 0:
        return np.zeros(0, dtype)
    with path.open("rb") as file:  # a plain array, which numpy indexes faster than a memmap
        return np.ndarray(size // dtype.itemsize, dtype, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class _Cold(threading.local):
    """Of a thread: how often it has waited for the disk, and how many of its next calls are to look ahead."""

    faults, calls = 0, 0


_cold = _Cold()


def fetch_soon(ranges: Iterable[tuple[NDArray[Any], NDArray[np.int64], int]]) -> None:
    """Have the system read `length` items from each of (B,) offsets of mapped arrays: all at once, without waiting.

    Else each is waited for when it is looked at, one after the other. Costs nothing as long as what is looked at is in
    memory; does nothing for other arrays and where the system cannot.
    """
    if not (hasattr(mmap, "MADV_WILLNEED") and hasattr(resource, "RUSAGE_THREAD")):
        return
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
    # What was asked for in time is no fault, so that their absence says nothing at once.
    _cold.calls = 100 if faults > _cold.faults else max(0, _cold.calls - 1)
    _cold.faults = faults
    for array, begin, length in ranges if _cold.calls else ():
        if isinstance(mapped := array.base, mmap.mmap):
            first = np.clip(begin, 0, array.size - 1) * array.itemsize
            skipped = first % mmap.PAGESIZE
            for at, size in zip((first - skipped).tolist(), (skipped + length * array.itemsize).tolist()):
                mapped.madvise(mmap.MADV_WILLNEED, at, size)


def check_sizes(folder: Path, sizes: Mapping[str, int], described: Mapping[str, Any], way_out: str) -> None:
    """Compare the sizes of the arrays of a folder with what they should be, in bytes, and what a manifest describes.

    Raises:
        UserError: names the first file that is missing or of another size.
    """
    for name, size in sizes.items():
        path = folder / f"{name}.bin"
        found = path.stat().st_size if path.is_file() else None
        if not found == size == described[name]["bytes"]:
            words = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{path} {words}, the manifest says {size} bytes; {way_out}")


def check_hashes(folders: Mapping[Path, Mapping[str, Any]], way_out: str) -> None:
    """Compare the content of the arrays of folders with what a manifest describes; a bar on a terminal.

    Raises:
        UserError: names the first file that differs, with both hashes.
    """
    from tqdm import tqdm

    files = [
        (folder / f"{name}.bin", each["sha256"])
        for folder, described in folders.items()
        for name, each in described.items()
    ]
    for path, told in tqdm(files, "checking", delay=2, leave=False, disable=not sys.stderr.isatty()):
        if (found := file_sha256(path)) != told:
            raise UserError(f"{path} has hash {found[:16]}, the manifest says {told[:16]}: it is damaged; {way_out}")
