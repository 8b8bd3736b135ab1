import numpy as np
import pytest
from scipy import stats

from nanobeam_bluesky.training.noise import poisson


def draw(mean, n, seed=0, scale=1.0, background=0.0):
    """n × 256 numbers of one mean."""
    pattern = np.full((1, 16, 16), mean, np.float32)
    which = np.zeros(n, np.int64)
    scale, background = (np.full(n, v, np.float32) for v in (scale, background))
    return poisson(pattern, which, scale, background, seed)


# below, on and above the borders of the tables (1/8 and 32), and several tables' worth
@pytest.mark.parametrize("mean", [0.01, 0.11, 0.125, 0.9, 4.5, 31.9, 32, 47.3, 500])
def test_numbers_follow_the_poisson_distribution(mean):
    numbers = draw(mean, 2000).ravel()
    values = np.arange(stats.poisson.ppf(1e-4, mean), stats.poisson.ppf(1 - 1e-4, mean) + 1)
    expected = len(numbers) * stats.poisson.pmf(values, mean)
    expected[0] = len(numbers) * stats.poisson.cdf(values[0], mean)
    expected[-1] = len(numbers) * stats.poisson.sf(values[-1] - 1, mean)
    found = np.bincount(np.clip(numbers, values[0], values[-1]).astype(int) - int(values[0]))
    found = np.pad(found, (0, len(values) - len(found)))
    assert stats.chisquare(found, expected).pvalue > 1e-3


def test_pixels_and_patterns_are_independent():
    numbers = draw(2.0, 4000).reshape(4000, -1)
    correlation = np.corrcoef(numbers[:, :20].T)[np.triu_indices(20, 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 5e-3


def test_scale_and_background_add_up_to_the_mean():
    numbers = draw(0.5, 4000, scale=6.0, background=0.25)
    assert numbers.mean() == pytest.approx(3.25, abs=5 * np.sqrt(3.25 / numbers.size))


def test_each_draw_takes_its_own_pattern():
    patterns = np.zeros((3, 8, 8), np.float32)
    patterns[2] = 10
    one, none = np.ones(2, np.float32), np.zeros(2, np.float32)
    numbers = poisson(patterns, np.array([2, 0]), one, none, seed=0)
    assert numbers[0].min() > 0
    assert numbers[1].max() == 0


def test_seed_decides():
    np.testing.assert_array_equal(draw(3.0, 5, seed=7), draw(3.0, 5, seed=7))
    assert (draw(3.0, 5, seed=7) != draw(3.0, 5, seed=8)).any()


def test_rounding_below_zero_is_dark():
    assert draw(-1e-8, 3).max() == 0
