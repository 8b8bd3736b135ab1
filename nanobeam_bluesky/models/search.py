"""`library_search`: first estimates that need no training, the likeliest pattern of a library."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.correlation import PARAMETERS, RANGES
from nanobeam_bluesky.models.estimates import Estimates
from nanobeam_bluesky.physics import simulate_library
from nanobeam_bluesky.physics.continuous import continuous_plan, shift_derivatives

__all__ = ["library_search"]

_STEP_PX = 2.5  # between neighbours, of the pupil's shift
_STEP_FRINGE = 0.25  # between neighbours, of t dq / 2π
_MAKING = Lock()  # once, not once a thread
_LARGEST = 2**25  # numbers of a library, 128 MiB: 8192 patterns of 64×64
_COARSER = 1.05
_SLICE = 256  # patterns that are compared at a time
_FLOOR = 0.02  # of the peak: background and hot pixels must not decide

logger = logging.getLogger("nanobeam_bluesky")


class _Library(NamedTuple):
    parameters: NDArray[np.float64]  # (m, 3), strain, ω and χ (deg)
    places: NDArray[np.int16]  # (m, 3), of the patterns on the grid
    steps: NDArray[np.float64]  # (3,), of the grid
    logarithms: NDArray[np.float32]  # (m, pixels), of the patterns at unit sum


class Likeliest(NamedTuple):
    """The likeliest of a library's patterns for each of n."""

    first: Estimates
    second: Estimates
    """The likeliest that is not a neighbour of the first."""
    lead: NDArray[np.float64]
    """(n,), log likelihood of the first less that of the second."""
    steps: NDArray[np.float64]
    """(3,), between neighbours, in strain, ω and χ (deg)."""

    def select(self, which: NDArray[np.intp]) -> Likeliest:
        """Return the points that an index chooses."""
        first, second = self.first.select(which), self.second.select(which)
        return Likeliest(first, second, self.lead[which], self.steps)


def library_search(
    patterns: NDArray[Any],
    geometry: Geometry,
    *,
    ranges: Mapping[str, float] | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> Estimates:
    """Find the likeliest of the patterns of a library that spans the ranges.

    Neighbours lie so close that `refine` finds its way from there, also where the likelihood
    has several maxima. In the published condition they are some hundred.

    Parameters
    ----------
    patterns
        (n, ny, nx), counts.
    geometry
        The geometry; its library is simulated once.
    ranges
        Half-ranges of strain, omega (deg) and chi (deg); the published ones by default. Where
        these take more than 16384 patterns of 64×64 the steps are wider, with a warning.
    mask
        True for pixels that are not compared, (ny, nx) or (n, ny, nx).

    Returns
    -------
    Estimates
        Strain, ω and χ on the library's grid, without standard deviations.
    """
    return likeliest(patterns, geometry, ranges=ranges, mask=mask).first


def likeliest(
    patterns: NDArray[Any],
    geometry: Geometry,
    *,
    ranges: Mapping[str, float] | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> Likeliest:
    """Do what `library_search` does; return the second choice too."""
    limits = RANGES | dict(ranges or {})
    with _MAKING:
        library = _library(geometry, tuple(limits[name] for name in PARAMETERS))
    n = len(patterns)
    flat = np.asarray(patterns).reshape(n, -1)
    first, second, lead = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n)
    for begin in range(0, n, _SLICE):
        part = slice(begin, begin + _SLICE)
        counts = np.ascontiguousarray(flat[part], dtype=np.float32)
        if mask is None:
            scores = counts @ library.logarithms.T
        else:
            hidden = (mask[part] if mask.ndim == 3 else mask).reshape(-1, flat.shape[1])
            scores = _beside_mask(counts, hidden, library.logarithms)
        rows = np.arange(len(scores))
        first[part] = best = scores.argmax(axis=1)
        lead[part] = scores[rows, best]
        near = np.ones(scores.shape, np.bool_)
        for axis in library.places.T:
            near &= np.abs(axis - axis[best, None]) <= 1
        scores[near] = -np.inf
        second[part] = best = scores.argmax(axis=1)
        lead[part] -= scores[rows, best]
    return Likeliest(_at(library, first), _at(library, second), lead, library.steps)


def _beside_mask(
    counts: NDArray[np.float32], mask: NDArray[np.bool_], logarithms: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Log likelihoods (n, m) of counts (n, pixels) without the pixels of a mask (n or 1, pixels).

    What of a pattern's light falls on them is not missed.
    """
    counts = np.where(mask, np.float32(0), counts)
    pixels = np.flatnonzero(mask.any(axis=0))
    hidden = mask[:, pixels].astype(np.float32) @ np.exp(logarithms[:, pixels]).T
    seen = np.log(np.maximum(1 - hidden, np.float32(1e-6)))
    scores: NDArray[np.float32] = counts @ logarithms.T
    scores -= counts.sum(axis=1, keepdims=True) * seen
    return scores


def _at(library: _Library, which: NDArray[np.int64]) -> Estimates:
    estimates = Estimates.empty(len(which))
    for name, values in zip(PARAMETERS, library.parameters[which].T, strict=True):
        getattr(estimates, name)[:] = values
    return estimates


@lru_cache(maxsize=2)
def _library(geometry: Geometry, limits: tuple[float, ...]) -> _Library:
    plan = continuous_plan(geometry)
    origin = np.zeros(1)
    slopes = np.abs(shift_derivatives(plan, origin, origin, origin)[0])
    fringes = plan.thickness / (2 * math.pi) * slopes[2, 0]
    widths = np.array([_STEP_FRINGE / fringes, _STEP_PX / slopes[0, 1], _STEP_PX / slopes[1, 2]])
    pixels = math.prod(geometry.pattern_shape)

    def shape(wider: float) -> list[int]:
        return [2 * math.ceil(a / (wider * b)) + 1 for a, b in zip(limits, widths, strict=True)]

    wider = 1.0
    while math.prod(shape(wider)) * pixels > _LARGEST and max(shape(wider)) > 3:
        wider *= _COARSER
    if wider > 1:
        logger.warning(
            "the library of first estimates would hold %d patterns of %d × %d pixels; with steps "
            "%.2g times as wide it holds %d. Smaller ranges, a smaller ROI or more binning make "
            "it finer",
            math.prod(shape(1.0)), *geometry.pattern_shape, wider, math.prod(shape(wider)),
        )  # fmt: skip
    axes = [
        np.linspace(-limit, limit, size) for limit, size in zip(limits, shape(wider), strict=True)
    ]
    patterns = simulate_library(geometry, *axes, sampling="continuous").reshape(-1, pixels)
    patterns += np.float32(_FLOOR)
    patterns /= patterns.sum(axis=1, keepdims=True)
    np.log(patterns, out=patterns)
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    places = np.indices(shape(wider), dtype=np.int16).reshape(3, -1).T
    return _Library(grid, places, np.array([axis[1] - axis[0] for axis in axes]), patterns)
