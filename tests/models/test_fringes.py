"""Strain placed by the fringes: against a plain twin, against the bound, and what could mislead."""

import math
from dataclasses import replace

import numpy as np
import pytest

from nanobeam_bluesky.geometry import Geometry, RectangularPupil
from nanobeam_bluesky.models import Estimates
from nanobeam_bluesky.models.fringes import place_fringes
from nanobeam_bluesky.physics import cramer_rao, forward
from nanobeam_bluesky.physics.continuous import continuous_plan, shifts

PUBLISHED = Geometry.published()
BLURRED = PUBLISHED.model_copy(update={"pupil_blur_px": 0.5, "delta_theta_deg": 0.02})
MIRRORS = PUBLISHED.model_copy(
    update={
        "optics": RectangularPupil(
            divergence_x_mrad=6.0, divergence_y_mrad=5.0, stop_x_mrad=2.5, stop_y_mrad=2.0
        ),
        "pupil_blur_px": 0.4,
    }
)
PLAIN = PUBLISHED.model_copy(
    update={"optics": RectangularPupil(divergence_x_mrad=6.0, divergence_y_mrad=5.0)}
)
GEOMETRIES = {"ring": PUBLISHED, "blurred": BLURRED, "mirrors": MIRRORS, "no stop": PLAIN}
WIDE = (1e-3, 5e-4, 1e-3)  # σ of a poor network


def scene(geometry, n=40, counts=4300, thickness=1.0):
    """True parameters (n, 3), patterns with noise, poor estimates, and the bound of strain.

    Films are as thick as the geometry says to 1 %.
    """
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (n, 3)) * [0.003, 0.03, 0.06]
    films = geometry.thickness_nm * thickness * rng.normal(1, 0.01, n)
    light = forward(*truth.T, geometry, thickness=films)
    scale = counts / light.sum((1, 2))
    patterns = rng.poisson(np.maximum(light, 0) * scale[:, None, None]).astype(np.float32)
    bound = cramer_rao(*truth.T, geometry, scale=scale)["strain"]
    off = rng.normal(0, 1, (n, 3)) * [2e-4, 2e-4, 5e-4]
    return truth, patterns, guess(truth + off), bound


def guess(values):
    names = ("strain", "omega", "chi")
    columns = dict(zip(names, values.T, strict=True))
    columns |= {f"{k}_sigma": np.full(len(values), s) for k, s in zip(names, WIDE, strict=True)}
    return replace(Estimates.empty(len(values)), **columns)


def plainly(pattern, strain, omega, chi, geometry, mask):
    """Strain and its σ of one pattern: the same sums, slowly, with the exact mean of sinc²."""
    plan = continuous_plan(geometry)
    x, y, dq = (float(v[0]) for v in shifts(plan, *np.array([[strain], [omega], [chi]])))
    s = plan.borders[:: plan.per_column]
    q = np.interp(s, plan.s.ravel(), plan.q.ravel())
    q[[0, -1]] = q[[1, -2]] * 2 - q[[2, -3]]
    across = np.abs((s[1:] + s[:-1]) / 2 + x)[None]
    along = np.abs((plan.rows[1:] + plan.rows[:-1]) / 2 + y)[:, None]
    (rim_x, rim_y), (stop_x, stop_y) = plan.pupil
    near, far = 0.6 + 2 * geometry.pupil_blur_px, 1 + 3 * geometry.pupil_blur_px
    if plan.round:
        r = np.hypot(across, along)
        lit, dark = r < rim_x - near, r > rim_x + far
        hidden = r <= stop_x + near
    else:
        lit = (across < rim_x - near) & (along < rim_y - near)
        dark = (across > rim_x + far) | (along > rim_y + far)
        hidden = (across <= stop_x + near) & (along < stop_y + near)
    if stop_x > 0:
        lit &= ~hidden
    lit, dark = lit & ~mask, dark & ~mask
    background = np.minimum(pattern[dark], 3).mean() if dark.sum() > 50 else 0.0
    height = lit.sum(0)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    at = (q[1:, None] + q[:-1, None]) / 2 + np.diff(q)[:, None] / 2 * nodes
    scale, thicker, most = None, 0.0, np.inf
    for _ in range(3):
        z = (at + dq) * plan.thickness / (2 * math.pi) * (1 + thicker)
        value = np.sinc(z) ** 2
        steep = np.gradient(np.stack([np.sinc(z - 1e-4) ** 2, value, np.sinc(z + 1e-4) ** 2]), 1e-4,
                            axis=0)[1]  # fmt: skip
        shape, slope = value @ weights / 2, steep @ weights / 2
        middle = z @ weights / 2
        if scale is not None:
            mean = scale * shape + background
            most = mean + 6 * np.sqrt(mean) + 2
        line = (np.minimum(pattern, most) * lit).sum(0)
        if scale is None:
            scale = (line - background * height).sum() / (shape * height).sum()
            continue
        mean = height * np.maximum(scale * shape + background, 1e-6 * scale)
        on = mean > 0
        per_dq = plan.thickness / (2 * math.pi)
        design = np.stack([height * shape, height * scale * slope * per_dq,
                           height * scale * slope * middle], 1)[on]  # fmt: skip
        rest, weight = (line - mean)[on], 1 / mean[on]
        information = design.T @ (design * weight[:, None]) + np.diag([0, 0, 0.01**-2])
        score = design.T @ (rest * weight) - [0, 0, thicker * 0.01**-2]
        change = np.linalg.solve(information, score)
        scale, dq, thicker = scale + change[0], dq + change[1], thicker + change[2]
        chi2 = (rest**2 * weight).sum() / (on.sum() - 3)
        variance = np.linalg.inv(information)[1, 1] * max(chi2, 1)
    strained = plan.g + x * plan.dq_px - dq
    leaning = strained * math.radians(WIDE[1]) * plan.omega_px * plan.dq_px
    return plan.g / strained - 1, plan.g / strained**2 * math.sqrt(variance + leaning**2)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_it_equals_the_plain_one(name):
    geometry = GEOMETRIES[name]
    _, patterns, start, _ = scene(geometry, 12)
    mask = np.zeros(geometry.pattern_shape, bool)
    mask[:, 20] = mask[40:43] = True
    found = place_fringes(patterns, start, geometry, mask=mask)
    assert (found.strain_sigma < WIDE[0]).all()
    for i, pattern in enumerate(patterns):
        strain, sigma = plainly(
            pattern, start.strain[i], start.omega[i], start.chi[i], geometry, mask
        )
        assert found.strain_sigma[i] == pytest.approx(sigma, rel=0.01)
        assert abs(found.strain[i] - strain) < 0.02 * sigma


@pytest.mark.parametrize("name", GEOMETRIES)
def test_strain_comes_near_the_bound_with_an_honest_sigma(name):
    truth, patterns, start, bound = scene(GEOMETRIES[name], 1000)
    found = place_fringes(patterns, start, GEOMETRIES[name])
    error = found.strain - truth[:, 0]
    assert np.sqrt(np.mean(error**2)) < 1.4 * np.sqrt(np.mean(bound**2))
    assert 0.9 < np.sqrt(np.mean((error / found.strain_sigma) ** 2)) < 1.1
    for same in ("omega", "chi", "omega_sigma", "flags"):
        np.testing.assert_array_equal(getattr(found, same), getattr(start, same))


def test_a_better_strain_is_kept():
    _, patterns, start, bound = scene(PUBLISHED)
    sure = replace(start, strain_sigma=0.5 * bound)
    found = place_fringes(patterns, sure, PUBLISHED)
    np.testing.assert_array_equal(found.strain, sure.strain)
    np.testing.assert_array_equal(found.strain_sigma, sure.strain_sigma)


def test_fringes_elsewhere_are_not_believed():
    truth, patterns, start, bound = scene(PUBLISHED)
    far = replace(start, strain=truth[:, 0] + 1.5e-3, strain_sigma=2 * bound)
    found = place_fringes(patterns, far, PUBLISHED)
    np.testing.assert_array_equal(found.strain, far.strain)


def test_hot_pixels_move_it_little():
    truth, patterns, start, bound = scene(PUBLISHED, 200)
    rng = np.random.default_rng(1)
    for pattern in patterns:
        pattern[rng.integers(10, 54, 3), rng.integers(10, 54, 3)] = 1000
    error = place_fringes(patterns, start, PUBLISHED).strain - truth[:, 0]
    assert np.sqrt(np.mean(error**2)) < 2.5 * np.sqrt(np.mean(bound**2))


def test_a_thicker_film_widens_sigma():
    truth, patterns, start, _ = scene(PUBLISHED, 300, 30_000, thickness=1.08)
    found = place_fringes(patterns, start, PUBLISHED)
    inside = np.abs(found.strain - truth[:, 0]) < 3 * found.strain_sigma
    assert inside.mean() > 0.9


@pytest.mark.parametrize("what", ["dark", "nowhere", "beside"])
def test_what_tells_nothing_is_left_as_it_is(what):
    _, patterns, start, _ = scene(PUBLISHED, 6)
    if what == "dark":
        patterns[:] = 0
    elif what == "nowhere":
        start = replace(start, omega=np.full(6, np.nan))
    else:
        start = replace(start, chi=np.full(6, 3.0))
    found = place_fringes(patterns, start, PUBLISHED)
    np.testing.assert_array_equal(found.strain, start.strain)
    np.testing.assert_array_equal(found.strain_sigma, start.strain_sigma)
