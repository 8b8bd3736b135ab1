"""Where the values of resource documents lie: in a file, a sequence of files, or a handler.

Resource and stream_resource documents of any age become `Resource`, datum documents
`StoredRows`. Nothing is opened here.

Specs, their datasets and keyword arguments: bluesky/area-detector-handlers `handlers.py`,
NSLS-II hxn-profile-collection and PyXRF (`column`, `field`, `det_elem` name a dataset);
template and file numbering of sequences: bluesky-tiled-plugins `consolidators.py`.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

__all__ = ["Resource", "StoredRows", "stored_by_tiled"]

DATASET = "/entry/data/data"
"""Where area detectors write frames; their NeXus layout links it from elsewhere."""

_HDF5_SPECS = frozenset(
    {"HDF5", "PANDA", "EIGER2_STREAM", "TPX_HDF5", "MERLIN_FLY_STREAM_V2", "MERLIN_HDF5_BULK"}
    | {
        f"AD_HDF5{kind}"
        for kind in ("", "_SINGLE", "_SWMR", "_SWMR_STREAM", "_SWMR_SLICE", "_GERM")
    }
    | {"ROI_HDF5_FLY", "ROI_HDF51_FLY", "SIS_HDF51", "SIS_HDF51_FLY_STREAM_V1"}
    | {"ZEBRA_HDF51", "ZEBRA_HDF51_FLY_STREAM_V1"}
)
_TIFF_SPECS = frozenset({"AD_TIFF"})
_HDF5_TYPES = frozenset({"application/x-hdf5", "application/x-hdf"})
_BY_TILED = "application/x-tiled-array"
_TIFF_TYPES = frozenset({"multipart/related;type=image/tiff", "image/tiff"})


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Consecutive rows of an HDF5 dataset, a sequence of files, or what a handler gives."""

    path: str
    """File, e.g. "/data/scan_12.h5"; of a sequence with a field for the number, e.g.
    "/data/scan_12_{:06d}.tiff"."""
    dataset: str
    """Dataset in the file, e.g. "/entry/data/data"; "" for TIFF."""
    row: int
    """First row, e.g. 0."""
    rows_per_point: int = 1
    """Rows of one point: frames are summed, scalars averaged."""
    cut: bool = False
    """Whether frames are cut to the ROI already (spooled ones)."""
    rows_per_file: int = 0
    """Rows in each file of a sequence, numbered from 0; 0 where there is one file."""
    shared_by: int = 0
    """Points that share the dataset equally, where only its length says how many rows each
    has: `row` then counts points."""
    scale: float = 1.0
    """What numbers, not frames, are multiplied with."""
    handler: str = ""
    """JSON of [spec, resource_kwargs, datum_kwargs] for a `databroker.handlers` entry point."""


@dataclass(frozen=True, slots=True)
class Resource:
    """What a resource document says about its values."""

    rows: StoredRows
    """Where they begin."""
    frames: int = 0
    """Rows of one event; 0 where the descriptor says it."""
    rows_per_file: int = 0
    """Rows in each file of a sequence; 0 where one event has one file."""
    files_per_event: int = 0
    """Files of one event, where the document says so."""
    sequence: bool = False
    """Whether each event has files of its own."""
    spec: str = ""
    """Spec of a legacy resource, e.g. "AD_HDF5"."""
    kwargs: str = ""
    """JSON of the keyword arguments of a legacy resource's handler."""
    problem: str = ""
    """Why it cannot be read."""

    @classmethod
    def parse(cls, doc: Mapping[str, Any], root_map: Mapping[str, str]) -> Resource:
        """Read a resource or stream_resource document; what is wrong becomes its `problem`."""
        try:
            return _parse(doc, root_map)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            key = doc.get("data_key") or doc.get("spec")
            return cls(StoredRows("", "", 0), problem=f"resource of {key!r}: {_text(error)}")

    def event(self, index: int, frames: int) -> StoredRows:
        """Return the rows of the event with this index, each of so many rows."""
        rows = replace(self.rows, row=index * frames)
        if not self.sequence:
            return rows
        per_file = self.rows_per_file
        if self.files_per_event:
            per_file = max(1, frames // self.files_per_event)
        elif not per_file or frames % per_file:
            per_file = frames
        return replace(rows, rows_per_file=per_file)

    def datum(self, kwargs: Mapping[str, Any]) -> tuple[StoredRows, int]:
        """Return where the values of a legacy datum begin, and how many rows it has.

        0 rows: as many as the dataset holds, or as the descriptor says.
        """
        if self.kwargs:
            text = json.dumps([self.spec, json.loads(self.kwargs), kwargs], default=_plain)
            return replace(self.rows, handler=text), self.frames
        named = (kwargs.get(k) for k in ("dataset", "field", "column", "det_elem", "key"))
        dataset = next((d for d in named if isinstance(d, str)), self.rows.dataset)
        number = next((kwargs[k] for k in ("point_number", "frame", "index") if k in kwargs), None)
        frames = 0 if number is None else self.frames or 1
        rows = self.event(0 if number is None else whole(number), max(frames, 1))
        return rows if dataset == rows.dataset else replace(rows, dataset=dataset), frames


def stored_by_tiled(uid: str, key: str, frames_per_event: int) -> dict[str, Any]:
    """Return the resource of values that only Tiled can read: who asked for them fills them in."""
    return {
        "uid": uid,
        "data_key": key,
        "mimetype": _BY_TILED,
        "parameters": {"multiplier": frames_per_event},
    }


def whole(value: Any, least: int = 0) -> int:
    """Return a whole number of at least `least`, which is not a truth value.

    Raises
    ------
    ValueError
        If it is something else.
    """
    integral = isinstance(value, int | np.integer) or (
        isinstance(value, float) and value.is_integer()
    )
    if isinstance(value, bool) or not integral or not least <= value < 2**62:
        raise ValueError(f"expected a whole number of {least} or more, found {value!r}")
    return int(value)


def count_of(value: Any) -> int:
    """Return a positive whole number, or 0 where it is none."""
    try:
        return whole(value, 1)
    except ValueError:
        return 0


def _parse(doc: Mapping[str, Any], root_map: Mapping[str, str]) -> Resource:
    spec = str(doc.get("spec", "")).strip()
    parameters: Mapping[str, Any] = doc.get("parameters") or doc.get("resource_kwargs") or {}
    frames = count_of(parameters.get("multiplier", parameters.get("frame_per_point")))
    mimetype = str(doc.get("mimetype", "")).replace(" ", "")
    if mimetype == _BY_TILED:
        return Resource(StoredRows("", str(doc["data_key"]), 0), frames)
    location = _uri(doc["uri"], root_map) if "uri" in doc else _joined(doc, root_map)
    hdf5 = mimetype in _HDF5_TYPES or (not mimetype and spec.upper() in _HDF5_SPECS)
    tiff = mimetype in _TIFF_TYPES or (not mimetype and spec.upper() in _TIFF_SPECS)
    if not (hdf5 or tiff):
        if mimetype or not spec:
            raise ValueError(f"expected HDF5 or TIFF, found {mimetype or spec!r}")
        kwargs = json.dumps(dict(parameters), default=_plain)
        return Resource(StoredRows(location, "", 0), frames, spec=spec, kwargs=kwargs)
    dataset = ""
    if hdf5:
        named = (parameters.get(k) for k in ("dataset", "path", "key"))
        dataset = next((d for d in named if d), "" if "uri" in doc else DATASET)
        if not isinstance(dataset, str) or not dataset:
            raise ValueError(f"expected the name of a dataset, found {dataset!r}")
    template = parameters.get("template")
    if template is None:
        return Resource(StoredRows(location, dataset, 0), frames, sequence=False, spec=spec)
    filename = str(parameters.get("filename", ""))
    if "uri" not in doc:
        location = location.rstrip("/") + "/"
    chunk: Sequence[Any] = parameters.get("chunk_shape") or ()
    # frames in a file: the chunk's, or one a file where area detectors count frames
    per_file = count_of(chunk[0]) if len(chunk) else int(frames > 0 or "uri" not in doc)
    return Resource(
        StoredRows(_sequence(location, str(template), filename), dataset, 0),
        frames,
        per_file,
        count_of(parameters.get("files_per_datum")),
        sequence=True,
        spec=spec,
    )


_OLD_FIELD = re.compile(r"%[-+ #]?0?(\d{0,2})(?:\.(\d{1,2}))?d")
_NEW_FIELD = re.compile(r"\{\d?(?::0?(\d{0,2})d?)?\}")


def _sequence(location: str, template: str, filename: str) -> str:
    """Return a path with one field for a number, such as ``/data/img_{:06d}.tiff``.

    `template` is of the old form, "%s%s_%6.6d.tiff" (folder, file name, number), or of the
    new one, "img_{:06d}.tiff", which goes on where `location` ends.
    """
    found = _OLD_FIELD.search(template) or _NEW_FIELD.search(template)
    if found is None:
        raise ValueError(f"template {template!r}: expected a number such as %06d or {{:06d}}")
    head, tail = template[: found.start()], template[found.end() :]
    if re.search(r"[{}%]", (head + tail).replace("{filename}", "").replace("%s", "")):
        raise ValueError(f"template {template!r}: expected one number and no other field")
    if head.count("%s") > 1 or not filename:
        head = head.replace("%s", "", 1)  # the folder
    head, tail = (
        part.replace("%s", filename).replace("{filename}", filename) for part in (head, tail)
    )
    before = location.rstrip("/") + head if head.startswith("/") else location + head
    _checked(before + tail)
    digits = max((int(n) for n in found.groups() if n), default=0)
    return _escaped(before) + (f"{{:0{digits}d}}" if digits else "{:d}") + _escaped(tail)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


# ------------------------------------------------------------------------- paths


def _uri(uri: Any, root_map: Mapping[str, str]) -> str:
    """Return the local path of a file's URI; other hosts only by way of `root_map`."""
    parts = urlsplit(str(uri))
    path = unquote(parts.path)
    if parts.scheme not in ("file", ""):
        raise ValueError(f"expected a file on this machine, found {uri!r}")
    if parts.netloc not in ("", "localhost", *_own_names()):
        there = f"//{parts.netloc}{path}"
        mapped = _mapped(there, root_map)
        if mapped == there:
            raise ValueError(
                f"expected a file on this machine, found {uri!r}; where it is mounted here: "
                f"root_map={{'//{parts.netloc}/…': '/…'}}"
            )
        return _checked(mapped)
    return _checked(_mapped(path, root_map))


@cache
def _own_names() -> tuple[str, ...]:
    return (socket.gethostname(), "127.0.0.1")


def _joined(doc: Mapping[str, Any], root_map: Mapping[str, str]) -> str:
    """Return root and resource_path as one local path."""
    root, path = str(doc.get("root") or ""), str(doc["resource_path"])
    if doc.get("path_semantics") == "windows":
        root, path = root.replace("\\", "/"), path.replace("\\", "/")
    if root and not (path + "/").startswith(root.rstrip("/") + "/"):
        path = f"{root.rstrip('/')}/{path.lstrip('/')}"
    return _checked(_mapped(path, root_map))


def _mapped(path: str, root_map: Mapping[str, str]) -> str:
    """Replace the longest prefix of whole components that `root_map` has."""
    for prefix in sorted(root_map, key=len, reverse=True):
        bare = prefix.rstrip("/")
        if path == bare or path.startswith(bare + "/"):
            return str(root_map[prefix]).rstrip("/") + path[len(bare) :]
    return path


def _checked(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError(f"expected an absolute path, found {path!r}; give its root in root_map")
    if ".." in path.split("/"):
        raise ValueError(f"expected a path without '..', found {path!r}")
    if "\0" in path:
        raise ValueError(f"expected a path, found {path!r}")
    return path


def _plain(value: Any) -> Any:
    """Turn what JSON does not know, NumPy's numbers and arrays, into what it does."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"expected arguments as in JSON, found {type(value).__name__}")


def _text(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
