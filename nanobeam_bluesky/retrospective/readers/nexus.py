"""NeXus: the default signal, or the data of the only NXdetector; and what it says of the geometry.

Source: the NeXus manual, NXdata, NXdetector, NXbeam and NXmonochromator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nanobeam_bluesky.geometry import GeometryError
from nanobeam_bluesky.presets.sources import Found, in_units
from nanobeam_bluesky.retrospective.readers import Motor, Options, PlainScan
from nanobeam_bluesky.retrospective.readers.hdf5 import (
    frames_at,
    numbers_of,
    opened,
    stored_frames,
    text,
    times,
    titles,
)

__all__ = ["read_nexus"]

DETECTOR = {
    "detector_distance_m": "distance",
    "pixel_size_um": "x_pixel_size",
    "detector_two_theta_deg": "polar_angle",
}
BEAM = {"energy_keV": ("incident_energy", "energy")}
BEAM |= {"wavelength_angstrom": ("incident_wavelength", "wavelength")}


def read_nexus(path: Path, options: Options) -> Iterable[PlainScan] | None:
    """Read the default signal of a NeXus file, or what its NXdetector recorded."""
    with opened(path) as file:
        entry = None if file is None else _default(file, "NXentry")
        if file is None or entry is None:
            return None
        detectors = list(_groups(entry, "NXdetector"))
        data = _default(entry, "NXdata")
        names = [options.dataset] if options.dataset else _signal(data)
        names = names or [f"{d.name}/data" for d in detectors if frames_at(d, "data")]
        if not names:
            return None
        frames, shape = stored_frames(file, names)
        detector = _detector(detectors, file[names[0]])
        geometry, notes = _geometry(entry, detector)
        motors = _motors(data, shape) if data is not None and not options.dataset else None
        title = text(entry.get("title"))
        return [
            PlainScan(
                path.stem,
                frames,
                shape,
                motors=motors,
                geometry=geometry,
                metadata=times(entry) | titles(title),
                notes=tuple(notes),
            )
        ]


def _is_class(item: Any, name: str) -> bool:
    return isinstance(item, h5py.Group) and text(item.attrs.get("NX_class")) == name


def _children(group: h5py.Group) -> Iterator[Any]:
    for key in group:
        try:
            yield group[key]
        except (KeyError, OSError):  # a link to nowhere
            continue


def _default(group: h5py.Group, kind: str) -> h5py.Group | None:
    """Return the default group of a class, or the only one."""
    name = text(group.attrs.get("default"))
    if name and _is_class(group.get(name), kind):
        return group[name]
    found = [item for item in _children(group) if _is_class(item, kind)]
    return found[0] if len(found) == 1 else None


def _groups(group: h5py.Group, kind: str, depth: int = 3) -> Iterator[h5py.Group]:
    for item in _children(group):
        if _is_class(item, kind):
            yield item
        elif depth and isinstance(item, h5py.Group):
            yield from _groups(item, kind, depth - 1)


def _signal(data: h5py.Group | None) -> list[str]:
    if data is None:
        return []
    named = text(data.attrs.get("signal"))
    keys = [named] if named else [k for k in data if frames_at(data, k)]
    return [
        f"{data.name}/{k}"
        for k in keys
        if frames_at(data, k) and (named or "signal" in data[k].attrs)
    ]


def _detector(detectors: list[h5py.Group], frames: h5py.Dataset) -> h5py.Group | None:
    """Return the detector that recorded the frames."""
    for detector in detectors:
        if any(isinstance(item, h5py.Dataset) and item == frames for item in _children(detector)):
            return detector
    return detectors[0] if len(detectors) == 1 else None


def _geometry(entry: h5py.Group, detector: h5py.Group | None) -> tuple[dict[str, Any], list[str]]:
    """Return items of the `nanobeam` block, and what could not be used."""
    found: dict[str, Any] = {}
    notes: list[str] = []

    def take(field: str, item: Any) -> None:
        values = numbers_of(item)
        if not values.size or field in found:
            return
        units = text(item.attrs.get("units"))
        if not units:
            notes.append(f"{item.name} has no units, and was not used")
            return
        try:
            found[field] = in_units(field, Found(float(values[0]), units, item.name))
        except GeometryError as error:
            notes.append(str(error))

    for group in (*_groups(entry, "NXbeam"), *_groups(entry, "NXmonochromator")):
        for field, names in BEAM.items():
            for name in names:
                take(field, group.get(name))
    if "energy_keV" in found:  # one of them is enough
        found.pop("wavelength_angstrom", None)
    if detector is None:
        return found, notes
    for field, name in DETECTOR.items():
        take(field, detector.get(name))
    mask = detector.get("pixel_mask")
    if isinstance(mask, h5py.Dataset) and mask.ndim >= 2:
        bad = np.asarray(mask[(0,) * (mask.ndim - 2)])
        found["pixel_mask"] = np.argwhere(bad).tolist()
    saturated = numbers_of(detector.get("saturation_value"))
    if saturated.size:
        found["saturation_value"] = float(saturated[0])
    return found, notes


def _motors(data: h5py.Group, shape: tuple[int, int] | None) -> tuple[Motor, Motor] | None:
    """Return the first two axes of a signal (rows, columns, …)."""
    axes = data.attrs.get("axes")
    names = [text(name) for name in np.atleast_1d(axes)] if axes is not None else []
    if shape is None or len(names) < 2 or names[0] == names[1]:
        return None
    items = [data.get(name) for name in names[:2]]
    values = [numbers_of(item) for item in items]
    if tuple(len(v) for v in values) != shape:
        return None
    grids = np.meshgrid(*values, indexing="ij")
    slow, fast = (
        Motor(name, grid.ravel(), text(item.attrs.get("units")))
        for name, grid, item in zip(names, grids, items, strict=False)
    )
    return slow, fast
