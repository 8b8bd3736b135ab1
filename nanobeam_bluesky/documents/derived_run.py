"""The derived run: a separate, valid Bluesky run with the estimates of a raw one."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
from event_model import DocumentNames, schema_validators
from numpy.typing import NDArray

from nanobeam_bluesky.documents.scan_grid import ScanGrid
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Estimates

__all__ = ["DerivedRun", "Document", "failed_run"]

Document = tuple[str, dict[str, Any]]
"""Name and document."""

_VERSION = version("nanobeam-bluesky")
_NAMESPACE = uuid.UUID("6b0f6b86-6d1b-4f0e-9a54-6a4c3f3f5f0e")
_SOURCE = "nanobeam_bluesky"
_DEVICE = "nanobeam"
_COPIED = ("sample", "project", "proposal", "purpose")


class DerivedRun:
    """Composes the documents of one derived run.

    Parameters
    ----------
    raw_start
        Start document of the raw run.
    geometry, grid
        What the raw run was measured with.
    analyzer
        The analyzer's settings (`Analyzer.settings`).
    motor_units
        Unit of each motor, where known.

    Notes
    -----
    ``analysis_id`` is a hash of raw uid, geometry, ROI and analyzer settings; the run's
    uid is a function of it and of ``attempt``, the time in ns, so that a retry never
    collides.
    """

    def __init__(
        self,
        raw_start: Mapping[str, Any],
        geometry: Geometry,
        grid: ScanGrid,
        analyzer: Mapping[str, Any],
        motor_units: Mapping[str, str | None] | None = None,
    ) -> None:
        self.raw_start = raw_start
        self.geometry = geometry
        self.grid = grid
        self.analyzer = dict(analyzer)
        self.motor_units = motor_units or {}
        identity = {
            "raw": raw_start["uid"],
            "geometry": geometry.model_dump(mode="json"),
            "analyzer": self.analyzer,
        }
        text = json.dumps(identity, sort_keys=True)
        self.analysis_id = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.attempt = time.time_ns()
        self.uid = str(uuid.uuid5(_NAMESPACE, f"{self.analysis_id}/{self.attempt}"))
        self._descriptor = str(uuid.uuid5(_NAMESPACE, f"{self.uid}/primary"))
        self._seen = bytearray(grid.num_points + 1)
        self._checked = False
        self.num_events = 0
        """Distinct points so far."""

    def open(self) -> list[Document]:
        """Return start and descriptor."""
        now = time.time()
        raw = self.raw_start
        scan = self.grid.scan
        slow, fast = scan.motors
        start = _common_start(raw, self.uid) | {
            "shape": list(scan.shape),
            "snaking": [False, scan.snaking],
            "motors": [slow, fast],
            "num_points": self.grid.num_points,
            "hints": {
                "dimensions": [[[slow], "primary"], [[fast], "primary"]],
                "gridding": "rectilinear",
            },
            "nanobeam": {
                "version": _VERSION,
                "analysis_id": self.analysis_id,
                "attempt": self.attempt,
                "geometry": self.geometry.model_dump(mode="json", exclude_none=True),
                "fingerprint": self.geometry.fingerprint(),
                "roi": self.geometry.roi.model_dump(),
                "analyzer": self.analyzer,
                "original_plan_name": str(raw.get("plan_name", "")),
                "original_scan_id": int(raw.get("scan_id") or 0),
            },
        }
        if scan.extents is not None:
            start["extents"] = [list(limits) for limits in scan.extents]
        keys = _data_keys(self.motor_units, scan.motors)
        settings = {f"{_DEVICE}_{k}": v for k, v in self._settings().items()}
        descriptor = {
            "uid": self._descriptor,
            "run_start": self.uid,
            "time": now,
            "name": "primary",
            "data_keys": keys,
            "object_keys": {_DEVICE: list(keys)},
            "hints": {_DEVICE: {"fields": ["strain", "omega", "chi"]}},
            "configuration": {
                _DEVICE: {
                    "data": settings,
                    "timestamps": dict.fromkeys(settings, now),
                    "data_keys": {k: _config_key(v) for k, v in settings.items()},
                }
            },
        }
        return [
            ("start", _validated("start", start)),
            ("descriptor", _validated("descriptor", descriptor)),
        ]

    def page(
        self,
        points: NDArray[np.int64],
        estimates: Estimates,
        positions: Mapping[str, NDArray[np.float64]],
    ) -> Document:
        """Return the event page of points (n,), in the order given.

        The first points of a run are validated: event-model takes 0.1 ms a point for it,
        35 times what composing one takes.
        """
        n = len(points)
        row, col = self.grid.row_col(points)
        columns = estimates.columns() | {"row": row, "col": col} | dict(positions)
        data = {key: np.asarray(values).tolist() for key, values in columns.items()}
        now = [time.time()] * n
        self._count(points)
        page = {
            "descriptor": self._descriptor,
            "seq_num": [int(p) for p in points],
            "uid": _uids(n),
            "time": now,
            "data": data,
            "timestamps": dict.fromkeys(data, now),
            "filled": {},
        }
        if not self._checked:
            _validated("event_page", _first_points(page))
            self._checked = True
        return "event_page", page

    def close(self, exit_status: str, reason: str) -> Document:
        """Return the stop document."""
        stop = {
            "uid": str(uuid.uuid4()),
            "run_start": self.uid,
            "time": time.time(),
            "exit_status": exit_status,
            "reason": reason,
            "num_events": {"primary": self.num_events},
        }
        return "stop", _validated("stop", stop)

    # ------------------------------------------------------------------ internals

    def _count(self, points: NDArray[np.int64]) -> None:
        highest = int(points.max(initial=0))
        if highest >= len(self._seen):
            self._seen.extend(bytes(highest + 1 - len(self._seen)))
        seen = np.frombuffer(self._seen, dtype=np.uint8)
        distinct = np.unique(points)
        self.num_events += int((seen[distinct] == 0).sum())
        seen[distinct] = 1

    def _settings(self) -> dict[str, Any]:
        """Provenance as flat configuration values."""
        geometry = self.geometry
        flat: dict[str, Any] = {"version": _VERSION, "analysis_id": self.analysis_id}
        for source in (
            geometry.model_dump(mode="json", exclude={"optics", "pixel_mask"}, exclude_none=True),
            {f"optics_{k}": v for k, v in geometry.optics.model_dump(exclude_none=True).items()},
            {f"analyzer_{k}": v for k, v in self.analyzer.items()},
        ):
            flat |= {
                k: v if isinstance(v, str | int | float) else json.dumps(v)
                for k, v in source.items()
                if v is not None
            }
        return flat


def _uids(n: int) -> list[str]:
    """Return random uids; one by one they would take half of a page's time."""
    digits = np.frombuffer(os.urandom(16 * n).hex().encode(), "S1").reshape(n, 32)
    texts = np.full((n, 36), b"-")
    for at, (first, stop) in enumerate(pairwise((0, 8, 12, 16, 20, 32))):
        texts[:, first + at : stop + at] = digits[:, first:stop]
    uids: list[str] = texts.view("S36").ravel().astype(str).tolist()
    return uids


def failed_run(raw_start: Mapping[str, Any], reason: str) -> list[Document]:
    """Return start and stop of a derived run that could not begin: the reason is in the stop."""
    attempt = time.time_ns()
    uid = str(uuid.uuid5(_NAMESPACE, f"{raw_start['uid']}/{attempt}"))
    start = _common_start(raw_start, uid) | {"nanobeam": {"version": _VERSION, "attempt": attempt}}
    stop = {
        "uid": str(uuid.uuid4()),
        "run_start": uid,
        "time": time.time(),
        "exit_status": "fail",
        "reason": reason,
        "num_events": {},
    }
    return [("start", _validated("start", start)), ("stop", _validated("stop", stop))]


def _common_start(raw_start: Mapping[str, Any], uid: str) -> dict[str, Any]:
    return {
        "uid": uid,
        "time": time.time(),
        "original_run_uid": raw_start["uid"],
        "plan_name": "nanobeam",
        "plan_type": "generator",  # with scan_id, what stock callbacks ask for
        "scan_id": 0,
        "tiled_specs": [{"name": "NanobeamRun", "version": "1.0"}],
    } | {key: raw_start[key] for key in _COPIED if key in raw_start}


def _data_keys(
    motor_units: Mapping[str, str | None], motors: tuple[str, str]
) -> dict[str, dict[str, Any]]:
    def key(units: str, *, integer: bool = False) -> dict[str, Any]:
        return {
            "source": _SOURCE,
            "dtype": "integer" if integer else "number",
            "dtype_numpy": "<i8" if integer else "<f8",
            "shape": [],
            "units": units,
        }

    keys = {name: key(unit, integer=name == "flags") for name, unit in Estimates.UNITS.items()}
    keys |= {name: key("", integer=True) for name in ("row", "col")}
    return keys | {motor: key(motor_units.get(motor) or "") for motor in motors}


def _config_key(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        text = f"<U{max(1, len(value))}"
        return {"source": _SOURCE, "dtype": "string", "shape": [], "dtype_numpy": text}
    if isinstance(value, bool):
        return {"source": _SOURCE, "dtype": "boolean", "shape": [], "dtype_numpy": "|b1"}
    if isinstance(value, int):
        return {"source": _SOURCE, "dtype": "integer", "shape": [], "dtype_numpy": "<i8"}
    return {"source": _SOURCE, "dtype": "number", "shape": [], "dtype_numpy": "<f8"}


def _first_points(page: Mapping[str, Any], n: int = 4) -> dict[str, Any]:
    """Return the same page with no more than n points."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: cut(v) for k, v in value.items()}
        return value[:n] if isinstance(value, list) else value

    return {key: cut(value) for key, value in page.items()}


def _validated(name: str, doc: dict[str, Any]) -> dict[str, Any]:
    """Check a document against event-model's schema, unless one like it was: 5 to 30 ms each."""
    like = (name, _likeness(doc))
    if like not in _valid:
        schema_validators[DocumentNames[name]].validate(doc)
        if len(_valid) >= _MAX_VALID:
            _valid.clear()
        _valid.add(like)
    return doc


_valid: set[tuple[str, object]] = set()
_MAX_VALID = 1000


def _likeness(value: Any) -> object:
    """Keys and types of a document, which are all that differs from what this file writes."""
    if isinstance(value, Mapping):
        return frozenset((key, _likeness(v)) for key, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), frozenset(map(_likeness, value))
    return type(value)
