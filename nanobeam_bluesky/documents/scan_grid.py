"""The scan grid: point number ↔ row, column and nominal position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.presets import ScanMetadata

__all__ = ["ScanGrid"]


@dataclass(frozen=True)
class ScanGrid:
    """Points of a raster scan, in scan order, on (row, column)."""

    scan: ScanMetadata

    @property
    def num_points(self) -> int:
        """Number of points of the whole grid."""
        return self.scan.shape[0] * self.scan.shape[1]

    def row_col(self, points: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and column, 0-based and unsnaked, of 1-based point numbers (n,).

        Points beyond the grid get -1, -1.
        """
        columns = self.scan.shape[1]
        row, col = np.divmod(np.asarray(points, dtype=np.int64) - 1, columns)
        if self.scan.snaking:
            col = np.where(row % 2 == 1, columns - 1 - col, col)
        outside = (row < 0) | (row >= self.scan.shape[0])
        return np.where(outside, -1, row), np.where(outside, -1, col)

    def axes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Nominal positions of rows (slow motor) and columns (fast motor).

        Indices 0, 1, … where the start document gives no extents.
        """
        limits = self.scan.extents or tuple((0.0, n - 1.0) for n in self.scan.shape)
        slow, fast = (
            np.linspace(a, b, n) for (a, b), n in zip(limits, self.scan.shape, strict=True)
        )
        return slow, fast

    def nominal(self, points: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Nominal (slow, fast) positions of points (n,); NaN beyond the grid."""
        row, col = self.row_col(points)
        slow, fast = self.axes()
        return np.where(row < 0, np.nan, slow[row]), np.where(col < 0, np.nan, fast[col])
