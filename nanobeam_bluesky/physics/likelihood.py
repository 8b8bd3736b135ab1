"""Poisson likelihood of a pattern: score, information, deviance and its moments."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy

from nanobeam_bluesky.physics._numba import summing_kernel

Floats = NDArray[np.floating[Any]]

# the table of the deviance's moments: 8 nodes an octave, from 2⁻²⁰ to 2¹² counts
_LOWEST, _OCTAVES, _PER_OCTAVE = -20, 32, 8
_SHIFT = 20  # bits of a float32 below the octave and its eighth
_OFFSET = (127 + _LOWEST) * _PER_OCTAVE
_LEAST = 2.0**_LOWEST

_TINY = 1e-30  # least expectation, counts
_LOG_2, _ROOT_2 = math.log(2), math.sqrt(2)


@summing_kernel
def _logarithms(values: Floats, bits: NDArray[np.int32], out: Floats) -> None:
    """Fill out (n,) with the natural logarithms of positive values (n,), to 1e-7.

    All of a row at once, which the library's logarithm is not; bits (2, n) is overwritten.
    """
    exponent, mantissa = bits[0], bits[1]
    single, fraction = exponent.view(np.float32), mantissa.view(np.float32)
    for y in range(values.size):
        single[y] = values[y]
    for y in range(values.size):
        mantissa[y] = (exponent[y] & np.int32(0x7FFFFF)) | np.int32(0x3F800000)
        exponent[y] = (exponent[y] >> 23) - 127
    for y in range(values.size):
        value = float(fraction[y])  # in [1, 2): √2 times something near 1
        s = (value - _ROOT_2) / (value + _ROOT_2)
        q = s * s
        series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q / 11))))
        out[y] = (exponent[y] + 0.5) * _LOG_2 + 2 * s * series


@summing_kernel
def poisson_sums(
    channels: Floats,
    scale: float,
    background: float,
    counts: Floats,
    used: Floats,
    dark: float,
    work: Floats,
    bits: NDArray[np.int32],
    information: Floats,
    score: Floats,
) -> float:
    """Add up score and Fisher information of one pattern; return its −2 log likelihood.

    Parameters
    ----------
    channels
        (k, nx, ny), the pattern and its derivatives by k - 1 parameters.
    scale, background
        The expected counts are scale · pattern + background.
    counts, used
        (nx, ny); used is 1, or 0 for pixels to leave out.
    dark
        Pixels that expect no more than this are left out.
    work, bits
        (2k + 3, ny) and (2, ny), overwritten.
    information, score
        (k + 1, k + 1) and (k + 1,), filled; the last two parameters are scale and
        background.

    Returns
    -------
    float
        2 Σ (μ − n log μ).
    """
    k, nx, ny = channels.shape
    information[:] = 0
    score[:] = 0
    total = 0.0
    slopes, weighted, rest = work[: k + 1], work[k + 1 : 2 * k + 2], work[2 * k + 2]
    slopes[k] = 1
    for x in range(nx):
        n, light, mean = counts[x], used[x], weighted[k]
        pattern = channels[0, x]
        for y in range(ny):
            mean[y] = max(max(scale * pattern[y], 0.0) + background, _TINY)
        _logarithms(mean, bits, rest)
        for y in range(ny):
            expected = mean[y]
            weight = light[y] / expected if expected > dark else 0.0
            total += weight * expected * (expected - n[y] * rest[y])
            rest[y] = (n[y] - expected) * weight
            mean[y] = weight
        for a in range(k - 1):
            slope, by_weight, channel = slopes[a], weighted[a], channels[a + 1, x]
            for y in range(ny):
                slope[y] = scale * channel[y]
                by_weight[y] = slope[y] * mean[y]
        slope, by_weight = slopes[k - 1], weighted[k - 1]
        for y in range(ny):
            slope[y] = pattern[y]
            by_weight[y] = pattern[y] * mean[y]
        for a in range(k + 1):
            left = slopes[a]
            together = 0.0
            for y in range(ny):
                together += left[y] * rest[y]
            score[a] += together
            for b in range(a, k + 1):
                right = weighted[b]
                together = 0.0
                for y in range(ny):
                    together += left[y] * right[y]
                information[a, b] += together
    for a in range(k + 1):
        for b in range(a):
            information[a, b] = information[b, a]
    return 2 * total


@lru_cache(maxsize=1)
def deviance_moments() -> NDArray[np.float64]:
    """Of a pixel's deviance the mean, the variance and the covariance with the counts.

    Returns
    -------
    ndarray
        (nodes, 6): each at a node of the expectation, followed by the way to the next node.
    """
    octave, part = np.divmod(np.arange(_OCTAVES * _PER_OCTAVE + 1), _PER_OCTAVE)
    nodes = 2.0 ** (octave + _LOWEST) * (1 + part / _PER_OCTAVE)
    moments = np.empty((len(nodes), 3))
    for i, mean in enumerate(nodes):
        reach = 12 * math.sqrt(mean)
        n = np.arange(max(0, math.floor(mean - reach)), math.ceil(mean + reach) + 30)
        probability = np.exp(n * math.log(mean) - mean - gammaln(n + 1))
        deviance = 2 * (xlogy(n, n / mean) - n + mean)
        first = probability @ deviance
        centred = probability * (deviance - first)
        moments[i] = first, centred @ deviance, centred @ n
    out = np.empty((len(nodes), 6))
    out[:, ::2] = moments
    out[:-1, 1::2] = np.diff(moments, axis=0)
    out[-1, 1::2] = 0
    return out


@summing_kernel
def goodness(
    channels: Floats,
    scale: float,
    background: float,
    counts: Floats,
    used: Floats,
    moments: Floats,
    work: Floats,
    bits: NDArray[np.int32],
    together: Floats,
) -> tuple[float, float, float, float]:
    """How well a fit describes the counts of a pattern.

    Parameters
    ----------
    channels, scale, background, counts, used, work, bits
        As for `poisson_sums`.
    moments
        `deviance_moments`.
    together
        (k + 1,), filled with the covariance of deviance and score.

    Returns
    -------
    deviance
        2 Σ (n log n/μ − n + μ).
    mean, variance
        Of the deviance, at the expected counts.
    largest
        The largest deviance of a pixel.
    """
    k, nx, ny = channels.shape
    together[:] = 0
    deviance = mean = variance = largest = 0.0
    expected, shared, logarithm = work[0], work[1], work[2]
    for x in range(nx):
        n, light, pattern = counts[x], used[x], channels[0, x]
        for y in range(ny):
            expected[y] = max(max(scale * pattern[y], 0.0) + background, _TINY)
            shared[y] = max(n[y], _TINY) / expected[y]
        _logarithms(shared, bits, logarithm)
        farthest = 0.0
        for y in range(ny):
            pixel = light[y] * (n[y] * (logarithm[y] - 1) + expected[y])
            deviance += pixel
            farthest = max(farthest, pixel)
        largest = max(largest, farthest)
        first, second = _moments(expected, light, moments, bits[0], shared)
        mean += first
        variance += second
        for a in range(k - 1):
            slope, total = channels[a + 1, x], 0.0
            for y in range(ny):
                total += slope[y] * shared[y]
            together[a] += scale * total
        for y in range(ny):
            together[k - 1] += pattern[y] * shared[y]
            together[k] += shared[y]
    return 2 * deviance, mean, variance, 2 * largest


@summing_kernel
def _moments(
    expected: Floats, light: Floats, moments: Floats, bits: NDArray[np.int32], shared: Floats
) -> tuple[float, float]:
    """Mean and variance of a row's deviance; shared: its covariance with counts / expected."""
    single = bits.view(np.float32)
    mean = variance = 0.0
    for y in range(expected.size):
        single[y] = expected[y]
    for y in range(expected.size):
        # the leading bits of a float32 are a piecewise linear logarithm
        node = min(max((bits[y] >> _SHIFT) - _OFFSET, 0), moments.shape[0] - 2)
        row, part = moments[node], (bits[y] & ((1 << _SHIFT) - 1)) / (1 << _SHIFT)
        mean += light[y] * (row[0] + part * row[1])
        variance += light[y] * (row[2] + part * row[3])
        shared[y] = light[y] * (row[4] + part * row[5])
    for y in range(expected.size):
        shared[y] /= max(expected[y], _LEAST)
    return mean, variance
