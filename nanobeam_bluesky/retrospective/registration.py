"""Drift between two scans of one area, from their maps: to a fraction of a point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates, minimum_filter, spline_filter
from scipy.optimize import minimize
from scipy.signal import correlate

__all__ = ["Registered", "register"]

Image = NDArray[np.floating[Any]]

SIGNED = ("strain", "omega", "chi")
"""Maps that are the same at every angle; the intensity's contrast may turn over."""
LEAST_QUALITY = 0.7
"""Below it a drift is in doubt, …"""
MOST_RIVAL = 0.85
"""… and where another one explains so much of what the best does."""

_OVERLAP = 0.4  # of the points, at least
_LEAST_POINTS = 12
_SMOOTH = 0.7  # points: the noise of a single one would draw the drift to half points
_RANGE = 1.0  # points around the coarse drift within which the fine one lies
_PEAK = 2  # points that the peak of the likelihood takes to either side


class Registered(NamedTuple):
    """Where the features of one scan are in another."""

    row: float
    """What lies at row r of the first lies at r + row of the second, points."""
    col: float
    """The same of columns."""
    quality: float
    """Root mean square of the maps' correlations once the drift is taken out: 1 where they are
    equal, 0 where they have nothing in common."""
    rival: float
    """How well the second best drift explains the maps, as a part of how well the best does: near
    1 where any is as good as another."""
    correlations: dict[str, float]
    """Of each map, smoothed."""

    @property
    def trusted(self) -> bool:
        """Whether the drift is beyond doubt."""
        return self.quality >= LEAST_QUALITY and self.rival <= MOST_RIVAL


def register(first: Mapping[str, Image], second: Mapping[str, Image]) -> Registered:
    """Find the drift from one scan to another.

    Parameters
    ----------
    first, second
        Maps (rows, columns) of both, by name, e.g. "counts" and "omega"; NaN where missing.
        What is in both and not constant counts.

    Notes
    -----
    Each map of the one is taken as a linear function of the other's. The drift maximises the
    likelihood of that, -½ Σ n log(1 - r²) over the maps, r the correlation where n points
    overlap: in whole points by masked, normalised cross-correlation (D. Padfield, IEEE Trans.
    Image Process. 21, 2706 (2012)), then to a fraction of one with splines between the points.
    """
    pairs = {}
    for name in first:
        if name in second:
            a, b = np.asarray(first[name], float), np.asarray(second[name], float)
            if _varies(a) and _varies(b):
                pairs[name] = (_smooth(a), _smooth(b))
    if not pairs:
        return Registered(0.0, 0.0, 0.0, 1.0, {})
    gain = np.zeros([2 * n - 1 for n in next(iter(pairs.values()))[0].shape])
    for name, (a, b) in pairs.items():
        gain += _gain(*_correlation_surface(a, b, name in SIGNED))
    best = np.unravel_index(int(gain.argmax()), gain.shape)
    around = [slice(max(i - _PEAK, 0), i + _PEAK + 1) for i in best]
    peak = float(gain[best])
    gain[tuple(around)] = 0
    rival = float(gain.max()) / peak if peak > 0 else 1.0
    coarse = [
        float(i - n + 1) for i, n in zip(best, next(iter(pairs.values()))[0].shape, strict=True)
    ]
    shared = {name: _Shared.of(x, y, coarse) for name, (x, y) in pairs.items()}

    def correlations(drift: Any) -> dict[str, float]:
        found = {name: s.correlation(drift) for name, s in shared.items()}
        return {name: max(r, 0.0) if name in SIGNED else r for name, r in found.items()}

    def cost(drift: Any) -> float:
        gains = (
            _gain(np.array(r), np.array(shared[n].size)) for n, r in correlations(drift).items()
        )
        return -float(sum(gains))

    y, x = coarse
    fine = minimize(
        cost,
        coarse,
        method="Nelder-Mead",
        bounds=[(d - _RANGE, d + _RANGE) for d in coarse],
        options={
            "xatol": 2e-3,
            "fatol": 1e-4,
            "initial_simplex": [[y, x], [y + 0.4, x + 0.1], [y - 0.1, x + 0.4]],
        },
    )
    row, col = (float(d) for d in fine.x)
    found = correlations(fine.x)
    quality = float(np.sqrt(np.mean(np.square(list(found.values())))))
    return Registered(row, col, quality, rival, found)


def _varies(image: Image) -> bool:
    seen = image[np.isfinite(image)]
    return seen.size >= _LEAST_POINTS and float(np.ptp(seen)) > 0


def _smooth(image: Image) -> Image:
    """Smooth what is there, missing points left out."""
    seen = np.isfinite(image)
    weight = gaussian_filter(seen.astype(float), _SMOOTH)
    mean = float(image[seen].mean())
    smooth = gaussian_filter(np.where(seen, image - mean, 0), _SMOOTH)
    scale = float(image[seen].std())
    return np.where(seen, smooth / np.maximum(weight, 1e-3) / scale, np.nan)


def _gain(r: Image, n: Image) -> Image:
    """Log likelihood of n points that correlate, over that of points that do not."""
    return -0.5 * n * np.log(np.maximum(1 - r * r, 1e-9))


def _correlation_surface(a: Image, b: Image, signed: bool) -> tuple[Image, Image]:
    """Correlation of both and number of points in the overlap, at every whole drift.

    (2 rows - 1, 2 columns - 1); that of no drift is in the middle. No correlation where the
    overlap is small.
    """
    seen = [np.isfinite(image).astype(float) for image in (a, b)]
    value = [np.nan_to_num(image) for image in (a, b)]

    def overlap(left: Image, right: Image) -> Image:
        # [n - 1 + d] = Σ left[i] right[i + d]
        return correlate(right, left, mode="full", method="fft")

    n = np.rint(overlap(seen[0], seen[1]))
    safe = np.maximum(n, 1)
    sums = overlap(value[0], seen[1]), overlap(seen[0], value[1])
    spread = [
        overlap(value[0] ** 2, seen[1]) - sums[0] ** 2 / safe,
        overlap(seen[0], value[1] ** 2) - sums[1] ** 2 / safe,
    ]
    together = overlap(value[0], value[1]) - sums[0] * sums[1] / safe
    some = (n >= max(_LEAST_POINTS, _OVERLAP * a.size)) & (np.minimum(*spread) > 1e-6 * n)
    r = np.where(some, together / np.sqrt(np.where(some, spread[0] * spread[1], 1)), 0)
    r = np.clip(r, 0 if signed else -1, 1)
    return r, n


class _Shared(NamedTuple):
    """What is seen of both images wherever the fine drift may lie: always the same points."""

    first: Image  # (n,)
    at: NDArray[np.int64]  # (2, n), rows and columns
    second: Image  # spline coefficients

    @classmethod
    def of(cls, a: Image, b: Image, coarse: list[float]) -> _Shared:
        inside = minimum_filter(np.isfinite(b).astype(np.uint8), 3, mode="constant")
        row, col = np.nonzero(np.isfinite(a))
        to = row + int(coarse[0]), col + int(coarse[1])
        there = np.ones(len(row), np.bool_)
        for index, n in zip(to, b.shape, strict=True):
            there &= (index >= 0) & (index < n)
        clipped = tuple(np.clip(i, 0, n - 1) for i, n in zip(to, b.shape, strict=True))
        use = there & (inside[clipped] > 0)
        at = np.stack([row, col])[:, use]
        return cls(a[at[0], at[1]], at, spline_filter(np.nan_to_num(b), order=3, mode="nearest"))

    @property
    def size(self) -> int:
        return self.first.size

    def correlation(self, drift: Any) -> float:
        if self.size < _LEAST_POINTS or np.ptp(self.first) == 0:
            return 0.0
        there = self.at + np.asarray(drift)[:, None]
        second = map_coordinates(self.second, there, order=3, mode="nearest", prefilter=False)
        return float(np.corrcoef(self.first, second)[0, 1]) if np.ptp(second) > 0 else 0.0
