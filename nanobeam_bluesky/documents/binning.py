"""Binning of frames in one compiled pass: no temporary copies, no interpreter lock."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.physics._numba import kernel

__all__ = ["bin_frames"]


def bin_frames(
    frames: NDArray[Any], geometry: Geometry
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Mask, bin and turn frames that are already cut to the ROI.

    A masked pixel takes the mean of the good pixels of its bin; a bin without any is 0.

    Parameters
    ----------
    frames
        (n, rows, columns), raw counts of the ROI.
    geometry
        Its binning, orientation, mask and saturation value apply.

    Returns
    -------
    patterns
        (n, ny, nx), counts.
    saturated
        (n,), whether a good pixel reached the saturation value; without one, the largest
        number of an integer type.
    """
    b = geometry.binning
    n, height, width = frames.shape
    limit = geometry.saturation_value
    if limit is None:  # what a counter that has run full shows
        limit = np.iinfo(frames.dtype).max if frames.dtype.kind in "ui" else np.inf
    good = _good_pixels(geometry)
    binned = np.empty((n, height // b, width // b), np.float32)
    saturated = np.empty(n, np.bool_)
    if frames.dtype.kind == "b":
        frames = frames.view(np.uint8)
    elif not frames.dtype.isnative:
        frames = frames.astype(frames.dtype.newbyteorder("="))
    if good is not None:
        frames = np.where(good, frames, frames.dtype.type(0))
    _bin(np.ascontiguousarray(frames), b, float(limit), binned, saturated)
    if good is not None:
        valid = good.reshape(height // b, b, width // b, b).sum(axis=(1, 3))
        binned *= np.divide(b * b, valid, out=np.zeros(valid.shape, np.float32), where=valid > 0)
    return np.ascontiguousarray(geometry.orient(binned)), saturated


@lru_cache(maxsize=4)
def _good_pixels(geometry: Geometry) -> NDArray[np.bool_] | None:
    """Good pixels of the ROI (rows, columns); None where all are."""
    good = geometry.good_pixels
    return None if good.all() else good


@kernel
def _bin(
    frames: NDArray[Any],
    b: int,
    limit: float,
    binned: NDArray[np.float32],
    saturated: NDArray[np.bool_],
) -> None:
    height, width = frames.shape[1:]
    line = np.empty(width, np.float32)
    for i in range(len(frames)):
        largest = frames[i, 0, 0]
        for r in range(height // b):
            line[:] = 0
            for k in range(b):
                row = frames[i, r * b + k]
                for c in range(width):
                    line[c] += row[c]
                    largest = max(largest, row[c])
            out = binned[i, r]
            for c in range(width // b):
                total = line[b * c]
                for k in range(1, b):
                    total += line[b * c + k]
                out[c] = total
        saturated[i] = largest >= limit
