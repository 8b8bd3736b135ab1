import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanobeam_bluesky.geometry import Geometry, RectangularPupil, ZonePlate
from nanobeam_bluesky.physics import forward, simulate_library
from nanobeam_bluesky.physics.published import published_peak

PUBLISHED = Geometry.published()


def changed(**changes):
    return Geometry.model_validate({**PUBLISHED.model_dump(exclude_none=True), **changes})


def rectangle(*, stop=(0.0, 0.0), size=(6.0, 5.0)):
    return RectangularPupil(
        divergence_x_mrad=size[0],
        divergence_y_mrad=size[1],
        stop_x_mrad=stop[0],
        stop_y_mrad=stop[1],
    )


OFF_CENTRE = {"roi_origin_px": (180, 200), "roi_shape": (96, 128)}
GEOMETRIES = {
    "published": PUBLISHED,
    "without stop": changed(optics=ZonePlate(diameter_um=149, focal_length_mm=21.874)),
    "rectangular": changed(optics=rectangle()),
    "rectangular with a stop": changed(optics=rectangle(stop=(2.0, 1.3)), **OFF_CENTRE),
    "rectangular with a bar": changed(optics=rectangle(stop=(7.0, 1.3))),
    "100 nm film": changed(thickness_nm=100.0),
    "300 nm film": changed(thickness_nm=300.0),
    "detuned, off centre, not square": changed(delta_theta_deg=0.05, **OFF_CENTRE),
    "tilted detector": changed(detector_two_theta_deg=25.0, bragg_center_px=(251.3, 258.8)),
    "odd number of pixels": changed(roi_shape=(66, 102), roi_origin_px=(200, 190)),
}
SHORT = changed(detector_distance_m=0.05, pixel_size_um=10.0, roi_origin_px=(160, 220))
CONTINUOUS = GEOMETRIES | {
    "short distance": SHORT,
    "grazing exit": changed(
        lattice_c_angstrom=40.0,
        reflection_l=1,
        d_spacing_angstrom=40.0,
        detector_distance_m=0.31,
        thickness_nm=1.0,
    ),
}
BLURRED = {
    "0.5 px": changed(pupil_blur_px=0.5),
    "0.1 px": changed(pupil_blur_px=0.1),
    "3 px, 100 nm film": changed(pupil_blur_px=3.0, thickness_nm=100.0),
    "300 nm film": changed(pupil_blur_px=0.7, thickness_nm=300.0),
    "2 µm film": changed(pupil_blur_px=2.0, thickness_nm=2000.0),
    "rectangular, tilted detector": changed(
        optics=rectangle(stop=(2.0, 1.3)), pupil_blur_px=0.5, detector_two_theta_deg=10.0
    ),
}
STRAIN_OMEGA_CHI = [(0.0, 0.0, 0.0), (0.0021, -0.031, 0.077), (-0.0004, 0.0173, -0.0421)]


def telling_pixels(pattern, number):
    """Those where the pattern changes most, and some others; (row, column)."""
    change = sum(abs(np.gradient(pattern, axis=axis)) for axis in (0, 1))
    order = np.argsort(change, axis=None)[::-1]
    chosen = np.r_[order[: number // 2], order[number // 2 :: order.size // number]]
    return [tuple(map(int, np.unravel_index(i, pattern.shape))) for i in chosen]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_published_sampling_equals_the_direct_sum(name, direct_sum):
    geometry = GEOMETRIES[name]
    rows = range(1, geometry.pattern_shape[0], 7)
    for parameters in STRAIN_OMEGA_CHI:
        pattern = forward(*parameters, geometry, sampling="published")[0]
        expected = direct_sum(*parameters, geometry, rows=rows) / published_peak(geometry)
        assert expected.max() > 0.01
        np.testing.assert_allclose(pattern[rows], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_model_equals_an_adaptive_integral(name, adaptive_integral):
    geometry = CONTINUOUS[name]
    for parameters in STRAIN_OMEGA_CHI:
        pattern = forward(*parameters, geometry)[0]
        pixels = telling_pixels(pattern, 60)
        expected = adaptive_integral(*parameters, geometry, pixels)
        assert expected.max() > 0.01
        # the requirement is 1e-4; ten times better leaves nothing to fitted parameters
        np.testing.assert_allclose([pattern[p] for p in pixels], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BLURRED)
def test_blurred_pupil_equals_an_adaptive_integral(name, adaptive_integral):
    geometry = BLURRED[name]
    pattern = forward(*STRAIN_OMEGA_CHI[1], geometry)[0]
    pixels = telling_pixels(pattern, 6)
    expected = adaptive_integral(*STRAIN_OMEGA_CHI[1], geometry, pixels)
    assert expected.max() > 0.01
    np.testing.assert_allclose([pattern[p] for p in pixels], expected, rtol=0, atol=2e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    strain=st.floats(-0.005, 0.005),
    omega=st.floats(-0.05, 0.05),
    chi=st.floats(-0.1, 0.1),
    column=st.integers(0, 63),
    row=st.integers(0, 63),
)
def test_any_pixel_of_any_pattern_equals_the_adaptive_integral(
    adaptive_integral, strain, omega, chi, column, row
):
    pattern = forward(strain, omega, chi, PUBLISHED)[0]
    expected = adaptive_integral(strain, omega, chi, PUBLISHED, [(row, column)])[0]
    assert pattern[row, column] == pytest.approx(expected, abs=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    strain=st.floats(-0.005, 0.005),
    omega=st.floats(-0.05, 0.05),
    chi=st.floats(-0.1, 0.1),
    row=st.integers(0, 63),
)
def test_any_row_of_any_pattern_equals_the_direct_sum(direct_sum, strain, omega, chi, row):
    pattern = forward(strain, omega, chi, PUBLISHED, sampling="published")[0]
    expected = direct_sum(strain, omega, chi, PUBLISHED, rows=[row])[0]
    np.testing.assert_allclose(
        pattern[row], expected / published_peak(PUBLISHED), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("sampling", ["continuous", "published"])
@pytest.mark.parametrize("tilt_reciprocal", ["strained", "unstrained"])
def test_tilts_can_turn_the_strained_or_the_relaxed_reciprocal_vector(
    sampling, tilt_reciprocal, direct_sum, adaptive_integral
):
    parameters = (-0.004, 0.0325, 0.0915)
    pattern = forward(*parameters, PUBLISHED, sampling=sampling, tilt_reciprocal=tilt_reciprocal)[0]
    pixels = telling_pixels(pattern, 30)
    if sampling == "published":
        expected = direct_sum(*parameters, PUBLISHED, tilt_reciprocal) / published_peak(PUBLISHED)
        expected = [expected[p] for p in pixels]
    else:
        expected = adaptive_integral(*parameters, PUBLISHED, pixels, tilt_reciprocal)
    np.testing.assert_allclose([pattern[p] for p in pixels], expected, rtol=0, atol=1e-5)
    default = forward(*parameters, PUBLISHED, sampling=sampling)[0]
    is_default = tilt_reciprocal == ("unstrained" if sampling == "published" else "strained")
    assert np.array_equal(default, pattern) == is_default


@pytest.mark.parametrize("sampling", ["continuous", "published"])
@pytest.mark.parametrize("name", ["published", "rectangular with a stop"])
def test_library_holds_the_pattern_of_every_combination(name, sampling):
    geometry = GEOMETRIES[name]
    axes = [np.linspace(-r, r, n) for r, n in ((0.005, 3), (0.05, 4), (0.1, 5))]
    library = simulate_library(geometry, *axes, sampling=sampling)
    assert library.shape == (3, 4, 5, *geometry.pattern_shape)
    assert library.dtype == np.float32
    for i, j, k in itertools.product(range(3), range(4), range(5)):
        one = forward(axes[0][i], axes[1][j], axes[2][k], geometry, sampling=sampling)[0]
        np.testing.assert_array_equal(library[i, j, k], one)


def test_published_peak_is_the_maximum_of_the_library():
    geometry = changed(roi_shape=(64, 64))  # 41³ patterns of 32 × 32
    axes = [np.linspace(-r, r, 41) for r in (0.005, 0.05, 0.1)]
    library = simulate_library(geometry, *axes, sampling="published")
    assert library.max() == pytest.approx(1, abs=1e-6)


def test_continuous_peak_is_close_to_the_maximum_of_the_library():
    axes = [np.linspace(-r, r, 11) for r in (0.005, 0.05, 0.1)]
    for name, below in (("published", 1e-3), ("300 nm film", 0.05)):
        library = simulate_library(GEOMETRIES[name], *axes, sampling="continuous")
        assert 1 - below < library.max() < 1 + 1e-3


def test_a_dark_library_has_no_peak_and_says_so():
    geometry = changed(roi_origin_px=(380, 380))
    with pytest.raises(ValueError, match=r"no light reaches the ROI.*roi_origin_px"):
        forward(0, 0, 0, geometry, sampling="published")


def test_columns_near_the_horizon_equal_the_adaptive_integral(adaptive_integral):
    geometry = CONTINUOUS["grazing exit"]
    parameters = (0.0, 0.28, 0.01)  # the pupil lies at the columns of lowest exit
    pattern = forward(*parameters, geometry)[0]
    assert pattern[:, :3].max() > 0.9
    pixels = telling_pixels(pattern, 60)
    expected = adaptive_integral(*parameters, geometry, pixels)
    np.testing.assert_allclose([pattern[p] for p in pixels], expected, rtol=0, atol=1e-5)


def test_published_sampling_refuses_pixels_wider_than_its_windows():
    with pytest.raises(ValueError, match=r"windows of 0.001 Å⁻¹.*use sampling='continuous'"):
        forward(0, 0, 0, SHORT, sampling="published")


def test_positive_tilts_and_strain_move_the_pattern_as_defined():
    rows, columns = np.mgrid[:64, :64]

    def centre(*parameters):
        pattern = forward(*parameters, PUBLISHED)[0]
        return np.array([(pattern * axis).sum() for axis in (columns, rows)]) / pattern.sum()

    x, y = centre(0, 0, 0)
    assert (x, y) == pytest.approx((31.5, 31.5), abs=0.2)
    # Qy + Gχ = Oy(v): the pupil appears at lower y for larger χ, 7.4 pixels for 0.1°
    assert centre(0, 0, 0.05)[1] == pytest.approx(31.5 - 3.69, abs=0.01)
    # a compressed lattice (ε < 0) diffracts to larger 2θ
    assert centre(-0.002, 0, 0)[0] > x + 2


def test_a_flip_in_y_is_a_change_of_sign_of_chi():
    pattern = forward(0.001, 0.02, 0.03, PUBLISHED)
    np.testing.assert_allclose(forward(0.001, 0.02, -0.03, PUBLISHED), pattern[:, ::-1], atol=1e-6)


def test_light_is_conserved_whatever_the_binning():
    fine = changed(binning=1)
    assert fine.pattern_shape == (128, 128)
    binned = forward(0.001, 0.01, 0.03, fine)[0].reshape(64, 2, 64, 2).mean(axis=(1, 3))
    coarse = forward(0.001, 0.01, 0.03, PUBLISHED)[0]
    ratio = binned.sum() / coarse.sum()  # the peak pixels differ by the fringe inside them
    assert ratio == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(binned, ratio * coarse, atol=1e-5)


def test_blur_keeps_the_total_and_vanishes_smoothly():
    sharp = forward(0.0005, 0.001, 0.002, PUBLISHED)[0]
    totals, distances = [], []
    for blur in (0.2, 0.1, 0.05):
        pattern = forward(0.0005, 0.001, 0.002, changed(pupil_blur_px=blur))[0]
        totals.append(pattern.sum())
        distances.append(abs(pattern - sharp).max())
    np.testing.assert_allclose(totals, sharp.sum(), rtol=1e-3)
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.03


@pytest.mark.parametrize(
    "changes",
    [{"pupil_blur_px": 0.01}, {"pupil_blur_px": 0.06, "detector_distance_m": 9.0}],
)
def test_blur_too_small_for_its_table_is_refused_with_the_bound(changes):
    with pytest.raises(ValueError, match=r"pupil_blur_px = 0.0\d must be 0 or at least"):
        forward(0, 0, 0, changed(**changes))


def test_roi_below_the_horizon_is_refused():
    geometry = changed(
        detector_distance_m=0.01, optics=ZonePlate(diameter_um=149, focal_length_mm=21.874)
    )
    with pytest.raises(ValueError, match=r"below the sample's horizon"):
        forward(0, 0, 0, geometry)


def test_background_and_parameters_broadcast():
    strain = np.array([0.0, 0.001, 0.002])
    patterns = forward(strain, 0.01, 0.0, PUBLISHED, background=[0.0, 0.1, 0.2])
    assert patterns.shape == (3, 64, 64)
    for i in range(3):
        alone = forward(strain[i], 0.01, 0.0, PUBLISHED)
        np.testing.assert_allclose(patterns[i], alone[0] + 0.1 * i, atol=1e-6)
    assert forward([], [], [], PUBLISHED).shape == (0, 64, 64)


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_pattern_of_another_thickness_is_that_of_its_geometry_up_to_the_peak(blur):
    geometry = changed(pupil_blur_px=blur)
    thickness = [9.0, 11.7, 16.0]
    patterns = forward(0.002, -0.02, 0.05, geometry, thickness=thickness)
    for nm, pattern in zip(thickness, patterns, strict=True):
        other = forward(0.002, -0.02, 0.05, changed(pupil_blur_px=blur, thickness_nm=nm))[0]
        peak = pattern.sum() / other.sum()
        assert peak == pytest.approx(1, abs=3e-4)
        np.testing.assert_allclose(pattern, peak * other, atol=1e-5)
    np.testing.assert_array_equal(patterns[1], forward(0.002, -0.02, 0.05, geometry)[0])


def test_thickness_is_only_for_the_continuous_sampling_and_above_zero():
    with pytest.raises(ValueError, match="published sampling has only the geometry's"):
        forward(0, 0, 0, PUBLISHED, sampling="published", thickness=10.0)
    with pytest.raises(ValueError, match=r"thickness\[1\] = 0.0 must be finite and above 0"):
        forward(0, 0, 0, PUBLISHED, thickness=[10.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(2), np.zeros(3), 0), r"omega \(3,\)"),
        ((0, [0, np.nan], 0), r"omega\[1\] = nan must be finite"),
        ((-1.0, 0, 0), r"strain\[0\] = -1.0 must be finite and above -1"),
    ],
)
def test_impossible_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        forward(*arguments, PUBLISHED)


def test_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match=r"'fine' must be 'continuous' or 'published'"):
        forward(0, 0, 0, PUBLISHED, sampling="fine")


@pytest.mark.parametrize("sampling", ["continuous", "published"])
def test_patterns_do_not_depend_on_who_else_computes(sampling):
    rng = np.random.default_rng(3)
    parameters = rng.uniform(-1, 1, (3, 700)) * np.array([[0.005], [0.05], [0.1]])
    one_by_one = np.concatenate([forward(*p, PUBLISHED, sampling=sampling) for p in parameters.T])
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(forward, *parameters, PUBLISHED, sampling=sampling) for _ in range(4)]
        for run in runs:
            np.testing.assert_array_equal(run.result(), one_by_one)
