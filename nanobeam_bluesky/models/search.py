"""`library_search`: first estimates that need no training, the likeliest pattern of a library."""

from __future__ import annotations

import math
from functools import lru_cache
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
_MOST = 81  # along one axis
_FLOOR = 0.02  # of the peak: background and hot pixels must not decide


class _Library(NamedTuple):
    parameters: NDArray[np.float64]  # (m, 3), strain, ω and χ (deg)
    logarithms: NDArray[np.float32]  # (pixels, m), of the patterns at unit sum


def library_search(patterns: NDArray[Any], geometry: Geometry) -> Estimates:
    """Find the likeliest of some hundred patterns that span the published ranges.

    Neighbours lie so close that `refine` finds its way from there, also where the likelihood
    has several maxima.

    Parameters
    ----------
    patterns
        (n, ny, nx), counts.
    geometry
        The geometry; its library is simulated once.

    Returns
    -------
    Estimates
        Strain, ω and χ on the library's grid, without standard deviations.
    """
    library = _library(geometry)
    flat = np.ascontiguousarray(patterns, dtype=np.float32).reshape(len(patterns), -1)
    best = (flat @ library.logarithms).argmax(axis=1)
    strain, omega, chi = library.parameters[best].T
    estimates = Estimates.empty(len(flat))
    for name, values in zip(PARAMETERS, (strain, omega, chi), strict=True):
        getattr(estimates, name)[:] = values
    return estimates


@lru_cache(maxsize=4)
def _library(geometry: Geometry) -> _Library:
    plan = continuous_plan(geometry)
    origin = np.zeros(1)
    slopes = np.abs(shift_derivatives(plan, origin, origin, origin)[0])
    fringes = plan.thickness / (2 * math.pi) * slopes[2, 0]
    per_step = (fringes / _STEP_FRINGE, slopes[0, 1] / _STEP_PX, slopes[1, 2] / _STEP_PX)
    axes = [
        np.linspace(-limit, limit, min(_MOST, 2 * math.ceil(limit * steps) + 1))
        for limit, steps in zip((RANGES[name] for name in PARAMETERS), per_step, strict=True)
    ]
    patterns = simulate_library(geometry, *axes, sampling="continuous")
    patterns = patterns.reshape(-1, math.prod(geometry.pattern_shape)) + np.float32(_FLOOR)
    patterns /= patterns.sum(axis=1, keepdims=True)
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    return _Library(grid, np.ascontiguousarray(np.log(patterns).T))
