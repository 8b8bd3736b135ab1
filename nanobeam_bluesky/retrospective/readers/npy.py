"""NumPy stacks (n, rows, columns), or (rows of the scan, columns, rows, columns)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from nanobeam_bluesky.documents.formats import NeverError, NotYetError, open_npy
from nanobeam_bluesky.documents.resources import NPY
from nanobeam_bluesky.retrospective.readers import Frames, Options, PlainScan

__all__ = ["read_npy"]


def read_npy(path: Path, options: Options) -> Iterable[PlainScan] | None:
    """Read the header of a ``.npy`` file."""
    if path.suffix.lower() != ".npy":
        return None
    try:
        stack, shape = open_npy(str(path))
    except (NeverError, NotYetError) as error:
        raise ValueError(str(error)) from None
    count = math.prod(shape[:-2])
    if len(stack) < count:
        raise ValueError(f"cut off: {len(stack)} patterns of the {count} that its header says")
    frames = Frames(str(path), NPY, {}, count, (shape[-2], shape[-1]), stack.dtype)
    return [PlainScan(path.stem, (frames,), (shape[0], shape[1]) if len(shape) == 4 else None)]
