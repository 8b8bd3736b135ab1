"""`refine`: the most likely strain and tilts of a pattern, with honest error bars.

Poisson maximum likelihood of the continuous model by Fisher scoring, pattern by pattern, in
the coordinates in which a pattern is simplest: where the pupil lies on the detector
(shift_x, shift_y) and how far the film is off its Bragg condition (dq).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from nanobeam_bluesky.geometry import Geometry, RectangularPupil
from nanobeam_bluesky.models.correlation import PARAMETERS
from nanobeam_bluesky.models.estimates import (
    DEFAULT_FIT,
    MIN_COUNTS,
    Estimates,
    Flag,
    check_fit,
)
from nanobeam_bluesky.models.search import Likeliest, likeliest
from nanobeam_bluesky.physics._numba import in_threads, kernel
from nanobeam_bluesky.physics.continuous import (
    ContinuousPlan,
    angles,
    continuous_plan,
    pattern_channels,
    shift_derivatives,
    shifts,
)
from nanobeam_bluesky.physics.likelihood import deviance_moments, goodness, poisson_sums

__all__ = ["refine"]

Floats = NDArray[np.floating[Any]]

# order of the kernel's parameters; lengths in binned pixels, dq in Å⁻¹, thickness in Å
_X, _Y, _DQ, _THICKNESS, _BLUR, _SCALE, _BACKGROUND = range(7)
_P = 7
_SHIFTS = 3  # the first of them

_TOP, _LOST, _DARK = range(3)  # how a fit ends: at the maximum, not, or without any light

_EVALUATIONS = 60
_CLOSE = 0.02  # squared distance to the maximum, in σ, from which the last step is taken
_FAINT = 1e-6  # least background, in units of the scale: what a blurred rim ends in
_STEP_PX = 4.0  # longest step of a shift
_STEP_FRINGE = 0.25  # longest step of t dq / 2π
_LONGEST = (_STEP_PX, _STEP_PX, _STEP_FRINGE)
_TRUST = 4.0  # longest first step, in σ of the start, …
_LEAST_STEP = (0.5, 0.5, 0.03)  # … but at least this: shifts, t dq / 2π
_STEP_PART = 0.25  # longest step of thickness and blur, of their value
_THICKNESS_RANGE = (0.25, 4.0)  # of the geometry's
_BLUR_NODES = (0.7, 0.9, 1.1, 1.3)  # blurs that are computed, of the geometry's; cubic between

# A valid pattern passes each with 99.9 %, a better one than the must of all together
LARGEST_DEVIANCE = 4.0
LARGEST_PIXEL = 30.0  # deviance of one: 5.5 σ
LEAST_SIGNAL = 6.0  # scale in σ beside background: below, a fit to nothing is no surprise
LARGEST_SCORE = 3.3  # of the thickness, in σ …
THICKNESS_OFF = 0.1  # … where it also is off by this part
MODEL_ERROR = 0.05  # no misfit below this root mean square error of the model

_JUMP = 8.0  # farther from the start, in σ of both, is no surprise only for a bad start
_WIDE_PX = 0.25  # σ of a shift from which the likelihood may have other maxima along it, …
_WIDE_SHARP_PX = 0.1  # … of a perfectly sharp pupil, whose likelihood has kinks; …
_DOUBTED_SHARP_PX = 0.07  # … and from here on where a point nearby is more likely
_UNKNOWN_PX = 1.0  # the same of the start
_ASIDE = 12  # steps to either side to look for them, …
_ASIDE_PX = 2.0  # … of this
_STAR = np.array([(1, 0), (0, 1), (1, 1), (1, -1)])  # in these directions, if a rim is round
_GROWTHS = np.linspace(1e-3, 1, 500)  # of steps, …
_REACHES = np.sinh(_ASIDE * _GROWTHS) / _GROWTHS  # … with which they reach so many of the first
_FINER = 5  # times, until the steps are no wider than what is found
_SAMPLES = 256  # of the likelihood around a vague maximum, half of them twice as far away
_LEAST_SAMPLES = 10.0  # that count
_TRIED = 16  # of them, for whether a sharp pupil's maximum is one
_LOST_PX = 50.0  # σ beyond which a shift is not known at all
_LEAD = 4.0  # deviance by which another must be better: the start knew something, too
LEAST_BLUR_PX = 0.25  # of straight edges: sharper, they have a maximum in every pixel column
_CLOSE_CALL = 10.0  # log likelihood by which the library's first choice must lead the second


class Fitted(NamedTuple):
    """What the kernel finds, in the order of its parameters; arrays of length n."""

    values: NDArray[np.float64]  # (n, 7)
    covariance: NDArray[np.float64]  # (n, 7, 7), 0 for what is not fitted
    quality: NDArray[np.float64]
    """(n, 7): deviance, its expectation and variance, a pixel's largest, the scale in σ beside
    the background, the thickness' score in σ and the change that it asks for, of its value."""
    converged: NDArray[np.bool_]


def refine(
    patterns: NDArray[Any],
    start: Estimates | None,
    geometry: Geometry,
    *,
    fit: Sequence[str] = DEFAULT_FIT,
    mask: NDArray[np.bool_] | None = None,
    ranges: Mapping[str, float] | None = None,
) -> Estimates:
    """Maximise the Poisson likelihood of the continuous model, from a first estimate.

    Parameters
    ----------
    patterns
        (n, ny, nx), counts.
    start
        First estimates of strain, ω and χ, n points, as of a network. Where one is not
        finite, the fit starts from zero. Where all three have σ, these say how far the first
        steps may go. The thickness, if fitted, starts from the geometry's where there is none.
        None: those of `library_search`.
    geometry
        The geometry. The straight edges of a rectangular pupil count as blurred by 0.25 binned
        pixels at least: perfectly sharp ones, which nothing has, leave no regular likelihood.
    fit
        "strain", "omega", "chi", "scale", and of "background", "thickness" and "blur" what
        is unknown too. Otherwise there is no background, and thickness and blur are the
        geometry's. The blur is found within 0.7 to 1.3 of the geometry's.
    mask
        True for pixels to leave out, (ny, nx) or (n, ny, nx).
    ranges
        Of the library that `library_search` takes, where it is needed.

    Returns
    -------
    Estimates
        n points. σ is the root of the inverse Fisher information's diagonal, everything
        in `fit` unknown. Flags: FEW_COUNTS below `MIN_COUNTS` counts, where the start is
        kept, and where there is nothing but background; NOT_CONVERGED; MISFIT where deviance,
        a single pixel or the thickness tells that the model cannot make this pattern, where
        there are fractions of counts, and where pixels are negative or not finite (no values).

    Raises
    ------
    ValueError
        If the arrays do not fit together, or `fit` names what cannot be fitted.

    Notes
    -----
    Source of the model: Luo et al., Sci. Rep. (2025), doi 10.1038/s41598-025-97183-0.
    Fisher scoring: Newton steps with the expected instead of the observed information,
    damped (Levenberg) where a step would not raise the likelihood.

    Where this ends at no maximum, at a misfit, or 8 σ from where it started, or where that was
    known to 4 pixels or 1/4 fringe only, it is done again from the library's likeliest pattern,
    or from the second one if it has been near the first; so it is where a fit starts from the
    library and two of its patterns are about as likely. The better of both fits counts.

    Where a shift is known to 0.25 pixels only (0.1, if the pupil is perfectly sharp, or 0.07, if
    that maximum is a small one), the mean and the covariance of the posterior are returned
    instead of the maximum and its curvature.
    """
    return refine_checked(check(patterns, geometry, mask), start, geometry, fit, mask, ranges)


def refine_checked(
    checked: Checked,
    start: Estimates | None,
    geometry: Geometry,
    fit: Sequence[str],
    mask: NDArray[np.bool_] | None,
    ranges: Mapping[str, float] | None = None,
) -> Estimates:
    """Do what `refine` does, with what `check` has found."""
    counts, total, broken = checked.counts, checked.total, checked.broken
    n = len(counts)
    if start is not None and len(start) != n:
        raise ValueError(f"start has {len(start)} points for {n} patterns")
    if isinstance(geometry.optics, RectangularPupil) and geometry.pupil_blur_px < LEAST_BLUR_PX:
        geometry = geometry.model_copy(update={"pupil_blur_px": LEAST_BLUR_PX})
    lit = (total >= MIN_COUNTS) & ~broken
    plan = continuous_plan(geometry)

    def search(which: Any) -> Likeliest:
        shown = counts[which]
        if broken[which].any():
            shown = np.where(broken[which, None, None], np.float32(0), shown)
        hidden = mask[which] if mask is not None and mask.ndim == 3 else mask
        return likeliest(shown, geometry, ranges=ranges, mask=hidden)

    def used(which: Any) -> NDArray[np.float32]:
        if mask is None:
            return np.ones((1, *geometry.pattern_shape), np.float32)
        return (~(mask[which] if mask.ndim == 3 else mask[None])).astype(np.float32)

    def fit_from(begin: Floats, reach: Floats, which: Any) -> Fitted:
        return fit_shifts(
            counts[which], begin, geometry, fit=fit, used=used(which), which=lit[which], reach=reach
        )

    def heights(points: Floats, which: Any) -> Floats:
        shown, masks, out = counts[which], used(which), np.empty(points.shape[:2])
        background = fitted.values[which, _BACKGROUND]
        in_threads(
            lambda part: _heights(
                plan, shown[part], masks[part] if len(masks) > 1 else masks,
                points[part], background[part], out[part],
            ),
            len(points),
        )  # fmt: skip
        return out

    found, everything = None, slice(None)
    if start is None:
        found = search(everything)
        start = found.first
    begin, reach, sigma = _begin(start, plan, "thickness" in fit)
    fitted = fit_from(begin, reach, everything)
    estimates = _estimates(fitted, plan, fit, total, lit, start)
    again = lit & ((estimates.flags & (Flag.NOT_CONVERGED | Flag.MISFIT)) > 0)
    again |= lit & ((sigma > _LONGEST).any(axis=1) | _jumped(estimates, start))
    if found is not None:
        again |= lit & (found.lead < _CLOSE_CALL)
    if again.any():
        which = np.flatnonzero(again)
        choices = found.select(which) if found is not None else search(which)
        been = _near(choices, start.select(which)) | _near(choices, estimates.select(which))
        other = choices.first.put(been, choices.second.select(been))
        other = replace(other, thickness=start.thickness[which])
        begin, reach, _ = _begin(other, plan, "thickness" in fit)
        _keep_better(fitted, fit_from(begin, reach, which), which)
        estimates = _estimates(fitted, plan, fit, total, lit, start)
    vague = _WIDE_PX if geometry.pupil_blur_px else _WIDE_SHARP_PX
    for axis in (_X,) if plan.round else (_X, _Y):
        wide = np.sqrt(fitted.covariance[:, axis, axis]) > vague
        wide |= sigma[:, axis] > _UNKNOWN_PX
        middle, width = _plateau(plan, axis)
        wide |= np.abs(fitted.values[:, axis] - middle) < width / 2 + _ASIDE_PX
        which = np.flatnonzero(lit & fitted.converged & wide)
        if len(which):
            parameters = 4 if "thickness" in fit else 3
            _look_aside(fitted, fit_from, heights, axis, which, parameters, plan.round)
            estimates = _estimates(fitted, plan, fit, total, lit, start)
    widest = fitted.covariance[:, (_X, _Y), (_X, _Y)].max(axis=1)
    wide = widest > vague**2
    if not geometry.pupil_blur_px:
        tried = lit & fitted.converged & ~wide & (widest > _DOUBTED_SHARP_PX**2)
        wide[_doubtful(fitted, heights, np.flatnonzero(tried))] = True
    which = np.flatnonzero(lit & fitted.converged & wide)
    if len(which):
        _average(fitted, heights, which)
        estimates = _estimates(fitted, plan, fit, total, lit, start)
    flags = estimates.flags | np.where(checked.fractional, int(Flag.MISFIT), 0)
    estimates = replace(estimates, flags=flags)
    return estimates.put(broken, Estimates.empty(int(broken.sum()), Flag.MISFIT))


def _begin(
    start: Estimates, plan: ContinuousPlan, thickness: bool
) -> tuple[Floats, Floats, Floats]:
    """In the kernel's parameters: where to start, the longest first step, and the start's σ.

    (n, 3 or 4), (n, 3) and (n, 3), the latter two in pixels and fringes. A start whose σ is
    longer than any step is worse than the library's.
    """
    strain, omega, chi = (
        np.where(np.isfinite(v), v, 0.0) for v in (start.strain, start.omega, start.chi)
    )
    strain = np.clip(strain, -0.5, 1)
    first = np.stack(shifts(plan, strain, omega, chi), 1)
    slopes = shift_derivatives(plan, strain, omega, chi)[:, :3, :3]
    slopes[:, _DQ] *= plan.thickness / (2 * math.pi)
    known = np.stack([start.strain_sigma, start.omega_sigma, start.chi_sigma], 1)
    sigma = np.sqrt(np.einsum("nij,nj->ni", slopes**2, known**2))
    trusted = np.clip(_TRUST * sigma, _LEAST_STEP, _LONGEST)
    reach = np.where(np.isfinite(sigma), trusted, _LONGEST)
    # where the fringes are known and the pupil is less so, strain and ω err against each other:
    # dq, their sum, does not
    parts = np.abs(slopes[:, _DQ, :2]) * known[:, :2]
    near = sigma[:, _X] < _UNKNOWN_PX
    sigma[near, _DQ] = np.abs(parts[near, 0] - parts[near, 1])
    if thickness:
        part = np.nan_to_num(10 * start.thickness / plan.thickness, nan=1.0)
        first = np.column_stack([first, np.clip(part, *_THICKNESS_RANGE) * plan.thickness])
    return first, reach, sigma


def _jumped(estimates: Estimates, start: Estimates) -> NDArray[np.bool_]:
    """Whether a fit ended where the start's σ say that it should not, (n,)."""
    jumped = np.zeros(len(estimates), np.bool_)
    for name in PARAMETERS:
        way = np.abs(getattr(estimates, name) - getattr(start, name))
        sigma = [getattr(each, f"{name}_sigma") for each in (estimates, start)]
        jumped |= way > _JUMP * np.hypot(*sigma)
    return jumped


def _plateau(plan: ContinuousPlan, axis: int) -> tuple[float, float]:
    """Middle and width of the shifts at which a pupil's edges are both off the ROI.

    The width is negative where there are none.
    """
    borders = plan.rows if axis == _Y else plan.borders
    low, high = float(borders.min()), float(borders.max())
    return -(low + high) / 2, 2 * float(plan.pupil[0, 0 if axis == _X else 1]) - (high - low)


def _near(choices: Likeliest, estimates: Estimates) -> NDArray[np.bool_]:
    """Whether estimates are neighbours of the library's first choice, (n,)."""
    near = np.ones(len(estimates), np.bool_)
    for name, step in zip(PARAMETERS, choices.steps, strict=True):
        near &= np.abs(getattr(estimates, name) - getattr(choices.first, name)) <= step
    return near


def _keep_better(fitted: Fitted, other: Fitted, which: NDArray[np.intp]) -> None:
    """Put other fits of the patterns `which` where they are better."""
    lead = fitted.quality[which, 0] - other.quality[:, 0]  # not a number without any light
    better = other.converged & ~fitted.converged[which] & ~(lead < -_LEAD)
    better |= (other.converged == fitted.converged[which]) & (lead > 0)
    for ours, theirs in zip(fitted, other, strict=True):
        ours[which[better]] = theirs[better]


def _look_aside(
    fitted: Fitted,
    fit_from: Callable[[Floats, Floats, Any], Fitted],
    heights: Callable[[Floats, Any], Floats],
    axis: int,
    which: NDArray[np.intp],
    parameters: int,
    round_: bool,
) -> None:
    """Look along a shift of the patterns `which`: for a higher maximum, then how wide it is.

    A thick film's light may not reach the ends of the pupil. Then dq is well known, shift_x is
    not, and the likelihood along it may have several maxima, often one in every pixel column;
    where an edge is dark, or off the ROI, it is flat far and wide. Returned are the
    posterior's mean along the shift and its σ; all else goes along as the covariance says.
    """
    steps = np.arange(-_ASIDE, _ASIDE + 1)
    rays = _STAR if round_ else np.eye(2)[[axis]]
    aside = (_ASIDE_PX * steps[:, None, None] * rays).reshape(-1, 2)
    points = np.repeat(fitted.values[which, None], len(aside), axis=1)
    points[:, :, (_X, _Y)] += aside
    found = heights(points, which)
    here = found[:, len(aside) // 2]
    best = aside[found.argmin(axis=1)]
    higher = (found.min(axis=1) < here - _LEAD) & (np.abs(best) > _ASIDE_PX).any(axis=1)
    if higher.any():
        begin = fitted.values[which[higher], :parameters]
        begin[:, (_X, _Y)] += best[higher]
        reach = np.tile(_LONGEST, (len(begin), 1))
        _keep_better(fitted, fit_from(begin, reach, which[higher]), which[higher])
    for shift in (_X, _Y):  # one of which nothing is seen goes with nothing
        lost = which[fitted.covariance[which, shift, shift] > _LOST_PX**2]
        fitted.covariance[lost, shift] = fitted.covariance[lost, :, shift] = 0
        fitted.covariance[lost, shift, shift] = _LOST_PX**2
    which = which[fitted.converged[which] & (fitted.covariance[which, axis, axis] > 0)]
    variance = fitted.covariance[which, axis, axis]
    along = fitted.covariance[which, axis] / variance[:, None]
    mean, width, sigma = 0 * variance, 0 * variance, np.minimum(np.sqrt(variance), _ASIDE_PX)
    left = np.arange(len(which))
    for _ in range(_FINER):
        # σ apart at the mean, farther and farther apart away from it
        apart, middle = sigma[left, None], mean[left, None]
        growth = np.interp(_ASIDE * _ASIDE_PX / apart, _REACHES, _GROWTHS)
        offsets = middle + apart * np.sinh(growth * steps) / growth
        points = fitted.values[which[left], None] + offsets[:, :, None] * along[left, None]
        found = heights(points, which[left])
        apart = apart * np.cosh(growth * steps)
        weight = apart * np.exp(-0.5 * (found - found.min(axis=1, keepdims=True)))
        weight /= weight.sum(axis=1, keepdims=True)
        mean[left] = (weight * offsets).sum(axis=1)
        width[left] = (weight * (offsets - mean[left, None]) ** 2).sum(axis=1)
        at_most = np.sqrt(width[left] + (weight * apart**2).sum(axis=1) / 12)
        narrow = at_most < sigma[left] / 2  # it may be narrower than they are apart
        left = left[narrow]
        sigma[left] = at_most[narrow]
        if len(left) == 0:
            break
    more = width - variance
    fitted.values[which] += mean[:, None] * along
    fitted.covariance[which] += more[:, None, None] * along[:, :, None] * along[:, None, :]


def _average(
    fitted: Fitted, heights: Callable[[Floats, Any], Floats], which: NDArray[np.intp]
) -> None:
    """Put the posterior's mean, which has the least expected square error, and its covariance.

    Over all three shifts of the patterns `which`, as a vague maximum is neither symmetric nor
    straight, by importance sampling; all else goes along as the covariance says. Patterns of
    which too few samples count are left as they are.
    """
    which = _told_apart(fitted, which)
    if len(which) == 0:
        return
    samples, log_density = _samples()
    known = fitted.covariance[which, :_SHIFTS, :_SHIFTS]
    offsets, along, points = _around(fitted, which, samples)
    found = heights(points, which)
    found[(np.abs(offsets[:, :, : _Y + 1]) > _ASIDE * _ASIDE_PX).any(axis=2)] = np.inf
    weight = -0.5 * found - log_density
    best = weight.max(axis=1, keepdims=True)
    weight = np.exp(weight - np.where(np.isfinite(best), best, 0))
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1)  # 0 where nothing is lit
    count = 1 / np.maximum((weight**2).sum(axis=1), 1e-300)
    mean = np.einsum("nm,nmi->ni", weight, offsets)
    offsets -= mean[:, None]
    more = np.einsum("nm,nmi,nmj->nij", weight, offsets, offsets) - known
    enough = (count > _LEAST_SAMPLES) & np.isfinite(best[:, 0])
    which, along = which[enough], along[enough]
    fitted.values[which] += (along @ mean[enough, :, None])[:, :, 0]
    fitted.covariance[which] += along @ more[enough] @ along.swapaxes(1, 2)


def _told_apart(fitted: Fitted, which: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return those of the patterns whose three shifts are known each."""
    known = fitted.covariance[which, :_SHIFTS, :_SHIFTS]
    sigma = np.sqrt(np.maximum(np.diagonal(known, axis1=1, axis2=2), 1e-300))
    apart = np.linalg.eigvalsh(known / (sigma[:, :, None] * sigma[:, None, :]))[:, 0]
    return which[apart > 1e-9]


def _around(
    fitted: Fitted, which: NDArray[np.intp], samples: Floats
) -> tuple[Floats, Floats, Floats]:
    """Return points around the patterns' maxima, of samples (m, 3) in σ of the shifts.

    As offsets of the shifts (n, m, 3), by how much everything goes along with these (n, 7, 3),
    and points (n, m, 7).
    """
    covariance = fitted.covariance[which]
    known = covariance[:, :_SHIFTS, :_SHIFTS]
    along = covariance[:, :, :_SHIFTS] @ np.linalg.inv(known)  # 1 for the shifts themselves
    offsets = samples @ np.linalg.cholesky(known).swapaxes(1, 2)
    return offsets, along, fitted.values[which, None] + offsets @ along.swapaxes(1, 2)


def _doubtful(
    fitted: Fitted, heights: Callable[[Floats, Any], Floats], which: NDArray[np.intp]
) -> NDArray[np.intp]:
    """Return those of the patterns of which a point near the maximum is more likely than it.

    A sharp rim must light every pixel that has counts, whence many small maxima.
    """
    which = _told_apart(fitted, which)
    samples = np.vstack([np.zeros(_SHIFTS), _samples()[0][:_TRIED]])
    found = heights(_around(fitted, which, samples)[2], which)
    nearby: Floats = found[:, 1:].min(axis=1)
    return which[nearby < found[:, 0]]


@lru_cache(maxsize=1)
def _samples() -> tuple[Floats, Floats]:
    """Points of two Gaussians, of σ 1 and 2, and the logarithm of their density, but for a sum.

    (m, 3) and (m,); evenly spread, by multiples of the powers of the root of x⁴ = x + 1.
    """
    steps = 1.2207440846057596 ** -np.arange(1.0, _SHIFTS + 1)
    even = (0.5 + np.arange(1, _SAMPLES + 1)[:, None] * steps) % 1
    widths = np.array([1.0, 2.0])
    points = ndtri(even) * np.resize(widths, _SAMPLES)[:, None]
    exponent = -0.5 * (points**2).sum(axis=1)[:, None] / widths**2
    return points, np.log((np.exp(exponent) / widths**_SHIFTS).sum(axis=1))


def fit_shifts(
    counts: NDArray[np.float32],
    start: Floats,
    geometry: Geometry,
    *,
    fit: Sequence[str],
    used: NDArray[np.float32],
    which: NDArray[np.bool_],
    reach: Floats | None = None,
) -> Fitted:
    """Fit in the kernel's own parameters.

    Parameters
    ----------
    counts
        (n, ny, nx).
    start
        (n, 3), shift_x, shift_y, dq, or (n, 4), with the thickness.
    geometry, fit
        As for `refine`.
    used
        (n or 1, ny, nx), 1 or 0.
    which
        (n,), the patterns to fit.
    reach
        (n, 3), the longest first step of shift_x, shift_y and t dq / 2π.
    """
    check_fit(fit)
    plans, blurs = _plans(geometry, "blur" in fit)
    free = np.ones(_P, np.bool_)
    free[_THICKNESS] = "thickness" in fit
    free[_BLUR] = "blur" in fit
    free[_BACKGROUND] = "background" in fit
    n = len(counts)
    if reach is None:
        reach = np.tile(_LONGEST, (n, 1))
    values = np.zeros((n, _P))
    values[:, _THICKNESS] = plans[0].thickness
    values[:, : start.shape[1]] = start
    values[:, _BLUR] = geometry.pupil_blur_px
    covariance = np.zeros((n, _P, _P))
    quality = np.full((n, 7), np.nan)
    converged = np.zeros(n, np.bool_)
    indices = np.flatnonzero(which)
    moments = deviance_moments()
    in_threads(
        lambda part: _fit(
            plans, blurs, indices[part], counts, used, free, moments, reach,
            values, covariance, quality, converged,
        ),
        len(indices),
    )  # fmt: skip
    return Fitted(values, covariance, quality, converged)


class Checked(NamedTuple):
    """Patterns that have the right shape, and what is wrong with some; arrays of length n."""

    counts: NDArray[np.float32]  # (n, ny, nx), 0 under the mask
    total: NDArray[np.float64]
    broken: NDArray[np.bool_]  # whether a pixel is negative or not finite
    fractional: NDArray[np.bool_]  # whether one is not a whole number


def check(patterns: NDArray[Any], geometry: Geometry, mask: NDArray[np.bool_] | None) -> Checked:
    """Check patterns and mask, as of `refine`."""
    patterns = np.asarray(patterns)
    ny, nx = geometry.pattern_shape
    if patterns.ndim != 3 or patterns.shape[1:] != (ny, nx):
        raise ValueError(f"patterns of shape {patterns.shape}: expected (n, {ny}, {nx})")
    if patterns.dtype.kind not in "uifb":
        raise ValueError(f"patterns of type {patterns.dtype}: expected numbers")
    if mask is not None and (
        mask.dtype != np.bool_ or mask.shape not in ((ny, nx), patterns.shape)
    ):
        raise ValueError(
            f"mask of type {mask.dtype} and shape {mask.shape}: expected bool, ({ny}, {nx}) "
            f"or {patterns.shape}"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is flagged
        counts = np.ascontiguousarray(patterns, dtype=np.float32)
    if mask is not None:
        counts = np.where(mask, np.float32(0), counts)
    n = len(counts)
    total, broken, fractional = np.zeros(n), np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    pixels = counts.reshape(n, ny * nx)
    in_threads(lambda part: _inspect(pixels[part], total[part], broken[part], fractional[part]), n)
    return Checked(counts, total, broken, fractional)


def _estimates(
    fitted: Fitted,
    plan: ContinuousPlan,
    fit: Sequence[str],
    total: NDArray[np.float64],
    lit: NDArray[np.bool_],
    start: Estimates,
) -> Estimates:
    """From the kernel's parameters to `Estimates`."""
    values = fitted.values
    strain, omega, chi = angles(plan, *values[:, :3].T)
    inverse = np.linalg.inv(shift_derivatives(plan, strain, omega, chi))
    variance = np.einsum("nij,njk,nik->ni", inverse, fitted.covariance[:, :4, :4], inverse)
    deviance, expected, spread, largest, signal, score, change = fitted.quality.T
    excess = deviance - expected
    with np.errstate(invalid="ignore"):  # not a number where there is nothing
        normalised = excess / np.sqrt(spread)
        sigma = np.where(variance > 0, np.sqrt(variance), np.nan)
    misfit = (
        ((normalised > LARGEST_DEVIANCE) & (excess > MODEL_ERROR**2 * total))
        | (largest > LARGEST_PIXEL)
        | ((np.abs(score) > LARGEST_SCORE) & (np.abs(change) > THICKNESS_OFF))
    )
    faint = signal < LEAST_SIGNAL
    flags = np.where(lit & ~faint, 0, int(Flag.FEW_COUNTS))
    flags |= np.where(lit & ~fitted.converged, int(Flag.NOT_CONVERGED), 0)
    flags |= np.where(lit & misfit, int(Flag.MISFIT), 0)

    def where_lit(value: NDArray[np.float64], otherwise: Any = np.nan) -> NDArray[np.float64]:
        return np.where(lit, value, otherwise)

    dark = values[:, _BACKGROUND] <= 1.001 * _FAINT * values[:, _SCALE]
    thickness = "thickness" in fit
    nothing = np.full(len(lit), np.nan)
    return Estimates(
        strain=where_lit(strain, start.strain),
        strain_sigma=where_lit(sigma[:, 0]),
        omega=where_lit(omega, start.omega),
        omega_sigma=where_lit(sigma[:, 1]),
        chi=where_lit(chi, start.chi),
        chi_sigma=where_lit(sigma[:, 2]),
        thickness=where_lit(values[:, _THICKNESS] / 10) if thickness else nothing,
        thickness_sigma=where_lit(sigma[:, 3]) if thickness else nothing,
        counts=total,
        background=where_lit(np.where(dark, 0.0, values[:, _BACKGROUND])),
        deviance=where_lit(normalised),
        flags=flags.astype(np.int64),
    )


@lru_cache(maxsize=4)
def _plans(
    geometry: Geometry, fit_blur: bool
) -> tuple[tuple[ContinuousPlan, ...], NDArray[np.float64]]:
    """Plans of the blurs between which the model is interpolated, and these blurs."""
    if not fit_blur:
        return (continuous_plan(geometry),), np.array([geometry.pupil_blur_px])
    if geometry.pupil_blur_px == 0:
        raise ValueError(
            "fit holds 'blur', but the geometry's pupil_blur_px is 0; give a first value, e.g. 0.5"
        )
    blurs = np.array([node * geometry.pupil_blur_px for node in _BLUR_NODES])
    plans = [
        continuous_plan(geometry.model_copy(update={"pupil_blur_px": float(blur)}))
        for blur in blurs
    ]
    return tuple(plans), blurs


# ------------------------------------------------------------------------ the kernel


@kernel
def _inspect(
    counts: NDArray[np.float32],
    total: Floats,
    broken: NDArray[np.bool_],
    fractional: NDArray[np.bool_],
) -> None:
    """Look at every pixel of patterns (n, pixels); fills the others, (n,)."""
    for i in range(counts.shape[0]):
        for value in counts[i]:
            if not 0 <= value < np.inf:
                broken[i] = True
            elif value != math.floor(value):
                fractional[i] = True
            total[i] += value


@kernel
def _model(
    plans: tuple[ContinuousPlan, ...],
    blurs: Floats,
    values: Floats,
    channels: Floats,
    one: Floats,
) -> None:
    """Fill channels (6, nx, ny): the pattern and its derivatives by the first five values."""
    if len(plans) == 1:
        pattern_channels(
            plans[0], values[_X], values[_Y], values[_DQ], values[_THICKNESS], channels[:5]
        )
        return
    channels[:] = 0
    blur = values[_BLUR]
    for i in range(len(plans)):
        # Lagrange's polynomial and its slope
        weight, slope = 1.0, 0.0
        for j in range(len(plans)):
            if j != i:
                step = 1 / (blurs[i] - blurs[j])
                slope = slope * (blur - blurs[j]) * step + weight * step
                weight *= (blur - blurs[j]) * step
        pattern_channels(plans[i], values[_X], values[_Y], values[_DQ], values[_THICKNESS], one)
        for x in range(one.shape[1]):
            for y in range(one.shape[2]):
                for k in range(5):
                    channels[k, x, y] += weight * one[k, x, y]
                channels[5, x, y] += slope * one[0, x, y]


@kernel
def _heights(
    plan: ContinuousPlan,
    counts: NDArray[np.float32],
    masks: NDArray[np.float32],
    points: Floats,
    backgrounds: Floats,
    out: Floats,
) -> None:
    """Fill out (n, m): −2 log likelihood at points (n, m, 4 or more), with backgrounds (n,).

    The scale is the most likely one. A background may be light that the pupil has where the
    fit was, but not where the point is: it counts as none where that is likelier.
    """
    n, ny, nx = counts.shape
    pattern = np.zeros((1, nx, ny))
    for i in range(n):
        mask = masks[i if masks.shape[0] > 1 else 0]
        total = pixels = 0.0
        for x in range(nx):
            for y in range(ny):
                total += mask[y, x] * counts[i, y, x]
                pixels += mask[y, x]
        for j in range(out.shape[1]):
            trial, background = points[i, j], backgrounds[i]
            pattern_channels(plan, trial[_X], trial[_Y], trial[_DQ], trial[_THICKNESS], pattern)
            light = 0.0
            for x in range(nx):
                for y in range(ny):
                    light += mask[y, x] * pattern[0, x, y]
            out[i, j] = np.inf
            if not light > 0:  # nor where it is not a number
                continue
            for _ in range(2):
                scale = max((total - background * pixels) / light, 0.1 * total / light)
                floor = max(background, _FAINT * scale)
                value = scale * light + floor * pixels
                for x in range(nx):
                    for y in range(ny):
                        if mask[y, x] * counts[i, y, x] > 0:
                            value -= counts[i, y, x] * math.log(
                                max(scale * pattern[0, x, y], 0.0) + floor
                            )
                out[i, j] = min(out[i, j], 2 * value)
                if background == 0:
                    break
                background = 0.0


@kernel
def _solve(
    information: Floats, score: Floats, free: NDArray[np.bool_], damping: float,
    factor: Floats, step: Floats,
) -> bool:  # fmt: skip
    """Solve (information + damping · its diagonal) step = score for the free parameters.

    Leaves the Cholesky factor of the free block in `factor` (rows of the others are zero);
    False where there is none.
    """
    step[:] = 0
    factor[:] = 0
    for a in range(_P):
        if not free[a]:
            continue
        for b in range(a + 1):
            if not free[b]:
                continue
            value = information[a, b] * (1 + damping if a == b else 1.0)
            for k in range(b):
                value -= factor[a, k] * factor[b, k]
            if a > b:
                factor[a, b] = value / factor[b, b]
            elif value > 1e-12 * information[a, a]:
                factor[a, a] = math.sqrt(value)
            else:
                return False
    for a in range(_P):
        if free[a]:
            value = score[a]
            for k in range(a):
                value -= factor[a, k] * step[k]
            step[a] = value / factor[a, a]
    for a in range(_P - 1, -1, -1):
        if free[a]:
            value = step[a]
            for k in range(a + 1, _P):
                value -= factor[k, a] * step[k]
            step[a] = value / factor[a, a]
    return True


@kernel
def _invert(factor: Floats, free: NDArray[np.bool_], out: Floats) -> None:
    """Inverse of the matrix whose Cholesky factor `_solve` left; 0 for what is not free."""
    inverse = np.zeros((_P, _P))  # of the factor
    for a in range(_P):
        if not free[a]:
            continue
        inverse[a, a] = 1 / factor[a, a]
        for b in range(a):
            if free[b]:
                value = 0.0
                for k in range(b, a):
                    value += factor[a, k] * inverse[k, b]
                inverse[a, b] = -value / factor[a, a]
    for a in range(_P):
        for b in range(_P):
            value = 0.0
            for k in range(max(a, b), _P):
                value += inverse[k, a] * inverse[k, b]
            out[a, b] = value


class _Space(NamedTuple):
    """Arrays that the patterns of one thread use one after the other."""

    counts: Floats  # (nx, ny)
    used: Floats  # (nx, ny)
    channels: Floats  # (5 or 6, nx, ny), the model
    one: Floats  # (0 or 5, nx, ny), the model at one blur
    work: Floats
    bits: NDArray[np.int32]
    small: Floats  # (k + 1, k + 1): information without what is not modelled
    small_score: Floats
    information: Floats  # (7, 7), at `now`
    score: Floats  # (7,), at `now`
    factor: Floats  # (7, 7)
    step: Floats  # (7,)
    now: Floats  # (7,), the best values so far
    trial: Floats  # (7,), the values to try next
    free: NDArray[np.bool_]  # (7,), what is fitted
    moving: NDArray[np.bool_]  # (7,), what is fitted and not at its limit
    reach: Floats  # (3,), the longest step of shift_x, shift_y and t dq / 2π


@kernel
def _first_brightness(space: _Space) -> bool:
    """Scale and background from the pixels that the model says are lit, and the dark ones."""
    pattern, counts, used = space.channels[0], space.counts, space.used
    peak = 0.0
    for x in range(pattern.shape[0]):
        for y in range(pattern.shape[1]):
            peak = max(peak, pattern[x, y])
    light = lit = dark = 0.0
    n_lit = n_dark = 0
    for x in range(pattern.shape[0]):
        for y in range(pattern.shape[1]):
            if used[x, y] == 0:
                continue
            if pattern[x, y] > 0.02 * peak:
                light += pattern[x, y]
                lit += counts[x, y]
                n_lit += 1
            else:
                dark += counts[x, y]
                n_dark += 1
    if light <= 0:
        return False
    floor = dark / n_dark if n_dark > 0 and space.free[_BACKGROUND] else 0.0
    scale = (lit - floor * n_lit) / light
    if scale <= 0:
        scale = (lit + dark) / light
    space.trial[_SCALE] = scale
    space.trial[_BACKGROUND] = max(floor, _FAINT * scale)
    return True


@kernel
def _advance(
    plan: ContinuousPlan, blurs: Floats, reach: Floats, values: Floats, step: Floats, trial: Floats
) -> None:
    """Fill trial with values + step, shortened where it is too long and kept within bounds."""
    longest = max(abs(step[_X]) / reach[_X], abs(step[_Y]) / reach[_Y])
    longest = max(longest, abs(step[_DQ]) * values[_THICKNESS] / (2 * math.pi) / reach[_DQ])
    longest = max(longest, abs(step[_THICKNESS]) / (_STEP_PART * values[_THICKNESS]))
    if values[_BLUR] > 0:
        longest = max(longest, abs(step[_BLUR]) / (_STEP_PART * values[_BLUR]))
    part = 1 / max(longest, 1.0)
    for a in range(_P):
        trial[a] = values[a] + part * step[a]
    # strain within -1/2 and 1
    tilted = plan.g + trial[_X] * plan.dq_px
    trial[_DQ] = min(max(trial[_DQ], tilted - 2 * plan.g), tilted - plan.g / 2)
    low, high = _THICKNESS_RANGE
    trial[_THICKNESS] = min(max(trial[_THICKNESS], low * plan.thickness), high * plan.thickness)
    trial[_BLUR] = min(max(trial[_BLUR], blurs[0]), blurs[-1])
    trial[_SCALE] = max(trial[_SCALE], values[_SCALE] / 4)
    trial[_BACKGROUND] = max(trial[_BACKGROUND], _FAINT * trial[_SCALE])


@kernel
def _trust_more(reach: Floats) -> None:
    """Let the next step be longer."""
    for a in range(3):
        reach[a] = min(2 * reach[a], _STEP_FRINGE if a == _DQ else _STEP_PX)


@kernel
def _spread(short: Floats, full: Floats) -> None:
    """Copy (…, scale, background) to the kernel's order of parameters."""
    n = short.size - 2
    for a in range(n):
        full[a] = short[a]
    full[_SCALE], full[_BACKGROUND] = short[n], short[n + 1]


@kernel
def _copy(source: NDArray[Any], target: NDArray[Any]) -> None:
    """Copy (7,); a slice would add seconds to the compilation, for its errors."""
    for a in range(_P):
        target[a] = source[a]


@kernel
def _climb(space: _Space, plans: tuple[ContinuousPlan, ...], blurs: Floats) -> tuple[int, float]:
    """Raise the likelihood from `trial` on; leaves the most likely values there.

    Returns how it ended, and by how much the last step lowers the deviance. Model and
    information are left as they are before that step.
    """
    now, trial = space.now, space.trial
    lowest, damping, decrement, length = np.inf, 0.0, 0.0, np.inf
    ending = _LOST
    last = False
    for evaluation in range(_EVALUATIONS):
        _model(plans, blurs, trial, space.channels, space.one)
        if evaluation == 0:
            if not _first_brightness(space):
                return _DARK, 0.0
            _copy(trial, now)
        if last:
            return ending, 0.0
        likelihood = poisson_sums(
            space.channels, trial[_SCALE], trial[_BACKGROUND], space.counts, space.used, 0.0,
            space.work, space.bits, space.small, space.small_score,
        )  # fmt: skip
        gain = lowest - likelihood
        if gain >= 0:
            lowest, damping = likelihood, damping / 10 if damping > 0.01 else 0.0
            _copy(trial, now)
            _accept(space)
            if evaluation > 0:
                _trust_more(space.reach)
        else:
            damping = max(10 * damping, 0.1)
            # as high as it gets: at a kink of the likelihood there is no flat top
            last = length < _CLOSE
            if last:
                ending = _TOP
        solved = _solve(
            space.information, space.score, space.moving, damping, space.factor, space.step
        )
        if last or not solved or evaluation == _EVALUATIONS - 2:
            _copy(now, trial)
            last = True
            continue
        decrement = length = 0.0
        for a in range(_P):
            decrement += space.step[a] * space.score[a]
            for b in range(_P):
                length += space.step[a] * space.information[a, b] * space.step[b]
        _advance(plans[0], blurs, space.reach, now, space.step, trial)
        if (damping == 0 and length < _CLOSE) or 0 <= gain < _CLOSE:
            return _TOP, decrement
    return ending, 0.0


@kernel
def _accept(space: _Space) -> None:
    """Take over score and information, and look what can move."""
    n = space.small_score.size
    _spread(space.small_score, space.score)
    for a in range(n):
        _spread(space.small[a], space.information[a if a < n - 2 else a + _P - n])
    _copy(space.free, space.moving)
    faintest = space.now[_BACKGROUND] <= 1.001 * _FAINT * space.now[_SCALE]
    if faintest and space.score[_BACKGROUND] < 0:
        space.moving[_BACKGROUND] = False


@kernel
def _judge(space: _Space, moments: Floats, decrement: float, quality: Floats) -> None:
    """Fill quality (7,): see `Fitted`."""
    now, moving, step, score = space.now, space.moving, space.step, space.score
    deviance, mean, variance, largest = goodness(
        space.channels, now[_SCALE], now[_BACKGROUND], space.counts, space.used, moments,
        space.work, space.bits, space.small_score,
    )  # fmt: skip
    together = np.zeros(_P)
    _spread(space.small_score, together)
    if _solve(space.information, together, moving, 0.0, space.factor, step):
        for a in range(_P):
            # the fit takes what of the deviance goes with its parameters, and one for each
            variance -= step[a] * together[a]
            mean -= moving[a]
    quality[0] = deviance - decrement
    quality[1], quality[2], quality[3] = mean, variance, largest
    known = space.information[_SCALE, _SCALE]
    if moving[_BACKGROUND]:
        known -= (
            space.information[_SCALE, _BACKGROUND] ** 2
            / space.information[_BACKGROUND, _BACKGROUND]
        )
    quality[4] = now[_SCALE] * math.sqrt(max(known, 0.0))
    if space.free[_THICKNESS]:
        return
    # the score of the thickness beside what is fitted
    column = space.information[_THICKNESS]
    if _solve(space.information, column, moving, 0.0, space.factor, step):
        known, asked = column[_THICKNESS], score[_THICKNESS]
        for a in range(_P):
            known -= step[a] * column[a]
            asked -= step[a] * score[a]
        if known > 0:
            quality[5] = asked / math.sqrt(known)
            quality[6] = asked / known / now[_THICKNESS]


@kernel
def _fit(
    plans: tuple[ContinuousPlan, ...],
    blurs: Floats,
    indices: NDArray[np.int64],
    patterns: NDArray[np.float32],
    masks: NDArray[np.float32],
    free: NDArray[np.bool_],
    moments: Floats,
    reach: Floats,
    values: Floats,
    covariance: Floats,
    quality: Floats,
    converged: NDArray[np.bool_],
) -> None:
    """Fit the patterns with these indices; their rows of the last four arrays are filled."""
    ny, nx = patterns.shape[1:]
    blurred = len(plans) > 1
    k = 6 if blurred else 5
    space = _Space(
        np.empty((nx, ny)),
        np.empty((nx, ny)),
        np.zeros((k, nx, ny)),
        np.zeros((5 if blurred else 0, nx, ny)),
        np.empty((2 * k + 3, ny)),
        np.empty((2, ny), np.int32),
        np.empty((k + 1, k + 1)),
        np.empty(k + 1),
        np.zeros((_P, _P)),
        np.zeros(_P),
        np.zeros((_P, _P)),
        np.zeros(_P),
        np.zeros(_P),
        np.zeros(_P),
        free,
        np.zeros(_P, np.bool_),
        np.zeros(3),
    )
    for i in indices:
        mask = masks[i if masks.shape[0] > 1 else 0]
        for x in range(nx):
            for y in range(ny):
                space.used[x, y] = mask[y, x]
                space.counts[x, y] = patterns[i, y, x]
        _copy(values[i], space.trial)
        for a in range(3):
            space.reach[a] = reach[i, a]
        ending, decrement = _climb(space, plans, blurs)
        if ending == _DARK:
            continue
        _copy(space.trial, values[i])
        _judge(space, moments, decrement, quality[i])
        if ending == _TOP and _solve(
            space.information, space.score, free, 0.0, space.factor, space.step
        ):
            _invert(space.factor, free, covariance[i])
            converged[i] = True
