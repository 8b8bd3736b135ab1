"""From documents to references: which frame and which positions belong to which point.

The *point number* is the 1-based position in scan order, the ``seq_num`` of Bluesky.
Rows of files are found by ``seq_nums → (file, dataset, rows)``; ``indices`` count within
one stream resource only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import ROI

__all__ = ["PointBlock", "RunReferences", "StoredRows"]


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Consecutive rows of an HDF5 dataset."""

    path: str
    """File, e.g. "/data/scan_12.h5"."""
    dataset: str
    """Dataset in the file, e.g. "/entry/data/data"."""
    row: int
    """First row, e.g. 0."""
    rows_per_point: int = 1
    """Rows of one point: frames are summed, scalars averaged."""
    cut: bool = False
    """Whether frames are cut to the ROI already (spooled ones)."""


@dataclass(frozen=True, slots=True)
class PointBlock:
    """What consecutive points recorded under one key: by reference, or as an array."""

    first: int
    """Point number of the first point, e.g. 1."""
    count: int
    """Number of points."""
    stored: StoredRows | None = None
    """Where the values lie."""
    values: NDArray[Any] | None = None
    """The values themselves: frames cut to the ROI (n, rows, columns), or scalars (n,)."""
    problem: str = ""
    """Why there is neither."""

    @property
    def stop(self) -> int:
        """Point number after the last."""
        return self.first + self.count

    def part(self, first: int, stop: int) -> PointBlock:
        """Return the points first ≤ point < stop, which must lie in the block."""
        offset = first - self.first
        return replace(
            self,
            first=first,
            count=stop - first,
            stored=self.stored
            and replace(self.stored, row=self.stored.row + offset * self.stored.rows_per_point),
            values=None if self.values is None else self.values[offset : offset + stop - first],
        )

    def joined(self, other: PointBlock) -> PointBlock | None:
        """Return both blocks as one where `other` goes on where this one ends, else None."""
        if (
            self.stored is not None
            and other.stored is not None
            and self.stop == other.first
            and replace(self.stored, row=self.stored.row + self.count * self.stored.rows_per_point)
            == other.stored
        ):
            return replace(self, count=self.count + other.count)
        return None

    @property
    def nbytes(self) -> int:
        """Bytes held in memory by embedded values."""
        return 0 if self.values is None else self.values.nbytes


class RunReferences:
    """Turns the documents of one run into blocks of points, in order of arrival.

    Parameters
    ----------
    motors
        Names of the scan motors, whose values are wanted beside the frames.
    detector
        Data key of the frames; None takes the only image.

    Notes
    -----
    Reads ``stream_resource`` / ``stream_datum`` and images embedded in ``event`` and
    ``event_page``. Documents are never changed.
    """

    def __init__(self, motors: tuple[str, ...], detector: str | None = None) -> None:
        self.motors = motors
        self.detector = detector
        self.stream: str | None = None
        """Name of the stream that holds the frames."""
        self.frame_key: str | None = None
        self.announced: set[str] = set()
        """Motors that some stream records."""
        self.units: dict[str, str | None] = {}
        """Unit of each recorded motor, where its descriptor says."""
        self.configuration: dict[str, Any] = {}
        """The detector's configuration: name → {"value", "units"}."""
        self.baseline: dict[str, Any] = {}
        """Baseline readings: name → {"value", "units"}."""
        self._descriptors: dict[str, Mapping[str, Any]] = {}
        self._resources: dict[str, tuple[str, StoredRows]] = {}
        self._unsupported: dict[str, str] = {}
        self._orphans: dict[str, list[Mapping[str, Any]]] = defaultdict(list)

    def document(
        self, name: str, doc: Mapping[str, Any], roi: ROI | None
    ) -> Iterator[tuple[str, PointBlock]]:
        """Take one document; yield ("frames" or a motor's name, block).

        `roi` cuts embedded frames; without one they are ignored (no geometry).

        Raises
        ------
        ValueError
            If the run cannot be understood at all: says why and what to do.
        """
        if name == "descriptor":
            self._descriptor(doc)
        elif name == "stream_resource":
            yield from self._resource(doc)
        elif name == "stream_datum":
            yield from self._datum(doc)
        elif name in ("event", "event_page"):
            yield from self._events(doc, name == "event", roi)

    # --------------------------------------------------------------- descriptors

    def _descriptor(self, doc: Mapping[str, Any]) -> None:
        self._descriptors[doc["uid"]] = doc
        if doc.get("name") == "baseline":
            return
        keys: Mapping[str, Any] = doc.get("data_keys", {})
        for motor in set(self.motors) & set(keys):
            self.announced.add(motor)
            self.units[motor] = keys[motor].get("units")
        images = [k for k, v in keys.items() if _is_image(v)]
        if self.detector is not None:
            images = [k for k in images if k == self.detector]
        if len(images) > 1:
            raise ValueError(
                f"stream {doc.get('name')!r} has several images, {', '.join(sorted(images))}: "
                "say which with nanobeam['detector'] in the start document, or in the preset"
            )
        if not images or (self.stream is not None and self.stream != doc.get("name")):
            return
        key = images[0]
        external = str(keys[key].get("external", "STREAM:"))
        if not external.startswith("STREAM:"):
            raise ValueError(
                f"the frames {key!r} come as resource and datum documents ({external}); "
                "only stream_datum and embedded images are read"
            )
        self.stream, self.frame_key = doc.get("name"), key
        for device, names in doc.get("object_keys", {}).items():
            if key in names:
                part = doc.get("configuration", {}).get(device, {})
                self.configuration = _with_units(part.get("data", {}), part.get("data_keys", {}))

    # ------------------------------------------------------------------- streams

    def _resource(self, doc: Mapping[str, Any]) -> Iterator[tuple[str, PointBlock]]:
        key, uid = doc["data_key"], doc["uid"]
        try:
            parameters = doc.get("parameters", {})
            dataset = parameters.get("dataset", parameters.get("path"))
            if "hdf5" not in str(doc.get("mimetype")) or not isinstance(dataset, str):
                raise ValueError(f"expected HDF5 with a dataset, found {doc.get('mimetype')!r}")
            self._resources[uid] = (key, StoredRows(_local_path(doc["uri"]), dataset, 0))
        except ValueError as error:
            self._unsupported[uid] = f"stream_resource {uid[:8]} of {key!r}: {error}"
            self._resources[uid] = (key, StoredRows("", "", 0))
        for datum in self._orphans.pop(uid, []):
            yield from self._datum(datum)

    def _datum(self, doc: Mapping[str, Any]) -> Iterator[tuple[str, PointBlock]]:
        uid = doc["stream_resource"]
        if uid not in self._resources:
            self._orphans[uid].append(doc)
            return
        key, stored = self._resources[uid]
        descriptor = self._descriptors.get(doc["descriptor"], {})
        first, stop = doc["seq_nums"]["start"], doc["seq_nums"]["stop"]
        if stop <= first or first < 1:
            return
        if key == self.frame_key and descriptor.get("name") == self.stream:
            label = "frames"
        elif key in self.motors:
            label = key
        else:
            return
        shape = descriptor.get("data_keys", {}).get(key, {}).get("shape") or [1]
        whole = len(shape) < 3 if label == "frames" else not shape
        per_point = 1 if whole else int(shape[0])
        if uid in self._unsupported:
            yield label, PointBlock(first, stop - first, problem=self._unsupported[uid])
            return
        row = doc["indices"]["start"] * per_point
        rows = replace(stored, row=row, rows_per_point=per_point)
        yield label, PointBlock(first, stop - first, stored=rows)

    # -------------------------------------------------------------------- events

    def _events(
        self, doc: Mapping[str, Any], single: bool, roi: ROI | None
    ) -> Iterator[tuple[str, PointBlock]]:
        descriptor = self._descriptors.get(doc["descriptor"])
        if descriptor is None:
            return
        data: Mapping[str, Any] = doc["data"]
        if descriptor.get("name") == "baseline":
            readings = data if single else {k: v[-1] for k, v in data.items() if len(v)}
            self.baseline |= _with_units(readings, descriptor.get("data_keys", {}))
            return
        numbers = [doc["seq_num"]] if single else list(doc["seq_num"])
        for key in data:
            column = [data[key]] if single else data[key]
            if key in self.motors:
                for number, value in zip(numbers, column, strict=False):
                    yield key, _scalar(number, value)
            elif key == self.frame_key and descriptor.get("name") == self.stream and roi:
                yield from (("frames", b) for b in _frames(numbers, column, roi))


def _is_image(key: Mapping[str, Any]) -> bool:
    shape = key.get("shape") or []
    return len(shape) >= 2 and all(isinstance(n, int) and n > 1 for n in shape[-2:])


def _with_units(data: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"value": value, "units": keys.get(name, {}).get("units")}
        for name, value in data.items()
    }


def _local_path(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ValueError(f"expected a file on this machine, found {uri!r}")
    return str(Path(unquote(parts.path)))


def _scalar(number: int, value: Any) -> PointBlock:
    try:
        mean = float(np.mean(np.asarray(value, dtype=float)))
    except (TypeError, ValueError):
        mean = float("nan")
    return PointBlock(number, 1, values=np.array([mean]))


def _frames(numbers: list[int], column: Any, roi: ROI) -> Iterator[PointBlock]:
    """Cut every frame to the ROI; neighbours of one kind share a block."""
    run: list[NDArray[Any]] = []
    first = 0
    for number, raw in zip(numbers, column, strict=False):
        try:
            frame = np.asarray(raw)
            if frame.dtype.kind not in "uifb":
                raise ValueError(f"expected numbers, found {frame.dtype}")
            frame = frame if frame.ndim == 3 else frame[np.newaxis]
            if frame.ndim != 3 or not frame.shape[0]:
                raise ValueError(f"expected an image, found shape {np.shape(raw)}")
            roi.check_inside(frame.shape[1:])
            rows, cols = roi.slices
            cut = frame[:, rows, cols]
            image = cut[0] if len(cut) == 1 else cut.sum(axis=0)
        except ValueError as error:
            if run:
                yield PointBlock(first, len(run), values=np.stack(run))
                run = []
            yield PointBlock(number, 1, problem=f"frame of point {number}: {error}")
            continue
        if run and (number != first + len(run) or image.dtype != run[0].dtype):
            yield PointBlock(first, len(run), values=np.stack(run))
            run = []
        if not run:
            first = number
        run.append(image)
    if run:
        yield PointBlock(first, len(run), values=np.stack(run))
