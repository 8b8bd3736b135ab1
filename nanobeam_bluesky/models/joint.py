"""`refine_together`: one strain and tilt from several patterns of the same place.

The patterns may be of different angles of incidence: strain, ω, χ and thickness are the film's
and shared, brightness and background are every pattern's own. Poisson maximum likelihood by
Fisher scoring, as `refine` does it for one pattern, all points at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import Geometry, RectangularPupil
from nanobeam_bluesky.models.estimates import DEFAULT_FIT, Estimates, Flag, check_fit
from nanobeam_bluesky.models.refinement import (
    LARGEST_DEVIANCE,
    LARGEST_PIXEL,
    LARGEST_SCORE,
    LEAST_BLUR_PX,
    LEAST_SIGNAL,
    MODEL_ERROR,
    THICKNESS_OFF,
    check,
)
from nanobeam_bluesky.physics._numba import in_threads, kernel
from nanobeam_bluesky.physics.continuous import (
    ContinuousPlan,
    continuous_plan,
    pattern_channels,
    shift_derivatives,
    shifts,
)
from nanobeam_bluesky.physics.likelihood import deviance_moments, goodness, poisson_sums

__all__ = ["Together", "refine_together"]

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

_SHARED = ("strain", "omega", "chi", "thickness")  # order of the shared parameters
_EVALUATIONS = 40
_CLOSE = 0.02  # squared distance to the maximum, in σ, from which the last step is taken
_FAINT = 1e-6  # least background, in units of the scale
_STEP_PX = 4.0  # longest step of a shift
_STEP_FRINGE = 0.25  # longest step of t dq / 2π
_STEP_PART = 0.25  # longest step of the thickness, of its value
_THICKNESS_RANGE = (0.25, 4.0)  # of the geometry's


@dataclass(frozen=True, eq=False)
class Together:
    """What `refine_together` finds; k scans, n points."""

    estimates: Estimates
    """n points; counts are those of all used patterns, the background is their mean."""
    scans_used: NDArray[np.int64]
    """(n,), how many patterns each is the estimate of."""
    expected: dict[str, NDArray[np.float64]]
    """For strain, omega and chi, (n,): σ that the Fisher information of all patterns lets
    expect, taken at the estimates that every scan gives on its own."""
    disagreement: NDArray[np.float64]
    """(n,): by how much the scans' own estimates differ, (χ² - E[χ²]) / sd(χ²): 0 ± 1 where
    they differ by their noise. NaN where less than two have any."""


@dataclass(frozen=True, eq=False)
class _Scan:
    """What the kernels need of one scan."""

    plan: ContinuousPlan
    counts: NDArray[np.float32]  # (m, ny, nx)
    light: NDArray[np.float32]  # (ny, nx), 0 for pixels to leave out
    at: NDArray[np.int64]  # (n,), which of them are the points
    apart: NDArray[np.float64]  # (n, 4), shared parameters where the scan looked, less the map's

    def select(self, which: NDArray[Any]) -> _Scan:
        return replace(self, at=self.at[which], apart=self.apart[which])

    def sums(self, which: NDArray[np.int64], *arrays: Floats) -> NDArray[np.float64]:
        """Fill what `_sums` fills; return −2 log likelihood, (n,)."""
        heights = np.zeros(len(self.at))
        filled = (*arrays, heights)
        in_threads(
            lambda part: _sums(self.plan, which[part], self.at, self.counts, self.light, *filled),
            len(which),
        )
        return heights

    def goodness(self, which: NDArray[np.int64], *arrays: Floats) -> None:
        """Fill what `_goodness` fills."""
        in_threads(
            lambda part: _goodness(
                self.plan, which[part], self.at, self.counts, self.light, *arrays
            ),
            len(which),
        )


@dataclass(eq=False)
class _State:
    """Parameters of n points, and what the likelihood says at them; k scans."""

    shared: NDArray[np.float64]  # (n, 4)
    own: NDArray[np.float64]  # (k, n, 2): scale and background
    height: NDArray[np.float64]  # (n,), −2 log likelihood
    information: NDArray[np.float64]  # (k, n, 6, 6): shifts, thickness, scale and background
    score: NDArray[np.float64]  # (k, n, 6)
    jacobian: NDArray[np.float64]  # (k, n, 4, 4), of shifts and thickness by the shared

    def select(self, which: NDArray[Any]) -> _State:
        return _State(
            self.shared[which],
            self.own[:, which],
            self.height[which],
            self.information[:, which],
            self.score[:, which],
            self.jacobian[:, which],
        )

    def put(self, which: NDArray[Any], other: _State) -> None:
        self.shared[which] = other.shared
        self.own[:, which] = other.own
        self.height[which] = other.height
        self.information[:, which] = other.information
        self.score[:, which] = other.score
        self.jacobian[:, which] = other.jacobian


def refine_together(
    patterns: Sequence[NDArray[Any]],
    singles: Sequence[Estimates],
    geometries: Sequence[Geometry],
    *,
    fit: Sequence[str] = DEFAULT_FIT,
    used: Bools | None = None,
    apart: NDArray[np.float64] | None = None,
) -> Together:
    """Maximise the Poisson likelihood of all patterns of a place, which share strain and tilts.

    Parameters
    ----------
    patterns
        Of each scan (n, ny, nx), counts; its geometry's mask applies.
    singles
        Of each scan n estimates, as its `Analyzer` gives them: the joint fit starts from their
        mean, weighted by σ, and where that ends at a misfit from each of them.
    geometries
        Of each scan, of one film: angles, detector and ROI may differ.
    fit
        As of `refine`; no "blur".
    used
        (k, n), False for patterns to leave out, e.g. that are missing.
    apart
        (k, n, 3), strain, ω and χ where each scan has looked less those of the place that the
        estimates are for, as far as they are known; counts where the scans agree better so.

    Returns
    -------
    Together
        σ from the joint Fisher information, every scale and background unknown. Flags:
        MISFIT, where the model cannot make the patterns; NOT_CONVERGED; and where no pattern is
        used, those of the single estimates, or FRAME_MISSING.

    Raises
    ------
    ValueError
        If the arrays do not fit together, or `fit` names what cannot be fitted.
    """
    check_fit(fit)
    if "blur" in fit:
        raise ValueError("fit holds 'blur', which a joint fit takes as known: leave it out")
    if not len(patterns) == len(singles) == len(geometries) or not patterns:
        raise ValueError(
            f"{len(patterns)} scans' patterns, {len(singles)} scans' estimates and "
            f"{len(geometries)} geometries: expected one of each, for one scan or more"
        )
    k, n = len(patterns), len(singles[0])
    lengths = {*map(len, patterns), *map(len, singles)}
    if lengths != {n}:
        raise ValueError(f"scans of {sorted(lengths)} points: all must have the same")
    used = np.ones((k, n), np.bool_) if used is None else used.copy()
    if used.shape != (k, n):
        raise ValueError(f"used has shape {used.shape}: expected ({k}, {n})")
    scans, total = [], np.zeros((k, n))
    for i, (geometry, counts) in enumerate(zip(geometries, patterns, strict=True)):
        mask = geometry.pattern_mask
        checked = check(counts, geometry, mask if mask.any() else None)
        used[i] &= ~checked.broken & (checked.total > 0)
        total[i] = checked.total
        light = (~mask).astype(np.float32)
        plan = continuous_plan(_regular(geometry))
        scans.append(_Scan(plan, checked.counts, light, np.arange(n), np.zeros((n, 4))))
    scans = _agreeing(scans, singles, used, apart)
    free = np.array([True, True, True, "thickness" in fit])
    background = "background" in fit

    own = np.stack([_own(single, background) for single in singles])
    film = geometries[0].thickness_nm
    shared = np.stack(
        [_shared(s, film, free[3]) - scan.apart for s, scan in zip(singles, scans, strict=True)]
    )
    expected, disagreement, mean = _expect(scans, shared, own, singles, used, free, background)
    some = np.asarray(used.any(axis=0))
    begin = np.where(some[:, None], mean, [0.0, 0.0, 0.0, film])
    state, top = _climb(scans, begin, own, used, free, background)
    quality = _judge(scans, state, used, free, background)
    again = some & (~top | _misfit(quality, total * used))
    for i in range(k):
        # where the scans disagree, or lie in different maxima, the mean is no start
        which = np.flatnonzero(again & used[i] & np.isfinite(shared[i]).all(axis=1))
        if not len(which):
            continue
        part = [scan.select(which) for scan in scans]
        other, found = _climb(
            part, shared[i][which], own[:, which], used[:, which], free, background
        )
        better = found & (~top[which] | (other.height < state.height[which]))
        state.put(which[better], other.select(better))
        top[which[better]] = True
    if again.any():
        which = np.flatnonzero(again)
        part = [scan.select(which) for scan in scans]
        quality.put(which, _judge(part, state.select(which), used[:, which], free, background))
    estimates = _estimates(state, quality, top, singles, used, total, free)
    return Together(estimates, used.sum(axis=0), expected, disagreement)


# ------------------------------------------------------------------------ starts


def _regular(geometry: Geometry) -> Geometry:
    """A geometry whose likelihood is regular, as of `refine`."""
    if isinstance(geometry.optics, RectangularPupil) and geometry.pupil_blur_px < LEAST_BLUR_PX:
        return geometry.model_copy(update={"pupil_blur_px": LEAST_BLUR_PX})
    return geometry


def _agreeing(
    scans: Sequence[_Scan],
    singles: Sequence[Estimates],
    used: Bools,
    apart: NDArray[np.float64] | None,
) -> list[_Scan]:
    """Return the scans, apart where their own estimates agree better so."""
    if apart is None:
        return list(scans)
    spread = np.zeros((2, apart.shape[1]))
    for a, name in enumerate(_SHARED[:3]):
        values = np.stack([getattr(single, name) for single in singles])
        sigma = np.stack([getattr(single, f"{name}_sigma") for single in singles])
        good = used & np.isfinite(values) & (sigma > 0)
        weight = np.where(good, 1 / np.square(np.where(good, sigma, 1)), 0)
        for j, known in enumerate((np.zeros_like(values), apart[..., a])):
            there = np.where(good, values - known, 0)
            mean = (weight * there).sum(axis=0) / np.maximum(weight.sum(axis=0), 1e-300)
            spread[j] += (weight * (there - mean) ** 2).sum(axis=0)
    better = spread[1] < spread[0]
    kept = np.where(better[None, :, None], apart, 0)
    return [
        replace(scan, apart=np.pad(part, ((0, 0), (0, 1))))
        for scan, part in zip(scans, kept, strict=True)
    ]


def _own(single: Estimates, background: bool) -> NDArray[np.float64]:
    """Scale (unknown yet: NaN) and background of a scan's patterns, (n, 2)."""
    floor = np.nan_to_num(single.background) if background else np.zeros(len(single))
    return np.stack([np.full(len(single), np.nan), floor], 1)


def _shared(single: Estimates, film: float, thickness: bool) -> NDArray[np.float64]:
    """Strain, ω, χ and thickness of a scan, (n, 4); NaN where it has no good ones."""
    columns = [getattr(single, name).copy() for name in _SHARED]
    if thickness:
        columns[3] = np.where(np.isfinite(columns[3]), columns[3], film)
    else:
        columns[3][:] = film
    return np.where(((single.flags & Flag.FEW_COUNTS) == 0)[:, None], np.stack(columns, 1), np.nan)


def _expect(
    scans: Sequence[_Scan],
    shared: NDArray[np.float64],
    own: NDArray[np.float64],
    singles: Sequence[Estimates],
    used: Bools,
    free: Bools,
    background: bool,
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64], NDArray[np.float64]]:
    """What the single estimates let expect: σ, how much they disagree, and their mean (n, 4)."""
    k, n = used.shape
    known = used & np.isfinite(shared).all(axis=2)
    for i, single in enumerate(singles):
        known[i] &= (single.flags & Flag.NOT_CONVERGED) == 0
    size = int(free.sum())
    parts = np.zeros((k, n, size, size))
    film = np.array([0.0, 0.0, 0.0, scans[0].plan.thickness / 10])
    for i, scan in enumerate(scans):
        values = np.where(known[i][:, None], shared[i], film)
        state = _evaluate([scan], values, own[i : i + 1], known[i : i + 1])
        parts[i] = _reduced(state, known[i : i + 1], free, background)[0]
    parts[~known] = 0
    together = parts.sum(axis=0)
    weighted = np.einsum("knab,knb->na", parts, np.where(known[..., None], shared, 0)[..., free])
    inverse, regular = _inverse(together)
    mean = np.tile(film, (n, 1))
    # where nothing is known, any estimate is better than none
    fallback = np.zeros((n, size))
    for i in range(k):
        fallback = np.where(np.isfinite(shared[i][:, free]), shared[i][:, free], fallback)
    mean[:, free] = np.where(regular[:, None], np.einsum("nab,nb->na", inverse, weighted), fallback)
    apart = np.where(known[..., None], shared - mean, 0)[..., free]
    chi2 = np.einsum("kna,knab,knb->n", apart, parts, apart)
    freedom = size * (known.sum(axis=0) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        disagreement = np.where(
            regular & (freedom > 0), (chi2 - freedom) / np.sqrt(2 * freedom), np.nan
        )
        sigma = np.sqrt(np.diagonal(inverse, axis1=1, axis2=2))
    expected = {name: np.where(regular, sigma[:, a], np.nan) for a, name in enumerate(_SHARED[:3])}
    return expected, disagreement, mean


# --------------------------------------------------------------------- likelihood


def _shifts(plan: ContinuousPlan, shared: NDArray[np.float64]) -> NDArray[np.float64]:
    """shift_x, shift_y, dq and thickness (Å) in a scan's geometry, (n, 4)."""
    strain, omega, chi, film = shared.T
    return np.stack([*shifts(plan, strain, omega, chi), 10 * film], 1)


def _evaluate(
    scans: Sequence[_Scan], shared: NDArray[np.float64], own: NDArray[np.float64], used: Bools
) -> _State:
    """Likelihood, information and score at some parameters; unknown scales are guessed."""
    k, n = used.shape
    state = _State(
        shared,
        own.copy(),
        np.zeros(n),
        np.zeros((k, n, 6, 6)),
        np.zeros((k, n, 6)),
        np.zeros((k, n, 4, 4)),
    )
    for i, scan in enumerate(scans):
        there = shared + scan.apart
        moved = _shifts(scan.plan, there)
        state.jacobian[i] = shift_derivatives(scan.plan, *there.T[:3])
        arrays = moved, state.own[i], state.information[i], state.score[i]
        state.height += scan.sums(np.flatnonzero(used[i]), *arrays)
    return state


def _eliminated(
    state: _State, used: Bools, free: Bools, background: bool, damping: NDArray[np.float64] | float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], Bools]:
    """Information by the shared parameters, cross terms, and the inverse of each scan's own.

    (k, n, s, s), (k, n, s, 2), (k, n, 2, 2) and which of them move, (k, n, 2).
    """
    jacobian = state.jacobian[..., free]
    inner, cross, own = (
        state.information[..., :4, :4],
        state.information[..., :4, 4:],
        state.information[..., 4:, 4:].copy(),
    )
    shared = np.swapaxes(jacobian, 2, 3) @ inner @ jacobian
    cross = np.swapaxes(jacobian, 2, 3) @ cross
    moving = np.repeat(used[..., None], 2, axis=2)
    faintest = state.own[..., 1] <= 1.001 * _FAINT * state.own[..., 0]
    moving[..., 1] &= background & ~(faintest & (state.score[..., 5] < 0))
    cross = cross * moving[..., None, :]
    own *= moving[..., None, :] & moving[..., :, None]
    grown = 1 + np.asarray(damping)
    a = np.where(moving[..., 0], own[..., 0, 0] * grown, 1.0)
    d = np.where(moving[..., 1], own[..., 1, 1] * grown, 1.0)
    b = own[..., 0, 1]
    determinant = a * d - b * b
    determinant = np.where(determinant > 1e-14 * a * d, determinant, np.inf)  # one knows all
    inverse = np.stack([d, -b, -b, a], -1).reshape(*a.shape, 2, 2) / determinant[..., None, None]
    return shared, cross, inverse * (moving[..., None, :] & moving[..., :, None]), moving


def _reduced(state: _State, used: Bools, free: Bools, background: bool) -> NDArray[np.float64]:
    """Information (k, n, s, s) by the shared parameters, scale and background unknown."""
    shared, cross, inverse, _ = _eliminated(state, used, free, background, 0.0)
    reduced: NDArray[np.float64] = shared - cross @ inverse @ np.swapaxes(cross, 2, 3)
    return reduced


def _inverse(matrices: NDArray[np.float64]) -> tuple[NDArray[np.float64], Bools]:
    """Inverse of (n, s, s), and whether there is one, (n,)."""
    size = np.sqrt(np.maximum(np.diagonal(matrices, axis1=1, axis2=2), 0))
    good = np.asarray((size > 0).all(axis=1)) & np.isfinite(matrices).all(axis=(1, 2))
    unit = np.eye(matrices.shape[1])
    safe = np.where(size > 0, size, 1.0)
    correlation = np.where(
        good[:, None, None], matrices / (safe[:, :, None] * safe[:, None, :]), unit
    )
    values, vectors = np.linalg.eigh(correlation)
    good &= values[:, 0] > 1e-12
    values = np.where(good[:, None], values, 1.0)
    inverse = np.einsum("nab,nb,ncb->nac", vectors, 1 / values, vectors)
    return inverse / (safe[:, :, None] * safe[:, None, :]), good


def _solve(
    state: _State,
    right: NDArray[np.float64],
    used: Bools,
    free: Bools,
    background: bool,
    damping: NDArray[np.float64] | float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], Bools, NDArray[np.float64]]:
    """Solve information · step = right, (k, n, 6), in shared and own parameters.

    Returns the steps (n, s) and (k, n, 2), whether there are any (n,), and the shared
    parameters' covariance.
    """
    shared, cross, inverse, moving = _eliminated(state, used, free, background, damping)
    jacobian = state.jacobian[..., free]
    own = right[..., 4:] * moving
    reduced = shared - cross @ inverse @ np.swapaxes(cross, 2, 3)
    reduced = reduced.sum(axis=0)
    diagonal = np.diagonal(shared, axis1=2, axis2=3).sum(axis=0)
    a = np.arange(diagonal.shape[1])
    reduced[:, a, a] += diagonal * np.broadcast_to(damping, diagonal.shape[:1])[:, None]
    ahead = np.einsum("knba,knb->na", jacobian, right[..., :4])
    ahead -= np.einsum("knab,knbc,knc->na", cross, inverse, own)
    covariance, good = _inverse(reduced)
    step = np.einsum("nab,nb->na", covariance, ahead)
    rest = own - np.einsum("knab,na->knb", cross, step)
    return step, np.einsum("knab,knb->kna", inverse, rest), good, covariance


def _climb(
    scans: Sequence[_Scan],
    begin: NDArray[np.float64],
    own: NDArray[np.float64],
    used: Bools,
    free: Bools,
    background: bool,
) -> tuple[_State, Bools]:
    """Raise the likelihood of n points; return where they end, and whether at the top."""
    n = len(begin)
    own = own.copy()
    if background:
        own[..., 1] = np.maximum(own[..., 1], 0)
    final = _evaluate(scans, begin, own, used)
    now, active = final.select(np.arange(n)), np.arange(n)
    now.own[..., 1] = np.maximum(now.own[..., 1], _FAINT * now.own[..., 0])
    top = np.zeros(n, np.bool_)
    damping, length, gain = np.zeros(n), np.full(n, np.inf), np.full(n, np.inf)
    active = np.flatnonzero(used.any(axis=0) & np.isfinite(final.height))
    now = now.select(active)
    damping, length, gain = damping[active], length[active], gain[active]
    for _ in range(_EVALUATIONS):
        if not len(active):
            break
        shown = used[:, active]
        step, own_step, good, _ = _solve(now, now.score, shown, free, background, damping)
        raw = np.concatenate(
            [np.einsum("knab,nb->kna", now.jacobian[..., free], step), own_step], 2
        )
        length = np.einsum("kna,knab,knb->n", raw, now.information, raw)
        trial, trial_own = _advance(scans, now, raw, step, own_step, free)
        last = good & (((damping == 0) & (length < _CLOSE)) | ((gain >= 0) & (gain < _CLOSE)))
        ended = last | ~good
        if ended.any():
            done = active[ended]
            final.put(done, now.select(ended))
            final.shared[active[last]] = trial[last]
            final.own[:, active[last]] = trial_own[:, last]
            top[active[last]] = True
        keep = ~ended
        active, now, shown = active[keep], now.select(keep), shown[:, keep]
        damping, length = damping[keep], length[keep]
        if not len(active):
            break
        part = [scan.select(active) for scan in scans]
        other = _evaluate(part, trial[keep], trial_own[:, keep], shown)
        gain = now.height - other.height
        higher = gain >= 0
        now.put(higher, other.select(higher))
        damping = np.where(
            higher, np.where(damping > 0.01, damping / 10, 0), np.maximum(10 * damping, 0.1)
        )
        # as high as it gets: at a kink of the likelihood there is no flat top
        stuck = ~higher & (length < _CLOSE)
        if stuck.any():
            final.put(active[stuck], now.select(stuck))
            top[active[stuck]] = True
            keep = ~stuck
            active, now = active[keep], now.select(keep)
            damping, length, gain = damping[keep], length[keep], gain[keep]
    final.put(active, now)
    return final, top


def _advance(
    scans: Sequence[_Scan],
    now: _State,
    raw: NDArray[np.float64],
    step: NDArray[np.float64],
    own_step: NDArray[np.float64],
    free: Bools,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return shared and own parameters after a step, shortened where it is too long."""
    thickness = 10 * now.shared[:, 3]
    longest = np.abs(raw[..., :2]).max(axis=(0, 2)) / _STEP_PX
    fringes = np.abs(raw[..., 2]).max(axis=0) * thickness / (2 * math.pi)
    longest = np.maximum(longest, fringes / _STEP_FRINGE)
    longest = np.maximum(longest, np.abs(raw[..., 3]).max(axis=0) / (_STEP_PART * thickness))
    part = 1 / np.maximum(longest, 1)
    shared = now.shared.copy()
    shared[:, free] += part[:, None] * step
    shared[:, 0] = np.clip(shared[:, 0], -0.5, 1)
    film = scans[0].plan.thickness / 10
    low, high = _THICKNESS_RANGE
    shared[:, 3] = np.clip(shared[:, 3], low * film, high * film)
    own = now.own + part[:, None] * own_step
    own[..., 0] = np.maximum(own[..., 0], now.own[..., 0] / 4)
    own[..., 1] = np.maximum(own[..., 1], _FAINT * own[..., 0])
    return shared, own


# ------------------------------------------------------------------------ results


@dataclass(eq=False)
class _Quality:
    """How well the patterns of n points are described."""

    excess: NDArray[np.float64]  # of the deviance, over its expectation
    spread: NDArray[np.float64]  # sd of the deviance
    largest: NDArray[np.float64]  # deviance of a pixel
    score: NDArray[np.float64]  # of the thickness, σ
    change: NDArray[np.float64]  # that it asks for, of its value
    signal: NDArray[np.float64]  # (k, n), scale in σ beside the background
    covariance: NDArray[np.float64]  # (n, s, s)
    regular: Bools

    def put(self, which: NDArray[Any], other: _Quality) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            values[(..., which) if field.name == "signal" else which] = getattr(other, field.name)


def _judge(
    scans: Sequence[_Scan], state: _State, used: Bools, free: Bools, background: bool
) -> _Quality:
    """Look how well the patterns are described where `_climb` has ended."""
    k, n = used.shape
    figures, together = np.zeros((k, n, 4)), np.zeros((k, n, 6))
    moments = deviance_moments()
    for i, scan in enumerate(scans):
        moved, which = _shifts(scan.plan, state.shared + scan.apart), np.flatnonzero(used[i])
        scan.goodness(which, moved, state.own[i], moments, figures[i], together[i])
    step, own_step, good, covariance = _solve(state, together, used, free, background, 0.0)
    raw = np.concatenate([np.einsum("knab,nb->kna", state.jacobian[..., free], step), own_step], 2)
    variance = figures[..., 2].sum(axis=0) - np.einsum("kna,kna->n", raw, together)
    moving = _eliminated(state, used, free, background, 0.0)[3]
    mean = figures[..., 1].sum(axis=0) - free.sum() - moving.sum(axis=(0, 2))
    own = state.information[..., 4:, 4:]
    with np.errstate(divide="ignore", invalid="ignore"):
        beside = np.where(moving[..., 1], own[..., 0, 1] ** 2 / own[..., 1, 1], 0)
        signal = state.own[..., 0] * np.sqrt(np.maximum(own[..., 0, 0] - beside, 0))
    score, change = _thickness_score(state, used, free, background)
    return _Quality(
        figures[..., 0].sum(axis=0) - mean,
        np.sqrt(np.maximum(variance, 1e-12)),
        figures[..., 3].max(axis=0),
        score,
        change,
        np.where(used, np.nan_to_num(signal), 0),
        covariance,
        good,
    )


def _thickness_score(
    state: _State, used: Bools, free: Bools, background: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score of a thickness that is not fitted, in σ, and the change that it asks for."""
    n = len(state.shared)
    if free[3]:
        return np.zeros(n), np.zeros(n)
    every = np.ones(4, np.bool_)
    shared, cross, inverse, moving = _eliminated(state, used, every, background, 0.0)
    matrix = (shared - cross @ inverse @ np.swapaxes(cross, 2, 3)).sum(axis=0)
    ahead = np.einsum("knba,knb->na", state.jacobian, state.score[..., :4])
    ahead -= np.einsum("knab,knbc,knc->na", cross, inverse, state.score[..., 4:] * moving)
    others, good = _inverse(matrix[:, :3, :3])
    slope = np.einsum("nab,nb->na", others, matrix[:, :3, 3])
    known = matrix[:, 3, 3] - np.einsum("na,na->n", slope, matrix[:, :3, 3])
    asked = ahead[:, 3] - np.einsum("na,na->n", slope, ahead[:, :3])
    good &= known > 0
    known = np.where(good, known, np.inf)
    return asked / np.sqrt(known), asked / known / state.shared[:, 3]


def _misfit(quality: _Quality, total: NDArray[np.float64]) -> Bools:
    """Whether the model cannot make the patterns, by the measures of `refine`."""
    above = quality.excess / quality.spread > LARGEST_DEVIANCE
    misfit: Bools = above & (quality.excess > MODEL_ERROR**2 * total.sum(axis=0))
    misfit |= quality.largest > LARGEST_PIXEL
    misfit |= (np.abs(quality.score) > LARGEST_SCORE) & (np.abs(quality.change) > THICKNESS_OFF)
    return misfit


def _estimates(
    state: _State,
    quality: _Quality,
    top: Bools,
    singles: Sequence[Estimates],
    used: Bools,
    total: NDArray[np.float64],
    free: Bools,
) -> Estimates:
    some = np.asarray(used.any(axis=0))
    sigma = np.sqrt(np.maximum(np.diagonal(quality.covariance, axis1=1, axis2=2), 0))
    known = some & top & quality.regular
    flags = np.where(some & ~(top & quality.regular), int(Flag.NOT_CONVERGED), 0)
    flags |= np.where(some & _misfit(quality, total * used), int(Flag.MISFIT), 0)
    faint = (quality.signal < LEAST_SIGNAL).all(axis=0)
    flags |= np.where(some & faint, int(Flag.FEW_COUNTS), 0)
    theirs = np.bitwise_or.reduce([single.flags for single in singles])
    theirs = np.where(theirs == 0, int(Flag.FRAME_MISSING), theirs)
    columns: dict[str, NDArray[Any]] = {
        "counts": (total * used).sum(axis=0),
        "background": np.where(
            some, (state.own[..., 1] * used).sum(axis=0) / np.maximum(used.sum(axis=0), 1), np.nan
        ),
        "deviance": np.where(some, quality.excess / quality.spread, np.nan),
        "flags": np.where(some, flags, theirs).astype(np.int64),
    }
    for a, name in enumerate(_SHARED):
        fitted = free[a]
        nothing = np.full(len(some), np.nan)
        columns[name] = np.where(some, state.shared[:, a], np.nan) if fitted else nothing
        columns[f"{name}_sigma"] = np.where(known, sigma[:, a], np.nan) if fitted else nothing
    return Estimates(**columns)


# ------------------------------------------------------------------------ the kernels


@kernel
def _sums(
    plan: ContinuousPlan,
    which: NDArray[np.int64],
    at: NDArray[np.int64],
    counts: NDArray[np.float32],
    light: NDArray[np.float32],
    moved: Floats,
    own: Floats,
    information: Floats,
    score: Floats,
    heights: Floats,
) -> None:
    """Fill information (n, 6, 6), score (n, 6) and heights (n,) of the points `which`.

    A scale that is not a number becomes the one that makes as many counts as there are.
    """
    ny, nx = counts.shape[1:]
    channels, seen = np.empty((5, nx, ny)), np.empty((nx, ny))
    used = np.empty((nx, ny))
    work, bits = np.empty((13, ny)), np.empty((2, ny), np.int32)
    pixels = 0.0
    for x in range(nx):
        for y in range(ny):
            used[x, y] = light[y, x]
            pixels += light[y, x]
    for i in which:
        pattern_channels(plan, moved[i, 0], moved[i, 1], moved[i, 2], moved[i, 3], channels)
        total = bright = 0.0
        for x in range(nx):
            for y in range(ny):
                seen[x, y] = counts[at[i], y, x]
                total += used[x, y] * counts[at[i], y, x]
                bright += used[x, y] * channels[0, x, y]
        if not own[i, 0] > 0:
            if not bright > 0:
                heights[i] = np.inf
                continue
            own[i, 0] = max((total - own[i, 1] * pixels) / bright, 0.1 * total / bright)
        if own[i, 1] < _FAINT * own[i, 0]:
            own[i, 1] = _FAINT * own[i, 0]
        heights[i] = poisson_sums(
            channels, own[i, 0], own[i, 1], seen, used, 0.0, work, bits, information[i], score[i]
        )


@kernel
def _goodness(
    plan: ContinuousPlan,
    which: NDArray[np.int64],
    at: NDArray[np.int64],
    counts: NDArray[np.float32],
    light: NDArray[np.float32],
    moved: Floats,
    own: Floats,
    moments: Floats,
    figures: Floats,
    together: Floats,
) -> None:
    """Fill figures (n, 4) and together (n, 6) with what `goodness` says of the points `which`."""
    ny, nx = counts.shape[1:]
    channels, seen = np.empty((5, nx, ny)), np.empty((nx, ny))
    used = np.empty((nx, ny))
    work, bits = np.empty((13, ny)), np.empty((2, ny), np.int32)
    for x in range(nx):
        for y in range(ny):
            used[x, y] = light[y, x]
    for i in which:
        pattern_channels(plan, moved[i, 0], moved[i, 1], moved[i, 2], moved[i, 3], channels)
        for x in range(nx):
            for y in range(ny):
                seen[x, y] = counts[at[i], y, x]
        deviance, mean, variance, largest = goodness(
            channels, own[i, 0], own[i, 1], seen, used, moments, work, bits, together[i]
        )
        figures[i, 0], figures[i, 1] = deviance, mean
        figures[i, 2], figures[i, 3] = variance, largest
