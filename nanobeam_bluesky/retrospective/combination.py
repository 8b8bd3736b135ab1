"""`combine`: one map of strain and tilts from several scans of one area."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from tiled.client.container import Container

from nanobeam_bluesky.documents import (
    AnalyzerChoice,
    DerivedRun,
    Document,
    FrameReader,
    PointBlock,
    ReadStatus,
    RunReferences,
    ScanGrid,
    to_maps,
)
from nanobeam_bluesky.documents.maps import axes
from nanobeam_bluesky.geometry import ROI
from nanobeam_bluesky.models import DEFAULT_FIT, Analyzer, Estimates, Flag, refine_together
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.retrospective.registration import Registered, register
from nanobeam_bluesky.retrospective.runs import NoRunError, RawRun, raw_runs

__all__ = ["Combined", "combine"]

Progress = Callable[[str, float], None]

REGISTERED = ("counts", "strain", "omega", "chi")
"""Maps that the scans are registered on: the intensity, and what is the same at every angle."""
POINTS = 512
"""Points that are read and fitted at once: 8 MB a scan with patterns of 64 × 64."""

_UNUSABLE = Flag.FEW_COUNTS | Flag.SATURATED | Flag.FRAME_MISSING
_SAME = {
    "wavelength_angstrom": 1e-3,
    "d_spacing_angstrom": 1e-3,
    "thickness_nm": 1e-3,
}
"""Fields of the geometry that scans of one film share, and to what part."""
_SAME_STEP = 0.01


@dataclass(frozen=True, eq=False)
class Combined:
    """What `combine` gives."""

    maps: xr.Dataset
    """As of `to_maps`, of all scans together, on the first one's rows and columns. Also
    ``scans_used``, how many scans a point's values come from; ``<field>_sigma_expected``, what
    the Fisher information of the single scans lets expect; and ``disagreement``, 0 ± 1 where
    the scans' own values differ by their noise."""
    scans: xr.Dataset
    """The scans' own maps, drift taken out: dimensions (scan, row, col). Of every scan ``run``,
    ``delta_theta_deg``, the drift against the first in points (``drift_row``, ``drift_col``) and
    in the motors' units (``drift_<motor>``), ``offset_row`` and ``offset_col``, how far its
    points lie from the map's, ``quality`` and ``rival`` of the registration, and ``used``."""
    documents: list[Document]
    """The derived run of the combination, ready for a `TiledWriter`."""


def combine(
    runs: Any,
    *,
    catalog: Container | None = None,
    preset: Preset | str | Path = "auto",
    roi: ROI | None = None,
    root_map: Mapping[str, str] | None = None,
    fit: Sequence[str] = DEFAULT_FIT,
    drift: Sequence[tuple[float, float]] | None = None,
    choice: AnalyzerChoice | None = None,
    progress: Progress = lambda what, part: None,
) -> Combined:
    """Fit one strain, ω and χ per point to all scans of one area.

    Parameters
    ----------
    runs
        Two or more, as `raw_runs` takes them: uids, a query or its results, documents or files of
        these. Of a rocking series, each at its own angle of incidence (``delta_theta_deg``),
        or repeats of one; drift is against the first.
    catalog
        Where uids are looked up.
    preset, roi, root_map
        As for `NanobeamCallback`.
    fit
        What is unknown, as of `refine`; no "blur".
    drift
        (rows, columns) that each scan has drifted against the first, in points, e.g.
        [(0, 0), (1.5, -3)]; found from the maps if absent.
    choice
        Estimator of the single scans.
    progress
        Told what is done, and which part of it.

    Raises
    ------
    ValueError
        If a run cannot be used, or the runs are not of one area of one film: names the field,
        the run and both values. If all but one drift are in doubt.

    Notes
    -----
    Counts are not interpolated: of every scan the point that is nearest counts, up to half a
    point from the map's, and the model takes what strain and tilts change on this way, to first
    order. The map's points lie in the middle of the scans'.

    A scan whose drift is in doubt is not used. Of the others, what is flagged in a point does
    not count there; where every scan has a misfit, all count.
    """
    choice = choice or AnalyzerChoice(fit=tuple(fit))
    scans: list[_Scan] = []
    try:
        for run in raw_runs(runs, catalog):
            if isinstance(run, NoRunError):
                raise run
            scans.append(_Scan(run, preset, roi, root_map or {}))
        _check_together(scans, "thickness" in fit)
        for i, scan in enumerate(scans):
            scan.analyze(choice, partial(_told, progress, i, len(scans)))
        found = (
            [_drift(scans[0], scan) for scan in scans] if drift is None else _given(drift, scans)
        )
        places = _places(found, scans[0].grid.scan.shape)
        estimates, extra = _fit_all(scans, places, fit, progress)
    finally:
        for scan in scans:
            scan.close()
    first = scans[0]
    settings = {"method": "combine", "fit": list(fit)} | {
        "runs": [scan.uid for scan, used in zip(scans, places.used, strict=True) if used],
        "drift": [[round(f.row, 3), round(f.col, 3)] for f in found],
        "single": first.settings,
    }
    documents = list(_derive(first, places, estimates, settings))
    maps = to_maps(documents)
    for name, values in extra.items():
        units = Estimates.UNITS.get(name.removesuffix("_sigma_expected"), "")
        maps[name] = (("row", "col"), values.reshape(first.grid.scan.shape), {"units": units})
    return Combined(maps, _scans(scans, found, places, maps), documents)


def _told(progress: Progress, i: int, k: int, part: float) -> None:
    progress("analysing", (i + part) / k)


# -------------------------------------------------------------------------- one scan


class _Scan:
    """One raw run: where its patterns are, and its own estimates."""

    def __init__(
        self, run: RawRun, preset: Preset | str | Path, roi: ROI | None, root_map: Mapping[str, str]
    ) -> None:
        start, self.start, self.uid = run.start, run.start, run.uid
        reasons = []
        for chosen in Preset.choices(preset):
            reason = chosen.mismatch(start)
            if not reason:
                break
            reasons.append(f"{chosen.name}: {reason}")
        else:
            raise ValueError(f"run {self.short}: no preset matches: {'; '.join(reasons)}")
        recorded, self._fill = run.recording(chosen, root_map)
        documents = list(recorded)
        self.grid = ScanGrid(chosen.scan_metadata(start))
        scan = self.grid.scan
        self.problem = ""

        def note(problem: str) -> None:
            self.problem = self.problem or problem

        def references() -> RunReferences:
            return RunReferences(
                scan.motors, chosen.detector_key(start), shape=scan.shape,
                positions=scan.positions, root_map=root_map, note=note,
            )  # fmt: skip

        # what the geometry says is known at the end only, and frames in documents need it
        known = references()
        for name, doc in documents:
            for _ in known.document(name, doc, None):
                pass
        self.geometry = chosen.read_geometry(
            start, baseline=known.baseline, configuration=known.configuration,
            frames=known.frame_key, roi=roi,
        )  # fmt: skip
        again = references()
        blocks: list[tuple[str, PointBlock]] = []
        for name, doc in documents:
            blocks += again.document(name, doc, self.geometry.roi)
        blocks += again.finish()
        self.units = {motor: again.units.get(motor) for motor in scan.motors}
        self._reader = FrameReader(self.geometry)
        n = self.grid.num_points
        self._block_of = np.full(n + 1, -1)
        self._blocks: list[PointBlock] = []
        self.positions = {motor: np.full(n + 1, np.nan) for motor in scan.motors}
        for label, block in blocks:
            stop = min(block.stop, n + 1)
            if stop <= block.first:
                continue
            block = block.part(block.first, stop)
            if label == "frames":
                self._block_of[block.first : stop] = len(self._blocks)
                self._blocks.append(block)
            else:
                values, _, _ = self._reader.scalars(block)
                self.positions[label][block.first : stop] = values
        if not self._blocks:
            raise ValueError(
                f"run {self.short}: no frames" + (f": {self.problem}" if self.problem else "")
            )
        row, col = self.grid.row_col(np.arange(1, n + 1))
        self.point = np.zeros(scan.shape, np.int64)  # number of the point at a row and column
        self.point[row, col] = np.arange(1, n + 1)
        self.axes = axes(
            self.grid, tuple(self.positions[motor][self.point] for motor in scan.motors)
        )
        self.steps = tuple(
            float(axis[-1] - axis[0]) / (len(axis) - 1) if len(axis) > 1 else 0.0
            for axis in self.axes
        )
        self.estimates = Estimates.empty(n + 1, Flag.FRAME_MISSING)
        """By point number; that of 0 is missing."""
        self.settings: dict[str, Any] = {}

    @property
    def short(self) -> str:
        """Of the uid as much as is read."""
        return self.uid[:8]

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def analyze(self, choice: AnalyzerChoice, progress: Callable[[float], None]) -> None:
        """Make the scan's own estimates."""
        analyzer: Analyzer = choice.build(self.geometry)
        self.settings = analyzer.settings
        points = np.arange(1, self.grid.num_points + 1)
        for first in range(0, len(points), POINTS):
            part = points[first : first + POINTS]
            patterns, saturated, there = self.patterns(part)
            fitted = analyzer.process(patterns[there])
            flags = fitted.flags | np.where(saturated[there], int(Flag.SATURATED), 0)
            which = np.zeros(len(self.estimates), np.bool_)
            which[part[there]] = True
            self.estimates = self.estimates.put(which, replace(fitted, flags=flags))
            progress((first + len(part)) / len(points))
        if (self.estimates.flags[1:] & Flag.FRAME_MISSING).all():
            raise ValueError(f"run {self.short}: no frame could be read: {self.problem}")

    def patterns(
        self, points: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Read patterns (n, ny, nx) of points (n,), 0 for none: also saturated and read, (n,)."""
        patterns = np.zeros((len(points), *self.geometry.pattern_shape), np.float32)
        saturated, there = np.zeros((2, len(points)), np.bool_)
        order = np.argsort(points, kind="stable")
        block = np.where(points > 0, self._block_of[points], -1)[order]
        breaks = (np.diff(points[order]) != 1) | (np.diff(block) != 0)
        for part in np.split(order, np.flatnonzero(breaks) + 1):
            if not len(part) or (i := self._block_of[points[part[0]]]) < 0 or not points[part[0]]:
                continue
            wanted = self._blocks[i].part(int(points[part[0]]), int(points[part[-1]]) + 1)
            try:
                wanted = self._fill(wanted, self.geometry.roi)
            except Exception as error:  # of a server
                problem = f"not to be had from Tiled: {type(error).__name__}: {error}"
                wanted = replace(wanted, stored=None, problem=problem)
            patterns[part], saturated[part], status, reason = self._reader.patterns(wanted)
            there[part] = status == ReadStatus.OK
            self.problem = self.problem or reason
        return patterns, saturated, there

    def map(self, field: str) -> NDArray[np.float64]:
        """Return a field (rows, columns), NaN where it is flagged or missing."""
        values: NDArray[np.float64] = getattr(self.estimates, field)[self.point].astype(float)
        flags = self.estimates.flags[self.point]
        hidden = flags & Flag.FRAME_MISSING if field in Estimates.DIAGNOSTICS else flags
        return np.where(hidden, np.nan, values)


def _check_together(scans: Sequence[_Scan], any_thickness: bool) -> None:
    """Raise ValueError unless all are scans of one area of one film."""
    if len(scans) < 2:
        raise ValueError(
            f"{len(scans)} run{'s' * (len(scans) != 1)}: expected two or more to combine"
        )
    first = scans[0]
    seen: set[str] = set()
    for scan in scans:
        if scan.uid in seen:
            raise ValueError(f"run {scan.short} is named twice")
        seen.add(scan.uid)
        for name, ours, theirs, same in _differences(first, scan, any_thickness):
            if not same:
                raise ValueError(
                    f"run {scan.short}: {name} = {theirs}, but {ours} in run {first.short}; "
                    "combine takes scans of one area of one film, at one reflection and energy"
                )


def _differences(
    first: _Scan, scan: _Scan, any_thickness: bool
) -> Iterator[tuple[str, Any, Any, bool]]:
    """Yield what must be the same: its name, both values and whether they are."""
    ours, theirs = first.start.get("sample"), scan.start.get("sample")
    yield "sample", repr(ours), repr(theirs), ours is None or theirs is None or ours == theirs
    for name, part in _SAME.items():
        if not (name == "thickness_nm" and any_thickness):
            a, b = getattr(first.geometry, name), getattr(scan.geometry, name)
            yield name, f"{a:.6g}", f"{b:.6g}", math.isclose(a, b, rel_tol=part)
    for name in ("shape", "motors"):
        a, b = getattr(first.grid.scan, name), getattr(scan.grid.scan, name)
        yield name, list(a), list(b), a == b
    for motor, a, b in zip(first.grid.scan.motors, first.steps, scan.steps, strict=True):
        same = math.isclose(a, b, rel_tol=_SAME_STEP, abs_tol=1e-12)
        yield f"step of {motor}", f"{a:.4g}", f"{b:.4g}", same


# ------------------------------------------------------------------------------ drift


def _drift(first: _Scan, scan: _Scan) -> Registered:
    if scan is first:
        return Registered(0.0, 0.0, 1.0, 0.0, {})
    return register(*({name: s.map(name) for name in REGISTERED} for s in (first, scan)))


def _given(drift: Sequence[tuple[float, float]], scans: Sequence[_Scan]) -> list[Registered]:
    if len(drift) != len(scans):
        raise ValueError(f"drift has {len(drift)} entries for {len(scans)} runs: give each its own")
    row, col = drift[0]
    return [Registered(r - row, c - col, 1.0, 0.0, {}) for r, c in drift]


@dataclass(frozen=True, eq=False)
class _Places:
    """Which points of the scans lie at which points of the map."""

    origin: NDArray[np.float64]  # (2,), the map's first point in rows and columns of the first scan
    nearest: NDArray[np.int64]  # (k, 2), whole points from the map's to the scan's
    offset: NDArray[np.float64]  # (k, 2), from the map's point to the scan's nearest, points
    used: NDArray[np.bool_]  # (k,)


def _places(found: Sequence[Registered], shape: tuple[int, int]) -> _Places:
    """Choose the map's points so that the scans' lie as near as possible, the first's nearest.

    Then the scans' points lie around the map's, and what changes from point to point as a slope
    errs in no direction.
    """
    used = np.array([f.trusted for f in found])
    if used.sum() < 2:
        said = ", ".join(f"{f.quality:.2f} with rival {f.rival:.2f}" for f in found[1:])
        raise ValueError(
            f"no drift is beyond doubt (quality {said}): the maps have too little in common, or "
            "too little structure; give drift = [(0, 0), …] in points if you know it"
        )
    drift = np.array([[f.row, f.col] for f in found])
    origins = np.linspace(-0.499, 0.499, 999)
    origin = np.zeros(2)
    for axis in range(2):
        at = drift[used, axis, None] + origins
        origin[axis] = origins[np.square(np.rint(at) - at).sum(axis=0).argmin()]
    if (np.abs(drift - np.rint(drift)) < 1e-9).all():
        origin[:] = 0
    nearest = np.rint(drift + origin).astype(np.int64)
    return _Places(origin, nearest, nearest - drift - origin, used)


def _points(scan: _Scan, nearest: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of a scan's points at the map's, (rows · columns,); 0 where there is none."""
    rows, cols = scan.grid.scan.shape
    row, col = np.divmod(np.arange(rows * cols), cols)
    row, col = row + nearest[0], col + nearest[1]
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    return np.where(inside, scan.point[np.clip(row, 0, rows - 1), np.clip(col, 0, cols - 1)], 0)


# -------------------------------------------------------------------------------- fit


def _fit_all(
    scans: Sequence[_Scan], places: _Places, fit: Sequence[str], progress: Progress
) -> tuple[Estimates, dict[str, NDArray[Any]]]:
    """Fit all points of the map, row by row: estimates, and what else is told of them."""
    chosen = [i for i in range(len(scans)) if places.used[i]]
    points = np.stack([_points(scans[i], places.nearest[i]) for i in chosen])
    geometries = [scans[i].geometry for i in chosen]
    slopes = _slopes([scans[i] for i in chosen], points)  # (rows · columns, 3, 2)
    apart = np.einsum("nax,kx->kna", slopes, places.offset[chosen])
    parts, more = [], []
    for first in range(0, points.shape[1], POINTS):
        part = points[:, first : first + POINTS]
        patterns, singles, there = [], [], []
        for i, numbers in zip(chosen, part, strict=True):
            read, _, readable = scans[i].patterns(numbers)
            patterns.append(read)
            there.append(readable)
            singles.append(scans[i].estimates.select(numbers))
        flags = np.stack([single.flags for single in singles])
        usable = np.stack(there) & (flags & _UNUSABLE == 0)
        sound = usable & (flags & Flag.MISFIT == 0)
        used = np.where(sound.any(axis=0), sound, usable)
        together = refine_together(
            patterns,
            singles,
            geometries,
            fit=fit,
            used=used,
            apart=apart[:, first : first + POINTS],
        )
        parts.append(together.estimates)
        more.append(
            {"scans_used": together.scans_used}
            | {f"{name}_sigma_expected": sigma for name, sigma in together.expected.items()}
            | {"disagreement": together.disagreement}
        )
        progress("fitting", (first + part.shape[1]) / points.shape[1])
    extra = {name: np.concatenate([m[name] for m in more]) for name in more[0]}
    return Estimates.concatenate(parts), extra


def _slopes(scans: Sequence[_Scan], points: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how strain, ω and χ change along rows and columns: per point, (n, 3, 2).

    From the mean of the scans' own maps; 0 where it is not known.
    """
    shape = scans[0].grid.scan.shape
    slopes = np.zeros((points.shape[1], 3, 2))
    for a, name in enumerate(REGISTERED[1:]):
        weights, sums = np.zeros(shape), np.zeros(shape)
        for scan, numbers in zip(scans, points, strict=True):
            single = scan.estimates.select(numbers)
            sigma = getattr(single, f"{name}_sigma")
            good = (single.flags == 0) & (sigma > 0)
            weight = np.where(good, 1 / np.square(np.where(good, sigma, 1)), 0).reshape(shape)
            weights += weight
            sums += weight * np.where(good, getattr(single, name), 0).reshape(shape)
        mean = np.where(weights > 0, sums / np.where(weights > 0, weights, 1), np.nan)
        for axis in range(2):
            steps = np.diff(mean, axis=axis)
            nothing = np.full_like(np.take(mean, [0], axis), np.nan)
            before, after = (
                np.concatenate(parts, axis) for parts in ((nothing, steps), (steps, nothing))
            )
            before, after = (
                np.where(np.isnan(before), after, before),
                np.where(np.isnan(after), before, after),
            )
            slopes[:, a, axis] = np.nan_to_num((before + after) / 2).ravel()
    return slopes


# ------------------------------------------------------------------------------ results


def _derive(
    first: _Scan, places: _Places, estimates: Estimates, settings: Mapping[str, Any]
) -> Iterator[Document]:
    """Yield the documents of the combination, a derived run of the first scan."""
    run = DerivedRun(first.start, first.geometry, first.grid, settings, first.units)
    yield from run.open()
    numbers = np.arange(1, first.grid.num_points + 1)
    row, col = first.grid.row_col(numbers)
    ordered = estimates.select(row * first.grid.scan.shape[1] + col)
    positions = {
        motor: np.where(
            np.isfinite(first.positions[motor][1:]), first.positions[motor][1:], nominal
        )
        + origin * step
        for motor, nominal, origin, step in zip(
            first.grid.scan.motors,
            first.grid.nominal(numbers),
            places.origin,
            first.steps,
            strict=True,
        )
    }
    for begin in range(0, len(numbers), POINTS):
        part = slice(begin, begin + POINTS)
        columns = {motor: values[part] for motor, values in positions.items()}
        yield run.page(numbers[part], ordered.select(np.arange(len(numbers))[part]), columns)
    yield run.close("success", "")


def _scans(
    scans: Sequence[_Scan], found: Sequence[Registered], places: _Places, maps: xr.Dataset
) -> xr.Dataset:
    """Put the scans' own maps on the map's points."""
    first = scans[0]
    motors, shape = first.grid.scan.motors, first.grid.scan.shape
    points = [_points(scan, n) for scan, n in zip(scans, places.nearest, strict=True)]
    singles = [scan.estimates.select(p) for scan, p in zip(scans, points, strict=True)]
    data: dict[str, Any] = {}
    for name, units in Estimates.UNITS.items():
        values = np.stack([getattr(single, name) for single in singles])
        if name not in Estimates.DIAGNOSTICS:
            values = np.where(np.stack([single.flags for single in singles]), np.nan, values)
        data[name] = (("scan", "row", "col"), values.reshape(-1, *shape), {"units": units})
    drift = np.array([[f.row, f.col] for f in found])
    for i, motor in enumerate(motors):
        begin = [float(scan.axes[i][0] - first.axes[i][0]) for scan in scans]
        moved = np.array(begin) + drift[:, i] * first.steps[i]
        data[f"drift_{motor}"] = ("scan", moved, {"units": first.units.get(motor) or ""})
    for i, name in enumerate(("row", "col")):
        data[f"drift_{name}"] = ("scan", drift[:, i], {"units": "points"})
        data[f"offset_{name}"] = ("scan", places.offset[:, i], {"units": "points"})
    data["quality"] = ("scan", np.array([f.quality for f in found]))
    data["rival"] = ("scan", np.array([f.rival for f in found]))
    data["used"] = ("scan", places.used)
    angles = np.array([scan.geometry.delta_theta_deg for scan in scans])
    data["delta_theta_deg"] = ("scan", angles, {"units": "deg"})
    coords = {motor: maps.coords[motor] for motor in motors}
    return xr.Dataset(data, coords={**coords, "run": ("scan", [scan.uid for scan in scans])})
