"""How well the shipped network serves geometries that it has never seen.

A  fresh geometries of the envelope: the network alone, and refined, against the Cramér–Rao bound
B  the published condition, network alone
C  time of the network alone; only valid on a quiet machine
D  refined under what is wrong with real patterns

Every pattern expects the same counts, within all that the network is trained for (`LIMITS`);
patterns with less than 2 % of the pupil's light are left out, as in training, and from RMSE and
bound those that tell strain or tilts no better than to a fifth of the range. ✗ marks what misses
its must. Run: ``python -m benchmarks.envelope [A B …] [--geometries 40] [--seed 2031]
[--figure FILE.png]``, from the repository's root, in about five minutes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.accuracy import SYMBOLS, Floats, Patterns, Table, cell, missed, rmse
from benchmarks.physics import best
from nanobeam_bluesky.geometry import Geometry, ZonePlate
from nanobeam_bluesky.models import DEFAULT_FIT, Analyzer, Estimates, Flag, refinement
from nanobeam_bluesky.models.analyzer import UNSURE
from nanobeam_bluesky.models.correlation import PARAMETERS, RANGES
from nanobeam_bluesky.models.reduced import (
    LIMITS,
    Reduced,
    envelope_ranges,
    random_geometry,
    reduce_geometry,
)
from nanobeam_bluesky.models.universal import universal_network
from nanobeam_bluesky.physics import cramer_rao, forward
from nanobeam_bluesky.physics.continuous import angles
from nanobeam_bluesky.training.noise import poisson

SEED = 2031  # with a geometry's number: training takes seeds that are single numbers
LEVELS = (300, 1000, 4300, 30_000)
FIGURE_LEVEL = 4300
DARKEST = 0.02  # of the light of a wholly lit pupil
REFINED = 1.15  # × the bound, from 1000 counts up, …
SHARE = 0.95  # … in so many of the geometries
CONVERGED = 0.998
ALONE = 3.0  # × the bound, median over the geometries at `FIGURE_LEVEL`
PUBLISHED = {"strain": 1.3e-4, "omega": 3.5e-4, "chi": 9e-4}
PUBLISHED_NETWORK = {"strain": 1.8e-4, "omega": 5.4e-4, "chi": 1.6e-3}
MILLISECONDS = 0.12
FAR = 5.0  # σ, beyond which an unflagged value is wrong
FLAGGED_OR_RIGHT = 99.0  # %
TITLES = {"strain": "Strain ε", "omega": "Tilt ω", "chi": "Tilt χ"}
_NAMES = [SYMBOLS[name] for name in PARAMETERS]


@dataclass(frozen=True, eq=False)
class Case:
    """A geometry, and patterns of it; arrays of length n."""

    geometry: Geometry
    reduced: Reduced
    truth: Floats  # (n, 3)
    expected: Patterns  # (n, ny, nx), of unit sum
    total: Floats  # of the patterns whose peak may be 1
    seed: int  # of the noise

    @property
    def name(self) -> str:
        kind = "ring" if isinstance(self.geometry.optics, ZonePlate) else "rectangle"
        half_x, half_y, stop_x, _ = self.geometry.pupil_px
        size = f"{half_x:.0f}" if half_x == half_y else f"{half_x:.0f} × {half_y:.0f}"
        return (
            f"{kind} {size}, stop {stop_x / half_x:.2f}, fR {self.span:.2f}, "
            f"blur {self.geometry.pupil_blur_px:.1f}"
        )

    @property
    def span(self) -> float:
        """f times half-width: a quarter of the fringes that the pupil spans."""
        return self.reduced.fringes * self.reduced.units[0]

    @property
    def sharp(self) -> bool:
        return self.geometry.pupil_blur_px == 0

    @property
    def whole(self) -> bool:
        """Whether the pupil is no larger than the ROI."""
        (ny, nx), (half_x, half_y, *_) = self.geometry.pattern_shape, self.geometry.pupil_px
        return 2 * half_x <= nx and 2 * half_y <= ny

    def detect(self, counts: float, background: float = 0.0) -> Patterns:
        n = len(self.expected)
        each = np.full((2, n), [[counts], [background]], np.float32)
        return poisson(self.expected, np.arange(n), *each, self.seed + int(counts))

    def bound(self, counts: float, **options: Any) -> Floats:
        """(n, 3); infinite where the pattern does not tell."""
        known = cramer_rao(*self.truth.T, self.geometry, scale=counts / self.total, **options)
        bound = np.stack([known[name] for name in PARAMETERS], 1)
        limits = envelope_ranges(self.reduced)
        vague = bound > UNSURE * np.array([limits[name] for name in PARAMETERS])
        return np.where(vague.any(1, keepdims=True), np.inf, bound)

    def analyzer(self, fit: Sequence[str] = DEFAULT_FIT) -> Analyzer:
        """From the shipped network, whatever is in the store."""
        network, reduced, digest = universal_network(self.geometry)
        return Analyzer(
            self.geometry,
            network=network,
            ranges=envelope_ranges(reduced),
            reduced=reduced,
            start={"start": "universal", "weights_hash": digest},
            fit=fit,
        )


def make_case(
    geometry: Geometry, rng: np.random.Generator, patterns: int, thickness: float = 1.0
) -> Case:
    """Draw over all that the network knows; the film may be thicker than the geometry says."""
    reduced = reduce_geometry(geometry)
    truth, expected = np.empty((0, 3)), np.empty((0, *geometry.pattern_shape), np.float32)
    while len(truth) < patterns:
        labels = rng.uniform(-1, 1, (2 * patterns, 3)) * LIMITS
        drawn = np.stack(angles(reduced.plan, *reduced.shifts(labels)), 1)
        film = thickness * geometry.thickness_nm
        light = forward(*drawn.T, geometry, thickness=film)
        lit = light.sum((1, 2)) > DARKEST * math.pi * reduced.units[0] * reduced.units[1]
        truth = np.concatenate([truth, drawn[lit]])
        expected = np.concatenate([expected, light[lit]])
    truth, expected = truth[:patterns], np.maximum(expected[:patterns], 0)
    total = expected.sum((1, 2), dtype=np.float64)
    expected /= total[:, None, None].astype(np.float32)
    return Case(geometry, reduced, truth, expected, total, int(rng.integers(2**31)))


def cases(geometries: int, patterns: int, seed: int) -> Iterator[Case]:
    for number in range(geometries):
        rng = np.random.default_rng([seed, number])
        yield make_case(random_geometry(rng), rng, patterns)


@contextmanager
def counted_searches() -> Iterator[list[int]]:
    """Numbers of the patterns that are looked up in a library meanwhile."""
    numbers: list[int] = []
    original = refinement.likeliest

    def counting(patterns: NDArray[Any], *args: Any, **options: Any) -> Any:
        numbers.append(len(patterns))
        return original(patterns, *args, **options)

    refinement.likeliest = counting
    try:
        yield numbers
    finally:
        refinement.likeliest = original


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of one geometry at one level of counts; ε, ω and χ where there are three."""

    case: Case
    counts: float
    ratio: Floats  # RMSE over root mean square bound, of the unflagged points
    pull: Floats  # RMS of errors over their own σ
    inside: Floats  # share within 2σ
    flags: NDArray[np.int64]
    wrong: float  # share of the points that are unflagged and off by 5 of their own σ
    restarted: float  # share of the points

    @classmethod
    def of(
        cls, case: Case, counts: float, estimates: Estimates, bound: Floats, restarted: float = 0.0
    ) -> Outcome:
        error, sigma = errors(estimates, case.truth)
        used = (estimates.flags == 0) & np.isfinite(bound).all(1)
        with np.errstate(invalid="ignore"):
            pulls = error[used] / sigma[used]
            return cls(
                case,
                counts,
                _rms(error[used]) / _rms(bound[used]),
                _rms(pulls),
                np.mean(np.abs(pulls) < 2, 0) if used.any() else np.full(3, np.nan),
                estimates.flags,
                float(np.mean((np.abs(error) > FAR * sigma).any(1) & (estimates.flags == 0))),
                restarted,
            )

    def share(self, flag: int) -> float:
        return float(np.mean((self.flags & flag) > 0))


def errors(estimates: Estimates, truth: Floats) -> tuple[Floats, Floats]:
    """Errors and σ, (n, 3)."""
    found = np.stack([getattr(estimates, name) for name in PARAMETERS], 1)
    sigma = np.stack([getattr(estimates, f"{name}_sigma") for name in PARAMETERS], 1)
    return found - truth, sigma


def _rms(values: Floats) -> Floats:
    """Of the rows; not a number where there are none."""
    return np.sqrt(np.mean(values**2, 0)) if len(values) else np.full(values.shape[1], np.nan)


def _median(values: list[Floats]) -> Floats:
    """Over geometries; not a number where every one's points are flagged."""
    some = np.array([v for v in values if np.isfinite(v).all()])
    return np.median(some, 0) if len(some) else np.full(3, np.nan)


# ------------------------------------------------------------------------ A: the envelope


def outcomes(geometries: int, patterns: int, seed: int) -> tuple[list[Outcome], list[Outcome]]:
    """Of the network alone and refined, geometry by geometry, all levels of each."""
    alone, refined = [], []
    for case in cases(geometries, patterns, seed):
        network, refining = case.analyzer(()), case.analyzer()
        for counts in LEVELS:
            detected, bound = case.detect(counts), case.bound(counts)
            alone.append(Outcome.of(case, counts, network.process(detected), bound))
            with counted_searches() as searched:
                estimates = refining.process(detected)
            again = sum(searched) / patterns
            refined.append(Outcome.of(case, counts, estimates, bound, again))
    return alone, refined


def section_a(options: argparse.Namespace) -> None:
    n, patterns = options.geometries, options.patterns
    alone, refined = outcomes(n, patterns, options.seed)
    print(
        f"A: {n} geometries, {patterns} patterns of each, RMSE over Cramér–Rao bound of what is "
        f"not flagged: the network alone and\nrefined at {FIGURE_LEVEL} counts; refined, the "
        f"largest from 1000 counts up (must {REFINED:g})"
    )
    columns = [f"{what} {name}" for what in ("network", "refined", "largest") for name in _NAMES]
    table = Table("geometry", *columns, "conv. %", "flagged %", "> 5σ, %", "restarted %")
    for case in dict.fromkeys(o.case for o in alone):
        at = [next(o for o in some if o.case is case and o.counts == FIGURE_LEVEL)
              for some in (alone, refined)]  # fmt: skip
        bright = [o for o in refined if o.case is case and o.counts >= 1000]
        table.row(
            case.name,
            *(f"{value:.2f}" for o in at for value in o.ratio),
            *(cell(v, ".2f", v <= REFINED) for v in np.max([o.ratio for o in bright], 0)),
            f"{100 * (1 - np.mean([o.share(Flag.NOT_CONVERGED) for o in bright])):.2f}",
            f"{100 * np.mean([o.share(-1) for o in bright]):.2f}",
            f"{100 * np.mean([o.wrong for o in bright]):.2f}",
            f"{100 * np.mean([o.restarted for o in bright]):.1f}",
        )
    _alone_table(alone)
    _refined_table(refined)
    if options.figure:
        draw(alone, refined, options.figure)
        print(f"\nfigure: {options.figure}")


def _groups(every: list[Outcome]) -> Iterator[tuple[str, float, list[Outcome], bool]]:
    """Name, counts, outcomes, and whether the musts are for these."""
    kinds: dict[str, Callable[[Case], bool]] = {
        "all": lambda case: True,
        "blurred pupils": lambda case: not case.sharp,
        "sharp pupils": lambda case: case.sharp,
        "pupils within the ROI": lambda case: case.whole,
        "pupils larger than it": lambda case: not case.whole,
    }
    for what, belongs in kinds.items():
        for counts in LEVELS:
            chosen = [o for o in every if o.counts == counts and belongs(o.case)]
            if chosen:
                yield f"{what}, {len(chosen)} geometries", counts, chosen, what == "all"


def _alone_table(alone: list[Outcome]) -> None:
    print(
        f"\nNetwork alone: RMSE / bound, median over geometries (must {ALONE:g} at "
        f"{FIGURE_LEVEL}) and 90th percentile; medians of RMS of\nerror / own σ and of points "
        "within 2σ, %; flagged, %"
    )
    columns = [f"{c} {n}" for c in ("median", "90 %", "error/σ", "2σ") for n in _NAMES]
    table = Table("network alone", "counts", *columns, "flagged %")
    for name, counts, chosen, bounded in _groups(alone):
        ratios = np.array([o.ratio for o in chosen])
        must = bounded and counts == FIGURE_LEVEL
        table.row(
            name,
            f"{counts:g}",
            *(cell(v, ".2f", not must or v <= ALONE) for v in _median(list(ratios))),
            *(f"{v:.2f}" for v in np.nanquantile(ratios, 0.9, axis=0)),
            *(f"{v:.2f}" for v in _median([o.pull for o in chosen])),
            *(f"{100 * v:.1f}" for v in _median([o.inside for o in chosen])),
            f"{100 * np.mean([o.share(-1) for o in chosen]):.2f}",
        )


def _refined_table(refined: list[Outcome]) -> None:
    print(
        f"\nRefined: RMSE / bound and RMS of error / own σ, medians over geometries; share of "
        f"geometries within {REFINED:g} in all\nthree (must {100 * SHARE:g} % from 1000 counts "
        f"up); converged, % of points (must {100 * CONVERGED:g}); flagged, unflagged and off "
        f"by\n{FAR:g} of its own σ, restarted, %"
    )
    columns = [f"{c} {n}" for c in ("median", "error/σ") for n in _NAMES]
    columns += [f"≤ {REFINED:g}, %", "conv. %", "flagged %", "> 5σ, %", "restarted %"]
    table = Table("refined", "counts", *columns)
    for name, counts, chosen, bounded in _groups(refined):
        within = float(np.mean([bool((o.ratio <= REFINED).all()) for o in chosen]))
        converged = 1 - float(np.mean([o.share(Flag.NOT_CONVERGED) for o in chosen]))
        must = bounded and counts >= 1000
        table.row(
            name,
            f"{counts:g}",
            *(f"{v:.3f}" for v in _median([o.ratio for o in chosen])),
            *(f"{v:.3f}" for v in _median([o.pull for o in chosen])),
            cell(100 * within, ".1f", not must or within >= SHARE),
            cell(100 * converged, ".2f", not must or converged >= CONVERGED),
            f"{100 * np.mean([o.share(-1) for o in chosen]):.2f}",
            f"{100 * np.mean([o.wrong for o in chosen]):.2f}",
            f"{100 * np.mean([o.restarted for o in chosen]):.1f}",
        )


def draw(alone: list[Outcome], refined: list[Outcome], path: str) -> None:
    """Error over bound across the envelope, one dot per geometry."""
    figure, grid = plt.subplots(
        2, 3, figsize=(10.5, 6.2), sharex=True, sharey="row", layout="constrained"
    )
    rows = (
        (alone, ALONE, "network alone", (1, 2, 3, 5, 10, 20)),
        (refined, REFINED, "refined", (0.8, 1, 1.2, 1.5, 2, 3, 5)),
    )
    for axes, (some, must, what, yticks) in zip(grid, rows, strict=True):
        at = [o for o in some if o.counts == FIGURE_LEVEL]
        top = max(1.3, 1.1 * np.nanmax([o.ratio for o in at]))
        for k, (ax, name) in enumerate(zip(axes, PARAMETERS, strict=True)):
            for o in at:
                sharp = o.case.sharp
                shown = ax.scatter(
                    o.case.span, o.ratio[k], c=o.case.reduced.units[0], s=34, vmin=8, vmax=30,
                    marker="o" if isinstance(o.case.geometry.optics, ZonePlate) else "s",
                    edgecolors="tab:red" if sharp else "0.3", linewidths=1.6 if sharp else 0.5,
                )  # fmt: skip
            for value, style in ((1, "-"), (must, ":")):
                ax.axhline(value, color="0.6", lw=1, ls=style, zorder=0)
            ax.set(xscale="log", xlim=(0.09, 9), yscale="log", ylim=(0.75, top))
            ax.set_xticks(ticks := (0.1, 0.3, 1, 3), [f"{t:g}" for t in ticks])
            ax.set_yticks(ticks := [t for t in yticks if t < top], [f"{t:g}" for t in ticks])
            ax.minorticks_off()
            if some is alone:
                ax.set_title(TITLES[name])
            else:
                ax.set_xlabel("f·R, a quarter of the fringes in the pupil")
        axes[0].set_ylabel(f"{what}:\nRMSE / Cramér–Rao bound")
    figure.colorbar(shown, ax=grid, label="half-width R of the pupil along 2θ (binned pixels)",
                    shrink=0.7)  # fmt: skip
    handles = [
        plt.Line2D([], [], marker="o", ls="", mfc="0.8", mec="0.3", label="zone plate"),
        plt.Line2D([], [], marker="s", ls="", mfc="0.8", mec="0.3", label="rectangular pupil"),
        plt.Line2D([], [], marker="o", ls="", mfc="0.8", mec="tab:red", mew=1.6,
                   label="no blur at all"),
        plt.Line2D([], [], color="0.6", ls=":", label="goal"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------ B, C: published, time


def section_b(options: argparse.Namespace) -> None:
    geometry = Geometry.published()
    truth = np.random.default_rng([SEED, 1]).uniform(-1, 1, (4096, 3)) * list(RANGES.values())
    light = forward(*truth.T, geometry)
    total = light.sum((1, 2))
    case = Case(geometry, reduce_geometry(geometry), truth, light, np.ones(len(truth)), seed=1)
    scale = 4300 / float(total.mean())
    patterns = case.detect(scale)
    print("\nB: RMSE at the published condition, continuous model, 4300 counts, network alone")
    table = Table("ε, ω (deg), χ (deg)", *_NAMES, "flagged %")
    estimates = case.analyzer(()).process(patterns)
    found = rmse(estimates, truth)
    table.row(
        "shipped network",
        *(cell(v, ".2e", v <= PUBLISHED[k]) for k, v in zip(PARAMETERS, found, strict=True)),
        f"{100 * np.mean(estimates.flags != 0):.2f}",
    )
    table.row("must", *(f"{PUBLISHED[k]:.2e}" for k in PARAMETERS), "")
    table.row("one published network", *(f"{PUBLISHED_NETWORK[k]:.2e}" for k in PARAMETERS), "")
    table.row("Cramér–Rao bound", *(f"{v:.2e}" for v in _rms(case.bound(scale))), "")


def section_c(options: argparse.Namespace) -> None:
    case = make_case(Geometry.published(), np.random.default_rng([SEED, 2]), 1024)
    patterns = case.detect(4300)
    network, _, _ = universal_network(case.geometry)
    batch = torch.from_numpy(patterns[:64])[:, None]
    analyzer = case.analyzer(())
    threads = torch.get_num_threads()
    print(f"\nC: network alone, batches of 64, ms a pattern (must {MILLISECONDS:g} on 2 threads)")
    table = Table("64 × 64 pixels", "network", "with flags")
    for some in (1, 2):
        torch.set_num_threads(some)
        with torch.inference_mode():
            bare = 1e3 * best(lambda: network(batch), 30) / 64
        whole = 1e3 * best(lambda: analyzer.process(patterns), 7) / len(patterns)
        must = some == 1 or bare <= MILLISECONDS
        table.row(f"{some} threads", cell(bare, ".3f", must), f"{whole:.3f}")
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------ D: faults


@dataclass(frozen=True, eq=False)
class Faulty:
    """Patterns with something wrong, what was analysed, and the bound with what was known."""

    case: Case
    patterns: Patterns
    bound: Floats


def faults(number: int, geometry: Geometry, patterns: int) -> Iterator[tuple[str, Faulty]]:
    """What real patterns are like: name and patterns."""

    def fresh() -> np.random.Generator:
        return np.random.default_rng([SEED, number, 1])

    counts = FIGURE_LEVEL
    case = make_case(geometry, fresh(), patterns)
    yield "nothing wrong", Faulty(case, case.detect(counts), case.bound(counts))
    yield (
        "background 0.2 a pixel",
        Faulty(case, case.detect(counts, 0.2), case.bound(counts, background=0.2)),
    )

    spoiled, rng = case.detect(counts), fresh()
    ny, nx = geometry.pattern_shape
    for pattern in spoiled:
        pattern[rng.integers(0, ny, 3), rng.integers(0, nx, 3)] += 1000
    yield "three hot pixels of 1000, not masked", Faulty(case, spoiled, case.bound(counts))

    # three columns of binned pixels, off the middle
    b, roi = geometry.binning, geometry.roi
    first = roi.col + (nx // 3) * b
    gap = tuple(
        (row, col)
        for row in range(roi.row, roi.row + roi.height)
        for col in range(first, first + 3 * b)
    )
    masked = make_case(geometry.model_copy(update={"pixel_mask": gap}), fresh(), patterns)
    dark = masked.geometry.pattern_mask
    behind = masked.detect(counts)
    behind[:, dark] = 0
    yield "module gap of 3 pixels, masked", Faulty(masked, behind, masked.bound(counts, mask=dark))

    x, y = geometry.bragg_center_px
    away = {"bragg_center_px": (x + b, y + b), "roi_origin_px": (roi.row, roi.col)}
    moved = make_case(geometry.model_copy(update=away), fresh(), patterns)
    yield "centre off by 1 px, told", Faulty(moved, moved.detect(counts), moved.bound(counts))

    for factor in (0.9, 1.1):
        thick = make_case(geometry, fresh(), patterns, factor)
        yield (
            f"thickness × {factor:g}, not told",
            Faulty(thick, thick.detect(counts), thick.bound(counts)),
        )


RIGHT = ("nothing", "background", "module", "centre")
"""Faults that must cost nothing: unflagged, and as exact as the bound allows."""


def section_d(options: argparse.Namespace) -> None:
    print(
        f"\nD: refined at {FIGURE_LEVEL} counts, median over geometries of RMSE / bound with what "
        f"is known; of all points, flagged,\nand flagged or within {FAR:g} σ of the bound (must "
        f"{FLAGGED_OR_RIGHT:g} but for the thickness); network alone, the same of ε, ω, χ"
    )
    found: dict[str, list[tuple[Floats, Floats, float, float]]] = {}
    for number in range(options.geometries):
        geometry = random_geometry(np.random.default_rng([SEED, number]))
        for name, faulty in faults(number, geometry, options.patterns):
            case, bound = faulty.case, faulty.bound
            refined = case.analyzer().process(faulty.patterns)
            network = case.analyzer(()).process(faulty.patterns)
            error, _ = errors(refined, case.truth)
            known = np.isfinite(bound).all(1)
            flagged = refined.flags != 0
            right = (np.abs(error) <= FAR * bound).all(1)
            found.setdefault(name, []).append(
                (
                    Outcome.of(case, FIGURE_LEVEL, refined, bound).ratio,
                    Outcome.of(case, FIGURE_LEVEL, network, bound).ratio,
                    100 * float(np.mean(flagged)),
                    100 * float(np.mean((flagged | right)[known])),
                )
            )
    columns = [f"{what} {name}" for what in ("refined", "network") for name in _NAMES]
    table = Table("fault", *columns, "flagged %", "or right %")
    for name, each in found.items():
        refined, network = (_median([e[i] for e in each]) for i in (0, 1))
        flagged, right = (float(np.mean([e[i] for e in each])) for i in (2, 3))
        must = name.startswith(RIGHT)
        table.row(
            name,
            *(cell(v, ".2f", not must or v <= REFINED) for v in refined),
            *(f"{v:.2f}" for v in network),
            f"{flagged:.2f}",
            cell(right, ".2f", "thickness" in name or right >= FLAGGED_OR_RIGHT),
        )


SECTIONS = {"A": section_a, "B": section_b, "C": section_c, "D": section_d}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {' '.join(SECTIONS)}; all by default")
    parser.add_argument("--geometries", type=int, default=40)
    parser.add_argument("--patterns", type=int, default=600)
    parser.add_argument("--seed", type=int, default=SEED, help="of A's geometries")
    parser.add_argument("--figure", help="where to draw error over bound across the envelope")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    start = time.perf_counter()
    missed.clear()
    for name in options.sections or SECTIONS:
        SECTIONS[name](options)
    print(f"\n{time.perf_counter() - start:.0f} s; {len(missed)} rows miss a must", flush=True)
    for row in missed:
        print(f"  {row}")


if __name__ == "__main__":
    main()
