"""Frames in files that no document tells of: which they are, and how they are numbered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import h5py

__all__ = ["KEY", "TIFF_SUFFIXES", "frame_datasets", "natural", "numbered"]

KEY = "frames"
"""Data key of the frames."""
TIFF_SUFFIXES = (".tif", ".tiff")
MAX_DEPTH = 12
_NUMBERED = re.compile(r"(.*?)(\d+)(\.\w+)$", re.DOTALL)


def numbered(path: str) -> tuple[str, str, str] | None:
    """Split "/data/img_0012.tif" into "/data/img_", "0012", ".tif"; None without a number."""
    found = _NUMBERED.match(path)
    return None if found is None else (found[1], found[2], found[3])


def natural(path: str) -> list[Any]:
    """Sort img_2 before img_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def frame_datasets(
    group: h5py.Group, dimensions: tuple[int, ...] = (3,), *, links: bool = False
) -> list[str]:
    """Return the names of the datasets of frames (n, rows, columns) in a group, and below.

    Parameters
    ----------
    dimensions
        How many they may have; 4 with (rows of the scan, columns, rows, columns).
    links
        Whether soft and external links are followed. What is there by several names is
        returned once.
    """
    seen: set[Any] = set()

    def walk(here: h5py.Group, path: str, depth: int) -> Iterator[str]:
        hard = {k: isinstance(here.get(k, getlink=True), h5py.HardLink) for k in here}
        for key in sorted(hard, key=lambda k: not hard[k]):  # what is there by its own name first
            if not (links or hard[key]):
                continue
            try:
                item = here[key]
            except (KeyError, OSError):  # a link to nowhere
                continue
            info = h5py.h5o.get_info(item.id)
            if (info.fileno, info.addr) in seen:
                continue
            seen.add((info.fileno, info.addr))
            name = f"{path}/{key}"
            if isinstance(item, h5py.Group) and depth < MAX_DEPTH:
                yield from walk(item, name, depth + 1)
            elif is_frames(item, dimensions):
                yield name

    return list(walk(group, group.name.rstrip("/"), 0))


def is_frames(item: Any, dimensions: tuple[int, ...] = (3,)) -> bool:
    """Whether something in an HDF5 file is a dataset of frames."""
    return (
        isinstance(item, h5py.Dataset)
        and item.ndim in dimensions
        and item.dtype.kind in "uif"
        and all(n > 1 for n in item.shape[-2:])
    )
