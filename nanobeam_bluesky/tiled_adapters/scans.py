"""Raw scans as Tiled keeps them: their frames and patterns on the scan grid, read where they lie.

`recorded` makes documents of a run's nodes, with every file that these list, and of these
`Scan` makes what can be read by row and column.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiled.ndslice import NDSlice
from tiled.structures.core import StructureFamily

from nanobeam_bluesky.documents import FrameReader, PointBlock, RunReferences, ScanGrid
from nanobeam_bluesky.documents.formats import NeverError, NotYetError
from nanobeam_bluesky.documents.frames import ReadStatus
from nanobeam_bluesky.documents.maps import axes
from nanobeam_bluesky.documents.replay import recorded_descriptor
from nanobeam_bluesky.documents.resources import (
    NUMBERED_TIFF,
    Resource,
    count_of,
    stored_by_tiled,
)
from nanobeam_bluesky.geometry import ROI, Geometry, GeometryError
from nanobeam_bluesky.presets import Preset

__all__ = ["TABLE", "Recorded", "Scan", "UnreadableError", "recorded"]

AT_ONCE = 96
"""Points that are read at once: enough to fill batches, little enough to hold."""
THREADS = min(4, os.cpu_count() or 1)
"""Threads that read for one request."""
TABLE = re.compile(r"internal(_\d+)?")
"""Where TiledWriter puts the events of a stream."""
_NUMBER = re.compile(r"(\d+)(\D*)")


class UnreadableError(ValueError):
    """What is asked for cannot be read: says why."""


# ---------------------------------------------------------------------- from Tiled's nodes


@dataclass(frozen=True)
class Recorded:
    """A key that is not in a table."""

    stream: str
    key: str
    events: int
    """How many events have it."""
    shape: tuple[int, ...]
    """Of all, e.g. (27225, 512, 512)."""
    dtype: np.dtype[Any]
    files: tuple[str, ...]
    """Addresses of the files, in order; none where Tiled stores it."""
    mimetype: str
    parameters: Mapping[str, Any]
    is_in_files: bool = True
    """Whether it is not in Tiled's own storage."""
    array: Any = None
    """What reads it by way of Tiled, by ``read(NDSlice)``."""

    @classmethod
    def of(cls, stream: str, key: str, source: Any, structure: Any, one: Sequence[int]) -> Recorded:
        """Make it from Tiled's data source; `one` is the shape of one event's values."""
        shape = tuple(structure.shape)
        stacked = len(shape) > len(one) or list(one) in ([], [1])
        external = str(getattr(source.management, "value", source.management)) == "external"
        assets = [a for a in source.assets if a.parameter in ("data_uri", "data_uris")]
        return cls(
            stream,
            key,
            shape[0] if stacked else shape[0] // int(one[0]),
            shape,
            structure.data_type.to_numpy_dtype(),
            tuple(a.data_uri for a in sorted(assets, key=lambda a: a.num or 0)),
            source.mimetype,
            dict(source.parameters),
            external,
        )

    @property
    def frames_per_event(self) -> int:
        """How many frames an event has, e.g. 1."""
        return math.prod(self.shape[:-2]) // max(1, self.events)


async def recorded(run: Any, wanted: set[str]) -> AsyncIterator[tuple[str, Any]]:
    """Yield what a run holds: descriptors and event pages as documents, the rest as "recorded".

    Parameters
    ----------
    run
        Tiled's catalogue adapter of a run.
    wanted
        Columns to read from tables; all of the baseline's.
    """
    for name, stream in await run.items_range():
        metadata = stream.metadata() or {}
        keys = metadata.get("data_keys")
        if not isinstance(keys, Mapping):
            continue
        yield "descriptor", recorded_descriptor(name, metadata) | {"uid": name}
        for key in await stream.keys_range():
            node = await stream.lookup_adapter([key])
            if node.structure_family == StructureFamily.table and TABLE.fullmatch(key):
                columns = set(node.structure().columns)
                some = columns & (set(keys) if name == "baseline" else wanted)
                table = await node.read(fields=sorted(some | {"seq_num"}))
                data = {k: table[k].tolist() for k in some}
                numbers = table["seq_num"].tolist()
                yield "event_page", {"descriptor": name, "seq_num": numbers, "data": data}
            elif node.structure_family == StructureFamily.array and key in keys:
                (source,) = await node.data_sources(include_assets=True)
                item = Recorded.of(
                    name, key, source, source.structure, keys[key].get("shape") or []
                )
                if not item.is_in_files:
                    item = replace(item, array=await node.get_adapter())
                yield "recorded", item


# ---------------------------------------------------------------------------- the scan


class Scan:
    """A raw scan by row and column, as far as it has come.

    Parameters
    ----------
    start, stop
        Its documents; no stop while it runs.
    preset
        Where its metadata are.
    items
        Of `recorded`.
    reader
        Reads the files.
    earlier
        The same scan, when less had come: its patterns are not read again.

    Raises
    ------
    UnreadableError
        If it cannot be read at all: says why.
    """

    def __init__(
        self,
        start: Mapping[str, Any],
        stop: Mapping[str, Any] | None,
        preset: Preset,
        items: Sequence[tuple[str, Any]],
        reader: FrameReader,
        *,
        root_map: Mapping[str, str] | None = None,
        earlier: Scan | None = None,
    ) -> None:
        self.closed = stop is not None
        self.grid = ScanGrid(preset.scan_metadata(start))
        self.note = ""
        """What is wrong with some of it."""
        motors = self.grid.scan.motors
        self._references = RunReferences(
            motors,
            preset.detector_key(start),
            shape=self.grid.scan.shape,
            positions=self.grid.scan.positions,
            root_map=root_map,
            note=self._noted,
        )
        self.documents: list[tuple[str, Mapping[str, Any]]] = []
        """Descriptors, event pages, and where the files are: what an analysis needs."""
        self._blocks: list[PointBlock] = []
        self._block_of = np.full(self.grid.num_points + 1, -1)
        self._positions = {motor: list[PointBlock]() for motor in motors}
        self._frames: Recorded | None = None
        self._reader = reader
        self._take(items, stop)
        if self._frames is None:
            raise UnreadableError("no frames" + ("" if self.closed else " yet"))
        self.frame_shape: tuple[int, int] = self._frames.shape[-2:]
        several = any(b.stored is not None and b.stored.rows_per_point > 1 for b in self._blocks)
        dtype = self._frames.dtype
        self.dtype: np.dtype[Any] = np.zeros(0, dtype).sum().dtype if several else dtype
        self._check_files()
        self.geometry: Geometry | None = None
        self.problem: str = ""
        """Why there are no patterns."""
        try:
            self.geometry = preset.read_geometry(
                start,
                baseline=self._references.baseline,
                configuration=self._references.configuration,
                frames=self._references.frame_key,
            )
            self.geometry.roi.check_inside(self.frame_shape)
        except (GeometryError, ValueError) as error:
            self.geometry, self.problem = None, str(error)
        same = earlier is not None and earlier.geometry == self.geometry
        self._sums: _Sums = earlier._sums if same and earlier else _Sums()
        slow, fast = self.grid.row_col(np.arange(1, self.grid.num_points + 1))
        self._point: NDArray[np.int64] = np.empty(self.grid.scan.shape, np.int64)
        self._point[slow, fast] = np.arange(1, self.grid.num_points + 1)

    @property
    def is_in_files(self) -> bool:
        """Whether its frames are in files, and not in Tiled's own storage."""
        return self._frames is not None and self._frames.array is None

    @property
    def units(self) -> dict[str, str]:
        """Unit of each motor."""
        units = self._references.units
        return {motor: units.get(motor) or "" for motor in self.grid.scan.motors}

    # ------------------------------------------------------------------ what is asked for

    def frames(self, rows: NDArray[Any], cols: NDArray[Any], roi: ROI) -> NDArray[Any]:
        """Read regions of frames (rows, columns, height, width); 0, or NaN, where there is none."""
        shape = (len(rows), len(cols), roi.height, roi.width)
        blank = np.nan if self.dtype.kind == "f" else 0
        out = np.full(shape, blank, self.dtype)
        flat = out.reshape(-1, *shape[2:])
        for where, block in self._stretches(rows, cols):
            frames, status, reason = self._reader.frames(self.filled(block, roi), roi)
            ok = self._ok(status, reason)
            if frames is not None and ok.any():
                if not np.can_cast(frames.dtype, self.dtype, "safe"):
                    raise UnreadableError(
                        f"the file has {frames.dtype}, the run says {self._frames_dtype()}"
                    )
                flat[where[ok]] = frames[ok]
        return out

    def patterns(self, rows: NDArray[Any], cols: NDArray[Any]) -> NDArray[np.float32]:
        """Read patterns (rows, columns, ny, nx), counts; NaN where there is none."""
        geometry = self.geometry
        assert geometry is not None
        out = np.full((len(rows), len(cols), *geometry.pattern_shape), np.nan, np.float32)
        flat = out.reshape(-1, *geometry.pattern_shape)
        for where, _, patterns, status, reason in self._patterns(self._stretches(rows, cols)):
            ok = self._ok(status, reason)
            flat[where[ok]] = patterns[ok]
        return out

    def sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the intensity (rows, columns), and the mean of all patterns (ny, nx).

        NaN where no pattern can be read, yet or at all.
        """
        geometry = self.geometry
        assert geometry is not None
        sums = self._sums
        with sums.lock:
            sums.begin(self.grid.num_points, geometry.pattern_shape, self._sources())
            rows, cols = (np.arange(n) for n in self.grid.scan.shape)
            stretches = self._stretches(rows, cols, sums.done)
            for _, block, patterns, status, _ in self._patterns(stretches):
                ok = status == ReadStatus.OK
                sums.add(np.arange(block.first, block.stop)[ok], patterns[ok])
            return sums.intensity[self._point], sums.mean

    def positions(self) -> dict[str, NDArray[np.float64]]:
        """Return the measured positions of each motor (rows, columns); NaN where unknown."""
        found = {}
        for motor, blocks in self._positions.items():
            values = np.full(self.grid.num_points + 1, np.nan)
            for block in blocks:
                numbers, _, reason = self._reader.scalars(block)
                if reason:
                    self._noted(f"{motor}: {reason}")
                stop = min(block.stop, len(values))
                values[block.first : stop] = numbers[: max(0, stop - block.first)]
            found[motor] = values[self._point]
        return found

    def coordinates(
        self, measured: Mapping[str, NDArray[np.float64]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return positions of rows and columns."""
        slow, fast = self.grid.scan.motors
        return axes(self.grid, (measured[slow], measured[fast]))

    # ------------------------------------------------------------------------ internals

    def _noted(self, note: str) -> None:
        self.note = self.note or note

    def _frames_dtype(self) -> Any:
        return self._frames.dtype if self._frames else None

    def _ok(self, status: NDArray[np.int8], reason: str) -> NDArray[np.bool_]:
        """Say which points were read; while the scan runs, the others may still come."""
        ok: NDArray[np.bool_] = status == ReadStatus.OK
        if not ok.all() and (self.closed or (status == ReadStatus.NEVER).any()):
            raise UnreadableError(reason or "some frames cannot be read")
        return ok

    def _stretches(
        self, rows: NDArray[Any], cols: NDArray[Any], done: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[NDArray[Any], PointBlock]]:
        """Yield recorded points of rows × columns that lie together, and where they are wanted."""
        wanted = self._point[np.ix_(rows, cols)].ravel()
        order = np.argsort(wanted, kind="stable")
        points = wanted[order]
        there = self._block_of[points] >= 0
        if done is not None:
            there &= ~done[points]
        order, points = order[there], points[there]
        blocks = self._block_of[points]
        cuts = np.flatnonzero((np.diff(points) != 1) | (np.diff(blocks) != 0)) + 1
        for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(points)], strict=True):
            for first in range(a, b, AT_ONCE):
                part = slice(first, min(first + AT_ONCE, b))
                block = self._blocks[blocks[first]]
                begin = int(points[first])
                yield order[part], block.part(begin, begin + part.stop - part.start)

    def _patterns(
        self, stretches: Iterator[tuple[NDArray[Any], PointBlock]]
    ) -> Iterator[tuple[NDArray[Any], PointBlock, NDArray[np.float32], NDArray[np.int8], str]]:
        """Yield stretches with what the reader finds, several being read at once."""
        geometry = self.geometry
        assert geometry is not None

        def read(block: PointBlock) -> tuple[NDArray[np.float32], NDArray[np.int8], str]:
            filled = self.filled(block, geometry.roi)
            patterns, _, status, reason = self._reader.patterns(filled, geometry)
            return patterns, status, reason

        with ThreadPoolExecutor(THREADS) as pool:
            reading = deque(
                (stretch, pool.submit(read, stretch[1])) for stretch in islice(stretches, THREADS)
            )
            while reading:
                (where, block), found = reading.popleft()
                reading += ((s, pool.submit(read, s[1])) for s in islice(stretches, 1))
                yield where, block, *found.result()

    def filled(self, block: PointBlock, roi: ROI) -> PointBlock:
        """Return a block with its values, cut to `roi`, where Tiled itself stores these."""
        source = self._frames
        if source is None or source.array is None or block.stored is None or block.stored.path:
            return block
        k = block.stored.rows_per_point
        first, stop = block.stored.row, block.stored.row + block.count * k
        per_event = source.frames_per_event
        events = slice(first // per_event, -(-stop // per_event))
        middle = (slice(None),) * (len(source.shape) - 3)
        values = np.asarray(source.array.read(NDSlice(events, *middle, *roi.slices)))
        frames = values.reshape(-1, roi.height, roi.width)
        frames = frames[first - events.start * per_event :][: stop - first]
        if k > 1:
            frames = frames.reshape(-1, k, *frames.shape[1:]).sum(axis=1)
        return replace(block, stored=None, values=frames)

    def _sources(self) -> NDArray[np.int64]:
        """Say of each point where its frame lies, as a number; 0 for nowhere."""
        numbers = np.array(
            [0]
            + [
                hash((b.stored.path, b.stored.dataset, b.stored.row - b.first)) if b.stored else 1
                for b in self._blocks
            ]
        )
        found: NDArray[np.int64] = numbers[self._block_of + 1]
        return found

    # ----------------------------------------------------------------------- references

    def _take(self, items: Sequence[tuple[str, Any]], stop: Mapping[str, Any] | None) -> None:
        """Find out where the frame and the positions of each point are."""
        numbers: dict[str, list[int]] = {}
        arrays: list[Recorded] = []
        for name, item in items:
            if name == "recorded":
                arrays.append(item)
                continue
            if name == "event_page":
                numbers[item["descriptor"]] = item["seq_num"]
                if not item["data"]:
                    continue
            self._put(name, item)
        frames = [a for a in arrays if self._is_frames(a)]
        # frames first: they tell how many points an event holds
        for array in [*frames, *(a for a in arrays if a not in frames)]:
            self._array(array, numbers.get(array.stream, []), stop)
        for label, block in self._references.finish():
            self._add(label, block)

    def _is_frames(self, array: Recorded) -> bool:
        return (array.stream, array.key) == (self._references.stream, self._references.frame_key)

    def _put(self, name: str, doc: Mapping[str, Any]) -> None:
        self.documents.append((name, doc))
        try:
            for label, block in self._references.document(name, doc, None):
                self._add(label, block)
        except ValueError as error:
            raise UnreadableError(str(error)) from None

    def _add(self, label: str, block: PointBlock) -> None:
        if label != "frames":
            self._positions[label].append(block)
            return
        last = self._blocks[-1].joined(block) if self._blocks else None
        if last is not None:
            self._blocks[-1] = last
        else:
            self._blocks.append(block)
        self._block_of[block.first : block.stop] = len(self._blocks) - 1

    def _array(
        self, array: Recorded, numbers: Sequence[int], stop: Mapping[str, Any] | None
    ) -> None:
        is_frames = self._is_frames(array)
        if is_frames:
            self._frames = array
            if len(array.shape) < 3:
                raise UnreadableError(f"{array.key} has shape {array.shape}, expected frames")
        elif array.array is not None:
            return
        # the order of a scan that was rewound is known from the table, where there is one
        known = len(numbers) == array.events
        seq_nums = np.asarray(numbers) if known else np.arange(1, array.events + 1)
        counted = count_of(((stop or {}).get("num_events") or {}).get(array.stream))
        points = self._references.points_per_event
        rewound = 0 < counted < array.events or array.events * points > self.grid.num_points
        if is_frames and not known and rewound:
            raise UnreadableError(
                f"{array.events} events with frames for {counted or self.grid.num_points}: "
                "the scan was rewound, and which of them it kept is not recorded"
            )
        cuts = np.flatnonzero(np.diff(seq_nums) != 1) + 1
        runs = [
            (int(a), int(b), int(seq_nums[a]))
            for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), array.events], strict=True)
            if b > a
        ]
        for resource, offset, first, stop_at in self._resources(array):
            self._put("stream_resource", resource)
            for a, b, seq_num in runs:
                low, high = max(a, first), min(b, stop_at)
                if low < high:
                    self._put(
                        "stream_datum",
                        {
                            "uid": f"{resource['uid']} {low}",
                            "stream_resource": resource["uid"],
                            "descriptor": array.stream,
                            "indices": {"start": low + offset, "stop": high + offset},
                            "seq_nums": {"start": seq_num + low - a, "stop": seq_num + high - a},
                        },
                    )

    def _resources(self, array: Recorded) -> Iterator[tuple[dict[str, Any], int, int, int]]:
        """Yield documents of files, what to add to an event's number in them, and the events."""
        if array.array is not None:
            uid = f"{array.stream}/{array.key}"
            yield stored_by_tiled(uid, array.key, array.frames_per_event), 0, 0, array.events
            return
        if not array.files:
            return
        document = {
            "data_key": array.key,
            "mimetype": array.mimetype,
            "parameters": array.parameters,
        }
        if array.parameters.get("slice"):
            raise UnreadableError(f"{array.key} is a slice of a dataset, which is not supported")
        if "tiff" in array.mimetype and array.mimetype != NUMBERED_TIFF:
            yield from self._sequences(array, document)
            return
        first = 0
        for number, uri in enumerate(array.files):
            stop = array.events
            resource = document | {"uid": f"{array.stream}/{array.key}/{number}", "uri": uri}
            if number < len(array.files) - 1:
                stop = min(stop, first + self._events_in(array, resource))
            yield resource, -first, first, stop
            first = stop

    def _events_in(self, array: Recorded, resource: Mapping[str, Any]) -> int:
        """How many events a file holds: Tiled tells only of all files together."""
        rows = Resource.parse(resource, {}).rows
        try:
            shape = self._reader.shape(rows.path, rows.dataset)
        except (NeverError, NotYetError) as error:
            raise UnreadableError(f"{rows.path}: {error}") from None
        if self._is_frames(array):
            return math.prod(shape[:-2]) // max(1, array.frames_per_event)
        return shape[0]

    def _sequences(
        self, array: Recorded, document: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], int, int, int]]:
        """Yield stretches of files that are numbered one after the other."""
        per_event = array.frames_per_event
        total = array.events * per_event
        if total % len(array.files):
            raise UnreadableError(f"{total} frames in {len(array.files)} files")
        per_file = total // len(array.files)
        at = 0
        while at < len(array.files):
            folder, _, name = array.files[at].rpartition("/")
            found = list(_NUMBER.finditer(name))
            if not found or "{" in name or "%" in name:
                raise UnreadableError(f"{array.files[at]}: expected a file with a number")
            begin, width = int(found[-1][1]), len(found[-1][1])
            head, tail = name[: found[-1].start(1)], name[found[-1].end(1) :]
            stop = at
            while stop < len(array.files) and array.files[stop] == (
                f"{folder}/{head}{begin + stop - at:0{width}d}{tail}"
            ):
                stop += 1
            frames = [n * per_file for n in (begin, at, stop)]
            if any(n % per_event for n in frames):
                raise UnreadableError(f"{array.files[at]}: events do not begin with a file")
            offset, low, high = (n // per_event for n in frames)
            parameters = {"template": f"{head}{{:0{width}d}}{tail}", "chunk_shape": [per_file]}
            uid = f"{array.stream}/{array.key}/{at}"
            resource = {"uid": uid, "uri": f"{folder}/", "parameters": parameters}
            yield document | resource, offset - low, low, high
            at = stop

    def _check_files(self) -> None:
        """Raise where a file cannot be read, or has frames of another shape."""
        seen: dict[tuple[str, str], None] = {}
        for block in self._blocks:
            if block.problem:
                raise UnreadableError(block.problem)
            if block.stored and block.stored.path and not block.stored.rows_per_file:
                seen[block.stored.path, block.stored.dataset] = None
        self._reader.reopen(path for path, _ in seen)
        for path, dataset in seen:
            try:
                shape = self._reader.shape(path, dataset)
            except NotYetError as error:
                if not self.closed:
                    continue
                raise UnreadableError(str(error)) from None
            except NeverError as error:
                raise UnreadableError(f"{path}:{dataset}: {error}") from None
            if tuple(shape[-2:]) != tuple(self.frame_shape):
                raise UnreadableError(
                    f"{path}:{dataset} has frames of {shape[-2:]}, the run says {self.frame_shape}"
                )


class _Sums:
    """Intensities, and the sum of the patterns, of the points read so far."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._sources = np.zeros(0, np.int64)
        self.done = np.zeros(0, bool)
        self.intensity = np.zeros(0)
        self._total = np.zeros((0, 0))

    def begin(self, points: int, shape: tuple[int, int], sources: NDArray[np.int64]) -> None:
        """Forget all if a point's frame lies elsewhere than it did."""
        if len(self.done) != points + 1 or (sources != self._sources)[self.done].any():
            self.done = np.zeros(points + 1, bool)
            self.intensity = np.full(points + 1, np.nan)
            self._total = np.zeros(shape)
        self._sources = sources

    def add(self, points: NDArray[Any], patterns: NDArray[np.float32]) -> None:
        """Take patterns (n, ny, nx) of points (n,) that are new."""
        self.done[points] = True
        self.intensity[points] = patterns.sum(axis=(1, 2), dtype=np.float64)
        self._total += patterns.sum(axis=0, dtype=np.float64)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean pattern (ny, nx); NaN without any."""
        count = int(self.done.sum())
        return self._total / count if count else np.full(self._total.shape, np.nan)
