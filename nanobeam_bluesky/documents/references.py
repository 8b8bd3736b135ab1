"""From documents to references: which frame and which positions belong to which point.

The *point number* is the 1-based position in scan order. An event is not a point: it may
hold one, a row or the whole scan. Rows of files are found by ``seq_nums → (file, dataset,
rows)``; ``indices`` count within one stream resource only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.documents.resources import Resource, StoredRows, count_of, whole
from nanobeam_bluesky.geometry import ROI

if TYPE_CHECKING:
    from nanobeam_bluesky.presets import PositionKey

__all__ = ["PointBlock", "RunReferences", "StoredRows"]

SURPLUS_POINTS = 1000
"""Points beyond the grid that are still taken; more are a mistake, or hostile."""
MAX_POINTS = 10_000_000
"""Points of a run whose grid is not known."""
MAX_KEPT = 300_000
"""Datums, and events, that wait for what they belong to: about 100 MB."""
MAX_USED = 1000
"""Documents remembered after they were used, for those that come twice."""

_BROKEN = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What a document that is not as it should be leads to."""


class UnusableRunError(ValueError):
    """The run cannot be understood at all."""


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


@dataclass(frozen=True, slots=True)
class _Stream:
    """What a descriptor says."""

    name: str
    keys: Mapping[str, Any]
    points_only: bool
    """Whether the fast motor is one number an event: then an event is a point."""

    def rows(self, key: str, *, image: bool) -> int:
        """Rows of one event of a key: its frames, or its numbers."""
        shape = list(self.keys.get(key, {}).get("shape") or [])
        leading = shape[:-2] if image else shape[:1]
        rows = 1
        for length in leading:
            rows *= count_of(length) or 1
        return rows


@dataclass(frozen=True, slots=True)
class _Event:
    """The values of one event that matter; they may have to wait for their datums."""

    descriptor: str
    number: int
    values: dict[str, Any]


class _Kept(OrderedDict[str, Any]):
    """A dictionary that forgets its oldest item rather than grow without bound."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._limit:
            self.popitem(last=False)


class RunReferences:
    """Turns the documents of one run into blocks of points, in order of arrival.

    Parameters
    ----------
    motors
        Names of the (slow, fast) scan motors, whose values are wanted beside the frames.
    detector
        Data key of the frames; None takes the only image.
    shape
        Points along (slow, fast), which tell a row or a scan in one event from several
        frames of a point. None: an event is a point.
    positions
        By motor, the data key of its positions, if not its name.
    root_map
        Folders of the documents' paths, e.g. "/ioc/data" or "//host/data" → where they are
        mounted here.
    note
        Told of documents that cannot be used, and of what waited in vain.

    Notes
    -----
    Reads ``stream_resource`` / ``stream_datum``, ``resource`` / ``datum`` / ``datum_page`` /
    ``bulk_datum``, and images embedded in ``event`` and ``event_page``, in any order after
    their descriptor; the last document of a point wins. Documents are never changed.

    The frames of one event are those of a row if they are as many as the row has points, of
    the scan if they are as many as that has, and of one point, summed, otherwise, or where the
    fast motor is one number an event. Several numbers of a point are averaged.
    """

    def __init__(
        self,
        motors: tuple[str, ...],
        detector: str | None = None,
        *,
        shape: tuple[int, int] | None = None,
        positions: Mapping[str, PositionKey] | None = None,
        root_map: Mapping[str, str] | None = None,
        note: Callable[[str], None] = lambda problem: None,
    ) -> None:
        self.motors = motors
        self.detector = detector
        self.stream: str | None = None
        """Name of the stream that holds the frames."""
        self.frame_key: str | None = None
        self.points_per_event = 1
        """Points that one event with frames holds, as far as is known."""
        self.announced: set[str] = set()
        """Motors that some stream records."""
        self.units: dict[str, str | None] = {}
        """Unit of each recorded motor, where its descriptor says."""
        self.configuration: dict[str, Any] = {}
        """The detector's configuration: name → {"value", "units"}."""
        self.baseline: dict[str, Any] = {}
        """Baseline readings: name → {"value", "units"}."""
        self._shape = shape
        self._last = shape[0] * shape[1] + SURPLUS_POINTS if shape else MAX_POINTS
        self._positions = positions or {}
        self._motor_of = {self._positions[m].key if m in self._positions else m: m for m in motors}
        self._root_map = root_map or {}
        self._note = note
        self._streams: dict[str, _Stream] = {}
        self._resources: dict[str, Resource] = {}
        self._key_of: dict[str, str] = {}  # of a stream resource
        self._datums = _Kept(MAX_KEPT)  # datum_id → (resource, kwargs), no event yet
        self._used = _Kept(MAX_USED)
        self._seen = _Kept(MAX_USED)  # stream_datum → what it said, for those that come twice
        self._waiting: dict[str, list[Any]] = {}  # by the uid or datum_id that is missing
        self._kept = 0

    def document(
        self, name: str, doc: Mapping[str, Any], roi: ROI | None
    ) -> Iterator[tuple[str, PointBlock]]:
        """Take one document; yield ("frames" or a motor's name, block).

        `roi` cuts embedded frames; without one they are ignored (no geometry). A document
        that is not as it should be is ignored, and noted.

        Raises
        ------
        ValueError
            If the run cannot be understood at all: says why and what to do.
        """
        try:
            if name == "descriptor":
                self._descriptor(doc)
                yield from self._arrived(doc["uid"], roi)
            elif name in ("resource", "stream_resource"):
                yield from self._resource(doc, roi)
            elif name == "stream_datum":
                yield from self._stream_datum(doc)
            elif name in ("datum", "datum_page", "bulk_datum"):
                for uid, identity, kwargs in _datums(name, doc):
                    self._datums[identity] = (uid, kwargs)
                    yield from self._arrived(identity, roi)
            elif name in ("event", "event_page"):
                yield from self._events(doc, name == "event", roi)
        except UnusableRunError:
            raise
        except _BROKEN as error:
            self._note(f"a document was ignored, {name}: {_reason(error)}")

    def finish(self) -> Iterator[tuple[str, PointBlock]]:
        """Yield the points whose documents were incomplete when the run stopped."""
        for missing, items in self._waiting.items():
            problem = f"{missing} was announced, and never came"
            for item in items:
                if isinstance(item, _Event):
                    yield from self._incomplete(item, problem)
                    continue
                stream_of = self._streams.get(item.get("descriptor"))
                if stream_of is not None and stream_of.name == self.stream:
                    first, stop = _range(item["seq_nums"], 1)
                    yield from self._block("frames", first, stop - first, problem=problem)
        self._waiting.clear()
        self._kept = 0

    # --------------------------------------------------------------- descriptors

    def _descriptor(self, doc: Mapping[str, Any]) -> None:
        name = str(doc.get("name"))
        keys: Mapping[str, Any] = doc.get("data_keys") or {}
        recorded: dict[str, str] = {self._motor_of[k]: k for k in keys if k in self._motor_of}
        fast = keys.get(recorded.get(self.motors[-1], ""), {"shape": [2]})
        number = list(fast.get("shape") or []) in ([], [1])
        datum = not str(fast.get("external", "STREAM:")).startswith("STREAM:")
        self._streams[doc["uid"]] = _Stream(name, keys, number and not datum)
        if name == "baseline" or name.endswith("_monitor"):  # their seq_nums are no points
            return
        for motor, key in recorded.items():
            self.announced.add(motor)
            place = self._positions.get(motor)
            self.units[motor] = (place and place.units) or keys[key].get("units")
        images = [k for k, v in keys.items() if _is_image(v)]
        if self.detector is not None:
            images = [self.detector] if self.detector in keys else []
        if len(images) > 1:
            raise UnusableRunError(
                f"stream {name!r} has several images, {', '.join(sorted(images))}: "
                "say which with nanobeam['detector'] in the start document, or in the preset"
            )
        if not images or (self.stream is not None and self.stream != name):
            return
        key = images[0]
        self.stream, self.frame_key = name, key
        stream = self._streams[doc["uid"]]
        self.points_per_event = self._points_of(stream, stream.rows(key, image=True))
        for device, names in (doc.get("object_keys") or {}).items():
            if key in names:
                part = doc.get("configuration", {}).get(device, {})
                self.configuration = _with_units(part.get("data", {}), part.get("data_keys", {}))

    def _points_of(self, stream: _Stream, rows: int) -> int:
        """How many points an event of so many rows holds."""
        if self._shape is None or stream.points_only or rows < 2:
            return 1
        slow, fast = self._shape
        return rows if rows in (fast, slow * fast) else 1

    def _label(self, stream: _Stream, key: str) -> str | None:
        if stream.name == "baseline" or stream.name.endswith("_monitor"):
            return None
        if key == self.frame_key and stream.name == self.stream:
            return "frames"
        return self._motor_of.get(key)

    def _points_of_numbers(self, stream: _Stream, numbers: int) -> int:
        """How many points an event with so many numbers of a motor holds."""
        if stream.name == self.stream:
            return self.points_per_event
        points = self._points_of(stream, numbers)
        together = self.points_per_event
        return points if points > 1 or numbers % together else together

    # ------------------------------------------------------------------- streams

    def _resource(
        self, doc: Mapping[str, Any], roi: ROI | None
    ) -> Iterator[tuple[str, PointBlock]]:
        self._resources[doc["uid"]] = Resource.parse(doc, self._root_map)
        if "data_key" in doc:
            self._key_of[doc["uid"]] = doc["data_key"]
        yield from self._arrived(doc["uid"], roi)

    def _stream_datum(self, doc: Mapping[str, Any]) -> Iterator[tuple[str, PointBlock]]:
        uid, of = doc["stream_resource"], doc["descriptor"]
        first, stop = _range(doc["seq_nums"], 1)
        index, _ = _range(doc["indices"], 0)
        missing = [
            m for m, known in ((uid, self._resources), (of, self._streams)) if m not in known
        ]
        if missing:
            self._wait(missing[0], doc)
            return
        identity = f"{uid} {doc.get('uid')}"
        if self._seen.get(identity) == (first, stop, index):
            return
        self._seen[identity] = (first, stop, index)
        stream, resource, key = self._streams[of], self._resources[uid], self._key_of[uid]
        label = self._label(stream, key)
        if label is None or stop == first:
            return
        rows = resource.frames or stream.rows(key, image=label == "frames")
        if label == "frames":
            points = self.points_per_event = self._points_of(stream, rows)
        else:
            points = self._points_of_numbers(stream, rows)
        if resource.problem:
            start, count = (first - 1) * points + 1, (stop - first) * points
            yield from self._block(label, start, count, problem=resource.problem)
            return
        stored = resource.event(index, rows)
        yield from self._rows(label, first, stop - first, points, stored, rows)

    def _rows(
        self, label: str, first: int, events: int, points: int, stored: StoredRows, rows: int
    ) -> Iterator[tuple[str, PointBlock]]:
        """Yield stored events of so many points and rows each.

        `first` is the number of the first event; 0 rows: the dataset's length says how many.
        """
        start, count = (first - 1) * points + 1, events * points
        if label in self._positions:
            stored = replace(stored, scale=self._scale(label))
        if not rows:
            yield from self._block(label, start, count, stored=replace(stored, shared_by=count))
        elif rows % points == 0:
            if rows != points:
                stored = replace(stored, rows_per_point=rows // points)
            yield from self._block(label, start, count, stored=stored)
        elif rows == 1:  # the slow motor of a row: one number for all its points
            for point in range(start, min(start + count, self._last + 1)):
                row = stored.row + (point - start) // points
                yield from self._block(label, point, 1, stored=replace(stored, row=row))
        else:
            problem = f"{label}: {points} points do not share {rows} rows equally"
            yield from self._block(label, start, count, problem=problem)

    def _block(
        self, label: str, first: int, count: int, **what: Any
    ) -> Iterator[tuple[str, PointBlock]]:
        """Yield a block without the points that lie far beyond the scan."""
        taken = min(count, self._last + 1 - first)
        if taken < count and label == "frames":
            self._note(
                f"points {max(first, self._last + 1)} to {first + count - 1} were announced, far "
                f"beyond {f'shape = {list(self._shape)}' if self._shape else 'any scan'}: ignored"
            )
        if taken > 0:
            block = PointBlock(first, count, **what)
            yield label, block if taken == count else block.part(first, first + taken)

    def _scale(self, label: str) -> float:
        return self._positions[label].scale if label in self._positions else 1.0

    # ------------------------------------------------------ what waits for what

    def _wait(self, missing: str, item: Any) -> None:
        if self._kept >= MAX_KEPT:
            self._note(f"{MAX_KEPT} documents wait for what they belong to; one was ignored")
            return
        self._kept += 1
        self._waiting.setdefault(missing, []).append(item)

    def _arrived(self, uid: str, roi: ROI | None) -> Iterator[tuple[str, PointBlock]]:
        items = self._waiting.pop(uid, ())
        self._kept -= len(items)
        for item in items:
            if isinstance(item, _Event):
                yield from self._event(item, roi)
            else:
                yield from self._stream_datum(item)

    def _datum(self, identity: str) -> tuple[Resource, Mapping[str, Any]] | str:
        """Return a datum, or the id of what is missing."""
        uid, kwargs = self._datums.get(identity) or self._used.get(identity) or ("", {})
        if not uid:
            return identity
        return (self._resources[uid], kwargs) if uid in self._resources else str(uid)

    # -------------------------------------------------------------------- events

    def _events(
        self, doc: Mapping[str, Any], single: bool, roi: ROI | None
    ) -> Iterator[tuple[str, PointBlock]]:
        stream = self._streams.get(doc["descriptor"])
        if stream is None:
            self._note(f"an event was ignored: its descriptor {doc['descriptor']} is not known")
            return
        data: Mapping[str, Any] = doc["data"]
        if stream.name == "baseline":
            readings = data if single else {k: v[-1] for k, v in data.items() if len(v)}
            self.baseline |= _with_units(readings, stream.keys)
            return
        numbers = [doc["seq_num"]] if single else list(doc["seq_num"])
        wanted = {k: [data[k]] if single else data[k] for k in data if self._label(stream, k)}
        found: dict[str, list[PointBlock]] = {}
        for i, number in enumerate(numbers):
            values = {k: column[i] for k, column in wanted.items() if i < len(column)}
            if not values:
                continue
            event = _Event(doc["descriptor"], whole(number, 1), values)
            for label, block in self._event(event, roi):
                found.setdefault(label, []).append(block)
        for label, blocks in found.items():
            yield from ((label, block) for block in _merged(blocks))

    def _event(self, event: _Event, roi: ROI | None) -> Iterator[tuple[str, PointBlock]]:
        stream = self._streams[event.descriptor]
        datums: dict[str, tuple[Resource, Mapping[str, Any]]] = {}
        for key, value in event.values.items():
            if isinstance(value, str) and stream.keys.get(key, {}).get("external"):
                datum = self._datum(value)
                if isinstance(datum, str):
                    self._wait(datum, event)
                    return
                datums[key] = datum
                if value in self._datums:
                    self._used[value] = self._datums.pop(value)
        # frames first: they tell how many points the event holds
        for key in sorted(event.values, key=lambda k: self._label(stream, k) != "frames"):
            label = self._label(stream, key)
            if label is None:
                continue
            try:
                if key in datums:
                    yield from self._by_datum(event.number, label, stream, key, *datums[key])
                elif label == "frames":
                    yield from self._embedded(event.number, stream, event.values[key], roi)
                else:
                    yield from self._numbers(event.number, label, stream, event.values[key])
            except _BROKEN as error:
                points = self.points_per_event
                problem = f"{label} of event {event.number}: {_reason(error)}"
                first = (event.number - 1) * points + 1
                yield from self._block(label, first, points, problem=problem)

    def _incomplete(self, event: _Event, problem: str) -> Iterator[tuple[str, PointBlock]]:
        """Yield what an event holds itself; its datums never came."""
        stream = self._streams[event.descriptor]
        for key, value in event.values.items():
            label = self._label(stream, key)
            if label is None:
                continue
            if label != "frames" and not isinstance(value, str):
                try:
                    yield from self._numbers(event.number, label, stream, value)
                    continue
                except _BROKEN as error:
                    problem = f"{label} of event {event.number}: {_reason(error)}"
            points = self.points_per_event
            first = (event.number - 1) * points + 1
            yield from self._block(label, first, points, problem=problem)

    def _by_datum(
        self,
        number: int,
        label: str,
        stream: _Stream,
        key: str,
        resource: Resource,
        kwargs: Mapping[str, Any],
    ) -> Iterator[tuple[str, PointBlock]]:
        stored, rows = resource.datum(kwargs)
        described = stream.rows(key, image=label == "frames")
        if label == "frames":
            points = self._points_of(stream, rows or described)
            if not rows and described == 1 and self._shape and not stored.handler:
                points = self._shape[0] * self._shape[1]  # a whole dataset
            self.points_per_event = points
        else:
            points = self._points_of_numbers(stream, rows or described)
        if not rows and (stored.handler or described > 1):
            rows = described
        if resource.problem:
            start = (number - 1) * points + 1
            yield from self._block(label, start, points, problem=resource.problem)
        else:
            yield from self._rows(label, number, 1, points, stored, rows)

    def _embedded(
        self, number: int, stream: _Stream, raw: Any, roi: ROI | None
    ) -> Iterator[tuple[str, PointBlock]]:
        if roi is None:
            return
        frames = np.asarray(raw)
        if frames.dtype.kind not in "uifb":
            raise ValueError(f"expected numbers, found {frames.dtype}")
        if frames.ndim < 2 or not frames.size:
            raise ValueError(f"expected an image, found shape {frames.shape}")
        frames = frames.reshape(-1, *frames.shape[-2:])
        roi.check_inside(frames.shape[1:])
        points = self.points_per_event = self._points_of(stream, len(frames))
        rows, cols = roi.slices
        cut = frames[:, rows, cols]
        if len(cut) != points:
            cut = cut.reshape(points, -1, *cut.shape[1:]).sum(axis=1)
        first = (number - 1) * points + 1
        yield from self._block("frames", first, points, values=np.ascontiguousarray(cut))

    def _numbers(
        self, number: int, label: str, stream: _Stream, raw: Any
    ) -> Iterator[tuple[str, PointBlock]]:
        try:
            values = np.asarray(raw, dtype=float).ravel()
        except (TypeError, ValueError):
            values = np.array([np.nan])
        points = self._points_of_numbers(stream, len(values))
        if len(values) == 1 < points:
            values = np.repeat(values, points)
        elif not len(values) or len(values) % points:
            raise ValueError(f"{points} points do not share {len(values)} numbers equally")
        elif len(values) > points:
            values = values.reshape(points, -1).mean(axis=1)
        if label in self._positions:
            values = values * self._scale(label)
        yield from self._block(label, (number - 1) * points + 1, points, values=values)


def _is_image(key: Mapping[str, Any]) -> bool:
    shape = key.get("shape") or []
    return len(shape) >= 2 and all(isinstance(n, int) and n > 1 for n in shape[-2:])


def _with_units(data: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"value": value, "units": keys.get(name, {}).get("units")}
        for name, value in data.items()
    }


def _range(limits: Mapping[str, Any], least: int) -> tuple[int, int]:
    first, stop = whole(limits["start"], least), whole(limits["stop"])
    if stop < first:
        raise ValueError(f"expected a range, found {first} to {stop}")
    return first, stop


def _datums(name: str, doc: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (resource, datum_id, datum_kwargs) of a document of datums."""
    uid = doc["resource"]
    if name == "datum":
        yield uid, doc["datum_id"], doc.get("datum_kwargs") or {}
    elif name == "bulk_datum":
        yield from ((uid, d, k) for d, k in zip(doc["datum_ids"], doc["datum_kwarg_list"]))  # noqa: B905  a short one costs its own datums only
    else:
        columns: Mapping[str, Any] = doc.get("datum_kwargs") or {}
        for i, identity in enumerate(doc["datum_id"]):
            yield uid, identity, {k: v[i] for k, v in columns.items()}


def _merged(blocks: Iterable[PointBlock]) -> Iterator[PointBlock]:
    """Yield blocks, embedded ones of one kind that follow each other as one."""
    run: list[PointBlock] = []

    def flush() -> Iterator[PointBlock]:
        if len(run) == 1:
            yield run[0]
        elif run:
            values = np.concatenate([b.values for b in run])
            yield PointBlock(run[0].first, len(values), values=values)
        run.clear()

    for block in blocks:
        if run and not _go_on(run[-1], block):
            yield from flush()
        if block.values is None:
            yield block
        else:
            run.append(block)
    yield from flush()


def _go_on(one: PointBlock, other: PointBlock) -> bool:
    return (
        one.values is not None
        and other.values is not None
        and one.stop == other.first
        and one.values.dtype == other.values.dtype
    )


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else f"{error}"
