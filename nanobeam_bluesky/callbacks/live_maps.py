"""`LiveMaps`: a window in which the maps of a scan fill in."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nanobeam_bluesky.models import Estimates
from nanobeam_bluesky.plots import MapAxes, MapPanel, figure_inches, label_outer, new_figure

__all__ = ["LiveMaps"]

logger = logging.getLogger("nanobeam_bluesky")

INTERVAL_SECONDS = 0.2
"""Shortest time between two drawings."""
DRAWING_SHARE = 0.2
"""Largest part of the time that drawing may take: it holds the interpreter lock."""


class LiveMaps:
    """Figure with ε, ω, χ and one more map of the derived run that started last.

    Subscribe it to a `NanobeamCallback`: ``callback.subscribe(LiveMaps())``. Documents
    may come in any thread, they only fill arrays. Drawing belongs to the main thread:
    there a timer of the window does it, or `draw`, or, while a plan runs in a backend
    other than Qt, ``RunEngine(during_task=live_maps)``. When the window is closed or
    cannot be drawn, that ends; the scan goes on.

    Parameters
    ----------
    fourth
        The fourth map, any field of `Estimates`, e.g. "strain_sigma".
    figure
        Figure to draw in; a new window if absent.

    Raises
    ------
    ValueError
        If there is no such field.
    RuntimeError
        If this is not the main thread.
    """

    def __init__(self, fourth: str = "counts", *, figure: Figure | None = None) -> None:
        if fourth not in Estimates.UNITS:
            raise ValueError(f"no map of {fourth!r}: there are {', '.join(Estimates.UNITS)}")
        _check_thread()
        self.fields = ("strain", "omega", "chi", fourth)
        self._own_figure = figure is None
        self.figure = figure or new_figure(2, 2, MapAxes((1, 1)))
        self.figure.suptitle("waiting for a scan")
        self._starts: dict[str, Mapping[str, Any]] = {}
        self._run: _Run | None = None
        self._panels: dict[str, MapPanel] = {}
        self._drawn: tuple[_Run, int] | None = None
        self._next_drawing = 0.0
        self._laid_out: list[bool] | None = None
        self._open = True
        canvas = self.figure.canvas
        self._timer = canvas.new_timer(interval=int(1000 * INTERVAL_SECONDS))
        self._timer.add_callback(self._tick)
        self._timer.start()
        canvas.mpl_connect("close_event", lambda event: self._close())
        if canvas.required_interactive_framework is not None and self._own_figure:
            self.figure.show()

    # ------------------------------------------------------------------ documents

    def __call__(self, name: str, doc: Mapping[str, Any]) -> None:
        """Take a document of a derived run, in any one thread; what is no map is ignored."""
        run = self._run
        if name == "start":
            self._starts[doc["uid"]] = doc
        elif name == "descriptor":
            start = self._starts.get(doc["run_start"])
            keys = doc["data_keys"]
            if start and "shape" in start and {"row", "col", *self.fields} <= keys.keys():
                self._run = _Run(start, doc, self.fields)
        elif name == "stop":
            self._starts.pop(doc["run_start"], None)
            if run and doc["run_start"] == run.start["uid"]:
                run.close(doc)
        elif run and doc.get("descriptor") == run.descriptor:
            if name == "event":
                run.add({key: [value] for key, value in doc["data"].items()})
            elif name == "event_page":
                run.add(doc["data"])

    # -------------------------------------------------------------------- drawing

    def draw(self) -> None:
        """Draw what has come so far; in the main thread."""
        self._update()
        self._draw()

    def save(self, path: str | PathLike[str], **options: Any) -> None:
        """Write what has come so far to an image file; options as for `Figure.savefig`."""
        self._update()
        self.figure.savefig(path, **options)

    def block(self, event: threading.Event) -> None:
        """Keep the window alive until the event is set: a RunEngine's ``during_task``."""
        while not event.wait(0.05):
            self._tick()
            self._guarded(self.figure.canvas.flush_events)
        self._next_drawing = 0.0
        self._tick()

    def _tick(self) -> None:
        self._guarded(self._draw_if_due)

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do something with the window; give it up at the first error, as a plan may wait."""
        if self._open:
            try:
                action()
            except Exception:
                self._close()
                logger.exception("the maps could not be drawn; there will be no more of them")

    def _draw_if_due(self) -> None:
        begin = time.monotonic()
        if begin >= self._next_drawing and self._update():
            self._draw()
            took = time.monotonic() - begin
            self._next_drawing = begin + max(INTERVAL_SECONDS, took / DRAWING_SHARE)

    def _close(self) -> None:
        self._open = False
        self._timer.stop()

    def _draw(self) -> None:
        # laid out when a colour bar comes: every time would take as long as the drawing
        bars = [panel.limits is not None for panel in self._panels.values()]
        self.figure.set_layout_engine("none" if bars == self._laid_out else "constrained")
        self.figure.canvas.draw()
        self._laid_out = bars

    def _update(self) -> bool:
        """Bring the artists up to date; whether there was anything new."""
        _check_thread()
        run = self._run
        if run is None:
            return False
        state = (run, run.version)
        if self._drawn == state:
            return False
        if self._drawn is None or self._drawn[0] is not run:
            self._begin(run)
        for field, panel in self._panels.items():
            panel.show(run.images[field])
        self.figure.suptitle(run.title())
        self._drawn = state
        return True

    def _begin(self, run: _Run) -> None:
        """Lay the panels out for another run; from then on only their arrays change."""
        self.figure.clear()
        if self._own_figure and (self._drawn is None or self._drawn[0].axes != run.axes):
            self.figure.set_size_inches(figure_inches(2, 2, run.axes))
        self._laid_out = None
        grid = self.figure.subplots(2, 2, sharex=True, sharey=True)
        self._panels = {
            field: MapPanel(ax, field, run.units[field], run.axes)
            for field, ax in zip(self.fields, grid.flat, strict=True)
        }
        label_outer(grid, run.axes)


class _Run:
    """What has come of one derived run."""

    def __init__(
        self, start: Mapping[str, Any], descriptor: Mapping[str, Any], fields: tuple[str, ...]
    ) -> None:
        self.start = start
        self.descriptor = descriptor["uid"]
        keys = descriptor["data_keys"]
        self.units = {field: keys[field].get("units") or "" for field in fields}
        motors = [str(motor) for motor in start.get("motors", ("row", "column"))]
        rows, cols = (int(n) for n in start["shape"])
        extents = start.get("extents")
        self.axes = MapAxes(
            (rows, cols),
            labels=(motors[0], motors[1]),
            units=(_units(keys, motors[0]), _units(keys, motors[1])),
            extents=extents and (tuple(extents[0]), tuple(extents[1])),
        )
        self.images: dict[str, NDArray[np.float64]] = {
            field: np.full(self.axes.shape, np.nan) for field in fields
        }
        self.version = 0
        """Grows with every change."""
        self._flags = np.full(self.axes.shape, -1)  # -1: not come yet
        self._stop: Mapping[str, Any] | None = None

    def add(self, data: Mapping[str, Any]) -> None:
        row, col = (np.asarray(data[key], dtype=np.int64) for key in ("row", "col"))
        rows, cols = self.axes.shape
        # a point without a place has row and column -1
        on_grid = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
        row, col = row[on_grid], col[on_grid]
        flags = np.asarray(data["flags"], dtype=np.int64)[on_grid]
        for field, image in self.images.items():
            values = np.asarray(data[field], dtype=float)[on_grid]
            if field not in Estimates.DIAGNOSTICS:
                values = np.where(flags == 0, values, np.nan)
            image[row, col] = values
        self._flags[row, col] = flags
        self.version += 1

    def close(self, stop: Mapping[str, Any]) -> None:
        self._stop = stop
        self.version += 1

    def title(self) -> str:
        """Which scan this is, and how far it is."""
        scan = self.start.get("nanobeam", {}).get("original_scan_id")
        uid = str(self.start.get("original_run_uid", self.start["uid"]))[:8]
        name = f"scan {scan} ({uid})" if scan else f"scan {uid}"
        sample = self.start.get("sample")
        if isinstance(sample, Mapping):
            sample = sample.get("name")
        points = np.count_nonzero(self._flags >= 0)
        flagged = np.count_nonzero(self._flags > 0)
        parts = [
            *([str(sample)] if sample else []),
            name,
            f"{points} of {self._flags.size} points",
            *([f"{flagged} flagged"] if flagged else []),
        ]
        if self._stop is not None:
            status, reason = self._stop["exit_status"], self._stop.get("reason")
            parts.append("done" if status == "success" else f"{status}: {reason}"[:100])
        return " · ".join(parts)


def _units(keys: Mapping[str, Any], motor: str) -> str:
    return str(keys.get(motor, {}).get("units") or "")


def _check_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "LiveMaps draws in the main thread alone, and this is "
            f"{threading.current_thread().name!r}: make it and call draw() there"
        )
