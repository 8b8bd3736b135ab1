"""The published sampling: windows for the δ functions on a pupil grid of half pixels.

Source: Luo et al., Sci. Rep. (2025), doi 10.1038/s41598-025-97183-0, and its code.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import HC_KEV_ANGSTROM, Geometry, RectangularPupil
from nanobeam_bluesky.physics._numba import kernel

Floats = NDArray[np.floating[Any]]

HC_PUBLISHED = 12.398
"""hc of the published code, keV Å; its wavelength is shorter by 3.4e-5."""

WINDOW = 5e-4
"""Half-width of the windows that stand for the δ functions, Å⁻¹."""

LIBRARY_STEPS = 41
LIBRARY_HALF_RANGE = (0.005, 0.05, 0.1)
"""The published library: strain, ω (deg), χ (deg)."""


class PublishedPlan(NamedTuple):
    """What all patterns of a geometry share; reciprocal lengths in Å⁻¹."""

    g: float  # 2π/d of the relaxed film
    qx: Floats  # (nx,)
    qz: Floats  # (nx,)
    qy: Floats  # (ny,)
    ox: Floats  # (nu,)
    oz: Floats  # (nu,)
    oy: Floats  # (nv,)
    below: NDArray[np.float32]  # (nu, nv + 1): open pupil points below the v-th
    thickness: float  # Å


@lru_cache(maxsize=8)
def published_plan(geometry: Geometry) -> PublishedPlan:
    """Sample detector and pupil as the published code does.

    The pupil grid is (m + ½)/2 pixels in both directions, the published one, as far as the
    pupil reaches. (The published grid ends with the ROI; there the pupil fits in.)

    Raises
    ------
    ValueError
        If the windows are narrower than the steps of the pupil grid.
    """
    geometry = geometry.model_copy(
        update={
            "wavelength_angstrom": geometry.wavelength_angstrom * HC_PUBLISHED / HC_KEV_ANGSTROM
        }
    )
    k = 2 * math.pi / geometry.wavelength_angstrom
    bragg = math.radians(geometry.bragg_angle_deg)
    theta = math.radians(geometry.incidence_deg)
    tilt = math.radians(geometry.detector_tilt_deg)
    step = geometry.binned_pixel_um * 1e-6 / geometry.detector_distance_m
    if k * step / 2 > 2 * WINDOW:
        raise ValueError(
            f"published sampling: its windows of {2 * WINDOW:g} Å⁻¹ are narrower than half a "
            f"pixel, {k * step / 2:.2g} Å⁻¹, and leave pixels dark; use sampling='continuous'"
        )
    (ny, nx), (cx, cy) = geometry.pattern_shape, geometry.pattern_center
    x = (np.arange(nx) + 0.5 - cx) * step
    y = (np.arange(ny) + 0.5 - cy) * step
    # asin(x/D) where the detector faces 2θB, as published; turned by the tilt elsewhere
    gamma = np.arctan(math.tan(tilt) + x / np.sqrt(1 - x**2)) - tilt + 2 * bragg - theta

    outer_x, outer_y, stop_x, stop_y = geometry.pupil_px
    u, v = ((np.arange(-math.ceil(2 * r), math.ceil(2 * r)) + 0.5) / 2 for r in (outer_x, outer_y))
    if isinstance(geometry.optics, RectangularPupil):
        outside_stop = (abs(u)[:, None] > stop_x) | (abs(v) > stop_y)
        pupil = (abs(u)[:, None] < outer_x) & (abs(v) < outer_y) & outside_stop
    else:
        radius = np.hypot(u[:, None], v)
        pupil = (stop_x < radius) & (radius < outer_x)
    below = np.zeros((u.size, v.size + 1), np.float32)
    np.cumsum(pupil, axis=1, out=below[:, 1:])
    return PublishedPlan(
        g=2 * math.pi / geometry.d_spacing_angstrom,
        qx=k * (math.cos(theta) - np.cos(gamma)),
        qz=k * (np.sin(gamma) + math.sin(theta)),
        qy=k * y * math.cos(tilt),
        ox=-u * k * step * math.sin(theta),
        oz=u * k * step * math.cos(theta),
        oy=v * k * step,
        below=below,
        thickness=geometry.thickness_nm * 10,
    )


@lru_cache(maxsize=8)
def published_peak(geometry: Geometry) -> float:
    """Maximum of the geometry's library on the published grid of 41³ parameters.

    Exact without the library: the windows in v leave a few hundred different sums over
    the pupil, whatever χ and the row.

    Raises
    ------
    ValueError
        If the whole library is dark.
    """
    plan = published_plan(geometry)
    strain, omega, chi = (np.linspace(-r, r, LIBRARY_STEPS) for r in LIBRARY_HALF_RANGE)
    rows = (plan.qy + plan.g * np.radians(chi)[:, None]).reshape(-1, 1) - plan.oy
    seen = np.abs(rows) < WINDOW
    first, last = seen.argmax(axis=1), seen.shape[1] - seen[:, ::-1].argmax(axis=1)
    windows = np.unique(np.stack([first, last])[:, seen.any(axis=1)], axis=1)
    sums = np.ascontiguousarray((plan.below[:, windows[1]] - plan.below[:, windows[0]]).T)
    tilted = plan.qx + plan.g * np.radians(omega)[:, None]
    open_ = np.abs(tilted - plan.ox[:, None, None]) < WINDOW  # (nu, n_omega, nx)
    peak = 0.0
    for value in strain:
        q = plan.qz - plan.g / (1 + value) - plan.oz[:, None]
        intensity = (plan.thickness * np.sinc(plan.thickness * q / (2 * np.pi)) ** 2).astype("f4")
        columns = (open_ * intensity[:, None]).reshape(plan.ox.size, -1)
        peak = max(peak, float(np.max(sums @ columns, initial=0.0)))
    if peak == 0:
        raise ValueError(
            "no light reaches the ROI anywhere in the library of strain ± 0.005, ω ± 0.05°, "
            f"χ ± 0.1°: check bragg_center_px = {geometry.bragg_center_px} and "
            f"roi_origin_px = {geometry.roi_origin_px}"
        )
    return peak


@kernel
def _window(position: Floats, points: Floats, lo: NDArray[np.int64], hi: NDArray[np.int64]) -> None:
    """Fill lo, hi with the range of points (monotonic) within the window of each position."""
    for i in range(position.size):
        first = 0
        while first < points.size and not abs(position[i] - points[first]) < WINDOW:
            first += 1
        last = first
        while last < points.size and abs(position[i] - points[last]) < WINDOW:
            last += 1
        lo[i], hi[i] = first, last


@kernel
def render_published(
    plan: PublishedPlan,
    gx: Floats,
    gy: Floats,
    g_strained: Floats,
    scale: float,
    background: Floats,
    out: NDArray[np.float32],
) -> None:
    """Fill out (n, ny, nx) for tilts gx, gy = G·(ω, χ) and G/(1+ε), in Å⁻¹, each (n,)."""
    n, ny, nx = out.shape
    nu = plan.ox.size
    x_lo, x_hi = np.empty(nx, np.int64), np.empty(nx, np.int64)
    y_lo, y_hi = np.empty(ny, np.int64), np.empty(ny, np.int64)
    sums = np.empty((nu, ny), np.float32)
    columns = np.empty((nx, nu), np.float32)
    column = np.empty(ny, np.float32)
    half = plan.thickness / 2
    for i in range(n):
        # a library runs through χ last: keep what χ does not change
        if i == 0 or gx[i] != gx[i - 1] or g_strained[i] != g_strained[i - 1]:
            _window(plan.qx + gx[i], plan.ox, x_lo, x_hi)
            for x in range(nx):
                for u in range(x_lo[x], x_hi[x]):
                    z = half * (plan.qz[x] - g_strained[i] - plan.oz[u])
                    s = 1.0 if abs(z) < 1e-8 else math.sin(z) / z
                    columns[x, u] = scale * plan.thickness * s * s
        if i == 0 or gy[i] != gy[i - 1]:
            _window(plan.qy + gy[i], plan.oy, y_lo, y_hi)
            for u in range(nu):
                for y in range(ny):
                    sums[u, y] = plan.below[u, y_hi[y]] - plan.below[u, y_lo[y]]
        for x in range(nx):
            column[:] = background[i]
            for u in range(x_lo[x], x_hi[x]):
                weight = columns[x, u]
                for y in range(ny):
                    column[y] += weight * sums[u, y]
            for y in range(ny):
                out[i, y, x] = column[y]
