"""Slow, plain versions of the forward model, straight from the equations of the paper."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import dblquad, quad
from scipy.special import ndtr

from nanobeam_bluesky.geometry import RectangularPupil

HC, HC_PUBLISHED = 12.39841984, 12.398


def direct_sum(strain, omega, chi, geometry, tilt_reciprocal="unstrained", rows=None):
    """The published four-dimensional sum over (y, x, v, u), unscaled: (ny, nx) or some rows."""
    wavelength = geometry.wavelength_angstrom * HC_PUBLISHED / HC
    k, g = 2 * np.pi / wavelength, 2 * np.pi / geometry.d_spacing_angstrom
    bragg = np.arcsin(wavelength / (2 * geometry.d_spacing_angstrom))
    theta = bragg + np.radians(geometry.delta_theta_deg)
    tilt = 0.0
    if geometry.detector_two_theta_deg is not None:
        tilt = 2 * bragg - np.radians(geometry.detector_two_theta_deg)
    ny, nx = geometry.pattern_shape
    cx, cy = geometry.pattern_center
    p_over_d = geometry.binned_pixel_um * 1e-6 / geometry.detector_distance_m
    x = ((np.arange(nx) + 0.5 - cx) * p_over_d)[None, :, None]
    y = (np.arange(ny) + 0.5 - cy) * p_over_d
    # half pixels, twice as many as the detector has; more where that would cut the pupil
    n = 2 * max(nx, ny, math.ceil(2 * max(geometry.pupil_px[:2])) + 3)
    grid = (np.arange(n) - np.mean(np.arange(n))) / 2
    u, v = grid[None, None, :], grid[:, None, None]

    gamma = np.arcsin(x) + 2 * bragg - theta
    if tilt:
        gamma = np.arctan(np.tan(tilt) + np.tan(np.arcsin(x))) - tilt + 2 * bragg - theta
    qx, qz = k * (np.cos(theta) - np.cos(gamma)), k * (np.sin(gamma) + np.sin(theta))
    qy = k * y * np.cos(tilt)
    tau = k * p_over_d
    ox, oy, oz = -u * tau * np.sin(theta), v * tau, u * tau * np.cos(theta)
    outer_x, outer_y, stop_x, stop_y = geometry.pupil_px
    if isinstance(geometry.optics, RectangularPupil):
        stop = (abs(u) <= stop_x) & (abs(v) <= stop_y) & (stop_x > 0)
        pupil = (abs(u) < outer_x) & (abs(v) < outer_y) & ~stop
    else:
        r = np.sqrt(u**2 + v**2)
        pupil = (stop_x < r) & (r < outer_x)
    t = geometry.thickness_nm * 10
    strained = g / (1 + strain)
    tilting = strained if tilt_reciprocal == "strained" else g
    intensity = t * np.sinc(t / (2 * np.pi) * (qz - strained - oz)) ** 2
    near_x = abs(qx + tilting * np.radians(omega) - ox) < 5e-4
    rows = range(ny) if rows is None else rows
    return np.stack(
        [  # a row at a time fits into memory: (v, x, u)
            np.sum(
                intensity * near_x * (abs(qy[j] + tilting * np.radians(chi) - oy) < 5e-4) * pupil,
                axis=(0, 2),
            )
            for j in rows
        ]
    )


def adaptive_integral(strain, omega, chi, geometry, pixels, tilt_reciprocal="strained"):
    """Pixels [(row, column), …] of the continuous model, by adaptive quadrature.

    In units of a pixel inside the pupil with the maximum of sinc² in its middle.
    """
    k, g = 2 * np.pi / geometry.wavelength_angstrom, 2 * np.pi / geometry.d_spacing_angstrom
    bragg, theta = np.radians([geometry.bragg_angle_deg, geometry.incidence_deg])
    tilt = np.radians(geometry.detector_tilt_deg)
    cx, cy = geometry.pattern_center
    p_over_d = geometry.binned_pixel_um * 1e-6 / geometry.detector_distance_m
    tau = k * p_over_d
    t = geometry.thickness_nm * 10

    def u_and_qz(x, tilt_x):
        gamma = 2 * bragg - theta - tilt + np.arctan(np.tan(tilt) + x * p_over_d)
        qx, qz = k * (np.cos(theta) - np.cos(gamma)), k * (np.sin(gamma) + np.sin(theta))
        return -(qx + tilt_x) / (tau * np.sin(theta)), qz

    def sinc2(x, reciprocal, tilt_x):
        u, qz = u_and_qz(x, tilt_x)
        return np.sinc(t / (2 * np.pi) * (qz - reciprocal - u * tau * np.cos(theta))) ** 2

    strained = g / (1 + strain)
    tilting = strained if tilt_reciprocal == "strained" else g
    tilt_x, tilt_y = tilting * np.radians(omega), tilting * np.radians(chi)
    u, qz = u_and_qz(0.0, 0.0)
    in_phase = qz - u * tau * np.cos(theta)
    peak = quad(lambda x: sinc2(x, in_phase, 0.0), -0.5, 0.5)[0]
    values = []
    for row, column in pixels:
        v0, v1 = ((edge - cy) * np.cos(tilt) + tilt_y / tau for edge in (row, row + 1))
        x0, x1 = column - cx, column + 1 - cx
        light = _blurred_pixel if geometry.pupil_blur_px else _sharp_pixel
        value = light(
            geometry,
            lambda x: u_and_qz(x, tilt_x)[0],
            lambda x: sinc2(x, strained, tilt_x),
            (v0, v1),
            (x0, x1),
        )
        values.append(value / peak / np.cos(tilt))
    return np.array(values)


def _sharp_pixel(geometry, u_of, sinc2, v, x):
    rectangular = isinstance(geometry.optics, RectangularPupil)
    outer_x, outer_y, stop_x, stop_y = geometry.pupil_px
    stop_x, stop_y = min(stop_x, outer_x), min(stop_y, outer_y)

    def overlap(u, half_u, half_v):
        if abs(u) >= half_u:
            return 0.0
        h = half_v if rectangular else math.sqrt(half_u**2 - u**2)
        return max(0.0, min(v[1], h) - max(v[0], -h))

    def integrand(x):
        u = u_of(x)
        return sinc2(x) * (overlap(u, outer_x, outer_y) - overlap(u, stop_x, stop_y))

    # split where a rim begins, ends or crosses a border of the row
    rims = []
    for half_u in (outer_x, stop_x):
        rims.append(half_u)
        if not rectangular:
            rims += [math.sqrt(half_u**2 - edge**2) for edge in v if abs(edge) < half_u]
    splits = [_solve(u_of, u, *x) for rim in rims for u in (rim, -rim)]
    splits = sorted({s for s in splits if s is not None})
    borders = [x[0], *splits, x[1]]
    return sum(
        quad(integrand, a, b, epsabs=1e-8, epsrel=1e-8, limit=200)[0]
        for a, b in itertools.pairwise(borders)
    )


def _solve(u_of, target, lo, hi):
    """Where u(x), which falls, passes the target in (lo, hi)."""
    if not u_of(hi) < target < u_of(lo):
        return None
    for _ in range(60):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if u_of(middle) > target else (lo, middle)
    return lo


def _blurred_pixel(geometry, u_of, sinc2, v, x):
    """The pupil at (u + ξ, v + η) with Gaussian ξ, η; the average over η is closed form."""
    blur = geometry.pupil_blur_px
    outer_x, outer_y, stop_x, stop_y = geometry.pupil_px

    def below(z):  # ∫ ndtr
        z = z / blur
        return blur * (z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))

    def row(h):  # how much of the row lies between −h and h, blurred
        return (below(h - v[0]) - below(h - v[1])) - (below(-h - v[0]) - below(-h - v[1]))

    def rim(half_u, half_v):
        if half_u == 0:
            return 0.0
        if isinstance(geometry.optics, RectangularPupil):
            return quad(
                lambda x: (
                    sinc2(x)
                    * (ndtr((half_u - u_of(x)) / blur) - ndtr((-half_u - u_of(x)) / blur))
                    * row(half_v)
                ),
                *x,
            )[0]

        def integrand(angle, x):  # u + ξ = half_u sin(angle) makes the rim smooth
            xi = half_u * math.sin(angle) - u_of(x)
            density = math.exp(-((xi / blur) ** 2) / 2) / (blur * math.sqrt(2 * math.pi))
            h = half_u * math.cos(angle)
            return sinc2(x) * density * row(h) * h

        def edge(x, side):
            return math.asin(min(1, max(-1, (u_of(x) + side * 8 * blur) / half_u)))

        return dblquad(
            integrand, *x, lambda x: edge(x, -1), lambda x: edge(x, 1), epsabs=1e-7, epsrel=1e-7
        )[0]

    return rim(outer_x, outer_y) - rim(min(stop_x, outer_x), min(stop_y, outer_y))


@pytest.fixture(scope="session", name="direct_sum")
def _direct_sum():
    return direct_sum


@pytest.fixture(scope="session", name="adaptive_integral")
def _adaptive_integral():
    return adaptive_integral
