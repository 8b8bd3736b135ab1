from typing import Any, get_args

import numpy as np
import pytest

from nanobeam_bluesky.geometry import Geometry, Orientation
from nanobeam_bluesky.physics import forward
from nanobeam_bluesky.sim import Phantom, phantom
from nanobeam_bluesky.sim.rendering import Renderer


def renderer(sample: Phantom, geometry: Geometry, **options: Any) -> Renderer:
    defaults = {"counts": 6000, "background": 0.0, "hot_pixels": {}, "dead_rows": (), "seed": 0}
    made = Renderer(sample, geometry, **{**defaults, **options})
    made.render_missing()
    return made


def binned(frame: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The pattern (ny, nx) that an analysis sees."""
    roi = geometry.orient(frame[geometry.roi.slices])
    b = geometry.binning
    return roi.reshape(roi.shape[0] // b, b, roi.shape[1] // b, b).sum(axis=(1, 3))


@pytest.mark.parametrize("orientation", get_args(Orientation))
def test_the_analysed_pattern_is_the_forward_model_with_photon_noise(
    geometry: Geometry, orientation: Orientation
) -> None:
    turned = Geometry.model_validate(
        {**geometry.model_dump(), "orientation": orientation, "roi_shape": (128, 96)}
    )
    sample = phantom("unique", (3, 4))
    made = renderer(sample, turned, counts=1e5, background=0.5)
    for row, col in np.ndindex(sample.shape):
        expected = 0.5 + made.scale * forward(
            sample.strain[row, col], sample.omega[row, col], sample.chi[row, col], turned
        )[0].astype(float)
        noise = (binned(made.frame(row, col), turned) - expected) / np.sqrt(expected)
        # of 3072 pixels: mean 0 ± 0.018, variance 1 ± 0.03
        assert abs(noise.mean()) < 0.1
        assert noise.var() == pytest.approx(1, abs=0.2)


def test_counts_are_the_photons_of_an_unstrained_point(geometry: Geometry) -> None:
    zero = np.zeros((10, 10))
    sample = Phantom("flat", zero, zero, zero, zero + 1, np.arange(10.0), np.arange(10.0))
    made = renderer(sample, geometry, counts=6000)
    totals = [made.frame(r, c).sum() for r, c in np.ndindex(10, 10)]
    assert np.mean(totals) == pytest.approx(6000, abs=5 * np.sqrt(6000) / 10)
    assert np.var(totals) == pytest.approx(6000, rel=0.8)


def test_where_film_is_missing_there_is_only_background(geometry: Geometry) -> None:
    sample = phantom("film", (12, 12))
    made = renderer(sample, geometry, background=0.04)
    rate = 0.04 / geometry.binning**2
    pixels = np.prod(geometry.detector_shape)
    for row, col in np.argwhere(sample.intensity == 0):
        total = made.frame(row, col).sum()
        assert total == pytest.approx(rate * pixels, abs=6 * np.sqrt(rate * pixels))


def test_background_is_all_over_the_detector(geometry: Geometry) -> None:
    made = renderer(phantom("figure3", (3, 3)), geometry, background=2.0)
    frame = made.frame(1, 1).astype(float)
    frame[geometry.roi.slices] = np.nan
    assert np.nanmean(frame) == pytest.approx(0.5, abs=0.05)


def test_photons_fall_anywhere_within_a_binned_pixel(geometry: Geometry) -> None:
    frame = renderer(phantom("figure3", (1, 1)), geometry, counts=1e6).frame(0, 0)
    roi = frame[geometry.roi.slices]
    quarters = [roi[i::2, j::2].sum() for i in (0, 1) for j in (0, 1)]
    np.testing.assert_allclose(quarters, 2.5e5, rtol=0.01)


@pytest.mark.parametrize("counts", [6000, 1e6])
def test_hot_pixels_and_dead_rows_read_what_they_were_told(
    geometry: Geometry, counts: float
) -> None:
    inside = geometry.roi.row + 40, geometry.roi.col + 50
    made = renderer(
        phantom("figure3", (2, 2)),
        geometry,
        counts=counts,
        hot_pixels={inside: 1000, (3, 5): 65535},
        dead_rows=[geometry.roi.row + 60, 0],
    )
    frame = made.frame(1, 0)
    assert frame[inside] == 1000
    assert frame[3, 5] == 65535
    assert not frame[[geometry.roi.row + 60, 0]].any()
    assert frame[geometry.roi.row + 61].any()


def test_the_same_seed_gives_the_same_frames_and_another_attempt_new_noise(
    geometry: Geometry,
) -> None:
    sample = phantom("figure3", (2, 2))
    made, again = (renderer(sample, geometry, seed=3) for _ in range(2))
    first = made.frame(1, 1)
    np.testing.assert_array_equal(first, again.frame(1, 1))
    assert not np.array_equal(first, renderer(sample, geometry, seed=4).frame(1, 1))
    made.render(np.array([1]), np.array([1]), np.array([1]))
    assert not np.array_equal(first, made.frame(1, 1))
    np.testing.assert_array_equal(made.frame(0, 1), again.frame(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": -1}, "counts = -1"),
        ({"background": float("nan")}, "background = nan"),
        ({"hot_pixels": {(160, 0): 9}}, r"hot pixel \(160, 0\) must lie on .* 160 × 144"),
        ({"hot_pixels": {(0, 0): 70000}}, "must be 0 to 65535"),
        ({"dead_rows": [200]}, "dead row 200"),
    ],
)
def test_impossible_detectors_are_refused(
    geometry: Geometry, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        renderer(phantom("figure3", (2, 2)), geometry, **options)
