"""Regenerate the simulated part of Luo et al., Sci. Rep. (2025), beside the published figures.

    python examples/reproduce_paper.py [--out nanobeam-paper] [--quick]

Writes README.md and the figures it shows into a folder, in a few minutes on two cores.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from nanobeam_bluesky import Geometry
from nanobeam_bluesky.models import (
    DEFAULT_FIT,
    Analyzer,
    CorrelationLibrary,
    Estimates,
    Flag,
    ModelStore,
    NanobeamNN,
    correlation_fit,
    refine,
)
from nanobeam_bluesky.models.correlation import RANGES
from nanobeam_bluesky.physics import cramer_rao, forward, simulate_library
from nanobeam_bluesky.plots import MapAxes, MapPanel, label_outer
from nanobeam_bluesky.sim import phantom
from nanobeam_bluesky.training import train

Columns = dict[str, np.ndarray]
Method = Callable[[np.ndarray], Estimates]
Methods = dict[str, Method]
Row = tuple[str, str, str]
"""What, the published figure, ours."""

GEOMETRY = Geometry.published()
PEAK = 7.0
"""Counts at the peak of the full library, as published."""
NAMES = {"strain": "ε", "omega": "ω", "chi": "χ"}
SCALES = {"strain": (1e4, "10⁻⁴"), "omega": (1e3, "m°"), "chi": (1e3, "m°")}
"""Factor and unit of errors in the figures."""
CORRELATION, NETWORK, REFINED = "correlation fit", "network", "refined"
FITTED, BOUND = "refined, thickness fitted", "Cramér–Rao bound"
ON_GRID, BETWEEN = "network, on the grid", "network, between grid points"
STYLES = {  # colours of Okabe and Ito, and different dashes
    CORRELATION: {"color": "#E69F00", "linestyle": "-."},
    NETWORK: {"color": "#0072B2", "linestyle": "--"},
    ON_GRID: {"color": "#56B4E9", "linestyle": "-"},
    BETWEEN: {"color": "#0072B2", "linestyle": "--"},
    REFINED: {"color": "#D55E00", "linestyle": "-"},
    FITTED: {"color": "#009E73", "linestyle": "-"},
    BOUND: {"color": "black", "linestyle": ":"},
}


def draw(n: int) -> Columns:
    """Parameters between grid points."""
    rng = np.random.default_rng(3)
    return {name: rng.uniform(-1, 1, n) * RANGES[name] for name in NAMES}


def draw_on_grid(n: int) -> Columns:
    """Parameters on the published 41³ grid."""
    rng = np.random.default_rng(4)
    return {name: rng.integers(-20, 21, n) / 20 * RANGES[name] for name in NAMES}


def photograph(
    truth: Columns, geometry: Geometry = GEOMETRY, counts: float = 0, sampling: str = "continuous"
) -> tuple[np.ndarray, float]:
    """Patterns with Poisson noise and their scale: of the published peak, or of mean counts."""
    expected = forward(*truth.values(), geometry, sampling=sampling)
    scale = counts / expected.sum(axis=(1, 2)).mean() if counts else PEAK
    return np.random.default_rng(1).poisson(scale * expected).astype(np.float32), float(scale)


def bound_of(truth: Columns, scale: float, geometry: Geometry = GEOMETRY) -> Columns:
    bound = cramer_rao(*truth.values(), geometry, scale=scale, fit=DEFAULT_FIT)
    return {name: bound[name] for name in NAMES}


def errors(found: Estimates, truth: Columns) -> Columns:
    return {name: getattr(found, name) - truth[name] for name in NAMES}


def rms(values: Columns) -> dict[str, float]:
    return {name: float(np.sqrt(np.mean(values[name] ** 2))) for name in NAMES}


def text(values: Mapping[str, float]) -> str:
    digits = [f"{values[name]:.1e}".replace("e-0", "e-") for name in NAMES]
    return "{} / {}° / {}°".format(*digits)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with Image.open(path) as image:  # 256 colours: noise in full colour is 0.5 MB
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def plot(ax: plt.Axes, x: Sequence[float], curves: Mapping[str, Sequence[float]]) -> None:
    for name, values in curves.items():
        ax.plot(x, values, label=name, marker="" if name == BOUND else ".", **STYLES[name])
    ax.grid(alpha=0.3)


def figure_2a(out: Path) -> None:
    """Show patterns across strain and tilts, without and with noise."""
    figure = plt.figure(figsize=(7.4, 8.4), layout="constrained")
    grid = figure.subplots(6, 5, sharex=True, sharey=True)
    for block, name in enumerate(NAMES):
        truth = {other: np.zeros(5) for other in NAMES}
        truth[name] = np.linspace(-1, 1, 5) * RANGES[name]
        clean, noisy = PEAK * forward(*truth.values(), GEOMETRY), photograph(truth)[0]
        for row, kind, images in ((0, "noise-free", clean), (1, "noisy", noisy)):
            for ax, image, value in zip(grid[2 * block + row], images, truth[name], strict=True):
                shown = ax.imshow(image, vmin=0, vmax=10, origin="lower")
                ax.set(xticks=[0, 32, 63], yticks=[0, 32, 63])
                if kind == "noise-free":
                    label = f"{1e3 * value:g} {'× 10⁻³' if name == 'strain' else 'm°'}"
                    ax.set_title(f"{NAMES[name]} = {label.replace('-', '−')}", fontsize=10)
            grid[2 * block + row, 0].set_ylabel(kind)
    figure.colorbar(shown, ax=grid, label="counts", extend="max", shrink=0.4, aspect=30)
    figure.supxlabel("pixel along 2θ", fontsize=10)
    figure.supylabel("pixel across 2θ", fontsize=10)
    save(figure, out / "figure-2a.png")


def figure_3(out: Path, size: int, methods: Methods) -> list[Row]:
    """Map the phantom with every method, and the errors."""
    sample = phantom("figure3", (size, size))
    truth = {name: getattr(sample, name).ravel() for name in NAMES}
    patterns, _ = photograph(truth)
    found = {method: estimate(patterns) for method, estimate in methods.items()}
    wrong = {method: errors(estimates, truth) for method, estimates in found.items()}
    y, x = ((float(ends[0]), float(ends[-1])) for ends in (sample.y, sample.x))
    axes = MapAxes((size, size), ("y", "x"), ("um", "um"), (y, x))
    figure = plt.figure(figsize=(15.5, 10), layout="constrained")
    grid = figure.subplots(4, 6, sharex=True, sharey=True)

    def show(ax: plt.Axes, name: str, values: np.ndarray, limit: float, title: str) -> None:
        panel = MapPanel(ax, name, Estimates.UNITS[name], axes)
        panel.show(values.reshape(size, size), limits=(-limit, limit))
        panel.title(title)

    for column, (name, (factor, unit)) in enumerate(SCALES.items()):
        limit = 1.2 * float(np.abs(truth[name]).max())
        show(grid[0, column], name, truth[name], limit, f"{NAMES[name]}: truth")
        grid[0, 3 + column].axis("off")
        for row, (method, error) in zip(grid[1:], wrong.items(), strict=True):
            title = f"{NAMES[name]}: {method}"
            show(row[column], name, getattr(found[method], name), limit, title)
            # one scale for the errors of network and refinement
            reach = 2.5 * rms(wrong[CORRELATION if method == CORRELATION else NETWORK])[name]
            size_text = f"{factor * rms(error)[name]:.2f} {unit}".replace(" 10⁻⁴", " × 10⁻⁴")
            title = f"error of {NAMES[name]}\nrms {size_text}"
            show(row[3 + column], name, error[name], reach, title)
    note = "Error: estimate − truth.\nThe correlation fit's scales are wider."
    note = grid[0, 4].text(0.5, 0.1, note, ha="center", transform=grid[0, 4].transAxes)
    note.set_in_layout(False)
    label_outer(grid, axes)
    save(figure, out / "figure-3.png")
    talk = {m: np.corrcoef(error["omega"], truth["strain"])[0, 1] for m, error in wrong.items()}
    what = "error; correlation of ω's error with ε"
    return [
        (f"Figure 3, {method}: {what}", "", f"{text(rms(error))}; {talk[method]:.2f}")
        for method, error in wrong.items()
    ]


def figure_s2(out: Path, n: int, steps: int, methods: Methods, published: Method) -> list[Row]:
    """Show how errors are distributed, and state how large they are."""
    library = CorrelationLibrary.simulate(GEOMETRY, sampling="published", steps=steps)
    on_grid, between = draw_on_grid(n), draw(n)

    def judge(method: Method, truth: Columns) -> Columns:
        return errors(method(photograph(truth, sampling="published")[0]), truth)

    def correlate(patterns: np.ndarray) -> Estimates:
        return correlation_fit(patterns, GEOMETRY, library=library)

    top = {
        CORRELATION: judge(correlate, on_grid),
        ON_GRID: judge(published, on_grid),
        BETWEEN: judge(published, between),
    }
    patterns, scale = photograph(between, counts=4300)
    bottom = {name: errors(method(patterns), between) for name, method in methods.items()}
    bound = bound_of(between, scale)
    noise = np.random.default_rng(5).standard_normal(n)
    drawn = bottom | {BOUND: {name: sigma * noise for name, sigma in bound.items()}}
    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey=True)
    titles = f"published sampling, peak {PEAK:g}", "continuous model, 4300 counts"
    for axs, title, panel in zip(grid, titles, (top, drawn), strict=True):
        for ax, (name, (factor, unit)) in zip(axs, SCALES.items(), strict=True):
            for method, error in panel.items():
                sizes = factor * np.sort(np.abs(error[name]))
                ax.plot(sizes, np.linspace(0, 100, n), label=method, **STYLES[method])
            ax.set(xscale="log", xlim=factor * RANGES[name] * np.array([2e-4, 2]), ylim=(0, 100))
            ax.set_title(f"{NAMES[name]}, {title}", fontsize=10)
            ax.grid(alpha=0.3)
            if panel is drawn:
                ax.set_xlabel(f"size of the error of {NAMES[name]} ({unit})")
        axs[0].set_ylabel("patterns with a smaller error (%)")
    handles = {line.get_label(): line for ax in grid[:, 0] for line in ax.lines}
    handles.pop(NETWORK)  # drawn as between grid points, where it is
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles))
    save(figure, out / "figure-s2.png")
    found = {f"published sampling: {name}": error for name, error in top.items()}
    found |= {f"4300 counts: {name}": error for name, error in (bottom | {BOUND: bound}).items()}
    return [(what, PUBLISHED.get(what, ""), text(rms(error))) for what, error in found.items()]


def figure_s3(out: Path, n: int, levels: list[float], methods: Methods) -> list[Row]:
    """Show errors against counts, beside what the photons allow."""
    truth = draw(n)
    curves: dict[str, list[dict[str, float]]] = {NETWORK: [], REFINED: [], BOUND: []}
    for counts in levels:
        patterns, scale = photograph(truth, counts=counts)
        found = {method: methods[method](patterns) for method in (NETWORK, REFINED)}
        enough = found[REFINED].flags & Flag.FEW_COUNTS == 0
        values = {method: errors(estimates, truth) for method, estimates in found.items()}
        for method, error in (values | {BOUND: bound_of(truth, scale)}).items():
            curves[method].append(rms({name: error[name][enough] for name in NAMES}))
    figure = plt.figure(figsize=(11, 3.8), layout="constrained")
    for ax, (name, (factor, unit)) in zip(figure.subplots(1, 3), SCALES.items(), strict=True):
        drawn = {m: [factor * at[name] for at in curve] for m, curve in curves.items()}
        plot(ax, levels, drawn)
        ax.set(xscale="log", yscale="log", ylabel=f"RMSE of {NAMES[name]} ({unit})")
        ax.set_xlabel("mean counts of a pattern")
    ax.legend()
    save(figure, out / "figure-s3.png")
    rows = []
    for method in (NETWORK, REFINED):
        pairs = list(zip(curves[method], curves[BOUND], strict=True))[1:]
        ratios = [[at[name] / least[name] for at, least in pairs] for name in NAMES]
        here = " / ".join(f"{min(ratio):.2f}–{max(ratio):.2f}" for ratio in ratios)
        what = f"{method}, {levels[1]:.0f} to {levels[-1]:.0f} counts: error / bound"
        rows.append((what, PUBLISHED.get(f"{method}: error / bound", ""), here))
    blurred = GEOMETRY.model_copy(update={"pupil_blur_px": 0.5})
    patterns, scale = photograph(truth, blurred, counts=6000)
    estimates = Analyzer.for_geometry(blurred, store=ModelStore(out)).process(patterns)
    error, least = rms(errors(estimates, truth)), rms(bound_of(truth, scale, blurred))
    here = " / ".join(f"{error[name] / least[name]:.2f}" for name in NAMES)
    return [*rows, (f"{REFINED}, pupil blurred by 0.5 px, 6000 counts: error / bound", "", here)]


def figure_s5(out: Path, n: int, steps: int, methods: Methods) -> list[Row]:
    """Show what a film of another thickness than the geometry's does."""
    truth, off = draw(n), np.linspace(-30, 30, steps)
    fitted = Analyzer.for_geometry(GEOMETRY, fit=(*DEFAULT_FIT, "thickness"), store=ModelStore(out))
    methods = {m: methods[m] for m in (NETWORK, REFINED)} | {FITTED: fitted.process}
    size, bias, flagged, found = ({m: [] for m in methods} for _ in range(4))
    for percent in off:
        thick = GEOMETRY.thickness_nm * (1 + percent / 100)
        film = GEOMETRY.model_copy(update={"thickness_nm": thick})
        patterns, _ = photograph(truth, film, counts=6000)
        for method, estimate in methods.items():
            estimates = estimate(patterns)
            error = errors(estimates, truth)
            size[method].append(rms(error))
            bias[method].append({name: float(error[name].mean()) for name in NAMES})
            flagged[method].append(100 * float((estimates.flags != 0).mean()))
            found[method].append(100 * (estimates.thickness / GEOMETRY.thickness_nm - 1))
    figure = plt.figure(figsize=(14, 6.2), layout="constrained")
    grid = figure.subplots(2, 4, sharex=True)
    for column, (name, (factor, unit)) in enumerate(SCALES.items()):
        for ax, what, values in ((grid[0, column], "RMSE", size), (grid[1, column], "bias", bias)):
            drawn = {m: [factor * at[name] for at in values[m]] for m in methods}
            plot(ax, off, drawn)
            ax.set_ylabel(f"{what} of {NAMES[name]} ({unit})")
        grid[0, column].set_ylim(0)
    plot(grid[0, 3], off, flagged)
    grid[0, 3].set_ylabel("flagged (%)")
    means, spreads = np.mean(found[FITTED], axis=1), np.std(found[FITTED], axis=1)
    grid[1, 3].errorbar(off, means, spreads, marker=".", capsize=3, **STYLES[FITTED])
    grid[1, 3].set_ylabel("thickness found: off by (%)")
    grid[1, 3].grid(alpha=0.3)
    for ax in grid[1]:
        ax.set(xlabel="thickness off by (%)", xticks=np.linspace(-30, 30, 7))
    figure.legend(handles=grid[0, 0].lines, loc="outside lower center", ncols=len(methods))
    figure.align_ylabels()
    save(figure, out / "figure-s5.png")
    rows = []
    for method in methods:
        for i in (0, len(off) // 2, len(off) - 1):
            here = f"{text(size[method][i])}; {flagged[method][i]:.1f} %"
            rows.append((f"thickness off by {off[i]:.0f} %: {method}; flagged", "", here))
    return rows


def timing(n: int, steps: int, methods: Methods, trained: float) -> list[Row]:
    """Time the library, the training and every estimator: the best of seven runs."""
    patterns, _ = photograph(draw(n))

    def milliseconds(run: Callable[[], object], n: int) -> str:
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return f"{1e3 * min(seconds) / n:.3f} ms"

    start = time.perf_counter()
    simulate_library(GEOMETRY, *(np.linspace(-limit, limit, steps) for limit in RANGES.values()))
    here = {
        f"library of {steps}³ patterns": f"{time.perf_counter() - start:.1f} s",
        "training (published sampling)": f"{trained:.0f} s",
    }
    for name, method in methods.items():
        here[f"a pattern: {name}"] = milliseconds(lambda method=method: method(patterns), n)
    start_values = methods[NETWORK](patterns)
    here["a pattern: refinement alone"] = milliseconds(
        lambda: refine(patterns, start_values, GEOMETRY), n
    )
    published, batch = NanobeamNN((64, 64)).eval(), torch.from_numpy(patterns[:64])[:, None]
    with torch.inference_mode():
        here["a pattern: NanobeamNN"] = milliseconds(lambda: published(batch), len(batch))
    return [(f"time, {what}", PUBLISHED.get(what, ""), value) for what, value in here.items()]


PUBLISHED = {
    "published sampling: correlation fit": "2.0e-3 / 1.3e-2° / 3.2e-2°",
    f"published sampling: {ON_GRID}": "1.2e-4 / 4.3e-4° / 9.6e-4°",
    f"published sampling: {BETWEEN}": "1.4e-4 / 5.3e-4° / 1.8e-3°",
    f"4300 counts: {NETWORK}": "1.8e-4 / 5.4e-4° / 1.6e-3°",
    f"{NETWORK}: error / bound": "1.7 / 4.2 / 4.4 at 4300 counts",
    "library of 41³ patterns": "hours",
    "training (published sampling)": "80 min; 40 min on a GPU",
    f"a pattern: {CORRELATION}": "1034 ms",
    "a pattern: NanobeamNN": "0.072 ms",
}
"""Errors: one of the authors' networks, measured again with its weights. Times: the paper's."""

PAGE = """\
# The paper's simulations, from this code

The simulated part of [Luo et al. 2025](https://doi.org/10.1038/s41598-025-97183-0), and what
maximum likelihood adds. `python examples/reproduce_paper.py --out docs/explanations/paper` writes
this page. The published condition: SrIrO₃ 002, 11.7 nm, 11.3 keV, 64×64 pixels, a perfectly sharp
pupil, no background, Poisson noise, ε within ± 0.005, ω within ± 0.05°, χ within ± 0.1°.

- **Correlation fit**: the conventional method, on a library of {steps}³ patterns.
- **Network**: our `SeparableNet`; the shipped one on the continuous model, one trained here on the
  published sampling. The published architecture is timed only: two minutes are too few to train it.
- **Refined**: the network's estimate refined by maximum likelihood, the default.
- *Published sampling* is the published simulation, whose windows blur and beat; 7 counts at the
  library's peak. The *continuous model* integrates over every pixel; refinement needs it.

Errors are root mean squares of ε / ω / χ. Published errors are of one of the authors' networks,
measured again with its weights; published times are the paper's. Figure 3 follows the authors'
notebook. Of the other figures we know the subject only: each is taken to be what its heading says.

{table}

## Figure 2a: simulated patterns

Strain moves the film's peak across the ring, ω moves ring and peak along 2θ, χ the ring across it.

![Noise-free and noisy patterns for five strains and tilts](figure-2a.png)

## Figure 3: a phantom

The correlation fit shows stripes of ε in its ω, which are not in the sample.

![Maps of the phantom by three methods, and their errors](figure-3.png)

## Figure S2: distribution of errors

Further left is better. The bound is what the photons allow an unbiased estimate. The published
networks are better on the grid that they were trained on than between its points; ours knows no
grid.

![Cumulative distributions of errors](figure-s2.png)

## Figure S3: errors against counts

A pattern of less than 100 counts is flagged and left out here: half of those at 100 on average.

![Root mean square errors against counts](figure-s3.png)

## Figure S5: a film of another thickness

At 6000 counts. A wrong thickness scales ε: the bias averages out over ± ε, the RMSE does not.
Refinement flags such a film; with the thickness fitted it is right again. Bars: standard deviation.

![Errors, flags and fitted thickness against the true thickness](figure-s5.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("nanobeam-paper"))
    parser.add_argument("--quick", action="store_true", help="small and coarse, to try it")
    options = parser.parse_args()
    out, quick = options.out, options.quick
    out.mkdir(parents=True, exist_ok=True)
    store = ModelStore(out)  # none of the user's networks: the shipped one
    n, steps = (200, 11) if quick else (4000, 41)
    levels = [1e2, 1e3, 1e5] if quick else [1e2, 3e2, 1e3, 3e3, 1e4, 3e4, 1e5]
    network, card = train(GEOMETRY, sampling="published", peak=PEAK, seconds=2 if quick else None)
    library = CorrelationLibrary.simulate(GEOMETRY, steps=steps)
    methods: Methods = {
        CORRELATION: lambda patterns: correlation_fit(patterns, GEOMETRY, library=library),
        NETWORK: Analyzer.for_geometry(GEOMETRY, method="network", store=store).process,
        REFINED: Analyzer.for_geometry(GEOMETRY, store=store).process,
    }
    figure_2a(out)
    rows = [
        *figure_s2(out, n, steps, methods, Analyzer(GEOMETRY, network=network, card=card).process),
        *figure_3(out, 16 if quick else 64, methods),
        *figure_s3(out, n, levels, methods),
        *figure_s5(out, n // 2, 3 if quick else 7, methods),
        *timing(n // 2, steps, methods, card.training["seconds"]),
    ]
    lines = ["| what | published | here |", "|---|---|---|"]
    table = "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
    (out / "README.md").write_text(PAGE.format(table=table, steps=steps))
    print(table)
    print(f"{out / 'README.md'}: the page, with its figures beside it")


if __name__ == "__main__":
    main()
