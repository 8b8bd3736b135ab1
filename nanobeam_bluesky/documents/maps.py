"""`to_maps`: a derived run as an `xarray.Dataset` on the scan grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nanobeam_bluesky.documents.scan_grid import ScanGrid
from nanobeam_bluesky.models import Estimates, Flag
from nanobeam_bluesky.presets import ScanMetadata

__all__ = ["axes", "derived_scan", "to_maps"]

Columns = dict[str, NDArray[Any]]


def to_maps(run: Any) -> xr.Dataset:
    """Put the points of a derived run on the scan grid.

    Parameters
    ----------
    run
        A derived run: a run of a Tiled or databroker catalogue, or an iterable of its
        (name, document) pairs, complete or still growing.

    Returns
    -------
    maps
        Dimensions (row, col), unsnaked. Coordinates: both motors, the median of the
        recorded positions of each row or column (nominal where there are none).
        Variables: the fields of `Estimates`, and ``<motor>_measured``; units in
        ``attrs``. The last event of a point wins. The estimates of flagged points are
        NaN; points without an event have flags = FRAME_MISSING.

    Raises
    ------
    ValueError
        If this is no derived run, or one that failed before its first point.
    """
    start, units, columns = _from_catalog(run) if hasattr(run, "metadata") else _from_documents(run)
    uid = str(start.get("uid", "?"))[:8]
    if start.get("original_run_uid") is None or "nanobeam" not in start:
        raise ValueError(
            f"run {uid} is not a derived run of nanobeam-bluesky: "
            "expected original_run_uid and nanobeam in its start document"
        )
    if "shape" not in start:
        raise ValueError(f"run {uid} failed before its first point: see its stop document")
    grid = ScanGrid(derived_scan(start))
    row, col = (np.asarray(columns.get(k, []), dtype=np.int64) for k in ("row", "col"))
    on_grid = row >= 0
    maps = xr.Dataset(attrs={"original_run_uid": start["original_run_uid"], "uid": start["uid"]})
    for name in (*Estimates.UNITS, *grid.scan.motors):
        integer = name == "flags"
        image = np.full(
            grid.scan.shape,
            Flag.FRAME_MISSING.value if integer else np.nan,
            dtype=np.int64 if integer else np.float64,
        )
        values = np.asarray(columns.get(name, np.full(len(row), np.nan)))
        # NumPy keeps the last of repeated indices, as a rewound point needs
        image[row[on_grid], col[on_grid]] = values[on_grid]
        key = f"{name}_measured" if name in grid.scan.motors else name
        maps[key] = (("row", "col"), image, {"units": units.get(name) or ""})
    hide = (maps["flags"] != 0).to_numpy()
    for name in Estimates.UNITS:
        if name not in Estimates.DIAGNOSTICS:
            maps[name] = maps[name].where(~hide)
    measured = tuple(maps[f"{motor}_measured"].to_numpy() for motor in grid.scan.motors)
    for motor, dim, axis in zip(
        grid.scan.motors, ("row", "col"), axes(grid, measured), strict=True
    ):
        maps = maps.assign_coords({motor: (dim, axis, {"units": units.get(motor) or ""})})
    return maps


def axes(
    grid: ScanGrid, measured: tuple[NDArray[np.float64], ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return positions of rows and columns: the median of what is measured, else nominal.

    `measured` are both motors' positions (rows, columns), NaN where unknown.
    """
    slow, fast = (
        np.where(np.isfinite(median), median, nominal)
        for median, nominal in zip(
            (_median(values, axis) for values, axis in zip(measured, (1, 0), strict=True)),
            grid.axes(),
            strict=True,
        )
    )
    return slow, fast


def _median(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Median that is NaN, silently, where there is nothing."""
    some = np.isfinite(values).any(axis=axis)
    result = np.full(some.shape, np.nan)
    rows = values if axis == 1 else values.T
    if some.any():
        result[some] = np.nanmedian(rows[some], axis=1)
    return result


def derived_scan(start: Mapping[str, Any]) -> ScanMetadata:
    """Return how the scan visited its points, from the start document of a derived run."""
    extents = start.get("extents")
    return ScanMetadata(
        shape=(int(start["shape"][0]), int(start["shape"][1])),
        snaking=bool(start["snaking"][1]),
        motors=(start["motors"][0], start["motors"][1]),
        extents=extents and ((*extents[0],), (*extents[1],)),
    )


def _from_documents(
    documents: Iterable[tuple[str, Mapping[str, Any]]],
) -> tuple[Mapping[str, Any], dict[str, Any], Columns]:
    start: Mapping[str, Any] = {}
    units: dict[str, Any] = {}
    pages: list[Mapping[str, Any]] = []
    for name, doc in documents:
        if name == "start":
            start = doc
        elif name == "descriptor":
            units |= {k: v.get("units") for k, v in doc["data_keys"].items()}
        elif name == "event_page":
            pages.append(doc["data"])
        elif name == "event":
            pages.append({k: [v] for k, v in doc["data"].items()})
    keys = pages[0] if pages else {}
    return start, units, {k: np.concatenate([np.asarray(p[k]) for p in pages]) for k in keys}


def _from_catalog(run: Any) -> tuple[Mapping[str, Any], dict[str, Any], Columns]:
    start = run.metadata["start"]
    if "primary" not in run:
        return start, {}, {}
    stream = run["primary"]
    units = {k: v.get("units") for k, v in stream.metadata.get("data_keys", {}).items()}
    table = stream.base["internal"].read()
    return start, units, {k: table[k].to_numpy() for k in table.columns}
