"""The command line: ``nanobeam``.

Exit codes: 0 all done, 1 something failed, 2 wrong usage.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import sys
import threading
import tomllib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Column, Table

from nanobeam_bluesky.geometry import Geometry, GeometryError

if TYPE_CHECKING:
    from nanobeam_bluesky.models import Accuracy, Card
    from nanobeam_bluesky.retrospective import Analysis, Comparison

__all__ = ["app"]


class Sampling(StrEnum):
    """Of the forward model."""

    CONTINUOUS = "continuous"
    PUBLISHED = "published"


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Strain and tilt maps from scanning X-ray diffraction microscopy.",
)
models = typer.Typer(no_args_is_help=True, help="The stored networks.")
app.add_typer(models, name="models")
console = Console()
errors = Console(stderr=True)


Start = Annotated[
    Path | None, typer.Option(help="Run-start document (JSON) to read the geometry from.")
]
GeometryFile = Annotated[
    Path | None, typer.Option(help="Geometry (TOML, the names of the nanobeam block).")
]
Preset = Annotated[str, typer.Option(help="Preset, or path of one, for --start.")]
Catalog = Annotated[
    str | None, typer.Option(help="Folder of runs, address of a Tiled server, or its profile.")
]
RootMap = Annotated[
    list[str] | None,
    typer.Option(help="A folder of the documents and where it is mounted here: OLD=NEW."),
]
AutoPreset = Annotated[
    str, typer.Option(help="Preset, or path of one; auto: the first shipped that matches.")
]
Fit = Annotated[list[str] | None, typer.Option(help="Unknown as well: thickness, blur.")]
OnMissingModel = Annotated[
    str, typer.Option(help="Where no network was trained: universal, fit, train or skip.")
]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Correct the geometry by a run's first points.")
]
Store = Annotated[
    Path | None, typer.Option(help="Folder of the networks; default in NANOBEAM_HOME.")
]
Fingerprint = Annotated[str, typer.Argument(help="Of the geometry; its beginning is enough.")]


@app.callback(invoke_without_command=True)
def _main(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        console.print(version("nanobeam-bluesky"))
        raise typer.Exit


@app.command()
def demo(
    shape: Annotated[tuple[int, int], typer.Option(help="Rows and columns of the scan.", min=2)] = (
        64,
        64,
    ),
    counts: Annotated[float, typer.Option(help="Photons in a pattern, on average.", min=1)] = 6000,
    phantom: Annotated[
        str, typer.Option(help="The sample: figure3 (of the paper), film or unique.")
    ] = "figure3",
    random_geometry: Annotated[
        bool,
        typer.Option(
            "--random-geometry",
            help="Draw energy, distance, optics and film; map with no preparation.",
        ),
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of the random geometry; drawn, and printed, if absent.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs and figure.")] = Path("nanobeam-demo"),
    show: Annotated[bool, typer.Option(help="Open a window with the maps.")] = False,
    keep_serving: Annotated[
        bool, typer.Option(help="Serve the runs with Tiled afterwards, until Ctrl-C.")
    ] = False,
) -> None:
    """Fly a simulated scan and map it while it flies."""
    if seed is not None and not random_geometry:
        _stop("--seed is that of --random-geometry, which is missing", code=2)
    try:
        from nanobeam_bluesky.demo import run_demo
    except ImportError as error:
        _stop(f"{error}: the demo needs pip install 'nanobeam-bluesky[sim,tiled]'", code=2)
    if random_geometry and seed is None:
        seed = int(np.random.default_rng().integers(1_000_000))
    try:
        ok = run_demo(
            shape,
            counts,
            phantom,
            out,
            console,
            random_seed=seed,
            show=show,
        )
    except ValueError as error:
        _stop(str(error), code=2)
    if keep_serving:
        from nanobeam_bluesky.tiled_adapters import serve

        _keep_serving(serve(out), out)
    raise typer.Exit(0 if ok else 1)


@app.command()
def train(
    start: Start = None,
    geometry: GeometryFile = None,
    preset: Preset = "default",
    sampling: Annotated[
        Sampling, typer.Option(help="Of the simulated patterns.")
    ] = Sampling.CONTINUOUS,
    counts: Annotated[
        tuple[float, float], typer.Option(help="Photons in a pattern, from and to.", min=10)
    ] = (300, 1e5),
    peak: Annotated[
        float | None,
        typer.Option(help="Counts at the peak of the library (7 as published), not --counts."),
    ] = None,
    background: Annotated[
        float | None,
        typer.Option(
            help="Largest background, as a part of the mean; 0.1 in specialising, else 0.",
            min=0,
        ),
    ] = None,
    thickness_range: Annotated[
        float | None,
        typer.Option(help="Thickness as fourth result, up to this off the geometry's, nm.", min=0),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Length of the training; a minute on two cores by default.", min=1),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Or its time, s.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of noise and initial weights.")] = 0,
    seeds: Annotated[
        int, typer.Option(help="Train so many, from --seed on, and store the most accurate.", min=1)
    ] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask cluster that trains them.")
    ] = None,
    store: Store = None,
) -> None:
    """Specialise the shipped network to one geometry; the next scan with this geometry finds it.

    Where the shipped network is of no use, one is trained from scratch, and the reason given.
    """
    chosen = _geometry(start, geometry, preset)

    from nanobeam_bluesky.models import ModelStore
    from nanobeam_bluesky.retrospective.cluster import train_ensemble
    from nanobeam_bluesky.training import Progress

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with ProgressBar(*columns, console=console) as bar:
        task = bar.add_task("simulating", total=1.0)

        def show(progress: Progress) -> None:
            text = f"training, loss {progress.loss:.2e}"
            bar.update(task, completed=progress.fraction, description=text)

        try:
            trained = train_ensemble(
                chosen,
                range(seed, seed + seeds),
                scheduler=scheduler,
                sampling=sampling.value,
                ranges=None if thickness_range is None else {"thickness": thickness_range},
                counts=counts,
                peak=peak,
                background=background,
                steps=steps,
                seconds=seconds,
                progress=show if scheduler is None else None,
            )
        except ValueError as error:
            _stop(str(error), code=2)
        except ConnectionError as error:
            _stop(str(error), code=1)
    network, card = trained[0]
    stored = ModelStore(store)
    stored.save(network, card)
    specialised = card.training["start"] == "universal"
    console.print(_accuracy(card, _shipped_accuracy(card) if specialised else ()))
    how = "specialised from the shipped network" if specialised else "trained from scratch"
    if "reason" in card.training:
        _say(f"from scratch, because {card.training['reason']}")
    _say(
        f"{card.architecture} for geometry {card.fingerprint}, {how} in "
        f"{card.training['seconds']} s, between grid points; stored in {stored.root}"
    )


@app.command()
def calibrate(
    frames: Annotated[
        Path,
        typer.Option(help="Frames of the first rows: HDF5, .npy, .mda, a folder of TIFFs."),
    ],
    start: Start = None,
    geometry: GeometryFile = None,
    preset: Preset = "default",
    dataset: Annotated[str, typer.Option(help="In the HDF5 file.")] = "/entry/data/data",
    rows: Annotated[str, typer.Option(help="First frame and the one after the last.")] = "0:500",
    reference: Annotated[
        bool,
        typer.Option(help="Move the Bragg centre: the film is unstrained and untilted on average."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File for the corrected geometry (TOML).")
    ] = None,
) -> None:
    """Find transposition, bad pixels, background, blur and thickness from a scan's patterns."""
    chosen = _geometry(start, geometry, preset)

    from nanobeam_bluesky.models import CalibrationError
    from nanobeam_bluesky.models import calibrate as find

    try:
        found = find(_patterns(frames, dataset, rows, chosen), chosen, reference=reference)
    except (CalibrationError, OSError, EOFError) as error:
        _stop(str(error), code=1)
    except ValueError as error:
        _stop(str(error), code=2)
    new, none = found.geometry, "none seen"
    x, y = found.reference_center_px
    table = Table("", "found", "stated")
    table.add_row("orientation", new.orientation, chosen.orientation)
    table.add_row("thickness, nm", f"{found.thickness_nm}", f"{chosen.thickness_nm:.6g}")
    blur = none if found.pupil_blur_px is None else f"{found.pupil_blur_px}"
    table.add_row("pupil blur, binned px", blur, f"{chosen.pupil_blur_px:.6g}")
    table.add_row("background, counts per binned px", f"{found.background}", "")
    for name, pixels in (("hot", found.hot_pixels), ("dead", found.dead_pixels)):
        table.add_row(f"{name} pixels (row, column)", " ".join(map(str, pixels)) or none, "")
    for name, mean in (("ε", found.strain), ("ω, °", found.omega), ("χ, °", found.chi)):
        table.add_row(f"mean {name}", f"{mean}", "")
    stated = ", ".join(f"{value:.6g}" for value in chosen.bragg_center_px)
    table.add_row("centre if mean ε, χ are 0, px", f"{x}, {y}", stated)
    console.print(table)
    for note in found.notes:
        _say(f"- {note}")
    if out is not None:
        lines = (f"# {note}" for note in (f"calibrated from {frames.name!r}", *found.notes))
        try:
            out.write_text("\n".join((*lines, _to_toml(new))), "utf-8")
        except OSError as error:
            _stop(str(error), code=1)
        _say(f"corrected geometry {new.fingerprint()} in {out}")


@app.command()
def ingest(
    files: Annotated[
        list[str], typer.Argument(help="HDF5, NeXus, .npy or .mda files, folders of TIFF files.")
    ],
    to: Annotated[
        str, typer.Option(help="Where the runs go: a folder, or the address of a Tiled server.")
    ],
    geometry: Annotated[
        Path, typer.Option(help="Geometry (TOML, the names of the nanobeam block).")
    ],
    shape: Annotated[
        str | None,
        typer.Option(help="Rows and columns of the scan, such as 165,165."),
    ] = None,
    snake: Annotated[
        bool | None, typer.Option("--snake/--no-snake", help="Every second row is flown backwards.")
    ] = None,
    interrupted: Annotated[
        bool, typer.Option("--interrupted", help="Files may have fewer frames than --shape.")
    ] = False,
    dataset: Annotated[str | None, typer.Option(help="The frames in an HDF5 file.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="Of the files, if it is not recognised: aps26id, bliss, …")
    ] = None,
) -> None:
    """Make files of a beamline without Bluesky runs, which point to them; nothing is copied."""
    try:
        values = tomllib.loads(geometry.read_text("utf-8"))
        parts = None if shape is None else [int(part) for part in shape.split(",")]
        if parts is not None and (len(parts) != 2 or min(parts) < 1):
            raise ValueError("expected two numbers")
    except tomllib.TOMLDecodeError as error:
        _stop(f"{geometry}: {error}", code=2)
    except OSError as error:
        _stop(str(error), code=2)
    except ValueError as error:
        _stop(f"--shape {shape}: expected rows and columns, such as 165,165: {error}", code=2)
    try:
        from nanobeam_bluesky.retrospective import ingest as record
    except ImportError as error:
        _stop(f"{error}: nanobeam ingest needs pip install 'nanobeam-bluesky[tiled]'", code=2)
    failed = False
    folders: dict[str, None] = {}
    try:
        for one in record(
            files,
            values.get("nanobeam", values),
            to=to,
            shape=None if parts is None else (parts[0], parts[1]),
            snake=snake,
            interrupted=interrupted,
            dataset=dataset,
            layout=layout,
        ):
            notes = "; ".join(one.notes)
            if one.status == "failed":
                failed = True
                errors.print(f"{one.file}: {notes}", style="red", markup=False, soft_wrap=True)
            else:
                there = "was there already" if one.status == "there" else f"{one.points} points"
                _say(f"{one.file}: {one.layout}, run {one.uid}, {there}{notes and '; ' + notes}")
                folders |= {str(Path(one.file).resolve().parent): None}
    except (OSError, RuntimeError) as error:
        _stop(f"{to}: {error}", code=1)
    if folders and "://" not in to:
        readable = " ".join(f"--readable-storage {folder}" for folder in folders)
        _say(f"to look at them: nanobeam serve {to} {readable}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def check(
    run: Annotated[
        str,
        typer.Option(help="Start document (JSON), documents of a run (JSON lines), or a UID."),
    ],
    preset: AutoPreset = "auto",
    catalog: Catalog = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the simulated and the mean measured pattern.")
    ] = None,
    store: Store = None,
) -> None:
    """Show what a preset finds in a run, field by field, and what is missing."""
    from nanobeam_bluesky.check import run_check

    try:
        ok = run_check(run, preset, console, catalog=catalog, store=store, plot=plot)
    except ValueError as error:
        _stop(str(error), code=2)
    raise typer.Exit(0 if ok else 1)


@app.command()
def live(
    zmq: Annotated[
        str | None, typer.Option(help="Outgoing address of a bluesky-0MQ-proxy: HOST:PORT.")
    ] = None,
    nats: Annotated[str | None, typer.Option(help="NATS server: nats://HOST:PORT.")] = None,
    kafka: Annotated[str | None, typer.Option(help="Kafka servers: HOST:PORT,…")] = None,
    tiled: Annotated[
        str | None, typer.Option(help="Tiled catalogue of runs, with its key; it must stream.")
    ] = None,
    watch: Annotated[
        str | None, typer.Option(help="Pattern of new HDF5 or TIFF files, where is no Bluesky.")
    ] = None,
    topic: Annotated[
        str | None, typer.Option(help="Kafka topic; or NATS subject, events.> if absent.")
    ] = None,
    geometry: GeometryFile = None,
    shape: Annotated[
        tuple[int, int] | None, typer.Option(help="Rows and columns, for --watch.", min=1)
    ] = None,
    snake: Annotated[
        bool, typer.Option("--snake", help="Every second row runs back, for --watch.")
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Frames in an HDF5 file with several, for --watch.")
    ] = None,
    idle: Annotated[
        float, typer.Option(help="A file that has not grown for so many seconds is complete.")
    ] = 30.0,
    preset: AutoPreset = "auto",
    root_map: RootMap = None,
    analyzer: Annotated[
        str, typer.Option(help="auto or refine; or, quicker, network or correlation alone.")
    ] = "auto",
    fit: Fit = None,
    on_missing_model: OnMissingModel = "universal",
    calibrate: Calibrate = False,
    publish_zmq: Annotated[
        str | None, typer.Option(help="Publish derived documents to a proxy's incoming address.")
    ] = None,
    publish_nats: Annotated[str | None, typer.Option(help="Or to a NATS server.")] = None,
    publish_kafka: Annotated[str | None, typer.Option(help="Or to Kafka servers.")] = None,
    publish_topic: Annotated[
        str, typer.Option(help="Kafka topic, or NATS subject, of derived documents.")
    ] = "nanobeam.derived",
    to: Annotated[
        str | None, typer.Option(help="Record derived runs: a Tiled catalogue, or a folder.")
    ] = None,
    spool: Annotated[
        Path | None,
        typer.Option(help="Where they wait while Tiled is away; default in NANOBEAM_HOME."),
    ] = None,
    maps: Annotated[bool, typer.Option("--maps", help="Open a window with the maps.")] = False,
    metrics: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics on this port of 127.0.0.1.")
    ] = None,
) -> None:
    """Map scans of another process while they fly, until Ctrl-C."""
    options = locals()
    options |= {name: tuple(options[name] or ()) for name in ("root_map", "fit")}

    from nanobeam_bluesky.live import LiveOptions, run_live

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("nanobeam_bluesky").setLevel(logging.INFO)
    try:
        ok = run_live(LiveOptions(**options), console)
    except ImportError as error:
        _stop(f"{error}: nanobeam live needs pip install 'nanobeam-bluesky[live]'", code=2)
    except ValueError as error:
        _stop(str(error), code=2)
    except OSError as error:
        _stop(str(error), code=1)
    raise typer.Exit(0 if ok else 1)


@app.command()
def analyze(
    runs: Annotated[
        list[str] | None, typer.Argument(help="UIDs, or files of documents (JSON lines).")
    ] = None,
    catalog: Catalog = None,
    plan_name: Annotated[str | None, typer.Option(help="Only runs of this plan.")] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only runs since 2026-11, or '2026-11-23 05:00'."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Only runs before.")] = None,
    scan_id: Annotated[list[int] | None, typer.Option(help="Its number; repeatable.")] = None,
    uid: Annotated[
        list[str] | None, typer.Option(help="Its uid, or how that begins; repeatable.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of the start document, such as sample=film; repeatable."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="Folder, or server, that results go to; default: the catalogue."),
    ] = None,
    preset: AutoPreset = "auto",
    root_map: RootMap = None,
    method: Annotated[
        str,
        typer.Option(help="refine, network or correlation; several, with commas, are compared."),
    ] = "refine",
    fit: Fit = None,
    on_missing_model: OnMissingModel = "universal",
    calibrate: Calibrate = False,
    redo: Annotated[bool, typer.Option("--redo", help="Analyse again what is done.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, with what, and how long.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes to use, up to 4 threads each.", min=1)
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask cluster to use.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for figures, where methods are compared.")
    ] = None,
) -> None:
    """Analyse stored runs: those of a query, each once, whatever was done before is kept."""
    # stored files are read, by many at once
    os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
    try:
        from nanobeam_bluesky.live import read_root_map
        from nanobeam_bluesky.models import DEFAULT_FIT
        from nanobeam_bluesky.retrospective.command import run_analyze
        from nanobeam_bluesky.retrospective.comparison import compare as compare_runs
        from nanobeam_bluesky.retrospective.runs import Query, find_catalog
    except ImportError as error:
        _stop(f"{error}: nanobeam analyze needs pip install 'nanobeam-bluesky[tiled]'", code=2)
    query = (plan_name, since, until, scan_id, uid, where)
    if catalog is None and (not runs or any(query)):
        _stop("say with --catalog where runs are looked for, or name files of documents", code=2)
    if runs and any(query):
        _stop("name runs, or look for them with --plan-name, --uid, …: not both", code=2)
    if catalog is None and to is None and not dry_run:
        _stop("say with --to where the results of these files go", code=2)
    try:
        found = find_catalog(catalog) if catalog is not None else None
        results = run_analyze(
            runs or Query(plan_name, since, until, scan_id or (), uid or (), where or ()),
            method.split(","),
            console,
            errors,
            catalog=found,
            to=to,
            preset=preset,
            root_map=read_root_map(root_map or []),
            on_missing_model=on_missing_model,
            fit=(*DEFAULT_FIT, *(fit or ())),
            calibrate=calibrate,
            redo=redo,
            dry_run=dry_run,
            workers=workers,
            scheduler=scheduler,
        )
    except ValueError as error:
        _stop(str(error), code=2)
    except (OSError, RuntimeError) as error:
        _stop(str(error), code=1)
    made: dict[str, list[Analysis]] = {}
    for result in results:
        if result.derived_uid is not None:
            made.setdefault(result.raw_uid, []).append(result)
    for first, *others in made.values():
        for other in others:
            _show_comparison(compare_runs(first.derived, other.derived), out)
    raise typer.Exit(1 if not results or any(r.failed for r in results) else 0)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="UIDs of derived or raw runs, or files of documents (JSON lines)."),
    ],
    catalog: Catalog = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a figure of each comparison.")
    ] = None,
) -> None:
    """Compare maps point by point: the first run's with each of the others'."""
    if len(runs) < 2:
        _stop("say two runs to compare, or more", code=2)
    try:
        from nanobeam_bluesky.retrospective.comparison import compare as compare_runs
        from nanobeam_bluesky.retrospective.runs import derived_runs
    except ImportError as error:
        _stop(f"{error}: nanobeam compare needs pip install 'nanobeam-bluesky[tiled]'", code=2)
    try:
        first, *others = derived_runs(runs, catalog)
        comparisons = [compare_runs(first, other) for other in others]
    except ValueError as error:
        _stop(str(error), code=2)
    for found in comparisons:
        _show_comparison(found, out)


@app.command()
def combine(
    runs: Annotated[
        list[str], typer.Argument(help="UIDs of scans, or files of documents (JSON lines).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for figure, maps and table of drifts.")],
    catalog: Catalog = None,
    to: Annotated[
        str | None,
        typer.Option(help="Folder, or server, that the derived run goes to; else the catalogue."),
    ] = None,
    preset: AutoPreset = "auto",
    root_map: RootMap = None,
    thickness: Annotated[bool, typer.Option("--thickness", help="Unknown as well.")] = False,
) -> None:
    """Fit one strain and tilt per point to several scans of an area: angles, or repeats."""
    # stored files are read
    os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
    try:
        from nanobeam_bluesky.export import to_csv
        from nanobeam_bluesky.live import read_root_map
        from nanobeam_bluesky.models import DEFAULT_FIT
        from nanobeam_bluesky.plots import plot_combination
        from nanobeam_bluesky.retrospective.combination import combine as combine_runs
        from nanobeam_bluesky.retrospective.runs import (
            catalog_of_derived,
            find_catalog,
            writable_catalog,
        )
        from nanobeam_bluesky.tiled_adapters import derived_writer
    except ImportError as error:
        _stop(f"{error}: nanobeam combine needs pip install 'nanobeam-bluesky[tiled]'", code=2)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        found = find_catalog(catalog) if catalog is not None else None
        target = writable_catalog(to) if to is not None else found
        with ProgressBar(*columns, console=errors, transient=True) as bar:
            task = bar.add_task("reading", total=1.0)
            combined = combine_runs(
                runs,
                catalog=found,
                preset=preset,
                root_map=read_root_map(root_map or []),
                fit=(*DEFAULT_FIT, "thickness") if thickness else DEFAULT_FIT,
                progress=lambda what, part: bar.update(task, description=what, completed=part),
            )
    except ValueError as error:
        _stop(str(error), code=2)
    scans, maps = combined.scans, combined.maps
    table = Table("scan", "Δθ, °", "drift, rows", "columns", "quality", "")
    for i in range(scans.sizes["scan"]):
        scan = scans.isel(scan=i)
        used = "" if bool(scan["used"]) else "in doubt, not used"
        drift = (f"{float(scan[f'drift_{axis}']):+.2f}" for axis in ("row", "col"))
        angle = f"{float(scan['delta_theta_deg']):g}"
        table.add_row(str(scan["run"].item())[:8], angle, *drift, f"{scan['quality']:.2f}", used)
    console.print(table)
    for name in ("strain", "omega", "chi"):
        best = float(np.nanmin(scans[f"{name}_sigma"].median(("row", "col")).to_numpy()))
        together = float(maps[f"{name}_sigma"].median())
        units = f" {maps[name].attrs['units']}".rstrip()
        _say(f"σ of {name}: {best:.3g}{units} of the best scan, {together:.3g}{units} of all")
    out.mkdir(parents=True, exist_ok=True)
    plot_combination(maps, scans).savefig(out / "combined.png", dpi=120)
    (out / "combined.csv").write_bytes(to_csv(maps))
    if target is not None:
        derived = catalog_of_derived(target)
        write = derived_writer(target if derived is None else derived)  # an empty one is false
        for name, doc in combined.documents:
            write(name, doc)
        _say(f"derived run {maps.attrs['uid']}")
    else:
        lines = (json.dumps({"name": name, "doc": doc}) for name, doc in combined.documents)
        (out / "combined.jsonl").write_text("\n".join(lines), "utf-8")
    _say(f"figure and table in {out}")
    raise typer.Exit(0 if bool(scans["used"].all()) else 1)


@app.command()
def serve(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Runs, as of the demo; made if missing. Default: nanobeam-demo."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="8000, or that of --config, if absent; 0: any.", max=65535)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own lets others in.")
    ] = "127.0.0.1",
    readable_storage: Annotated[
        list[Path] | None, typer.Option(help="A folder with detector files; repeatable.")
    ] = None,
    root_map: RootMap = None,
    compute: Annotated[
        bool,
        typer.Option("--compute", help="Analyse raw runs without maps when these are asked for."),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="A Tiled configuration (YAML) to serve with our views, not a folder."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print one for a Tiled of your own, and end.")
    ] = False,
) -> None:
    """Serve scans and maps with Tiled until Ctrl-C: browser, Tiled clients, PNG, NeXus.

    The address that is printed holds the key (TILED_SINGLE_USER_API_KEY, or a new one): who has
    it may read and write.
    """
    # a file that HDF5 has locked to read cannot be opened by its writer again; read with h5py
    os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
    if config is not None and (folder or readable_storage or root_map or compute):
        _stop("--config says itself which folders are served and read: give it alone", code=2)
    try:
        from nanobeam_bluesky import tiled_adapters
        from nanobeam_bluesky.live import read_root_map
        from nanobeam_bluesky.tiled_adapters.server import is_private
        from nanobeam_bluesky.tiled_adapters.server import print_config as as_yaml
    except ImportError as error:
        _stop(f"{error}: nanobeam serve needs pip install 'nanobeam-bluesky[tiled]'", code=2)
    try:
        if config is None:
            folder, storage = folder or Path("nanobeam-demo"), readable_storage or []
            roots = read_root_map(root_map or [])
            if print_config:
                print(as_yaml(folder, storage, root_map=roots, compute=compute), end="")
                return
            serving = tiled_adapters.serve(
                folder,
                readable_storage=storage,
                root_map=roots,
                compute=compute,
                host=host,
                port=8000 if port is None else port,
            )
        else:
            serving = tiled_adapters.serve_config(config, host=host, port=port)
        if not is_private(host):
            errors.print(
                f"Others can reach {host}: who has the key may read and write all that is served, "
                "and keys and data cross the network as they are. Put it behind a proxy with TLS.",
                style="yellow",
            )
        _keep_serving(serving, config or folder)
    except ValueError as error:
        _stop(str(error), code=2)
    except (OSError, RuntimeError) as error:
        _stop(str(error), code=1)


class ExportFormat(StrEnum):
    """Of the files of a derived run."""

    NEXUS = "nexus"
    PNG = "png"
    CSV = "csv"
    TIFF = "tiff"
    ZARR = "zarr"
    HTML = "html"
    MD = "md"


@app.command()
def export(
    uids: Annotated[
        list[str],
        typer.Argument(help="Derived runs, or their raw runs: the beginning is enough."),
    ],
    catalog: Annotated[
        str, typer.Option(help="Folder of runs, address of a Tiled server, or its profile.")
    ],
    to: Annotated[ExportFormat, typer.Option(help="html and md are reports.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File; or folder, for files named after scan and uid. Default: here."),
    ] = None,
    frames: Annotated[
        bool, typer.Option("--frames", help="Put the raw run's frames into the NeXus file too.")
    ] = False,
    preset: Annotated[
        str, typer.Option(help="Preset, or path of one, that tells which its frames are.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Write the maps of derived runs to files that others open."""
    if frames and to is not ExportFormat.NEXUS:
        _stop(f"--frames go into NeXus, not into {to}", code=2)
    if len(uids) > 1 and out is not None and not out.is_dir():
        _stop(f"--out {out}: expected a folder for the files of several runs", code=2)
    # stored files are read, by many at once
    os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
    try:
        from nanobeam_bluesky.retrospective.export import export_run
        from nanobeam_bluesky.retrospective.runs import find_catalog
    except ImportError as error:
        _stop(f"{error}: nanobeam export needs pip install 'nanobeam-bluesky[tiled]'", code=2)
    try:
        found = find_catalog(catalog)
    except ValueError as error:
        _stop(str(error), code=2)
    failed = False
    for uid in uids:
        try:
            path = export_run(
                found, uid, to.value, out or "", frames=frames, preset=preset, force=force
            )
        except (OSError, ValueError) as error:
            failed = True
            text = f"{uid}: {error}"
            errors.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        else:
            _say(f"{uid}: {path}")
    raise typer.Exit(1 if failed else 0)


@models.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(help="A published .pth file. Nothing of it is run.")],
    start: Start = None,
    geometry: GeometryFile = None,
    preset: Preset = "default",
    replace: Annotated[bool, typer.Option(help="Replace the geometry's network.")] = False,
    store: Store = None,
) -> None:
    """Import a published NanobeamNN, measure it and store it for a geometry."""
    chosen = _geometry(start, geometry, preset)

    from nanobeam_bluesky.models import ModelRefusedError, ModelStore
    from nanobeam_bluesky.training import import_published

    stored = ModelStore(store)
    path = stored.paths().get(chosen.fingerprint())
    if path is not None and not replace:
        _stop(f"{path} is there already for this geometry; take its place with --replace", code=1)
    try:
        network, card = import_published(file, chosen)
        stored.save(network, card)
    except (ModelRefusedError, OSError) as error:
        _stop(str(error), code=1)
    console.print(_accuracy(card))
    _say(f"{file.name} imported for geometry {card.fingerprint}; stored in {stored.root}")


@models.command("list")
def list_models(store: Store = None) -> None:
    """List the networks that were trained or imported for one geometry."""
    from nanobeam_bluesky.models import ModelRefusedError, ModelStore

    stored = ModelStore(store)
    whole = Column("geometry", min_width=16)  # for all others there is `models show`
    table = Table(whole, "architecture", "energy, keV", "pixels", "counts", "created")
    for fingerprint in stored.paths():
        try:
            card = stored.card(fingerprint)
        except ModelRefusedError:
            table.add_row(escape(fingerprint), "unreadable: see 'verify'", "", "", "", "")
            continue
        levels = [f"{level.counts:.0f}" for level in card.accuracy]
        table.add_row(
            escape(fingerprint),
            escape(card.architecture),
            f"{card.geometry.energy_keV:.6g}",
            "×".join(map(str, card.geometry.pattern_shape)),
            " – ".join(dict.fromkeys((levels[0], levels[-1]))) if levels else "",
            escape(card.created[:10]),
        )
    console.print(table)
    _say(f"in {stored.root}; all other geometries have the shipped network")


@models.command("show")
def show_model(fingerprint: Fingerprint, store: Store = None) -> None:
    """Show a network's geometry, training and accuracy."""
    from nanobeam_bluesky.models import ModelNotFoundError, ModelRefusedError, ModelStore

    stored = ModelStore(store)
    try:
        found = stored.find(fingerprint)
        card = stored.card(found)
    except ValueError as error:
        _stop(str(error), code=1 if isinstance(error, ModelRefusedError) else 2)
    except ModelNotFoundError as error:
        _stop(str(error), code=1)
    table = Table(show_header=False)
    rows = card.model_dump(mode="json", exclude={"geometry", "training", "accuracy"})
    rows |= {"file": stored.paths()[found]}
    rows |= {f"training: {name}": value for name, value in card.training.items()}
    geometry = card.geometry.model_dump(mode="json", exclude_none=True)
    rows |= {f"geometry: {name}": value for name, value in geometry.items()}
    for name, value in rows.items():
        table.add_row(escape(name), escape(str(value)))
    console.print(table)
    console.print(_accuracy(card))


@models.command("verify")
def verify_models(
    fingerprint: Annotated[
        str | None, typer.Argument(help="Of a geometry, or its beginning; all if absent.")
    ] = None,
    store: Store = None,
) -> None:
    """Check hashes, architecture and geometry of stored networks."""
    from nanobeam_bluesky.models import ModelNotFoundError, ModelRefusedError, ModelStore

    stored = ModelStore(store)
    try:
        chosen = [stored.find(fingerprint)] if fingerprint is not None else list(stored.paths())
    except ValueError as error:
        _stop(str(error), code=2)
    except ModelNotFoundError as error:
        _stop(str(error), code=1)
    bad = 0
    for name in chosen:
        try:
            card = stored.verify(name)
        except (ModelNotFoundError, ModelRefusedError) as error:
            bad += 1
            errors.print(f"{escape(name)}: bad: {escape(str(error))}", style="red", soft_wrap=True)
        else:
            _say(f"{name}: sound, {card.architecture}")
    raise typer.Exit(1 if bad else 0)


@models.command("remove")
def remove_model(fingerprint: Fingerprint, store: Store = None) -> None:
    """Remove a network of your own."""
    from nanobeam_bluesky.models import ModelNotFoundError, ModelStore

    stored = ModelStore(store)
    try:
        found = stored.find(fingerprint)
        stored.remove(found)
    except ValueError as error:
        _stop(str(error), code=2)
    except (ModelNotFoundError, OSError) as error:
        _stop(str(error), code=1)
    _say(f"network {found} removed from {stored.root}")


def _show_comparison(found: Comparison, out: Path | None) -> None:
    """Print how well two runs agree; draw it in a folder."""
    from nanobeam_bluesky.plots import plot_agreement

    columns = ("points", "r", "slope", "mean diff.", "rms", "in 1σ", "in 2σ")
    table = Table("", *columns, title=f"{found.names[1]} against {found.names[0]}")
    for name, a in found.agreement.items():
        units = str(found.first[name].attrs.get("units", ""))
        within = [f"{w:.1%}" for w in a.within] if a.within else ["no σ", "no σ"]
        values = (f"{a.points}", f"{a.r:.5f}", f"{a.slope:.4f}")
        errors_of = (f"{a.mean:.3g} {units}", f"{a.rms:.3g} {units}")
        table.add_row(name, *values, *errors_of, *within)
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{' and '.join(found.names)}.png".replace(" ", "-")
        lines = {name: (a.slope, a.intercept, a.r) for name, a in found.agreement.items()}
        figure = plot_agreement(
            found.first, found.second, list(lines), names=found.names, lines=lines
        )
        figure.savefig(path, dpi=120)
        _say(f"figure in {path}")


def _keep_serving(serving: AbstractContextManager[str], what: Path | None) -> None:
    from nanobeam_bluesky.live import stopped_by_signals

    stop = threading.Event()
    with stopped_by_signals(stop), serving as url:
        _say(f"Serving {what} at {url}\nCtrl-C ends it.")
        stop.wait()
    _say("ended")


def _geometry(start: Path | None, geometry: Path | None, preset: str) -> Geometry:
    if (start is None) == (geometry is None):
        _stop("give either --start start.json or --geometry film.toml", code=2)
    try:
        return _from_start(start, preset) if start else _from_toml(geometry)
    except (GeometryError, OSError, ValueError) as error:
        _stop(str(error), code=2)


def _patterns(path: Path, dataset: str, rows: str, geometry: Geometry) -> NDArray[np.float32]:
    """Patterns of some rows of a file of frames."""
    first, colon, stop = rows.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise ValueError(f"--rows {rows}: expected two numbers such as 0:500")

    from nanobeam_bluesky.documents import frames as reading
    from nanobeam_bluesky.documents.binning import bin_frames
    from nanobeam_bluesky.documents.references import PointBlock, StoredRows

    if path.suffix == ".npy":
        stack = np.load(path, mmap_mode="r", allow_pickle=False)[int(first) : int(stop)]
        if stack.ndim != 3 or stack.dtype.kind not in "uifb":
            raise ValueError(
                f"{path}: expected frames (n, rows, columns), found {stack.dtype} {stack.shape}"
            )
        geometry.roi.check_inside(stack.shape[1:])
        return bin_frames(stack[:, *geometry.roi.slices], geometry)[0]
    stored = StoredRows(str(path), dataset, int(first))
    if path.is_dir() or path.suffix.lower() in (".mda", ".tif", ".tiff"):
        from nanobeam_bluesky.documents.resources import Resource
        from nanobeam_bluesky.retrospective.readers import Options, find_scans

        frames = find_scans(path.absolute(), Options())[1][0].frames[0]
        stored = Resource.parse({"data_key": "", **frames.resource}, {}).event(int(first), 1)
    reader = reading.FrameReader(geometry)
    block = PointBlock(1, int(stop) - int(first), stored)
    try:
        patterns, _, status, reason = reader.patterns(block)
    finally:
        reader.close()
    read = np.flatnonzero(status == reading.ReadStatus.OK)
    if not read.size:
        raise OSError(reason)
    return patterns.take(read, axis=0)


def _to_toml(geometry: Geometry) -> str:
    """Write what `_from_toml` reads; JSON's numbers, strings and arrays are TOML's too."""
    values = geometry.model_dump(mode="json", exclude_none=True)
    optics = values.pop("optics")
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    lines += ["", "[optics]", *(f"{name} = {json.dumps(value)}" for name, value in optics.items())]
    return "\n".join(lines) + "\n"


_SYMBOLS = {
    "strain": ("ε", ""),
    "omega": ("ω", "°"),
    "chi": ("χ", "°"),
    "thickness": ("thickness", " nm"),
}


def _accuracy(card: Card, before: Sequence[Accuracy] = ()) -> Table:
    """Errors and bounds of a network, by count level; and errors over bounds of another."""
    table = Table("counts", "", "RMSE", "Cramér-Rao bound", "ratio", *["before"] * bool(before))
    for level, other in zip_longest(card.accuracy, before):
        for name, rmse in level.rmse.items():
            symbol, unit = _SYMBOLS[name]
            bound = level.bound[name]
            texts = [f"{rmse:.2e}{unit}", f"{bound:.2e}{unit}", f"{rmse / bound:.2f}"]
            if other is not None:
                texts.append(f"{other.rmse[name] / bound:.2f}")
            table.add_row(f"{level.counts:.0f}" if name == "strain" else "", symbol, *texts)
    return table


def _shipped_accuracy(card: Card) -> list[Accuracy]:
    """Of the shipped network, at the levels of a card."""
    from nanobeam_bluesky.models.universal import universal_network
    from nanobeam_bluesky.training import evaluate

    network = universal_network(card.geometry)[0]
    levels = [level.counts for level in card.accuracy]
    return [evaluate(network, card.geometry, ranges=card.ranges, counts=c) for c in levels]


def _from_start(path: Path, preset: str) -> Geometry:
    document = json.loads(path.read_text("utf-8"))
    if isinstance(document, list):  # as recorded: ["start", {…}]
        document = document[-1]
    return Geometry.from_start(document.get("doc", document), preset=preset)


def _from_toml(path: Path | None) -> Geometry:
    assert path is not None
    values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    return Geometry.parse(values.get("nanobeam", values), where=str(path))


def _say(message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def _stop(message: str, *, code: int) -> NoReturn:
    errors.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


def main() -> None:
    """Run the command line.

    Garbage is sought less often, and not at the end: among what is imported there is none, and
    to find that takes a second.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    app()


if __name__ == "__main__":
    main()
