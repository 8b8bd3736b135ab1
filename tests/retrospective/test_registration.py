"""Drift between two scans of one area, from their maps."""

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from nanobeam_bluesky.retrospective.registration import register
from nanobeam_bluesky.sim import phantom

SIGMA = {"strain": 1.6e-4, "omega": 1.6e-4, "chi": 5e-4}


def scan(shape, drift=(0.0, 0.0), *, seed=0, turned=False):
    """Noisy maps of the film phantom; features lie `drift` farther along rows and columns."""
    rng = np.random.default_rng(seed)
    whole = phantom("film", (shape[0] + 24, shape[1] + 24), seed=4)
    at = np.indices(shape) + 12 - np.array(drift)[:, None, None]
    maps = {}
    for name, sigma in SIGMA.items():
        maps[name] = map_coordinates(getattr(whole, name), at, order=1)
        maps[name] += sigma * rng.standard_normal(shape)
    intensity = map_coordinates(whole.intensity, at, order=1)
    maps["counts"] = rng.poisson(6000 * intensity + 1).astype(float)
    for name in SIGMA:
        maps[name][intensity < 0.05] = np.nan
    return {name: image[::-1, ::-1] for name, image in maps.items()} if turned else maps


@pytest.mark.parametrize("drift", [(9.7, -8.3), (-0.45, 0.3), (0.0, 0.0), (-10.0, 4.5)])
def test_drift_is_found_to_a_fifth_of_a_point(drift):
    found = register(scan((40, 44), seed=1), scan((40, 44), drift, seed=2))
    assert found.trusted
    assert found.quality > 0.95
    np.testing.assert_allclose([found.row, found.col], drift, atol=0.2)


@pytest.mark.parametrize("contrast", [1, -1])
def test_intensity_alone_is_enough_even_where_its_contrast_turns_over(contrast):
    first, second = (
        {"counts": scan((40, 44), d, seed=s)["counts"]} for s, d in ((1, (0, 0)), (2, (3.4, -2.7)))
    )
    found = register(first, {"counts": contrast * second["counts"]})
    assert found.trusted
    np.testing.assert_allclose([found.row, found.col], [3.4, -2.7], atol=0.2)


def test_missing_points_do_not_move_the_drift():
    first, second = scan((40, 44), seed=1), scan((40, 44), (4.3, 2.6), seed=2)
    for maps in (first, second):  # the same rows of both, which must not register on each other
        for image in maps.values():
            image[17:20, 5:] = np.nan
    found = register(first, second)
    np.testing.assert_allclose([found.row, found.col], [4.3, 2.6], atol=0.2)


def test_maps_of_another_area_are_not_trusted():
    assert not register(scan((40, 44), seed=1), scan((40, 44), seed=2, turned=True)).trusted


def test_maps_that_look_the_same_everywhere_are_not_trusted():
    noise = [
        {"counts": np.random.default_rng(seed).poisson(6000, (40, 44)).astype(float)}
        for seed in (1, 2)
    ]
    stripes = {"strain": np.sin(np.arange(44) * 2 * np.pi / 8) + np.zeros((40, 44))}
    assert not register(*noise).trusted
    assert not register(stripes, stripes).trusted
    assert not register({"counts": np.ones((40, 44))}, {"counts": np.ones((40, 44))}).trusted
