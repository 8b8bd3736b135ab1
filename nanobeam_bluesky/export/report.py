"""A report of one derived run: what was measured, how it was analysed, what it is worth."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from nanobeam_bluesky.export.files import run_title, to_png
from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.plots import in_words

__all__ = ["Report"]

_WHY = {
    Flag.FEW_COUNTS: "too few photons",
    Flag.SATURATED: "a pixel is saturated",
    Flag.OUT_OF_RANGE: "strain or tilt beyond what the estimator is valid for",
    Flag.MISFIT: "a pattern that the model cannot make",
    Flag.NOT_CONVERGED: "no solution found",
    Flag.FRAME_MISSING: "not measured, or the frame could not be read",
    Flag.POSITION_MISSING: "position unknown",
}
_QUANTITIES = {
    "strain": "Strain ε",
    "omega": "Tilt ω",
    "chi": "Tilt χ",
    "thickness": "Thickness",
    "counts": "Counts",
    "background": "Background per pixel",
    "deviance": "Deviance (0 ± 1 where the model fits)",
}
"""Of the flagged points the last three have values, too."""
_UNITS = {"um": "µm", "nm": "nm", "mm": "mm", "mrad": "mrad"}
_PICTURES = ("strain", "omega", "chi", "strain_sigma", "counts", "flags")
_LONGEST = 300
"""Letters of a value out of the metadata."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .4rem; }
table { border-collapse: collapse; } img { max-width: 100%; }
th, td { text-align: left; padding: .2rem 1.4rem .2rem 0; border-bottom: 1px solid #ddd;
         vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; } .status { color: #555; } .bad { color: #a33; }
"""
# the page loads nothing and runs nothing, whatever the metadata say
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class _Table:
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Report:
    """What there is to say of a derived run.

    Parameters
    ----------
    maps
        Of `to_maps`.
    start, stop
        Documents of the derived run; no stop while it goes on.
    """

    def __init__(
        self, maps: xr.Dataset, start: Mapping[str, Any], stop: Mapping[str, Any] | None = None
    ) -> None:
        self._maps = maps
        block = _mapping(start.get("nanobeam"))
        number, plan = block.get("original_scan_id"), block.get("original_plan_name")
        sample = start.get("sample")
        self.title = f"Strain and tilts: {_text(run_title(start))}"
        self.status, self.is_bad = _status(maps, stop)
        self._tables = [
            _Table(
                "Measured",
                (),
                _rows(
                    ("Sample", sample),
                    ("Scan", " ".join(_text(part) for part in (number, plan) if part)),
                    ("Raw run", start.get("original_run_uid")),
                    *(
                        (key.capitalize(), start.get(key))
                        for key in ("project", "proposal", "purpose")
                    ),
                    *_axes(maps),
                ),
            ),
            _Table("Geometry", (), _geometry(_mapping(block.get("geometry")))),
            _quantities(maps),
            _quality(maps),
            _Table(
                "Analysis",
                (),
                _rows(
                    ("Derived run", start.get("uid")),
                    ("Begun", _when(start.get("time"))),
                    ("Version", block.get("version")),
                    *(
                        (key.replace("_", " ").capitalize(), value)
                        for key, value in _mapping(block.get("analyzer")).items()
                    ),
                    ("Analysis id", block.get("analysis_id")),
                    ("Geometry's fingerprint", block.get("fingerprint")),
                ),
            ),
        ]

    def markdown(self) -> str:
        """Return the report as Markdown, without a picture."""
        lines = [f"# {_marked(self.title)}", "", _marked(self.status), ""]
        for table in self._tables:
            if not table.rows:
                continue
            header = table.header or ("", "")
            lines += [f"## {table.title}", "", _line(header), _line(["---"] * len(header))]
            lines += [_line(map(_marked, row)) for row in table.rows] + [""]
        return "\n".join(lines)

    def html(self) -> str:
        """Return the report as a page of its own, with the maps in it."""
        picture = base64.b64encode(to_png(self._maps, self._pictures())).decode()
        parts = [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(self.title)}</h1>",
            f'<p class="{"bad" if self.is_bad else "status"}">{html.escape(self.status)}</p>',
            f'<img alt="Maps" src="data:image/png;base64,{picture}">',
        ]
        for table in self._tables:
            if not table.rows:
                continue
            parts += [f"<h2>{html.escape(table.title)}</h2><table>"]
            if table.header:
                parts.append(_html_row(table.header, first="th", rest="th"))
            first = "td" if table.header else "th"
            parts += [_html_row(row, first=first, rest="td") for row in table.rows]
            parts.append("</table>")
        return "\n".join([*parts, "</body></html>", ""])

    def _pictures(self) -> list[str]:
        return [name for name in _PICTURES if name in self._maps]


# ----------------------------------------------------------------------------- what it says


def _status(maps: xr.Dataset, stop: Mapping[str, Any] | None) -> tuple[str, bool]:
    flags = maps["flags"].to_numpy()
    good, points = int((flags == 0).sum()), flags.size
    share = f"{good} of {points} points are good ({_percent(good, points)})"
    if not stop:
        return f"Still being analysed: so far {share}.", False
    if stop.get("exit_status") == "success":
        return f"Complete: {share}.", False
    reason = _text(stop.get("reason") or "no reason given").rstrip(".")
    return f"Not complete ({_text(stop.get('exit_status'))}): {reason}. {share}.", True


def _axes(maps: xr.Dataset) -> list[tuple[str, str]]:
    rows, columns = maps.sizes["row"], maps.sizes["col"]
    found = [("Points", f"{rows} rows × {columns} columns")]
    for dim, what in (("row", "slow axis"), ("col", "fast axis")):
        axis = next((c for c in maps.coords.values() if c.dims == (dim,) and c.name != dim), None)
        if axis is None:
            continue
        unit = f" {axis.attrs['units']}" if axis.attrs.get("units") else ""
        first, last, n = float(axis[0]), float(axis[-1]), axis.size
        text = f"{_text(axis.name)}: {first:.6g} to {last:.6g}{unit}"
        if n > 1:
            text += f", step {abs(last - first) / (n - 1):.4g}{unit}"
        found.append((what.capitalize(), text))
    return found


def _geometry(geometry: Mapping[str, Any]) -> list[tuple[str, str]]:
    optics = _mapping(geometry.get("optics"))
    shape = geometry.get("roi_shape")
    roi = " × ".join(map(_text, shape)) if isinstance(shape, Sequence) else None
    binning = geometry.get("binning")
    return _rows(
        ("Photon energy", _with_unit(geometry.get("energy_keV"), "keV")),
        ("Lattice plane spacing", _with_unit(geometry.get("d_spacing_angstrom"), "Å")),
        ("Film thickness", _with_unit(geometry.get("thickness_nm"), "nm")),
        ("Detector distance", _with_unit(geometry.get("detector_distance_m"), "m")),
        ("Pixel size", _with_unit(geometry.get("pixel_size_um"), "µm")),
        ("Region of interest", roi and f"{roi} pixels, binned {_text(binning)} × {_text(binning)}"),
        ("Optics", ", ".join(_named(key, value) for key, value in optics.items())),
    )


def _named(key: Any, value: Any) -> str:
    """Return e.g. "outer diameter 149 µm" of a name with a unit at its end."""
    words = _text(key).split("_")
    unit = _UNITS.get(words[-1], "")
    text = f"{' '.join(words[:-1] if unit else words)} {_text(value)} {unit}".rstrip()
    return _text(value).replace("_", " ") if key == "kind" else text


def _quantities(maps: xr.Dataset) -> _Table:
    rows = []
    for name, title in _QUANTITIES.items():
        if name not in maps:
            continue
        unit = str(maps[name].attrs.get("units", ""))
        values = maps[name].to_numpy()
        finite = values[np.isfinite(values)]
        if not finite.size:
            continue
        low, middle, high = (float(v) for v in np.percentile(finite, (5, 50, 95)))
        words = partial(in_words, like=(low, high), units=unit)
        sigmas = maps.get(f"{name}_sigma")
        sigma = ""
        if sigmas is not None and np.isfinite(sigmas.to_numpy()).any():
            sigma = words(float(np.nanmedian(sigmas.to_numpy())))
        rows.append((title, words(middle), f"{words(low)} to {words(high)}", sigma))
    header = ("Quantity", "Median", "90 % of the points lie in", "Median σ of a point")
    return _Table("Values", header, rows)


def _quality(maps: xr.Dataset) -> _Table:
    flags = maps["flags"].to_numpy()
    rows = [("good", str(int((flags == 0).sum())), _percent((flags == 0).sum(), flags.size), "")]
    for flag, why in _WHY.items():
        count = int((flags & flag != 0).sum())
        if count:
            name = str(flag.name).lower().replace("_", " ")
            rows.append((name, str(count), _percent(count, flags.size), why))
    return _Table("Quality", ("Points", "Number", "Share", "Meaning"), rows)


# --------------------------------------------------------------------------------- as text


def _rows(*pairs: tuple[str, Any]) -> list[tuple[str, str]]:
    return [(name, _text(value)) for name, value in pairs if value not in (None, "")]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        value = ", ".join(map(_text, value))
    elif isinstance(value, Mapping):
        value = ", ".join(f"{k}: {_text(v)}" for k, v in value.items())
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _with_unit(value: Any, unit: str) -> str | None:
    return None if value is None else f"{_text(value)} {unit}"


def _percent(count: Any, of: int) -> str:
    return f"{100 * int(count) / max(1, of):.3g} %"


def _when(seconds: Any) -> str | None:
    try:
        return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _marked(text: str) -> str:
    """Escape what Markdown, or HTML in it, would take for its own."""
    return re.sub(r"([\\`*_{}\[\]|<>&~$])", r"\\\1", text)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _html_row(cells: Sequence[str], *, first: str, rest: str) -> str:
    tags = [first, *[rest] * (len(cells) - 1)]
    inner = "".join(f"<{t}>{html.escape(c)}</{t}>" for t, c in zip(tags, cells, strict=True))
    return f"<tr>{inner}</tr>"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
