"""NanobeamNN on a CPU: the published network's arithmetic in one compiled pass.

Patterns of 64×64 pixels and at most 64 channels are too small for a general convolution, which
spends its time on preparing them. Here 32 patterns lie side by side in memory, (channel,
row, column, pattern), so that a whole row of outputs is one long sum of nine shifted rows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.physics._numba import kernel

__all__ = ["apply_network"]

Array = NDArray[np.float32]

LANES = 32  # patterns side by side: a multiple of what a CPU adds at once


def apply_network(
    counts: Array,
    weights: tuple[Array, ...],
    biases: tuple[Array, ...],
    dense: tuple[Array, Array],
    threads: int,
) -> Array:
    """Apply 3×3 convolutions with ReLU, every second one pooled 2×2, and one linear layer.

    Parameters
    ----------
    counts
        Patterns (n, ny, nx).
    weights, biases
        Of an even number of convolutions, (outputs, inputs, 3, 3) and (outputs,).
    dense
        Weights (k, features) and biases (k,) of the linear layer.
    threads
        To spread the patterns over.

    Returns
    -------
    ndarray
        (n, k). A pattern's result does not depend on what came with it.
    """
    n, ny, nx = counts.shape
    out = np.empty((n, len(dense[1])), np.float32)
    size = max(1, -(-n // (threads * LANES))) * LANES
    parts = [slice(first, first + size) for first in range(0, n, size)]
    channels = max(len(weight) for weight in weights[:2])  # none has more numbers than these
    # made here: what a thread allocates is given back with it, and new pages cost it half its time
    memory = np.empty((len(parts), 2, channels * ny * nx * LANES), np.float32)

    def run(i: int) -> None:
        _apply(counts[parts[i]], weights, biases, *dense, memory[i], out[parts[i]])

    if len(parts) < 2:
        list(map(run, range(len(parts))))
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(run, range(len(parts))))
    return out


@kernel
def _apply(
    counts: Array,
    weights: tuple[Array, ...],
    biases: tuple[Array, ...],
    dense: Array,
    offset: Array,
    memory: Array,
    out: Array,
) -> None:
    ny, nx = counts.shape[1:]
    here, there = memory[0], memory[1]
    for first in range(0, len(counts), LANES):
        size = min(LANES, len(counts) - first)
        x = here[: ny * nx * LANES].reshape(1, ny, nx * LANES)
        x[:] = 0
        for i in range(size):
            for row in range(ny):
                for column in range(nx):
                    x[0, row, column * LANES + i] = counts[first + i, row, column]
        for layer in range(0, len(weights), 2):
            x = _convolved(x, weights[layer], biases[layer], there)
            x = _convolved(x, weights[layer + 1], biases[layer + 1], here)
            x = _pooled(x, there)
            here, there = there, here
        features = x.reshape(-1, LANES)
        for k in range(len(dense)):
            total = np.full(LANES, offset[k])
            for j in range(len(features)):
                for i in range(LANES):
                    total[i] += dense[k, j] * features[j, i]
            out[first : first + size, k] = total[:size]


@kernel
def _convolved(x: Array, weight: Array, bias: Array, memory: Array) -> Array:
    """ReLU of a 3×3 convolution of x (channels, ny, nx · LANES)."""
    ny, n = x.shape[1] - 2, x.shape[2] - 2 * LANES
    zero = np.float32(0)
    out = memory[: len(weight) * ny * n].reshape(len(weight), ny, n)
    for row in range(ny):
        for channel in range(len(weight)):
            y = out[channel, row]
            y[:] = bias[channel]
            for source in range(len(x)):
                w = weight[channel, source]
                w00, w01, w02 = w[0, 0], w[0, 1], w[0, 2]
                w10, w11, w12 = w[1, 0], w[1, 1], w[1, 2]
                w20, w21, w22 = w[2, 0], w[2, 1], w[2, 2]
                a, b, c = x[source, row], x[source, row + 1], x[source, row + 2]
                # with shifts known at compile time this is one fused product after the other
                for i in range(n):
                    total = y[i] + w00 * a[i] + w01 * a[i + LANES] + w02 * a[i + 2 * LANES]
                    total += w10 * b[i] + w11 * b[i + LANES] + w12 * b[i + 2 * LANES]
                    y[i] = total + w20 * c[i] + w21 * c[i + LANES] + w22 * c[i + 2 * LANES]
            for i in range(n):
                y[i] = zero if y[i] < zero else y[i]
    return out


@kernel
def _pooled(x: Array, memory: Array) -> Array:
    """Largest of every 2×2 pixels of x (channels, ny, nx · LANES)."""
    ny, nx = x.shape[1] // 2, x.shape[2] // (2 * LANES)
    out = memory[: len(x) * ny * nx * LANES].reshape(len(x), ny, nx * LANES)
    for channel in range(len(x)):
        for row in range(ny):
            a, b, y = x[channel, 2 * row], x[channel, 2 * row + 1], out[channel, row]
            for column in range(nx):
                for i in range(column * LANES, (column + 1) * LANES):
                    j = i + column * LANES
                    y[i] = max(max(a[j], a[j + LANES]), max(b[j], b[j + LANES]))
    return out
