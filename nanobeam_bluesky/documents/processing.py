"""From references to estimates: what the worker process, or an offline caller, runs."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.documents.frames import FrameReader, ReadStatus
from nanobeam_bluesky.documents.references import PointBlock
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import DEFAULT_FIT, Estimates, Flag
from nanobeam_bluesky.models.estimates import check_fit

if TYPE_CHECKING:
    from nanobeam_bluesky.documents.roots import Roots
    from nanobeam_bluesky.models import Analyzer

__all__ = ["AnalyzerChoice", "Processed", "Processor", "Task"]

Method = Literal["auto", "refine", "network", "correlation"]
MissingModel = Literal["universal", "fit", "train", "skip"]

TRAINING = (sys.executable, "-m", "nanobeam_bluesky.training")
"""The command that trains in the background."""

THREADS = min(4, os.cpu_count() or 1)
"""Tasks that the worker process works on at once: reading, decompression, network and
refinement leave the interpreter lock to each other."""

_BATCH = 256
"""Points that are read and analysed at once, however many a task has: memory is bounded, and what
is in the caches is used again."""

logger = logging.getLogger("nanobeam_bluesky")


@dataclass(frozen=True)
class AnalyzerChoice:
    """Which estimator to use."""

    method: Method = "auto"
    """"auto" and "refine" (maximum likelihood), "network" or "correlation"."""
    on_missing_model: MissingModel = "universal"
    """Where no network is trained for the geometry: "universal" (the shipped network, or outside
    its envelope a library), "fit" (refine from a library), "train" (as "universal", and meanwhile
    a process in the background trains one for the next scan) or "skip" (no derived points)."""
    fit: tuple[str, ...] = DEFAULT_FIT
    """What `refine` takes as unknown."""
    calibrate: bool = False
    """Whether the first patterns correct the geometry (`models.calibrate`)."""
    device: str = "auto"
    """Torch device, e.g. "cpu"."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("analyzer", self.method, Method),
            ("on_missing_model", self.on_missing_model, MissingModel),
        ):
            if value not in get_args(allowed):
                raise ValueError(f"{name} = {value!r} must be one of {get_args(allowed)}")
        check_fit(self.fit)

    @property
    def trains(self) -> bool:
        """Whether a missing network is to be trained; a geometry not calibrated yet has none."""
        wanted = self.on_missing_model == "train" and self.method != "correlation"
        return wanted and not self.calibrate

    def build(self, geometry: Geometry) -> Analyzer:
        """Load or make the analyzer.

        Raises
        ------
        ModelNotFoundError, ModelRefusedError
            If a network is asked for and there is none, or not a sound one.
        """
        from nanobeam_bluesky.models import Analyzer, ModelStore

        method = "refine" if self.method == "auto" else self.method
        analyzer = Analyzer.for_geometry(
            geometry,
            method=method,
            universal=self.on_missing_model in ("universal", "train"),
            fit=self.fit,
            device=self.device,
        )
        if method == "refine" and analyzer.card is None and self.on_missing_model == "skip":
            ModelStore().load(geometry)  # raises, and says why
        return analyzer


@dataclass(frozen=True)
class Task:
    """Some points of one run."""

    run: str
    """Key of the run."""
    number: int
    """Number of the task, unique in the process."""
    frames: tuple[PointBlock, ...]
    """Where the frames are."""
    positions: dict[str, tuple[PointBlock, ...]] = field(default_factory=dict)
    """Where the motors' positions are, for those that are not known yet."""
    calibrate: bool = False
    """Whether to calibrate the geometry with these points instead of analysing them."""

    @property
    def points(self) -> NDArray[np.int64]:
        """Point numbers (n,)."""
        return np.concatenate([np.arange(b.first, b.stop) for b in self.frames])


@dataclass(frozen=True)
class Processed:
    """What became of a `Task`; arrays of length n in the order of its points."""

    task: Task
    status: NDArray[np.int8]
    """`ReadStatus` of the frames."""
    estimates: Estimates
    positions: dict[str, NDArray[np.float64]]
    """NaN where not read."""
    position_status: NDArray[np.int8]
    """`ReadStatus` of the positions, the worst of the motors'."""
    reason: str = ""
    """The first thing that went wrong; "" if nothing did."""
    calibration: dict[str, Any] | None = None
    """What was calibrated, as JSON; None if there was nothing to calibrate with."""

    @classmethod
    def failed(cls, task: Task, reason: str) -> Processed:
        """All points of a task without a result."""
        n = len(task.points)
        return cls(
            task,
            np.full(n, ReadStatus.OK, np.int8),
            Estimates.empty(n, Flag.NOT_CONVERGED),
            {motor: np.full(n, np.nan) for motor in task.positions},
            np.full(n, ReadStatus.NEVER if task.positions else ReadStatus.OK, np.int8),
            reason,
        )


class _Training:
    """Trains networks in the background, one at a time, each geometry once.

    In a process of its own, which gives way to everything else and ends with this one.
    """

    def __init__(self) -> None:
        self._begun: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, geometry: Geometry) -> None:
        """Train for a geometry, unless that was begun before or another one is at work."""
        fingerprint = geometry.fingerprint()
        if fingerprint in self._begun or (self._process and self._process.poll() is None):
            return
        self.end()
        self._begun.add(fingerprint)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            self._process = process = subprocess.Popen(
                TRAINING, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | threads
            )
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
            assert process.stdin is not None
            process.stdin.write(geometry.model_dump_json(exclude_none=True).encode() + b"\n")
            process.stdin.flush()  # and stays open: its end tells that we have ended
        except OSError as error:
            logger.warning("geometry %s: no network can be trained: %s", fingerprint, error)

    def end(self) -> None:
        """End what still trains; it is not taken up again."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()
            self._process = None


class Processor:
    """Runs tasks of any number of runs; keeps their analyzers and open files.

    The store is asked anew for every run, so that a network trained meanwhile is found. Where
    there are `roots`, files elsewhere are refused.
    """

    def __init__(self, roots: Roots | None = None) -> None:
        self._roots = roots
        self._runs: dict[str, tuple[Analyzer, FrameReader]] = {}
        self._complained: set[str] = set()
        self._training = _Training()

    def open(self, run: str, geometry: Geometry, choice: AnalyzerChoice) -> dict[str, Any]:
        """Prepare for a run; return the analyzer's settings."""
        from nanobeam_bluesky.models import ModelStore

        if choice.trains and geometry.fingerprint() not in ModelStore().paths():
            self._training.begin(geometry)
        analyzer = choice.build(geometry)
        self._runs[run] = (analyzer, FrameReader(geometry, self._roots))
        return analyzer.settings

    def close(self, run: str) -> None:
        """Close the run's files."""
        self._complained.discard(run)
        if run in self._runs:
            self._runs.pop(run)[1].close()

    def shutdown(self) -> None:
        """Close all files and end what trains in the background."""
        for run in list(self._runs):
            self.close(run)
        self._training.end()

    def process(self, task: Task) -> Processed:
        """Read and analyse; whatever goes wrong is in the answer."""
        try:
            analyzer, reader = self._runs[task.run]
            return (_calibrate if task.calibrate else _process)(task, analyzer, reader)
        except Exception as error:
            if task.run not in self._complained:
                self._complained.add(task.run)
                logger.exception("run %s: points could not be analysed", task.run[:8])
            return Processed.failed(task, f"{type(error).__name__}: {error}")


def _process(task: Task, analyzer: Analyzer, reader: FrameReader) -> Processed:
    analysed = [_analysed(batch, analyzer, reader) for batch in _batches(task.frames)]
    status = np.concatenate([a[0] for a in analysed])
    estimates = Estimates.concatenate([a[1] for a in analysed])
    reasons = [reason for a in analysed for reason in a[2]]
    positions = {}
    position_status = np.zeros(len(status), dtype=np.int8)
    for motor, blocks in task.positions.items():
        numbers = [reader.scalars(block) for block in blocks]
        positions[motor] = np.concatenate([n[0] for n in numbers])
        worst = np.concatenate([n[1] for n in numbers])
        position_status = np.maximum(position_status, worst)
        reasons += [n[2] for n in numbers]
    reason = next((r for r in reasons if r), "")
    return Processed(task, status, estimates, positions, position_status, reason)


def _batches(blocks: Sequence[PointBlock]) -> Iterator[list[PointBlock]]:
    """Yield the points of blocks, so many at once."""
    batch: list[PointBlock] = []
    room = _BATCH
    for block in blocks:
        first = block.first
        while first < block.stop:
            batch.append(block.part(first, min(block.stop, first + room)))
            first = batch[-1].stop
            room -= batch[-1].count
            if not room:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch


def _analysed(
    blocks: Sequence[PointBlock], analyzer: Analyzer, reader: FrameReader
) -> tuple[NDArray[np.int8], Estimates, Sequence[str]]:
    patterns, saturated, status, reasons = _read(blocks, reader)
    estimates = Estimates.empty(len(status), Flag.FRAME_MISSING)
    ok = status == ReadStatus.OK
    if ok.any():
        fitted = analyzer.process(patterns if ok.all() else patterns[ok])
        flags = fitted.flags | np.where(saturated[ok], Flag.SATURATED, 0)
        estimates = estimates.put(ok, replace(fitted, flags=flags))
    return status, estimates, reasons


def _read(blocks: Sequence[PointBlock], reader: FrameReader) -> Any:
    """Return what `FrameReader.patterns` does, of all blocks, and a reason of each."""
    *arrays, reasons = zip(*(reader.patterns(block) for block in blocks), strict=True)
    joined = (parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in arrays)
    return *joined, reasons


def _calibrate(task: Task, analyzer: Analyzer, reader: FrameReader) -> Processed:
    from nanobeam_bluesky.models import CalibrationError, calibrate

    patterns, _, status, reasons = _read(task.frames, reader)
    done = replace(Processed.failed(task, next(filter(None, reasons), "")), status=status)
    ok = status == ReadStatus.OK
    if not ok.any():
        return done
    try:
        found = calibrate(patterns[ok], analyzer.geometry)
    except CalibrationError as error:
        return replace(done, reason=f"not calibrated: {error}")
    return replace(done, calibration=found.model_dump(mode="json"))
