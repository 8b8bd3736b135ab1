"""Figures of maps: physical axes, robust limits, colours that everyone can tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from nanobeam_bluesky.models import Flag

__all__ = [
    "MapAxes",
    "MapPanel",
    "figure_inches",
    "in_words",
    "label_outer",
    "new_figure",
    "own_figure",
    "plot_agreement",
    "plot_combination",
    "plot_comparison",
    "plot_image",
    "plot_maps",
    "robust_limits",
]

MAPS = ("strain", "omega", "chi", "counts")

_TITLES = {
    "strain": "Strain ε",
    "omega": "Tilt ω",
    "chi": "Tilt χ",
    "thickness": "Thickness",
    "counts": "Counts",
    "background": "Background",
    "deviance": "Deviance",
    "flags": "Flags",
    "intensity": "Intensity",
    "frames": "Frame",
    "patterns": "Pattern",
    "mean_pattern": "Mean pattern",
}
_DIVERGING = ("strain", "omega", "chi", "deviance")
"""Fields in which zero means something."""

_FLAGS = {
    "good": (0, "#e8e8e8"),
    "out of range": (Flag.OUT_OF_RANGE, "#f0e442"),
    "misfit": (Flag.MISFIT, "#d55e00"),
    "not converged": (Flag.NOT_CONVERGED, "#cc79a7"),
    "saturated": (Flag.SATURATED, "#e69f00"),
    "few counts": (Flag.FEW_COUNTS, "#56b4e9"),
    "no position": (Flag.POSITION_MISSING, "#009e73"),
    "no frame": (Flag.FRAME_MISSING, "#000000"),
}
"""Names and colours (Okabe and Ito's) of flags; of several the last is shown."""

_PREFIXES = {0: "", -3: "m", -6: "µ", -9: "n"}
_POWERS = {0: "", -3: "10⁻³", -6: "10⁻⁶", -9: "10⁻⁹"}
_SYMBOLS = {"deg": "°", "degree": "°", "degrees": "°", "um": "µm", "micron": "µm"}

_BLANK = {"facecolor": "0.84", "edgecolor": "0.74", "hatch": "////", "linewidth": 0}
"""What shows where there is no value: nothing that a colour map could show."""
_KEEP_LIMITS = 0.05
"""Colour limits stay while the data ask for less change than this, so that they do not
flicker while a map fills in."""
_PANEL_INCHES = 3.4


def plot_maps(
    maps: xr.Dataset, fields: Sequence[str] = MAPS, *, figure: Figure | None = None
) -> Figure:
    """Draw maps side by side, each with its colour bar.

    Parameters
    ----------
    maps
        Fields with dimensions (row, col) and ``units`` in their attributes; one
        coordinate along each dimension, as `to_maps` gives them.
    fields
        Which of them, e.g. ("strain", "strain_sigma").
    figure
        Figure to draw in; a new one if absent.

    Raises
    ------
    KeyError
        If a field is not among the maps.
    """
    for field in fields:
        if field not in maps:
            raise KeyError(f"no map of {field!r}: there are {sorted(map(str, maps.data_vars))}")
    axes = MapAxes.of(maps)
    rows, columns = _grid_shape(len(fields))
    figure = figure or new_figure(rows, columns, axes)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[len(fields) :]:
        ax.remove()
    for field, ax in zip(fields, grid.flat, strict=False):
        panel = MapPanel(ax, field, str(maps[field].attrs.get("units", "")), axes)
        panel.show(maps[field].to_numpy())
    label_outer(grid, axes)
    return figure


def plot_image(
    image: xr.DataArray,
    *,
    cmap: str | None = None,
    limits: tuple[float | None, float | None] = (None, None),
    log: bool | None = None,
    figure: Figure | None = None,
) -> MapPanel:
    """Draw one map, or one pattern, with its colour bar.

    Parameters
    ----------
    image
        A map with dimensions (row, col), as `to_maps` gives them, or a pattern or frame with
        any others.
    cmap
        Name of a colour map of matplotlib; if absent, one that suits the field.
    limits
        Lowest and highest value that have a colour of their own, in the image's unit;
        robust ones for what is None.
    log
        Whether the colours are logarithmic; if absent, those of patterns are.
    figure
        Figure to draw in; a new one if absent.

    Raises
    ------
    ValueError
        If there is no such colour map, or the limits are none.
    """
    is_map = image.dims == ("row", "col")
    field = str(image.name or "")
    if is_map:
        axes = MapAxes.of(image)
    else:
        rows, columns = image.shape
        axes = MapAxes((rows, columns), labels=("pixel row", "pixel column"))
    log = not is_map if log is None else log
    values = image.to_numpy()
    if field == "flags" and (cmap or log or limits != (None, None)):
        raise ValueError("flags have colours, and limits, of their own")
    found = _limits(values, limits, log=log, diverging=field in _DIVERGING)
    figure = figure or new_figure(1, 1, axes)
    ax = figure.subplots()
    panel = MapPanel(ax, field, str(image.attrs.get("units", "")), axes)
    if cmap is not None:
        if cmap not in matplotlib.colormaps:
            raise ValueError(f"cmap = {cmap!r}: no colour map of matplotlib, as 'viridis' is")
        panel.image.set_cmap(cmap)
    if log and found is not None:
        panel.image.set_norm(LogNorm(*found, clip=True))  # what is 0 has the lowest colour
        digits = "125" if found[1] < 100 * found[0] else "1"
        panel.colorbar.formatter = panel.colorbar.minorformatter = FuncFormatter(
            lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else ""
        )
    panel.show(values, limits=found)
    if not is_map:
        where = [
            f"{name} {int(image[dim])}"
            for dim, name in (("row", "row"), ("col", "column"))
            if dim in image.coords
        ]
        ax.invert_yaxis()  # the first row on top, as every viewer of images has it
        panel.title(", ".join([_TITLES.get(field, field), *where]))
    ax.set_ylabel(axes.label(0))
    ax.set_xlabel(axes.label(1))
    return panel


def _limits(
    values: NDArray[Any], given: tuple[float | None, float | None], *, log: bool, diverging: bool
) -> tuple[float, float] | None:
    """Return colour limits: those given, else robust ones; None if no value has a colour."""
    if log:
        some = values[np.isfinite(values) & (values > 0)]
        # half of it, or one count would look like none
        robust = (float(np.percentile(some, 5)) / 2, float(some.max())) if some.size else None
    else:
        robust = robust_limits(values, diverging=diverging)
    low, high = (a if a is not None else b for a, b in zip(given, robust or given, strict=True))
    if low is None or high is None:
        return None
    if not low < high or (log and low <= 0):
        raise ValueError(
            f"limits {low:g} to {high:g}: the first must be below the second"
            + (", and above 0 on a logarithmic scale" if log else "")
            + ("; one of them is of the values: give both" if None in given else "")
        )
    return low, high


def plot_comparison(
    truth: xr.Dataset,
    maps: xr.Dataset,
    fields: Sequence[str] = ("strain", "omega", "chi"),
    *,
    diagnostics: Sequence[str] = (),
    figure: Figure | None = None,
) -> Figure:
    """Draw truth, map, their difference and the map's σ, a row for each field.

    Parameters
    ----------
    truth
        The same fields as `maps`, of the same shape and in the same units.
    maps
        As for `plot_maps`.
    fields
        Which of them, each with its ``…_sigma``.
    diagnostics
        Up to four maps in a last row, e.g. ("counts", "deviance", "flags").
    figure
        Figure to draw in; a new one if absent.

    Raises
    ------
    ValueError
        If a field has not the same shape in both.
    """
    axes = MapAxes.of(maps)
    rows = len(fields) + bool(diagnostics)
    figure = figure or new_figure(rows, 4, axes)
    grid = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False)
    for field, (left, middle, right, last) in zip(fields, grid, strict=False):
        true, measured = truth[field].to_numpy(), maps[field].to_numpy()
        if true.shape != measured.shape:
            raise ValueError(
                f"{field}: the truth has shape {true.shape}, the map {measured.shape}; "
                "both must be (rows, columns) of the same scan"
            )
        units = str(maps[field].attrs.get("units", ""))
        title = _TITLES.get(field, field)
        limits = robust_limits(true, diverging=field in _DIVERGING)
        panels = MapPanel(left, field, units, axes), MapPanel(middle, field, units, axes)
        for panel, image, what in zip(panels, (true, measured), ("truth", "map"), strict=True):
            panel.show(image, limits=limits)
            panel.title(f"{title}: {what}")
        error = measured - true
        finite = error[np.isfinite(error)]
        difference = MapPanel(right, field, units, axes, diverging=True)
        if finite.size:
            difference.show(error, limits=_symmetric(finite, 0.0))
            rms = _text(float(np.sqrt(np.mean(finite**2))), difference.limits, units)
            difference.title(f"map − truth, rms {rms}")
        MapPanel(last, f"{field}_sigma", units, axes).show(maps[f"{field}_sigma"].to_numpy())
    for field, ax in zip(diagnostics, grid[len(fields) :].flat, strict=False):
        panel = MapPanel(ax, field, str(maps[field].attrs.get("units", "")), axes)
        panel.show(maps[field].to_numpy())
    for ax in grid[len(fields) :].flat[len(diagnostics) :] if diagnostics else ():
        ax.remove()
    label_outer(grid, axes)
    return figure


def plot_agreement(
    first: xr.Dataset,
    second: xr.Dataset,
    fields: Sequence[str] = ("strain", "omega", "chi"),
    *,
    names: tuple[str, str] = ("A", "B"),
    lines: Mapping[str, tuple[float, float, float]] | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draw two maps, their difference and their correlation, a row for each field.

    As Figure 4 of Luo et al., Sci. Rep. (2025), doi 10.1038/s41598-025-97183-0, has it.

    Parameters
    ----------
    first, second
        As for `plot_maps`, of the same shape and in the same units.
    fields
        Which of them.
    names
        What the two are called.
    lines
        By field slope, intercept (in the field's unit) and Pearson's r of the correlation.
    figure
        Figure to draw in; a new one if absent.
    """
    axes = MapAxes.of(first)
    figure = figure or new_figure(len(fields), 4, axes)
    grid = figure.subplots(len(fields), 4, squeeze=False)
    for field, row in zip(fields, grid, strict=True):
        a, b = first[field].to_numpy(), second[field].to_numpy()
        units = str(first[field].attrs.get("units", ""))
        title = _TITLES.get(field, field)
        both = np.isfinite(a) & np.isfinite(b)
        limits = robust_limits(np.stack([a, b]), diverging=field in _DIVERGING)
        for ax, image, name in zip(row, (a, b), names, strict=False):
            panel = MapPanel(ax, field, units, axes)
            panel.show(image, limits=limits)
            panel.title(f"{title}: {name}")
        difference = MapPanel(row[2], field, units, axes, diverging=True)
        difference.title("no point in common")
        if both.any():
            apart = (b - a)[both]
            difference.show(b - a, limits=_symmetric(apart, 0.0))
            rms = _text(float(np.sqrt(np.mean(apart**2))), difference.limits, units)
            difference.title(f"{names[1]} − {names[0]}\nrms {rms}")
            _correlation(row[3], a[both], b[both], limits, units, names, (lines or {}).get(field))
        for ax in row[1:3]:
            ax.sharey(row[0])
            ax.tick_params(labelleft=False)
        row[0].set_ylabel(axes.label(0))
        for ax in row[:3]:
            ax.set_xlabel(axes.label(1))
    return figure


def _correlation(
    ax: Axes,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    limits: tuple[float, float] | None,
    units: str,
    names: tuple[str, str],
    line: tuple[float, float, float] | None,
) -> None:
    """Draw how often each pair of values occurs, beside equality and a fitted line."""
    assert limits is not None
    margin = 0.05 * (limits[1] - limits[0])
    scale, unit = _engineering(limits, units)
    ends = np.array([limits[0] - margin, limits[1] + margin]) * scale
    # so few points that most cells would hold one are better seen as points
    if a.size < 1000:
        ax.plot(a * scale, b * scale, ".", markersize=4, alpha=0.6, color="C0")
    else:
        cells = ax.hist2d(
            a * scale, b * scale, bins=64, range=[ends, ends], norm=LogNorm(), cmap="viridis"
        )
        beside = ax.inset_axes((1.03, 0.0, 0.05, 1.0))
        bar = ax.figure.colorbar(cells[3], cax=beside)
        bar.ax.set_title("points", fontsize="medium", loc="left", y=1.05)
    ax.plot(ends, ends, color="0.4", linewidth=1, linestyle="--", label="equal")
    title = ""
    if line is not None:
        slope, intercept, r = line
        ax.plot(ends, slope * ends + intercept * scale, color="#d55e00", linewidth=1, label="fit")
        title = f"r = {r:.4g}, slope {slope:.4g}"
    ax.legend(loc="upper left", fontsize="small", framealpha=0.8)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.set_title(title, y=1.0)
    ax.set_xlabel(_plain(f"{names[0]}, {unit}" if unit else names[0]))
    ax.set_ylabel(_plain(f"{names[1]}, {unit}" if unit else names[1]))


def plot_combination(
    maps: xr.Dataset,
    scans: xr.Dataset,
    fields: Sequence[str] = ("strain", "omega", "chi"),
    *,
    figure: Figure | None = None,
) -> Figure:
    """Draw how scans have drifted, what they give together, and how σ has shrunk.

    Parameters
    ----------
    maps, scans
        As of `retrospective.combine`.
    fields
        Which of them, a row for each: of the best single scan, of all together, their σ, and
        how often which σ occurs.
    figure
        Figure to draw in; a new one if absent.
    """
    axes = MapAxes.of(maps)
    figure = figure or new_figure(len(fields) + 1, 4, axes)
    grid = figure.subplots(len(fields) + 1, 4, squeeze=False)
    _drifts(grid[0, 0], scans)
    used = np.asarray(scans["used"], dtype=bool)
    intensity = MapPanel(grid[0, 1], "counts", "counts", axes)
    intensity.show(scans["counts"][0].to_numpy())
    intensity.title("Counts, first scan")
    number = MapPanel(grid[0, 2], "scans_used", "", axes)
    number.show(maps["scans_used"].to_numpy().astype(float), limits=(0, float(used.sum())))
    number.colorbar.set_ticks(range(int(used.sum()) + 1))
    number.title("Scans that count")
    apart = MapPanel(grid[0, 3], "disagreement", "", axes)
    apart.show(maps["disagreement"].to_numpy(), limits=(-5, 5))
    apart.image.set_cmap("RdBu_r")
    apart.title("Do the scans agree? (0 ± 1: yes)")
    for field, row in zip(fields, grid[1:], strict=True):
        units, title = str(maps[field].attrs.get("units", "")), _TITLES.get(field, field)
        sigmas = scans[f"{field}_sigma"].to_numpy()
        typical = [np.nanmedian(s) if u and np.isfinite(s).any() else np.inf
                   for s, u in zip(sigmas, used, strict=True)]  # fmt: skip
        best = int(np.argmin(typical))
        together = maps[field].to_numpy()
        limits = robust_limits(together, diverging=field in _DIVERGING)
        angle = float(scans["delta_theta_deg"][best])
        for ax, image, what in (
            (row[0], scans[field][best].to_numpy(), f"best scan (Δθ = {angle:g}°)"),
            (row[1], together, "together"),
        ):
            panel = MapPanel(ax, field, units, axes)
            panel.show(image, limits=limits)
            panel.title(f"{title}: {what}")
        sigma = maps[f"{field}_sigma"].to_numpy()
        panel = MapPanel(row[2], f"{field}_sigma", units, axes)
        panel.show(sigma)
        panel.title(f"{_sigma_title(f'{field}_sigma')}, together")
        expected = maps[f"{field}_sigma_expected"].to_numpy()
        _sigmas(row[3], sigmas[best], expected, sigma, units, title)
    for i, row in enumerate(grid):
        maps_of_row = row[:3] if i else row[1:]
        for ax in maps_of_row:
            ax.set_xlabel(axes.label(1))
        maps_of_row[0].set_ylabel(axes.label(0))
    return figure


def _drifts(ax: Axes, scans: xr.Dataset) -> None:
    """Draw where the features of the first scan are in the others."""
    row, col = scans["drift_row"].to_numpy(), scans["drift_col"].to_numpy()
    used = np.asarray(scans["used"], dtype=bool)
    ax.plot(col, row, "-", color="0.8", linewidth=1)
    ax.plot(col[used], row[used], "o", color="C0", label="used")
    if not used.all():
        ax.plot(col[~used], row[~used], "x", color="#d55e00", label="in doubt, not used")
        ax.legend(fontsize="small")
    places: dict[tuple[float, float], list[str]] = {}
    for i, angle in enumerate(scans["delta_theta_deg"].to_numpy()):
        place = (round(float(col[i]), 1), round(float(row[i]), 1))
        places.setdefault(place, []).append(f"{i + 1}: {angle:+.3g}°" if angle else f"{i + 1}: 0°")
    for place, texts in places.items():
        ax.annotate(
            ", ".join(texts), place, textcoords="offset points", xytext=(6, 5), fontsize="small"
        )
    ax.margins(0.25)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_title("Drift (scan: Δθ)", y=1.0)
    ax.set_xlabel("columns, points")
    ax.set_ylabel("rows, points")


def _sigmas(
    ax: Axes,
    single: NDArray[np.float64],
    expected: NDArray[np.float64],
    together: NDArray[np.float64],
    units: str,
    title: str,
) -> None:
    """Draw how often which σ occurs."""
    finite = [s[np.isfinite(s) & (s > 0)] for s in (single, expected, together)]
    if not all(s.size for s in finite):
        ax.set_axis_off()
        return
    low = min(float(np.percentile(s, 1)) for s in finite)
    high = max(float(np.percentile(s, 99)) for s in finite)
    scale, unit = _engineering((low, high), units)
    bins = np.linspace(0.8 * low, 1.1 * high, 60) * scale
    styles: tuple[dict[str, Any], ...] = (
        {"color": "0.6", "histtype": "stepfilled", "label": "best scan"},
        {"color": "#d55e00", "histtype": "step", "label": "expected together"},
        {"color": "C0", "histtype": "stepfilled", "alpha": 0.5, "label": "together"},
    )
    for s, style in zip(finite, styles, strict=True):
        style["label"] += f": {_text(float(np.median(s)), (low, high), units)}"
        ax.hist(s * scale, bins=bins.tolist(), linewidth=1.5, **style)
    ax.set_ylim(0, 1.5 * ax.get_ylim()[1])  # room for the legend
    ax.legend(loc="upper right", fontsize="small", title="median", title_fontsize="small")
    ax.set_title(f"How σ of {title[0].lower()}{title[1:]} shrinks", y=1.0)
    ax.set_xlabel(_plain(f"σ, {unit}" if unit else "σ"))
    ax.set_ylabel("points")


def robust_limits(values: NDArray[Any], *, diverging: bool = False) -> tuple[float, float] | None:
    """Return colour limits that the outermost two percent do not move.

    Parameters
    ----------
    values
        Any shape; NaN is ignored.
    diverging
        Whether the limits are to lie symmetrically: about zero where there are values
        on both sides of it, else about the median, since a common offset, as of a tilt,
        would leave the map in one colour.

    Returns
    -------
    limits
        (lowest, highest), never equal; None where no value is finite.
    """
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return None
    low, middle, high = (float(v) for v in np.percentile(finite, (1, 50, 99)))
    if diverging:
        return _symmetric(finite, 0.0 if low <= 0 <= high else middle)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = _symmetric(finite, middle)
        low = max(low, 0.0) if finite.min() >= 0 else low  # counts have no negative colour
    return low, high


def _symmetric(finite: NDArray[np.float64], middle: float) -> tuple[float, float]:
    distance = np.abs(finite - middle)
    # what is constant still needs a range to be drawn in
    limit = float(np.percentile(distance, 98)) or float(distance.max()) or 0.01 * abs(middle) or 1.0
    return middle - limit, middle + limit


@dataclass(frozen=True)
class MapAxes:
    """Where the points of a scan lie, for the axes of its maps."""

    shape: tuple[int, int]
    """(rows, columns)."""
    labels: tuple[str, str] = ("row", "column")
    """Names of the slow and the fast motor."""
    units: tuple[str, str] = ("", "")
    """Their units, e.g. ("um", "um")."""
    extents: tuple[tuple[float, float], tuple[float, float]] | None = None
    """First and last position along the rows and along the columns; indices if absent."""

    @classmethod
    def of(cls, maps: xr.Dataset | xr.DataArray) -> MapAxes:
        """Read the axes off a dataset, or a map of it, as `to_maps` gives it."""
        shape = (maps.sizes["row"], maps.sizes["col"])
        motors = [
            next((c for c in maps.coords.values() if c.dims == (dim,) and c.name != dim), None)
            for dim in ("row", "col")
        ]
        slow, fast = motors
        if slow is None or fast is None:
            return cls(shape)
        return cls(
            shape,
            labels=(str(slow.name), str(fast.name)),
            units=(str(slow.attrs.get("units", "")), str(fast.attrs.get("units", ""))),
            extents=(
                (float(slow[0]), float(slow[-1])),
                (float(fast[0]), float(fast[-1])),
            ),
        )

    @property
    def edges(self) -> tuple[float, float, float, float]:
        """Outer edges of the first and last pixels: left, right, bottom, top."""
        ends = self.extents or ((0.0, self.shape[0] - 1.0), (0.0, self.shape[1] - 1.0))
        steps = [
            (last - first) / (n - 1) if n > 1 else 0.0
            for (first, last), n in zip(ends, self.shape, strict=True)
        ]
        other = steps[::-1]
        (bottom, top), (left, right) = (
            (first - (step or fallback or 1.0) / 2, last + (step or fallback or 1.0) / 2)
            for (first, last), step, fallback in zip(ends, steps, other, strict=True)
        )
        return left, right, bottom, top

    @property
    def ratio(self) -> float:
        """Height over width of a map as it is drawn."""
        left, right, bottom, top = self.edges
        ratio = abs((top - bottom) / (right - left))
        return ratio if self.aspect == "equal" else 0.75

    @property
    def aspect(self) -> str:
        """Whether a length is the same along both axes; a line scan would be too thin."""
        left, right, bottom, top = self.edges
        ratio = abs((top - bottom) / (right - left))
        return "equal" if self.units[0] == self.units[1] and 1 / 15 < ratio < 15 else "auto"

    def label(self, axis: int) -> str:
        """Text for axis 0 (slow) or 1 (fast)."""
        unit = _SYMBOLS.get(self.units[axis], self.units[axis])
        return _plain(f"{self.labels[axis]} ({unit})" if unit else self.labels[axis])


class MapPanel:
    """One map in its axes, with a colour bar; `show` may be called again and again."""

    def __init__(
        self, ax: Axes, field: str, units: str, axes: MapAxes, *, diverging: bool | None = None
    ) -> None:
        self.ax = ax
        self.limits: tuple[float, float] | None = None
        self._units = units
        self._scale = 1.0
        self._flags = field == "flags"
        self._diverging = field in _DIVERGING if diverging is None else diverging
        left, right, bottom, top = axes.edges
        self.image = ax.imshow(
            np.full(axes.shape, np.nan),
            cmap="RdBu_r" if self._diverging else "viridis",
            origin="lower",
            extent=axes.edges,
            aspect="equal" if axes.aspect == "equal" else "auto",
            interpolation="nearest",
        )
        # a motor that runs down still grows to the right and upwards on the page
        ax.set_xlim(min(left, right), max(left, right))
        ax.set_ylim(min(bottom, top), max(bottom, top))
        ax.patch.set(**_BLANK)
        self.title(_TITLES.get(field) or _sigma_title(field))
        figure = ax.get_figure(root=True)
        assert figure is not None
        # an inset is as high as the map, whatever the aspect
        beside = ax.inset_axes((1.03, 0.0, 0.05, 1.0))
        if self._flags:
            colours = [colour for _, colour in _FLAGS.values()]
            self.image.set(
                cmap=ListedColormap(colours),
                norm=BoundaryNorm(np.arange(len(colours) + 1) - 0.5, 8),
            )
        extend = "neither" if self._flags else "both"
        self.colorbar = figure.colorbar(self.image, cax=beside, extend=extend)
        if self._flags:
            self.colorbar.set_ticks(range(len(_FLAGS)), labels=list(_FLAGS), fontsize="small")
            self.colorbar.ax.minorticks_off()
        self.colorbar.ax.set_visible(False)  # until there is something to show

    def title(self, text: str) -> None:
        """Put a title above the map."""
        # without y its search for a place halves the frame rate
        self.ax.set_title(_plain(text), y=1.0)

    def show(self, image: NDArray[Any], *, limits: tuple[float, float] | None = None) -> None:
        """Show an image (rows, columns); blank where it is NaN.

        `limits` are the colour limits, in the image's unit; robust ones if absent.
        """
        if self._flags:
            self._show_flags(image)
            return
        limits = limits or robust_limits(image, diverging=self._diverging)
        if limits is not None and self._differ(limits):
            self.limits = limits
            self._scale, unit = _engineering(limits, self._units)
            self.image.set_clim(limits[0] * self._scale, limits[1] * self._scale)
            self.colorbar.ax.set_title(_plain(unit), fontsize="medium", loc="left", y=1.05)
            self.colorbar.ax.set_visible(True)
        self.image.set_array(np.asarray(image, dtype=float) * self._scale)

    def _show_flags(self, image: NDArray[Any]) -> None:
        known = np.isfinite(image)
        flags = np.where(known, image, 0).astype(np.int64)
        shown = np.where(known, 0.0, np.nan)
        for i, (flag, _) in enumerate(_FLAGS.values()):
            shown[known & (flags & flag > 0)] = i
        self.limits = (0.0, float(len(_FLAGS) - 1))
        self.colorbar.ax.set_visible(True)
        self.image.set_array(shown)

    def _differ(self, limits: tuple[float, float]) -> bool:
        if self.limits is None:
            return True
        span = self.limits[1] - self.limits[0]
        return any(
            abs(a - b) > _KEEP_LIMITS * span for a, b in zip(limits, self.limits, strict=True)
        )


def new_figure(rows: int, columns: int, axes: MapAxes) -> Figure:
    """Return a figure with room for a grid of maps."""
    return plt.figure(figsize=figure_inches(rows, columns, axes), layout="constrained")


def own_figure(panels: int, axes: MapAxes) -> Figure:
    """Return a figure for `plot_maps` that pyplot knows nothing of: for any thread."""
    return Figure(figure_inches(*_grid_shape(panels), axes), layout="constrained")


def _grid_shape(panels: int) -> tuple[int, int]:
    """Return the rows and columns in which `plot_maps` puts its maps."""
    columns = panels if panels < 4 else math.ceil(math.sqrt(panels))
    return math.ceil(panels / columns), columns


def figure_inches(rows: int, columns: int, axes: MapAxes) -> tuple[float, float]:
    """Return the size, width and height, that a grid of maps needs."""
    height = _PANEL_INCHES * min(max(axes.ratio, 0.2), 1.6)
    return columns * (_PANEL_INCHES + 0.9), rows * (height + 0.5) + 0.4


def label_outer(grid: NDArray[Any], axes: MapAxes) -> None:
    """Name the motors along the outer edges of a grid of maps."""
    for ax in grid[:, 0]:
        ax.set_ylabel(axes.label(0))
    for column in grid.T:
        lowest = [ax for ax in column if ax.figure is not None][-1]
        lowest.set_xlabel(axes.label(1))
        lowest.tick_params(labelbottom=True)


def _plain(text: str) -> str:
    """Return text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _sigma_title(field: str) -> str:
    of = _TITLES.get(field.removesuffix("_sigma"))
    return f"σ of {of[0].lower()}{of[1:]}" if of and field.endswith("_sigma") else field


def _engineering(limits: tuple[float, float] | None, units: str) -> tuple[float, str]:
    """Return the factor to show values by, and the text of the unit then."""
    largest = max((abs(v) for v in limits or () if math.isfinite(v)), default=0.0)
    # 10⁻³ from 1e-4 on: 0.5 × 10⁻³ reads better than 500 × 10⁻⁶
    exponent = 3 * math.floor((1 + math.log10(largest)) / 3) if largest > 0 else 0
    exponent = min(max(exponent, -9), 0)
    symbol = _SYMBOLS.get(units, units)
    if symbol == "counts":
        return 1.0, symbol
    return 10.0**-exponent, _PREFIXES[exponent] + symbol if symbol else _POWERS[exponent]


def in_words(value: float, like: tuple[float, float], units: str) -> str:
    """Write a value in the unit that suits two like it, e.g. "0.51 × 10⁻³" or "12.3 m°"."""
    return _text(value, like, units)


def _text(value: float, limits: tuple[float, float] | None, units: str) -> str:
    """Write a value in the unit of a colour bar with these limits."""
    factor, unit = _engineering(limits, units)
    shown = value * factor
    number = f"{shown:.0f}" if 1e3 <= abs(shown) < 1e9 else f"{shown:.3g}"
    return f"{number}{' ×' if unit in _POWERS.values() and unit else ''} {unit}".rstrip()
