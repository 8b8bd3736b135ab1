"""The continuous model: δ functions exact, intensity integrated over every pixel.

With s = −u, x along 2θ and lengths in binned pixels, a pattern is

    I(pixel) = ∫∫ sinc²[z(x)] · pupil(s, v) dx dy     s = s₀(x) + shift_x
    z = t/2π · (q₀(x) + dq)                           v = y cos a + shift_y

with (shift_x, shift_y, dq) = (Gω/(τ sin θ), Gχ/τ, Gε/(1+ε) + shift_x τ cos θ) and a the
detector's tilt against the beam of 2θB. Source: Luo et al., Sci. Rep. (2025),
doi 10.1038/s41598-025-97183-0, equation for I(x, y), with the δ functions integrated.

A sharp pupil is integrated exactly over every pixel, with sinc² dx/ds as a parabola in s on
every (sub-)column. With ``pupil_blur_px`` the pupil is its sharp self convolved with an
isotropic Gaussian of that standard deviation; its row integrals are a table, interpolated
by cubic splines, and x takes Gauss nodes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import spline_filter
from scipy.special import erf, i0e

from nanobeam_bluesky.geometry import Geometry, RectangularPupil
from nanobeam_bluesky.physics._numba import kernel

TiltReciprocal = Literal["strained", "unstrained"]
Floats = NDArray[np.floating[Any]]

CHANNELS = ("pattern", "shift_x", "shift_y", "dq", "thickness")
"""What `pattern_channels` fills: the pattern and its derivatives by these."""

# steps that keep every pixel within 1e-5 of the peak
_FRINGE_STEP = 0.2  # largest change of z over a sub-column, sharp pupil
_BLUR_FRINGE_STEP = 0.7  # largest change of z, blurred pupil
_BLUR_NODES = 4  # Gauss nodes of a sub-column, blurred pupil
_BLUR_STEP = 2.2  # largest sub-column, blurs
_TABLE_STEP = 1 / 3  # of the table, blurs
_REACH = 5.0  # where a blurred rim ends, blurs
_MIN_BLUR_PX = 0.05
_MAX_TABLE = 2**26


class ContinuousPlan(NamedTuple):
    """What all patterns of a geometry share; lengths in binned pixels."""

    g: float  # 2π/d of the relaxed film, Å⁻¹
    omega_px: float  # shift_x per (G/Å⁻¹ · ω/rad)
    chi_px: float  # shift_y per (G/Å⁻¹ · χ/rad)
    dq_px: float  # dq per shift_x, Å⁻¹
    thickness: float  # Å
    rows: Floats  # (ny + 1,) v of the row borders before the shift
    per_column: int  # sub-columns of a column
    borders: Floats  # (n_sub + 1,) s₀ at the borders of the sub-columns
    s: Floats  # (n_sub, nodes) s₀ at the nodes
    q: Floats  # (n_sub, nodes) q₀ at the nodes, Å⁻¹
    weights: Floats  # (nodes,) blurred: of the quadrature over x, scaled to the peak
    polynomial: Floats  # (n_sub, 3, 3): sharp: node values → powers of s − middle
    pupil: Floats  # (2, 2): (rim, stop) × (half-width in s, in v)
    round: bool
    table: NDArray[np.float32]  # (per row, n_s, n_v): blurred: spline coefficients of a row
    table_start: tuple[float, float]  # s, v of the first coefficient
    table_step: tuple[float, float]


@lru_cache(maxsize=8)
def continuous_plan(geometry: Geometry) -> ContinuousPlan:
    """Prepare the quadrature of a geometry.

    Raises
    ------
    ValueError
        If the ROI reaches below the sample's horizon (exit angle 0), or the pupil's blur is
        neither 0 nor large enough for the table.
    """
    k = 2 * math.pi / geometry.wavelength_angstrom
    g = 2 * math.pi / geometry.d_spacing_angstrom
    bragg = math.radians(geometry.bragg_angle_deg)
    theta = math.radians(geometry.incidence_deg)
    tilt = math.radians(geometry.detector_tilt_deg)
    step = geometry.binned_pixel_um * 1e-6 / geometry.detector_distance_m
    tau = k * step
    (ny, nx), (cx, cy) = geometry.pattern_shape, geometry.pattern_center
    per_q = geometry.thickness_nm * 10 / (2 * math.pi)

    def optics(x: Floats) -> tuple[Floats, Floats, Floats]:
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

    # the brightest pixel: sinc² = 1 in its middle, wholly inside the pupil
    nodes, weights = np.polynomial.legendre.leggauss(64)
    z = per_q * (optics(nodes / 2)[1] - optics(np.zeros(1))[1])
    peak = float(weights @ np.sinc(z) ** 2) / 2

    blur = geometry.pupil_blur_px
    edge_s, edge_q, _ = optics(np.arange(nx + 1) - cx)
    fringe = per_q * np.abs(np.diff(edge_q)).max()
    finest = fringe / _FRINGE_STEP
    if blur:
        finest = max(fringe / _BLUR_FRINGE_STEP, np.diff(edge_s).max() / (_BLUR_STEP * blur))
    per_column = math.ceil(finest)
    nodes, weights = np.polynomial.legendre.leggauss(_BLUR_NODES if blur else 3)
    x = np.arange(nx * per_column + 1) / per_column - cx
    borders, _, _ = optics(x)
    s, q, jacobian = optics(x[:-1, None] + (nodes + 1) / (2 * per_column))
    middle = (borders[1:] + borders[:-1]) / 2
    powers = (s - middle[:, None])[..., None] ** np.arange(3)  # (n_sub, node, power)
    scale = 1 / (peak * math.cos(tilt))
    table, start, steps = _blurred_rows(geometry) if blur else _NO_TABLE
    outer_x, outer_y, stop_x, stop_y = geometry.pupil_px
    return ContinuousPlan(
        g=g,
        omega_px=1 / (tau * math.sin(theta)),
        chi_px=1 / tau,
        dq_px=tau * math.cos(theta),
        thickness=geometry.thickness_nm * 10,
        rows=(np.arange(ny + 1) - cy) * math.cos(tilt),
        per_column=per_column,
        borders=borders,
        s=s,
        q=q,
        weights=scale / (2 * per_column) * weights,
        polynomial=_NO_POLYNOMIAL if blur else scale * np.linalg.inv(powers) * jacobian[:, None],
        pupil=np.array([[outer_x, outer_y], [min(stop_x, outer_x), min(stop_y, outer_y)]]),
        round=not isinstance(geometry.optics, RectangularPupil),
        table=table,
        table_start=start,
        table_step=steps,
    )


def shifts(
    plan: ContinuousPlan,
    strain: Floats,
    omega: Floats,
    chi: Floats,
    *,
    tilt_reciprocal: TiltReciprocal = "strained",
) -> tuple[Floats, Floats, Floats]:
    """shift_x, shift_y (pixels) and dq (Å⁻¹) of strain, ω and χ (deg), each (n,)."""
    strained = plan.g / (1 + strain)
    tilting = strained if tilt_reciprocal == "strained" else plan.g
    shift_x = tilting * np.radians(omega) * plan.omega_px
    shift_y = tilting * np.radians(chi) * plan.chi_px
    return shift_x, shift_y, plan.g - strained + shift_x * plan.dq_px


def angles(
    plan: ContinuousPlan,
    shift_x: NDArray[np.float64],
    shift_y: NDArray[np.float64],
    dq: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Strain, ω and χ (deg) of shifts with strained tilts, each (n,): undoes `shifts`."""
    strained = plan.g + shift_x * plan.dq_px - dq
    omega = np.degrees(shift_x / (strained * plan.omega_px))
    chi = np.degrees(shift_y / (strained * plan.chi_px))
    return plan.g / strained - 1, omega, chi


def shift_derivatives(
    plan: ContinuousPlan,
    strain: Floats,
    omega: Floats,
    chi: Floats,
    *,
    tilt_reciprocal: TiltReciprocal = "strained",
) -> Floats:
    """Derivatives of (shift_x, shift_y, dq, thickness/Å), the rows, by (strain, ω/deg, χ/deg,
    thickness/nm), the columns: (n, 4, 4).
    """  # noqa: D205
    degree = math.pi / 180
    strained = plan.g / (1 + strain)
    slope = -strained / (1 + strain)
    tilting = strained if tilt_reciprocal == "strained" else np.full_like(strained, plan.g)
    out = np.zeros((strain.size, 4, 4))
    if tilt_reciprocal == "strained":
        out[:, 0, 0] = slope * omega * degree * plan.omega_px
        out[:, 1, 0] = slope * chi * degree * plan.chi_px
    out[:, 0, 1] = tilting * degree * plan.omega_px
    out[:, 1, 2] = tilting * degree * plan.chi_px
    out[:, 2] = out[:, 0] * plan.dq_px
    out[:, 2, 0] -= slope
    out[:, 3, 3] = 10
    return out


# ------------------------------------------------------------------ blurred pupil

Table = tuple[NDArray[np.float32], tuple[float, float], tuple[float, float]]
_NO_POLYNOMIAL = np.empty((0, 3, 3))
_NO_TABLE: Table = (np.empty((0, 0, 0), np.float32), (0.0, 0.0), (0.0, 0.0))


def _blurred_rows(geometry: Geometry) -> Table:
    """∫ blurred pupil dv over one detector row, on a grid of s and of the row's start v.

    Stored as cubic spline coefficients (per row, n_s, n_v / per row): the points that lie
    whole rows apart are neighbours.
    """
    blur = geometry.pupil_blur_px
    row = math.cos(math.radians(geometry.detector_tilt_deg))
    reach = _REACH * blur
    outer_x, outer_y, _, _ = geometry.pupil_px
    step = min(_TABLE_STEP * blur, 0.5)
    per_row = math.ceil(row / step)
    n_s = math.ceil(2 * (outer_x + reach) / step) + 1
    n_v = math.ceil((2 * (outer_y + reach) / row) + 2) * per_row
    if blur < _MIN_BLUR_PX or n_s * n_v > _MAX_TABLE:
        smallest = max(
            _MIN_BLUR_PX, blur * math.sqrt(n_s * n_v / _MAX_TABLE) if blur > _MIN_BLUR_PX else 0
        )
        raise ValueError(
            f"pupil_blur_px = {blur:g} must be 0 or at least {smallest:.2g} for this pupil"
        )
    dv = row / per_row
    s = (np.arange(n_s) - (n_s - 1) / 2) * step
    v = (np.arange(n_v) - (n_v + per_row) / 2) * dv
    # cells of the table's step, by two Gauss nodes; rows as sums of cells
    cells = np.zeros((n_s, n_v + per_row))
    centers = v[0] + (np.arange(n_v + per_row) + 0.5) * dv
    for node in (-1, 1):
        cells += _blurred_pupil(geometry, s[:, None], centers + node * dv / math.sqrt(12)) * dv / 2
    below = np.cumsum(np.pad(cells, ((0, 0), (1, 0))), axis=1)
    rows = below[:, per_row:-1] - below[:, : -per_row - 1]
    spline = spline_filter(rows, order=3, mode="mirror").reshape(n_s, -1, per_row)
    table = np.ascontiguousarray(np.moveaxis(spline, 2, 0), np.float32)
    return table, (float(s[0]), float(v[0])), (step, dv)


def _blurred_pupil(geometry: Geometry, s: Floats, v: Floats) -> Floats:
    """Transmission at (s, v) of the pupil convolved with the Gaussian blur."""
    outer_x, outer_y, stop_x, stop_y = geometry.pupil_px
    blur = geometry.pupil_blur_px
    if isinstance(geometry.optics, RectangularPupil):

        def interval(x: Floats, half: float) -> Floats:
            a = math.sqrt(2) * blur
            edges: Floats = (erf((x + half) / a) - erf((x - half) / a)) / 2
            return edges

        stop = interval(s, min(stop_x, outer_x)) * interval(v, min(stop_y, outer_y))
        return interval(s, outer_x) * interval(v, outer_y) - stop
    return np.asarray(np.interp(np.hypot(s, v), *_ring_profile(outer_x, stop_x, blur)))


@lru_cache(maxsize=16)
def _ring_profile(outer: float, stop: float, blur: float) -> tuple[Floats, Floats]:
    """Distances from the axis, and the transmission of a blurred ring at them."""
    # constant but for the rims
    steps = blur * np.linspace(-8, 8, 1601)
    knots = np.unique(np.clip([outer + steps, stop + steps], 0, None))
    nodes, weights = np.polynomial.legendre.leggauss(64)
    ring = np.zeros_like(knots)
    for sign, r in ((1, outer), (-1, stop)):
        # P(|knot + noise| < r): the Rice distribution of the distance from the axis
        low = np.clip(knots - 8 * blur, 0, r)[:, None]
        high = np.clip(knots + 8 * blur, 0, r)[:, None]
        rho = low + (high - low) * (nodes + 1) / 2
        x = knots[:, None]
        density = rho / blur**2 * np.exp(-(((x - rho) / blur) ** 2) / 2) * i0e(x * rho / blur**2)
        ring += sign * (density * (high - low) / 2) @ weights
    return knots, ring


@kernel
def _spline_weights(t: float, w: Floats, dw: Floats) -> None:
    """Fill w, dw (4,) with the cubic B-splines around a point t in [0, 1) and their slopes."""
    w[0] = (1 - t) ** 3 / 6
    w[1] = (3 * t - 6) * t * t / 6 + 2 / 3
    w[3] = t * t * t / 6
    w[2] = 1 - w[0] - w[1] - w[3]
    dw[0] = -((1 - t) ** 2) / 2
    dw[1] = (1.5 * t - 2) * t
    dw[3] = t * t / 2
    dw[2] = -dw[0] - dw[1] - dw[3]


@kernel
def _blurred(
    plan: ContinuousPlan,
    shift_x: float,
    shift_y: float,
    dq: float,
    thickness: float,
    out: Floats,
) -> None:
    """`pattern_channels` of a blurred pupil."""
    derivatives = out.shape[0] > 1
    nx, ny = out.shape[1:]
    per_row, n_s, n_v = plan.table.shape
    ds, dv = plan.table_step
    w, dw = np.empty(4), np.empty(4)
    # the lines of the table that the columns touch
    start = plan.table_start[0] - shift_x
    n_nodes = plan.s.shape[1]
    line_lo = max(0, math.floor((plan.s[0, 0] - start) / ds) - 1)
    line_hi = min(n_s, math.floor((plan.s[-1, n_nodes - 1] - start) / ds) + 3)
    # interpolate in v, for all rows at once: they lie `per_row` points apart
    position = (plan.rows[0] + shift_y - plan.table_start[1]) / dv
    point = math.floor(position)
    _spline_weights(position - point, w, dw)
    o0, o1 = (point - 1) // per_row, point // per_row
    o2, o3 = (point + 1) // per_row, (point + 2) // per_row
    w0, w1, w2, w3 = np.float32(w[0]), np.float32(w[1]), np.float32(w[2]), np.float32(w[3])
    dw /= dv
    dw0, dw1, dw2, dw3 = np.float32(dw[0]), np.float32(dw[1]), np.float32(dw[2]), np.float32(dw[3])
    table0, table1 = plan.table[(point - 1) % per_row], plan.table[point % per_row]
    table2, table3 = plan.table[(point + 1) % per_row], plan.table[(point + 2) % per_row]
    row_lo, row_hi = max(0, -o0), min(ny, n_v - o3)  # the table ends with dark rows
    n_rows = row_hi - row_lo
    if n_rows <= 0:
        return
    rows = np.zeros((2 if derivatives else 1, n_s + 1, n_rows), np.float32)
    for i in range(line_lo, line_hi):
        # slices: an index that might be negative would keep the loop from being vectorised
        t0, t1 = table0[i][row_lo + o0 : row_hi + o0], table1[i][row_lo + o1 : row_hi + o1]
        t2, t3 = table2[i][row_lo + o2 : row_hi + o2], table3[i][row_lo + o3 : row_hi + o3]
        line = rows[0, i]
        for j in range(n_rows):
            line[j] = w0 * t0[j] + w1 * t1[j] + w2 * t2[j] + w3 * t3[j]
        if derivatives:
            line = rows[1, i]
            for j in range(n_rows):
                line[j] = dw0 * t0[j] + dw1 * t1[j] + dw2 * t2[j] + dw3 * t3[j]
    # quadrature over x: how much of every line of the table goes into a column
    per_q = thickness / (2 * math.pi)
    mix = np.zeros((4, n_s + 1), np.float32)
    sums = np.empty(n_rows, np.float32)
    for x in range(nx):
        c0, c1 = x * plan.per_column, (x + 1) * plan.per_column
        lo = max(0, math.floor((plan.s[c0, 0] - start) / ds) - 1)
        hi = min(n_s, math.floor((plan.s[c1 - 1, n_nodes - 1] - start) / ds) + 3)
        if lo >= hi:
            continue
        mix[:, lo : hi + 1] = 0
        for c in range(c0, c1):
            for node in range(n_nodes):
                position = (plan.s[c, node] - start) / ds
                point = math.floor(position)
                _spline_weights(position - point, w, dw)
                z = per_q * (plan.q[c, node] + dq)
                value, slope = _sinc2(z)
                value *= plan.weights[node]
                slope *= plan.weights[node]
                for tap in range(4):
                    i = point - 1 + tap
                    if lo <= i < hi:
                        mix[0, i] += value * w[tap]
                        if derivatives:
                            mix[1, i] += value * dw[tap] / ds
                            mix[2, i] += slope * per_q * w[tap]
                            mix[3, i] += slope * z / thickness * w[tap]
        for channel in range(out.shape[0]):
            lines = rows[1 if channel == 2 else 0]
            parts = mix[channel if channel < 2 else channel - 1 if channel > 2 else 0]
            sums[:] = 0
            for i in range(lo, hi, 2):  # two at a time spare half the traffic
                m0, m1, line0, line1 = parts[i], parts[i + 1], lines[i], lines[i + 1]
                for j in range(n_rows):
                    sums[j] += m0 * line0[j] + m1 * line1[j]
            column = out[channel, x, row_lo:row_hi]
            for j in range(n_rows):
                column[j] = sums[j]


# ------------------------------------------------------------------ sharp pupil


@kernel
def _root_moments(r: float, s: float) -> tuple[float, float, float]:
    """∫₀ˢ σᵏ √(r² − σ²) dσ for k = 0, 1, 2, up to a constant for k = 1; |s| ≤ r."""
    h2 = max(r * r - s * s, 0.0)
    h = math.sqrt(h2)
    m0 = (s * h + r * r * math.asin(s / r)) / 2
    return m0, -h2 * h / 3, (r * r * m0 - s * h2 * h) / 4


@kernel
def _sharp(
    plan: ContinuousPlan,
    shift_x: float,
    shift_y: float,
    dq: float,
    thickness: float,
    out: Floats,
) -> None:
    """`pattern_channels` of a sharp pupil."""
    n_sub = plan.q.shape[0]
    per_q = thickness / (2 * math.pi)
    # powers of s that make up: the pattern, minus its slope in s, and the derivatives of
    # the pattern by dq and thickness
    powers = np.zeros((4, n_sub, 3))
    values = np.empty((3, 3))
    for c in range(n_sub):
        middle = (plan.borders[c] + plan.borders[c + 1]) / 2 + shift_x
        for node in range(3):
            z = per_q * (plan.q[c, node] + dq)
            value, slope = _sinc2(z)
            values[0, node] = value
            values[1, node] = slope * per_q
            values[2, node] = slope * z / thickness
        for channel in range(3 if out.shape[0] > 1 else 1):
            a0 = a1 = a2 = 0.0  # of s − middle
            for node in range(3):
                a0 += plan.polynomial[c, 0, node] * values[channel, node]
                a1 += plan.polynomial[c, 1, node] * values[channel, node]
                a2 += plan.polynomial[c, 2, node] * values[channel, node]
            k = channel + 1 if channel else 0
            powers[k, c, 0] = a0 - middle * (a1 - middle * a2)
            powers[k, c, 1] = a1 - 2 * middle * a2
            powers[k, c, 2] = a2
        powers[1, c, 0] = -powers[0, c, 1]
        powers[1, c, 1] = -2 * powers[0, c, 2]
    for part in range(2):
        _add_opening(plan, part, shift_x, shift_y, powers, out)


@kernel
def _add_opening(
    plan: ContinuousPlan, part: int, shift_x: float, shift_y: float, powers: Floats, out: Floats
) -> None:
    """Add the light through one opening (part 0: the rim; 1: the stop, subtracted).

    With ±h(s) the opening's edge, the part of a column below v has the moments
    ∫ sᵏ clip(v, −h, h) ds in closed form; a pixel is their difference between its two row
    borders. Most borders lie wholly inside (|v| ≤ h) or outside (|v| ≥ h) a column.
    """
    a, b = plan.pupil[part, 0], plan.pupil[part, 1]
    if a <= 0 or b <= 0:
        return
    sign = 1.0 if part == 0 else -1.0
    derivatives = out.shape[0] > 1
    n_powers = 4 if derivatives else 1
    ny = plan.rows.size - 1
    row = plan.rows[1] - plan.rows[0]
    v_first = plan.rows[0] + shift_y
    # per channel (pattern, shift_x, dq, thickness): light below v, if v lies inside (per v)
    # and outside; and the same with the derivative by shift_y last
    inside, outside = np.zeros(4), np.zeros(4)
    now, last = np.zeros(5), np.zeros(5)
    l0 = l1 = l2 = r0 = r1 = r2 = h0 = h1 = 0.0  # at the left and right border
    started = False
    for c in range(plan.q.shape[0]):
        border0, border1 = plan.borders[c] + shift_x, plan.borders[c + 1] + shift_x
        if border1 <= -a or border0 >= a:
            continue
        s0, s1 = max(border0, -a), min(border1, a)
        e0, e1, e2 = s1 - s0, (s1**2 - s0**2) / 2, (s1**3 - s0**3) / 3
        if plan.round:
            if started:
                l0, l1, l2, h0 = r0, r1, r2, h1
            else:
                l0, l1, l2 = _root_moments(a, s0)
                h0 = math.sqrt(a * a - s0 * s0)
                started = True
            r0, r1, r2 = _root_moments(a, s1)
            h1 = math.sqrt(a * a - s1 * s1)
            h_min = min(h0, h1)
            h_max = a if s0 < 0 < s1 else max(h0, h1)
            f0, f1, f2 = r0 - l0, r1 - l1, r2 - l2
        else:
            h0 = h1 = h_min = h_max = b
            f0, f1, f2 = b * e0, b * e1, b * e2
        for k in range(n_powers):
            p0, p1, p2 = powers[k, c, 0], powers[k, c, 1], powers[k, c, 2]
            inside[k] = p0 * e0 + p1 * e1 + p2 * e2
            outside[k] = p0 * f0 + p1 * f1 + p2 * f2
        # the borders move with shift_x, unless the opening ends first
        p0, p1, p2 = powers[0, c, 0], powers[0, c, 1], powers[0, c, 2]
        edge0 = p0 + s0 * (p1 + s0 * p2) if border0 > -a else 0.0
        edge1 = p0 + s1 * (p1 + s1 * p2) if border1 < a else 0.0
        inside[1] += edge1 - edge0
        outside[1] += edge1 * h1 - edge0 * h0
        column = c // plan.per_column
        j = max(0, math.floor((-h_max - v_first) / row))  # the rows below are dark
        first = True
        while j <= ny:
            v = v_first + j * row
            height = abs(v)
            up = 1.0 if v >= 0 else -1.0
            if height <= h_min:
                now[0] = v * inside[0]
                if derivatives:
                    now[1], now[2] = v * inside[1], inside[0]
                    now[3], now[4] = v * inside[2], v * inside[3]
            elif height >= h_max:
                now[0] = up * outside[0]
                if derivatives:
                    now[1], now[2] = up * outside[1], 0.0
                    now[3], now[4] = up * outside[2], up * outside[3]
            else:
                # the rim leaves the row border at ±cut
                cut = math.sqrt(a * a - v * v)
                m0, m1, m2 = _root_moments(a, cut)
                lo, hi = max(s0, -cut), min(s1, cut)
                e0 = e1 = e2 = 0.0
                if hi > lo:
                    e0, e1, e2 = hi - lo, (hi**2 - lo**2) / 2, (hi**3 - lo**3) / 3
                f0, f1, f2 = height * e0, height * e1, height * e2
                # beyond the cut the rim limits; its moments 0 and 2 are odd in s, 1 is even
                if s0 < -cut:
                    f0, f1, f2 = f0 - m0 - l0, f1 + m1 - l1, f2 - m2 - l2
                if s1 > cut:
                    f0, f1, f2 = f0 + r0 - m0, f1 + r1 - m1, f2 + r2 - m2
                now[0] = up * (p0 * f0 + p1 * f1 + p2 * f2)
                if derivatives:
                    edge = edge1 * min(h1, height) - edge0 * min(h0, height)
                    now[2] = p0 * e0 + p1 * e1 + p2 * e2
                    for k, to in ((1, 1), (2, 3), (3, 4)):
                        now[to] = up * (
                            powers[k, c, 0] * f0 + powers[k, c, 1] * f1 + powers[k, c, 2] * f2
                        )
                    now[1] += up * edge
            if not first:
                for k in range(out.shape[0]):
                    out[k, column, j - 1] += sign * (now[k] - last[k])
            first = False
            last, now = now, last
            if height <= h_min:
                # all rows up to h_min are full: the same light each
                full = max(j, min(ny, math.floor((h_min - v_first) / row)))
                for k in range(out.shape[0]):
                    light = sign * row * inside[k - 1 if k > 2 else k]
                    if k == 2:
                        continue
                    for y in range(j, full):
                        out[k, column, y] += light
                    last[k] += (full - j) * light * sign
                j = full
            elif v >= h_max:
                break
            j += 1


# ------------------------------------------------------------------ both


@kernel
def _sinc2(z: float) -> tuple[float, float]:
    """sinc² and its derivative at z."""
    a = math.pi * z
    if abs(a) < 1e-3:
        return 1 - a * a / 3, -2 * math.pi * a / 3 * (1 - 4 * a * a / 15)
    s, c = math.sin(a), math.cos(a)
    return s * s / (a * a), 2 * math.pi * s * (a * c - s) / (a * a * a)


@kernel
def pattern_channels(
    plan: ContinuousPlan,
    shift_x: float,
    shift_y: float,
    dq: float,
    thickness: float,
    out: Floats,
) -> None:
    """Fill out (1 or 5, nx, ny), x first: the pattern, or all `CHANNELS`.

    Shifts in pixels, dq in Å⁻¹, thickness in Å. Exact derivatives of the model as it is
    computed, at the scale of the plan's own thickness.
    """
    out[:] = 0
    if plan.table.size > 0:
        _blurred(plan, shift_x, shift_y, dq, thickness, out)
    else:
        _sharp(plan, shift_x, shift_y, dq, thickness, out)


@kernel
def render_continuous(
    plan: ContinuousPlan,
    shift_x: Floats,
    shift_y: Floats,
    dq: Floats,
    background: Floats,
    out: NDArray[np.float32],
    thickness: Floats | None = None,
) -> None:
    """Fill out (n, ny, nx) for the shifts in pixels, dq in Å⁻¹ and thickness in Å, each (n,)."""
    n, ny, nx = out.shape
    pattern = np.empty((1, nx, ny))
    for i in range(n):
        film = plan.thickness if thickness is None else thickness[i]
        pattern_channels(plan, shift_x[i], shift_y[i], dq[i], film, pattern)
        for y in range(ny):
            for x in range(nx):
                out[i, y, x] = pattern[0, x, y] + background[i]
