"""What is wrong with a geometry is found from simulated patterns with Poisson noise."""

from dataclasses import replace

import numpy as np
import pytest

from nanobeam_bluesky.documents.binning import bin_frames
from nanobeam_bluesky.geometry import Geometry, RectangularPupil
from nanobeam_bluesky.models import Calibration, CalibrationError, Estimates, calibrate, refine
from nanobeam_bluesky.physics import forward

SPREAD = np.array([0.003, 0.02, 0.05])
HOT, WARM, DEAD = ((1, 2), (15, 15)), ((1, 29), (30, 2)), ((10, 10), (20, 15), (15, 5), (25, 20))
ANTISYMMETRIC = np.array([-1, 1])[:, None, None]


@pytest.fixture(scope="module")
def truth(geometry):
    return geometry.model_copy(update={"pupil_blur_px": 0.4})


def measure(geometry, n=100, *, seed, scale=30.0, background=0.3, spread=SPREAD):
    """Parameters (n, 3), zero on average, and counts (n, ny, nx) of a geometry."""
    rng = np.random.default_rng(seed)
    half = rng.uniform(-1, 1, (1, n // 2, 3)) * spread
    parameters = (half * ANTISYMMETRIC).reshape(-1, 3)[rng.permutation(n)]
    expected = scale * forward(*parameters.T, geometry) + background
    return parameters, rng.poisson(expected).astype(np.float32)


def spoil(counts, rng, *, hot=HOT, warm=WARM, dead=DEAD):
    """Some pixels count too much, some too little, some nothing."""
    for row, col in hot:
        counts[:, row, col] += rng.poisson(1000, len(counts))
    for row, col in warm:
        counts[:, row, col] += rng.poisson(0.6, len(counts))
    for row, col in dead:
        counts[:, row, col] = 0
    return counts


def close(measured, value, errors=5):
    return abs(measured.value - value) <= errors * measured.error


# ------------------------------------------------------------------ each error alone


def test_a_right_geometry_stays(truth):
    found = calibrate(measure(truth, seed=1)[1], truth)
    assert not found.transposed
    assert close(found.thickness_nm, truth.thickness_nm)
    assert close(found.pupil_blur_px, truth.pupil_blur_px)
    assert close(found.background, 0.3)
    assert found.hot_pixels == found.dead_pixels == found.geometry.pixel_mask == ()
    changed = {"thickness_nm", "pupil_blur_px"}
    assert found.geometry.model_dump(exclude=changed) == truth.model_dump(exclude=changed)


def test_thickness_is_found(truth):
    wrong = truth.model_copy(update={"thickness_nm": 1.2 * truth.thickness_nm})
    found = calibrate(measure(truth, seed=2)[1], wrong)
    assert close(found.thickness_nm, truth.thickness_nm)
    assert found.thickness_nm.error < 0.01 * truth.thickness_nm
    assert found.geometry.thickness_nm == found.thickness_nm.value


@pytest.mark.parametrize(("blur", "stated"), [(0.8, 0.0), (1.5, 0.3)])
def test_blur_is_found(geometry, blur, stated):
    counts = measure(geometry.model_copy(update={"pupil_blur_px": blur}), seed=3)[1]
    found = calibrate(counts, geometry.model_copy(update={"pupil_blur_px": stated}))
    assert close(found.pupil_blur_px, blur)
    assert found.pupil_blur_px.error < 0.02
    assert found.geometry.pupil_blur_px == found.pupil_blur_px.value


def test_a_sharp_pupil_is_found(geometry):
    wrong = geometry.model_copy(update={"pupil_blur_px": 0.7})
    found = calibrate(measure(geometry, seed=4)[1], wrong)
    assert found.pupil_blur_px is None
    assert found.geometry.pupil_blur_px == 0
    assert any("No blur" in note for note in found.notes)


@pytest.mark.parametrize(
    ("stated", "true"),
    [
        ("flip_x", "rotate_90"),
        ("rotate_180", "antitranspose"),
    ],
)
def test_exchanged_rows_and_columns_are_found(truth, stated, true):
    actual = truth.model_copy(update={"orientation": true, "roi_shape": (128, 96)})
    wrong = actual.model_copy(update={"orientation": stated})
    frames = actual.unorient(measure(actual, 60, seed=5)[1])
    found = calibrate(wrong.orient(frames), wrong)
    assert found.transposed
    assert found.geometry.orientation == true
    assert found.transposition_evidence > 50
    assert close(found.thickness_nm, truth.thickness_nm)
    assert any("symmetries" in note for note in found.notes)


@pytest.mark.parametrize("background", [0.0, 2.0])
def test_background_is_found(truth, background):
    found = calibrate(measure(truth, seed=6, background=background)[1], truth)
    # a background below a ten thousandth of the brightest pixel is none
    assert abs(found.background.value - background) <= 5 * found.background.error + 0.003


def test_hot_and_dead_pixels_are_found_and_masked(truth):
    rng = np.random.default_rng(7)
    counts = spoil(measure(truth, seed=7)[1], rng)
    found = calibrate(counts, truth)
    assert set(found.hot_pixels) == {*HOT, *WARM}
    assert set(found.dead_pixels) == set(DEAD)
    bad = found.geometry.pattern_mask
    assert set(map(tuple, np.argwhere(bad).tolist())) == {*HOT, *WARM, *DEAD}
    assert len(found.geometry.pixel_mask) == truth.binning**2 * bad.sum()
    # frames that come later are read without them
    frames = np.ones((1, *truth.roi_shape), np.uint16)
    np.testing.assert_array_equal(bin_frames(frames, found.geometry)[0][0] == 0, bad)


@pytest.mark.parametrize("value", [0, -1])
def test_gaps_of_the_detector_are_found(truth, value):
    counts = measure(truth, seed=8)[1]
    counts[:, 13:15] = value
    found = calibrate(counts, truth)
    assert set(found.dead_pixels) == {(row, col) for row in (13, 14) for col in range(32)}
    assert close(found.thickness_nm, truth.thickness_nm)


def test_a_known_mask_is_kept(truth):
    known = truth.model_copy(update={"pixel_mask": ((200, 201), (0, 0))})
    counts = measure(truth, seed=9)[1]
    counts[:, 2, 2] = 5000  # where a pixel is masked
    found = calibrate(counts, known)
    assert found.hot_pixels == ()
    assert found.geometry.pixel_mask == known.pixel_mask


# --------------------------------------------------------------------------- the centre


def test_the_center_is_moved_on_request_only(truth):
    x, y = truth.bragg_center_px
    roi = (truth.roi.row, truth.roi.col)
    actual = truth.model_copy(update={"bragg_center_px": (x + 3, y - 2), "roi_origin_px": roi})
    parameters, counts = measure(actual, seed=10)
    left = calibrate(counts, truth)
    assert left.geometry.bragg_center_px == (x, y)
    assert abs(left.strain.value) > 20 * left.strain.error
    assert any("cannot" in note or "No pattern tells" in note for note in left.notes)
    found = calibrate(counts, truth, reference=True)
    assert found.reference_center_px == left.reference_center_px
    assert found.geometry.bragg_center_px == pytest.approx((x + 3, y - 2), abs=0.15)
    assert found.geometry.roi == truth.roi
    assert close(found.strain, 0)
    # the error of the moved centre moves ω too
    by_centre = np.degrees(np.tan(np.radians(truth.bragg_angle_deg))) * found.strain.error
    assert abs(found.omega.value) < 5 * np.hypot(found.omega.error, by_centre)
    assert close(found.chi, 0)
    start = replace(Estimates.empty(len(counts)), **dict(zip(
        ("strain", "omega", "chi"), parameters.T, strict=True)))  # fmt: skip
    estimates = refine(counts, start, found.geometry)
    for name, true in zip(("strain", "omega", "chi"), parameters.T, strict=True):
        pull = (getattr(estimates, name) - true) / getattr(estimates, f"{name}_sigma")
        assert np.sqrt(np.mean(pull**2)) < 1.3, name


def test_the_center_of_a_transposed_pattern_moves_along_the_right_axis(truth):
    x, y = truth.bragg_center_px
    actual = truth.model_copy(
        update={"bragg_center_px": (x + 3, y - 2), "orientation": "transpose",
                "roi_origin_px": (truth.roi.row, truth.roi.col)}
    )  # fmt: skip
    counts = measure(actual, seed=11)[1]
    found = calibrate(np.swapaxes(counts, 1, 2), truth, reference=True)
    assert found.geometry.orientation == "transpose"
    assert found.geometry.bragg_center_px == pytest.approx((x + 3, y - 2), abs=0.15)


# ------------------------------------------------------------------------ all at once


@pytest.mark.parametrize("optics", ["zone plate", "mirrors with a stop"])
def test_all_at_once(geometry, optics):
    if optics != "zone plate":
        stop = 2.0 if "stop" in optics else 0.0
        pupil = RectangularPupil(
            divergence_x_mrad=6, divergence_y_mrad=5, stop_x_mrad=stop, stop_y_mrad=stop
        )
        geometry = geometry.model_copy(update={"optics": pupil})
    x, y = geometry.bragg_center_px
    actual = geometry.model_copy(
        update={"pupil_blur_px": 0.8, "orientation": "transpose", "bragg_center_px": (x - 3, y + 3),
                "roi_origin_px": (geometry.roi.row, geometry.roi.col)}
    )  # fmt: skip
    stated = geometry.model_copy(update={"thickness_nm": 0.8 * geometry.thickness_nm})
    counts = spoil(measure(actual, seed=12)[1], np.random.default_rng(12))
    found = calibrate(np.swapaxes(counts, 1, 2), stated, reference=True)
    assert found.geometry.orientation == "transpose"
    assert close(found.thickness_nm, geometry.thickness_nm)
    assert close(found.pupil_blur_px, 0.8)
    assert close(found.background, 0.3)
    assert found.geometry.bragg_center_px == pytest.approx((x - 3, y + 3), abs=0.15)
    assert set(found.hot_pixels) == {(col, row) for row, col in (*HOT, *WARM)}
    assert set(found.dead_pixels) == {(col, row) for row, col in DEAD}
    assert Calibration.model_validate_json(found.model_dump_json()) == found


def test_the_published_condition_all_at_once():
    published = Geometry.published()
    actual = published.model_copy(update={"pupil_blur_px": 0.8, "thickness_nm": 14.0})
    rng = np.random.default_rng(13)
    places = {"hot": ((3, 5), (30, 31)), "warm": ((2, 60), (62, 62)), "dead": ((20, 20), (40, 30))}
    counts = measure(actual, 300, seed=13, scale=7, background=0.1)[1]
    found = calibrate(spoil(counts, rng, **places), published)
    assert close(found.thickness_nm, 14.0)
    assert close(found.pupil_blur_px, 0.8)
    assert close(found.background, 0.1)
    assert set(places["hot"]) <= set(found.hot_pixels) <= {*places["hot"], *places["warm"]}
    assert set(found.dead_pixels) == set(places["dead"])


def test_a_uniform_film_has_no_bad_pixels_at_its_rims(geometry):
    """All patterns alike: what is a little wrong is wrong at the same pixels."""
    actual = geometry.model_copy(update={"pupil_blur_px": 1.2, "thickness_nm": 14.0})
    found = calibrate(measure(actual, seed=14, spread=0.02 * SPREAD)[1], geometry)
    assert found.hot_pixels == found.dead_pixels == ()
    assert close(found.pupil_blur_px, 1.2)
    assert close(found.thickness_nm, 14.0)


# ------------------------------------------------------------------------- bad input


def test_too_few_and_too_dark_patterns_are_refused(truth):
    counts = measure(truth, 40, seed=15)[1]
    with pytest.raises(CalibrationError, match=r"19 of 19 patterns .* at least 20 are needed"):
        calibrate(counts[:19], truth)
    counts[:25] = 0
    counts[:, 3, 3] = 10_000  # a hot pixel makes no pattern
    with pytest.raises(CalibrationError, match="15 of 40 patterns"):
        calibrate(counts, truth)
    with pytest.raises(CalibrationError, match=r"shape \(40, 16, 32\): expected .* \(n, 32, 32\)"):
        calibrate(counts[:, :16], truth)


def test_empty_and_broken_patterns_are_left_out(truth):
    counts = measure(truth, 160, seed=16)[1]
    counts[:40] = 0
    counts[np.arange(40, 60), np.arange(20), 7] = np.nan
    assert calibrate(counts, truth).patterns == 100


def test_what_is_no_diffraction_pattern_is_refused(truth):
    rng = np.random.default_rng(17)
    with pytest.raises(CalibrationError, match=r"the model fits .* check ROI, binning"):
        calibrate(rng.poisson(2.0, (60, 32, 32)), truth)
    counts = measure(truth, 60, seed=17)[1]
    shuffled = rng.permuted(counts.reshape(60, -1), axis=1).reshape(counts.shape)
    with pytest.raises(CalibrationError, match="other patterns than it can make"):
        calibrate(shuffled, truth)
