"""The continuous model: δ functions exact, intensity integrated over every pixel.

With s = −u, x along 2θ and lengths in binned pixels, a pattern is

    I(pixel) = ∫∫ sinc²[z(s)] · pupil(s, v) · (dx/ds) ds dv        s = s₀(x) + shift_x
    z = t/2π · (q₀(x) + dq)                                        v = y cos a + shift_y

with (shift_x, shift_y, dq) = (Gω/(τ sin θ), Gχ/τ, Gε/(1+ε) + shift_x τ cos θ) and a the
detector's tilt. Source: Luo et al., Sci. Rep. (2025), doi 10.1038/s41598-025-97183-0, equation
for I(x, y), with the δ functions integrated.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import Geometry, RectangularPupil
from nanobeam_bluesky.physics._numba import kernel

TiltReciprocal = Literal["strained", "unstrained"]

_FRINGE_STEP = 0.2  # largest change of z over a sub-column


class ContinuousPlan(NamedTuple):
    """What all patterns of a geometry share; lengths in binned pixels."""

    g: float  # 2π/d of the relaxed film, Å⁻¹
    omega_px: float  # shift_x per (G/Å⁻¹ · ω/rad)
    chi_px: float  # shift_y per (G/Å⁻¹ · χ/rad)
    dq_px: float  # dq per shift_x, Å⁻¹
    borders: NDArray[np.float64]  # (n_sub + 1,) s₀ at the borders of the sub-columns
    q: NDArray[np.float64]  # (n_sub, 3) q₀ at the nodes, Å⁻¹
    polynomial: NDArray[np.float64]  # (n_sub, 3, 3): node values → powers of s − middle
    rows: NDArray[np.float64]  # (ny + 1,) v of the row borders before the shift
    per_column: int  # sub-columns of a column
    pupil: NDArray[np.float64]  # (2, 2): (outer, stop) × (half-width in s, in v)
    round: bool
    thickness: float  # Å


@lru_cache(maxsize=8)
def continuous_plan(geometry: Geometry) -> ContinuousPlan:
    """Prepare the quadrature of a geometry.

    Raises
    ------
    ValueError
        If the ROI reaches below the sample's horizon (exit angle 0).
    """
    k = 2 * math.pi / geometry.wavelength_angstrom
    g = 2 * math.pi / geometry.d_spacing_angstrom
    bragg = math.radians(geometry.bragg_angle_deg)
    theta = math.radians(geometry.incidence_deg)
    tilt = math.radians(geometry.detector_tilt_deg)
    step = geometry.binned_pixel_um * 1e-6 / geometry.detector_distance_m
    tau = k * step
    (ny, nx), (cx, cy) = geometry.pattern_shape, geometry.pattern_center
    thickness = geometry.thickness_nm * 10

    def optics(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """s₀, q₀ and dx/ds at x."""
        slope = math.tan(tilt) + x * step
        gamma = 2 * bragg - theta - tilt + np.arctan(slope)
        if gamma.min() <= 0:
            raise ValueError(
                f"the ROI reaches an exit angle of {math.degrees(gamma.min()):.3g}°, below the "
                "sample's horizon; move the ROI or make it smaller"
            )
        s = (math.cos(theta) - np.cos(gamma)) / (step * math.sin(theta))
        q = k * (np.sin(gamma) + math.sin(theta)) - g + s * tau * math.cos(theta)
        return s, q, math.sin(theta) * (1 + slope**2) / np.sin(gamma)

    _, edge_q, _ = optics(np.arange(nx + 1) - cx)
    fringe = thickness / (2 * math.pi) * np.abs(np.diff(edge_q)).max()
    per_column = max(1, math.ceil(fringe / _FRINGE_STEP))
    x = np.arange(nx * per_column + 1) / per_column - cx
    borders, _, _ = optics(x)
    nodes, _ = np.polynomial.legendre.leggauss(3)
    s, q, jacobian = optics(x[:-1, None] + (nodes + 1) / (2 * per_column))
    local = s - (borders[1:] + borders[:-1])[:, None] / 2
    powers = np.stack([np.ones_like(local), local, local**2], axis=-1)  # (n_sub, node, power)

    # the brightest pixel: sinc² = 1 in its middle, wholly inside the pupil
    nodes, weights = np.polynomial.legendre.leggauss(64)
    _, q_peak, _ = optics(nodes / 2)
    z = thickness / (2 * math.pi) * (q_peak - optics(np.zeros(1))[1])
    peak = float(weights @ np.sinc(z) ** 2) / 2
    outer_x, outer_y, stop_x, stop_y = geometry.pupil_px
    return ContinuousPlan(
        g=g,
        omega_px=1 / (tau * math.sin(theta)),
        chi_px=1 / tau,
        dq_px=tau * math.cos(theta),
        borders=borders,
        q=q,
        polynomial=np.linalg.inv(powers) * jacobian[:, None, :] / (peak * math.cos(tilt)),
        rows=(np.arange(ny + 1) - cy) * math.cos(tilt),
        per_column=per_column,
        pupil=np.array([[outer_x, outer_y], [min(stop_x, outer_x), min(stop_y, outer_y)]]),
        round=not isinstance(geometry.optics, RectangularPupil),
        thickness=thickness,
    )


def shifts(
    plan: ContinuousPlan,
    strain: NDArray[np.float64],
    omega: NDArray[np.float64],
    chi: NDArray[np.float64],
    *,
    tilt_reciprocal: TiltReciprocal = "strained",
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """shift_x, shift_y (pixels) and dq (Å⁻¹) of strain, ω and χ (deg), each (n,)."""
    strained = plan.g / (1 + strain)
    tilting = strained if tilt_reciprocal == "strained" else plan.g
    shift_x = tilting * np.radians(omega) * plan.omega_px
    shift_y = tilting * np.radians(chi) * plan.chi_px
    return shift_x, shift_y, plan.g - strained + shift_x * plan.dq_px


@kernel
def _sinc2(z):  # type: ignore[no-untyped-def]  # numba infers
    """sinc² and its derivative at z."""
    a = math.pi * z
    if abs(a) < 1e-3:
        return 1 - a * a / 3, -2 * math.pi * a / 3 * (1 - 4 * a * a / 15)
    s, c = math.sin(a), math.cos(a)
    return s * s / (a * a), 2 * math.pi * s * (a * c - s) / (a * a * a)


@kernel
def _moments(r, s, out):  # type: ignore[no-untyped-def]  # numba infers
    """Fill out (3,) with ∫₀ˢ σᵏ √(r² − σ²) dσ, k = 0, 1, 2 (up to a constant); |s| ≤ r."""
    h2 = max(r * r - s * s, 0.0)
    h = math.sqrt(h2)
    out[0] = (s * h + r * r * math.asin(s / r)) / 2
    out[1] = -h2 * h / 3
    out[2] = (r * r * out[0] - s * h2 * h) / 4


@kernel
def _add_opening(plan, part, shift_x, shift_y, coefficients, out):  # type: ignore[no-untyped-def]
    """Add the light through one opening (part 0: the rim; 1: the stop, subtracted).

    Exact for the piecewise parabola: with ±h(s) the opening's edge, the part of a column
    below v has the moments ∫ sᵏ clip(v, −h, h) ds in closed form, and a pixel is their
    difference between its two row borders.
    """
    a, b = plan.pupil[part, 0], plan.pupil[part, 1]
    if a <= 0 or b <= 0:
        return
    sign = 1.0 if part == 0 else -1.0
    ny = plan.rows.size - 1
    n_sub = plan.borders.size - 1
    # for every row border: where the rim leaves it, and the moments there
    cut = np.empty(ny + 1)
    at_cut = np.empty((ny + 1, 3))
    if plan.round:
        for j in range(ny + 1):
            v = plan.rows[j] + shift_y
            cut[j] = math.sqrt(max(a * a - v * v, 0.0))
            _moments(a, cut[j], at_cut[j])
    left, right = np.empty(3), np.empty(3)
    seen = False
    for i in range(n_sub):
        s0, s1 = plan.borders[i] + shift_x, plan.borders[i + 1] + shift_x
        if s1 <= -a or s0 >= a:
            continue
        s0, s1 = max(s0, -a), min(s1, a)
        p0, p1, p2 = coefficients[i, 0], coefficients[i, 1], coefficients[i, 2]
        inside = (s1 - s0) * p0 + (s1**2 - s0**2) / 2 * p1 + (s1**3 - s0**3) / 3 * p2
        if plan.round:
            if seen:
                left[:] = right
            else:
                _moments(a, s0, left)
                seen = True
            _moments(a, s1, right)
            h0, h1 = math.sqrt(a * a - s0 * s0), math.sqrt(a * a - s1 * s1)
            h_min = min(h0, h1)
            h_max = a if s0 < 0 < s1 else max(h0, h1)
            beyond = (
                (right[0] - left[0]) * p0 + (right[1] - left[1]) * p1 + (right[2] - left[2]) * p2
            )
        else:
            h_min = h_max = b
            beyond = b * inside
        column = out[i // plan.per_column]
        previous = 0.0
        for j in range(ny + 1):
            v = plan.rows[j] + shift_y
            height = abs(v)
            if height <= h_min:
                value = v * inside
            else:
                if height >= h_max:
                    value = beyond
                else:
                    c = cut[j]
                    value = 0.0
                    lo, hi = max(s0, -c), min(s1, c)
                    if hi > lo:
                        value += height * (
                            (hi - lo) * p0 + (hi**2 - lo**2) / 2 * p1 + (hi**3 - lo**3) / 3 * p2
                        )
                    if s0 < -c:
                        # the moments 0 and 2 are odd in s, moment 1 is even
                        if s1 < -c:
                            value += beyond
                        else:
                            value += (
                                (-at_cut[j, 0] - left[0]) * p0
                                + (at_cut[j, 1] - left[1]) * p1
                                + (-at_cut[j, 2] - left[2]) * p2
                            )
                    if s1 > c:
                        if s0 > c:
                            value += beyond
                        else:
                            value += (
                                (right[0] - at_cut[j, 0]) * p0
                                + (right[1] - at_cut[j, 1]) * p1
                                + (right[2] - at_cut[j, 2]) * p2
                            )
                if v < 0:
                    value = -value
            if j > 0:
                column[j - 1] += sign * (value - previous)
            previous = value


@kernel
def render_continuous(plan, shift_x, shift_y, dq, background, out):  # type: ignore[no-untyped-def]
    """Fill out (n, ny, nx) for the shifts in pixels and dq in Å⁻¹, each (n,)."""
    n, ny, nx = out.shape
    n_sub = plan.borders.size - 1
    coefficients = np.empty((n_sub, 3))
    pattern = np.empty((nx, ny))
    per_q = plan.thickness / (2 * math.pi)
    for i in range(n):
        for c in range(n_sub):
            s0, _ = _sinc2(per_q * (plan.q[c, 0] + dq[i]))
            s1, _ = _sinc2(per_q * (plan.q[c, 1] + dq[i]))
            s2, _ = _sinc2(per_q * (plan.q[c, 2] + dq[i]))
            w = plan.polynomial[c]
            a0 = w[0, 0] * s0 + w[0, 1] * s1 + w[0, 2] * s2
            a1 = w[1, 0] * s0 + w[1, 1] * s1 + w[1, 2] * s2
            a2 = w[2, 0] * s0 + w[2, 1] * s1 + w[2, 2] * s2
            middle = (plan.borders[c] + plan.borders[c + 1]) / 2 + shift_x[i]
            coefficients[c, 0] = a0 - middle * (a1 - middle * a2)
            coefficients[c, 1] = a1 - 2 * middle * a2
            coefficients[c, 2] = a2
        pattern[:] = background[i]
        _add_opening(plan, 0, shift_x[i], shift_y[i], coefficients, pattern)
        _add_opening(plan, 1, shift_x[i], shift_y[i], coefficients, pattern)
        for y in range(ny):
            for x in range(nx):
                out[i, y, x] = pattern[x, y]
