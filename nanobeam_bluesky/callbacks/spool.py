"""`Spool`: documents that wait on disk, one file of JSON lines a run."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Spool", "SpoolFullError"]

FREE_BYTES = 1_000_000_000
"""Free space that is left to others on the disk."""
_NOT_NAME = re.compile(r"[^0-9A-Za-z-]")

Document = tuple[str, Any]


class SpoolFullError(OSError):
    """The disk has no room for more documents."""


class Spool:
    """A folder with the documents of runs that could not be delivered yet.

    A line ``[name, document]`` for each document; runs in the order in which they came,
    also over several processes one after the other. A last line that is cut off, as by a
    power failure, is left out.

    Parameters
    ----------
    folder
        Created where there is none; for one process at a time.

    Raises
    ------
    BlockingIOError
        If another process has it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BlockingIOError(
                f"spool folder {self.folder} is in use by another process: give each its own"
            ) from error
        self._files: dict[str, Path] = {}
        self._lengths: dict[str, int] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            if not path.name.endswith(".refused.jsonl"):
                _trim(path)
                self._files[path.stem.partition("_")[2]] = path
                self._lengths[path.stem.partition("_")[2]] = sum(1 for _ in _lines(path))

    def __len__(self) -> int:
        """Documents on disk, those of runs in hand included."""
        return sum(list(self._lengths.values()))  # others ask while the sink's thread changes it

    def __contains__(self, run: str) -> bool:
        return _key(run) in self._files

    def runs(self) -> list[str]:
        """Return the keys of the runs, the oldest first."""
        return list(self._files)

    def add(self, run: str, documents: Iterable[Document]) -> None:
        """Append documents of a run; all of them or, on an error, none.

        Raises
        ------
        OSError
            If they cannot be written: `SpoolFullError` where less than `FREE_BYTES` are free.
        """
        text = "".join(json.dumps(item, default=_plain) + "\n" for item in documents)
        free = shutil.disk_usage(self.folder).free
        if free - len(text) < FREE_BYTES:
            raise SpoolFullError(f"{self.folder}: only {free / 1e9:.1f} GB are free")
        key = _key(run)
        path = self._files.get(key) or self.folder / f"{time.time_ns():020d}_{key}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            before = file.tell()
            try:
                file.write(text)
                file.flush()
            except OSError:
                os.truncate(path, before)
                raise
        self._files[key] = path
        self._lengths[key] = self._lengths.get(key, 0) + text.count("\n")

    def documents(self, run: str) -> Iterator[Document]:
        """Yield the documents of a run, also those that are added meanwhile."""
        for line in _lines(self._files[_key(run)]):
            name, doc = json.loads(line)
            yield name, doc

    def remove(self, run: str) -> None:
        """Delete a run: it is delivered."""
        path = self._files.pop(_key(run), None)
        self._lengths.pop(_key(run), None)
        if path is not None:
            path.unlink(missing_ok=True)

    def set_aside(self, run: str) -> Path:
        """Keep a run that will never be delivered, and return where."""
        path = self._files.pop(_key(run))
        self._lengths.pop(_key(run))
        return path.rename(path.with_suffix(".refused.jsonl"))

    def close(self) -> None:
        """Leave the folder to others."""
        self._lock.close()


def _key(run: str) -> str:
    """Make a run's uid part of a file's name, whatever it holds."""
    return _NOT_NAME.sub("-", run)[:64]


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield line


def _trim(path: Path) -> None:
    """Cut off what stands behind the last whole line."""
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
