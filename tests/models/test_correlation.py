import numpy as np
import pytest

from nanobeam_bluesky.models import CorrelationLibrary, correlation_fit
from nanobeam_bluesky.models.correlation import PARAMETERS, RANGES
from nanobeam_bluesky.physics import simulate_library

STEPS = 9


def direct_fit(patterns, library, axes):
    """The fit as published: correlate with every library pattern, then sum over two axes."""
    library = library.astype(float)
    library /= library.sum(axis=(3, 4), keepdims=True)
    correlation = np.einsum("nyx,abcyx->nabc", patterns.astype(float), library)
    found = []
    for kept in range(3):
        others = tuple(1 + axis for axis in range(3) if axis != kept)
        weight = correlation.sum(axis=others)
        weight -= weight.min(axis=1, keepdims=True)
        found.append(weight @ axes[kept] / weight.sum(axis=1))
    return found


@pytest.mark.parametrize("sampling", ["continuous", "published"])
def test_marginals_give_the_direct_fit(geometry, simulate, sampling):
    _, counts = simulate(60, scale=7)
    library = CorrelationLibrary.simulate(geometry, steps=STEPS, sampling=sampling)
    estimates = correlation_fit(counts, geometry, library=library)
    axes = [np.linspace(-RANGES[name], RANGES[name], STEPS) for name in PARAMETERS]
    direct = direct_fit(counts, simulate_library(geometry, *axes, sampling=sampling), axes)
    for name, expected in zip(PARAMETERS, direct, strict=True):
        difference = np.abs(getattr(estimates, name) - expected).max()
        assert difference < 1e-6 * RANGES[name], name


def test_estimates_grow_with_the_truth(geometry, simulate):
    truth, counts = simulate(300)
    estimates = correlation_fit(
        counts, geometry, library=CorrelationLibrary.simulate(geometry, steps=STEPS)
    )
    for column, name in enumerate(PARAMETERS):
        assert np.corrcoef(truth[:, column], getattr(estimates, name))[0, 1] > 0.8, name


def test_empty_pattern_is_nan(geometry):
    library = CorrelationLibrary.simulate(geometry, steps=3)
    estimates = correlation_fit(np.zeros((1, *geometry.pattern_shape)), geometry, library=library)
    assert np.isnan([estimates.strain, estimates.omega, estimates.chi]).all()
    assert estimates.counts.tolist() == [0]


def test_library_patterns_off_the_roi_do_not_count(geometry):
    """Tilts that move the beam off the ROI leave empty library patterns, and no NaN."""
    library = CorrelationLibrary.simulate(geometry, steps=3, ranges={"chi": 10})
    assert not any(np.isnan(values).any() for values in library.marginals.values())
