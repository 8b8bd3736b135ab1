"""Stored runs, wherever they are: catalogues of Tiled and databroker, documents, files of these."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow
from bluesky_tiled_plugins.queries import Key, PartialUID, TimeRange
from tiled.client import from_profile, from_uri
from tiled.client.container import Container
from tiled.ndslice import NDSlice
from tiled.queries import SpecsQuery
from tiled.structures.core import StructureFamily
from tiled.utils import APACHE_ARROW_FILE_MIME_TYPE

from nanobeam_bluesky.documents import Document, FrameReader, PointBlock, read_documents
from nanobeam_bluesky.documents.replay import recorded_descriptor
from nanobeam_bluesky.documents.resources import Resource
from nanobeam_bluesky.geometry import ROI
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.tiled_adapters import open_catalog
from nanobeam_bluesky.tiled_adapters.scans import TABLE, Recorded, Scan, UnreadableError

__all__ = [
    "NoRunError",
    "Query",
    "RawRun",
    "Recording",
    "catalog_of_derived",
    "catalog_of_raw",
    "derived_runs",
    "find_catalog",
    "find_derived",
    "plain",
    "raw_runs",
    "scan_of",
    "writable_catalog",
]


class NoRunError(ValueError):
    """There is no such run, or none that can be used: says why."""


class Recording(NamedTuple):
    """What a stored run holds."""

    documents: Iterable[tuple[str, Mapping[str, Any]]]
    """All but its start, the stop at the end if there is one."""
    fill: Callable[[PointBlock, ROI], PointBlock]
    """Puts the frames into a block that refers to what only Tiled can read."""


@dataclass(frozen=True)
class RawRun:
    """A stored run."""

    start: Mapping[str, Any]
    recording: Callable[[Preset, Mapping[str, str]], Recording]
    """Finds, with a preset and a root map, where its frames and positions are."""
    asked_for: bool
    """Whether it was named, and not found among others."""
    node: Any = None
    """Tiled's client of it."""

    @property
    def uid(self) -> str:
        """Of the start document."""
        return str(self.start["uid"])


# ------------------------------------------------------------------------------ catalogues


def find_catalog(name: str | Path) -> Container:
    """Connect to a catalogue.

    Parameters
    ----------
    name
        Folder of an embedded catalogue, address of a Tiled server, or Tiled profile.

    Raises
    ------
    ValueError
        If there is none: says what was tried.
    """
    if Path(name).is_dir():
        if not (Path(name) / "catalog.db").is_file():
            raise ValueError(f"--catalog {name}: no catalogue in this folder")
        return open_catalog(name)
    text = str(name)
    try:
        return from_uri(text) if "://" in text else from_profile(text)
    except Exception as error:  # of httpx, or of the profile's parser
        raise ValueError(
            f"--catalog {without_key(text)}: expected a folder with a catalogue, the address of a "
            f"Tiled server, or a Tiled profile: {type(error).__name__}: {without_key(str(error))}"
        ) from None


def without_key(text: str) -> str:
    """Return a text without the keys in its addresses."""
    head, found, _ = text.partition("api_key=")
    return f"{head}{found}…" if found else text


def catalog_of_raw(catalog: Container) -> Container:
    """Return what runs are searched in: ``raw``, where a catalogue has that, or itself."""
    return catalog["raw"] if _is_root(catalog) else catalog


def catalog_of_derived(catalog: Any) -> Container | None:
    """Return the catalogue of derived runs beside a run, or a catalogue of runs; None without."""
    if _is_root(catalog):
        found: Container | None = catalog.get("derived")
        return found
    from nanobeam_bluesky.tiled_adapters.clients import beside, opened

    for path in beside(catalog, "derived"):
        if path[-1] == "derived":
            return opened(catalog, path)
    return None


def _is_root(catalog: Any) -> bool:
    return not _is_of_runs(catalog) and "raw" in catalog


def _is_of_runs(node: Any) -> bool:
    return any(spec.name in ("CatalogOfBlueskyRuns", "BlueskyRun") for spec in node.specs)


@dataclass(frozen=True)
class Query:
    """What is looked for; nothing: all runs."""

    plan_name: str | None = None
    since: str | None = None
    """Such as "2026-11" or "2026-11-23 05:00", in the local time zone."""
    until: str | None = None
    scan_id: Sequence[int] = ()
    """Any of these."""
    uid: Sequence[str] = ()
    """Any of these; the beginning of a uid is enough."""
    where: Sequence[str] = ()
    """KEY=VALUE of the start document, such as ``sample=film`` or ``optics.energy=9.6``."""

    def search(self, catalog: Container) -> Iterator[RawRun | NoRunError]:
        """Yield the runs of a catalogue that match, or what is wrong with one that is asked for.

        Raises
        ------
        ValueError
            If the query is not understood.
        """
        found = catalog_of_raw(catalog)
        if self.plan_name is not None:
            found = found.search(Key("start.plan_name") == self.plan_name)
        if self.since is not None or self.until is not None:
            try:
                # for its reading of times: only some clients can search by it
                times = TimeRange(since=self.since, until=self.until)
            except Exception as error:  # whatever its parser raises
                raise ValueError(
                    f"--since {self.since} --until {self.until}: expected a time such as "
                    f"2026-11-23 or '2026-11-23 05:00': {error}"
                ) from None
            if times.since is not None:
                found = found.search(Key("start.time") >= times.since)
            if times.until is not None:
                found = found.search(Key("start.time") < times.until)
        for condition in self.where:
            key, equals, value = condition.partition("=")
            if not (key and equals):
                raise ValueError(f"--where {condition}: expected KEY=VALUE, such as sample=film")
            try:
                parsed = json.loads(value)
            except ValueError:
                parsed = value
            if isinstance(parsed, list | dict):
                raise ValueError(f"--where {condition}: expected a text or a number as the value")
            found = found.search(Key(f"start.{key.removeprefix('start.')}") == parsed)
        if not self.uid and not self.scan_id:
            yield from _each(found)
        for uid in self.uid:
            try:
                yield _with_uid(found, uid)
            except NoRunError as error:
                yield error
        for number in self.scan_id:
            runs = list(_each(found.search(Key("start.scan_id") == number), asked_for=True))
            yield from runs
            if not runs:
                yield NoRunError(f"no run with scan_id {number}")


def _with_uid(catalog: Container, uid: str) -> RawRun:
    runs = list(_each(catalog.search(PartialUID(uid)), asked_for=True))
    if len(runs) != 1:
        raise NoRunError(f"{len(runs) or 'no'} runs whose uid begins with {uid}")
    return runs[0]


def _each(catalog: Container, *, asked_for: bool = False) -> Iterator[RawRun]:
    for node in catalog.values():
        if "uid" in (node.metadata.get("start") or {}):
            yield _of_tiled(node, asked_for)


def find_derived(catalog: Container, uid: str) -> Any:
    """Return Tiled's client of a derived run.

    Parameters
    ----------
    catalog
        Where it is, or the raw run; or a catalogue with both.
    uid
        Its own, or that of its raw run: then the newest complete one. The beginning is enough.

    Raises
    ------
    NoRunError
        If there is none, or several raw runs or derived runs have such a uid.
    """
    found = catalog_of_derived(catalog)
    derived = catalog if found is None else found  # which may be empty
    own = list(derived.search(PartialUID(uid)).values().head(2))
    if len(own) == 1 and _is_derived(own[0].metadata["start"]):
        return own[0]
    try:
        raw = _with_uid(catalog_of_raw(catalog), uid).uid
    except NoRunError:
        raw = uid
    attempts = derived.search(Key("start.original_run_uid") == raw).values()
    complete = [run for run in attempts if "shape" in run.metadata["start"]]
    if len(own) > 1 or not complete:
        what = "several derived runs" if len(own) > 1 else "no derived run with maps"
        raise NoRunError(f"{what} of {uid}: say its whole uid, or analyse the raw run first")
    return max(complete, key=_rank)


def derived_runs(names: Sequence[str], catalog: str | None) -> list[Any]:
    """Return derived runs as `to_maps` takes them: uids in a catalogue, or files of documents.

    Raises
    ------
    ValueError
        If there is no such run or catalogue.
    """
    client = find_catalog(catalog) if catalog is not None else None
    found: list[Any] = []
    for name in names:
        if Path(name).is_file():
            found.append(list(read_documents(name)))
        elif client is None:
            raise NoRunError(f"{name}: no such file; for a UID say with --catalog where it is")
        else:
            found.append(find_derived(client, name))
    return found


def writable_catalog(to: str | Path) -> Container:
    """Connect to a catalogue that results go to: a server, or a folder, made if missing."""
    return find_catalog(to) if "://" in str(to) else open_catalog(to)


def _rank(run: Any) -> tuple[bool, bool, bool, float]:
    """Order derived runs: complete ones, closed ones, those of this scan alone, newer ones."""
    start, stop = run.metadata["start"], run.metadata.get("stop") or {}
    status = stop.get("exit_status")
    alone = "runs" not in start["nanobeam"].get("analyzer", {})
    return status == "success", status is not None, alone, start["time"]


def _is_derived(start: Mapping[str, Any]) -> bool:
    return start.get("original_run_uid") is not None


# ------------------------------------------------------------------------- runs of any kind


def raw_runs(runs: Any, catalog: Container | None = None) -> Iterator[RawRun | NoRunError]:
    """Yield stored runs, or what is wrong with one that is asked for.

    Parameters
    ----------
    runs
        A catalogue of Tiled or databroker, or what a search in it has found; a run of it; a
        databroker `Broker`, its search results, or a `Header`; the uid of a run in `catalog`
        (its beginning is enough); a file of documents (JSON lines); documents, as (name,
        document) pairs; or several of these in a list.
    catalog
        Where uids are looked up.

    Raises
    ------
    TypeError
        If `runs` is none of these.
    """
    if isinstance(runs, RawRun):
        yield runs
    elif isinstance(runs, os.PathLike) or (isinstance(runs, str) and Path(runs).is_file()):
        try:
            yield from _of_documents(read_documents(Path(runs)))
        except (OSError, ValueError) as error:
            yield NoRunError(str(error))
    elif isinstance(runs, str):
        if catalog is None:
            yield NoRunError(f"{runs!r}: no such file, and no catalog=… for a uid")
        else:
            yield from Query(uid=[runs]).search(catalog)
    elif isinstance(runs, Query):
        if catalog is None:
            raise TypeError("a query needs catalog=…")
        yield from runs.search(catalog)
    elif isinstance(runs, Container):
        if "start" in runs.metadata:
            yield _of_tiled(runs, True)
        else:
            yield from _each(catalog_of_raw(runs))
    elif hasattr(runs, "v2"):  # a Broker of databroker.v1
        yield from raw_runs(runs.v2)
    elif hasattr(runs, "db"):  # its Header
        yield from raw_runs(runs.db.v2[runs.start["uid"]])
    elif isinstance(runs, Iterable):
        items = iter(runs)
        first = next(items, None)
        if isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], Mapping):
            yield from _of_documents(itertools.chain([first], items))
        elif first is not None:
            for item in itertools.chain([first], items):
                yield from raw_runs(item, catalog)
    else:
        raise TypeError(
            f"expected runs, a catalogue of runs, uids or documents, found {type(runs).__name__}"
        )


def _of_documents(documents: Iterable[Document]) -> Iterator[RawRun]:
    """Yield runs of a stream of documents; each is read before the next one is asked for."""
    waiting: list[Document] = []
    items = iter(documents)

    def rest(uid: str) -> Iterator[Document]:
        for name, doc in items:
            if name == "start":
                waiting.append((name, doc))
                return
            if doc.get("run_start", uid) == uid:
                yield name, doc
            if name == "stop":
                return

    while True:
        name, doc = waiting.pop() if waiting else next(items, ("", {}))
        if not name:
            return
        if name != "start":
            continue
        left = rest(doc["uid"])
        recording = Recording(left, lambda block, roi: block)
        yield RawRun(doc, lambda preset, root_map, found=recording: found, True)  # type: ignore[misc]
        for _ in left:
            pass


# ------------------------------------------------------------------------- by way of Tiled


def _of_tiled(node: Any, asked_for: bool) -> RawRun:
    spec = next((s for s in node.specs if s.name == "BlueskyRun"), None)
    if spec is not None and spec.version and spec.version.startswith("3."):
        node = node.v3 if hasattr(type(node), "v3") else node

        def recording(preset: Preset, root_map: Mapping[str, str]) -> Recording:
            return _recording(node, preset, root_map)
    else:  # in MongoDB, as its documents

        def recording(preset: Preset, root_map: Mapping[str, str]) -> Recording:
            documents = ((name, doc) for name, doc in node.documents() if name != "start")
            return Recording(documents, lambda block, roi: block)

    return RawRun(plain(node.metadata["start"]), recording, asked_for, node)


def plain(value: Any) -> Any:
    """Return Tiled's views of dictionaries and lists as these."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value


def _recording(node: Any, preset: Preset, root_map: Mapping[str, str]) -> Recording:
    reader = FrameReader()
    try:
        scan = scan_of(node, preset, root_map, reader)
    finally:
        reader.close()
    stop = plain(node.metadata.get("stop"))
    documents = [*scan.documents, *([("stop", stop)] if stop else [])]
    return Recording(documents, scan.filled)


def scan_of(node: Any, preset: Preset, root_map: Mapping[str, str], reader: FrameReader) -> Scan:
    """Return a raw run of a catalogue by row and column, read by `reader` or by way of Tiled.

    Raises
    ------
    UnreadableError
        If it cannot be read at all: says why.
    """
    start, stop = plain(node.metadata["start"]), plain(node.metadata.get("stop"))
    grid = preset.scan_metadata(start)
    wanted = {grid.positions[m].key if m in grid.positions else m for m in grid.motors}
    items = list(_recorded(node, wanted, root_map))
    return Scan(start, stop, preset, items, reader, root_map=root_map)


def _recorded(run: Any, wanted: set[str], root_map: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield what a run holds, as `tiled_adapters.scans.recorded`: files where they can be read.

    Whatever other files hold comes by way of Tiled.
    """
    nodes = dict(_contents(run))
    for (name, *below), stream in nodes.items():
        metadata = plain(stream.metadata)
        keys = metadata.get("data_keys")
        if below or not isinstance(keys, Mapping):
            continue
        yield "descriptor", recorded_descriptor(name, metadata) | {"uid": name}
        numbers: list[int] = []
        arrays = []
        for (_, key), child in ((p, n) for p, n in nodes.items() if p[0] == name and len(p) > 1):
            if child.structure_family == StructureFamily.table and TABLE.fullmatch(key):
                some = set(child.columns) & (set(keys) if name == "baseline" else wanted)
                table = _table(child, sorted(some | {"seq_num"}))
                numbers = table["seq_num"].tolist()
                data = {k: table[k].tolist() for k in some}
                yield "event_page", {"descriptor": name, "seq_num": numbers, "data": data}
            elif child.structure_family == StructureFamily.array and key in keys:
                (source,) = child.data_sources()
                item = Recorded.of(
                    name, key, source, child.structure(), keys[key].get("shape") or []
                )
                arrays.append((child, item))
        for child, item in arrays:
            if item.is_in_files and _are_here(item, root_map):
                yield "recorded", item
            elif len(item.shape) > 2:
                _check(child, item)
                yield "recorded", replace(item, array=child)
            elif item.key in wanted:
                values = child.read().reshape(item.events, -1)
                numbers = numbers or list(range(1, item.events + 1))
                data = {item.key: [v if len(v) > 1 else v[0] for v in values.tolist()]}
                yield "event_page", {"descriptor": name, "seq_num": numbers, "data": data}


def _contents(run: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield streams, and what is in them, with their data sources, by their paths in a run."""
    base = _plain_container(run)
    try:
        yield from base.search_deep(SpecsQuery([]), max_depth=2).items()  # all by one request
    except NotImplementedError:  # by an older server
        for name, stream in base.items():
            yield (name,), stream
            yield from (((name, key), child) for key, child in _plain_container(stream).items())


def _plain_container(node: Any) -> Container:
    return Container(
        node.context,
        item=node.item,
        structure_clients=node.structure_clients,
        include_data_sources=True,
    )


def _table(node: Any, columns: Sequence[str]) -> pd.DataFrame:
    """Return columns of a table; as `node.read` does, but without Dask."""
    buffer = io.BytesIO()
    node.export(buffer, format=APACHE_ARROW_FILE_MIME_TYPE, columns=columns)
    return pyarrow.ipc.open_file(buffer).read_pandas()


def _are_here(item: Recorded, root_map: Mapping[str, str]) -> bool:
    """Whether the first file that a run names, and with it the others, can be reached."""
    if not item.files:
        return False
    document = {"mimetype": "application/x-hdf5", "parameters": {"dataset": "data"}}
    found = Resource.parse(document | {"uri": item.files[0]}, root_map)
    return not found.problem and os.path.lexists(found.rows.path)


def _check(child: Any, item: Recorded) -> None:
    """Raise where Tiled cannot read it either."""
    try:
        child.read(NDSlice(*(slice(0, 1) for _ in item.shape)))
    except Exception as error:  # of an application in this process, any
        where = item.files[0] if item.files else "Tiled"
        raise UnreadableError(
            f"{item.key}: {where} is not on this machine (a root map may say where it is mounted), "
            f"and cannot be read by way of Tiled: {str(error).splitlines()[0]}"
        ) from None
