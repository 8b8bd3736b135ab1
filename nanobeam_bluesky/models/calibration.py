"""`calibrate`: what the first patterns of a scan tell about their own geometry."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.ndimage import median_filter, rank_filter, uniform_filter
from scipy.special import xlogy

from nanobeam_bluesky.geometry import Geometry, Orientation
from nanobeam_bluesky.models.estimates import DEFAULT_FIT, MIN_COUNTS, Estimates
from nanobeam_bluesky.models.refinement import Fitted, fit_shifts, refine
from nanobeam_bluesky.models.search import library_search
from nanobeam_bluesky.models.systematics import center_effect, frame_direction
from nanobeam_bluesky.physics.continuous import angles, continuous_plan, render_continuous, shifts

__all__ = ["Calibration", "CalibrationError", "Measured", "calibrate"]

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

MIN_PATTERNS = 20
MAX_PATTERNS = 300

_THICKNESS, _SCALE, _BACKGROUND = 3, 5, 6  # of `fit_shifts`
_HOTTEST = 16  # pixels that do not count when patterns are chosen
_ROUNDS = 3  # of finding bad pixels, then thickness and blur
_NEWTON_STEPS = 8
_FARTHEST = 20  # error bars that a Newton step may go
_FEW = 64  # patterns that tell the orientation and, roughly, the blur
_BLURS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.5, 6.5, 10.0)
_SMALLEST_BLUR = 0.15  # found ones below are none
_OUTLIER = 5.0  # σ of a bad pixel: 0.002 good ones in 64 × 64
_LIT = 20  # counts in all patterns that make a pixel one that should count
_MODEL_ERROR = 0.2  # root mean square error of the model at which it does not fit at all


class CalibrationError(ValueError):
    """Patterns from which nothing can be calibrated."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Measured(_Frozen):
    """A number and how well it is known."""

    value: float
    """The value."""
    error: float
    """Its standard error."""

    def __str__(self) -> str:
        digits = max(0, 1 - math.floor(math.log10(self.error))) if self.error > 0 else 6
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


class Calibration(_Frozen):
    """What `calibrate` found."""

    geometry: Geometry
    """The geometry, corrected."""
    patterns: int
    """How many patterns were used."""
    counts: float
    """Photons in one of them, on average."""
    transposed: bool
    """Whether rows and columns of the frame are the other way round than was stated."""
    transposition_evidence: float
    """Deviance of a pattern the wrong way round, less the right way; its median."""
    thickness_nm: Measured
    """Mean film thickness, nm."""
    pupil_blur_px: Measured | None
    """Blur of the pupil, binned pixels; None where none was seen."""
    background: Measured
    """Mean uniform background, counts per binned pixel and pattern."""
    strain: Measured
    """Mean strain of the patterns, with the corrected geometry."""
    omega: Measured
    """Mean ω of the patterns, deg."""
    chi: Measured
    """Mean χ of the patterns, deg."""
    reference_center_px: tuple[Measured, Measured]
    """(x, y) of the Bragg centre, unbinned pixels, if the mean strain and the mean χ of
    these patterns are zero."""
    hot_pixels: tuple[tuple[int, int], ...]
    """(row, column) in the patterns as given of pixels that count too much."""
    dead_pixels: tuple[tuple[int, int], ...]
    """(row, column) in the patterns as given of pixels that count too little."""
    notes: tuple[str, ...]
    """What was found and what cannot be, in sentences."""


def calibrate(
    patterns: NDArray[Any], geometry: Geometry, *, reference: bool = False
) -> Calibration:
    """Find what is wrong with a geometry from patterns of an unknown sample.

    Parameters
    ----------
    patterns
        (n, ny, nx), counts, as `bin_frames` gives them with this geometry: the first rows
        of a scan. At most `MAX_PATTERNS` well-lit ones are used.
    geometry
        What is known; optics, distance and energy are taken for granted.
    reference
        Whether the film is known to be unstrained and untilted (χ) on average. Only then is
        the Bragg centre moved: no pattern tells a centre that is off along 2θ from
        a mean strain and ω, nor one that is off across from a mean χ.

    Returns
    -------
    Calibration
        Transposition, bad pixels, background, blur and thickness, and the geometry that
        has them. Flips are symmetries: they must come from metadata.

    Raises
    ------
    CalibrationError
        If the patterns are too few or too dark, or the model fits them in no way.
    """
    given = geometry
    counts = _well_lit(patterns, geometry)
    sample, geometry, evidence = _oriented(counts, geometry)
    geometry, blur_error = sample.first_blur(geometry)
    geometry, thickness_error = sample.first_thickness(geometry)
    # at first in wide steps, as the blur may be off by many errors
    errors = (
        max(thickness_error, 0.01 * geometry.thickness_nm),
        max(blur_error, 0.04 * geometry.pupil_blur_px),
    )
    for _ in range(_ROUNDS):
        before = sample.mask
        excess = sample.find_bad_pixels(geometry)
        geometry, errors = sample.thickness_and_blur(geometry, errors)
        if (before == sample.mask).all():
            break
    geometry = sample.without_bias(geometry, errors)
    estimates = sample.estimates(geometry)
    centered, center = sample.centered(geometry, estimates)
    if reference:
        geometry, estimates = centered, sample.estimates(centered)
    transposed = geometry.orientation != given.orientation
    bad = sample.mask & ~sample.unread
    hot, dead = (np.argwhere((bad & which).T if transposed else bad & which)
                 for which in (excess > 0, excess < 0))  # fmt: skip
    geometry = _with_mask(geometry, bad)
    blurred = geometry.pupil_blur_px > 0
    result = Calibration(
        geometry=Geometry.parse(geometry.model_dump(), where="calibrated geometry"),
        patterns=len(sample.counts),
        counts=float(estimates.counts.mean()),
        transposed=transposed,
        transposition_evidence=abs(evidence),
        thickness_nm=Measured(value=geometry.thickness_nm, error=errors[0]),
        pupil_blur_px=Measured(value=geometry.pupil_blur_px, error=errors[1]) if blurred else None,
        background=_mean(estimates.background),
        strain=_mean(estimates.strain, estimates.strain_sigma),
        omega=_mean(estimates.omega, estimates.omega_sigma),
        chi=_mean(estimates.chi, estimates.chi_sigma),
        reference_center_px=center,
        hot_pixels=tuple((int(r), int(c)) for r, c in hot),
        dead_pixels=tuple((int(r), int(c)) for r, c in dead),
        notes=(),
    )
    return result.model_copy(update={"notes": tuple(_notes(result, given, reference))})


# ------------------------------------------------------------------- patterns and masks


def _well_lit(patterns: NDArray[Any], geometry: Geometry) -> NDArray[np.float32]:
    """At most `MAX_PATTERNS` of the patterns, evenly from those with half the median's counts.

    A pixel that holds no counts in most patterns (-1 or NaN, as in a detector's gaps) is set to
    0, for `find_bad_pixels`; a pattern with another such pixel is left out.
    """
    patterns = np.asarray(patterns)
    shape = geometry.pattern_shape
    if patterns.ndim != 3 or patterns.shape[1:] != shape or patterns.dtype.kind not in "uifb":
        raise CalibrationError(
            f"patterns of type {patterns.dtype} and shape {patterns.shape}: expected numbers, "
            f"(n, {shape[0]}, {shape[1]})"
        )
    broken = ~(np.isfinite(patterns) & (patterns >= 0))
    if broken.any():
        gap = broken.mean(axis=0) > 0.5
        patterns = np.where(broken, 0, patterns)
        broken = broken & ~gap
    # without the hottest pixels: they make no pattern
    counts = np.sort(patterns.reshape(len(patterns), -1), axis=1)[:, :-_HOTTEST].sum(axis=1)
    lit = ~broken.any(axis=(1, 2)) & (counts >= MIN_COUNTS)
    if lit.sum() < MIN_PATTERNS:
        raise CalibrationError(
            f"{lit.sum()} of {len(patterns)} patterns are whole and have at least {MIN_COUNTS} "
            f"counts; at least {MIN_PATTERNS} are needed: give more rows of the scan, or count "
            "longer"
        )
    best = np.flatnonzero(lit & (counts >= np.median(counts[lit]) / 2))
    chosen = best[np.linspace(0, len(best) - 1, min(len(best), MAX_PATTERNS)).astype(int)]
    return np.asarray(patterns[chosen], np.float32)


def _with_mask(geometry: Geometry, bad: Mask) -> Geometry:
    """Add all pixels of the bad bins (ny, nx) to the geometry's mask."""
    b, roi = geometry.binning, geometry.roi
    frame = geometry.unorient(bad).repeat(b, axis=0).repeat(b, axis=1)
    found = [(roi.row + int(r), roi.col + int(c)) for r, c in np.argwhere(frame)]
    return geometry.model_copy(
        update={"pixel_mask": tuple(dict.fromkeys((*geometry.pixel_mask, *found)))}
    )


def _screened(counts: NDArray[np.float32]) -> Mask:
    """Bad pixels that need no model: far brighter than their neighbours, or dead among light."""
    total = counts.sum(axis=0, dtype=np.float64)
    ring = np.ones((3, 3), np.bool_)
    ring[1, 1] = False
    second = rank_filter(total, -2, footprint=ring, mode="mirror")  # hot pixels may touch
    middle = median_filter(total, 9, mode="mirror")  # gaps are some pixels wide
    return np.asarray((total > 4 * second + _LIT) | ((total == 0) & (middle > _LIT)))


def _turned(geometry: Geometry) -> Geometry:
    """The geometry with rows and columns of its patterns exchanged."""
    square = np.arange(4).reshape(2, 2)
    wanted = geometry.orient(square).T
    for name in get_args(Orientation):
        turned = geometry.model_copy(update={"orientation": name})
        if (turned.orient(square) == wanted).all():
            return turned
    raise AssertionError("the eight orientations are a group")


def _mean(values: Floats, sigma: Floats | None = None) -> Measured:
    """Mean and its standard error, by the scatter unless σ is given."""
    error = values.std() if sigma is None else math.sqrt(np.nanmean(sigma**2))
    return Measured(value=float(values.mean()), error=float(error / math.sqrt(len(values))))


# ------------------------------------------------------------------------- the fits


class _Sample:
    """Patterns that are fitted again and again, from where the last fit stood."""

    def __init__(self, counts: NDArray[np.float32], geometry: Geometry, unread: Mask) -> None:
        self.counts = counts
        self.unread = unread
        self.mask = unread | _screened(counts)
        filled = np.where(self.mask, _beside(counts, self.mask), counts)
        first = library_search(filled, geometry)
        found = shifts(continuous_plan(geometry), first.strain, first.omega, first.chi)
        self.start = np.stack(found, axis=1)

    def keep(self, which: Any) -> None:
        """Go on with these patterns only."""
        self.counts, self.start = self.counts[which], self.start[which]

    def fit(self, geometry: Geometry, *more: str, few: bool = False) -> Fitted:
        """Fit all patterns, or a few of them."""
        part = slice(None, None, max(1, len(self.counts) // _FEW) if few else 1)
        return fit_shifts(
            self.counts[part],
            self.start[part],
            geometry,
            fit=(*DEFAULT_FIT, *more),
            used=(~self.mask)[None].astype(np.float32),
            which=np.ones(len(self.counts[part]), np.bool_),
        )

    def first_blur(self, geometry: Geometry) -> tuple[Geometry, float]:
        """Geometry with the likeliest blur of a grid, and its rough error."""
        deviances: list[float] = []
        for blur in _BLURS:
            fitted = self.fit(_with(geometry, blur=blur), "thickness", few=True)
            deviances.append(float(fitted.quality[:, 0].sum()))
            if len(deviances) > 3 and min(deviances[-2:]) > min(deviances) + 100:
                break
        best = min(max(int(np.argmin(deviances)), 1), len(deviances) - 2)
        square = np.square(_BLURS[best - 1 : best + 2])
        a, b, _ = np.polyfit(square, deviances[best - 1 : best + 2], 2)
        found = -b / (2 * a) if a > 0 else square[np.argmin(deviances[best - 1 : best + 2])]
        blur = math.sqrt(min(max(found, 0.0), square[2]))
        step = 1 / math.sqrt(a) / (2 * max(blur, _SMALLEST_BLUR)) if a > 0 else 0.1
        return _with(geometry, blur=blur), step

    def first_thickness(self, geometry: Geometry) -> tuple[Geometry, float]:
        """Geometry with the mean of the patterns' thicknesses, and its error."""
        fitted = self.fit(geometry, "thickness")
        deviance, expected, spread = fitted.quality[:, :3].T
        counts = self.counts.sum(axis=(1, 2), where=~self.mask)
        misfit = deviance - expected > np.maximum(_MODEL_ERROR**2 * counts, 5 * np.sqrt(spread))
        scale = fitted.values[:, _SCALE]
        faint = scale < 3 * np.sqrt(fitted.covariance[:, _SCALE, _SCALE])
        good = fitted.converged & ~misfit & ~faint
        if good.sum() < max(MIN_PATTERNS, len(good) / 2):
            raise CalibrationError(
                f"the model fits {good.sum()} of {len(good)} patterns ({misfit.sum()} are other "
                f"patterns than it can make, {faint.sum()} hardly brighter than the background, "
                f"{(~fitted.converged).sum()} did not converge); at least half are needed: check "
                "ROI, binning, bragg_center_px, energy, distance and optics, or give other rows"
            )
        self.keep(good)
        self.start = fitted.values[good, :3]
        thickness = fitted.values[good, _THICKNESS] / 10
        weight = 1 / np.maximum(fitted.covariance[good, _THICKNESS, _THICKNESS] / 100, 1e-12)
        mean = float(weight @ thickness / weight.sum())
        return _with(geometry, thickness=mean), float(1 / math.sqrt(weight.sum()))

    def find_bad_pixels(self, geometry: Geometry) -> NDArray[np.float64]:
        """Mask the pixels that differ from the fits; return by how many σ each does (ny, nx)."""
        fitted = self.fit(geometry)
        self.start = fitted.values[:, :3]
        pattern = np.empty(self.counts.shape, np.float32)
        dark = np.zeros(len(pattern))
        shift_x, shift_y, dq = np.ascontiguousarray(self.start.T)
        render_continuous(continuous_plan(geometry), shift_x, shift_y, dq, dark, pattern)
        scale, background = fitted.values[:, [_SCALE, _BACKGROUND]].T
        expected = np.tensordot(scale, pattern, 1) + background.sum()
        seen = self.counts.sum(axis=0, dtype=np.float64)
        deviance = 2 * (xlogy(seen, seen / expected) - seen + expected)
        sigma = np.sign(seen - expected) * np.sqrt(np.maximum(deviance, 0))
        # where the model is a little off, neighbours are off alike
        excess: NDArray[np.float64] = sigma - median_filter(sigma, 5, mode="mirror")
        noise = np.maximum(1, 1.48 * median_filter(np.abs(sigma), 7, mode="mirror"))
        dead = (seen == 0) & (expected > _LIT)  # whole lines of them, too
        self.mask = self.unread | (np.abs(excess) > _OUTLIER * noise) | dead
        return np.where(dead, -np.inf, excess)

    def thickness_and_blur(
        self, geometry: Geometry, steps: tuple[float, float]
    ) -> tuple[Geometry, tuple[float, float]]:
        """Maximise the likelihood of a common thickness and blur, all else fitted; with errors.

        Newton's method on the quadratic through a few points, one or two errors apart.
        """
        self.start = self.fit(geometry).values[:, :3]
        blurred = geometry.pupil_blur_px >= _SMALLEST_BLUR
        center = np.array([geometry.thickness_nm, geometry.pupil_blur_px if blurred else 0.0])
        step = np.array(steps) * (1, blurred)
        free = 1 + blurred
        for _ in range(_NEWTON_STEPS):
            step = np.clip(step, 1e-4 * center, 0.2 * center)

            def deviance(*signs: float, at: Floats = center, by: Floats = step) -> float:
                thickness, blur = at + by * signs
                fitted = self.fit(_with(geometry, thickness=thickness, blur=blur))
                return float(fitted.quality[:, 0].sum())

            middle = deviance(0, 0)
            ends = [[deviance(*(s * np.eye(2)[k])) for s in (-1, 1)] for k in range(free)]
            slope = np.array([(high - low) / 2 for low, high in ends])
            hessian = np.diag([high + low - 2 * middle for low, high in ends])
            if blurred:
                mixed = deviance(1, 1) - ends[0][1] - ends[1][1] + middle
                hessian += mixed * np.array([[0, 1], [1, 0]])
            if np.linalg.eigvalsh(hessian)[0] <= 0:
                step = step * 3
                continue
            move = np.clip(-np.linalg.solve(hessian, slope), -_FARTHEST, _FARTHEST)
            center[:free] += move * step[:free]
            center[1] = max(center[1], blurred * _SMALLEST_BLUR)
            errors = np.zeros(2)
            errors[:free] = np.sqrt(2 * np.diag(np.linalg.inv(hessian))) * step[:free]
            if (np.abs(move * step[:free]) < 2 * errors[:free]).all():
                break
            step = errors
        else:
            raise CalibrationError(
                f"no likeliest thickness and blur near {center[0]:.3g} nm and {center[1]:.3g} "
                "pixels: give more rows of the scan, or thickness_nm closer to the truth"
            )
        found = _with(geometry, thickness=float(center[0]), blur=float(center[1]))
        return found, (float(errors[0]), float(errors[1]))

    def without_bias(self, geometry: Geometry, errors: tuple[float, float]) -> Geometry:
        """Correct thickness and blur for the noise in the patterns' own parameters.

        Fits follow the noise and look a little sharper than the truth: the mean of fits with
        covariance C is off by what the expected patterns less ½ Σ C ∂²μ/∂θ² would give.
        Source: the second-order bias of maximum likelihood (Cox and Snell, J. R. Stat. Soc. B
        30 (1968) 248) for Poisson counts.
        """
        fitted = self.fit(geometry)
        plan = continuous_plan(geometry)
        which = [0, 1, 2, _SCALE]
        dark = np.zeros(len(self.counts))
        covariance = fitted.covariance[:, which][:, :, which]

        def pattern(values: Floats) -> Floats:
            out = np.empty(self.counts.shape, np.float32)
            shift_x, shift_y, dq, scale = np.ascontiguousarray(values.T)
            render_continuous(plan, shift_x, shift_y, dq, dark, out)
            return np.asarray(scale[:, None, None] * out)

        values = fitted.values[:, which]
        light = pattern(values)
        size, direction = np.linalg.eigh(covariance)  # C = Σ a aᵀ
        expected = light + fitted.values[:, _BACKGROUND, None, None]
        for k in range(len(which)):
            a = direction[:, :, k] * np.sqrt(np.maximum(size[:, k, None], 0))
            expected -= (pattern(values + a) + pattern(values - a)) / 2 - light
        mean = copy(self)
        mean.counts = np.maximum(expected, 0).astype(np.float32)
        mean.start = values[:, :3]
        off, _ = mean.thickness_and_blur(geometry, errors)
        return _with(
            geometry,
            thickness=2 * geometry.thickness_nm - off.thickness_nm,
            blur=2 * geometry.pupil_blur_px - off.pupil_blur_px,
        )

    def estimates(self, geometry: Geometry) -> Estimates:
        """Strain, tilts and background of the patterns, with σ."""
        strain, omega, chi = angles(continuous_plan(geometry), *self.start.T)
        first = replace(Estimates.empty(len(self.counts)), strain=strain, omega=omega, chi=chi)
        return refine(self.counts, first, geometry, mask=self.mask)

    def centered(
        self, geometry: Geometry, estimates: Estimates
    ) -> tuple[Geometry, tuple[Measured, Measured]]:
        """Geometry in which the mean strain and χ are zero; its centre with errors, frame px."""
        effect = center_effect(geometry)
        along, across = (np.array(frame_direction(geometry, axis)) for axis in ("x", "y"))
        roi = geometry.roi
        center = np.array(geometry.bragg_center_px)
        for _ in range(2):
            strain, chi = _mean(estimates.strain), _mean(estimates.chi)
            center -= along * strain.value / effect["strain"] + across * chi.value / effect["chi"]
            moved = geometry.model_copy(
                update={
                    "bragg_center_px": (float(center[0]), float(center[1])),
                    "roi_origin_px": (roi.row, roi.col),
                }
            )
            estimates = self.estimates(moved)
        errors = abs(along) * strain.error / effect["strain"]
        errors = errors + abs(across) * chi.error / effect["chi"]
        x, y = (
            Measured(value=float(v), error=float(e)) for v, e in zip(center, errors, strict=True)
        )
        return moved, (x, y)


def _with(
    geometry: Geometry, *, thickness: float | None = None, blur: float | None = None
) -> Geometry:
    update = {"thickness_nm": thickness, "pupil_blur_px": blur}
    return geometry.model_copy(update={k: float(v) for k, v in update.items() if v is not None})


def _beside(counts: NDArray[np.float32], mask: Mask) -> NDArray[np.float32]:
    """Mean of the good pixels around each pixel."""
    good = (~mask).astype(np.float32)
    light: NDArray[np.float32] = uniform_filter(counts * good, (0, 5, 5), mode="constant")
    area = uniform_filter(good, 5, mode="constant")
    return np.where(area > 1e-3, light / np.maximum(area, 1e-3), np.float32(0))


def _oriented(counts: NDArray[np.float32], geometry: Geometry) -> tuple[_Sample, Geometry, float]:
    """The sample the likelier way round, its geometry, and the evidence for transposing it."""
    candidates = []
    deviances = []
    unread = geometry.pattern_mask
    for turned in (False, True):
        if turned:
            geometry = _turned(geometry)
            counts, unread = np.swapaxes(counts, 1, 2).copy(), unread.T
        # a sharp pupil has no smooth likelihood far from the truth
        candidate = _with(geometry, blur=max(geometry.pupil_blur_px, 0.5))
        sample = _Sample(counts, candidate, unread)
        sample.start = sample.fit(candidate).values[:, :3]
        fitted = sample.fit(candidate, "thickness", few=True)
        candidates.append((sample, candidate))
        deviances.append(fitted.quality[:, 0])
    difference = deviances[0] - deviances[1]
    evidence = float(np.median(difference))
    error = 1.25 * difference.std() / math.sqrt(len(difference))
    chosen, found = candidates[int(evidence > 5 * error)]
    return chosen, found, evidence


def _notes(found: Calibration, given: Geometry, reference: bool) -> Iterator[str]:
    """Say what was found and what cannot be found."""
    geometry, b = found.geometry, given.binning
    if found.transposed:
        yield (
            f"Rows and columns are exchanged: orientation {given.orientation!r} became "
            f"{geometry.orientation!r}."
        )
    elif found.transposition_evidence < 10:
        yield "These patterns do not tell whether rows and columns are exchanged."
    yield (
        "Flips are symmetries of the pattern: of the four orientations with these axes only "
        "metadata can name the right one."
    )
    bad = len(found.hot_pixels) + len(found.dead_pixels)
    if bad:
        pixels = f"all {b} × {b} pixels of each bin" if b > 1 else "each"
        yield f"{bad} bad pixel{'s' * (bad > 1)} found: {pixels} now in pixel_mask."
    if found.pupil_blur_px is None:
        yield f"No blur of the pupil is seen; it is below about {_SMALLEST_BLUR:g} binned pixels."
    effect = center_effect(geometry)
    axes = ("x (columns)", "y (rows)")
    along, across = axes if frame_direction(geometry, "x")[0] else axes[::-1]
    x, y = found.reference_center_px
    yield (
        f"No pattern tells where the Bragg centre is: one pixel in {along} adds "
        f"{effect['strain']:.2g} to ε and {effect['omega']:.2g}° to ω of all points, one in "
        f"{across} {effect['chi']:.2g}° to χ."
    )
    place = f"({x.value:.2f} ± {x.error:.2g}, {y.value:.2f} ± {y.error:.2g})"
    if reference:
        yield (
            f"The centre was moved to {place}, where the mean strain and χ of these patterns are "
            "zero, as the film was said to be on average."
        )
    else:
        yield (
            f"If the film is unstrained and untilted on average, the centre is at {place}; it "
            "was left where it is."
        )
    yield "A mean ω is the sample's or a wrong delta_theta_deg: patterns cannot tell."
