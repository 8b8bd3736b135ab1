"""Values that do not lie in one HDF5 dataset: TIFF, NumPy, and what registered handlers read."""

from __future__ import annotations

import json
import os
import stat
from collections import OrderedDict
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.documents.resources import StoredRows
from nanobeam_bluesky.geometry import ROI, GeometryError

__all__ = ["HandlerReader", "NeverError", "NotYetError", "check_regular", "open_npy", "read_tiff"]

MAX_HANDLERS = 4
"""Handlers that are kept open."""


class NotYetError(Exception):
    """The file or the rows are not there yet."""


class NeverError(Exception):
    """What is there is not what is needed."""


def check_regular(path: str) -> None:
    """Raise `NotYetError` where no file is, `NeverError` where it is none of its own."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise NotYetError(f"{path}: {error.strerror or error}") from error
    if stat.S_ISLNK(mode):
        raise NeverError("not a regular file but a symbolic link: name what it points to")
    if not stat.S_ISREG(mode):
        raise NeverError("not a regular file")


def read_tiff(path: str, page: int) -> NDArray[Any]:
    """Read one page (rows, columns) of a TIFF file.

    Raises
    ------
    NotYetError
        If the file or the page is not there, or not complete.
    """
    import tifffile

    check_regular(path)
    try:
        with tifffile.TiffFile(path) as file:
            image: NDArray[Any] = file.pages[page].asarray()
    except Exception as error:  # a file that is still written breaks it in many ways
        raise NotYetError(f"{path}, page {page}: {error}") from error
    return image


def open_npy(path: str) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Map a NumPy file: those frames (n, rows, columns) that are there; and the shape of all.

    Raises
    ------
    NotYetError
        If the file is not there, or its header is not complete.
    NeverError
        If it has no frames.
    """
    from numpy.lib import format as npy

    check_regular(path)
    with open(path, "rb") as file:
        try:
            version = npy.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise NeverError(f"expected numbers, found version {version} of the format")
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except ValueError as error:
            if os.fstat(file.fileno()).st_size < 128:
                raise NotYetError(f"{path}: {error}") from error
            raise NeverError(f"not a NumPy array: {error}") from error
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.kind not in "uifb":  # objects would have to be unpickled
        raise NeverError(f"expected numbers, found {dtype}")
    if len(shape) not in (3, 4) or not all(shape):
        raise NeverError(f"expected frames (n, rows, columns), found shape {shape}")
    if fortran:
        raise NeverError("its order is Fortran's: save np.ascontiguousarray(…) of it")
    count = int(np.prod(shape[:-2]))
    there = min(count, (size - offset) // (dtype.itemsize * shape[-2] * shape[-1]))
    if not there:
        raise NotYetError(f"{path}: it has no frames yet")
    # a file that is cut off while it is mapped ends the process: map what is there, read at once
    return np.memmap(path, dtype, "r", offset, (there, *shape[-2:])), shape


class HandlerReader:
    """Reads legacy datums through the entry points of the group ``databroker.handlers``.

    A handler reads a whole datum; what was cut from the last one is kept, for the next points
    of a datum that holds a row or the scan.
    """

    def __init__(self) -> None:
        self._handlers: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._last: tuple[Any, NDArray[Any]] | None = None

    def read(self, stored: StoredRows, roi: ROI | None) -> NDArray[Any]:
        """Read a datum: frames (n, rows, columns) cut to `roi`, or numbers (n,) without one."""
        key = (stored.path, stored.handler, roi)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        spec, resource_kwargs, datum_kwargs = json.loads(stored.handler)
        handler = self._handler(spec, stored.path, resource_kwargs)
        try:
            datum = handler(**datum_kwargs)
            if roi is None:
                values = np.asarray(datum).ravel()
            else:  # a lazy array is read where it is cut
                if not 2 <= datum.ndim <= 4:
                    raise NeverError(f"expected frames, {spec} gave shape {datum.shape}")
                roi.check_inside(datum.shape[-2:])
                rows, cols = roi.slices
                values = np.asarray(datum.reshape(-1, *datum.shape[-2:])[:, rows, cols])
            if values.dtype.kind not in "uifb":
                raise NeverError(f"expected numbers, {spec} gave {values.dtype}")
        except (GeometryError, NeverError):
            raise
        except Exception as error:
            self.close()  # some cannot go on after a failure
            raise NotYetError(f"{spec} {stored.path}: {type(error).__name__}: {error}") from error
        self._last = (key, values)
        return values

    def close(self) -> None:
        """Close every handler."""
        self._last = None
        while self._handlers:
            self._close_oldest()

    def _handler(self, spec: str, path: str, kwargs: dict[str, Any]) -> Any:
        key = (spec, json.dumps([path, kwargs]))
        if key in self._handlers:
            self._handlers.move_to_end(key)
            return self._handlers[key]
        found = list(entry_points(group="databroker.handlers", name=spec))
        if not found:
            raise NeverError(
                f"no handler for {spec}: install the package that has it among its entry points "
                "'databroker.handlers'"
            )
        if os.path.lexists(path) and not os.path.isdir(path):
            check_regular(path)
        try:
            handler = found[0].load()(path, **kwargs)
        except Exception as error:
            raise NotYetError(f"{spec} {path}: {type(error).__name__}: {error}") from error
        self._handlers[key] = handler
        if len(self._handlers) > MAX_HANDLERS:
            self._close_oldest()
        return handler

    def _close_oldest(self) -> None:
        _, handler = self._handlers.popitem(last=False)
        try:
            handler.close()
        except Exception:  # many have no close, or one that fails
            return
