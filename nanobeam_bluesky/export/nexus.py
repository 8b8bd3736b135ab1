"""NeXus files of maps and of scans."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nanobeam_bluesky.export.files import run_title
from nanobeam_bluesky.models import Flag

__all__ = ["Frames", "write_nexus"]

_PROGRAM = "nanobeam-bluesky"
_SUFFIXES = {
    "_keV": "keV",
    "_angstrom": "angstrom",
    "_m": "m",
    "_um": "um",
    "_nm": "nm",
    "_mm": "mm",
    "_mrad": "mrad",
    "_deg": "deg",
    "_px": "pixel",
}
"""What names of a geometry's fields end in → unit."""


_LONGEST = 60
"""Letters of a name, and of a unit: attributes have no room for much."""


@dataclass(frozen=True)
class Frames:
    """Detector frames of a scan, to be written row by row."""

    shape: tuple[int, int, int, int]
    """(rows, columns, height, width)."""
    dtype: np.dtype[Any]
    rows: Iterable[NDArray[Any]]
    """Frames (columns, height, width) of each row of the scan."""


def write_nexus(
    target: Path | str | BinaryIO,
    data: xr.Dataset,
    start: Mapping[str, Any],
    stop: Mapping[str, Any] | None = None,
    *,
    geometry: Mapping[str, Any] | None = None,
    frames: Frames | None = None,
) -> None:
    """Write maps, or what a scan measured, as a NeXus file.

    Each variable is an NXdata of its own with the motors as axes; the first is what a viewer
    shows. A map's σ is its errors, too. The geometry is in NXinstrument, and where the maps come
    from in NXprocess.

    Parameters
    ----------
    target
        Path, or a file opened for reading and writing.
    data
        Of `to_maps`, or any images with coordinates along their dimensions; of its attributes
        ``note`` is written.
    start, stop
        Documents of the run, derived or raw.
    geometry
        As ``Geometry.model_dump(mode="json")`` gives it; that of the start document of a
        derived run if absent.
    frames
        Detector frames, compressed as they are written.
    """
    block = _mapping(start.get("nanobeam"))
    geometry = geometry if geometry is not None else _mapping(block.get("geometry"))
    derived = "original_run_uid" in start
    with h5py.File(target, "w") as file:
        file.attrs.update({"NX_class": "NXroot", "default": "entry", "creator": _PROGRAM})
        entry = _group(file, "entry", "NXentry")
        _put(entry, "title", run_title(start))
        _put(entry, "entry_identifier_uuid", start.get("uid"))
        _put(entry, "experiment_identifier", start.get("proposal"))
        if data.attrs.get("note"):
            _put(_group(entry, "note", "NXnote"), "data", data.attrs["note"])
        if not derived:
            _put(entry, "start_time", _iso(start.get("time")))
            _put(entry, "end_time", _iso(_mapping(stop).get("time")))
        _sample(_group(entry, "sample", "NXsample"), start.get("sample"), geometry)
        detector = _instrument(_group(entry, "instrument", "NXinstrument"), geometry)
        names = _names([*map(str, data.data_vars), *map(str, data.coords)])
        coordinates = _group(entry, "positions", "NXcollection")
        for name, values in data.coords.items():
            if values.ndim == 1:
                _array(coordinates, names[str(name)], values)
        for name, values in data.data_vars.items():
            group = _group(entry, names[str(name)], "NXdata")
            _array(group, names[str(name)], values)
            _axes(group, names[str(name)], values, names, coordinates)
        for name in data.data_vars:
            sigma = names.get(f"{name}_sigma", "")
            if sigma in entry:
                entry[names[str(name)]][f"{names[str(name)]}_errors"] = entry[sigma][sigma]
        if frames is not None:
            _frames(entry, detector, frames, data, names)
        if derived:
            _process(entry, start, block, geometry)
        notes = _group(entry, "bluesky", "NXcollection")
        for key, document in (("start", start), ("stop", stop)):
            if document:
                _json(notes, key, document)
        shown = (name for name in data.data_vars if not str(name).endswith("_measured"))
        first = next((names[str(name)] for name in shown), "frames")
        if first in entry:
            entry.attrs["default"] = first


# ----------------------------------------------------------------------------- what is in it


def _sample(group: h5py.Group, sample: Any, geometry: Mapping[str, Any]) -> None:
    name = sample.get("name") if isinstance(sample, Mapping) else sample
    _put(group, "name", None if name is None else str(name))
    if isinstance(sample, Mapping):
        _json(group, "metadata", sample)
    _put(group, "thickness", geometry.get("thickness_nm"), "nm")


def _instrument(group: h5py.Group, geometry: Mapping[str, Any]) -> h5py.Group:
    beam = _group(group, "beam", "NXbeam")
    _put(beam, "incident_energy", geometry.get("energy_keV"), "keV")
    _put(beam, "incident_wavelength", geometry.get("wavelength_angstrom"), "angstrom")
    optics = _mapping(geometry.get("optics"))
    if optics.get("kind") == "zone_plate":
        plate = _group(group, "zone_plate", "NXfresnel_zone_plate")
        _put(plate, "outer_diameter", optics.get("diameter_um"), "um")
        _put(plate, "outermost_zone_width", optics.get("outermost_zone_width_nm"), "nm")
        _put(plate, "central_stop_diameter", optics.get("central_stop_diameter_um"), "um")
        _put(plate, "focus_parameters", optics.get("focal_length_mm"), "mm")
    detector = _group(group, "detector", "NXdetector")
    _put(detector, "distance", geometry.get("detector_distance_m"), "m")
    for axis in "xy":
        _put(detector, f"{axis}_pixel_size", geometry.get("pixel_size_um"), "um")
    _put(detector, "polar_angle", geometry.get("detector_two_theta_deg"), "deg")
    _put(detector, "saturation_value", geometry.get("saturation_value"))
    return detector


def _process(
    entry: h5py.Group,
    start: Mapping[str, Any],
    block: Mapping[str, Any],
    geometry: Mapping[str, Any],
) -> None:
    process = _group(entry, "process", "NXprocess")
    _put(process, "program", _PROGRAM)
    _put(process, "version", block.get("version"))
    _put(process, "date", _iso(start.get("time")))
    for key in ("analysis_id", "fingerprint"):
        _put(process, key, block.get(key))
    _put(process, "raw_run_uid", start.get("original_run_uid"))
    _put(process, "written_by", f"{_PROGRAM} {version(_PROGRAM)}")
    for key, values in (
        ("geometry", geometry),
        ("roi", _mapping(block.get("roi"))),
        ("analyzer", _mapping(block.get("analyzer"))),
    ):
        _parameters(process, key, values)


def _frames(
    entry: h5py.Group,
    detector: h5py.Group,
    frames: Frames,
    data: xr.Dataset,
    names: Mapping[str, str],
) -> None:
    name = "frames"
    group = _group(entry, name, "NXdata")
    stored = group.create_dataset(
        name,
        frames.shape,
        frames.dtype,
        chunks=(1, 1, *frames.shape[2:]),
        compression="gzip",
        compression_opts=1,
        shuffle=True,
    )
    for i, row in enumerate(frames.rows):
        stored[i] = row
    stored.attrs.update({"units": "counts", "interpretation": "image"})
    detector["data"] = stored
    axes = ["."] * 4
    for axis, dim in enumerate(("row", "col")):
        motor = next((str(c) for c, v in data.coords.items() if v.dims == (dim,)), None)
        if motor is not None and names[motor] != name:
            group[names[motor]] = entry["positions"][names[motor]]
            axes[axis] = names[motor]
    group.attrs["axes"] = axes
    group.attrs["signal"] = name


# --------------------------------------------------------------------------------- HDF5


def _group(parent: h5py.Group, name: str, kind: str) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["NX_class"] = kind
    return group


def _array(group: h5py.Group, name: str, values: xr.DataArray) -> None:
    stored = group.create_dataset(name, data=values.to_numpy())
    unit = _text(values.attrs.get("units", ""))[:_LONGEST]
    if unit:
        stored.attrs["units"] = unit
    if values.name == "flags":
        stored.attrs["flag_masks"] = [int(flag) for flag in Flag]
        stored.attrs["flag_meanings"] = " ".join(str(flag.name).lower() for flag in Flag)
    if values.ndim == 2:
        stored.attrs["interpretation"] = "image"


def _axes(
    group: h5py.Group,
    name: str,
    values: xr.DataArray,
    names: Mapping[str, str],
    coordinates: h5py.Group,
) -> None:
    """Name the signal, and link the coordinates along its dimensions."""
    axes = []
    for axis, dim in enumerate(values.dims):
        motor = next((names[str(c)] for c, v in values.coords.items() if v.dims == (dim,)), ".")
        axes.append(motor)
        if motor != ".":
            group[motor] = coordinates[motor]
            group.attrs[f"{motor}_indices"] = axis
    group.attrs.update({"signal": name, "axes": axes, "title": name})


def _parameters(parent: h5py.Group, name: str, values: Mapping[str, Any]) -> None:
    """Write settings one by one, so that a viewer shows them."""
    group = _group(parent, name, "NXparameters")
    keys = _names(map(str, values))
    for key, value in values.items():
        if isinstance(value, Mapping):
            _parameters(group, keys[str(key)], value)
        else:
            unit = next((u for end, u in _SUFFIXES.items() if str(key).endswith(end)), "")
            _put(group, keys[str(key)], value, unit)


def _put(group: h5py.Group, name: str, value: Any, unit: str = "") -> None:
    """Write a value; nothing for None, JSON where it is neither number nor text."""
    if value is None:
        return
    if isinstance(value, bool | str):
        group[name] = _text(value) if isinstance(value, str) else value
        return
    try:
        group[name] = np.asarray(value, dtype=np.float64 if _has_float(value) else np.int64)
    except (TypeError, ValueError, OverflowError):
        group[name] = _text(json.dumps(value, default=str))
        return
    if unit:
        group[name].attrs["units"] = unit


def _has_float(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_float, value))
    return isinstance(value, float)


def _json(parent: h5py.Group, name: str, value: Any) -> None:
    note = _group(parent, name, "NXnote")
    note["type"] = "application/json"
    note["data"] = _text(json.dumps(value, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _text(value: Any) -> str:
    """Return text that HDF5 can hold."""
    return str(value).replace("\0", " ").encode("utf-8", "replace").decode()


def _names(names: Iterable[str]) -> dict[str, str]:
    """Return names that NeXus allows, each its own."""
    taken = {"sample", "instrument", "positions", "process", "bluesky", "title", "frames", "note"}
    found: dict[str, str] = {}
    for name in names:
        allowed = re.sub(r"\W", "_", name, flags=re.ASCII)[:_LONGEST] or "_"
        while allowed in taken:
            allowed += "_"
        taken.add(allowed)
        found[name] = allowed
    return found


def _iso(seconds: Any) -> str | None:
    try:
        return datetime.fromtimestamp(float(seconds), UTC).isoformat(timespec="milliseconds")
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
