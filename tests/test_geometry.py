import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nanobeam_bluesky.geometry import (
    ROI,
    Geometry,
    GeometryError,
    Orientation,
    RectangularPupil,
    ZonePlate,
)
from nanobeam_bluesky.physics import forward

PUBLISHED = Geometry.published()
FIELDS = {
    "energy_keV": 11.3,
    "detector_distance_m": 0.85,
    "pixel_size_um": 55,
    "binning": 2,
    "roi_shape": (128, 128),
    "detector_shape": (512, 512),
    "bragg_center_px": (256.0, 256.0),
    "lattice_c_angstrom": 4.013,
    "reflection_l": 2,
    "thickness_nm": 11.7,
    "optics": {
        "kind": "zone_plate",
        "diameter_um": 149,
        "focal_length_mm": 21.874,
        "central_stop_diameter_um": 77,
    },
}
ORIENTATIONS = Orientation.__args__


def parse(**changes):
    """The published fields with changes; None removes one."""
    values = {k: v for k, v in (FIELDS | changes).items() if v is not None}
    return Geometry.parse(values, where="run 3f2a")


def test_published_condition_has_the_numbers_of_the_paper():
    assert parse() == PUBLISHED
    assert PUBLISHED.wavelength_angstrom == pytest.approx(1.0972, abs=1e-4)
    assert PUBLISHED.bragg_angle_deg == pytest.approx(15.867, abs=1e-3)
    assert PUBLISHED.pattern_shape == (64, 64)
    assert PUBLISHED.pattern_center == (32, 32)
    assert PUBLISHED.binned_pixel_um == 110
    rim, _, stop, _ = PUBLISHED.pupil_px
    assert (rim, stop) == pytest.approx((26.3, 13.6), abs=0.02)
    assert PUBLISHED.roi == ROI(row=192, col=192, height=128, width=128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detector_distance_m": -0.85}, r"detector_distance_m = -0.85: .*greater than 0"),
        ({"detector_distance_m": "far"}, r"detector_distance_m = 'far': .*number"),
        ({"pixel_size_um": 0}, r"pixel_size_um = 0: .*greater than 0"),
        ({"thickness_nm": float("inf")}, r"thickness_nm = inf: .*finite"),
        ({"energy_keV": -11.3}, r"energy_keV = -11.3: must be positive"),
        ({"energy_keV": 1.5}, r"not reachable: wavelength 8.266 Å must be below .* 2 × 2.006 Å"),
        ({"energy_keV": None}, r"energy_keV missing: give it, or wavelength_angstrom"),
        ({"reflection_l": None}, r"reflection_l missing: give it, or d_spacing_angstrom"),
        ({"thickness_nm": None}, r"thickness_nm: missing"),
        ({"wavelength_angstrom": 1.2}, r"contradiction: wavelength_angstrom = 1.2 but energy_keV"),
        ({"optics": {**FIELDS["optics"], "central_stop_diameter_um": 150}}, r"150 .* = 149"),
        ({"optics": {"kind": "lens"}}, r"optics = .*'zone_plate', 'rectangular'"),
        ({"optics": {"kind": "zone_plate", "diameter_um": 149}}, r"or focal_length_mm"),
        ({"roi_origin_px": (400, 192)}, r"ROI off the detector: rows 400..528.*512 × 512"),
        ({"bragg_center_px": (20.0, 256.0)}, r"ROI off the detector: .*column -44"),
        (
            {"bragg_center_px": (300, 256), "roi_origin_px": (0, 0)},
            r"\(300, 256\) must lie within one ROI size",
        ),
        ({"roi_shape": (127, 128)}, r"\(127, 128\) must be a multiple of binning = 2"),
        ({"roi_shape": (12, 128)}, r"at least 8 × 8"),
        ({"orientation": "sideways"}, r"orientation = 'sideways': .*'identity'"),
        ({"delta_theta_deg": 16.0}, r"exit .* = -0.1326° must lie between 0° and 90°"),
        ({"detector_two_theta_deg": 100.0}, r"within 45° of 2θB = 31.73°"),
        ({"energy": 11.3}, r"energy = 11.3: Extra inputs"),
    ],
)
def test_impossible_value_is_refused_by_name_value_and_bound(changes, message):
    with pytest.raises(GeometryError, match=rf"^run 3f2a: .*{message}"):
        parse(**changes)


def test_every_problem_is_named_at_once():
    with pytest.raises(GeometryError, match=r"detector_distance_m = -1.*; pixel_size_um = -2"):
        parse(detector_distance_m=-1, pixel_size_um=-2)


@pytest.mark.parametrize(
    ("optics", "message"),
    [
        ({"stop_x_mrad": 2}, "a stop needs both"),
        ({"stop_x_mrad": 6, "stop_y_mrad": 5}, "covers the whole pupil"),
    ],
)
def test_impossible_rectangular_pupil_is_refused(optics, message):
    with pytest.raises(ValidationError, match=message):
        RectangularPupil(divergence_x_mrad=6, divergence_y_mrad=5, **optics)


def test_energy_and_wavelength_or_lattice_and_spacing_say_the_same():
    other = parse(
        energy_keV=None,
        wavelength_angstrom=12.39841984 / 11.3,
        lattice_c_angstrom=None,
        reflection_l=None,
        d_spacing_angstrom=4.013 / 2,
    )
    assert other.fingerprint() == PUBLISHED.fingerprint()
    # a value from elsewhere with fewer digits is no contradiction
    assert parse(wavelength_angstrom=1.097).wavelength_angstrom == 1.097


def test_focal_length_follows_from_the_zone_width_and_the_energy():
    plate = ZonePlate(diameter_um=149, outermost_zone_width_nm=16.1)
    assert plate.focal_length_at(1.0972) == pytest.approx(21.864, abs=1e-3)  # mm
    assert plate.focal_length_at(2 * 1.0972) == pytest.approx(21.864 / 2, abs=1e-3)
    given_one = ZonePlate(diameter_um=149, outermost_zone_width_nm=16.1, focal_length_mm=20)
    assert given_one.focal_length_at(1.0) == 20


def test_rectangular_pupil_in_pixels_is_half_its_angles_times_the_distance():
    pupil = RectangularPupil(divergence_x_mrad=6, divergence_y_mrad=5, stop_x_mrad=2, stop_y_mrad=1)
    expected = np.array([6, 5, 2, 1]) / 2 * 1e-3 * 0.85 / 110e-6
    assert parse(optics=pupil).pupil_px == pytest.approx(expected)


def test_detector_that_faces_the_bragg_beam_has_no_tilt():
    assert PUBLISHED.detector_tilt_deg == 0
    assert parse(detector_two_theta_deg=30.0).detector_tilt_deg == pytest.approx(1.735, abs=1e-3)
    assert parse(delta_theta_deg=0.1).incidence_deg == pytest.approx(15.967, abs=1e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    orientation=st.sampled_from(ORIENTATIONS),
    column=st.integers(60, 199),
    row=st.integers(60, 139),
    roi=st.one_of(st.none(), st.tuples(st.integers(40, 60), st.integers(50, 60))),
    binning=st.sampled_from([1, 2, 4]),
)
def test_bragg_centre_of_the_pattern_is_where_the_frame_shows_it(
    orientation, column, row, roi, binning
):
    frame = np.zeros((200, 260))
    frame[row, column] = 1
    geometry = parse(
        orientation=orientation,
        bragg_center_px=(column + 0.5, row + 0.5),
        roi_shape=(80, 120),
        roi_origin_px=roi,
        detector_shape=frame.shape,
        binning=binning,
    )
    cut = frame[geometry.roi.slices]
    ny, nx = (n // binning for n in cut.shape)
    pattern = geometry.orient(cut.reshape(ny, binning, nx, binning).sum(axis=(1, 3)))
    assert pattern.shape == geometry.pattern_shape
    x, y = geometry.pattern_center
    if pattern.any():
        assert np.argwhere(pattern)[0].tolist() == [math.floor(y), math.floor(x)]
    else:  # outside of the ROI
        assert not (0 <= x < pattern.shape[1] and 0 <= y < pattern.shape[0])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_can_be_undone(orientation):
    geometry = parse(orientation=orientation, roi_shape=(32, 64))
    frames = np.arange(2 * 16 * 32).reshape(2, 16, 32)
    patterns = geometry.orient(frames)
    assert patterns.shape[1:] == geometry.pattern_shape
    np.testing.assert_array_equal(geometry.unorient(patterns), frames)


def test_orientations_are_eight_different_turns():
    frame = np.arange(6).reshape(2, 3)
    turned = [parse(orientation=o).orient(frame) for o in ORIENTATIONS]
    assert len({(t.shape, t.tobytes()) for t in turned}) == 8
    np.testing.assert_array_equal(turned[ORIENTATIONS.index("rotate_90")], np.rot90(frame))
    np.testing.assert_array_equal(turned[ORIENTATIONS.index("rotate_270")], np.rot90(frame, 3))
    np.testing.assert_array_equal(turned[ORIENTATIONS.index("transpose")], frame.T)
    np.testing.assert_array_equal(turned[ORIENTATIONS.index("antitranspose")], np.rot90(frame, 2).T)


def test_roi_is_centred_on_the_bragg_centre_unless_placed():
    assert parse(bragg_center_px=(250.0, 260.0)).roi == ROI(row=196, col=186, height=128, width=128)
    placed = parse(bragg_center_px=(250.0, 260.0), roi_origin_px=(190, 180))
    assert placed.pattern_center == (35.0, 35.0)
    ROI(row=0, col=0, height=4, width=4).check_inside((4, 4))
    with pytest.raises(GeometryError, match="ROI off the detector"):
        ROI(row=0, col=1, height=4, width=4).check_inside((4, 4))


FREE = {"binning": None, "roi_shape": None}
MIRRORS = {
    "optics": {"kind": "rectangular", "divergence_x_mrad": 10, "divergence_y_mrad": 4},
}


@pytest.mark.parametrize("absent", [("binning",), ("roi_shape",), ("binning", "roi_shape")])
def test_published_binning_and_roi_follow_from_its_geometry(absent):
    chosen = parse(**dict.fromkeys(absent))
    assert chosen == PUBLISHED
    assert chosen.fingerprint() == PUBLISHED.fingerprint()
    # not a default: who leaves defaults out of a start document still states them
    assert {"binning", "roi_shape"} <= chosen.model_dump(exclude_defaults=True).keys()


@pytest.mark.parametrize(
    ("changes", "binning", "roi"),
    [
        # large pixels near the sample: a pupil of 6 pixels
        (
            {"pixel_size_um": 172, "detector_distance_m": 0.3},
            1,
            ROI(row=240, col=240, height=32, width=32),
        ),
        (MIRRORS, 3, ROI(row=208, col=160, height=96, width=192)),
        (MIRRORS | {"orientation": "rotate_90"}, 3, ROI(row=160, col=208, height=192, width=96)),
        (
            {"detector_shape": (115, 256), "bragg_center_px": (128.0, 57.5)},
            2,
            ROI(row=0, col=64, height=114, width=128),
        ),
        ({"bragg_center_px": (30.0, 490.0)}, 2, ROI(row=426, col=0, height=86, width=94)),
        (
            {"bragg_center_px": (30.0, 490.0), "detector_shape": None},
            2,
            ROI(row=426, col=0, height=128, width=94),
        ),
        ({"roi_origin_px": (100, 210)}, 2, ROI(row=100, col=210, height=128, width=128)),
    ],
)
def test_binning_and_roi_hold_the_pupil_and_stay_on_the_detector(changes, binning, roi):
    geometry = parse(**FREE | changes)
    assert (geometry.binning, geometry.roi) == (binning, roi)


@pytest.mark.parametrize(
    ("roi_shape", "binning"), [((128, 128), 2), ((129, 129), 3), ((127, 128), 1), ((12, 12), 1)]
)
def test_binning_divides_a_given_roi(roi_shape, binning):
    assert parse(binning=None, roi_shape=roi_shape).binning == binning


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    distance=st.floats(0.05, 3),
    x=st.floats(0, 487),
    y=st.floats(0, 195),
    half_angles=st.tuples(st.floats(0.1, 20), st.floats(0.1, 20)),
    orientation=st.sampled_from(ORIENTATIONS),
)
def test_chosen_roi_is_as_large_as_the_pupil_or_the_reason_says_what_works(
    distance, x, y, half_angles, orientation
):
    pupil = RectangularPupil(
        divergence_x_mrad=2 * half_angles[0], divergence_y_mrad=2 * half_angles[1]
    )
    values = FREE | {
        "detector_shape": (195, 487),
        "bragg_center_px": (x, y),
        "optics": pupil,
        "orientation": orientation,
    }
    geometry = None
    while geometry is None:
        try:
            geometry = parse(**values, detector_distance_m=distance)
        except GeometryError as error:
            nearer = re.search(r"the pupil is .* to at most (\S+) m", str(error))
            assert nearer, error
            assert float(nearer[1]) < distance
            distance = float(nearer[1])
    rx, ry, _, _ = geometry.pupil_px
    assert max(rx, ry) <= 30
    assert geometry.binning == 1 or max(rx, ry) * geometry.binning > 30 * (geometry.binning - 1)
    (cx, cy), (ny, nx) = geometry.pattern_center, geometry.pattern_shape
    rows, cols = geometry.detector_shape
    roi = geometry.roi
    edges = [roi.col, cols - roi.col - roi.width, roi.row, rows - roi.row - roi.height]
    cut = any(edge < geometry.binning for edge in edges)
    assert cut or min(cx, nx - cx) >= 1.05 * rx
    assert cut or min(cy, ny - cy) >= 1.05 * ry


@pytest.mark.parametrize("changes", [{}, {"delta_theta_deg": 0.1}, MIRRORS])
def test_chosen_roi_holds_the_light(changes):
    chosen = parse(**FREE | changes)
    whole = parse(**changes, binning=chosen.binning, roi_shape=(504, 504))
    seen, all_light = (forward(0.001, 0.01, -0.02, g).sum() for g in (chosen, whole))
    assert seen > 0.97 * all_light


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"detector_distance_m": 5.0},
            r"the pupil is 619 pixels high, the detector 512 \(detector_shape\): move the "
            r"detector to at most 4.13 m, or say with roi_shape",
        ),
        ({"bragg_center_px": (600.0, 256.0)}, r"\(600, 256\), .* off the detector of 512 rows"),
        ({"bragg_center_px": (-1.0, 256.0), "detector_shape": None}, r"off the detector: give"),
    ],
)
def test_geometry_without_a_possible_roi_says_what_would_work(changes, message):
    with pytest.raises(GeometryError, match=rf"^run 3f2a: .*{message}"):
        parse(**FREE | changes)


def test_part_of_a_pupil_larger_than_the_detector_is_analysed_on_demand():
    assert parse(binning=None, detector_distance_m=5.0, roi_shape=(512, 512)).binning == 16


def test_fringes_are_as_far_apart_as_the_pattern_shows_them():
    geometry = parse(thickness_nm=60.0, binning=1)
    profile = forward(0.0, 0.0, 0.0, geometry)[0].sum(axis=0)
    first = [np.flatnonzero(np.diff(half) > 0)[0] for half in (profile[64:], profile[63::-1])]
    assert sum(first) + 1 == pytest.approx(2 * geometry.fringe_px, abs=1)
    assert PUBLISHED.fringe_px == pytest.approx(37.7, abs=0.05)  # 1 / (2 f), f = 0.01327


@pytest.mark.parametrize(
    "changes",
    [
        {"energy_keV": 11.301},
        {"detector_distance_m": 0.8501},
        {"pixel_size_um": 55.01},
        {"binning": 1},
        {"roi_shape": (128, 64)},
        {"bragg_center_px": (256.5, 256.0)},
        {"detector_two_theta_deg": 31.7},
        {"lattice_c_angstrom": 4.0131},
        {"thickness_nm": 11.71},
        {"delta_theta_deg": 0.001},
        {"pupil_blur_px": 0.5},
        {"optics": {**FIELDS["optics"], "central_stop_diameter_um": 77.1}},
        {"optics": RectangularPupil(divergence_x_mrad=6, divergence_y_mrad=6)},
    ],
)
def test_fingerprint_changes_with_the_physics(changes):
    assert parse(**changes).fingerprint() != PUBLISHED.fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"detector_shape": None},
        {"bragg_center_px": (200.0, 300.0)},  # the ROI moves along
        {"orientation": "flip_x"},
        {"pixel_mask": ((3, 4),)},
        {"saturation_value": 65535},
        {"energy_keV": 11.3 * (1 + 1e-13)},
        {"pixel_size_um": 110, "binning": 1, "roi_shape": (64, 64)},
    ],
)
def test_fingerprint_does_not_change_with_the_rest(changes):
    assert parse(**changes).fingerprint() == PUBLISHED.fingerprint()


def test_fingerprint_is_the_same_tomorrow():
    # weights are found by it: a change here orphans every stored model
    assert PUBLISHED.fingerprint() == "b4fd40b2781e628d"


def test_geometry_survives_json():
    for geometry in (PUBLISHED, parse(pixel_mask=((1, 2), (3, 4)), detector_two_theta_deg=31.0)):
        again = Geometry.model_validate_json(geometry.model_dump_json())
        assert again == geometry
        assert hash(again) == hash(geometry)


def test_geometry_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        PUBLISHED.thickness_nm = 12
