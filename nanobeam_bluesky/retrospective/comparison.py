"""`compare`: two derived runs of one area, point by point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nanobeam_bluesky.documents import to_maps

__all__ = ["Agreement", "Comparison", "compare"]

FIELDS = ("strain", "omega", "chi", "thickness")
_LEAST_POINTS = 3
_APART = 0.51  # steps that the points of both may lie apart


@dataclass(frozen=True)
class Agreement:
    """How one field of two runs agrees, over the points that are flagged in neither."""

    points: int
    """How many these are."""
    r: float
    """Pearson's correlation."""
    slope: float
    """Of the second over the first: see `compare`. NaN where the first does not vary."""
    intercept: float
    """In the field's unit."""
    mean: float
    """Of second less first, in the field's unit."""
    rms: float
    """Of second less first, in the field's unit."""
    within: tuple[float, float] | None
    """Parts of the points within one and two σ of the difference, both runs' σ taken as
    independent: 0.68 and 0.95 for estimates from different photons, more for those from the
    same. None where one of them has no σ, as the correlation fit."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` gives."""

    names: tuple[str, str]
    """Method and uid of both runs, e.g. "refine 3f2a91c0"."""
    first: xr.Dataset
    second: xr.Dataset
    """Maps of both, on the same points."""
    agreement: dict[str, Agreement]
    """By field; "thickness" only where both have it."""

    @property
    def difference(self) -> xr.Dataset:
        """Second less first: a map of every field."""
        return xr.Dataset(
            {
                name: (
                    ("row", "col"),
                    self.second[name].to_numpy() - self.first[name].to_numpy(),
                    self.first[name].attrs,
                )
                for name in self.agreement
            },
            coords=self.first.coords,
        )


def compare(first: Any, second: Any) -> Comparison:
    """Compare two derived runs point by point.

    Parameters
    ----------
    first, second
        Whatever `to_maps` takes; of one raw run, by two methods, or of two scans of one area,
        with points at the same positions.

    Raises
    ------
    ValueError
        If one is no derived run, or their points are not the same: says what differs.

    Notes
    -----
    The slope is that of Deming's regression, since both maps have errors: an ordinary one would
    be too small by the first's. The ratio of the errors' variances is that of the median σ², or
    1 where one has no σ.
    """
    runs = [run if hasattr(run, "metadata") else list(run) for run in (first, second)]
    a, b = (to_maps(run) for run in runs)
    starts = [_start(run) for run in runs]
    names = (_name(starts[0]), _name(starts[1]))
    _check_same_points(a, b, starts, names)
    agreement = {}
    for name in FIELDS:
        if name != "thickness" or all(np.isfinite(maps[name]).any() for maps in (a, b)):
            agreement[name] = _agreement(a, b, name)
    return Comparison(names, a, b, agreement)


def _start(run: Any) -> Mapping[str, Any]:
    if hasattr(run, "metadata"):
        start: Mapping[str, Any] = run.metadata["start"]
        return start
    return next((doc for name, doc in run if name == "start"), {})


def _name(start: Mapping[str, Any]) -> str:
    method = start["nanobeam"].get("analyzer", {}).get("method", "run")
    return f"{method} {str(start['uid'])[:8]}"


def _check_same_points(
    a: xr.Dataset, b: xr.Dataset, starts: list[Mapping[str, Any]], names: tuple[str, str]
) -> None:
    """Raise ValueError unless the points of both are the same."""

    def differ(what: str, ours: Any, theirs: Any) -> ValueError:
        return ValueError(
            f"{names[1]}: {what} {theirs}, but {ours} in {names[0]}; only maps of the same points "
            "can be compared (scans that have drifted: combine them)"
        )

    samples = [start.get("sample") for start in starts]
    if None not in samples and samples[0] != samples[1]:
        raise differ("sample", repr(samples[0]), repr(samples[1]))
    for dim in ("row", "col"):
        if a.sizes[dim] != b.sizes[dim]:
            shapes = [f"{m.sizes['row']} × {m.sizes['col']} points" for m in (a, b)]
            raise differ("has", *shapes)
    motors = [start["motors"] for start in starts]
    if list(motors[0]) != list(motors[1]):
        raise differ("motors", *motors)
    for motor in motors[0]:
        x, y = a[motor].to_numpy(), b[motor].to_numpy()
        step = abs(float(x[-1] - x[0])) / (len(x) - 1) if len(x) > 1 else math.inf
        if np.abs(x - y).max() > max(_APART * step, 1e-9):
            raise differ(
                f"{motor} from", f"{x[0]:.6g} to {x[-1]:.6g}", f"{y[0]:.6g} to {y[-1]:.6g}"
            )


def _agreement(a: xr.Dataset, b: xr.Dataset, name: str) -> Agreement:
    x, y = a[name].to_numpy(), b[name].to_numpy()
    sigma = [maps[f"{name}_sigma"].to_numpy() for maps in (a, b)]
    both = np.isfinite(x) & np.isfinite(y)
    n = int(both.sum())
    if n < _LEAST_POINTS:
        nothing = math.nan
        return Agreement(n, nothing, nothing, nothing, nothing, nothing, None)
    x, y = x[both], y[both]
    sigma = [s[both] for s in sigma]
    known = np.isfinite(sigma[0]) & np.isfinite(sigma[1])
    within, ratio = None, 1.0
    if known.any():
        apart = np.abs(y - x)[known] / np.hypot(sigma[0], sigma[1])[known]
        within = float((apart <= 1).mean()), float((apart <= 2).mean())
        medians = [float(np.median(s[known])) for s in sigma]
        ratio = (medians[1] / medians[0]) ** 2 if medians[0] > 0 else 1.0
    r, slope = _line(x, y, ratio)
    difference = y - x
    return Agreement(
        points=n,
        r=r,
        slope=slope,
        intercept=float(y.mean() - slope * x.mean()),
        mean=float(difference.mean()),
        rms=float(np.sqrt(np.mean(difference**2))),
        within=within,
    )


def _line(x: NDArray[np.float64], y: NDArray[np.float64], ratio: float) -> tuple[float, float]:
    """Pearson's r, and the slope where y's errors have `ratio` times the variance of x's."""
    xx, yy = float(np.var(x)), float(np.var(y))
    xy = float(np.mean((x - x.mean()) * (y - y.mean())))
    if xx <= 0 or yy <= 0:
        return math.nan, math.nan
    r = xy / math.sqrt(xx * yy)
    if xy == 0:
        return r, 0.0
    more = yy - ratio * xx
    return r, (more + math.sqrt(more * more + 4 * ratio * xy * xy)) / (2 * xy)
