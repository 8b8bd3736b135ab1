"""The kernels of the likelihood against plain NumPy and against sums over the Poisson law."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import xlogy
from scipy.stats import poisson

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.physics.continuous import continuous_plan, pattern_channels
from nanobeam_bluesky.physics.likelihood import (
    _logarithms,
    deviance_moments,
    goodness,
    poisson_sums,
)

SCALE, BACKGROUND = 7.0, 0.05


def problem(seed, *, masked=0.0, shape=(3, 9, 13)):
    """Channels (k, nx, ny) with dark pixels in the pattern, counts and used pixels (nx, ny)."""
    rng = np.random.default_rng(seed)
    channels = rng.normal(size=shape)
    channels[0] = rng.uniform(0, 1, shape[1:]) ** 4
    channels[0, :2] = 0
    used = (rng.uniform(size=shape[1:]) >= masked).astype(float)
    counts = rng.poisson(SCALE * channels[0] + BACKGROUND).astype(float)
    counts[3, 4] = 1e6  # hot
    return channels, counts, used


def scratch(channels):
    k, _, ny = channels.shape
    return np.empty((2 * k + 3, ny)), np.empty((2, ny), np.int32)


def sums(channels, scale, background, counts, used, dark=0.0):
    """Score (k + 1,), information (k + 1, k + 1) and −2 log likelihood."""
    k = len(channels)
    score, information = np.full(k + 1, np.nan), np.full((k + 1, k + 1), np.nan)
    work = scratch(channels)
    total = poisson_sums(channels, scale, background, counts, used, dark, *work, information, score)
    return score, information, total


def quality(channels, scale, background, counts, used):
    """(deviance, mean, variance, largest) and covariance with the score (k + 1,)."""
    together = np.full(len(channels) + 1, np.nan)
    found = goodness(
        channels, scale, background, counts, used, deviance_moments(), *scratch(channels), together
    )
    return found, together


def slopes_of(channels, scale):
    return np.stack([*(scale * channels[1:]), channels[0], np.ones_like(channels[0])])


def moments_of_a_pixel(mean):
    """Mean and variance of a pixel's deviance, and its covariance with the counts."""
    reach = 14 * np.sqrt(mean) + 40
    n = np.arange(max(0, int(mean - reach)), int(mean + reach) + 1)
    probability = poisson.pmf(n, mean)
    deviance = 2 * (xlogy(n, n / mean) - (n - mean))
    first = probability @ deviance
    covariance = probability @ ((deviance - first) * (n - mean))
    return first, probability @ (deviance - first) ** 2, covariance


@pytest.mark.parametrize("masked", [0.0, 0.3])
@pytest.mark.parametrize("dark", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_the_formulas(seed, dark, masked):
    channels, counts, used = problem(seed, masked=masked)
    score, information, total = sums(channels, SCALE, BACKGROUND, counts, used, dark)
    mean = SCALE * channels[0] + BACKGROUND
    here = (used > 0) & (mean > dark)
    assert here.any() and here.all() == (masked == dark == 0)
    slopes, n, mean = slopes_of(channels, SCALE)[:, here], counts[here], mean[here]
    np.testing.assert_allclose(score, slopes @ (n / mean - 1), rtol=1e-10)
    np.testing.assert_allclose(information, (slopes / mean) @ slopes.T, rtol=1e-10, atol=1e-10)
    # each logarithm to 1e-7
    expected = 2 * np.sum(mean - n * np.log(mean))
    assert total == pytest.approx(expected, abs=2e-7 * counts.sum())


def test_a_masked_pixel_may_hold_anything():
    channels, counts, used = problem(0, masked=0.3)
    changed = np.where(used > 0, counts, 1e9)
    for function in (sums, quality):
        for one, other in zip(
            function(channels, SCALE, BACKGROUND, counts, used),
            function(channels, SCALE, BACKGROUND, changed, used),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


def test_nothing_is_infinite_where_nothing_is_expected():
    channels, counts, used = problem(1)
    score, information, total = sums(channels, SCALE, 0.0, counts, used)
    found, together = quality(channels, SCALE, 0.0, counts, used)
    for value in (score, information, total, found, together):
        assert np.isfinite(value).all()


def test_a_pattern_below_zero_is_dark():
    """A sharp stop's rim may have -3e-6 of the peak; it outweighed all other pixels by 1e20."""
    channels, counts, used = problem(2)
    below = channels.copy()
    below[0, 1, 5:] = -1e-5  # × 7: more than the background makes up for
    found = [sums(each, SCALE, 1e-5, counts, used) for each in (channels, below)]
    sigma = np.sqrt(np.diagonal(found[0][1]))
    (score, information, total), (*others, their_total) = found
    assert their_total == total
    np.testing.assert_allclose(others[0] / sigma, score / sigma, atol=1e-3)
    shared = np.outer(sigma, sigma)
    np.testing.assert_allclose(others[1] / shared, information / shared, atol=5e-3)
    known = [quality(each, SCALE, 1e-5, counts, used)[0] for each in (channels, below)]
    np.testing.assert_array_equal(*known)


def test_score_is_the_slope_of_the_log_likelihood():
    plan = continuous_plan(Geometry.published())
    at = np.array([3.137, 2.271, 0.0031, plan.thickness, SCALE, BACKGROUND])
    channels = np.empty((5, 64, 64))

    def expected(values):
        out = np.empty((1, 64, 64))
        pattern_channels(plan, *values[:4], out)
        return values[4] * out[0] + values[5]

    counts = np.random.default_rng(0).poisson(expected(at)).astype(float)
    pattern_channels(plan, *at[:4], channels)
    score, information, _ = sums(channels, SCALE, BACKGROUND, counts, np.ones((64, 64)))
    for k, step in enumerate((1e-5, 1e-5, 1e-7, 1e-3, 1e-4, 1e-5)):
        move = np.eye(6)[k] * step
        low, high = expected(at - move), expected(at + move)
        slope = np.sum(counts * np.log(high / low) - (high - low)) / (2 * step)
        # in units of its standard deviation, which is the root of the information
        assert score[k] == pytest.approx(slope, abs=1e-4 * np.sqrt(information[k, k]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-37, 1e38), min_size=1, max_size=40))
def test_logarithm_of_any_float_of_the_range(values):
    values = np.array(values)
    out = np.empty(len(values))
    _logarithms(values, np.empty((2, len(values)), np.int32), out)
    # the input is rounded to float32, 6e-8
    np.testing.assert_allclose(out, np.log(values), rtol=0, atol=1e-7)


def test_logarithm_is_exact_to_1e_7_between_any_two_powers_of_two():
    values = np.concatenate([np.linspace(1, 2, 10001) * p for p in (2.0**-99, 0.5, 1, 2.0**60)])
    out = np.empty(len(values))
    _logarithms(values, np.empty((2, len(values)), np.int32), out)
    np.testing.assert_allclose(out, np.log(values), rtol=0, atol=1e-7)


@pytest.mark.parametrize("masked", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_deviance_is_that_of_the_formula(seed, masked):
    channels, counts, used = problem(seed, masked=masked)
    (deviance, _, _, largest), _ = quality(channels, SCALE, BACKGROUND, counts, used)
    mean = SCALE * channels[0] + BACKGROUND
    pixels = used * 2 * (xlogy(counts, counts / mean) - counts + mean)
    assert deviance == pytest.approx(pixels.sum(), abs=4e-7 * counts.sum())
    assert largest == pytest.approx(pixels.max(), abs=4e-7 * counts.sum())


def test_moments_of_the_deviance_are_sums_over_the_poisson_law():
    """One pixel at a time, at expectations between the nodes of the table."""
    channels, one = np.ones((1, 1, 1)), np.ones((1, 1))
    rng = np.random.default_rng(0)
    for mean in np.r_[10 ** rng.uniform(-6, 5, 250), 2.0 ** np.arange(-19, 16, 2) * (1 + 1 / 16)]:
        found, together = quality(channels, mean, 0.0, one, one)
        first, variance, covariance = moments_of_a_pixel(mean)
        assert found[1] == pytest.approx(first, rel=1.5e-3), mean
        assert found[2] == pytest.approx(variance, rel=3e-3), mean
        # of deviance and score by the scale: cov(D, n) / μ
        assert together[0] == pytest.approx(covariance / mean, rel=2e-3, abs=1e-3), mean


def test_moments_below_the_table_are_bounded_by_its_first_ones():
    """A dark pixel adds nothing that counts: 4096 of them less than 0.2 to the mean."""
    channels, one = np.ones((1, 1, 1)), np.ones((1, 1))
    for mean in (1e-7, 3e-7, 9e-7):
        found, together = quality(channels, mean, 0.0, np.zeros((1, 1)), one)
        first, variance, covariance = moments_of_a_pixel(mean)
        assert abs(found[1] - first) < 0.2 / 4096
        assert abs(found[2] - variance) < 4 / 4096
        assert together[0] == pytest.approx(covariance / mean, rel=0.5)


@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_moments_of_a_pattern_are_the_sums_of_its_pixels(masked):
    channels, counts, used = problem(4, masked=masked)
    (_, mean, variance, _), together = quality(channels, SCALE, BACKGROUND, counts, used)
    expected = SCALE * channels[0] + BACKGROUND
    pixels = [moments_of_a_pixel(m) for m in expected.ravel()]
    first, second, covariance = (
        used * np.reshape(m, used.shape) for m in zip(*pixels, strict=True)
    )
    assert mean == pytest.approx(first.sum(), rel=2e-3)
    assert variance == pytest.approx(second.sum(), rel=2e-3)
    shares = slopes_of(channels, SCALE) * covariance / expected
    size = np.abs(shares).sum(axis=(1, 2))
    np.testing.assert_allclose(together / size, shares.sum(axis=(1, 2)) / size, atol=3e-3)


@pytest.mark.parametrize("scale", [0.2, 7.0, 100.0])
def test_normalised_deviance_of_patterns_is_0_plus_or_minus_1(scale):
    plan = continuous_plan(Geometry.published())
    channels, used = np.empty((1, 64, 64)), np.ones((64, 64))
    pattern_channels(plan, 3.1, -2.2, 0.003, plan.thickness, channels)
    rng, n = np.random.default_rng(5), 1000
    normalised = np.empty(n)
    for i in range(n):
        counts = rng.poisson(scale * channels[0] + BACKGROUND).astype(float)
        (deviance, mean, variance, _), _ = quality(channels, scale, BACKGROUND, counts, used)
        normalised[i] = (deviance - mean) / np.sqrt(variance)
    # four sampling errors: 1/√n of the mean, 1/√2n of the standard deviation
    assert abs(normalised.mean()) < 4 / np.sqrt(n)
    assert abs(normalised.std() - 1) < 4 / np.sqrt(2 * n)
