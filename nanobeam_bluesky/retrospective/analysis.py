"""`analyze`: the live path over stored runs, each analysed once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from tiled.client.container import Container
from tiled.client.utils import ClientError
from tiled.queries import Key

from nanobeam_bluesky.documents import (
    AnalyzerChoice,
    DerivedRun,
    PointBlock,
    RunPipeline,
    Tally,
    Task,
    to_maps,
)
from nanobeam_bluesky.documents.pipeline import Earlier
from nanobeam_bluesky.documents.processing import Method, MissingModel
from nanobeam_bluesky.geometry import ROI, Geometry, GeometryError
from nanobeam_bluesky.models import DEFAULT_FIT, Estimates, Flag
from nanobeam_bluesky.physics import forward
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.retrospective.executors import Cluster, Pool, Threads, Workers
from nanobeam_bluesky.retrospective.runs import (
    NoRunError,
    RawRun,
    Recording,
    catalog_of_derived,
    find_catalog,
    raw_runs,
    writable_catalog,
)
from nanobeam_bluesky.tiled_adapters import derived_writer
from nanobeam_bluesky.tiled_adapters.scans import UnreadableError

__all__ = ["Analysis", "analyze"]

PAGES = (8192, 10.0)
"""Points and seconds of an event page: a write to Tiled costs 40 ms, whatever its size, and what
was not written is lost in a crash."""
_POLL_SECONDS = 0.05
_TRIED = 256
"""Patterns that are tried to tell how long an analysis takes."""

logger = logging.getLogger("nanobeam_bluesky")


@dataclass(frozen=True)
class Analysis:
    """What became of one raw run: ``raw_uid, derived_uid, status = analysis``."""

    raw_uid: str
    derived_uid: str | None
    """Of the derived run; None if there is none."""
    status: str
    """"success", "abort" or "fail" of the derived run; "done" if it was there before; "ignored"
    if this is no scan to analyse; "pending" if it would be analysed (`dry_run`)."""
    reason: str = ""
    """Why, where it is no success."""
    start: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Start document of the raw run."""
    points: int = 0
    """Points that were analysed now, or would be."""
    flagged: int = 0
    """Those of them with a flag."""
    model: str = ""
    """What gives the first estimates, e.g. "universal"."""
    seconds: float = 0.0
    """How long it took."""
    documents: tuple[tuple[str, Mapping[str, Any]], ...] = field(default=(), repr=False)
    """Of the derived run, where these are not written anywhere."""
    catalog: Container | None = field(default=None, repr=False)
    """Where the derived run is."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.raw_uid, self.derived_uid, self.status))

    @property
    def failed(self) -> bool:
        """Whether there are no maps, or not all."""
        return self.status == "fail"

    @property
    def derived(self) -> Any:
        """The derived run: Tiled's client of it, or its documents.

        Raises
        ------
        ValueError
            If there is none.
        """
        if self.derived_uid is None:
            raise ValueError(f"run {self.raw_uid[:8]} has no maps: {self.status} {self.reason}")
        return self.documents if self.catalog is None else self.catalog[self.derived_uid]

    def maps(self) -> xr.Dataset:
        """Return the maps, as `to_maps` does.

        Raises
        ------
        ValueError
            If there are none.
        """
        with _here():
            return to_maps(self.derived)


def analyze(
    runs: Any,
    *,
    catalog: Container | str | Path | None = None,
    to: Container | str | Path | None = None,
    analyzer: Method = "auto",
    preset: Preset | str | Path = "auto",
    roi: ROI | None = None,
    on_missing_model: MissingModel = "universal",
    fit: Sequence[str] = DEFAULT_FIT,
    calibrate: bool = False,
    device: str = "auto",
    root_map: Mapping[str, str] | None = None,
    redo: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    scheduler: Any = None,
    progress: Callable[[RawRun, int, int], None] | None = None,
) -> Iterator[Analysis]:
    """Analyse stored runs: exactly what `NanobeamCallback` does while they are measured.

    Parameters
    ----------
    runs
        A catalogue of Tiled or databroker, what a search in it has found, a run of it, a uid,
        documents, a file of these, or a list of such things: see `raw_runs`.
    catalog
        Where uids are looked up: a catalogue, or what `find_catalog` takes.
    to
        The catalogue of derived runs to search for what was done, and to write to: a client, the
        address of a server, or a folder, which is made if missing. By default ``derived`` beside
        the catalogue of the raw run; documents of runs that lie in none are returned in
        `Analysis.documents`.
    analyzer, preset, roi, on_missing_model, fit, calibrate, device, root_map
        As for `NanobeamCallback`; the preset "auto" is the first shipped one that matches.
    redo
        Whether to analyse what was analysed before.
    dry_run
        Whether only to say what would be analysed.
    workers
        Processes of this machine to use; threads of this process without.
    scheduler
        Address of a Dask cluster to use, or its client.
    progress
        Called with a run, its points analysed so far, and all its points.

    Yields
    ------
    Analysis
        One for each run, as they are complete. What goes wrong with one ends only that one.

    Raises
    ------
    ValueError
        If there is no such catalogue or preset, or nothing to write to.
    ConnectionError
        If there is no such cluster.
    """
    choice = AnalyzerChoice(analyzer, on_missing_model, tuple(fit), calibrate, device)
    presets = Preset.choices(preset)
    where = find_catalog(catalog) if isinstance(catalog, str | Path) else catalog
    target = writable_catalog(to) if isinstance(to, str | Path) else to
    derived = None if target is None else catalog_of_derived(target)
    derived = target if derived is None else derived
    if workers is not None and scheduler is not None:
        raise ValueError("give either workers or scheduler")
    pool: Pool = (
        Cluster(scheduler)
        if scheduler is not None
        else Threads()
        if workers is None
        else Workers(workers)
    )
    session = _Session(
        pool, presets, derived, choice, roi, dict(root_map or {}), redo, dry_run, progress
    )
    try:
        yield from session.work(raw_runs(runs, where))
    finally:
        session.end()


def _here() -> Any:
    """Keep Tiled's client from reading by way of a Dask cluster that the user works with."""
    return dask.config.set(scheduler="synchronous")


@dataclass
class _Job:
    """A run in work."""

    run: RawRun
    target: Container | None
    writer: Callable[[], Callable[[str, Any], Any] | None]
    """Gives what writes to the target."""
    began: float = field(default_factory=time.monotonic)
    pipeline: RunPipeline | None = None
    tally: Tally = field(default_factory=Tally)
    known: int = 0
    """Points of earlier attempts."""
    done: Any = None
    """Tiled's client of the derived run that was there before."""
    pending: Analysis | None = None
    """What would be done."""
    problem: str = ""
    """What went wrong with the catalogue of results."""
    documents: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    write: Callable[[str, Any], Any] | None = None
    unwritten: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """Documents of the derived run: to write them may wait, to hand out work may not."""

    def write_all(self) -> None:
        """Write what there is to write."""
        for name, doc in self.unwritten:
            self._write(name, doc)
        self.unwritten.clear()

    def _write(self, name: str, doc: Mapping[str, Any]) -> None:
        if self.problem:  # whoever calls serves other runs, too
            return
        try:
            if name == "start" and "shape" in doc:
                self.write = self.writer()
            if self.write is not None:
                self.write(name, doc)
        except Exception as error:
            self.fail("results could not be written", error)
            return
        if self.write is None or name in ("start", "stop"):
            self.documents.append((name, doc))

    def fail(self, what: str, error: Exception) -> None:
        """Give the run up; what was written is for another attempt."""
        logger.error("run %s: %s", self.run.uid[:8], what, exc_info=error)
        self.problem = f"{what}: {type(error).__name__}: {error}"

    def analysis(self) -> Analysis:
        """Tell what became of it."""
        if self.problem:
            return Analysis(self.run.uid, None, "fail", self.problem, self.run.start)
        if self.pending is not None:
            return self.pending
        result = partial(Analysis, self.run.uid, start=self.run.start)
        if self.done is not None:
            return result(self.done.metadata["start"]["uid"], "done", catalog=self.target)
        starts, stops = ([d for n, d in self.documents if n == w] for w in ("start", "stop"))
        derived, stop = starts[0], stops[-1] if stops else {}
        if "shape" not in derived:
            return result(None, "fail", str(stop.get("reason", "")))
        settings = derived["nanobeam"]["analyzer"]
        return result(
            derived["uid"],
            str(stop.get("exit_status", "fail")),
            str(stop.get("reason", "")),
            points=self.tally.points_analysed,
            flagged=self.tally.points_flagged,
            model=model_of(settings),
            seconds=time.monotonic() - self.began,
            documents=() if self.target is not None else tuple(self.documents),
            catalog=self.target,
        )


def model_of(settings: Mapping[str, Any]) -> str:
    """Return what gives the first estimates, and whether they are refined, in words."""
    first = settings.get("start", settings["method"])
    return f"{first}, refined" if settings["method"] == "refine" else str(first)


@dataclass
class _Session:
    pool: Pool
    presets: Sequence[Preset]
    target: Container | None
    choice: AnalyzerChoice
    roi: ROI | None
    root_map: Mapping[str, str]
    redo: bool
    dry_run: bool
    progress: Callable[[RawRun, int, int], None] | None
    active: list[_Job] = field(default_factory=list)
    targets: dict[str, Container | None] = field(default_factory=dict)
    writers: dict[str, Callable[[str, Any], Any]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def work(self, runs: Iterator[RawRun | NoRunError]) -> Iterator[Analysis]:
        """Analyse runs, several side by side."""
        more = True
        while more or self.active:
            while more and len(self.active) < self.pool.at_once:
                run = next(runs, None)
                if run is None:
                    more = False
                elif isinstance(run, NoRunError):
                    yield Analysis("", None, "fail", str(run))
                else:
                    with _here():
                        found = self._begin(run)
                    if isinstance(found, Analysis):
                        yield found
                    else:
                        self.active.append(found)
            with _here():
                polled = [(job, self._poll(job)) for job in self.active]
            self.active = [job for job, result in polled if result is None]
            yield from (result for _, result in polled if result is not None)
            if self.active:
                with _here():
                    self.pool.wait(_POLL_SECONDS)

    def end(self) -> None:
        """Write what is ready, and release everything."""
        for job in self.active:
            if job.pipeline is not None:
                with suppress(Exception):  # it is lost, but no more than that
                    job.pipeline.flush()
                    job.write_all()
        self.pool.shutdown()

    def _begin(self, run: RawRun) -> _Job | Analysis:
        """Find where a run's frames are, and begin with it."""
        refused = partial(Analysis, run.uid, None, start=run.start)
        status = "fail" if run.asked_for else "ignored"
        original = run.start.get("original_run_uid")
        if original is not None:
            return refused(status, reason=f"is itself derived, from run {original}")
        preset = next((p for p in self.presets if p.matches(run.start)), None)
        if preset is None:
            reasons = "; ".join(f"{p.name}: {p.mismatch(run.start)}" for p in self.presets)
            return refused(status, reason=f"no preset matches: {reasons}")
        target = self._target_of(run)
        job = _Job(run, target, partial(self._writer_to, target))
        try:
            recording = run.recording(preset, self.root_map)
            job.pipeline = pipeline = RunPipeline(
                run.start,
                preset,
                _Filling(self.pool, recording),
                lambda name, doc: job.unwritten.append((name, doc)),
                choice=self.choice,
                roi=self.roi,
                tally=job.tally,
                root_map=self.root_map,
                earlier=partial(self._earlier, job),
                pages=PAGES,
                patience=0,  # what is not readable now will not be in a moment
                task_points=self.pool.task_points,
            )
            for name, doc in recording.documents:
                pipeline.document(name, doc)
                if name in ("event", "event_page"):  # which may hold frames
                    self.pool.wait(0)
                    pipeline.poll()
                    job.write_all()
            if not pipeline.stopped:
                reason = "no stop document: the raw run still runs, or its RunEngine has died"
                pipeline.document("stop", {"exit_status": "fail", "reason": reason})
        except Exception as error:  # one unreadable run must not end the others
            if job.pipeline is not None:
                job.pipeline.abandon()
            if isinstance(error, ClientError | GeometryError | OSError | UnreadableError):
                return refused("fail", reason=str(error))
            logger.exception("run %s could not be read", run.uid[:8])
            return refused("fail", reason=f"{type(error).__name__}: {error}")
        return job

    def _poll(self, job: _Job) -> Analysis | None:
        """Go on with a run; return what became of it when it is complete."""
        pipeline = job.pipeline
        assert pipeline is not None
        pipeline.poll()
        job.write_all()
        if job.problem:
            pipeline.abandon()
        result = job.analysis() if pipeline.closed else None
        if self.progress is not None and pipeline.derived is not None:
            done = job.known + job.tally.points_analysed
            self.progress(job.run, done, pipeline.derived.grid.num_points)
        return result

    def _target_of(self, run: RawRun) -> Container | None:
        """Return where the results of a run are."""
        if self.target is not None or run.node is None:
            return self.target
        above = "/".join(run.node.path_parts[:-1])
        if above not in self.targets:
            self.targets[above] = catalog_of_derived(run.node)
            if self.targets[above] is None:
                raise ValueError(
                    f"no catalogue 'derived' beside {above or 'the catalogue of runs'}: say with "
                    "to=… (--to) where results go"
                )
        return self.targets[above]

    def _writer_to(self, target: Container | None) -> Callable[[str, Any], Any] | None:
        """Return what writes to a catalogue: one for all runs, as making it takes a request."""
        if target is None:
            return None
        if target.uri not in self.writers:
            self.writers[target.uri] = derived_writer(target)
        return self.writers[target.uri]

    def _earlier(self, job: _Job, derived: DerivedRun) -> Earlier | None:
        """Return what is done of an analysis."""
        done: Any = None
        points = np.zeros(0, np.int64)
        columns: dict[str, NDArray[Any]] = {}
        if job.target is not None and not self.redo:
            query = Key("start.nanobeam.analysis_id") == derived.analysis_id
            stop = job.run.node.metadata.get("stop") if job.run.node is not None else None
            try:
                # iter: a list of the view itself would first ask how many there are
                attempts = list(iter(job.target.search(query).values()))
                done = next((run for run in reversed(attempts) if _is_done(run, stop)), None)
                if done is None:
                    points, columns = _points_of(attempts)
            except Exception as error:  # of a server
                job.fail("earlier results could not be read", error)
        names = tuple(Estimates.UNITS)
        found = Earlier(
            points,
            Estimates(**{k: columns.get(k, np.zeros(0)) for k in names}),
            {m: columns.get(m, np.zeros(0)) for m in derived.grid.scan.motors},
            complete=bool(done is not None or self.dry_run or job.problem),
        )
        job.done, job.known = done, len(points)
        if self.dry_run and done is None:
            count = derived.grid.num_points - len(points)
            job.pending = Analysis(
                job.run.uid,
                None,
                "pending",
                start=job.run.start,
                points=count,
                model=model_of(derived.analyzer),
                seconds=count * self._cost(derived.geometry) / self.pool.cores,
            )
        return found

    def _cost(self, geometry: Geometry) -> float:
        """Return how long a pattern takes on one core, s, as measured with simulated ones."""
        fingerprint = geometry.fingerprint()
        if fingerprint not in self.costs:
            analyzer = self.choice.build(geometry)
            rng = np.random.default_rng(0)
            strain, omega, chi = (
                rng.uniform(-0.5, 0.5, _TRIED) * analyzer.ranges[k]
                for k in ("strain", "omega", "chi")
            )
            patterns = forward(strain, omega, chi, geometry)
            patterns = rng.poisson(patterns * (3000 / patterns.sum(axis=(1, 2)).mean()))
            for _ in range(2):  # the first compiles
                began = time.process_time()
                analyzer.process(patterns.astype(np.float32))
            self.costs[fingerprint] = (time.process_time() - began) / _TRIED
        return self.costs[fingerprint]


class _Filling:
    """An executor that gets the frames which only Tiled can read before it passes a task on."""

    def __init__(self, pool: Pool, recording: Recording) -> None:
        self._pool = pool
        self._fill = recording.fill
        self._roi: ROI | None = None
        self.close = pool.close

    @property
    def in_flight(self) -> int:
        """As of the pool."""
        return self._pool.in_flight

    def open(self, pipeline: RunPipeline, geometry: Geometry, choice: AnalyzerChoice) -> None:
        """Pass on."""
        self._roi = geometry.roi
        self._pool.open(pipeline, geometry, choice)

    def submit(self, pipeline: RunPipeline, task: Task) -> None:
        """Pass on, with frames."""
        assert self._roi is not None
        frames = tuple(self._filled(block, self._roi) for block in task.frames)
        self._pool.submit(pipeline, replace(task, frames=frames))

    def _filled(self, block: PointBlock, roi: ROI) -> PointBlock:
        try:
            return self._fill(block, roi)
        except Exception as error:  # of a server
            problem = f"not to be had from Tiled: {type(error).__name__}: {error}"
            return replace(block, stored=None, problem=problem)


def _is_done(derived: Any, raw_stop: Mapping[str, Any] | None) -> bool:
    """Whether a derived run is complete: as complete as its raw run is."""
    stop = derived.metadata.get("stop") or {}
    raw = raw_stop or {}
    if stop.get("exit_status") == "fail":
        return raw.get("exit_status") == "fail" and stop.get("reason") == raw.get("reason")
    return bool(stop)


def _points_of(attempts: Sequence[Any]) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """Return the points (n,) that earlier attempts have, and their columns; the last one wins.

    Without those that could not be read, or analysed.
    """
    tables = []
    for run in attempts:
        with suppress(KeyError):  # nothing was written
            tables.append(run["primary"].base["internal"].read())
    if not tables:
        return np.zeros(0, np.int64), {}
    table = pd.concat(tables, ignore_index=True)
    lost = (table["flags"].astype(int) & int(Flag.FRAME_MISSING | Flag.POSITION_MISSING)) != 0
    table = table[~lost & np.isfinite(table["strain"])].drop_duplicates("seq_num", keep="last")
    return table["seq_num"].to_numpy(np.int64), {k: table[k].to_numpy() for k in table.columns}
