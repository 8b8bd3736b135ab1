"""Views on catalogues of runs: what Tiled serves under ``maps/`` and ``scans/``.

A view has the runs of a catalogue under their uids, found by the same queries, and shows each
as arrays on its scan grid. Nothing is stored, and nothing can be written through it.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import xarray as xr
from anyio import to_thread
from cachetools import LRUCache
from fastapi import HTTPException, WebSocketException
from numpy.typing import NDArray
from tiled.adapters.core import Adapter
from tiled.catalog.adapter import CatalogContainerAdapter, from_uri
from tiled.queries import AccessTagsFilter, Eq
from tiled.server.core import NoEntry
from tiled.structures.array import ArrayStructure, BuiltinDtype
from tiled.structures.container import ContainerStructure
from tiled.structures.core import Spec, StructureFamily
from tiled.utils import UnsupportedQueryType

from nanobeam_bluesky.documents import FrameReader, read_documents
from nanobeam_bluesky.documents.maps import derived_scan, to_maps
from nanobeam_bluesky.documents.roots import Roots
from nanobeam_bluesky.geometry import ROI, GeometryError
from nanobeam_bluesky.models import Estimates
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.tiled_adapters.computed import BusyError, Computer
from nanobeam_bluesky.tiled_adapters.confined import folders_of
from nanobeam_bluesky.tiled_adapters.scans import Scan, UnreadableError, recorded

__all__ = ["maps", "scans"]

MAPS_BYTES = 256_000_000
"""Maps of closed runs that are kept."""
KEPT_SCANS = 12
"""Raw scans that are kept, each with its open files."""
FRESH_SECONDS = 0.5
"""How old what is known of a running scan may be."""
MAX_POINTS = 10_000_000
RESPONSE_BYTES = 300_000_000
"""Larger answers Tiled refuses, though only once they are made."""
BLOCK_BYTES = 16_000_000

Index = tuple[Any, ...]
"""What to take along each axis: a number or a slice."""


def maps(
    uri: str,
    *,
    readable_storage: Sequence[str] = (),
    mount_node: str = "derived",
    specs: Sequence[Mapping[str, str]] = (),
    compute: Mapping[str, Any] | None = None,
) -> CatalogContainerAdapter:
    """Return a tree of maps: every derived run of a catalogue as one ``xarray.Dataset``.

    For the ``trees`` of a Tiled configuration.

    Parameters
    ----------
    uri
        Of the catalogue's database.
    readable_storage
        Where the tables of the catalogue are: its own readable and writable storage.
    mount_node
        Container of the runs in that database.
    specs
        Of the tree itself.
    compute
        Where the uid of a raw run is asked for, show its newest complete derived run, else its
        newest; if there is none, analyse it, in a process of its own, one run at a time. Its
        "folder" keeps what comes out; "mount_node" ("raw"), "preset" and "root_map" are as for
        `scans`.
    """
    found = from_uri(uri, readable_storage=list(readable_storage), specs=list(specs))
    view = _Maps(found.context, found.node, mount_path=_segments(mount_node))
    if compute:
        given = {"mount_node": "raw", "preset": "auto", "root_map": None} | dict(compute)
        folder = given.pop("folder")
        raw = scans(uri, readable_storage=readable_storage, **given)
        given.pop("mount_node")
        computer = Computer(folder, roots=folders_of(found.context), **given)
        view.compute = _Compute(raw, computer)
        view.startup_tasks += raw.startup_tasks
        view.shutdown_tasks += [partial(to_thread.run_sync, computer.close), *raw.shutdown_tasks]
    return view


def scans(
    uri: str,
    *,
    readable_storage: Sequence[str] = (),
    mount_node: str = "raw",
    specs: Sequence[Mapping[str, str]] = (),
    preset: str = "auto",
    root_map: Mapping[str, str] | None = None,
) -> _Scans:
    """Return a tree of raw scans on their grids: frames, patterns, intensity, positions.

    Parameters
    ----------
    uri, mount_node, specs
        As for `maps`.
    readable_storage
        As for `maps`, with the folders of detector files. Files elsewhere are refused, by
        whatever link they are named.
    preset
        Where a run's metadata are; "auto" takes the first shipped preset that matches.
    root_map
        Folders of the documents' paths → where they are mounted here.
    """
    found = from_uri(uri, readable_storage=list(readable_storage), specs=list(specs))
    reader = FrameReader(roots=Roots(folders_of(found.context)), refresh=False)
    settings = _Settings(Preset.choices(preset), reader, root_map)
    return _Scans(found.context, found.node, settings=settings, mount_path=_segments(mount_node))


def _segments(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment]


# ----------------------------------------------------------------------- arrays and runs


def _no_stream(self: Any, *_: Any) -> Any:
    """Refuse those who subscribe: what is new is told by the catalogue behind the view."""
    raise WebSocketException(1008, "a view: subscribe to the run in the catalogue behind it")


class _Array(Adapter[ArrayStructure]):
    """An array that is made, or read, when it is asked for."""

    structure_family = StructureFamily.array
    make_ws_handler = _no_stream

    def __init__(
        self,
        run: Any,
        shape: Sequence[int],
        dtype: Any,
        dims: Sequence[str],
        load: Callable[[Index], Awaitable[NDArray[Any]]],
        *,
        units: str = "",
        spec: str = "xarray_data_var",
        whole: int = 0,
    ) -> None:
        """`load` takes numbers or slices along each axis; the last `whole` axes stay in a chunk."""
        dtype = np.dtype(dtype)
        chunks = _chunks(tuple(shape), dtype.itemsize, whole)
        super().__init__(
            ArrayStructure(
                data_type=BuiltinDtype.from_numpy_dtype(dtype),
                shape=tuple(shape),
                chunks=chunks,
                dims=tuple(dims),
            ),
            metadata={"attrs": {"units": units}},
            specs=[*_kinds(dims), Spec(spec)],
        )
        self._run = run
        self._load = load
        self._name = ""
        self._siblings: Mapping[str, _Array] = {}

    @property
    def access_tags(self) -> Any:
        return self._run.access_tags

    def along(self, dim: str) -> _Array:
        """Return the same along another dimension."""
        other = copy.copy(self)
        other._structure = replace(self._structure, dims=(dim,))
        return other

    def among(self, name: str, siblings: Mapping[str, _Array]) -> None:
        """Tell the array its name and what else the run has."""
        if not self._name:
            self._name, self._siblings = name, siblings

    async def read(self, slice: Any = ...) -> NDArray[Any]:
        """Return a slice of the whole."""
        index = _index(slice, len(self._structure.shape))
        kept = [
            len(range(n)[i]) if isinstance(i, _slice) else 1
            for n, i in zip(self._structure.shape, index, strict=True)
        ]
        size = math.prod(kept) * self._structure.data_type.to_numpy_dtype().itemsize
        if size > RESPONSE_BYTES:
            raise HTTPException(400, f"{size} bytes at once: ask for a slice, or for blocks")
        # an exporter is given the values and this
        self._metadata: dict[str, Any] = self._metadata | {
            "labelled": partial(self._labelled, index)
        }
        return await self._load(index)

    async def _labelled(self, index: Index, values: NDArray[Any]) -> xr.DataArray:
        """Return what was read with its name, units and coordinates."""
        coords: dict[str, Any] = {}
        kept = []
        for dim, chosen in zip(self._structure.dims, index, strict=True):
            if not isinstance(chosen, _slice):
                if dim in ("row", "col"):
                    coords[dim] = chosen
                continue
            kept.append(dim)
            for name, other in self._siblings.items():
                if other.structure().dims == (dim,):
                    coords[name] = (dim, await other.read((chosen,)), other.metadata()["attrs"])
        attrs = self.metadata()["attrs"] | {"start": self._run.metadata()["start"]}
        return xr.DataArray(values, coords, kept, self._name, attrs)

    async def read_block(self, block: Any, slice: Any = ...) -> NDArray[Any]:
        """Return a slice of a block."""
        values = await self._load(tuple(block.slice_from_chunks(self._structure.chunks)))
        try:
            return values[_index(slice, values.ndim)]
        except IndexError as error:  # which Tiled would answer by 500
            raise HTTPException(400, str(error)) from None


_slice = slice
_MAPS, _SCAN = Spec("NanobeamMaps", "1.0"), Spec("NanobeamScan", "1.0")
_MAP, _PATTERNS = Spec("NanobeamMap", "1.0"), Spec("NanobeamPatterns", "1.0")


def _kinds(dims: Sequence[str]) -> list[Spec]:
    """Say what an array shows: exporters go by it."""
    if len(dims) < 2:
        return []
    return [_MAP if tuple(dims) == ("row", "col") else _PATTERNS]


def _index(given: Any, ndim: int) -> Index:
    """Return one number or slice for each axis."""
    items = list(given) if isinstance(given, tuple) else [given]
    for at, item in enumerate(items):
        if item is Ellipsis:
            items[at : at + 1] = [slice(None)] * (ndim + 1 - len(items))
            break
    if len(items) > ndim:
        raise HTTPException(422, f"slice has {len(items)} dimensions, the array {ndim}")
    if any(isinstance(item, slice) and item.step == 0 for item in items):
        raise HTTPException(422, "slice step cannot be zero")
    items += [slice(None)] * (ndim - len(items))
    return tuple(items)


def _chunks(shape: tuple[int, ...], itemsize: int, whole: int) -> tuple[tuple[int, ...], ...]:
    """Split all but the last axes, `whole` of them: (1, …, several, whole, whole)."""
    split = len(shape) - whole
    room = BLOCK_BYTES // (itemsize * max(1, math.prod(shape[split:])))
    chunks = []
    for axis in range(len(shape) - 1, -1, -1):
        length = shape[axis]
        size = length if axis >= split else max(1, min(length, room))
        if axis < split:
            room //= max(1, length)
        chunks.append((size,) * (length // size) + ((length % size,) if length % size else ()))
    return tuple(reversed(chunks))


class _Run(Adapter[ContainerStructure]):
    """One run as arrays; without any where there is a problem, which every request is told."""

    structure_family = StructureFamily.container
    make_ws_handler = _no_stream

    def __init__(
        self,
        run: Any,
        children: Mapping[str, _Array],
        *,
        metadata: Mapping[str, Any],
        specs: Sequence[Spec] = (),
        source: Any = None,
    ) -> None:
        """`source` is what exporters read: of maps their maker, of a raw run its `Scan`."""
        super().__init__(
            ContainerStructure(keys=list(children)),
            metadata=(run.metadata() or {}) | dict(metadata),
            specs=list(specs),
        )
        self.node = run.node
        self.source = source
        self._run = run
        self._children = dict(children)
        for name, child in self._children.items():
            child.among(name, self._children)

    def __dask_tokenize__(self) -> str:
        """Be new each time: Tiled's ETag knows nothing of what arrays of a run come to."""
        return uuid.uuid4().hex

    @property
    def access_tags(self) -> Any:
        return self._run.access_tags

    def __len__(self) -> int:
        return len(self._children)

    def _check(self) -> None:
        if self._metadata.get("computing"):
            raise HTTPException(503, "being computed: ask again", headers={"Retry-After": "2"})
        problem = self._metadata.get("problem")
        if problem:
            raise HTTPException(422, problem)

    async def lookup_adapter(self, segments: Sequence[str]) -> _Array | _Run:
        """Return an array."""
        if not segments:
            return self
        if segments[0] in self._children and len(segments) == 1:
            return self._children[segments[0]]
        self._check()
        raise NoEntry(list(segments))

    async def keys_range(self, offset: int = 0, limit: int | None = None) -> list[str]:
        """Return names."""
        return [key for key, _ in await self.items_range(offset, limit)]

    async def items_range(
        self, offset: int = 0, limit: int | None = None
    ) -> list[tuple[str, _Array]]:
        """Return names and arrays."""
        stop = None if limit is None else offset + limit
        return list(self._children.items())[offset:stop]

    async def keys_page(
        self, cursor: int | None = None, limit: int | None = None
    ) -> tuple[list[str], int | None]:
        """Return names, and where the next page begins."""
        items, following = await self.items_page(cursor, limit)
        return [key for key, _ in items], following

    async def items_page(
        self, cursor: int | None = None, limit: int | None = None
    ) -> tuple[list[tuple[str, _Array]], int | None]:
        """Return names and arrays, and where the next page begins."""
        items = await self.items_range(cursor or 0, limit)
        following = (cursor or 0) + len(items)
        return items, following if following < len(self) and items else None

    async def cursor_for_offset(self, offset: int) -> int | None:
        """Return where a page begins."""
        return offset or None

    def _with(self, children: Mapping[str, _Array]) -> _Run:
        return _Run(
            self._run,
            children,
            metadata=self._metadata,
            specs=self._specs,
            source=self.source,
        )

    def sort(self, sorting: Sequence[tuple[str, int]]) -> _Run:
        """Reverse, or not: the arrays have an order of their own."""
        items = list(self._children.items())
        return self._with(dict(items[::-1] if sorting and sorting[0][1] < 0 else items))

    def search(self, query: Any) -> _Run:
        """Return the same: who may see a run may see its arrays."""
        if isinstance(query, AccessTagsFilter):
            return self
        raise UnsupportedQueryType(type(query).__name__)

    async def read(self, fields: Sequence[str] | None = None) -> _Run:
        """Return what an exporter writes."""
        self._check()
        if not fields:
            return self
        chosen = {name: self._children[name] for name in fields}
        shapes = {a.structure().shape for a in chosen.values()}
        if len(chosen) > 1 and len(shapes) == 1 and len(next(iter(shapes))) == 1:
            # Tiled's xarray client asks for the coordinates of a square map as columns of one
            # table, which two dimensions would make one of n × n rows
            chosen = {name: a.along("point") for name, a in chosen.items()}
        return self._with(chosen)


# ------------------------------------------------------------------------- the catalogues


class _View(CatalogContainerAdapter):
    """A catalogue whose runs are shown otherwise; searched, sorted and paged as it is."""

    make_ws_handler = _no_stream

    async def lookup_adapter(self, segments: Sequence[str]) -> Any:
        """Return a run, or an array of one."""
        if not segments:
            return self
        found = await self._opened(await super().lookup_adapter(list(segments[:1])))
        return await found.lookup_adapter(segments[1:])

    async def items_page(self, *args: Any, **options: Any) -> Any:
        """Return runs, and where the next page begins."""
        items, cursor = await super().items_page(*args, **options)
        return [(key, self._listed(run)) for key, run in items], cursor

    async def items_range(self, *args: Any, **options: Any) -> Any:
        """Return runs."""
        items = await super().items_range(*args, **options)
        return [(key, self._listed(run)) for key, run in items]

    async def read(self, *args: Any, **options: Any) -> Any:
        """Refuse: that would read every run."""
        raise HTTPException(400, "all runs at once: ask for one")

    @property
    def search_deep(self) -> Any:
        """Absent: what lies in the runs of the catalogue does not lie in those of the view."""
        raise AttributeError("search_deep")

    def _listed(self, run: Any) -> _Run:
        """Return a run as far as its metadata tell of it: a list may be long."""
        raise NotImplementedError

    async def _opened(self, run: Any) -> _Run:
        """Return a run with all there is to know of it."""
        raise NotImplementedError

    async def create_node(self, *args: Any, **options: Any) -> Any:
        """Refuse to write, as do all that follow."""
        raise HTTPException(405, "this is a view on another catalogue: write there")

    delete = replace_metadata = put_data_source = create_node
    delete_revision = delete_asset = close_stream = create_node


@dataclass
class _Kept:
    """What all variations of a view share."""

    maps: LRUCache[Any, xr.Dataset] = field(
        default_factory=lambda: LRUCache(MAPS_BYTES, getsizeof=lambda maps: maps.nbytes)
    )
    computed: LRUCache[Path, _Computed] = field(
        default_factory=lambda: LRUCache(MAPS_BYTES, getsizeof=lambda run: run.maps.nbytes)
    )
    scans: LRUCache[Any, tuple[float, Scan | str]] = field(
        default_factory=lambda: LRUCache(KEPT_SCANS)
    )
    locks: WeakValueDictionary[Any, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    def making(self, key: Any) -> asyncio.Lock:
        """Return what is held while something is made, so that it is made once."""
        return self.locks.setdefault(key, asyncio.Lock())


@dataclass(frozen=True)
class _Compute:
    """What makes maps of raw runs."""

    raw: _Scans
    computer: Computer


@dataclass(frozen=True)
class _Computed:
    """A derived run that is in no catalogue."""

    node: Any
    access_tags: Any
    documents: tuple[Any, Any]
    """Start and stop."""
    maps: xr.Dataset

    def metadata(self) -> dict[str, Any]:
        return {"start": self.documents[0], "stop": self.documents[1], "computed": True}


def _kept_on(path: Path, raw: Any) -> _Computed:
    """Read what was computed for a raw run."""
    documents = list(read_documents(path))
    (_, start), (_, stop) = documents[0], documents[-1]
    return _Computed(raw.node, raw.access_tags, (start, stop), to_maps(documents))


class _Maps(_View):
    def __init__(
        self,
        context: Any,
        node: Any,
        *,
        kept: _Kept | None = None,
        compute: _Compute | None = None,
        **options: Any,
    ):
        super().__init__(context, node, **options)
        self._kept = kept or _Kept()
        self.compute = compute

    def new_variation(self, *args: Any, **options: Any) -> Any:
        return super().new_variation(*args, kept=self._kept, compute=self.compute, **options)

    async def lookup_adapter(self, segments: Sequence[str]) -> Any:
        try:
            return await super().lookup_adapter(segments)
        except NoEntry:
            if self.compute is None:
                raise
        found = await self._of_raw(segments[0])
        return await found.lookup_adapter(segments[1:])

    async def _of_raw(self, uid: str) -> _Run:
        """Return the maps of a raw run: of its newest derived run, else computed."""
        assert self.compute is not None
        limits = {"conditions": self.conditions, "access_filters": self.access_filters}
        view = self.compute.raw.new_variation(**limits)
        raw = await CatalogContainerAdapter.lookup_adapter(view, [uid])
        derived = self.search(Eq("start.original_run_uid", uid)).sort([("start.time", -1)])
        for found in (derived.search(Eq("stop.exit_status", "success")), derived):
            for _, run in await CatalogContainerAdapter.items_range(found, 0, 1):
                return await self._opened(run)
        metadata = raw.metadata()
        if not metadata.get("stop"):
            problem = "no derived run yet, and it still goes on"
            return _Run(raw, {}, metadata={"problem": problem}, specs=[_MAPS])
        try:
            scan = await view.scan(raw)
            if not isinstance(scan, Scan):
                raise UnreadableError(scan)
            if not scan.is_in_files:
                raise UnreadableError("its frames are in Tiled's own storage: not computed")
            documents = [
                ("start", metadata["start"]), *scan.documents, ("stop", metadata["stop"])
            ]  # fmt: skip
            path = await to_thread.run_sync(self.compute.computer.result, documents)
            if path is None:
                return _Run(raw, {}, metadata={"computing": True}, specs=[_MAPS])
            run = self._kept.computed.get(path)
            if run is None:
                run = await to_thread.run_sync(_kept_on, path, raw)
                if run.maps.nbytes <= MAPS_BYTES:
                    self._kept.computed[path] = run
        except (GeometryError, UnreadableError) as error:
            return _Run(raw, {}, metadata={"problem": str(error)}, specs=[_MAPS])
        except BusyError as error:
            raise HTTPException(503, f"{error}: ask again", headers={"Retry-After": "10"}) from None
        return self._listed(run, {str(name): run.maps[name].units for name in run.maps.variables})

    def _listed(self, run: Any, units: Mapping[str, Any] | None = None) -> _Run:
        try:
            scan = derived_scan(_checked(run))
            if math.prod(scan.shape) > MAX_POINTS or min(scan.shape) < 1:
                raise UnreadableError(f"shape = {list(scan.shape)}: more points than can be")
        except UnreadableError as error:
            # with the spec too: its client says why there are no maps
            return _Run(run, {}, metadata={"problem": str(error)}, specs=[_MAPS])
        start = run.metadata()["start"]
        units = dict.fromkeys(scan.motors, "") | Estimates.UNITS | dict(units or {})
        children = {
            name: self._array(run, scan.shape, name, units[name]) for name in Estimates.UNITS
        }
        for axis, motor in enumerate(scan.motors):
            key = f"{motor}_measured"
            children[key] = self._array(run, scan.shape, key, units[motor], motor)
            shape, dims = (scan.shape[axis],), (("row", "col")[axis],)
            load = partial(self._load, run, motor, motor)
            children[motor] = _Array(
                run, shape, "f8", dims, load, units=units[motor], spec="xarray_coord"
            )
        attrs = {"original_run_uid": start["original_run_uid"], "uid": start["uid"]}
        specs = [_MAPS, Spec("xarray_dataset")]
        source = partial(self._dataset, run, units)
        return _Run(run, children, metadata={"attrs": attrs}, specs=specs, source=source)

    def _array(
        self, run: Any, shape: tuple[int, int], name: str, units: str, column: str = ""
    ) -> _Array:
        # Tiled's web page draws no integers of 8 bytes
        dtype = "i4" if name == "flags" else "f8"
        load = partial(self._load, run, name, column or name)
        return _Array(run, shape, dtype, ("row", "col"), load, units=units)

    async def _opened(self, run: Any) -> _Run:
        try:
            keys = (await run.lookup_adapter(["primary"])).metadata()["data_keys"]
            units = {k: v.get("units") or "" for k, v in keys.items()}
        except (AttributeError, KeyError, NoEntry):
            units = {}
        return self._listed(run, units)

    async def _dataset(self, run: Any, units: Mapping[str, str]) -> xr.Dataset:
        """Return all maps of a run, with their units."""
        maps = (await self._maps(run)).copy()
        for name, values in maps.variables.items():
            key = str(name) if name in units else str(name).removesuffix("_measured")
            values.attrs["units"] = units[key]
        return maps

    async def _load(self, run: Any, name: str, column: str, index: Index) -> NDArray[Any]:
        values = (await self._maps(run, column))[name].to_numpy()[index]
        return values.astype("i4") if name == "flags" else values

    async def _maps(self, run: Any, column: str = "") -> xr.Dataset:
        """Return all maps of a closed run; of one that goes on, those of a column if named."""
        if isinstance(run, _Computed):
            return run.maps
        start = run.metadata()["start"]
        if not run.metadata().get("stop"):
            wanted = {column, "flags", "row", "col"} if column else None
            return await _put_on_grid(run, start, wanted)
        key = (run.node.id, run.node.time_updated)
        if key not in self._kept.maps:
            async with self._kept.making(key):
                if key not in self._kept.maps:
                    maps = await _put_on_grid(run, start, None)
                    if maps.nbytes <= MAPS_BYTES:
                        self._kept.maps[key] = maps
                    return maps
        return self._kept.maps[key]


def _checked(run: Any) -> Mapping[str, Any]:
    """Return the start document of a derived run that has maps."""
    metadata = run.metadata() or {}
    start = metadata.get("start")
    if not isinstance(start, Mapping) or "original_run_uid" not in start or "uid" not in start:
        raise UnreadableError("no derived run: original_run_uid is missing in its start document")
    if "shape" not in start:
        reason = (metadata.get("stop") or {}).get("reason") or "its start document has no shape"
        raise UnreadableError(f"it failed before its first point: {reason}")
    try:
        derived_scan(start)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UnreadableError(
            f"its start document does not describe a scan: {type(error).__name__}: {error}"
        ) from None
    return start


async def _put_on_grid(run: Any, start: Mapping[str, Any], wanted: set[str] | None) -> xr.Dataset:
    documents: list[tuple[str, Any]] = [("start", {"nanobeam": {}} | dict(start))]
    try:
        table = await run.lookup_adapter(["primary", "internal"])
        known = set(table.structure().columns)
        scan = derived_scan(start)
        wanted = wanted or {*Estimates.UNITS, *scan.motors, "row", "col"}
        columns = await table.read(fields=sorted(wanted & known))
        data = {name: columns[name].to_numpy() for name in columns.columns}
        documents.append(("event_page", {"data": data}))
    except NoEntry:
        pass  # no point yet
    try:
        return await to_thread.run_sync(to_maps, documents)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise HTTPException(422, f"its points are not those of a scan: {error}") from None


# --------------------------------------------------------------------------- raw scans


@dataclass(frozen=True)
class _Settings:
    presets: tuple[Preset, ...]
    reader: FrameReader
    root_map: Mapping[str, str] | None


class _Scans(_View):
    def __init__(
        self,
        context: Any,
        node: Any,
        *,
        settings: _Settings,
        kept: _Kept | None = None,
        **options: Any,
    ):
        super().__init__(context, node, **options)
        self._settings = settings
        self._kept = kept or _Kept()

    def new_variation(self, *args: Any, **options: Any) -> Any:
        return super().new_variation(*args, settings=self._settings, kept=self._kept, **options)

    def _listed(self, run: Any) -> _Run:
        try:
            self._preset(run)
        except (GeometryError, UnreadableError) as error:
            return _Run(run, {}, metadata={"problem": str(error)}, specs=[_SCAN])
        return _Run(run, {}, metadata={}, specs=[_SCAN])

    def _preset(self, run: Any) -> Preset:
        """Return the preset of a run that is a scan."""
        start = (run.metadata() or {}).get("start")
        if not isinstance(start, Mapping) or "uid" not in start:
            raise UnreadableError("no Bluesky run: it has no start document")
        presets = self._settings.presets
        preset = next((p for p in presets if p.matches(start)), None)
        if preset is None:
            reasons = "; ".join(f"{p.name}: {p.mismatch(start)}" for p in presets)
            raise UnreadableError(f"no SXDM scan: {reasons}")
        grid = preset.scan_metadata(start)
        if math.prod(grid.shape) > MAX_POINTS:
            raise UnreadableError(f"shape = {list(grid.shape)}: more points than can be")
        taken = {"frames", "patterns", "intensity", "mean_pattern"}
        if len({*grid.motors, *taken}) < len(taken) + 2:
            raise UnreadableError(f"motors = {list(grid.motors)}: these names are taken")
        return preset

    async def _opened(self, run: Any) -> _Run:
        listed = self._listed(run)
        if listed.metadata().get("problem"):
            return listed
        scan = await self.scan(run)
        if isinstance(scan, str):
            return _Run(run, {}, metadata={"problem": scan}, specs=[_SCAN])
        rows, cols = scan.grid.scan.shape
        motors = scan.grid.scan.motors
        make = partial(_Array, run)
        read = partial(_read, scan)
        children = {
            "frames": make(
                (rows, cols, *scan.frame_shape),
                scan.dtype,
                ("row", "col", "y", "x"),
                partial(read, _frames),
                units="counts",
                whole=2,
            )
        }
        if scan.geometry is not None:
            pattern = scan.geometry.pattern_shape
            dims = ("row", "col", "ny", "nx")
            children |= {
                "patterns": make(
                    (rows, cols, *pattern),
                    "f4",
                    dims,
                    partial(read, _patterns),
                    units="counts",
                    whole=2,
                ),
                "intensity": make(
                    (rows, cols), "f8", dims[:2], partial(read, _intensity), units="counts"
                ),
                "mean_pattern": make(pattern, "f8", dims[2:], partial(read, _mean), units="counts"),
            }
        for axis, motor in enumerate(motors):
            units = scan.units[motor]
            children[f"{motor}_measured"] = make(
                (rows, cols), "f8", ("row", "col"), partial(read, _measured, motor), units=units
            )
            children[motor] = make(
                ((rows, cols)[axis],),
                "f8",
                (("row", "col")[axis],),
                partial(read, _coordinate, axis),
                units=units,
                spec="xarray_coord",
            )
        notes = {"note": scan.note} if scan.note else {}
        if scan.problem:
            notes["note"] = f"no patterns: {scan.problem}"
        return _Run(run, children, metadata=notes, specs=[_SCAN], source=scan)

    async def scan(self, run: Any) -> Scan | str:
        """Return a scan, or why it cannot be read; what is closed, or fresh, is kept."""
        metadata = run.metadata()
        key = (run.node.id, bool(metadata.get("stop")))
        found = self._kept.scans.get(key)
        if found is not None and (key[1] or time.monotonic() - found[0] < FRESH_SECONDS):
            return found[1]
        async with self._kept.making(key):
            found = self._kept.scans.get(key)
            now = time.monotonic()
            if found is not None and (key[1] or now - found[0] < FRESH_SECONDS):
                return found[1]
            preset = self._preset(run)
            grid = preset.scan_metadata(metadata["start"])
            wanted = {grid.positions[m].key if m in grid.positions else m for m in grid.motors}
            items = [item async for item in recorded(run, wanted)]
            make = partial(
                Scan,
                metadata["start"],
                metadata.get("stop"),
                preset,
                items,
                self._settings.reader,
                root_map=self._settings.root_map,
                earlier=found[1] if found and isinstance(found[1], Scan) else None,
            )
            scan: Scan | str
            try:
                scan = await to_thread.run_sync(make)
            except (UnreadableError, GeometryError) as error:
                scan = str(error)
            self._kept.scans[key] = now, scan
            return scan


async def _read(scan: Scan, what: Callable[..., NDArray[Any]], *arguments: Any) -> NDArray[Any]:
    """Read in a thread what the last argument, an index, chooses."""
    try:
        return await to_thread.run_sync(what, scan, *arguments)
    except UnreadableError as error:
        raise HTTPException(422, str(error)) from None


def _frames(scan: Scan, index: Index) -> NDArray[Any]:
    (rows, cols), (ys, xs) = _chosen(scan.grid.scan.shape, index[:2]), index[2:]
    lines, columns = _chosen(scan.frame_shape, (ys, xs))
    if not (rows.size and cols.size and lines.size and columns.size):
        return np.zeros((rows.size, cols.size, lines.size, columns.size), scan.dtype)[
            _dropped(index)
        ]
    row, col = int(lines.min()), int(columns.min())
    roi = ROI(
        row=row,
        col=col,
        height=int(lines.max()) + 1 - row,
        width=int(columns.max()) + 1 - col,
    )
    frames = scan.frames(rows, cols, roi)
    if lines.size < roi.height or columns.size < roi.width or any(_is_back(s) for s in (ys, xs)):
        frames = frames[:, :, (lines - row)[:, None], columns - col]
    return frames[_dropped(index)]


def _patterns(scan: Scan, index: Index) -> NDArray[Any]:
    rows, cols = _chosen(scan.grid.scan.shape, index[:2])
    return scan.patterns(rows, cols)[_dropped(index[:2])][
        tuple(slice(None) for i in index[:2] if isinstance(i, slice)) + index[2:]
    ]


def _intensity(scan: Scan, index: Index) -> NDArray[Any]:
    return scan.sums()[0][index]


def _mean(scan: Scan, index: Index) -> NDArray[Any]:
    return scan.sums()[1][index]


def _measured(scan: Scan, motor: str, index: Index) -> NDArray[Any]:
    return scan.positions()[motor][index]


def _coordinate(scan: Scan, axis: int, index: Index) -> NDArray[Any]:
    return scan.coordinates(scan.positions())[axis][index]


def _chosen(shape: Sequence[int], index: Index) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the numbers that an index chooses along two axes."""
    first, second = (np.atleast_1d(np.arange(n)[i]) for n, i in zip(shape, index, strict=True))
    return first, second


def _dropped(index: Index) -> Index:
    """Return an index that drops the axes of which one number was chosen."""
    return tuple(slice(None) if isinstance(i, slice) else 0 for i in index)


def _is_back(item: Any) -> bool:
    return isinstance(item, slice) and (item.step or 1) < 0
