import json
import subprocess
import sys

import numpy as np
import pytest

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Analyzer, Flag, ModelNotFoundError, ModelStore
from nanobeam_bluesky.physics import forward


@pytest.fixture(scope="module")
def published():
    return Analyzer.for_geometry(Geometry.published(), method="network", device="cpu")


@pytest.fixture(scope="module")
def film():
    """Parameters (n, 3) and counts (n, 64, 64) of the published condition."""
    rng = np.random.default_rng(3)
    truth = rng.uniform(-1, 1, (200, 3)) * [0.0045, 0.045, 0.09]
    return truth, rng.poisson(4.5 * forward(*truth.T, Geometry.published()))


def test_shipped_network_beats_one_published_network(published, film):
    """One published network, re-measured on the continuous model at 4300 counts."""
    truth, counts = film
    estimates = published.process(counts)
    for column, name, reference in (
        (0, "strain", 1.8e-4),
        (1, "omega", 5.4e-4),
        (2, "chi", 1.6e-3),
    ):
        error = getattr(estimates, name) - truth[:, column]
        assert np.sqrt(np.mean(error**2)) < 0.9 * reference, name
    assert not estimates.flags.any()
    np.testing.assert_array_equal(estimates.counts, counts.sum(axis=(1, 2)))


def test_sigma_is_the_size_of_the_error(published, film):
    truth, counts = film
    estimates = published.process(counts)
    for column, name in enumerate(("strain", "omega", "chi")):
        pull = (getattr(estimates, name) - truth[:, column]) / getattr(estimates, f"{name}_sigma")
        assert 0.8 < pull.std() < 1.2, name


def test_sigma_is_interpolated_in_the_logarithm_of_counts(network, card, geometry):
    analyzer = Analyzer(geometry, network=network, card=card)
    patterns = (
        np.ones((4, *geometry.pattern_shape)) * np.array([1e3, 1e4, 1e5, 2.5e2])[:, None, None]
    )
    sigma = analyzer.process(patterns / patterns[0].size).strain_sigma
    np.testing.assert_allclose(sigma, [4e-4, np.sqrt(4e-4 * 4e-5), 4e-5, 8e-4], rtol=1e-6)


def test_result_does_not_depend_on_what_came_with_a_pattern(published, film):
    _, counts = film
    whole = published.process(counts)
    for size in (1, 7, 130):
        part = published.process(counts[:size])
        for name in ("strain", "omega", "chi"):
            np.testing.assert_allclose(
                getattr(part, name), getattr(whole, name)[:size], rtol=1e-4, atol=1e-8
            )


@pytest.mark.parametrize("method", ["refine", "network", "correlation"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 1e300])
def test_impossible_pixel_is_a_flagged_point_and_no_exception(film, method, value):
    analyzer = Analyzer.for_geometry(Geometry.published(), method=method)
    counts = film[1][:3].astype(float)
    counts[1, 5, 5] = value
    estimates = analyzer.process(counts)
    assert estimates.flags.tolist() == [0, Flag.MISFIT, 0]
    assert np.isnan([estimates.strain[1], estimates.omega[1], estimates.chi[1]]).all()
    assert np.isfinite(estimates.strain[[0, 2]]).all()


@pytest.mark.parametrize("method", ["refine", "network", "correlation"])
def test_dark_pattern_has_few_counts(method):
    analyzer = Analyzer.for_geometry(Geometry.published(), method=method)
    estimates = analyzer.process(np.zeros((2, 64, 64), np.uint16))
    assert (estimates.flags == Flag.FEW_COUNTS).all()
    assert estimates.counts.tolist() == [0, 0]


def test_truth_outside_the_trained_range_is_flagged():
    outside = [(0.0065, 0, 0), (0, 0.065, 0), (0, 0, -0.13)]
    patterns = np.round(700 * forward(*np.transpose(outside), Geometry.published()))
    for method in ("refine", "network"):
        analyzer = Analyzer.for_geometry(Geometry.published(), method=method)
        assert (analyzer.process(patterns).flags & Flag.OUT_OF_RANGE > 0).all(), method


def test_correlation_needs_no_training_and_gives_no_sigma(tmp_path, geometry, simulate):
    with pytest.raises(ModelNotFoundError):
        Analyzer.for_geometry(geometry, method="network", store=ModelStore(tmp_path))
    analyzer = Analyzer.for_geometry(geometry, method="correlation")
    truth, counts = simulate(50)
    estimates = analyzer.process(counts)
    assert np.corrcoef(truth[:, 1], estimates.omega)[0, 1] > 0.9
    assert np.isnan(estimates.omega_sigma).all()


def test_no_patterns_give_no_points(published):
    assert len(published.process(np.empty((0, 64, 64)))) == 0


@pytest.mark.parametrize("shape", [(64, 64), (3, 64, 32), (3, 1, 64, 64)])
def test_wrong_shape_is_refused(published, shape):
    with pytest.raises(ValueError, match=r"expected \(n, 64, 64\)"):
        published.process(np.zeros(shape))


def test_wrong_type_and_method_are_refused(published):
    with pytest.raises(ValueError, match="expected numbers"):
        published.process(np.zeros((1, 64, 64), complex))
    with pytest.raises(ValueError, match="must be one of"):
        Analyzer.for_geometry(Geometry.published(), method="guess")


def test_settings_tell_weights_apart(published, network, card, geometry):
    assert json.loads(json.dumps(published.settings)) == published.settings
    assert published.settings != Analyzer(geometry, network=network, card=card).settings


def test_models_import_without_bluesky_and_tiled():
    code = (
        "import sys, nanobeam_bluesky.models;"
        "print([m for m in ('bluesky', 'event_model', 'tiled') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
