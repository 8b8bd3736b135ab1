"""Pictures and tables of maps, as bytes."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tifffile
import xarray as xr
from matplotlib.image import imsave
from numpy.typing import NDArray

from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.plots import MAPS, MapAxes, own_figure, plot_image, plot_maps

__all__ = ["flag_names", "images", "run_title", "to_csv", "to_png", "to_tiff"]

_DPI = 160
_LARGEST_DPI = 600
_MAP_INCHES = 3.4
"""Inches of a figure that its map takes."""
_BARE_PX = 512
"""Pixels along the longer side of a picture without axes, if there are fewer points."""
_LONGEST_TITLE = 70
_PAGE_NAME = 285
"""TIFF's tag."""

# matplotlib keeps fonts and parsed text in caches that threads must not share
_DRAWING = threading.Lock()


def to_png(
    maps: xr.Dataset | xr.DataArray,
    fields: Sequence[str] = MAPS,
    *,
    cmap: str | None = None,
    limits: tuple[float | None, float | None] = (None, None),
    log: bool | None = None,
    colorbar: bool = True,
    title: str = "",
) -> bytes:
    """Draw maps as a PNG; may be called in any thread.

    Parameters
    ----------
    maps
        As for `plot_maps`; or one map or pattern as for `plot_image`, to which the options
        apply.
    fields
        Which of the maps.
    cmap, limits, log
        As for `plot_image`.
    colorbar
        Whether to draw axes and a colour bar. Without them a point is a pixel, or a square
        of some, turned as in the figure, and transparent where there is no value.
    title
        What stands above, e.g. of `run_title`.

    Raises
    ------
    KeyError, ValueError
        As `plot_maps` and `plot_image` do.
    """
    out = io.BytesIO()
    one = isinstance(maps, xr.DataArray)
    shape = maps.shape if one else (maps.sizes["row"], maps.sizes["col"])
    if one and maps.dims != ("row", "col"):
        axes = MapAxes((shape[0], shape[1]))
    else:
        axes = MapAxes.of(maps)
    with _DRAWING:
        if isinstance(maps, xr.DataArray):
            figure = own_figure(1, axes)
            panel = plot_image(maps, cmap=cmap, limits=limits, log=log, figure=figure)
            if not colorbar:
                imsave(out, _bare(panel.image, *panel.ax.get_ylim()), format="png")
                return out.getvalue()
        else:
            figure = own_figure(len(fields), axes)
            plot_maps(maps, fields, figure=figure)
        if title:
            figure.suptitle(_shortened(title), fontsize="small", color="0.35", parse_math=False)
        # no point narrower than a pixel
        dpi = min(max(_DPI, max(shape) / _MAP_INCHES), _LARGEST_DPI)
        figure.savefig(out, format="png", dpi=dpi, bbox_inches="tight")
    return out.getvalue()


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TITLE else f"{text[:_LONGEST_TITLE]}…"


def run_title(start: Mapping[str, Any]) -> str:
    """Return sample and scan of a run, derived or raw, e.g. "film, scan 12 sxdm_fly"."""
    block = start.get("nanobeam")
    of = block if "original_run_uid" in start and isinstance(block, Mapping) else None
    plan, number = (
        (start.get("plan_name"), start.get("scan_id"))
        if of is None
        else (of.get("original_plan_name"), of.get("original_scan_id"))
    )
    sample = start.get("sample")
    name = sample.get("name") if isinstance(sample, Mapping) else sample
    scan = " ".join(str(part) for part in ("scan", number, plan) if part)
    return f"{name}, {scan}" if name else scan


def _bare(image: Any, bottom: float, top: float) -> NDArray[np.uint8]:
    """Return colours (height, width, 4) as they are on the page."""
    colours: NDArray[np.uint8] = image.to_rgba(image.get_array(), bytes=True)
    left, right, low, high = image.get_extent()
    if (high > low) == (top > bottom):
        colours = colours[::-1]
    if right < left:
        colours = colours[:, ::-1]
    side = max(1, _BARE_PX // max(colours.shape[:2]))
    return colours.repeat(side, axis=0).repeat(side, axis=1)


def images(maps: xr.Dataset) -> list[str]:
    """Return the names of what has rows and columns."""
    return [str(name) for name, values in maps.data_vars.items() if values.dims == ("row", "col")]


def to_tiff(maps: xr.Dataset) -> bytes:
    """Write maps as a TIFF of float32, a page for each, its name and unit with it."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as file:
        for name in images(maps):
            unit = str(maps[name].attrs.get("units", ""))
            text = f"{name} ({unit})" if unit else name
            # bytes, since a text must be ASCII
            tag = [(_PAGE_NAME, 7 if not name.isascii() else 2, 0, name.encode(), True)]
            with np.errstate(over="ignore"):  # what is too large is infinite
                page = maps[name].to_numpy().astype(np.float32)
            file.write(
                page,
                description=text.encode(),
                photometric="minisblack",
                metadata=None,
                contiguous=False,
                extratags=tag,
            )
    return out.getvalue()


def to_csv(maps: xr.Dataset) -> bytes:
    """Write points as a table: a line each, row by row; empty where there is no value.

    Columns have their unit in brackets; flags are names such as ``few_counts|misfit``.
    """
    import pandas as pd

    names = images(maps)
    shape = maps.sizes["row"], maps.sizes["col"]
    row, col = np.indices(shape)
    columns: dict[str, Any] = {"row": row.ravel(), "col": col.ravel()}
    for name in [*(str(c) for c in maps.coords if maps[c].ndim == 1), *names]:
        unit = str(maps[name].attrs.get("units", ""))
        values = maps[name].broadcast_like(maps[names[0]]).to_numpy().ravel()
        if name == "flags":
            values = np.array([flag_names(value) for value in range(256)])[values & 255]
        title = f"{name} ({unit})" if unit and unit != name else name
        # a spreadsheet would take these for a formula
        columns["'" + title if title[:1] in "=+-@" else title] = values
    text = pd.DataFrame(columns).to_csv(index=False, lineterminator="\n")
    return str(text).encode()


def flag_names(flags: int) -> str:
    """Return e.g. ``few_counts|misfit``; nothing for a good point."""
    return "|".join(str(flag.name).lower() for flag in Flag if flags & flag)
