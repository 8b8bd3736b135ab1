"""``nanobeam demo``: the whole path on a simulated beamline."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from bluesky import RunEngine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nanobeam_bluesky.callbacks import BackgroundSink, LiveMaps, NanobeamCallback, SinkHealth
from nanobeam_bluesky.documents import to_maps
from nanobeam_bluesky.geometry import Geometry, RectangularPupil, ZonePlate
from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.models.reduced import (
    check_envelope,
    envelope_ranges,
    random_geometry,
    reduce_geometry,
)
from nanobeam_bluesky.physics import cramer_rao
from nanobeam_bluesky.plots import plot_comparison
from nanobeam_bluesky.sim import Phantom, SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import derived_writer, open_catalog, raw_writer

__all__ = ["run_demo"]

DWELL_S = 0.002
"""Time per point, s: 500 Hz."""

PUBLISHED_RMSE = {"strain": 1.8e-4, "omega": 5.4e-4, "chi": 1.6e-3}
"""One published network on the continuous model at 4300 counts (re-measured)."""

_UNITS = {"strain": ("ε", "", 1.0), "omega": ("ω", "°", 1.0), "chi": ("χ", "°", 1.0)}


@dataclass(eq=False)  # hashable, as subscribers must be
class _Stopwatch:
    """Stands between RunEngine and callback, and measures."""

    callback: NanobeamCallback
    documents: int = 0
    seconds: float = 0.0
    opened: float = 0.0
    """When the start document came."""
    first_values: float = 0.0
    started: float = 0.0
    stopped: float = 0.0
    announced: dict[int, float] = field(default_factory=dict)
    """Point → when a document told of its frame."""
    delays: list[float] = field(default_factory=list)
    uids: dict[str, str] = field(default_factory=dict)

    def __call__(self, name: str, doc: Mapping[str, Any]) -> None:
        """Time the callback in the RunEngine's thread."""
        before = time.perf_counter()
        self.callback(name, doc)
        self.seconds += time.perf_counter() - before
        self.documents += 1
        if name == "stream_datum":
            points = range(doc["seq_nums"]["start"], doc["seq_nums"]["stop"])
            self.announced.update(dict.fromkeys(points, before))
            self.started = self.started or before
        elif name == "start":
            self.opened = before
            self.uids["raw"] = doc["uid"]
        elif name == "stop":
            self.stopped = before

    def derived(self, name: str, doc: Mapping[str, Any]) -> None:
        """Note when the values of a point are there."""
        now = time.perf_counter()
        if name == "event_page":
            self.first_values = self.first_values or now
            self.delays += [now - self.announced[number] for number in doc["seq_num"]]
        elif name == "start":
            self.uids["derived"] = doc["uid"]


def run_demo(
    shape: tuple[int, int],
    counts: float,
    sample: str,
    out: Path,
    console: Console,
    *,
    random_seed: int | None = None,
    show: bool = False,
) -> bool:
    """Fly a simulated scan, map it live, record both runs, print and draw the outcome.

    The geometry is the published one, or what `random_seed` draws; strain and tilts of the
    sample then go half as far as the shipped network knows.

    Returns
    -------
    ok
        Whether every point has arrived in the derived run.
    """
    geometry = Geometry.published()
    truth = phantom(sample, shape)  # type: ignore[arg-type]  # refused by name if unknown
    callback = NanobeamCallback()  # its worker starts up meanwhile
    if random_seed is not None:
        geometry = _draw_geometry(random_seed)
        truth = _within(truth, envelope_ranges(reduce_geometry(geometry)))
        _print_geometry(console, geometry, random_seed)
    out.mkdir(parents=True, exist_ok=True)
    client = open_catalog(out)
    sxdm = SimulatedSXDM(truth, geometry, out / "frames", counts=counts)
    watch = _Stopwatch(callback)
    callback.subscribe(watch.derived)
    callback.subscribe(derived_writer(client["derived"]))
    live = LiveMaps() if show else None
    if live is not None:
        callback.subscribe(live)
    record = BackgroundSink(raw_writer(client["raw"]), name="raw runs")

    engine = RunEngine({}, during_task=live) if live else RunEngine({})  # type: ignore[arg-type]
    engine.subscribe(record)
    engine.subscribe(watch)
    console.print(
        f"Flying {sample}, {shape[0]} × {shape[1]} points at {1 / DWELL_S:.0f} Hz, "
        f"{counts:.0f} counts a pattern"
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("points mapped", total=truth.size)
        callback.subscribe(
            lambda name, doc: progress.advance(task, len(doc["seq_num"])), "event_page"
        )
        engine(sxdm_fly(sxdm, dwell_s=DWELL_S))
        ok = callback.wait(60) and record.wait(60) and not record.health.errors

    run = client["derived"][watch.uids["derived"]]
    maps = to_maps(run)
    ok = ok and int((maps["flags"] != Flag.FRAME_MISSING).sum()) == truth.size
    _print_table(console, maps, truth, geometry, sxdm, watch, callback, record.health)
    figure = _draw_maps(maps, truth, out / "demo.png")
    console.print(
        f"\nFigure: {figure}\nRuns and frames: {out}; read them back with", soft_wrap=True
    )
    console.print(
        "  from nanobeam_bluesky import to_maps\n"
        "  from nanobeam_bluesky.tiled_adapters import open_catalog\n"
        f"  maps = to_maps(open_catalog({str(out)!r})['derived'].values().last())",
        highlight=False,
        soft_wrap=True,
    )
    callback.close()
    if show:
        plt.show()
    return ok


def _draw_geometry(seed: int) -> Geometry:
    """Draw what a user knows: binning and ROI are left to `Geometry`."""
    rng = np.random.default_rng(seed)
    while True:
        drawn = random_geometry(rng).model_dump(
            exclude={"binning", "roi_shape", "roi_origin_px", "delta_theta_deg"},
            exclude_none=True,
        )
        drawn |= {"detector_shape": (512, 512), "bragg_center_px": (256.0, 256.0)}
        try:
            geometry = Geometry(**drawn)
            check_envelope(geometry, reduce_geometry(geometry))
        except ValueError:  # the pupil is larger than the detector
            continue
        if geometry.pupil_blur_px > 0:  # no real pupil is perfectly sharp
            return geometry


def _within(sample: Phantom, ranges: Mapping[str, float]) -> Phantom:
    """Scale strain and tilts to half the ranges."""
    scaled = {}
    for name, limit in ranges.items():
        values = getattr(sample, name)
        scaled[name] = values * (limit / 2 / np.abs(values).max())
    return replace(sample, **scaled)


def _print_geometry(console: Console, geometry: Geometry, seed: int) -> None:
    half_x, half_y, stop_x, stop_y = geometry.pupil_px
    match geometry.optics:
        case ZonePlate() as plate:
            focal = plate.focal_length_at(geometry.wavelength_angstrom)
            optics = (
                f"zone plate {plate.diameter_um:g} µm, f = {focal:.3g} mm, "
                f"stop {plate.central_stop_diameter_um:.3g} µm"
            )
            pupil = f"radius {half_x:.3g}, stop {stop_x:.3g}"
        case RectangularPupil() as mirrors:
            optics = (
                f"mirrors {mirrors.divergence_x_mrad:.3g} × {mirrors.divergence_y_mrad:.3g} mrad, "
                f"stop {mirrors.stop_x_mrad:.3g} × {mirrors.stop_y_mrad:.3g} mrad"
            )
            pupil = f"half-widths {half_x:.3g} × {half_y:.3g}, stop {stop_x:.3g} × {stop_y:.3g}"
    height, width = geometry.roi_shape
    table = Table(show_header=False, box=None)
    for name, value in (
        ("seed", f"{seed}"),
        ("energy", f"{geometry.energy_keV:.2f} keV"),
        ("Bragg angle", f"{geometry.bragg_angle_deg:.1f}°"),
        ("distance", f"{geometry.detector_distance_m:.2f} m, {geometry.pixel_size_um:g} µm pixels"),
        ("optics", optics),
        ("film", f"{geometry.thickness_nm:.1f} nm"),
        (
            "ROI, binning",
            f"{height} × {width} pixels, binned by {geometry.binning} to a pattern of "
            f"{geometry.pattern_shape[0]} × {geometry.pattern_shape[1]}",
        ),
        ("pupil", f"{pupil} binned pixels, blur {geometry.pupil_blur_px:.2f}"),
        ("fringe period", f"{geometry.fringe_px:.1f} binned pixels"),
    ):
        table.add_row(name, value)
    console.print(table)


def _print_table(
    console: Console,
    maps: xr.Dataset,
    truth: Phantom,
    geometry: Geometry,
    sxdm: SimulatedSXDM,
    watch: _Stopwatch,
    callback: NanobeamCallback,
    record: SinkHealth,
) -> None:
    seconds = watch.stopped - watch.started
    health = callback.health
    table = Table(show_header=False, box=None)
    for name, text in (
        ("points", f"{truth.size}"),
        ("flight", f"{seconds:.1f} s, {truth.size / seconds:.0f} points/s"),
        (
            "RunEngine thread",
            f"{1e6 * watch.seconds / watch.documents:.1f} µs a document "
            f"({watch.documents} documents)",
        ),
        ("start document to first values", f"{watch.first_values - watch.opened:.2f} s"),
        (
            "lag, document to value",
            f"median {np.median(watch.delays):.2f} s, 95 % {np.quantile(watch.delays, 0.95):.2f} s",
        ),
        ("flagged", _flagged(maps)),
        (
            "errors",
            f"{health.errors + record.errors} {health.last_error or record.last_error}".rstrip(),
        ),
    ):
        table.add_row(name, text)
    console.print(table)

    good = np.isfinite(maps["strain"].to_numpy())
    bound = cramer_rao(
        truth.strain[good],
        truth.omega[good],
        truth.chi[good],
        geometry,
        scale=sxdm.scale * truth.intensity[good],
    )
    accuracy = Table("", "RMSE", "Cramér–Rao bound", "ratio", "σ, median", "inside 2σ")
    published = geometry == Geometry.published()
    if published:
        accuracy.add_column("a published network")
    for key, (symbol, unit, _) in _UNITS.items():
        error = maps[key].to_numpy()[good] - getattr(truth, key)[good]
        sigma = maps[f"{key}_sigma"].to_numpy()[good]
        rmse = float(np.sqrt(np.mean(error**2)))
        limit = float(np.sqrt(np.mean(np.square(bound[key]))))
        accuracy.add_row(
            symbol,
            f"{rmse:.2e}{unit}",
            f"{limit:.2e}{unit}",
            f"{rmse / limit:.2f}",
            f"{np.median(sigma):.2e}{unit}",
            f"{100 * np.mean(np.abs(error) < 2 * sigma):.1f} %",
            *([f"{PUBLISHED_RMSE[key]:.1e}{unit}"] if published else []),
        )
    console.print(accuracy)


def _flagged(maps: xr.Dataset) -> str:
    """Count the flagged points, by flag."""
    flags = maps["flags"].to_numpy()
    counts = [(flag, int((flags & flag > 0).sum())) for flag in Flag]
    parts = [f"{n} {str(flag.name).lower().replace('_', ' ')}" for flag, n in counts if n]
    return ", ".join(parts) or "none"


def _draw_maps(maps: xr.Dataset, truth: Phantom, path: Path) -> Path:
    true = maps.copy()
    for key in _UNITS:
        values = np.where(truth.intensity > 0, getattr(truth, key), np.nan)
        true[key] = (("row", "col"), values, maps[key].attrs)
    figure = plot_comparison(true, maps, diagnostics=("counts", "background", "deviance", "flags"))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
