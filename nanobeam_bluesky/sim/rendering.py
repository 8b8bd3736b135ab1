"""Detector frames of a sample: forward model, photon noise, detector faults."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.physics import forward
from nanobeam_bluesky.sim.samples import Phantom

__all__ = ["Renderer"]

FRAME_SHAPE = (512, 512)
"""(rows, columns) of the detector where the geometry does not say."""

BLOCK = 256
"""Patterns computed at a time: 4 MB of float32 at 64 × 64."""

CANVASES = 8
"""Whole frames, each with its own background outside the region of interest."""


class Renderer:
    """Renders patterns beforehand and pastes them into whole frames when they are flown.

    Only the region of interest is kept of every point (16 kB for 128 × 128 pixels of a
    byte), so that a large map fits into memory.

    Parameters
    ----------
    sample
        What is illuminated.
    geometry
        Where the pattern falls and how the detector is turned and binned.
    counts
        Expected photons in the pattern of a point without strain and tilt and with
        intensity 1.
    background
        Expected counts per binned pixel, everywhere on the detector.
    hot_pixels
        Counts of pixels that always read the same, by (row, column) of the frame.
    dead_rows
        Rows of the frame that read 0.
    seed
        Of the photon noise.

    Raises
    ------
    ValueError
        If counts or background are negative, or a faulty pixel lies off the detector.
    """

    def __init__(
        self,
        sample: Phantom,
        geometry: Geometry,
        *,
        counts: float,
        background: float,
        hot_pixels: Mapping[tuple[int, int], int],
        dead_rows: Sequence[int],
        seed: int,
    ) -> None:
        self.frame_shape = geometry.detector_shape or FRAME_SHAPE
        geometry.roi.check_inside(self.frame_shape)
        _check(counts, background, hot_pixels, dead_rows, self.frame_shape)
        self.scale = counts / float(forward(0.0, 0.0, 0.0, geometry).sum())
        self._sample = sample
        self._geometry = geometry
        self._background = background
        self._hot_pixels = dict(hot_pixels)
        self._dead_rows = list(dead_rows)
        self._seed = seed

        # a byte holds what Poisson noise makes of 128 (255 is 11 sigma away)
        rate = (self.scale + background) / geometry.binning**2
        brightest = max([2 * rate, *self._hot_pixels.values()])
        self._patterns = np.zeros(
            (*sample.shape, *geometry.roi_shape), np.uint8 if brightest < 256 else np.uint16
        )
        self._attempts = np.full(sample.shape, -1)
        self._lock = threading.Lock()
        self._canvases = (
            np.random.default_rng(seed)
            .poisson(background / geometry.binning**2, (CANVASES, *self.frame_shape))
            .astype(np.uint16)
        )
        self._add_faults(self._canvases, (0, 0))

    def render_missing(self) -> None:
        """Render every point of the sample that never was, at its first attempt."""
        row, col = np.nonzero(self._attempts < 0)
        self.render(row, col, np.zeros_like(row))

    def render(
        self, row: NDArray[np.intp], col: NDArray[np.intp], attempt: NDArray[np.intp]
    ) -> None:
        """Render points (n,) with the noise of their attempts, where that is not done yet."""
        with self._lock:
            todo = np.flatnonzero(self._attempts[row, col] != attempt)
            for start in range(0, len(todo), BLOCK):
                points = todo[start : start + BLOCK]
                expected = self._expected(row[points], col[points])
                for rates, r, c, a in zip(
                    expected, row[points], col[points], attempt[points], strict=True
                ):
                    rng = np.random.default_rng([self._seed, r, c, a])
                    self._detect(rates, self._patterns[r, c], rng)
                    self._attempts[r, c] = a

    def paste(self, row: int, col: int) -> NDArray[np.uint16]:
        """Return the frame of a point, valid until `paste` is called again."""
        frame: NDArray[np.uint16] = self._canvases[self._canvas(row, col)]
        frame[self._geometry.roi.slices] = self._patterns[row, col]
        return frame

    def frame(self, row: int, col: int) -> NDArray[np.uint16]:
        """Return a copy of the frame of a point, also while another thread pastes."""
        frame: NDArray[np.uint16] = self._canvases[self._canvas(row, col)].copy()
        frame[self._geometry.roi.slices] = self._patterns[row, col]
        return frame

    def _canvas(self, row: int, col: int) -> int:
        return (row * self._sample.shape[1] + col) % CANVASES

    def _expected(self, row: NDArray[np.intp], col: NDArray[np.intp]) -> NDArray[np.float32]:
        """Expected counts (n, …) per binned pixel, in the axes of the detector."""
        sample = self._sample
        patterns = forward(
            sample.strain[row, col], sample.omega[row, col], sample.chi[row, col], self._geometry
        )
        patterns *= (self.scale * sample.intensity[row, col]).astype(np.float32)[:, None, None]
        patterns += self._background
        return self._geometry.unorient(patterns)

    def _detect(
        self, rates: NDArray[np.float32], pattern: NDArray[np.integer], rng: np.random.Generator
    ) -> None:
        """Fill `pattern` with what the detector counts."""
        roi = self._geometry.roi
        photons = _photons(rates, self._geometry.binning, rng)
        pattern[:] = np.minimum(photons, np.iinfo(pattern.dtype).max)
        self._add_faults(pattern, (roi.row, roi.col))

    def _add_faults(self, images: NDArray[np.integer], origin: tuple[int, int]) -> None:
        """Overwrite hot and dead pixels of images (…, rows, columns) that start at `origin`."""
        height, width = images.shape[-2:]
        for (row, col), counts in self._hot_pixels.items():
            r, c = row - origin[0], col - origin[1]
            if 0 <= r < height and 0 <= c < width:
                images[..., r, c] = counts
        for row in self._dead_rows:
            if 0 <= row - origin[0] < height:
                images[..., row - origin[0], :] = 0


def _photons(
    rates: NDArray[np.float32], binning: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Poisson counts of unbinned pixels; each photon falls anywhere in its binned pixel.

    The same as Poisson counts of rate / binning² in every unbinned pixel, several times
    faster.
    """
    rows, cols = rates.shape
    pixel = np.repeat(np.arange(rates.size), rng.poisson(rates).ravel())
    inside = rng.integers(binning * binning, size=pixel.size)
    row = pixel // cols * binning + inside // binning
    col = pixel % cols * binning + inside % binning
    shape = rows * binning, cols * binning
    return np.bincount(row * shape[1] + col, minlength=shape[0] * shape[1]).reshape(shape)


def _check(
    counts: float,
    background: float,
    hot_pixels: Mapping[tuple[int, int], int],
    dead_rows: Sequence[int],
    frame_shape: tuple[int, int],
) -> None:
    if not (counts >= 0 and background >= 0):
        raise ValueError(f"counts = {counts}, background = {background}: must not be negative")
    on_detector = f"must lie on a detector of {frame_shape[0]} × {frame_shape[1]} pixels"
    for (row, col), value in hot_pixels.items():
        if not (0 <= row < frame_shape[0] and 0 <= col < frame_shape[1]):
            raise ValueError(f"hot pixel ({row}, {col}) {on_detector}")
        if not 0 <= value <= np.iinfo(np.uint16).max:
            raise ValueError(f"hot pixel ({row}, {col}) = {value}: must be 0 to 65535")
    for row in dead_rows:
        if not 0 <= row < frame_shape[0]:
            raise ValueError(f"dead row {row} {on_detector}")
