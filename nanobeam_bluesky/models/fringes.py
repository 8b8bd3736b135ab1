"""A network's strain, placed anew by the film's fringes: one unknown that photons tell directly.

A network gives the photons less than their full weight. Where it has found the pupil, the
pixels that are wholly lit hold nothing but the film's fringes; summed over the columns of the
detector they give the place of these by Fisher scoring, in a few microseconds a pattern.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.estimates import Estimates
from nanobeam_bluesky.physics._numba import in_threads, summing_kernel
from nanobeam_bluesky.physics.continuous import ContinuousPlan, angles, continuous_plan, shifts

__all__ = ["place_fringes"]

Floats = NDArray[np.floating[Any]]

_NODES = 64  # of the table, a fringe
_STEPS = 2
_THICKNESS = 0.01  # σ of the film's, of its value, as reflectivity tells it
_RIM_PX = 0.6  # a pixel nearer to a rim is partly lit …
_RIM_BLURS = 2.0  # … and so is one within so many blurs
_LEAST_DARK = 50  # pixels, for a background
_DARK_COUNTS = 3  # of a pixel beside the pupil: more is not background
_OUTLIER = 6.0  # σ, beyond which a pixel counts for no more
_FARTHEST = 4.0  # σ of the network, beyond which the fringes found are others


def place_fringes(
    patterns: NDArray[np.float32],
    estimates: Estimates,
    geometry: Geometry,
    *,
    mask: NDArray[np.bool_] | None = None,
) -> Estimates:
    """Give strain the value that the film's fringes tell, where they tell it better.

    Parameters
    ----------
    patterns
        Counts (n, ny, nx), of the geometry's `pattern_shape`.
    estimates
        Strain, ω and χ with their σ, n points. The pupil is taken to lie where they say.
    geometry
        The geometry.
    mask
        True for pixels to leave out, (ny, nx).

    Returns
    -------
    Estimates
        n points. Another strain, with its σ, where this σ is less than the network's and the
        new value lies within 4 of these; unchanged else. σ is the root of the inverse Fisher
        information of the columns, with an unknown scale and a thickness known to 1 %, times
        the root of χ² per degree of freedom where that is above 1.
    """
    plan = continuous_plan(geometry)
    known = shifts(plan, estimates.strain, estimates.omega, estimates.chi)
    begin = np.stack(known, 1).astype(np.float64)
    columns, table, spacing = _prepare(geometry)
    used = np.ones(geometry.pattern_shape, np.float32)
    if mask is not None:
        used[mask] = 0
    placed = np.empty((len(patterns), 2))
    blur = geometry.pupil_blur_px

    def run(part: slice) -> None:
        _place(patterns[part], begin[part], used, plan, columns, table, spacing, blur, placed[part])

    in_threads(run, len(patterns))
    strain, _, _ = angles(plan, begin[:, 0], begin[:, 1], placed[:, 0])
    strained = plan.g / (1 + strain)
    per_dq = plan.g / strained**2
    # dq at another shift_x is another strain
    leaning = strained * np.radians(estimates.omega_sigma) * plan.omega_px * plan.dq_px
    sigma = per_dq * np.hypot(placed[:, 1], leaning)
    with np.errstate(invalid="ignore"):
        better = sigma < estimates.strain_sigma
        better &= np.abs(strain - estimates.strain) < _FARTHEST * estimates.strain_sigma
    return replace(
        estimates,
        strain=np.where(better, strain, estimates.strain),
        strain_sigma=np.where(better, sigma, estimates.strain_sigma),
    )


@lru_cache(maxsize=8)
def _prepare(geometry: Geometry) -> tuple[Floats, Floats, float]:
    """s and z of the columns' middles, (2, nx); sinc² averaged over a column's width, and its
    slope, at multiples of 1 / `_NODES` from 0 up, (nodes, 2); the step of q per z, Å⁻¹.
    """  # noqa: D205
    plan = continuous_plan(geometry)
    borders = plan.borders[:: plan.per_column]
    # q₀ is smooth: a cubic holds it to 1e-6 fringes
    middle, span = borders.mean(), np.ptp(borders)
    cubic = np.polyfit((plan.s.ravel() - middle) / span, plan.q.ravel(), 3)
    per_q = plan.thickness / (2 * math.pi)
    z = per_q * np.polyval(cubic, (borders - middle) / span)
    width = float(np.diff(z).mean())
    farthest = np.abs(z).max() + 2 * np.ptp(z)
    nodes = np.arange(math.ceil(farthest * _NODES) + 2) / _NODES
    at, weights = np.polynomial.legendre.leggauss(12)
    mean = np.sinc(nodes[:, None] + width / 2 * at) ** 2 @ (weights / 2)
    slope = (np.sinc(nodes + width / 2) ** 2 - np.sinc(nodes - width / 2) ** 2) / width
    columns = np.stack([(borders[1:] + borders[:-1]) / 2, (z[1:] + z[:-1]) / 2])
    return columns, np.stack([mean, slope], 1), 1 / per_q


@summing_kernel
def _place(
    patterns: NDArray[np.float32],
    begin: Floats,
    used: NDArray[np.float32],
    plan: ContinuousPlan,
    columns: Floats,
    table: Floats,
    spacing: float,
    blur: float,
    placed: Floats,
) -> None:
    """Fill placed (n, 2) with dq and its σ (infinite where nothing is known), Å⁻¹."""
    n, ny, nx = patterns.shape
    lit = np.empty((ny, nx), np.float32)
    line, height = np.empty(nx, np.float32), np.empty(nx, np.float32)
    most, x2 = np.empty(nx, np.float32), np.empty(nx, np.float32)
    shape, slope, thick = np.empty(nx), np.empty(nx), np.empty(nx)
    for i in range(n):
        pattern = patterns[i]
        shift_x, shift_y, dq = begin[i]
        placed[i, 0], placed[i, 1] = dq, np.inf
        if not math.isfinite(shift_x + shift_y + dq):
            continue
        near, far = _RIM_PX + _RIM_BLURS * blur, 1 + 3 * blur
        outer_x, outer_y = plan.pupil[0]
        stop_x, stop_y = plan.pupil[1]
        inner = np.float32(max(outer_x - near, 0) ** 2)
        stop = np.float32((stop_x + near) ** 2 if stop_x > 0 else -1)
        rim = np.float32((outer_x + far) ** 2)
        height[:] = 0
        dark, beside = np.float32(0), np.float32(0)
        for x in range(nx):
            x2[x] = (columns[0, x] + shift_x) ** 2
        for y in range(ny):
            v = abs((plan.rows[y] + plan.rows[y + 1]) / 2 + shift_y)
            row, kept, here = lit[y], used[y], pattern[y]
            if plan.round:
                v2 = np.float32(v * v)
            else:
                # rows of a rectangle: as if round, with all of it or none of it in v
                v2 = np.float32(0)
                stop = np.float32((stop_x + near) ** 2 if v < stop_y + near else -1)
                if not stop_x > 0:
                    stop = np.float32(-1)
                inner = np.float32(max(outer_x - near, 0) ** 2 if v < outer_y - near else 0)
                rim = np.float32((outer_x + far) ** 2 if v < outer_y + far else 0)
            for x in range(nx):
                r2 = x2[x] + v2
                inside = kept[x] if (r2 < inner and r2 > stop) else np.float32(0)
                row[x] = inside
                height[x] += inside
                outside = kept[x] if r2 > rim else np.float32(0)
                dark += outside
                beside += outside * min(here[x], np.float32(_DARK_COUNTS))
        background = beside / dark if dark > _LEAST_DARK else 0.0
        scale, thicker = 0.0, 0.0
        for step in range(_STEPS + 1):
            for x in range(nx):
                z = (columns[1, x] + dq / spacing) * (1 + thicker)
                node = min(abs(z) * _NODES, table.shape[0] - 2.0)
                first = int(node)
                part = node - first
                shape[x] = (1 - part) * table[first, 0] + part * table[first + 1, 0]
                steep = (1 - part) * table[first, 1] + part * table[first + 1, 1]
                slope[x] = math.copysign(steep, steep * z)
                thick[x] = slope[x] * z
                mean = scale * shape[x] + background
                most[x] = mean + _OUTLIER * math.sqrt(mean) + 2 if step else np.inf
            line[:] = 0
            for y in range(ny):
                row, here = lit[y], pattern[y]
                for x in range(nx):
                    line[x] += row[x] * min(here[x], most[x])
            if step == 0:
                total, expected = 0.0, 0.0
                for x in range(nx):
                    total += line[x] - background * height[x]
                    expected += shape[x] * height[x]
                if not (total > 0 and expected > 0):
                    break
                scale = total / expected
                continue
            ss, sd, st, dd, dt, tt = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            gs, gd, gt, chi2, pixels = 0.0, 0.0, 0.0, 0.0, 0
            for x in range(nx):
                h = height[x]
                mean = h * max(scale * shape[x] + background, 1e-6 * scale)
                if mean > 0:
                    a, d, t = h * shape[x], h * scale * slope[x], h * scale * thick[x]
                    rest, weight = line[x] - mean, 1 / mean
                    ss += weight * a * a
                    sd += weight * a * d
                    st += weight * a * t
                    dd += weight * d * d
                    dt += weight * d * t
                    tt += weight * t * t
                    gs += weight * a * rest
                    gd += weight * d * rest
                    gt += weight * t * rest
                    chi2 += weight * rest * rest
                    pixels += 1
            # the scale, then the thickness, eliminated
            if pixels < 5 or not ss > 0:
                break
            tt += _THICKNESS**-2 - st * st / ss
            gt -= thicker * _THICKNESS**-2 + st * gs / ss
            dt -= sd * st / ss
            before = dd
            dd -= sd * sd / ss + dt * dt / tt
            if not dd > 1e-9 * before:
                break
            change = (gd - sd * gs / ss - dt * gt / tt) / dd
            dq += change * spacing
            by = (gt - dt * change) / tt
            thicker += by
            scale = max(scale + (gs - sd * change - st * by) / ss, 0.1 * scale)
            placed[i, 0] = dq
            if step == _STEPS:
                placed[i, 1] = spacing * math.sqrt(max(chi2 / (pixels - 3), 1.0) / dd)
