"""How precise and how honest the estimates are: against the Cramér–Rao bound, and under faults.

A  RMSE over bound, bias, 2σ coverage, convergence and false flags, from 300 to 10⁵ counts
B  the three test sets of the published networks: correlation fit, network, refined
C  how often faults are flagged, and what no single pattern can show
D  the phantom of Figure 3: precision and cross-talk
E  time of `refine` from the network's start; only valid on a quiet machine

Patterns are drawn afresh, between grid points. Mean counts are those of a set, without
background. ✗ marks what misses its must. Run: ``python -m benchmarks.accuracy [A B …]``, from
the repository's root, in about five minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.physics import best
from nanobeam_bluesky.documents.processing import AnalyzerChoice, Processor, Task
from nanobeam_bluesky.documents.references import PointBlock
from nanobeam_bluesky.geometry import HC_KEV_ANGSTROM, Geometry, RectangularPupil
from nanobeam_bluesky.models import (
    DEFAULT_FIT,
    Analyzer,
    CorrelationLibrary,
    Estimates,
    Flag,
    correlation_fit,
    refine,
)
from nanobeam_bluesky.models.analyzer import REFINED
from nanobeam_bluesky.models.correlation import PARAMETERS, RANGES
from nanobeam_bluesky.models.reduced import envelope_ranges, reduce_geometry
from nanobeam_bluesky.physics import Sampling, cramer_rao, forward
from nanobeam_bluesky.physics.published import LIBRARY_STEPS
from nanobeam_bluesky.sim import phantom
from nanobeam_bluesky.training.noise import poisson

Floats = NDArray[np.float64]
Patterns = NDArray[np.float32]

LEVELS = (300, 1000, 6000, 30_000, 100_000)
PARTS, PART = 20, 500  # patterns of a cell, a part of them at a time: 8 MB
BOUNDS = 200  # patterns of a part of which the bound is averaged
SYMBOLS = {"strain": "ε", "omega": "ω", "chi": "χ", "thickness": "t"}
SHARP = Geometry.published()
BLURRED = SHARP.model_copy(update={"pupil_blur_px": 0.5})
# small enough to stay in the ROI: where an edge of 6 mrad leaves it, ω's likelihood has two maxima
KB = {"optics": RectangularPupil(divergence_x_mrad=4.5, divergence_y_mrad=4)}
MLL = {
    "optics": RectangularPupil(
        divergence_x_mrad=6, divergence_y_mrad=6, stop_x_mrad=2, stop_y_mrad=2
    )
}
HOT = {"pixel_mask": ((220, 250), (256, 230), (243, 281), (270, 262), (290, 256))}
HOT_COUNTS = 1000
BACKGROUND = 0.05  # counts a pixel
WITH_THICKNESS = (*DEFAULT_FIT, "thickness")

missed: list[str] = []


class Table:
    """A table that is legible as printed and as Markdown."""

    def __init__(self, *columns: str) -> None:
        self._widths = [max(len(column), 9) for column in columns]
        self._widths[0] = 42
        print()
        self._print(columns)
        self._print(["-" * width for width in self._widths])

    def row(self, *cells: str) -> None:
        self._print(cells)
        if any("✗" in cell for cell in cells):
            missed.append(" | ".join(cells))

    def _print(self, cells: Sequence[str]) -> None:
        padded = [f"{c:{w}}" for c, w in zip(cells, self._widths, strict=True)]
        print("|", " | ".join(padded), "|", flush=True)


def cell(value: float, spec: str, ok: bool = True) -> str:
    return f"{value:{spec}}" + ("" if ok else " ✗")


def draw(rng: np.random.Generator, n: int) -> Floats:
    """Strain, ω and χ over the published ranges: (n, 3)."""
    return rng.uniform(-1, 1, (n, 3)) * list(RANGES.values())


def detect(expected: Patterns, scale: float, seed: int, background: float = 0) -> Patterns:
    """Photon noise on scale · expected + background."""
    n = len(expected)
    each = np.full((2, n), [[scale], [background]], np.float32)
    return poisson(expected, np.arange(n), *each, seed)


@lru_cache(maxsize=16)
def counts_per_scale(geometry: Geometry) -> float:
    """Mean sum of a pattern whose library has the peak 1."""
    truth = draw(np.random.default_rng(0), 2000)
    return float(forward(*truth.T, geometry).sum(axis=(1, 2)).mean())


# ------------------------------------------------------------------------ A: precision


@dataclass(frozen=True)
class Condition:
    """What patterns are made of, and what is fitted to them."""

    name: str
    geometry: Geometry
    background: float = 0.0
    fit: tuple[str, ...] = DEFAULT_FIT
    bounded: bool = True
    """Whether the musts hold."""


def conditions() -> Iterator[Condition]:
    yield Condition("zone plate", BLURRED)
    yield Condition("background 0.05", BLURRED, BACKGROUND)
    yield Condition("5 hot pixels, masked", BLURRED.model_copy(update=HOT))
    yield Condition("thickness ± 10 %, fitted", BLURRED, fit=WITH_THICKNESS)
    for name, pupil in (("mirrors", KB), ("Laue lenses with stop", MLL)):
        yield Condition(name, BLURRED.model_copy(update=pupil))
        yield Condition(
            f"{name}, all of the above (reported)",
            BLURRED.model_copy(update=pupil | HOT),
            BACKGROUND,
            WITH_THICKNESS,
            bounded=False,
        )
    yield Condition("sharp pupil (reported)", SHARP, bounded=False)


def measure(condition: Condition, counts: float) -> tuple[dict[str, Floats], Estimates, Any]:
    """Truth, estimates and bound of a cell."""
    geometry, fit = condition.geometry, condition.fit
    rng = np.random.default_rng([2025, int(counts), *condition.name.encode()])
    analyzer = Analyzer.for_geometry(geometry, fit=fit, device="cpu")
    scale = counts / counts_per_scale(geometry)
    names = [name for name in SYMBOLS if name in fit]
    truths, estimates, bounds = [], [], []
    for part in range(PARTS):
        true = geometry
        if "thickness" in fit:
            off = 0.1 * (2 * (part + rng.random()) / PARTS - 1)
            true = geometry.model_copy(update={"thickness_nm": geometry.thickness_nm * (1 + off)})
        truth = draw(rng, PART)
        patterns = detect(
            forward(*truth.T, true), scale, int(rng.integers(2**31)), condition.background
        )
        patterns[:, geometry.pattern_mask] += HOT_COUNTS
        estimates.append(analyzer.process(patterns))
        truths.append(np.column_stack([truth, np.full(PART, true.thickness_nm)]))
        bound = cramer_rao(
            *truth[:BOUNDS].T,
            true,
            scale=scale,
            background=condition.background,
            fit=fit,
            mask=geometry.pattern_mask,
        )
        bounds.append(np.column_stack([bound[name] for name in names]))
    truth = dict(zip(SYMBOLS, np.concatenate(truths).T, strict=True))
    bound = dict(zip(names, np.concatenate(bounds).T, strict=True))
    return truth, Estimates.concatenate(estimates), bound


def precision_cells(
    names: Sequence[str],
    truth: dict[str, Floats],
    estimates: Estimates,
    bound: dict[str, Floats],
    *,
    few: bool,
    bounded: bool = True,
) -> list[str]:
    """RMSE over bound, bias over σ and 2σ coverage of all, then convergence and false flags."""
    found = (estimates.flags & (Flag.NOT_CONVERGED | Flag.FEW_COUNTS)) == 0
    ratios, biases, coverages = [], [], []
    for name in names:
        error = (getattr(estimates, name) - truth[name])[found]
        limit = float(np.sqrt(np.mean(bound[name] ** 2)))
        ratio = float(np.sqrt(np.mean(error**2))) / limit
        bias = float(error.mean()) / limit
        inside = 100 * float(
            np.mean(np.abs(error) < 2 * getattr(estimates, f"{name}_sigma")[found])
        )
        ratios.append(cell(ratio, ".3f", not bounded or ratio <= (1.2 if few else 1.1)))
        biases.append(cell(bias, "+.3f", not bounded or abs(bias) <= 0.1))
        coverages.append(
            cell(inside, ".1f", not bounded or abs(inside - 95) <= (3 if few else 1.5))
        )
    converged = 100 * float(np.mean((estimates.flags & Flag.NOT_CONVERGED) == 0))
    flagged = 100 * float(np.mean(estimates.flags != 0))
    return [
        *ratios,
        *biases,
        *coverages,
        cell(converged, ".2f", not bounded or converged >= 99.9),
        cell(flagged, ".2f", not bounded or flagged <= 0.5),
    ]


def precision_table(first: str, names: Sequence[str] = PARAMETERS) -> Table:
    columns = [f"{what} {SYMBOLS[name]}" for what in ("RMSE", "bias", "2σ") for name in names]
    return Table(first, "counts", *columns, "conv. %", "false %")


def section_a() -> None:
    print(
        f"A: {PARTS * PART} patterns a cell, pupil blur 0.5 px. RMSE over Cramér–Rao bound with "
        "the same unknowns and mask\n(must 1.1; 1.2 at 300 counts), bias over bound (must ± 0.1), "
        "truth within 2σ, % (must 95 ± 1.5; ± 3 at 300),\nconverged, % (must 99.9), false flags, "
        "% (must 0.5)"
    )
    table = precision_table("condition")
    thickness = []
    for condition in conditions():
        for counts in LEVELS:
            result = measure(condition, counts)
            options = {"few": counts < 1000, "bounded": condition.bounded}
            label = (condition.name, f"{counts:g}")
            table.row(*label, *precision_cells(PARAMETERS, *result, **options))
            if "thickness" in condition.fit:
                thickness.append((*label, *precision_cells(["thickness"], *result, **options)))
    table = precision_table("the thickness itself", ["thickness"])
    for row in thickness:
        table.row(*row)


# ------------------------------------------------------------------------ B: published test sets


@dataclass(frozen=True)
class PublishedSet:
    """A test set of the published networks, with what one of them reached there."""

    name: str
    sampling: Sampling
    on_grid: bool
    published: tuple[float, float, float]

    @property
    def scale(self) -> float:
        """Counts at the peak of the library: 7 as published, or 4300 in the mean pattern."""
        if self.sampling == "published":
            return 7
        return 4300 / counts_per_scale(SHARP)


SETS = (
    PublishedSet("published, on the grid", "published", True, (1.2e-4, 4.3e-4, 9.6e-4)),
    PublishedSet("published, between points", "published", False, (1.4e-4, 5.3e-4, 1.8e-3)),
    PublishedSet("continuous, 4300 counts", "continuous", False, (1.8e-4, 5.4e-4, 1.6e-3)),
)


def section_b() -> None:
    print(
        "\nB: RMSE on the test sets of the published networks, sharp pupil, 4096 patterns each. "
        "The windows of the published\nsampling blur patterns by 5 pixels along x: `refine`, "
        "which knows no such blur, flags them"
    )
    table = Table("set, estimator", "ε", "ω, deg", "χ, deg", "flagged %")
    network = Analyzer.for_geometry(SHARP, method="network", device="cpu")
    refined = Analyzer.for_geometry(SHARP, device="cpu")
    for number, chosen in enumerate(SETS):
        truth = draw(np.random.default_rng([2026, number]), 4096)
        if chosen.on_grid:
            steps = np.array(list(RANGES.values())) * 2 / (LIBRARY_STEPS - 1)
            truth = np.round(truth / steps) * steps
        patterns = detect(forward(*truth.T, SHARP, sampling=chosen.sampling), chosen.scale, 7)
        library = CorrelationLibrary.simulate(SHARP, sampling=chosen.sampling)

        def row(name: str, rmse: Sequence[float], flagged: str = "") -> None:
            table.row(f"{name}", *(f"{value:.2e}" for value in rmse), flagged)

        table.row(chosen.name, "", "", "", "")
        row("  correlation fit", rmse(correlation_fit(patterns, SHARP, library=library), truth))
        row("  one published network", chosen.published)
        for name, analyzer in (("shipped network", network), ("refined", refined)):
            estimates = analyzer.process(patterns)
            row(f"  {name}", rmse(estimates, truth), f"{100 * np.mean(estimates.flags != 0):.1f}")
        if chosen.sampling == "continuous":
            bound = cramer_rao(*truth.T, SHARP, scale=chosen.scale)
            row("  Cramér–Rao bound", [np.sqrt(np.mean(bound[k] ** 2)) for k in PARAMETERS])


def rmse(estimates: Estimates, truth: Floats) -> list[float]:
    """Root mean square errors of strain, ω and χ where there is a value."""
    found = np.column_stack([getattr(estimates, name) for name in PARAMETERS])
    return [float(v) for v in np.sqrt(np.nanmean((found - truth) ** 2, axis=0))]


# ------------------------------------------------------------------------ C: faults

FAULT_CASES = ((6000, 0.0), (6000, BACKGROUND), (100_000, 0.0), (100_000, BACKGROUND))
FAULTY = 1000


@dataclass(frozen=True)
class Light:
    """How many photons there are."""

    counts: float
    background: float
    truth: Floats
    rng: np.random.Generator

    @property
    def scale(self) -> float:
        return self.counts / counts_per_scale(BLURRED)

    def detect(self, expected: Patterns, background: float | None = None) -> Patterns:
        seed = int(self.rng.integers(2**31))
        background = self.background if background is None else background
        return detect(expected, self.scale, seed, background)

    def patterns(self, truth: Floats | None = None, **changes: Any) -> Patterns:
        geometry = BLURRED.model_copy(update=changes)
        return self.detect(forward(*(self.truth if truth is None else truth).T, geometry))

    def frames(self) -> Patterns:
        """Unbinned frames of the ROI."""
        fine = BLURRED.model_copy(update={"binning": 1, "pupil_blur_px": 1.0})
        # the peak of a pattern is 1, whatever the size of a pixel
        area = BLURRED.binning**2
        expected = forward(*self.truth.T, fine)
        return detect(
            expected, self.scale / area, int(self.rng.integers(2**31)), self.background / area
        )

    def domains(self, parameter: int, step: float) -> tuple[Floats, Patterns]:
        """Two domains, half of the light each, that differ by ± step / 2."""
        truth = self.truth.copy()
        truth[:, parameter] *= 1 - step / 2 / list(RANGES.values())[parameter]
        move = np.zeros(3)
        move[parameter] = step / 2
        both = forward(*(truth - move).T, BLURRED) + forward(*(truth + move).T, BLURRED)
        return truth, self.detect(both / 2)

    def beyond(self, parameter: int) -> Patterns:
        truth = self.truth.copy()
        half = REFINED * envelope_ranges(reduce_geometry(BLURRED))[PARAMETERS[parameter]]
        truth[:, parameter] = (
            half * np.sign(truth[:, parameter]) * self.rng.uniform(1.1, 1.2, FAULTY)
        )
        return self.patterns(truth)

    def hot(self) -> Patterns:
        patterns = self.patterns()
        row, column = self.rng.integers(0, 64, (2, FAULTY))
        patterns[np.arange(FAULTY), row, column] += HOT_COUNTS
        return patterns


def lights() -> Iterator[Light]:
    for counts, background in FAULT_CASES:
        rng = np.random.default_rng([2027, counts, int(100 * background)])
        yield Light(counts, background, draw(rng, FAULTY), rng)


FAULTS: dict[str, Callable[[Light], Patterns]] = {
    "nothing at all": lambda light: np.zeros((FAULTY, 64, 64), np.float32),
    "background of 0.05 alone": lambda light: light.detect(
        np.zeros((FAULTY, 64, 64), np.float32), BACKGROUND
    ),
    "transposed": lambda light: light.patterns().transpose(0, 2, 1),
    "unbinned": lambda light: light.frames()[:, 32:96, 32:96],
    "a hot pixel of 1000": Light.hot,
    "ε 1.1 to 1.2 × out of range": lambda light: light.beyond(0),
    "ω 1.1 to 1.2 × out of range": lambda light: light.beyond(1),
    "χ 1.1 to 1.2 × out of range": lambda light: light.beyond(2),
    "two domains, Δω = 0.02°": lambda light: light.domains(1, 0.02)[1],
    "two domains, Δω = 0.03°": lambda light: light.domains(1, 0.03)[1],
    "thickness × 0.8": lambda light: light.patterns(thickness_nm=0.8 * SHARP.thickness_nm),
    "thickness × 1.2": lambda light: light.patterns(thickness_nm=1.2 * SHARP.thickness_nm),
}
"""What must be flagged."""


def saturated(light: Light, *, known: bool) -> Estimates:
    """Estimates from frames clipped at about 0.8 of what the brightest pixels expect."""
    value = float(np.ceil(0.8 * light.scale / BLURRED.binning**2))
    geometry = BLURRED.model_copy(update={"saturation_value": value} if known else {})
    frames = np.minimum(light.frames(), value).astype(np.uint16)
    processor = Processor()
    processor.open("benchmark", geometry, AnalyzerChoice(device="cpu"))
    done = processor.process(Task("benchmark", 1, (PointBlock(1, FAULTY, values=frames),)))
    if done.reason:
        raise RuntimeError(done.reason)
    return done.estimates


def degenerate(light: Light) -> Iterator[tuple[str, Floats, Patterns]]:
    """What no single pattern can show: name, truth and patterns."""
    truth = light.truth
    x, y = BLURRED.bragg_center_px
    roi = BLURRED.roi
    origin: dict[str, Any] = {"roi_origin_px": (roi.row, roi.col)}
    wavelength = HC_KEV_ANGSTROM / (HC_KEV_ANGSTROM / SHARP.wavelength_angstrom + 0.05)
    yield "no fault", truth, light.patterns()
    yield "flip_x", truth, light.patterns()[:, :, ::-1]
    yield "flip_y", truth, light.patterns()[:, ::-1]
    yield "centre off by 1 px along x", truth, light.patterns(bragg_center_px=(x + 1, y), **origin)
    yield "centre off by 1 px along y", truth, light.patterns(bragg_center_px=(x, y + 1), **origin)
    yield "energy off by 50 eV", truth, light.patterns(wavelength_angstrom=wavelength)
    yield "two domains, Δε = 0.001", *light.domains(0, 1e-3)


def section_c() -> None:
    analyzer = Analyzer.for_geometry(BLURRED, device="cpu")
    headings = [f"{counts:g}" + (f" + {bg:g}" if bg else "") for counts, bg in FAULT_CASES]
    print(
        f"\nC: flagged, % of {FAULTY} patterns (must 99), by counts + background a pixel; pupil "
        "blur 0.5 px; the flags at the\nfirst level, %"
    )
    table = Table("fault", *headings, "flags")

    def row(name: str, analyse: Callable[[Light], Estimates], must: float = 99) -> None:
        found = [analyse(light) for light in lights()]
        rates = [100 * float(np.mean(estimates.flags != 0)) for estimates in found]
        raised = {flag.name: 100 * np.mean((found[0].flags & flag) > 0) for flag in Flag}
        table.row(
            name,
            *(cell(rate, ".1f", rate >= must) for rate in rates),
            ", ".join(f"{name} {rate:.1f}" for name, rate in raised.items() if rate),
        )

    for name, fault in FAULTS.items():
        row(name, lambda light, fault=fault: analyzer.process(fault(light)))
    row("saturated", lambda light: saturated(light, known=True))
    row("saturated, value not known (reported)", lambda light: saturated(light, known=False), 0)

    print("\nWhat no single pattern can show, RMS error at 6000 counts:")
    table = Table("fault", "flagged %", "at 1e+05", "ε", "ω, deg", "χ, deg")
    some, _, many, _ = lights()
    for (name, truth, patterns), (_, _, bright) in zip(
        degenerate(some), degenerate(many), strict=True
    ):
        estimates = analyzer.process(patterns)
        table.row(
            name,
            *(f"{100 * np.mean(e.flags != 0):.1f}" for e in (estimates, analyzer.process(bright))),
            *(f"{value:.2e}" for value in rmse(estimates, truth)),
        )


# ------------------------------------------------------------------------ D: Figure 3


def section_d() -> None:
    draws, counts = 16, 6000
    sample = phantom("figure3", (64, 64))
    truth = np.column_stack([getattr(sample, name).ravel() for name in PARAMETERS])
    expected = forward(*truth.T, BLURRED)
    scale = counts / float(expected.sum(axis=(1, 2)).mean())
    library = CorrelationLibrary.simulate(BLURRED)
    analyzer = Analyzer.for_geometry(BLURRED, device="cpu")
    network = Analyzer.for_geometry(SHARP, method="network", device="cpu")
    estimators: dict[str, Callable[[Patterns], Estimates]] = {
        "correlation fit": lambda patterns: correlation_fit(patterns, BLURRED, library=library),
        "network of the sharp pupil": network.process,
        "refined": analyzer.process,
    }
    found: dict[str, list[Estimates]] = {name: [] for name in estimators}
    for seed in range(draws):
        patterns = detect(expected, scale, 3000 + seed)
        for name, estimate in estimators.items():
            found[name].append(estimate(patterns))
    bound = cramer_rao(*truth.T, BLURRED, scale=scale)

    print(f"\nD: phantom of Figure 3, 64×64 points, {counts} counts, blur 0.5 px, {draws} draws")
    table = precision_table("refined maps")
    table.row(
        "figure3",
        f"{counts:g}",
        *precision_cells(
            PARAMETERS,
            {
                name: np.tile(values, draws)
                for name, values in zip(PARAMETERS, truth.T, strict=True)
            },
            Estimates.concatenate(found["refined"]),
            bound,
            few=False,
        ),
    )
    print("\nRMSE, and cross-talk: correlation of the ω error with true ε (must of refined ± 0.02)")
    table = Table("estimator", "ε", "ω, deg", "χ, deg", "cross-talk", "± draws")
    for name, each in found.items():
        talks = [np.corrcoef(e.omega - truth[:, 1], truth[:, 0])[0, 1] for e in each]
        mean = float(np.mean(talks))
        errors = np.sqrt(np.mean(np.square([rmse(e, truth) for e in each]), axis=0))
        table.row(
            name,
            *(f"{value:.2e}" for value in errors),
            cell(mean, "+.4f", name != "refined" or abs(mean) <= 0.02),
            f"{np.std(talks):.4f}",
        )


# ------------------------------------------------------------------------ E: time


def section_e() -> None:
    print(
        "\nE: `refine` from the network's start, ms a pattern (must 0.3, aim 0.15 on all threads)"
    )
    table = Table("pupil", "counts", "all threads", "one core")
    network = Analyzer.for_geometry(SHARP, method="network", device="cpu")
    for name, geometry in (("blur 0.5 px", BLURRED), ("sharp", SHARP)):
        for counts in (1000, 6000, 100_000):
            truth = draw(np.random.default_rng([2028, counts]), 1024)
            scale = counts / counts_per_scale(geometry)
            patterns = detect(forward(*truth.T, geometry), scale, 5)
            wall, thread = refine_times(patterns, network.process(patterns), geometry)
            table.row(name, f"{counts:g}", cell(wall, ".3f", wall <= 0.3), f"{thread:.3f}")


def refine_times(patterns: Patterns, start: Estimates, geometry: Geometry) -> tuple[float, float]:
    """Wall time on all threads and a thread's time on its own, ms a pattern."""
    alone = 127  # fewer than 128 patterns stay in the calling thread
    parts = [slice(i, i + alone) for i in range(0, len(patterns) - alone, alone)]

    def one_by_one() -> None:
        for part in parts:
            refine(patterns[part], start.select(part), geometry)

    wall = best(lambda: refine(patterns, start, geometry), 7) / len(patterns)
    thread = best(one_by_one, 3, time.thread_time) / (alone * len(parts))
    return 1e3 * wall, 1e3 * thread


SECTIONS = {"A": section_a, "B": section_b, "C": section_c, "D": section_d, "E": section_e}


def main() -> None:
    chosen = sys.argv[1:] or list(SECTIONS)
    unknown = set(chosen) - set(SECTIONS)
    if unknown:
        sys.exit(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    start = time.perf_counter()
    missed.clear()
    for name in chosen:
        SECTIONS[name]()
    print(f"\n{time.perf_counter() - start:.0f} s; {len(missed)} rows miss a must", flush=True)
    for row in missed:
        print(f"  {row}")


if __name__ == "__main__":
    main()
