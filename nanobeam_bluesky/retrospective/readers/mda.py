"""MDA files: what EPICS' sscan record saves of a scan.

Source: epics-modules/sscan ``documentation/saveData_fileFormat.txt``: XDR, where every integer,
short or long, has four bytes, big-endian, and a text is counted twice.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["MDA", "Positioner", "read_mda"]

MAX_POINTS = 10_000_000
MAX_TEXT = 10_000
MAX_CHANNELS = 1000


@dataclass(frozen=True)
class Positioner:
    """Positions that were read back."""

    name: str
    """Process variable that was moved, e.g. "26idc:m1.VAL"."""
    unit: str
    values: NDArray[np.float64]
    """(rows, columns); NaN where the scan has not been."""


@dataclass(frozen=True)
class MDA:
    """A scan in one or two dimensions."""

    number: int
    shape: tuple[int, int]
    """Points that were asked for, (slow, fast); one row of a scan in one dimension."""
    points: int
    """Points that were measured."""
    time: float | None
    """When it began, s since 1970, by the clock where it was measured."""
    positioners: tuple[Positioner | None, Positioner | None]
    """First of (slow, fast)."""


@dataclass(frozen=True)
class _Scan:
    rank: int
    requested: int
    done: int
    lower: tuple[int, ...]
    time: str
    channels: tuple[tuple[str, str], ...]
    """Name and unit of each positioner."""
    positions: NDArray[np.float64]
    """(positioners, points)."""


def read_mda(path: Path) -> MDA:
    """Read the positions of a scan.

    Raises
    ------
    ValueError
        If the file is cut off or no MDA, or the scan has more than two dimensions.
    """
    data = path.read_bytes()
    try:
        return _read(data)
    except (struct.error, IndexError) as error:
        raise ValueError(f"cut off, or no MDA file: {error} ({len(data)} bytes)") from None


def _read(data: bytes) -> MDA:
    cursor = _Cursor(data, 0)
    version = cursor.single()
    if not 1.0 <= version < 2.0:
        raise ValueError(f"no MDA file of version 1: {version:g}")
    number, rank = cursor.one(), cursor.one()
    if rank not in (1, 2):
        raise ValueError(f"a scan in {rank} dimensions: expected one or two")
    dims = [cursor.one() for _ in range(rank)]
    cursor.skip(8)  # whether it is regular, where extra values are
    outer = _scan(cursor)
    if outer.rank != rank or outer.requested != dims[0]:
        raise ValueError(f"its parts do not agree: {dims} points, then {outer.requested}")
    if rank == 1:
        return MDA(
            number,
            (1, outer.requested),
            outer.done,
            _time(outer.time),
            (None, _positioner(outer, outer.positions[:1])),
        )
    rows, columns = dims
    fast = np.full((rows, columns), np.nan)
    done, first = 0, None
    for row, offset in enumerate(outer.lower):
        if not offset:
            break
        inner = _scan(_Cursor(data, offset))
        if inner.rank != 1 or inner.requested != columns:
            raise ValueError(f"row {row + 1} has {inner.requested} points, expected {columns}")
        first = first or inner
        if inner.channels:
            fast[row] = inner.positions[0]
        if row and done < row * columns:
            raise ValueError(
                f"row {row} ends after {done - (row - 1) * columns} of {columns} points"
            )
        done = row * columns + inner.done
    slow = np.full((rows, columns), np.nan)
    if outer.channels:
        slow[:] = outer.positions[0][:, None]
    for values in (slow, fast):
        values.ravel()[done:] = np.nan
    return MDA(
        number,
        (rows, columns),
        done,
        _time(outer.time),
        (_positioner(outer, slow), _positioner(first, fast) if first else None),
    )


def _positioner(scan: _Scan, values: NDArray[np.float64]) -> Positioner | None:
    if not scan.channels:
        return None
    return Positioner(*scan.channels[0], values)


def _scan(cursor: _Cursor) -> _Scan:
    rank, requested, done = cursor.one(), cursor.one(), cursor.one()
    if not 0 < rank < 5 or not 0 < requested <= MAX_POINTS or not 0 <= done <= requested:
        raise ValueError(f"no MDA file: a part in {rank} dimensions, {done} of {requested} points")
    lower = cursor.ints(requested) if rank > 1 else ()
    cursor.text()
    time = cursor.text()
    counts = [cursor.one() for _ in range(3)]
    if not all(0 <= n <= MAX_CHANNELS for n in counts):
        raise ValueError(f"no MDA file: {counts} positioners, detectors and triggers")
    channels = []
    for _ in range(counts[0]):
        cursor.skip(4)
        name, _, _, unit, _, _, readback_unit = (cursor.text() for _ in range(7))
        channels.append((name, readback_unit or unit))
    for _ in range(counts[1]):
        cursor.skip(4)
        for _ in range(3):
            cursor.text()
    for _ in range(counts[2]):
        cursor.skip(4)
        cursor.text()
        cursor.skip(4)
    positions = cursor.doubles(counts[0] * requested).reshape(counts[0], requested)
    return _Scan(rank, requested, done, lower, time, tuple(channels), positions)


class _Cursor:
    """Reads XDR, from an offset on."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    def skip(self, count: int) -> None:
        """Pass over bytes."""
        self._at += count

    def ints(self, count: int) -> tuple[int, ...]:
        """Read integers of any kind."""
        values: tuple[int, ...] = struct.unpack_from(f">{count}i", self._data, self._at)
        self._at += 4 * count
        return values

    def one(self) -> int:
        """Read one integer."""
        return self.ints(1)[0]

    def single(self) -> float:
        """Read a number of single precision."""
        (value,) = struct.unpack_from(">f", self._data, self._at)
        self._at += 4
        return float(value)

    def doubles(self, count: int) -> NDArray[np.float64]:
        """Read numbers of double precision."""
        if self._at + 8 * count > len(self._data):
            raise IndexError(f"{count} positions at byte {self._at}")
        values = np.frombuffer(self._data, ">f8", count, self._at).astype(float)
        self._at += 8 * count
        return values

    def text(self) -> str:
        """Read a counted text."""
        if not self.one():
            return ""
        count = self.one()
        if not 0 <= count <= MAX_TEXT or self._at + count > len(self._data):
            raise IndexError(f"a text of {count} characters at byte {self._at}")
        value = self._data[self._at : self._at + count]
        self._at += -(-count // 4) * 4
        return value.decode("utf-8", "replace")


def _time(text: str) -> float | None:
    """Turn "Nov 23, 2026 05:46:31.123456" into seconds."""
    try:
        return datetime.strptime(text.partition(".")[0], "%b %d, %Y %H:%M:%S").timestamp()
    except ValueError:
        return None
