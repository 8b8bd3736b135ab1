"""A pattern as the network for every geometry sees it: on a grid of cells around a middle.

The cells are as wide as the pupil has it, whatever the pixels. On a CPU one compiled pass makes
all the network takes of a pattern; `_plain` says the same in PyTorch, for other devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanobeam_bluesky.physics._numba import summing_kernel

__all__ = ["PATCHES", "View", "view"]

PATCHES = 10
"""Of a view, along each axis; they overlap by half."""

_BRIGHTEST = 40.0  # of the mean: no hot pixel counts for more

Array = NDArray[np.float32]


class View(NamedTuple):
    """What the network takes of b patterns of each of g geometries."""

    patches: Tensor  # (g, b, PATCHES², cells of a patch), √(counts / mean + 1) − 1.2
    profiles: Tensor  # (g, b, 4 n), means over rows and columns of cells, and their roots
    counts: Tensor  # (g, b), mean per pixel of the cells


def view(
    patterns: Tensor,
    columns: Tensor,
    rows: Tensor,
    middle_x: Tensor,
    middle_y: Tensor,
    half_x: Tensor,
    half_y: Tensor,
    extent: float,
    lit: Tensor,
) -> View:
    """Look at patterns around a middle. Nothing is differentiable.

    Parameters
    ----------
    patterns
        Counts (g, b, ny, nx).
    columns, rows
        Borders of the pixels in the pupil, (g, nx + 1) and (g, ny + 1), pixels.
    middle_x, middle_y
        Of the grid, (g, b), pixels.
    half_x, half_y
        Half-widths of the pupil, (g,), pixels.
    extent
        How far the grid goes from its middle, half-widths.
    lit
        The part of every cell that profiles are taken over, (g, n, n), along x and y; n cells
        along each axis, a multiple of `PATCHES` + 1.
    """
    arguments = (patterns, columns, rows, middle_x, middle_y, half_x, half_y, extent, lit)
    with torch.no_grad():
        if patterns.device.type != "cpu":
            return _plain(*arguments)
        return _compiled(*arguments)


def _plain(
    patterns: Tensor,
    columns: Tensor,
    rows: Tensor,
    middle_x: Tensor,
    middle_y: Tensor,
    half_x: Tensor,
    half_y: Tensor,
    extent: float,
    lit: Tensor,
) -> View:
    cells = lit.shape[-1]
    across = _overlaps(columns, middle_x, half_x, extent, cells)
    along = _overlaps(rows, middle_y, half_y, extent, cells)
    grid = across @ patterns.mT @ along.mT  # (g, b, x, y)
    mean = grid.mean((-1, -2))
    relative = (grid / mean.clamp_min(1e-12)[..., None, None]).clamp_max(_BRIGHTEST)
    seen = relative * lit[:, None]
    # sums of counts tell strain best, and in the pupil alone: linear, and stabilised
    profiles = torch.cat([seen.mean(-2), seen.mean(-1)], -1)
    profiles = torch.cat([profiles - 1, torch.sqrt(profiles + 0.05) - 1], -1)
    stable = torch.sqrt(relative + 1) - 1.2
    stride = cells // (PATCHES + 1)
    patches = stable.unfold(2, 2 * stride, stride).unfold(3, 2 * stride, stride)
    return View(patches.flatten(4).flatten(2, 3), profiles, mean)


def _overlaps(borders: Tensor, middle: Tensor, half: Tensor, extent: float, cells: int) -> Tensor:
    """How much of every pixel lies in every cell, per cell width: (g, b, cells, pixels)."""
    edges = torch.linspace(-extent, extent, cells + 1, device=borders.device)
    edges = middle[..., None] + edges * half[:, None, None]
    widths = borders.diff(dim=-1)[:, None, None]
    parts = ((edges[..., None] - borders[:, None, None, :-1]) / widths).clamp_(0, 1)
    step = (2 * extent / cells) * half[:, None, None, None]
    return parts.diff(dim=-2) * (widths / step)


def _compiled(
    patterns: Tensor,
    columns: Tensor,
    rows: Tensor,
    middle_x: Tensor,
    middle_y: Tensor,
    half_x: Tensor,
    half_y: Tensor,
    extent: float,
    lit: Tensor,
) -> View:
    g, b = patterns.shape[:2]
    n, cells = g * b, lit.shape[-1]
    patches = np.empty((n, PATCHES**2, (2 * cells // (PATCHES + 1)) ** 2), np.float32)
    profiles = np.empty((n, 4 * cells), np.float32)
    counts = np.empty(n, np.float32)
    given = [
        t.detach().contiguous().float().numpy()
        for t in (patterns.flatten(0, 1), columns, rows, middle_x.flatten(), middle_y.flatten())
    ]
    given += [t.contiguous().float().numpy() for t in (half_x, half_y, lit)]
    _kernel(cells // (PATCHES + 1))(patches, profiles, counts, extent, b, *given)
    return View(
        torch.from_numpy(patches).unflatten(0, (g, b)),
        torch.from_numpy(profiles).unflatten(0, (g, b)),
        torch.from_numpy(counts).unflatten(0, (g, b)),
    )


@cache
def _kernel(stride: int) -> Callable[..., None]:
    """Compile for patches of 2 × `stride` cells: a constant, so that its loops are unrolled."""

    @summing_kernel
    def _look(
        patches: Array,
        profiles: Array,
        counts: Array,
        extent: float,
        b: int,
        patterns: Array,
        columns: Array,
        rows: Array,
        middle_x: Array,
        middle_y: Array,
        half_x: Array,
        half_y: Array,
        lit: Array,
    ) -> None:
        ny, nx = patterns.shape[1:]
        n = lit.shape[-1]
        averaged = np.empty((nx, n), np.float32)  # rows of pixels to rows of cells
        grid = np.empty((n, n), np.float32)
        line = np.empty(nx, np.float32)
        cells = np.empty(n, np.float32)
        one = np.float32(1)
        for i in range(len(patterns)):
            k = i // b
            pattern, lit_i = patterns[i], lit[k]
            borders = rows[k]
            low_x = middle_x[i] - np.float32(extent) * half_x[k]
            step_x = np.float32(2 * extent / n) * half_x[k]
            low_y = middle_y[i] - np.float32(extent) * half_y[k]
            step_y = np.float32(2 * extent / n) * half_y[k]
            first = 0
            while first < nx and columns[k, first + 1] <= low_x:
                first += 1
            last = nx
            while last > first and columns[k, last - 1] >= low_x + n * step_x:
                last -= 1
            at = 0
            for j in range(n):
                low = low_y + np.float32(j) * step_y
                high = low + step_y
                line[:] = 0
                while at < ny and borders[at + 1] <= low:
                    at += 1
                row = at
                while row < ny and borders[row] < high:
                    part = (min(high, borders[row + 1]) - max(low, borders[row])) / step_y
                    pixels = pattern[row, first:last]
                    for c in range(len(pixels)):  # from 0, to be vectorised
                        line[c] += part * pixels[c]
                    row += 1
                for c in range(last - first):
                    averaged[c, j] = line[c]
            borders = columns[k]
            at = first
            total = np.float32(0)
            for j in range(n):
                low = low_x + np.float32(j) * step_x
                high = low + step_x
                cells[:] = 0
                while at < nx and borders[at + 1] <= low:
                    at += 1
                column = at
                while column < last and borders[column] < high:
                    part = (min(high, borders[column + 1]) - max(low, borders[column])) / step_x
                    source = averaged[column - first]
                    for c in range(n):
                        cells[c] += part * source[c]
                    column += 1
                for c in range(n):
                    grid[j, c] = cells[c]
                    total += cells[c]
            counts[i] = total / np.float32(n * n)
            scale = one / max(counts[i], np.float32(1e-12))
            cells[:] = 0
            for j in range(n):
                seen = np.float32(0)
                for c in range(n):
                    relative = min(grid[j, c] * scale, np.float32(_BRIGHTEST))
                    in_pupil = relative * lit_i[j, c]
                    seen += in_pupil
                    cells[c] += in_pupil
                    grid[j, c] = math.sqrt(relative + one) - np.float32(1.2)
                profiles[i, n + j] = seen / np.float32(n)
            for c in range(n):
                profiles[i, c] = cells[c] / np.float32(n)
            for c in range(2 * n):
                value = profiles[i, c]
                profiles[i, c] = value - one
                profiles[i, 2 * n + c] = math.sqrt(value + np.float32(0.05)) - one
            for px in range(PATCHES):
                for x in range(2 * stride):
                    source = grid[px * stride + x]
                    for py in range(PATCHES):
                        there = patches[i, px * PATCHES + py, 2 * stride * x : 2 * stride * (x + 1)]
                        here = source[py * stride : (py + 2) * stride]
                        for y in range(2 * stride):
                            there[y] = here[y]

    return _look
