"""One raw run on its way to a derived run; the same live and offline.

Documents go in, tasks go to an executor, what comes back leaves as documents of the
derived run. Nothing here blocks, reads frames or knows about threads: whoever drives it
calls `RunPipeline.poll` after every input and some times a second.
"""

from __future__ import annotations

import logging
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.documents.derived_run import DerivedRun, failed_run
from nanobeam_bluesky.documents.frames import ReadStatus
from nanobeam_bluesky.documents.processing import AnalyzerChoice, Processed, Task
from nanobeam_bluesky.documents.references import PointBlock, RunReferences, StoredRows
from nanobeam_bluesky.documents.resources import count_of
from nanobeam_bluesky.documents.scan_grid import ScanGrid
from nanobeam_bluesky.geometry import ROI, Geometry, GeometryError
from nanobeam_bluesky.models import Estimates, Flag
from nanobeam_bluesky.presets import MissingMetadataError, Preset

__all__ = ["Earlier", "Executor", "RunPipeline", "Tally"]

logger = logging.getLogger("nanobeam_bluesky")

PAGE_POINTS = 512
PAGE_SECONDS = 0.5
TASK_POINTS = 256
"""Points of one task: enough to fill batches, short enough for the display."""
CALIBRATION_POINTS = 256
"""Points that a calibration waits for, if the scan has as many."""
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0)
DEADLINE_SECONDS = 10.0
"""How long after the raw stop frames may take to become readable."""
SPOOL_BYTES = 256_000_000
"""Embedded frames of one run that are kept in memory; the rest goes to disk."""
EXIT_STATUSES = ("success", "abort", "fail")
_SEARCH_DEPTH = 64

Emit = Callable[[str, dict[str, Any]], None]


class Executor(Protocol):
    """Runs tasks, at once or elsewhere, and hands the answers to the pipeline."""

    @property
    def in_flight(self) -> int:
        """How many tasks of a run it takes: some wait, so that who works never does."""

    def open(self, pipeline: RunPipeline, geometry: Geometry, choice: AnalyzerChoice) -> None:
        """Prepare; answers with `RunPipeline.opened` or `RunPipeline.fail`."""

    def submit(self, pipeline: RunPipeline, task: Task) -> None:
        """Run a task; answers with `RunPipeline.processed`."""

    def close(self, pipeline: RunPipeline) -> None:
        """Release what the run holds."""


@dataclass
class Tally:
    """Counts over any number of runs."""

    runs: int = 0
    points_seen: int = 0
    points_analysed: int = 0
    points_flagged: int = 0
    errors: int = 0
    last_error: str = ""


@dataclass(frozen=True)
class Earlier:
    """What an earlier attempt has left: arrays of length n."""

    points: NDArray[np.int64]
    """Point numbers."""
    estimates: Estimates
    positions: dict[str, NDArray[np.float64]]
    """Of each scan motor."""
    complete: bool = False
    """Whether nothing is left to do: the run is not derived again."""


@dataclass
class _Pending:
    block: PointBlock
    version: int
    """How often these points have been announced: older versions are dropped."""
    due: float
    """When it came, or when it is to be tried again."""
    attempt: int = 0


class RunPipeline:
    """Analyses one raw run.

    Parameters
    ----------
    start
        Start document of the raw run.
    preset
        Where its metadata are.
    executor
        Runs the tasks.
    emit
        Takes the documents of the derived run.
    choice
        Which estimator to use.
    roi
        Overrides the geometry's ROI.
    tally
        Counts are added to it.
    root_map
        Folders of the documents' paths → where they are mounted here.
    earlier
        Says, once it is known how a run is analysed, what of it was done before.
    pages
        A page leaves when so many points are ready, or so many seconds after the first; by
        default `PAGE_POINTS` and `PAGE_SECONDS`.
    patience
        How long after the raw stop frames may take to become readable, s; by default
        `DEADLINE_SECONDS`.
    task_points
        Points of one task; by default `TASK_POINTS`.
    """

    def __init__(
        self,
        start: Mapping[str, Any],
        preset: Preset,
        executor: Executor,
        emit: Emit,
        *,
        choice: AnalyzerChoice | None = None,
        roi: ROI | None = None,
        tally: Tally | None = None,
        root_map: Mapping[str, str] | None = None,
        earlier: Callable[[DerivedRun], Earlier | None] | None = None,
        pages: tuple[int, float] | None = None,
        patience: float | None = None,
        task_points: int | None = None,
    ) -> None:
        self.key = str(uuid.uuid4())
        self.start = start
        self.closed = False
        self._preset = preset
        self._executor = executor
        self._emit = emit
        self._choice = choice or AnalyzerChoice()
        self._roi = roi
        self._tally = tally or Tally()
        self._tally.runs += 1
        self._geometry: Geometry | None = None
        self._derived: DerivedRun | None = None
        self._grid: ScanGrid | None = None
        self._references: RunReferences | None = None
        self._requested = False
        self._calibration: dict[str, Any] = {}
        self._calibration_due = 0.0
        self._raw_stop: Mapping[str, Any] | None = None
        self._deadline = float("inf")
        self._patience = DEADLINE_SECONDS if patience is None else patience
        self._problem = ""
        self._task_points = task_points or TASK_POINTS
        self._tasks = 0
        self._pending: deque[_Pending] = deque()
        self._retries: list[_Pending] = []
        self._in_flight: dict[int, tuple[Task, list[_Pending]]] = {}
        self._positions: dict[str, dict[int, PointBlock]] = {}
        self._versions = np.zeros(1, dtype=np.uint32)
        self._earlier = earlier
        self._known: NDArray[np.int64] = np.zeros(0, np.int64)
        self._pages = pages or (PAGE_POINTS, PAGE_SECONDS)
        self._buffer: list[tuple[NDArray[np.int64], Estimates, dict[str, NDArray[Any]]]] = []
        self._buffered_since = 0.0
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        try:
            self._grid = ScanGrid(preset.scan_metadata(start))
            motors = self._grid.scan.motors
            _check_motor_names(motors)
            self._versions = np.zeros(self._grid.num_points + 1, dtype=np.uint32)
            self._references = RunReferences(
                motors,
                preset.detector_key(start),
                shape=self._grid.scan.shape,
                positions=self._grid.scan.positions,
                root_map=root_map,
                note=self._note,
            )
            self._positions = {motor: {} for motor in motors}
            self._try_geometry()
        except GeometryError as error:
            self.fail(str(error))

    # ------------------------------------------------------------------ inputs

    def document(self, name: str, doc: Mapping[str, Any]) -> None:
        """Take a document of the raw run, the start excepted."""
        if self.closed:
            return
        assert self._references is not None
        now = time.monotonic()
        if name == "stop":
            for label, block in self._references.finish():
                if label == "frames":
                    self._missing(block, now)
                else:
                    self._position(label, block)
            self._raw_stop = doc
            self._deadline = now + self._patience
            if self._geometry is None:
                self._try_geometry(last_chance=True)
        else:
            try:
                roi = self._geometry.roi if self._geometry else None
                if roi is None and name in ("event", "event_page") and self._is_frame_event(doc):
                    self._try_geometry(last_chance=True)
                    roi = self._geometry.roi if self._geometry else None
                for label, block in self._references.document(name, doc, roi):
                    if label == "frames":
                        self._frames(block, now)
                    else:
                        self._position(label, block)
            except ValueError as error:
                self.fail(f"run {self.start['uid'][:8]}: {error}")
            if self._geometry is None and name in ("descriptor", "event", "event_page"):
                self._try_geometry()

    def opened(self, settings: Mapping[str, Any]) -> None:
        """The executor is ready: the derived run begins, once the geometry is calibrated."""
        if self.closed or self._geometry is None or self._grid is None or self._choice.calibrate:
            return
        if self._derived is not None:  # another process of the executor
            return
        settings = {**settings, **self._calibration}
        self._derived = DerivedRun(
            self.start, self._geometry, self._grid, settings, self._motor_units()
        )
        earlier = self._earlier(self._derived) if self._earlier else None
        if earlier is not None and earlier.complete:
            self._release()
            return
        for name, doc in self._derived.open():
            self._emit(name, doc)
        if earlier is not None and len(earlier.points):
            self._known = np.sort(earlier.points)
            self._buffer.append((earlier.points, earlier.estimates, earlier.positions))
            self.flush()
            pending, self._pending = list(self._pending), deque()
            for entry in pending:
                self._pending.extend(_parts(entry, ~self._is_known(entry.block, entry.version)))

    def processed(self, done: Processed) -> None:
        """An answer of the executor."""
        if done.task.number not in self._in_flight or self.closed:
            return
        task, entries = self._in_flight.pop(done.task.number)
        now = time.monotonic()
        if task.calibrate:
            self._calibrated(done, now)
            return
        points = task.points
        versions = np.concatenate([np.full(e.block.count, e.version) for e in entries])
        current = self._versions[points] == versions
        waiting = (done.status == ReadStatus.RETRY) | (done.position_status == ReadStatus.RETRY)
        # once more at least: what waits long for its turn may be beyond the deadline by then
        first = np.concatenate([np.full(e.block.count, e.attempt == 0) for e in entries])
        again = waiting & current & (first | (now < self._deadline))
        if again.any():
            self._retry(task, entries, again, now)
        keep = current & ~again
        if keep.any():
            if done.reason:
                self._note(done.reason)
            self._finish(points, done, keep, now)

    def poll(self) -> None:
        """Hand out what is ready, emit what is due, close when all is done."""
        if self.closed:
            return
        now = time.monotonic()
        if self._derived is None:
            self._submit_calibration(now)
            return
        while len(self._in_flight) < self._executor.in_flight:
            task = self._next_task(now)
            if task is None:
                break
            self._executor.submit(self, task)
        buffered = sum(len(points) for points, _, _ in self._buffer)
        idle = not (self._pending or self._retries or self._in_flight)
        ending = self._raw_stop is not None and idle
        points, seconds = self._pages
        if buffered and (ending or buffered >= points or now - self._buffered_since >= seconds):
            self.flush()
        if ending:
            self._close(*self._outcome())

    def fail(self, reason: str) -> None:
        """End the derived run, with its reason."""
        if self.closed:
            return
        self._note(reason)
        if self._derived is None:
            for name, doc in failed_run(self.start, reason):
                self._emit(name, doc)
            self._release()
        else:
            self.flush()
            self._close("fail", reason)

    def abandon(self) -> None:
        """End without another document: the derived run stays open, for another attempt."""
        self._buffer = []
        self._release()

    # ---------------------------------------------------------------- properties

    @property
    def stopped(self) -> bool:
        """Whether the raw run has stopped."""
        return self._raw_stop is not None

    @property
    def points_pending(self) -> int:
        """Points announced and not yet in a page."""
        # asked for by other threads: copy first, at once
        in_flight = [e for _, entries in list(self._in_flight.values()) for e in entries]
        return sum(e.block.count for e in (*self._pending, *self._retries, *in_flight))

    @property
    def derived(self) -> DerivedRun | None:
        """The derived run, once it is known how the run is analysed."""
        return self._derived

    @property
    def queue_bytes(self) -> int:
        """Bytes of embedded frames held in memory."""
        return sum(e.block.nbytes for e in (*self._pending, *self._retries))

    @property
    def lag_seconds(self) -> float:
        """How long the oldest waiting point has waited."""
        waiting = tuple(self._pending)
        return max(0.0, time.monotonic() - waiting[0].due) if waiting else 0.0

    # ------------------------------------------------------------------ geometry

    def _is_frame_event(self, doc: Mapping[str, Any]) -> bool:
        assert self._references is not None
        data = doc.get("data")
        return isinstance(data, Mapping) and self._references.frame_key in data

    def _try_geometry(self, *, last_chance: bool = False) -> None:
        if self.closed or self._references is None:
            return
        try:
            geometry = self._preset.read_geometry(
                self.start,
                baseline=self._references.baseline,
                configuration=self._references.configuration,
                frames=self._references.frame_key,
                roi=self._roi,
            )
        except MissingMetadataError as error:
            if last_chance:
                self.fail(str(error))
            return
        except GeometryError as error:
            self.fail(str(error))
            return
        self._geometry = geometry
        if not self._requested:
            self._requested = True
            self._executor.open(self, geometry, self._choice)

    def _motor_units(self) -> dict[str, str | None]:
        assert self._references is not None
        return self._references.units

    # ---------------------------------------------------------------- calibration

    def _submit_calibration(self, now: float) -> None:
        """Hand out the first points for calibration, when there are enough; they stay pending."""
        wanted = min(CALIBRATION_POINTS, len(self._versions) - 1)
        if not (self._choice.calibrate and self._requested) or self._in_flight:
            return
        if now < self._calibration_due or (self.points_pending < wanted and not self.stopped):
            return
        blocks: list[PointBlock] = []
        for block in (entry.block for entry in self._pending):
            room = wanted - sum(b.count for b in blocks)
            if room <= 0:
                break
            blocks.append(block.part(block.first, min(block.stop, block.first + room)))
        self._tasks += 1
        task = Task(self.key, self._tasks, tuple(blocks), calibrate=True)
        if not blocks:
            self._calibrated(Processed.failed(task, "the run has no frames"), now)
            return
        self._in_flight[task.number] = (task, [])
        self._executor.submit(self, task)

    def _calibrated(self, done: Processed, now: float) -> None:
        assert self._geometry is not None
        if (done.status == ReadStatus.RETRY).any() and now < self._deadline:
            self._calibration_due = now + RETRY_SECONDS[-1]
            return
        if done.calibration is None:
            self._note(done.reason)
            self._calibration = {"calibration": {"failed": done.reason}}
        else:
            found = dict(done.calibration)
            self._geometry = Geometry.parse(found.pop("geometry"), where="calibrated geometry")
            self._calibration = {"calibration": found}
        self._choice = replace(self._choice, calibrate=False)
        self._executor.open(self, self._geometry, self._choice)

    # ----------------------------------------------------------------- references

    def _frames(self, block: PointBlock, now: float) -> None:
        if self._geometry is None:
            self._try_geometry(last_chance=True)
        if self.closed:
            return
        if block.stop > len(self._versions):
            more = block.stop - len(self._versions)
            self._versions = np.concatenate([self._versions, np.zeros(more, np.uint32)])
        versions = self._versions[block.first : block.stop]
        self._tally.points_seen += int((versions == 0).sum())
        versions += 1
        if block.nbytes and block.nbytes + self.queue_bytes > SPOOL_BYTES:
            block = self._spooled(block)
        # points of a rewound row have another version than the rest: split there
        known = self._is_known(block, versions)
        changes = (np.diff(versions) != 0) | (np.diff(known) != 0)
        edges = [0, *(np.flatnonzero(changes) + 1).tolist(), block.count]
        for a, b in pairwise(edges):
            if known[a]:
                continue
            part, version = block.part(block.first + a, block.first + b), int(versions[a])
            last = self._pending[-1] if self._pending else None
            joined = last.block.joined(part) if last and last.version == version else None
            if last is not None and joined is not None:
                last.block = joined
            else:
                self._pending.append(_Pending(part, version, now))

    def _is_known(self, block: PointBlock, versions: Any) -> NDArray[np.bool_]:
        """Say which points an earlier attempt has: not those announced again since."""
        known = np.isin(np.arange(block.first, block.stop), self._known)
        return np.asarray(known & (versions == 1))

    def _position(self, motor: str, block: PointBlock) -> None:
        self._positions[motor].update(dict.fromkeys(range(block.first, block.stop), block))

    def _missing(self, block: PointBlock, now: float) -> None:
        """Take those points of a block that were not announced otherwise."""
        for point in range(block.first, block.stop):
            if point >= len(self._versions) or not self._versions[point]:
                self._frames(block.part(point, point + 1), now)

    def _spooled(self, block: PointBlock) -> PointBlock:
        try:
            if self._spool is None:
                self._spool = tempfile.TemporaryDirectory(prefix="nanobeam-spool-")
            path = Path(self._spool.name) / f"{uuid.uuid4()}.h5"
            with h5py.File(path, "w") as file:
                file["frames"] = block.values
        except OSError as error:
            return replace(block, values=None, problem=f"frames could not be spooled: {error}")
        return replace(block, values=None, stored=StoredRows(str(path), "frames", 0, cut=True))

    # ---------------------------------------------------------------------- tasks

    def _next_task(self, now: float) -> Task | None:
        """Take the points of a task, as far as they are ready, the oldest first."""
        taken: list[_Pending] = []
        room = self._task_points
        for entry in [e for e in self._retries if e.due <= now]:
            if entry.block.count > room:
                break
            self._retries.remove(entry)
            taken.append(entry)
            room -= entry.block.count
        skipped: list[_Pending] = []
        while self._pending and room and len(skipped) < _SEARCH_DEPTH:
            entry = self._pending.popleft()
            current = self._versions[entry.block.first : entry.block.stop] == entry.version
            if not current.all():  # announced again: their positions belong to the newer frames
                self._pending.extendleft(reversed(_parts(entry, current)))
                continue
            ready = self._ready(entry.block, room)
            first, split = entry.block.first, entry.block.first + ready
            if ready:
                taken.append(replace(entry, block=entry.block.part(first, split)))
                room -= ready
            if ready < entry.block.count:
                skipped.append(replace(entry, block=entry.block.part(split, entry.block.stop)))
        self._pending.extendleft(reversed(skipped))
        if not taken:
            return None
        self._tasks += 1
        task = Task(
            self.key,
            self._tasks,
            tuple(entry.block for entry in taken),
            {motor: self._take_positions(motor, taken) for motor in self._announced()},
        )
        self._in_flight[task.number] = (task, taken)
        return task

    def _announced(self) -> list[str]:
        assert self._references is not None
        return [m for m in self._positions if m in self._references.announced]

    def _ready(self, block: PointBlock, room: int) -> int:
        """How many points of the block, from its first, have their positions."""
        if self._raw_stop is not None:
            return min(block.count, room)
        known = [self._positions[motor] for motor in self._announced()]
        for i in range(min(block.count, room)):
            if any(block.first + i not in points for points in known):
                return i
        return min(block.count, room)

    def _take_positions(self, motor: str, entries: list[_Pending]) -> tuple[PointBlock, ...]:
        """References to the positions of exactly these points, in their order."""
        known = self._positions[motor]
        blocks: list[PointBlock] = []
        for entry in entries:
            point = entry.block.first
            while point < entry.block.stop:
                source = known.pop(point, None)
                if source is None:
                    text = f"no {motor} was recorded for point {point}"
                    blocks.append(PointBlock(point, 1, problem=text))
                    point += 1
                    continue
                stop, limit = point + 1, min(entry.block.stop, source.stop)
                while stop < limit and known.get(stop) is source:
                    del known[stop]
                    stop += 1
                part = source.part(point, stop)
                joined = blocks[-1].joined(part) if blocks else None
                blocks[-1:] = [joined] if joined else [*blocks[-1:], part]
                point = stop
        return tuple(blocks)

    def _retry(
        self, task: Task, entries: list[_Pending], again: NDArray[np.bool_], now: float
    ) -> None:
        for motor, blocks in task.positions.items():
            for block in blocks:
                if not block.problem:
                    for point in range(block.first, block.stop):
                        self._positions[motor].setdefault(point, block)
        offset = 0
        for entry in entries:
            wanted = again[offset : offset + entry.block.count]
            offset += entry.block.count
            delay = RETRY_SECONDS[min(entry.attempt, len(RETRY_SECONDS) - 1)]
            self._retries += [
                replace(part, due=now + delay, attempt=entry.attempt + 1)
                for part in _parts(entry, wanted)
            ]

    # --------------------------------------------------------------------- results

    def _finish(
        self, points: NDArray[np.int64], done: Processed, keep: NDArray[np.bool_], now: float
    ) -> None:
        assert self._grid is not None
        points = points[keep]
        estimates = done.estimates.select(keep)
        positions = {motor: values[keep] for motor, values in done.positions.items()}
        motors = self._grid.scan.motors
        if not positions.keys() >= set(motors):
            positions = dict(zip(motors, self._grid.nominal(points), strict=True)) | positions
        lost = self._grid.row_col(points)[0] < 0
        for values in positions.values():
            lost = lost | ~np.isfinite(values)
        flags = estimates.flags | np.where(lost, Flag.POSITION_MISSING, 0)
        estimates = replace(estimates, flags=flags)
        self._tally.points_analysed += len(points)
        self._tally.points_flagged += int((flags != 0).sum())
        if not self._buffer:
            self._buffered_since = now
        self._buffer.append((points, estimates, positions))

    def flush(self) -> None:
        """Emit what is ready in pages of increasing points; the last of a point wins."""
        if not self._buffer or self._derived is None:
            return
        points = np.concatenate([b[0] for b in self._buffer])
        estimates = Estimates.concatenate([b[1] for b in self._buffer])
        positions = {
            motor: np.concatenate([b[2][motor] for b in self._buffer]) for motor in self._positions
        }
        self._buffer = []
        distinct, from_end = np.unique(points[::-1], return_index=True)
        order = len(points) - 1 - from_end
        points_per_page = self._pages[0]
        for i in range(0, len(distinct), points_per_page):
            chosen = order[i : i + points_per_page]
            page = self._derived.page(
                points[chosen],
                estimates.select(chosen),
                {motor: values[chosen] for motor, values in positions.items()},
            )
            self._emit(*page)

    def _outcome(self) -> tuple[str, str]:
        """Exit status and reason of the derived run, once nothing is left to do."""
        assert self._raw_stop is not None and self._derived is not None
        assert self._references is not None and self._grid is not None
        status = str(self._raw_stop.get("exit_status", "success"))
        if status not in EXIT_STATUSES:
            status = "fail"
        reasons = [str(self._raw_stop["reason"])] if self._raw_stop.get("reason") else []
        announced = int((self._versions > 0).sum())
        events = self._raw_stop.get("num_events")
        counted = 0
        if isinstance(events, Mapping):
            counted = count_of(events.get(self._references.stream))
        counted *= self._references.points_per_event
        if self._derived.num_events < max(announced, counted):
            status = "fail"
            reasons.append(
                f"{max(announced, counted) - self._derived.num_events} of "
                f"{max(announced, counted)} announced points have no frame reference"
            )
        beyond = int((self._versions[self._grid.num_points + 1 :] > 0).sum())
        if beyond:
            status = "fail"
            reasons.append(
                f"{beyond} points more than shape = {list(self._grid.scan.shape)} has: "
                "correct shape in the start document"
            )
        if self._problem:
            reasons.append(self._problem)
        return status, "; ".join(reasons)

    def _close(self, exit_status: str, reason: str) -> None:
        assert self._derived is not None
        self._emit(*self._derived.close(exit_status, reason))
        self._release()

    def _release(self) -> None:
        self.closed = True
        self._pending.clear()
        self._retries.clear()
        self._in_flight.clear()
        if self._requested:
            self._executor.close(self)
        if self._spool is not None:
            self._spool.cleanup()

    def _note(self, problem: str) -> None:
        """Count a problem; log the first of the run."""
        self._tally.errors += 1
        self._tally.last_error = problem
        if not self._problem:
            self._problem = problem
            logger.warning("run %s: %s", str(self.start["uid"])[:8], problem)


def _parts(entry: _Pending, wanted: NDArray[np.bool_]) -> list[_Pending]:
    """Return the runs of wanted points, of a mask (n,), as entries of their own."""
    first = entry.block.first
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]])))
    return [
        replace(entry, block=entry.block.part(first + int(a), first + int(b)))
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def _check_motor_names(motors: tuple[str, str]) -> None:
    taken = {*Estimates.UNITS, "row", "col", "time", "seq_num"}
    for motor in motors:
        if motor in taken or "." in motor or "/" in motor or motors[0] == motors[1]:
            raise GeometryError(
                f"scan motors = {list(motors)}: {motor!r} cannot be a key of the derived run; "
                "rename it in the preset"
            )
