"""Maps of raw runs that nobody has analysed yet, made when they are asked for.

The process that makes them is ``python -m nanobeam_bluesky.documents``, which does not import
Tiled (6 s of a core): it gives way to everything else, and ends with the server.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nanobeam_bluesky.callbacks.worker_client import NO_LOCKS
from nanobeam_bluesky.documents.replay import as_json, write_documents
from nanobeam_bluesky.tiled_adapters.scans import UnreadableError

__all__ = ["BusyError", "Computer"]

Documents = list[tuple[str, Mapping[str, Any]]]

KEPT_RUNS = 200
KEPT_BYTES = 2_000_000_000
WAITING = 16
"""Runs that may wait for their turn."""
AGAIN_SECONDS = 600
"""What failed is not tried again before."""


class BusyError(RuntimeError):
    """Too many runs wait already."""


class Computer:
    """Analyses raw runs one after the other; what comes out is kept in a folder.

    Parameters
    ----------
    folder
        Where documents of derived runs are kept: the `KEPT_RUNS` used last, up to `KEPT_BYTES`.
    preset, root_map
        As for `NanobeamCallback`.
    roots
        Folders with detector files; others are refused.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        preset: str = "auto",
        root_map: Mapping[str, str] | None = None,
        roots: Iterable[str | Path] = (),
    ) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        for part in self._folder.glob("*.part"):  # of a server that was killed
            part.unlink(missing_ok=True)
        self._settings = {
            "preset": preset,
            "root_map": dict(root_map or {}),
            "roots": [str(root) for root in roots],
        }
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="nanobeam-compute")
        self._jobs: dict[Path, Future[None]] = {}
        self._failed: dict[Path, tuple[float, str]] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def result(self, documents: Documents) -> Path | None:
        """Return the file with the derived run's documents (JSON lines); None: not yet.

        Parameters
        ----------
        documents
            Of the raw run, from start to stop.

        Raises
        ------
        UnreadableError
            If there can be no maps: says why.
        BusyError
            If `WAITING` runs wait already.
        """
        path = self._path(documents)
        with self._lock:
            if path.exists():
                os.utime(path)
                return path
            self._jobs = {p: job for p, job in self._jobs.items() if not job.done()}
            if path in self._jobs:
                return None
            failed, reason = self._failed.get(path, (-np.inf, ""))
            if time.monotonic() - failed < AGAIN_SECONDS:
                raise UnreadableError(reason)
            if len(self._jobs) >= WAITING:
                raise BusyError(f"{len(self._jobs)} scans wait to be analysed, no more can")
            self._jobs[path] = self._executor.submit(self._compute, path, documents)
            return None

    def close(self) -> None:
        """End what is going on."""
        self._closed = True
        with self._lock:
            if self._process is not None:
                self._process.kill()
        self._executor.shutdown(cancel_futures=True)

    def _path(self, documents: Documents) -> Path:
        """Name a run's results by all that they depend on."""
        (_, start), (_, stop) = documents[0], documents[-1]
        identity = [version("nanobeam-bluesky"), start, stop.get("uid"), self._settings]
        text = json.dumps(identity, sort_keys=True, default=as_json)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"

    def _compute(self, path: Path, documents: Documents) -> None:
        raw, part = path.with_suffix(".raw.part"), path.with_suffix(".part")
        reason = ""
        try:
            write_documents(raw, documents)
            command = [sys.executable, "-m", "nanobeam_bluesky.documents", str(raw), str(part)]
            with self._lock:
                if self._closed:
                    return
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | NO_LOCKS,
                )
            process = self._process
            assert process.stdin is not None and process.stderr is not None
            process.stdin.write(json.dumps(self._settings) + "\n")
            process.stdin.flush()
            said = process.stderr.read()
            if process.wait() == 0:
                os.replace(part, path)
                self._tidy()
            else:
                reason = (said.strip() or f"it ended with {process.returncode}").splitlines()[-1]
        except Exception as error:  # of the disk, say
            reason = f"{type(error).__name__}: {error}"
        finally:
            with self._lock:
                if self._process is not None:
                    self._process.communicate()
                self._process = None
                if reason:
                    self._failed[path] = time.monotonic(), f"not analysed: {reason}"
            raw.unlink(missing_ok=True)
            part.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Remove what was not used for longest."""
        files = sorted(self._folder.glob("*.jsonl"), key=lambda f: -f.stat().st_mtime)
        room = KEPT_BYTES
        for number, file in enumerate(files):
            room -= file.stat().st_size
            if number and (number >= KEPT_RUNS or room < 0):
                file.unlink(missing_ok=True)
