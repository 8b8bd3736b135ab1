"""`ingest`: files of beamlines without Bluesky become runs that point to them where they lie."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from event_model import compose_run
from numpy.typing import NDArray

from nanobeam_bluesky.documents import Document
from nanobeam_bluesky.documents.plain_files import KEY
from nanobeam_bluesky.documents.resources import Resource
from nanobeam_bluesky.geometry import Geometry, GeometryError
from nanobeam_bluesky.models import Estimates
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.retrospective.readers import Motor, Options, PlainScan, find_scans

__all__ = ["Ingested", "documents_of", "ingest"]

_NAMESPACE = uuid.UUID("a0b8e8f4-5f0e-4d59-9d39-5f2f1d8b7c21")
_ALTERNATIVES = {
    "energy_keV": {"energy_keV", "wavelength_angstrom"},
    "wavelength_angstrom": {"energy_keV", "wavelength_angstrom"},
}
_TAKEN = {*Estimates.UNITS, "row", "col", "time", "seq_num", KEY}
"""Keys of the raw and of the derived run that no motor can have."""


@dataclass(frozen=True)
class Ingested:
    """What became of one scan of a file."""

    file: str
    """As it was given."""
    status: Literal["new", "there", "failed"]
    """"there": it had been ingested before, with the same settings."""
    uid: str = ""
    """Of the raw run."""
    points: int = 0
    """Frames that the run has."""
    layout: str = ""
    """E.g. "bliss"."""
    notes: tuple[str, ...] = ()
    """What is unusual, or why it failed."""


def ingest(
    files: Iterable[str | Path],
    geometry: Mapping[str, Any],
    *,
    to: Any,
    shape: tuple[int, int] | None = None,
    snake: bool | None = None,
    interrupted: bool = False,
    dataset: str | None = None,
    layout: str | None = None,
) -> Iterator[Ingested]:
    """Record files as raw runs that point to them; nothing is copied.

    Parameters
    ----------
    files
        Files, and folders of TIFF files.
    geometry
        Values of the ``nanobeam`` block, such as those of a TOML file. What it lacks is taken
        from the file, if that says it.
    to
        A folder as of `open_catalog`, the address of a Tiled server, or a Tiled client. The runs
        go to its catalogue "raw", or to itself if it has none.
    shape
        Rows and columns of the scan, where files do not tell.
    snake
        Whether every second row is flown backwards. If None, as the positions say; not without.
    interrupted
        Whether scans may have fewer points than `shape`, the last ones lacking.
    dataset
        The frames in an HDF5 file, where there are several.
    layout
        Name of the reader, where the first that knows the file is not the right one.

    Yields
    ------
    Ingested
        One for each scan: a file may hold several. What cannot be read is "failed", and the
        rest goes on.
    """
    from nanobeam_bluesky.retrospective.runs import catalog_of_raw, writable_catalog
    from nanobeam_bluesky.tiled_adapters.writers import whole_run_writer

    catalog = catalog_of_raw(writable_catalog(to) if isinstance(to, str | Path) else to)
    for given in map(str, files):
        path = Path(os.path.realpath(given) if os.path.islink(given) else os.path.abspath(given))
        try:
            name, scans = find_scans(path, Options(shape, dataset), layout)
        except Exception as error:  # a file may be anything, and so may a plug-in
            yield Ingested(given, "failed", notes=(_text(error, path),))
            continue
        for scan in scans:
            try:
                documents = documents_of(
                    scan, geometry, path, name, shape=shape, snake=snake, interrupted=interrupted
                )
                uid = documents[0][1]["uid"]
                status: Literal["new", "there"] = "new"
                known = catalog.get(uid)
                if known is not None and known.metadata.get("stop"):
                    status = "there"
                else:
                    if known is not None:  # its writing was interrupted
                        catalog.delete_contents(uid, recursive=True)
                    write = whole_run_writer(catalog)
                    for document in documents:
                        write(*document)
            except Exception as error:  # Tiled raises of many kinds
                yield Ingested(given, "failed", layout=name, notes=(_text(error, path),))
            else:
                yield Ingested(given, status, uid, scan.count, name, scan.notes)


def documents_of(
    scan: PlainScan,
    geometry: Mapping[str, Any],
    path: Path,
    layout: str,
    *,
    shape: tuple[int, int] | None = None,
    snake: bool | None = None,
    interrupted: bool = False,
) -> list[Document]:
    """Compose the run of a scan.

    Its uid follows from the file and the settings: the same of both is the same run.

    Raises
    ------
    ValueError
        If the geometry lacks something, or does not suit the frames, or the shape their number.
    """
    if not scan.count:
        raise ValueError("no frames in it")
    shape = _checked_shape(shape, scan, interrupted)
    motors = _positions(scan.motors, scan.count)
    snaking = scan.snaking if snake is None else snake
    if snaking is None:
        snaking = motors is not None and _snakes(motors[1].values, shape)
    start: dict[str, Any] = {
        "plan_name": "ingest",
        "sample": scan.name,
        "shape": list(shape),
        "num_points": shape[0] * shape[1],
        "snaking": [False, snaking],
        "nanobeam": _block(scan, geometry),
        "ingest": {"file": str(path), "layout": layout},
    }
    status = os.stat(path)
    number = re.findall(r"\d+", path.stem) or ["0"]
    start |= {"time": status.st_mtime, "scan_id": int(number[-1][-9:])} | dict(scan.metadata)
    if motors is not None:
        names = [m.name for m in motors]
        start |= {
            "motors": names,
            "hints": {"dimensions": [[[n], "primary"] for n in names], "gridding": "rectilinear"},
        }
        extents = _extents(motors, shape, snaking)
        if extents is not None:
            start["extents"] = extents
    start = _plain(start)
    roi = _checked_geometry(start, scan).roi
    if "pixel_mask" not in geometry and "pixel_mask" in scan.geometry:
        # of a large detector, the file's own list is too long for a document
        mask = np.array(start["nanobeam"]["pixel_mask"], int).reshape(-1, 2)
        first, size = np.array([roi.row, roi.col]), np.array([roi.height, roi.width])
        inside = ((mask >= first) & (mask < first + size)).all(axis=1)
        start["nanobeam"]["pixel_mask"] = mask[inside].tolist()
    state = [str(path), status.st_ino, status.st_size, status.st_mtime_ns]
    uid = str(uuid.uuid5(_NAMESPACE, json.dumps([state, start], sort_keys=True)))
    return _compose(start, uid, scan, motors)


def _compose(
    start: dict[str, Any], uid: str, scan: PlainScan, motors: tuple[Motor, Motor] | None
) -> list[Document]:
    begun = start["time"]
    run: Any = compose_run(
        uid=uid, time=begun, metadata={k: v for k, v in start.items() if k != "time"}
    )
    first = scan.frames[0]
    keys: dict[str, Any] = {
        KEY: {
            "source": start["ingest"]["file"],
            "dtype": "array",
            "dtype_numpy": first.dtype.str,
            "shape": list(first.shape),
            "external": "STREAM:",
        }
    }
    for motor in motors or ():
        keys[motor.name] = {
            "source": start["ingest"]["file"],
            "dtype": "number",
            "dtype_numpy": "<f8",
            "shape": [],
            "units": motor.units,
        } | ({"external": "STREAM:"} if motor.dataset else {})
    stream: Any = run.compose_descriptor(
        name="primary", data_keys=keys, object_keys={key: [key] for key in keys}, time=begun
    )
    documents: list[Document] = [("start", run.start_doc), ("descriptor", stream.descriptor_doc)]

    def refer(key: str, at: int, count: int, **what: Any) -> None:
        resource = run.compose_stream_resource(data_key=key, **what)
        problem = Resource.parse(resource.stream_resource_doc, {}).problem
        if problem:
            raise ValueError(problem)
        datum = resource.compose_stream_datum(
            indices={"start": 0, "stop": count},
            seq_nums={"start": at + 1, "stop": at + count + 1},
            descriptor=stream.descriptor_doc,
        )
        documents.extend(
            [("stream_resource", resource.stream_resource_doc), ("stream_datum", datum)]
        )

    at = 0
    for part in scan.frames:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise ValueError(f"{part.path} has frames {part.shape}, {first.path} {first.shape}")
        refer(KEY, at, part.count, **part.resource)
        at += part.count
    for motor in motors or ():
        if motor.dataset:
            uri = f"file://localhost{quote(motor.dataset[0])}"
            what = {"mimetype": "application/x-hdf5", "parameters": {"dataset": motor.dataset[1]}}
            refer(motor.name, 0, scan.count, uri=uri, **what)
    values = {m.name: m.values for m in motors or () if not m.dataset}
    if values:
        page = stream.compose_event_page(
            data={name: numbers.tolist() for name, numbers in values.items()},
            timestamps={name: [begun] * scan.count for name in values},
            seq_num=list(range(1, scan.count + 1)),
            time=[begun] * scan.count,
            validate=False,  # 96 µs a point
        )
        documents.append(("event_page", page))
    stop = run.compose_stop(time=begun) | {"num_events": {"primary": scan.count}}
    return [*documents, ("stop", stop)]


# --------------------------------------------------------------------------- checks


def _checked_shape(
    given: tuple[int, int] | None, scan: PlainScan, interrupted: bool
) -> tuple[int, int]:
    """Return rows and columns.

    Raises
    ------
    ValueError
        If there are more frames than points; or fewer, and neither the file nor the user says so.
    """
    shape, count = given or scan.shape, scan.count
    points = shape[0] * shape[1] if shape else 0
    if shape is not None and count < points and (interrupted or shape == scan.shape):
        return shape
    fitting = [(n, count // n) for n in range(math.isqrt(count), 0, -1) if count % n == 0]
    fit = ", ".join(f"{a},{b}" for a, b in fitting[:3])
    if shape is None:
        raise ValueError(
            f"{count} frames, and how many rows and columns is not said: --shape {fit}"
        )
    if count != points:
        fewer = "; --interrupted if the scan was" if count < points else ""
        raise ValueError(f"{count} frames, {shape[0]} × {shape[1]} points: {fit} would fit{fewer}")
    return shape


def _block(scan: PlainScan, geometry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `nanobeam` block: the user's values, then those of the file."""
    taken = set(geometry)
    for name in geometry:
        taken |= _ALTERNATIVES.get(name, set())
    own = {name: value for name, value in scan.geometry.items() if name not in taken}
    size = {"detector_shape": list(scan.frames[0].shape)}
    return size | own | dict(geometry) | {"detector": KEY}


def _checked_geometry(start: Mapping[str, Any], scan: PlainScan) -> Geometry:
    """Return the geometry; ValueError if it lacks something, or does not suit the frames."""
    frame = scan.frames[0].shape
    stated = tuple(start["nanobeam"]["detector_shape"])
    if stated != frame:
        raise ValueError(f"frames of {frame[0]} × {frame[1]}, detector_shape = {list(stated)}")
    try:
        found = Preset.load("default").read_geometry({"uid": "", **start}, frames=KEY)
        found.roi.check_inside(frame)
        return found
    except GeometryError as error:
        raise ValueError(re.sub(r"^run [^:]*: ", "", str(error))) from None


# ------------------------------------------------------------------------ positions


def _positions(motors: tuple[Motor, Motor] | None, count: int) -> tuple[Motor, Motor] | None:
    """Return the motors with a position for each frame, NaN where there is none.

    Their names become data keys, which databases take for columns.
    """
    if motors is None:
        return None
    full = []
    for motor in motors:
        values = np.full(count, np.nan)
        values[: min(count, len(motor.values))] = motor.values[:count]
        name = re.sub(r"\W", "_", motor.name, flags=re.ASCII)
        if not name[:1].isalpha() or name in _TAKEN:
            name = f"motor_{name}"
        full.append(Motor(name, values, motor.units, motor.dataset))
    return None if full[0].name == full[1].name else (full[0], full[1])


def _snakes(fast: NDArray[np.float64], shape: tuple[int, int]) -> bool:
    """Whether the second row was flown against the first."""
    rows = fast[: len(fast) // shape[1] * shape[1]].reshape(-1, shape[1])
    if len(rows) < 2 or shape[1] < 2:
        return False
    ways = rows[:2, -1] - rows[:2, 0]
    return bool(ways[0] * ways[1] < 0)


def _extents(
    motors: Sequence[Motor], shape: tuple[int, int], snaking: bool
) -> list[list[float]] | None:
    """Return first and last position along both axes; None of a scan that is not whole."""
    if any(len(m.values) < shape[0] * shape[1] for m in motors):
        return None
    slow, fast = (m.values.reshape(shape).copy() for m in motors)
    if snaking:
        fast[1::2] = fast[1::2, ::-1]
    ends = [slow[0].mean(), slow[-1].mean()], [fast[:, 0].mean(), fast[:, -1].mean()]
    return [list(map(float, e)) for e in ends] if np.isfinite(ends).all() else None


def _plain(value: Any) -> Any:
    """Return what JSON knows."""
    return json.loads(json.dumps(value, default=lambda v: v.tolist()))


def _text(error: Exception, path: Path) -> str:
    text = str(error).removeprefix(f"{path}: ").replace("\n", "; ")
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
