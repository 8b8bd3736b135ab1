"""Regions of frames straight from the chunks of an HDF5 file, without the HDF5 library.

The library gives whole chunks, one at a time in one thread. Here only the rows of the region
are read, or decompressed: bitshuffle packs blocks of 8 kB that stand for themselves. All of it
runs without the interpreter lock.

Formats: https://github.com/kiyo-masui/bitshuffle (filter 32008, with LZ4),
https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md
"""

from __future__ import annotations

import os
import zlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import ROI
from nanobeam_bluesky.physics._numba import kernel

__all__ = ["ChunkLayout", "chunk_layout", "decompressed", "read_region"]

Bytes = NDArray[np.uint8]

_GZIP, _SHUFFLE, _BITSHUFFLE = 1, 2, 32008
_LZ4 = 2  # the bitshuffle filter's number for it
_HEADER = 12  # bytes before the first block: size of the chunk and of a block
_LARGEST_BLOCK = 2**24


class ChunkLayout:
    """How a dataset of frames (n, rows, columns) keeps them: one frame, one chunk.

    Attributes
    ----------
    dtype
        Of the pixels.
    shape
        Rows and columns of a frame.
    filters
        Numbers of the filters in the order of writing: none, gzip with or without shuffle, or
        bitshuffle with LZ4.
    """

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, int], filters: list[int]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.filters = filters
        self._offsets: dict[int, int] = {}
        self._length = 0

    def offsets(self, dataset: Any, first: int, n: int) -> list[int] | None:
        """Where uncompressed frames lie in the file, bytes; None where that is not worth finding.

        The library tells of one chunk only by passing all: so that is done when a tenth of
        them is new.
        """
        if first + n > self._length and len(dataset) >= 1.1 * self._length:
            self._offsets.clear()
            dataset.id.chunk_iter(self._found)
            self._length = len(dataset)
        found = [self._offsets.get(i, -1) for i in range(first, first + n)]
        return None if min(found) < 0 else found

    def _found(self, chunk: Any) -> None:
        self._offsets[chunk.chunk_offset[0]] = chunk.byte_offset


def chunk_layout(dataset: Any) -> ChunkLayout | None:
    """Return the layout of an h5py dataset, None where only the HDF5 library can read it."""
    dtype = dataset.dtype
    simple = dtype.kind in "uif" and dtype.isnative and dtype.itemsize in (1, 2, 4, 8)
    if dataset.ndim != 3 or not simple or dataset.chunks != (1, *dataset.shape[1:]):
        return None
    creation = dataset.id.get_create_plist()
    filters = [creation.get_filter(i) for i in range(creation.get_nfilters())]
    numbers = [f[0] for f in filters]
    if numbers == [_BITSHUFFLE]:
        values = filters[0][2]
        if len(values) < 5 or values[4] != _LZ4:
            return None
    elif numbers not in ([], [_GZIP], [_SHUFFLE, _GZIP]):
        return None
    return ChunkLayout(dtype, dataset.shape[1:], numbers)


def read_region(
    dataset: Any,
    layout: ChunkLayout,
    descriptor: int,
    first: int,
    n: int,
    roi: ROI,
    unlocked: AbstractContextManager[object] | None = None,
) -> NDArray[Any] | None:
    """Read a region of consecutive frames.

    Parameters
    ----------
    dataset
        Of the frames, refreshed.
    layout
        Its layout.
    descriptor
        Of the same file.
    first, n
        Frames.
    roi
        The region, inside the frames.
    unlocked
        Entered while nothing but memory is needed, to decompress.

    Returns
    -------
    ndarray
        (n, roi.height, roi.width); None where the library is quicker, or a frame was never
        written.

    Raises
    ------
    OSError
        If a chunk is not there, lies beyond the end of the file, or is not what its filter makes.
    """
    if not layout.filters:
        offsets = layout.offsets(dataset, first, n)
        if offsets is None:
            return None
        out = np.empty((n, roi.height, roi.width), layout.dtype)
        columns, size = layout.shape[1], layout.dtype.itemsize
        for i, offset in enumerate(offsets):
            raw = _read(descriptor, offset + roi.row * columns * size, roi.height * columns * size)
            band = raw.view(layout.dtype).reshape(roi.height, columns)
            out[i] = band[:, roi.col : roi.col + roi.width]
        return out
    try:
        chunks = [dataset.id.read_direct_chunk((first + i, 0, 0)) for i in range(n)]
    except (RuntimeError, MemoryError) as error:  # of h5py, where there is none
        raise OSError(f"frames {first} to {first + n - 1}: {error}") from error
    with unlocked or nullcontext():
        return decompressed(chunks, layout, roi)


def decompressed(chunks: list[tuple[int, bytes]], layout: ChunkLayout, roi: ROI) -> NDArray[Any]:
    """Return regions (n, height, width) of chunks, each with the mask of its filters.

    Raises
    ------
    OSError
        If a chunk is not what its filter makes.
    """
    rows, columns = layout.shape
    size = layout.dtype.itemsize
    out = np.zeros((len(chunks), roi.height, roi.width), layout.dtype)
    scratch = np.empty(0, np.uint8)
    for (mask, content), region in zip(chunks, out, strict=True):
        # a filter that did not help is left out, chunk by chunk
        filters = [f for k, f in enumerate(layout.filters) if not mask >> k & 1]
        raw = np.frombuffer(content, np.uint8)
        if filters == [_BITSHUFFLE]:
            block = int.from_bytes(content[8:_HEADER], "big")
            if len(scratch) != block + 8 and 0 < block <= _LARGEST_BLOCK:
                scratch = np.empty(block + 8, np.uint8)
            target = region.view(np.uint8).reshape(roi.height, roi.width, size)
            place = (rows * columns, size, columns, roi.row, roi.col)
            if not _unpack(raw, *place, scratch, target):
                raise OSError("a chunk is no bitshuffle of LZ4 blocks")
            continue
        if _GZIP in filters:
            try:
                raw = np.frombuffer(zlib.decompress(content), np.uint8)
            except zlib.error as error:
                raise OSError(f"a chunk is no gzip: {error}") from error
        if len(raw) != rows * columns * size:
            raise OSError(f"a chunk has {len(raw)} bytes, expected {rows * columns * size}")
        if _SHUFFLE in filters:
            raw = np.ascontiguousarray(raw.reshape(size, -1).T).reshape(-1)
        region[:] = raw.view(layout.dtype).reshape(rows, columns)[roi.slices]
    return out


def _read(descriptor: int, offset: int, size: int) -> Bytes:
    raw = os.pread(descriptor, size, offset)
    if len(raw) < size:
        raise OSError("cut off: the file is truncated")
    return np.frombuffer(raw, np.uint8)


@kernel
def _unpack(
    raw: Bytes,
    elements: int,
    size: int,
    columns: int,
    row: int,
    column: int,
    block: Bytes,
    out: NDArray[np.uint8],
) -> bool:
    """Decompress the blocks that hold pixels of a region, and put these in their places.

    `out` is (height, width, size), `block` memory for one and eight bytes more. False if what
    is there is no such chunk.
    """
    height, width = out.shape[:2]
    per_block = (len(block) - 8) // size
    if len(raw) < _HEADER or per_block <= 0 or per_block % 8 or (len(block) - 8) % size:
        return False
    at = np.int64(_HEADER)
    first = 0
    eights = np.empty((size, width // 8 + 2), np.uint64)
    top = row * columns + column
    bottom = (row + height - 1) * columns + column + width
    while first < bottom:
        count = min(per_block, (elements - first) // 8 * 8)
        if count == 0:  # fewer than eight at the end: as they are
            for i in range(first, elements):
                r, c = i // columns - row, i % columns - column
                if 0 <= r < height and 0 <= c < width:
                    start = at + (i - first) * size
                    if start + size > len(raw):
                        return False
                    for k in range(size):
                        out[r, c, k] = raw[start + k]
            return True
        if at + 4 > len(raw):
            return False
        packed = (
            (np.int64(raw[at]) << 24)
            | (np.int64(raw[at + 1]) << 16)
            | (np.int64(raw[at + 2]) << 8)
            | np.int64(raw[at + 3])
        )
        at += 4
        if at + packed > len(raw):
            return False
        if first + count > top:
            if not _lz4(raw[at : at + packed], block, count * size):
                return False
            planes = block[: count * size].reshape(size, 8, count // 8)
            begin = max(row, first // columns)
            end = min(row + height, (first + count - 1) // columns + 1)
            for r in range(begin, end):
                low = max(first, r * columns + column) - first
                high = min(first + count, r * columns + column + width) - first
                if low < high:
                    begins = first + low - r * columns - column
                    line = out[r - row, begins : begins + high - low]
                    _unshuffle(planes, low, high, eights, line)
        at += packed
        first += count
    return True


@kernel
def _unshuffle(planes: Bytes, low: int, high: int, eights: NDArray[np.uint64], line: Bytes) -> None:
    """Undo the bit shuffle of the elements low ≤ i < high of a block.

    `planes` is (size, 8, count / 8): of each byte of the elements each bit, eight elements in a
    byte. `eights`, (size, …), is memory for as many; `line` is (high − low, size).
    """
    first, groups = low // 8, (high + 7) // 8 - low // 8
    begin, n = low - 8 * first, high - low
    for k in range(len(planes)):
        bits, words = planes[k][:, first : first + groups], eights[k]
        b0, b1, b2, b3 = bits[0], bits[1], bits[2], bits[3]
        b4, b5, b6, b7 = bits[4], bits[5], bits[6], bits[7]
        for group in range(groups):
            # eight bytes, of which the bits m belong to element m: an 8×8 transposition
            x = np.uint64(b0[group]) | np.uint64(b1[group]) << np.uint64(8)
            x |= np.uint64(b2[group]) << np.uint64(16) | np.uint64(b3[group]) << np.uint64(24)
            x |= np.uint64(b4[group]) << np.uint64(32) | np.uint64(b5[group]) << np.uint64(40)
            x |= np.uint64(b6[group]) << np.uint64(48) | np.uint64(b7[group]) << np.uint64(56)
            t = (x ^ (x >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
            x = x ^ t ^ (t << np.uint64(7))
            t = (x ^ (x >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
            x = x ^ t ^ (t << np.uint64(14))
            t = (x ^ (x >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
            words[group] = x ^ t ^ (t << np.uint64(28))
        done = words.view(np.uint8)[begin : begin + n]
        for i in range(n):
            line[i, k] = done[i]


@intrinsic
def _load8(typing: Any, address: Any) -> Any:
    """Eight bytes at an address as one number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        here = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load(here, align=1)

    return types.uint64(types.intp), generate


@intrinsic
def _store8(typing: Any, address: Any, value: Any) -> Any:
    """Put what `_load8` has given at another address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store(arguments[1], there, align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.uint64), generate


@kernel
def _lz4(source: Bytes, target: Bytes, m: int) -> bool:
    """Decompress one LZ4 block that makes exactly m bytes; False if it does not.

    `target` has eight bytes more, of which nothing is said afterwards.
    """
    i, j, n = np.int64(0), np.int64(0), len(source)
    here, there = source.ctypes.data, target.ctypes.data
    while i < n:
        token = source[i]
        i += 1
        length = np.int64(token >> 4)
        if length == 15:
            while True:
                if i >= n:
                    return False
                more = np.int64(source[i])
                i += 1
                length += more
                if more != 255:
                    break
        if i + length > n or j + length > m:
            return False
        if i + length + 8 <= n:
            for k in range(0, length, 8):  # what is written beyond is written again
                _store8(there + j + k, _load8(here + i + k))
        else:
            for k in range(length):
                target[j + k] = source[i + k]
        i += length
        j += length
        if i == n:
            break  # the last sequence has literals only
        if i + 2 > n:
            return False
        offset = np.int64(source[i]) | (np.int64(source[i + 1]) << 8)
        i += 2
        length = np.int64(token & 15)
        if length == 15:
            while True:
                if i >= n:
                    return False
                more = np.int64(source[i])
                i += 1
                length += more
                if more != 255:
                    break
        length += 4
        if offset == 0 or offset > j or j + length > m:
            return False
        if offset >= 8:
            for k in range(0, length, 8):
                _store8(there + j + k, _load8(there + j - offset + k))
        elif length > 16:
            # a short pattern again and again: as often as it goes into eight bytes, then these
            for k in range(8):
                target[j + k] = target[j - offset + k]
            eight = _load8(there + j)
            for k in range(0, length, 8 - 8 % offset):
                _store8(there + j + k, eight)
        else:
            for k in range(length):
                target[j + k] = target[j - offset + k]
        j += length
    return bool(j == m)
