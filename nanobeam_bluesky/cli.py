"""The command line: ``nanobeam``.

Exit codes: 0 all done, 1 something failed, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
import tomllib
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from nanobeam_bluesky.geometry import Geometry, GeometryError

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
console = Console()
errors = Console(stderr=True)


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
    out: Annotated[Path, typer.Option(help="Folder for runs and figure.")] = Path("nanobeam-demo"),
    show: Annotated[bool, typer.Option(help="Open a window with the maps.")] = False,
    keep_serving: Annotated[
        bool, typer.Option(help="Serve the runs with Tiled afterwards, until Ctrl-C.")
    ] = False,
) -> None:
    """Fly a simulated scan and map it while it flies."""
    try:
        from nanobeam_bluesky.demo import run_demo
    except ImportError as error:
        _stop(f"{error}: the demo needs pip install 'nanobeam-bluesky[sim,tiled]'", code=2)
    try:
        ok = run_demo(shape, counts, phantom, out, console, show=show, keep_serving=keep_serving)
    except ValueError as error:
        _stop(str(error), code=2)
    raise typer.Exit(0 if ok else 1)


@app.command()
def train(
    start: Annotated[
        Path | None, typer.Option(help="Run-start document (JSON) to read the geometry from.")
    ] = None,
    geometry: Annotated[
        Path | None, typer.Option(help="Geometry (TOML, the names of the nanobeam block).")
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset, or path of one, for --start.")] = "default",
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
        float, typer.Option(help="Largest background, as a part of the pattern's mean.", min=0)
    ] = 0.0,
    steps: Annotated[
        int | None, typer.Option(help="Length of the training; 6000 by default.", min=1)
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Or its time, s.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of noise and initial weights.")] = 0,
    store: Annotated[
        Path | None, typer.Option(help="Folder for the network; default in NANOBEAM_HOME.")
    ] = None,
) -> None:
    """Train the network of one geometry; the next scan with this geometry finds it."""
    if (start is None) == (geometry is None):
        _stop("give either --start start.json or --geometry film.toml", code=2)
    try:
        chosen = _from_start(start, preset) if start else _from_toml(geometry)
    except (GeometryError, OSError, ValueError) as error:
        _stop(str(error), code=2)

    from nanobeam_bluesky.models import ModelStore
    from nanobeam_bluesky.training import Progress
    from nanobeam_bluesky.training import train as train_network

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with ProgressBar(*columns, console=console) as bar:
        task = bar.add_task("simulating", total=1.0)

        def show(progress: Progress) -> None:
            text = f"training, loss {progress.loss:.2e}"
            bar.update(task, completed=progress.fraction, description=text)

        try:
            network, card = train_network(
                chosen,
                sampling=sampling.value,
                counts=counts,
                peak=peak,
                background=background,
                steps=steps,
                seconds=seconds,
                seed=seed,
                progress=show,
            )
        except ValueError as error:
            _stop(str(error), code=2)
    models = ModelStore(store)
    models.save(network, card)
    table = Table("counts", "", "RMSE", "Cramér-Rao bound", "ratio")
    for level in card.accuracy:
        for name, symbol, unit in (("strain", "ε", ""), ("omega", "ω", "°"), ("chi", "χ", "°")):
            rmse, bound = level.rmse[name], level.bound[name]
            texts = (f"{rmse:.2e}{unit}", f"{bound:.2e}{unit}", f"{rmse / bound:.2f}")
            table.add_row(f"{level.counts:.0f}" if name == "strain" else "", symbol, *texts)
    console.print(table)
    took = card.training["seconds"]
    console.print(
        f"{card.architecture} for geometry {card.fingerprint}, trained in {took} s, between grid "
        f"points; stored in {models.root}",
        soft_wrap=True,
        highlight=False,
    )


def _from_start(path: Path, preset: str) -> Geometry:
    document = json.loads(path.read_text("utf-8"))
    if isinstance(document, list):  # as recorded: ["start", {…}]
        document = document[-1]
    return Geometry.from_start(document.get("doc", document), preset=preset)


def _from_toml(path: Path | None) -> Geometry:
    assert path is not None
    values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    return Geometry.parse(values.get("nanobeam", values), where=str(path))


def _stop(message: str, *, code: int) -> Any:
    errors.print(message, style="red", highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    app()
