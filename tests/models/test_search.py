import logging

import numpy as np
import pytest

from nanobeam_bluesky.geometry import Geometry, RectangularPupil
from nanobeam_bluesky.models import Estimates, Flag, library_search, refine, search
from nanobeam_bluesky.physics import forward

BLURRED = Geometry.published().model_copy(update={"pupil_blur_px": 0.5})
MIRRORS = {"optics": RectangularPupil(divergence_x_mrad=4.5, divergence_y_mrad=4)}
RANGES = [0.005, 0.05, 0.1]


def draw(geometry, n, counts, seed):
    rng = np.random.default_rng(seed)
    truth = rng.uniform(-1, 1, (n, 3)) * RANGES
    patterns = forward(*truth.T, geometry)
    scale = counts / patterns.sum(axis=(1, 2)).mean()
    return truth, rng.poisson(scale * patterns + 0.02).astype(np.float32)


@pytest.mark.parametrize(
    "change",
    [{}, MIRRORS, {"thickness_nm": 100.0}],
    ids=["zone plate", "mirrors", "thick film"],
)
def test_refine_finds_the_highest_maximum_from_there(change):
    """At 3000 counts 200 patterns; from the truth itself for comparison."""
    geometry = BLURRED.model_copy(update=change)
    truth, counts = draw(geometry, 200, 3000, seed=4)
    found = refine(counts, library_search(counts, geometry), geometry)
    columns = dict(zip(("strain", "omega", "chi"), truth.T, strict=True))
    best = refine(counts, Estimates(**Estimates.empty(200).columns() | columns), geometry)
    for name in columns:
        distance = np.abs(getattr(found, name) - getattr(best, name))
        assert (distance < 0.2 * getattr(best, f"{name}_sigma")).all(), name


def test_estimates_lie_on_the_grid_of_the_likeliest_pattern():
    truth, counts = draw(BLURRED, 50, 1e5, seed=5)
    found = library_search(counts, BLURRED)
    for i, (name, step) in enumerate((("strain", 0.0025), ("omega", 0.0084), ("chi", 0.034))):
        assert np.abs(getattr(found, name) - truth[:, i]).max() < step, name


def test_a_very_thin_film_and_nonsense_are_flagged_and_raise_nothing():
    geometry = BLURRED.model_copy(update={"thickness_nm": 1.0})
    nonsense = np.random.default_rng(6).poisson(3, (40, 64, 64)).astype(np.float32)
    nonsense[::2, :, 40:] *= 20
    found = refine(nonsense, library_search(nonsense, geometry), geometry)
    assert (found.flags > 0).all()
    assert (found.flags & (Flag.MISFIT | Flag.FEW_COUNTS | Flag.NOT_CONVERGED) > 0).all()


def test_ranges_say_how_far_the_library_reaches():
    ranges = {"strain": 0.01, "omega": 0.08, "chi": 0.16}
    far = np.array([[0.008, 0.02, 0.1], [-0.008, 0.065, -0.15]])
    counts = np.random.default_rng(7).poisson(30 * forward(*far.T, BLURRED))
    found = library_search(counts, BLURRED, ranges=ranges)
    for i, (name, step) in enumerate((("strain", 0.0025), ("omega", 0.0095), ("chi", 0.034))):
        assert np.abs(getattr(found, name) - far[:, i]).max() < step, name


def test_a_library_that_would_be_too_large_has_wider_steps(monkeypatch, caplog):
    geometry = BLURRED.model_copy(update={"thickness_nm": 30.0})
    monkeypatch.setattr(search, "_LARGEST", 300 * 64 * 64)
    with caplog.at_level(logging.WARNING, "nanobeam_bluesky"):
        library = search._library(geometry, tuple(RANGES))
    assert "would hold 637 patterns of 64 × 64 pixels" in caplog.text
    assert 100 < len(library.logarithms) <= 300
    np.testing.assert_allclose(library.parameters.max(axis=0), RANGES)


@pytest.mark.parametrize("each", [False, True])
def test_masked_pixels_are_not_compared(each):
    truth, counts = draw(BLURRED, 60, 6000, seed=8)
    mask = np.zeros(counts.shape if each else (64, 64), np.bool_)
    mask[..., 20:28] = True
    mask[..., 40, 33] = True
    hidden = np.where(mask, np.float32(1e4), counts)
    found = library_search(hidden, BLURRED, mask=mask)
    for i, (name, step) in enumerate((("strain", 0.0025), ("omega", 0.0084), ("chi", 0.034))):
        assert np.abs(getattr(found, name) - truth[:, i]).max() < step, name
        np.testing.assert_array_equal(
            getattr(library_search(counts, BLURRED, mask=mask), name), getattr(found, name)
        )
