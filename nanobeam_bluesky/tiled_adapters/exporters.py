"""What Tiled's export formats of maps and scans are: for ``media_types`` of a configuration."""

from __future__ import annotations

import hashlib
import io
import math
import threading
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr
from anyio import to_thread
from cachetools import LRUCache, cached
from fastapi import HTTPException
from numpy.typing import NDArray
from tiled.utils import UnsupportedShape, parse_mimetype

from nanobeam_bluesky import export  # whose parts are imported on first use: half a second
from nanobeam_bluesky.geometry import ROI, Geometry
from nanobeam_bluesky.tiled_adapters.scans import Scan, UnreadableError
from nanobeam_bluesky.tiled_adapters.views import RESPONSE_BYTES

__all__ = [
    "maps_csv",
    "maps_html",
    "maps_markdown",
    "maps_nexus",
    "maps_png",
    "maps_tiff",
    "png",
    "scan_nexus",
]


PICTURES_BYTES = 32_000_000
"""Pictures that are kept."""


# ---------------------------------------------------------------------------- pictures


async def png(media_type: str, array: NDArray[Any], metadata: Mapping[str, Any]) -> bytes:
    """Draw a map or a pattern; ``image/png;cmap=…;vmin=…;vmax=…;scale=…;colorbar=…``."""
    options = _options(media_type)
    array = np.asarray(array)
    if array.ndim != 2:
        raise UnsupportedShape(array.shape)
    if not array.size:
        raise HTTPException(400, f"an image of shape {array.shape} has no pixel")
    labelled = metadata.get("labelled")
    if labelled is not None:
        image = await labelled(array)
        options["title"] = export.run_title(image.attrs["start"])
    else:
        image = xr.DataArray(array, attrs=metadata.get("attrs"))
    return await _drawn(image, **options)


async def maps_png(media_type: str, node: Any, metadata: Any, filter_for_access: Any) -> bytes:
    """Draw maps side by side, or one map as `png` does."""
    options = _options(media_type)
    maps = await _dataset(node)
    names = list(map(str, maps.data_vars))
    title = export.run_title(metadata["start"])
    if len(names) == 1:
        return await _drawn(maps[names[0]], title=title, **options)
    if options:
        raise HTTPException(400, f"{', '.join(options)}: for one map alone; add &field=strain")
    if len(names) < len((await node.source()).data_vars):
        options["fields"] = names
    return await _drawn(maps, title=title, **options)


_SCALES = {"linear": False, "log": True}
_SWITCH = {"0": False, "1": True}


def _options(media_type: str) -> dict[str, Any]:
    """Read the parameters of a media type."""
    found: dict[str, Any] = {}
    limits: list[float | None] = [None, None]
    for key, value in parse_mimetype(media_type)[1].items():
        if key in ("vmin", "vmax"):
            limits[key == "vmax"] = _number(key, value)
            found["limits"] = (limits[0], limits[1])
        elif key == "cmap":
            found["cmap"] = value
        elif key == "scale":
            found["log"] = _choice(key, value, _SCALES)
        elif key == "colorbar":
            found["colorbar"] = _choice(key, value, _SWITCH)
        elif key != "q":  # of an Accept header
            known = "cmap, vmin, vmax, scale, colorbar"
            raise HTTPException(400, f"{key} = {value}: image/png takes {known}")
    return found


def _number(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not abs(number) < _LARGEST:
        raise HTTPException(400, f"{key} = {value}: expected a number such as -5e-4")
    return number


_LARGEST = 1e30


def _choice(key: str, value: str, choices: Mapping[str, bool]) -> bool:
    if value not in choices:
        raise HTTPException(400, f"{key} = {value}: expected {' or '.join(choices)}")
    return choices[value]


async def _drawn(image: xr.DataArray | xr.Dataset, **options: Any) -> bytes:
    try:
        return await to_thread.run_sync(_picture, image, options)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


def _identity(image: xr.DataArray | xr.Dataset, options: Mapping[str, Any]) -> bytes:
    """Tell pictures apart by all that is in them."""
    found = hashlib.blake2b(repr((image.attrs, sorted(options.items()))).encode())
    images = image.data_vars if isinstance(image, xr.Dataset) else {image.name: image}
    for name, variable in {**images, **image.coords}.items():
        found.update(repr((name, variable.dims, variable.dtype, variable.attrs)).encode())
        found.update(np.ascontiguousarray(variable.to_numpy()).data)
    return found.digest()


# drawing takes half a second, and many may ask for the same
@cached(LRUCache(PICTURES_BYTES, getsizeof=len), key=_identity, lock=threading.Lock())
def _picture(image: xr.DataArray | xr.Dataset, options: Mapping[str, Any]) -> bytes:
    return export.to_png(image, **options)


# ------------------------------------------------------------------------------- maps


async def maps_nexus(media_type: str, node: Any, metadata: Any, filter_for_access: Any) -> Any:
    """Write maps as NeXus."""
    maps = await _dataset(node)
    return await to_thread.run_sync(_nexus, maps, *_documents(metadata))


async def maps_tiff(media_type: str, node: Any, metadata: Any, filter_for_access: Any) -> bytes:
    """Write maps as a TIFF, a page each."""
    return await to_thread.run_sync(export.to_tiff, await _dataset(node))


async def maps_csv(media_type: str, node: Any, metadata: Any, filter_for_access: Any) -> bytes:
    """Write points as a table."""
    return await to_thread.run_sync(export.to_csv, await _dataset(node))


async def maps_html(media_type: str, node: Any, metadata: Any, filter_for_access: Any) -> bytes:
    """Write a report as a page."""
    return await _reported("html", node, metadata)


async def maps_markdown(media_type: str, node: Any, metadata: Any, filter_for_access: Any) -> bytes:
    """Write a report as Markdown."""
    return await _reported("markdown", node, metadata)


async def _reported(form: Literal["html", "markdown"], node: Any, metadata: Any) -> bytes:
    maps = await node.source()

    def write() -> str:
        report = export.Report(maps, *_documents(metadata))
        return report.html() if form == "html" else report.markdown()

    try:
        text = await to_thread.run_sync(write)
    except ValueError as error:  # of the figure: values beyond what can be drawn
        raise HTTPException(422, f"the maps cannot be drawn: {error}") from None
    return text.encode("utf-8", "replace")


async def _dataset(node: Any) -> xr.Dataset:
    """Return the maps of a run that are asked for."""
    maps: xr.Dataset = await node.source()
    asked = {name for name, _ in await node.items_range()}
    chosen = [name for name in maps.data_vars if name in asked]
    if not chosen:
        raise HTTPException(400, f"no map among {sorted(asked)}: there are {list(maps.data_vars)}")
    return maps[chosen]


def _documents(metadata: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    return metadata["start"], metadata.get("stop") or None


def _nexus(
    data: xr.Dataset,
    start: Mapping[str, Any],
    stop: Mapping[str, Any] | None,
    geometry: Geometry | None = None,
    frames: export.Frames | None = None,
) -> Any:
    file = io.BytesIO()
    described = geometry.model_dump(mode="json", exclude_none=True) if geometry else None
    export.write_nexus(file, data, start, stop, geometry=described, frames=frames)
    return file.getbuffer()


# ------------------------------------------------------------------------------- scans


async def scan_nexus(media_type: str, node: Any, metadata: Any, filter_for_access: Any) -> Any:
    """Write what a scan measured as NeXus, without frames that are too many for an answer."""
    asked = {name for name, _ in await node.items_range()}
    if "frames" in asked:
        asked.discard("patterns")  # which are parts of them
    try:
        return await to_thread.run_sync(_scan_nexus, node.source, asked, *_documents(metadata))
    except UnreadableError as error:
        raise HTTPException(422, str(error)) from None


def _scan_nexus(
    scan: Scan, asked: set[str], start: Mapping[str, Any], stop: Mapping[str, Any] | None
) -> Any:
    rows, cols = (np.arange(n) for n in scan.grid.scan.shape)
    frames = None
    left_out: list[str] = []
    for name, shape, dtype in (
        ("frames", scan.frame_shape, scan.dtype),
        ("patterns", scan.geometry.pattern_shape if scan.geometry else (0, 0), np.dtype("f4")),
    ):
        size = rows.size * cols.size * math.prod(shape) * dtype.itemsize
        if name in asked and size > RESPONSE_BYTES:
            too_much = (
                f"{name} of {rows.size} × {cols.size} points of {shape} are {size / 1e9:.3g} GB, "
                f"an answer has at most {RESPONSE_BYTES / 1e9:g} GB: ask for slices of them"
            )
            asked = asked - {name}
            if not asked:
                raise HTTPException(400, too_much)
            left_out.append(too_much)
    positions = scan.positions()
    units = scan.units
    coords = {
        motor: (dim, axis, {"units": units[motor]})
        for motor, dim, axis in zip(units, ("row", "col"), scan.coordinates(positions), strict=True)
    }
    counts = {"units": "counts"}
    data: dict[str, Any] = {}
    if asked & {"intensity", "mean_pattern"}:
        intensity, mean = scan.sums()
        data["intensity"] = (("row", "col"), intensity, counts)
        data["mean_pattern"] = (("ny", "nx"), mean, counts)
    if "patterns" in asked:
        data["patterns"] = (("row", "col", "ny", "nx"), scan.patterns(rows, cols), counts)
    for motor, values in positions.items():
        data[f"{motor}_measured"] = (("row", "col"), values, {"units": units[motor]})
    if "frames" in asked:
        height, width = scan.frame_shape
        roi = ROI(row=0, col=0, height=height, width=width)
        frames = export.Frames(
            (rows.size, cols.size, height, width),
            scan.dtype,
            (scan.frames(rows[i : i + 1], cols, roi)[0] for i in range(rows.size)),
        )
    chosen = {name: values for name, values in data.items() if name in asked}
    shown = xr.Dataset(chosen, coords, {"note": "; ".join(left_out)} if left_out else {})
    return _nexus(shown, start, stop, scan.geometry, frames)
