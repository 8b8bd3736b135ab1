import numpy as np
import pytest

from nanobeam_bluesky.geometry import Geometry, RectangularPupil
from nanobeam_bluesky.physics import continuous, cramer_rao, fisher_information, forward
from nanobeam_bluesky.physics.continuous import (
    CHANNELS,
    continuous_plan,
    pattern_channels,
    shift_derivatives,
    shifts,
)
from nanobeam_bluesky.physics.information import PARAMETERS

PUBLISHED = Geometry.published()
GEOMETRIES = {
    "sharp": PUBLISHED,
    "thick": PUBLISHED.model_copy(update={"thickness_nm": 200.0}),
    "rectangular": PUBLISHED.model_copy(
        update={
            "optics": RectangularPupil(
                divergence_x_mrad=6, divergence_y_mrad=5, stop_x_mrad=2, stop_y_mrad=1
            )
        }
    ),
    "blurred": PUBLISHED.model_copy(update={"pupil_blur_px": 0.5}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_channels_are_the_derivatives_of_the_pattern(name):
    plan = continuous_plan(GEOMETRIES[name])
    at = np.array([3.137, 2.271, 0.0031, plan.thickness])
    # the blurred model is computed in float32: wider steps
    steps = np.array([1e-2, 1e-2, 1e-4, 1.0]) if name == "blurred" else [1e-5, 1e-5, 1e-7, 1e-3]
    channels = np.empty((len(CHANNELS), 64, 64))
    pattern_channels(plan, *at, channels)

    def pattern(parameters):
        out = np.empty((1, 64, 64))
        pattern_channels(plan, *parameters, out)
        return out[0]

    np.testing.assert_allclose(pattern(at), channels[0], atol=1e-12)
    for k, step in enumerate(steps):
        move = np.eye(4)[k] * step
        expected = (pattern(at + move) - pattern(at - move)) / (2 * step)
        tolerance = (1e-3 if name == "blurred" else 1e-5) * abs(expected).max()
        np.testing.assert_allclose(channels[k + 1], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tilt_reciprocal", ["strained", "unstrained"])
def test_shifts_have_the_derivatives_they_say(tilt_reciprocal):
    plan = continuous_plan(PUBLISHED)
    at = np.array([0.003, 0.04, -0.07])

    def shifted(strain, omega, chi):
        values = [np.array([value]) for value in (strain, omega, chi)]
        return np.ravel(shifts(plan, *values, tilt_reciprocal=tilt_reciprocal))

    derivatives = shift_derivatives(plan, *at[:, None], tilt_reciprocal=tilt_reciprocal)[0]
    for k in range(3):
        move = np.eye(3)[k] * 1e-5
        expected = (shifted(*(at + move)) - shifted(*(at - move))) / 2e-5
        np.testing.assert_allclose(derivatives[:3, k], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(derivatives[3], [0, 0, 0, 10])  # Å per nm


def test_information_is_the_sum_over_pixels_of_squared_slopes_over_counts():
    geometry, scale, background = GEOMETRIES["blurred"], 7.0, 0.05
    at = np.array([0.001, 0.01, -0.03])
    mask = np.zeros((64, 64), bool)
    mask[:, :20] = True

    def expected_counts(parameters, thickness=11.7):
        other = geometry.model_copy(update={"thickness_nm": thickness})
        return scale * forward(*parameters, other)[0].astype(float) + background

    slopes = []
    for k, step in enumerate((2e-5, 2e-4, 5e-4)):
        move = np.eye(3)[k] * step
        slopes.append((expected_counts(at + move) - expected_counts(at - move)) / (2 * step))
    slopes.append((expected_counts(at, 11.8) - expected_counts(at, 11.6)) / 0.2)
    pattern = expected_counts(at)
    slopes += [(pattern - background) / scale, np.ones((64, 64))]
    slopes = np.array(slopes)[:, ~mask]
    expected = (slopes / pattern[~mask]) @ slopes.T

    information = fisher_information(
        *at, geometry, scale=scale, background=background, fit=PARAMETERS, mask=mask
    )[0]
    size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(information / size, expected / size, atol=5e-3)


def test_fit_selects_and_orders_rows_and_columns():
    every = fisher_information(0, 0, 0, PUBLISHED, scale=7, background=0.1, fit=PARAMETERS)[0]
    some = fisher_information(0, 0, 0, PUBLISHED, scale=7, background=0.1, fit=("chi", "strain"))
    np.testing.assert_array_equal(some[0], every[np.ix_([2, 0], [2, 0])])
    with pytest.raises(ValueError, match=r"unknown \['tilt'\]"):
        fisher_information(0, 0, 0, PUBLISHED, scale=7, fit=("tilt",))
    with pytest.raises(ValueError, match=r"mask \(3, 3\) must have"):
        fisher_information(0, 0, 0, PUBLISHED, scale=7, mask=np.zeros((3, 3), bool))


def test_information_of_another_thickness_is_that_of_its_geometry():
    thicker = PUBLISHED.model_copy(update={"thickness_nm": 14.0})
    options = {"scale": 7, "background": 0.1, "fit": PARAMETERS}
    found = fisher_information(0.001, 0.01, 0.02, PUBLISHED, thickness=14.0, **options)
    expected = fisher_information(0.001, 0.01, 0.02, thicker, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "strain", "omega", "chi"),
    [("sharp", 9.1e-5, 1.03e-4, 2.9e-4), ("blurred", 9.2e-5, 1.63e-4, 4.7e-4)],
)
def test_bounds_at_6000_counts_over_the_published_range(name, strain, omega, chi):
    rng = np.random.default_rng(0)
    parameters = rng.uniform(-1, 1, (3, 400)) * np.array([[0.005], [0.05], [0.1]])
    totals = forward(*parameters, GEOMETRIES[name]).sum(axis=(1, 2))
    sigma = cramer_rao(*parameters, GEOMETRIES[name], scale=6000 / totals)
    assert list(sigma) == ["strain", "omega", "chi", "scale", "background"]
    for field, expected in (("strain", strain), ("omega", omega), ("chi", chi)):
        assert sigma[field].mean() == pytest.approx(expected, rel=0.02)


def test_bounds_shrink_with_the_root_of_the_counts():
    one, four = (
        cramer_rao(0.001, 0.01, 0.02, GEOMETRIES["blurred"], scale=s, background=b)
        for s, b in ((5, 0.1), (20, 0.4))
    )
    for name in ("strain", "omega", "chi"):
        assert four[name] == pytest.approx(one[name] / 2, rel=1e-9)


def test_a_pattern_that_left_the_roi_determines_nothing():
    sigma = cramer_rao(0.0, 5.0, 0.0, PUBLISHED, scale=7, background=0.1)
    assert all(np.isinf(values).all() for values in sigma.values())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_quadrature_moves_no_parameter_at_100_000_counts(name, monkeypatch):
    at = np.array([[0.001, -0.003, 0.0], [0.01, -0.033, 0.04], [-0.03, 0.08, 0.0]])
    coarse = continuous_plan(GEOMETRIES[name])
    for step, finer in (("_TABLE_STEP", 3), ("_BLUR_STEP", 3), ("_FRINGE_STEP", 20)):
        monkeypatch.setattr(continuous, step, getattr(continuous, step) / finer)
    fine = continuous_plan.__wrapped__(GEOMETRIES[name])
    assert fine.per_column >= 2 * coarse.per_column
    for shift_x, shift_y, dq in zip(*shifts(coarse, *at), strict=True):
        channels, exact = np.empty((5, 64, 64)), np.empty((5, 64, 64))
        pattern_channels(coarse, shift_x, shift_y, dq, coarse.thickness, channels)
        pattern_channels(fine, shift_x, shift_y, dq, fine.thickness, exact)
        scale = 1e5 / exact[0].sum()
        counts = scale * exact[0] + 0.01
        slopes = np.stack([*(scale * exact[1:4]), exact[0], np.ones((64, 64))]).reshape(5, -1)
        information = (slopes / counts.ravel()) @ slopes.T
        score = (slopes / counts.ravel()) @ (scale * (channels[0] - exact[0])).ravel()
        shift = np.linalg.solve(information, score)
        sigma = np.sqrt(np.diag(np.linalg.inv(information)))
        assert abs(shift / sigma).max() < 0.05


def test_maximum_likelihood_reaches_the_bound():
    """Scoring from the truth on noisy patterns scatters as the bound says."""
    geometry, scale, background, n = GEOMETRIES["blurred"], 7.0, 0.05, 400
    at = np.array([0.001, 0.01, -0.03])
    information = fisher_information(
        *at, geometry, scale=scale, background=background, fit=("strain", "omega", "chi")
    )[0]
    sigma = np.sqrt(np.diag(np.linalg.inv(information)))
    expected = scale * forward(*at, geometry)[0].astype(float) + background
    slopes = []
    for k in range(3):
        move = np.eye(3)[k] * sigma[k] / 2
        ahead, back = forward(*(np.array([at + move, at - move]).T), geometry).astype(float)
        slopes.append(scale * (ahead - back) / sigma[k])
    noisy = np.random.default_rng(1).poisson(expected, (n, 64, 64))
    score = np.einsum("nyx,kyx->nk", (noisy - expected) / expected, np.array(slopes))
    errors = score @ np.linalg.inv(information)
    np.testing.assert_allclose(errors.std(axis=0) / sigma, 1, atol=0.1)
    np.testing.assert_allclose(errors.mean(axis=0) / sigma, 0, atol=0.2)
