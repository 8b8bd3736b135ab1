from dataclasses import replace

import numpy as np
import pytest

from nanobeam_bluesky.geometry import Geometry, RectangularPupil
from nanobeam_bluesky.models import Estimates, refine, sensitivity
from nanobeam_bluesky.physics import forward

ERRORS = {  # about what one would not notice
    "bragg_center_x": 1.0,
    "bragg_center_y": 1.0,
    "energy": 20.0,
    "energy_at_fixed_angles": 1.0,
    "detector_distance": 1.0,
    "thickness": 0.1,
    "delta_theta": 0.1,
    "detector_two_theta": 1.0,
}


@pytest.fixture(scope="module", params=["zone plate", "mirrors"])
def geometry(request):
    changes = {"pupil_blur_px": 0.5}
    if request.param == "mirrors":
        changes["optics"] = RectangularPupil(divergence_x_mrad=6, divergence_y_mrad=5)
    return Geometry.published().model_copy(update=changes)


@pytest.fixture(scope="module")
def effects(geometry):
    return sensitivity(geometry, strain=5e-4, omega=0.004, chi=-0.01)


def stated(geometry, name, error):
    """The geometry with an error of one of its quantities; ROI as it is."""
    x, y = geometry.bragg_center_px
    two_theta = 2 * geometry.bragg_angle_deg
    keV = geometry.energy_keV + error * 1e-3
    energy = {"energy_keV": keV, "wavelength_angstrom": None}
    changes = {
        "bragg_center_x": {"bragg_center_px": (x + error, y)},
        "bragg_center_y": {"bragg_center_px": (x, y + error)},
        "energy": energy,
        "detector_distance": {"detector_distance_m": geometry.detector_distance_m + error / 1e3},
        "thickness": {"thickness_nm": geometry.thickness_nm + error},
        "delta_theta": {"delta_theta_deg": np.degrees(error / 1e3)},
        "detector_two_theta": {"detector_two_theta_deg": two_theta + np.degrees(error / 1e3)},
    }
    roi = {"roi_origin_px": (geometry.roi.row, geometry.roi.col)}
    if name == "energy_at_fixed_angles":  # the detector faces the old 2θB, the beam moves
        new = Geometry.model_validate(geometry.model_dump() | energy)
        moved = np.tan(np.radians(2 * new.bragg_angle_deg - two_theta))
        moved *= geometry.detector_distance_m * 1e6 / geometry.pixel_size_um
        changes[name] = energy | {
            "bragg_center_px": (x + moved, y),
            "detector_two_theta_deg": two_theta,
            "delta_theta_deg": geometry.bragg_angle_deg - new.bragg_angle_deg,
        }
    return Geometry.model_validate(geometry.model_dump() | roi | changes[name])


@pytest.mark.parametrize("name", ERRORS)
def test_a_fit_with_the_wrong_geometry_is_off_by_what_sensitivity_says(geometry, effects, name):
    truth = {"strain": 5e-4, "omega": 0.004, "chi": -0.01}
    pattern = 1000 * forward(*truth.values(), geometry, background=0.001)  # without noise
    start = replace(Estimates.empty(1), **{k: np.array([v]) for k, v in truth.items()})
    wrong = stated(geometry, name, ERRORS[name])
    exact = refine(pattern, start, geometry)
    found = refine(pattern, start, wrong)
    for parameter, limit in (("strain", 2e-7), ("omega", 2e-6), ("chi", 5e-6)):
        off = (getattr(found, parameter) - getattr(exact, parameter))[0]
        expected = ERRORS[name] * getattr(effects[name], parameter)
        assert off == pytest.approx(expected, rel=0.02, abs=limit), parameter


def test_the_published_condition(published):
    """One binned pixel of centre, as stated in the documentation of the physics."""
    x, y = published["bragg_center_x"], published["bragg_center_y"]
    assert 2 * x.strain == pytest.approx(2.3e-4, rel=0.02)
    assert 2 * y.chi == pytest.approx(0.0135, rel=0.02)
    assert abs(y.strain) < 1e-9
    assert abs(x.chi) < 1e-9
    # Bragg's law: a wavelength that is too short, a lattice that is too small
    energy = published["energy_at_fixed_angles"]
    assert energy.strain == pytest.approx(-1 / 11300, rel=1e-3)
    # an incidence that is off is a tilt
    assert published["delta_theta"].omega == pytest.approx(np.degrees(1e-3), rel=1e-3)


def test_an_error_of_the_centre_leaves_no_trace_but_one_of_the_thickness_does(published):
    noise = 70
    assert 4 * published["bragg_center_x"].excess_deviance < 0.2
    assert published["bragg_center_y"].excess_deviance < 1e-6
    assert 20**2 * published["energy_at_fixed_angles"].excess_deviance < 1
    assert 2.3**2 * published["thickness"].excess_deviance > 2 * noise


@pytest.fixture(scope="module")
def published():
    return sensitivity(Geometry.published())


def test_a_turned_detector_has_its_center_along_the_other_axis():
    turned = Geometry.published().model_copy(update={"orientation": "rotate_90"})
    effects, upright = sensitivity(turned), sensitivity(Geometry.published())
    along, across = effects["bragg_center_y"].strain, effects["bragg_center_x"].chi
    assert along == pytest.approx(upright["bragg_center_x"].strain, rel=1e-3)
    assert across == pytest.approx(-upright["bragg_center_y"].chi, rel=1e-3)
    for name in ("energy_at_fixed_angles", "thickness"):
        assert effects[name].strain == pytest.approx(upright[name].strain, rel=1e-3)


def test_the_mean_over_several_places_is_the_mean_of_each():
    geometry = Geometry.published().model_copy(update={"binning": 8})
    places = {"strain": [0.0, 1e-3], "omega": [0.01, -0.01], "chi": [0.0, 0.02]}
    both = sensitivity(geometry, **places)["thickness"].strain
    each = [
        sensitivity(geometry, **{k: v[i] for k, v in places.items()})["thickness"].strain
        for i in range(2)
    ]
    assert both == pytest.approx(np.mean(each), rel=1e-6)


def test_it_prints_as_a_line(published):
    assert str(published["bragg_center_y"]).startswith("per px: ε ")


def test_dark_places_are_refused():
    with pytest.raises(ValueError, match="no light reaches the ROI"):
        sensitivity(Geometry.published(), chi=5.0)
    with pytest.raises(ValueError, match="background = 0 must be above 0"):
        sensitivity(Geometry.published(), background=0)
