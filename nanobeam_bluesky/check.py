"""``nanobeam check``: what a preset finds in a run, and what becomes of it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from nanobeam_bluesky.documents.frames import FrameReader, ReadStatus
from nanobeam_bluesky.documents.references import PointBlock, RunReferences
from nanobeam_bluesky.geometry import ROI, Geometry, GeometryError
from nanobeam_bluesky.presets import Finding, Preset, ScanMetadata
from nanobeam_bluesky.presets.sources import describe, unit_of

__all__ = ["run_check"]

Documents = list[tuple[str, Mapping[str, Any]]]

POINTS = 64
"""Points whose mean pattern is drawn."""
_BAD_LINES = 3
"""Lines of a file that are named when they cannot be read."""


@dataclass
class _Run:
    """What is known of the run, and what is wrong."""

    documents: Documents
    preset: Preset
    problems: list[str]
    scan: ScanMetadata | None = None
    references: RunReferences = field(default_factory=lambda: RunReferences(("slow", "fast")))

    @property
    def start(self) -> Mapping[str, Any]:
        return self.documents[0][1]

    @property
    def alone(self) -> bool:
        """Whether there is only a start document, and so no baseline."""
        return len(self.documents) == 1


def run_check(
    run: str,
    preset: str,
    console: Console,
    *,
    catalog: str | None = None,
    store: Path | None = None,
    plot: Path | None = None,
) -> bool:
    """Print what a preset finds in a run, field by field.

    Parameters
    ----------
    run
        File with a start document (JSON) or all documents (JSON lines) of a run, or its UID.
    preset
        Name of a preset, path of a TOML file, or "auto": the first shipped one that matches.
    console
        To print to.
    catalog
        Where a UID is looked up: folder of an embedded catalogue, address of a Tiled server, or
        Tiled profile.
    store
        Folder of the networks.
    plot
        File for a picture of the simulated pattern beside the mean measured one.

    Returns
    -------
    ok
        Whether the run would be analysed.

    Raises
    ------
    ValueError
        If there is no such run or preset.
    """
    documents, problems = _documents(run, catalog)
    checked = _Run(documents, _chosen(preset, documents[0][1], problems), problems)
    _print_run(console, checked)
    _print_scan(console, checked)
    geometry = _print_geometry(console, checked)
    if geometry is not None:
        _print_derived(console, geometry)
        _print_models(console, geometry, store, problems)
        _print_frames(console, checked, geometry, plot)
    for problem in problems:
        _say(console, f"- {problem}", "red")
    _say(console, "This run would be analysed." if not problems else _verdict(problems))
    return not problems


def _verdict(problems: list[str]) -> str:
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''} to solve."


def _chosen(preset: str, start: Mapping[str, Any], problems: list[str]) -> Preset:
    """Return the preset to check with; tell if none matches the run."""
    choices = Preset.choices(preset)
    for choice in choices:
        if choice.matches(start):
            return choice
    reasons = "; ".join(f"{c.name}: {c.mismatch(start)}" for c in choices)
    problems.append(f"no preset matches this run, so it would be ignored: {reasons}")
    return choices[-1]


# -------------------------------------------------------------------------- the run


def _documents(run: str, catalog: str | None) -> tuple[Documents, list[str]]:
    """Return the documents of one run, its start first, and what could not be read."""
    path = Path(run)
    if catalog is not None:
        documents, problems = list(_catalogued(run, catalog)), list[str]()
    elif path.is_file():
        documents, problems = _recorded(path)
    else:
        raise ValueError(
            f"--run {run}: no such file; for a UID say with --catalog where: a folder, the address "
            "of a Tiled server, or a Tiled profile"
        )
    starts = [i for i, (name, _) in enumerate(documents) if name == "start"]
    if not starts:
        why = f" ({'; '.join(problems)})" if problems else ""
        raise ValueError(
            f"--run {run}: no start document in it{why}; expected one as JSON, or the documents of "
            'a run as JSON lines, {"name": …, "doc": …}'
        )
    stop = starts[1] if len(starts) > 1 else len(documents)
    return documents[starts[0] : stop], problems


def _recorded(path: Path) -> tuple[Documents, list[str]]:
    """Read a file: one document, a list, or a document a line."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--run {path}: {error}") from None
    with contextlib.suppress(json.JSONDecodeError):
        whole = json.loads(text)
        several = isinstance(whole, list) and not (whole and isinstance(whole[0], str))
        return list(map(_pair, whole if several else [whole])), []
    documents: Documents = []
    bad = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip("\x1e \t"):
            continue
        try:
            documents.append(_pair(json.loads(line.strip("\x1e"))))
        except ValueError as error:
            bad.append(f"{path.name} line {number}: {error}")
    more = [f"{len(bad) - _BAD_LINES} more such lines"] if len(bad) > _BAD_LINES else []
    return documents, bad[:_BAD_LINES] + more


def _pair(item: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and document, however they were written."""
    name, doc = "start", item
    if isinstance(item, list) and len(item) == 2:
        name, doc = item
    elif isinstance(item, dict) and "doc" in item:
        name, doc = item.get("name", "start"), item["doc"]
    if not isinstance(name, str) or not isinstance(doc, dict):
        raise ValueError(f"expected a document, found {str(item)[:40]!r}")
    return name, doc


def _catalogued(uid: str, catalog: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Documents of a run in a catalogue, as far as a check needs them."""
    try:
        from bluesky_tiled_plugins.queries import PartialUID

        from nanobeam_bluesky.retrospective.runs import catalog_of_raw, find_catalog
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'nanobeam-bluesky[tiled]'") from None
    client = find_catalog(catalog)
    try:
        runs = catalog_of_raw(client)
        found = [runs[uid]] if uid in runs else list(runs.search(PartialUID(uid)).values())
        if len(found) != 1:
            raise ValueError(f"--run {uid}: {len(found)} such runs in {catalog}")
        yield "start", dict(found[0].metadata["start"])
        for name in found[0]:
            yield from _stream(name, found[0][name])
    finally:
        client.context.close()


def _stream(name: str, stream: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Descriptor and some events of a stream; documents are not in every catalogue."""
    keys = {k: dict(v) for k, v in stream.metadata.get("data_keys", {}).items()}
    devices: dict[str, list[str]] = {}
    for key, description in keys.items():
        description.pop("external", None)  # what it refers to is read here, frame by frame
        if len(description.get("shape") or []) >= 2:
            description["shape"] = list(description["shape"][-2:])
        devices.setdefault(str(description.get("object_name", key)), []).append(key)
    yield (
        "descriptor",
        {
            "uid": name,
            "name": name,
            "data_keys": keys,
            "object_keys": devices,
            "configuration": stream.metadata.get("configuration", {}),
        },
    )
    for key, description in keys.items():
        image = len(description.get("shape") or []) >= 2
        if key not in stream or not (image or name == "baseline"):
            continue
        values = stream[key]
        for row in np.unique(np.linspace(0, values.shape[0] - 1, POINTS, dtype=int)).tolist():
            value = values.read((slice(row, row + 1),))[0]
            data = {key: value.sum(axis=0) if image and value.ndim == 3 else value}
            yield "event", {"descriptor": name, "seq_num": row + 1, "data": data}


# ------------------------------------------------------------------------- printing


def _print_run(console: Console, run: _Run) -> None:
    start = run.start
    _say(
        console,
        f"run {start.get('uid', '?')}, plan {start.get('plan_name', '?')!r}, checked with preset "
        f"{run.preset.name!r}" + (f": {run.preset.description}" if run.preset.description else ""),
    )


def _print_scan(console: Console, run: _Run) -> None:
    """Print how the scan visits its points, and read what the other documents say."""
    preset, start = run.preset, run.start
    try:
        run.scan = preset.scan_metadata(start)
    except GeometryError as error:
        run.problems.append(str(error))
    try:
        found = preset.scan_findings(start)
    except GeometryError:
        found = {}
    run.references, _ = _refer(run, None, run.problems)
    references = run.references
    table = Table("scan", "value", Column("where", overflow="fold"))
    for name, finding in found.items():
        value = getattr(run.scan, name, finding.value)
        if finding.value is None:
            table.add_row(name, "[dim]not recorded[/]", escape(finding.where))
        else:
            table.add_row(name, _text(_scan_value(name, value)), escape(finding.where))
    for motor in run.scan.motors if run.scan else ():
        table.add_row(f"positions of {escape(motor)}", *_positions(run, motor))
    named = preset.detector_finding(start)
    frames = references.frame_key or named.value
    places = [named.where] if named.value else []
    places += [f"stream {references.stream!r}"] if references.frame_key else []
    if frames is None:
        table.add_row("frames", "[dim]the only image of the run[/]", "")
    else:
        table.add_row("frames", escape(frames), escape(", ".join(places)))
    console.print(table)
    if not run.alone and references.frame_key is None:
        wanted = repr(frames) if frames else "an image"
        run.problems.append(f"no descriptor announces frames: expected {wanted} in its data_keys")


def _scan_value(name: str, value: Any) -> Any:
    if name == "shape" and value is not None:
        return f"{value[0]} rows × {value[1]} columns"
    if name == "motors" and value is not None:
        return f"slow {value[0]}, fast {value[1]}"
    if name == "snaking":
        return "every second row backwards" if value else "all rows in one direction"
    if name == "extents" and value is not None:
        (a, b), (c, d) = value
        return f"slow {a:g} to {b:g}, fast {c:g} to {d:g}"
    return value


def _refer(
    run: _Run, roi: ROI | None, problems: list[str]
) -> tuple[RunReferences, list[PointBlock]]:
    """Go through all documents; return what they tell and where the frames are."""
    scan, blocks = run.scan, []
    references = RunReferences(
        scan.motors if scan else ("slow", "fast"),
        run.preset.detector_key(run.start),
        shape=scan.shape if scan else None,
        positions=scan.positions if scan else None,
        note=lambda problem: None if problem in problems else problems.append(problem),
    )
    try:
        for name, doc in run.documents:
            blocks += [b for label, b in references.document(name, doc, roi) if label == "frames"]
        blocks += [b for label, b in references.finish() if label == "frames"]
    except ValueError as error:
        problems.append(str(error))
    return references, blocks


def _positions(run: _Run, motor: str) -> tuple[str, str]:
    """Say where the positions of a motor come from."""
    assert run.scan is not None
    place = run.scan.positions.get(motor)
    key = motor if place is None else place.key
    factor = "" if place is None or place.scale == 1 else f", times {place.scale:g}"
    if motor in run.references.announced:
        units = run.references.units.get(motor)
        return "recorded" + (f", {escape(units)}" if units else ""), escape(
            f"data key {key!r}{factor}"
        )
    nominal = "from extents" if run.scan.extents else "counted: 0, 1, …"
    return f"nominal, {nominal}", f"[dim]data key {escape(repr(key))} is not in the run[/]"


def _print_geometry(console: Console, run: _Run) -> Geometry | None:
    """Print every field and where it is; return the geometry if it is complete."""
    references = run.references
    found = run.preset.geometry_findings(
        run.start,
        baseline=references.baseline,
        configuration=references.configuration,
        frames=references.frame_key,
    )
    gaps = run.preset.missing(found)
    geometry: Geometry | None = None
    broken = [finding.problem for finding in found.values() if finding.problem]
    if not gaps and not broken:
        values = {name: f.value for name, f in found.items() if f.value is not None}
        try:
            geometry = Geometry.parse(values, where="geometry")
        except GeometryError as error:
            broken.append(str(error))
    needed = {name for names, _ in gaps for name in names.replace(" or ", " with ").split(" with ")}
    table = Table("geometry", "value", "unit", Column("where", overflow="fold"))
    for name in Geometry.model_fields:
        finding = found.get(name)
        table.add_row(name, *_cells(name, finding, geometry, name in needed))
    console.print(table)
    run.problems += broken
    for names, places in gaps:
        run.problems.append(f"{names} missing: looked at {places}; {_advice(run, names)}")
    return geometry


def _cells(
    name: str, finding: Finding | None, geometry: Geometry | None, needed: bool
) -> tuple[str, str, str]:
    unit = unit_of(name) or ("px" if name.endswith("_px") else "")
    if finding is not None and finding.problem:
        return "[red]unusable[/]", unit, escape(finding.where)
    if finding is not None and finding.value is not None:
        return _text(finding.value), unit, escape(finding.where)
    if needed:
        where = finding.where if finding else "nowhere: the preset names no source"
        return "[red]missing[/]", unit, escape(f"looked at {where}" if finding else where)
    value = getattr(geometry, name, None)
    if value is None or value == ():
        return "[dim]not given[/]", "", ""
    word = "chosen" if name in ("binning", "roi_shape", "roi_origin_px") else "default"
    if name in ("wavelength_angstrom", "d_spacing_angstrom"):
        word = "derived"
    return f"[dim]{_text(value)}[/]", f"[dim]{unit}[/]", f"[dim]{word}[/]"


def _advice(run: _Run, names: str) -> str:
    """Say what to do about a missing field."""
    name = names.split(" or ")[0].split(" with ")[0]
    source = run.preset.geometry.get(name)
    if isinstance(source, Mapping) and "from" in source:
        source = source["from"]
    sources = [source] if isinstance(source, str) else source or []
    example = getattr(Geometry.published(), name)
    if name == "optics":
        example = "{ kind = … }"
    constant = f"give it in a copy of the preset, e.g. {name} = {json.dumps(example)}"
    if name == "optics":
        constant = "give it in a copy of the preset as a table [geometry.optics]"
    elsewhere = [s for s in sources if not s.startswith("start:")]
    text = f"set {describe(sources[0])}, or {constant}" if sources else constant
    if elsewhere and run.alone:
        text += " (a start document alone has neither baseline nor configuration: check a run)"
    return text


def _print_derived(console: Console, geometry: Geometry) -> None:
    half_x, half_y, stop_x, stop_y = geometry.pupil_px
    roi = geometry.roi
    ny, nx = geometry.pattern_shape
    x, y = geometry.pattern_center
    rows = {
        "2θB": f"{2 * geometry.bragg_angle_deg:.4f}°, incidence {geometry.incidence_deg:.4f}°",
        "pupil's half-widths": f"{half_x:.1f} × {half_y:.1f} binned pixels (along, across 2θ)",
        "its stop's": f"{stop_x:.1f} × {stop_y:.1f}" if stop_x else "no stop",
        "fringes": f"{geometry.fringe_px:.3g} binned pixels"
        + (": too narrow to be told apart" if geometry.fringe_px < 2 else ""),
        "binning": f"{geometry.binning} × {geometry.binning}",
        "ROI": f"rows {roi.row} to {roi.row + roi.height}, columns {roi.col} to "
        f"{roi.col + roi.width}: patterns of {ny} × {nx}",
        "Bragg centre in it": f"({x:.1f}, {y:.1f}) binned pixels",
        "fingerprint": geometry.fingerprint(),
    }
    table = Table("what follows", "")
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)


def _print_models(
    console: Console, geometry: Geometry, store: Path | None, problems: list[str]
) -> None:
    from nanobeam_bluesky.models import ModelNotFoundError, ModelRefusedError, ModelStore
    from nanobeam_bluesky.models.reduced import check_envelope, reduce_geometry

    try:
        check_envelope(geometry, reduce_geometry(geometry))
        _say(console, "shipped network: covers this geometry")
    except ValueError as error:
        _say(console, f"shipped network: not for this geometry, a library is used: {error}")
    try:
        _, card = ModelStore(store).load(geometry)
        _say(console, f"own network: {card.architecture}, trained {card.created[:10]}")
    except ModelNotFoundError as error:
        _say(console, f"own network: none; {str(error).partition(': ')[2]}")
    except ModelRefusedError as error:
        problems.append(f"own network: {error}")


# --------------------------------------------------------------------------- frames


def _print_frames(console: Console, run: _Run, geometry: Geometry, plot: Path | None) -> None:
    """Count the frames; draw some of them, beside what the geometry lets expect."""
    _, blocks = _refer(run, geometry.roi, [])  # problems are told already
    points = len({p for b in blocks for p in range(b.first, b.stop)})
    if run.scan is not None and not run.alone and run.documents[-1][0] == "stop":
        expected = run.scan.shape[0] * run.scan.shape[1]
        _say(console, f"frames: {points} points of {expected}")
        if points > expected:
            run.problems.append(f"frames of {points} points, but shape has {expected}")
    if plot is None:
        return
    measured, count, reason = _mean_pattern(blocks, geometry)
    if blocks and measured is None:
        run.problems.append(f"no frame could be read: {reason}")
    elif reason:
        _say(console, f"some frames could not be read: {reason}")
    try:
        _draw(geometry, measured, count, plot)
    except (OSError, ValueError) as error:  # ValueError: not a kind of picture
        run.problems.append(f"--plot {plot}: {error}")
        return
    _say(console, f"simulated pattern{' beside the measured' if count else ''} in {plot}")


def _mean_pattern(
    blocks: list[PointBlock], geometry: Geometry
) -> tuple[NDArray[np.float64] | None, int, str]:
    """Mean of patterns from all over the scan, of how many, and why some cannot be read."""
    step = max(1, math.ceil(sum(b.count for b in blocks) / POINTS))
    singles = [block.part(p, p + 1) for block in blocks for p in range(block.first, block.stop)]
    reader = FrameReader(geometry)
    total, count, reason = np.zeros(geometry.pattern_shape), 0, ""
    try:
        for block in singles[::step]:
            patterns, _, status, why = reader.patterns(block)
            reason = reason or why
            if status[0] == ReadStatus.OK:
                total += patterns[0]
                count += 1
    finally:
        reader.close()
    return (total / count if count else None), count, reason


def _draw(geometry: Geometry, measured: NDArray[np.float64] | None, count: int, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from nanobeam_bluesky.physics import forward

    simulated = forward(0.0, 0.0, 0.0, geometry)[0]
    panels = [("Simulated: no strain, no tilt", simulated)]
    if measured is not None:
        panels.append((f"Measured: mean of {count} point{'s' * (count > 1)}", measured))
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    x, y = geometry.pattern_center
    for ax, (title, image) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        shown = ax.imshow(image, extent=(0, image.shape[1], image.shape[0], 0), cmap="viridis")
        ax.plot(x, y, "+", color="white", markersize=12)
        ax.set_title(title)
        ax.set_xlabel("along 2θ, binned pixels")
        ax.set_ylabel("across, binned pixels")
        figure.colorbar(shown, ax=ax, shrink=0.8)
    figure.savefig(path, dpi=120)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return escape(", ".join(f"{k} {_text(v)}" for k, v in value.items()))
    if hasattr(value, "model_dump"):
        return _text(value.model_dump(exclude_none=True))
    if isinstance(value, list | tuple):
        shown = ", ".join(_text(v) for v in value[:6])
        return shown if len(value) <= 6 else f"{shown}, … ({len(value)})"
    return escape(str(value))


def _say(console: Console, message: str, style: str | None = None) -> None:
    console.print(message, style=style, highlight=False, markup=False, soft_wrap=True)
