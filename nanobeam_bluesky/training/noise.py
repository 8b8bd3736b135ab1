"""Poisson noise, fast enough to be drawn afresh at every training step."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import uint64
from numpy.typing import NDArray
from scipy.stats import poisson as poisson_distribution

from nanobeam_bluesky.physics._numba import kernel

__all__ = ["poisson"]

_STEPS = 8  # tables per unit of the mean
_LARGEST = 32  # the last table's mean
_SLOTS = 128  # of a table: values above have a probability below 1e-30
_INCREMENT = 0x9E3779B97F4A7C15


def poisson(
    patterns: NDArray[np.float32],
    which: NDArray[np.int64],
    scale: NDArray[np.float32],
    background: NDArray[np.float32],
    seed: int,
) -> NDArray[np.float32]:
    """Draw counts with expectation ``scale · patterns[which] + background``.

    Parameters
    ----------
    patterns
        Expected patterns (m, ny, nx) in some unit.
    which
        Indices of the patterns to draw from, (n,).
    scale, background
        Counts per unit, and counts added to every pixel, each (n,).
    seed
        The same seed gives the same counts.

    Returns
    -------
    ndarray
        Counts (n, ny, nx). Takes 3 to 6 ns a pixel (numpy: 20 to 90) and does not hold the GIL.

    Notes
    -----
    The mean is split into multiples of 32, a multiple of 1/8 and a rest. The first two are
    drawn from tables by Walker's alias method, the rest by inversion: the sum of Poisson
    numbers is one. Probabilities have a resolution of 2⁻²⁴.
    """
    n = len(which)
    flat = patterns.reshape(len(patterns), -1)
    out = np.empty((n, flat.shape[1]), np.float32)
    _draw(flat, which, scale, background, seed, _tables(), out)
    return out.reshape(n, *patterns.shape[1:])


@lru_cache(maxsize=1)
def _tables() -> NDArray[np.uint32]:
    """Alias tables (mean, slot): 24 bits of threshold, 8 bits of alias."""
    values = np.arange(_SLOTS)
    tables = np.empty((_LARGEST * _STEPS + 1, _SLOTS), np.uint32)
    for row, table in enumerate(tables):
        share = poisson_distribution.pmf(values, row / _STEPS) * _SLOTS
        alias = values.copy()
        small, large = list(values[share < 1]), list(values[share >= 1])
        while small and large:
            poor, rich = small.pop(), large[-1]
            alias[poor] = rich
            share[rich] -= 1 - share[poor]
            if share[rich] < 1:
                small.append(large.pop())
        share[small + large] = 1  # what rounding left over
        threshold = np.minimum(np.round(share * 2**24), 2**24 - 1)
        table[:] = threshold.astype(np.uint32) << 8 | alias.astype(np.uint32)
    return tables


@kernel
def _mixed(z: np.uint64) -> np.uint64:
    """64 random bits from a counter: the output function of splitmix64."""
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return z ^ (z >> uint64(31))  # type: ignore[no-any-return]


@kernel
def _from_table(table: NDArray[np.uint32], bits: np.uint64) -> np.int64:
    """Draw one number with the lowest 32 bits."""
    slot = np.int64(bits & uint64(_SLOTS - 1))
    entry = table[slot]
    if np.int64((bits >> uint64(8)) & uint64(0xFFFFFF)) <= np.int64(entry >> 8):
        return slot
    return np.int64(entry & 255)


@kernel
def _draw(
    patterns: NDArray[np.float32],
    which: NDArray[np.int64],
    scale: NDArray[np.float32],
    background: NDArray[np.float32],
    seed: int,
    tables: NDArray[np.uint32],
    out: NDArray[np.float32],
) -> None:
    """Fill out (n, pixels); pattern i has its own stream of random bits."""
    one = np.float32(1)
    for i in range(out.shape[0]):
        state = _mixed(uint64(seed) + uint64(i + 1) * uint64(0xD1342543DE82EF95))
        for j in range(out.shape[1]):
            mean = patterns[which[i], j] * scale[i] + background[i]
            if not mean > 0:
                out[i, j] = 0
                continue
            count = np.int64(0)
            while mean >= np.float32(_LARGEST):
                state += uint64(_INCREMENT)
                count += _from_table(tables[_LARGEST * _STEPS], _mixed(state))
                mean -= np.float32(_LARGEST)
            state += uint64(_INCREMENT)
            bits = _mixed(state)
            row = np.int64(mean * np.float32(_STEPS))
            count += _from_table(tables[row], bits)
            rest = mean - np.float32(row) * np.float32(1 / _STEPS)
            u = np.float32(np.int64(bits >> uint64(40))) * np.float32(2**-24)
            # exp(-rest), rest < 1/8: the next term is 3e-7
            term = one - rest * (one - rest / 2 * (one - rest / 3 * (one - rest / 4)))
            below = term
            k = one
            while u >= below and k < 9:
                term *= rest / k
                below += term
                k += one
                count += 1
            out[i, j] = count
