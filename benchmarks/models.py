"""How fast and how exact the estimators are, and what training reaches in which time.

Run: ``python -m benchmarks.models``, from the repository's root, in about two minutes.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.physics import best
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Analyzer, CorrelationLibrary, NanobeamNN, correlation_fit
from nanobeam_bluesky.models.correlation import PARAMETERS
from nanobeam_bluesky.physics import forward, simulate_library
from nanobeam_bluesky.training import evaluate, train

PUBLISHED = {"strain": 1.4e-4, "omega": 5.3e-4, "chi": 1.8e-3}
"""One published network between grid points, published sampling, peak 7 counts."""
PUBLISHED_CONTINUOUS = {"strain": 1.8e-4, "omega": 5.4e-4, "chi": 1.6e-3}
"""The same on the continuous model at 4300 counts."""


def row(name: str, value: float, must: float, unit: str) -> None:
    print(f"{name:52s} {value:10.3g} {must:10.3g} {value / must:7.2f}  {unit}")


def direct_fit(
    pattern: NDArray[np.float32], geometry: Geometry, axes: list[NDArray[np.float64]]
) -> tuple[list[float], float]:
    """Correlate one pattern with every library pattern, as published; estimates and seconds."""
    correlation = np.empty([len(axis) for axis in axes])
    seconds = 0.0
    for i, strain in enumerate(axes[0]):  # one strain at a time: 30 MB instead of 1 GB
        library = simulate_library(geometry, [strain], *axes[1:], sampling="continuous")[0]
        total = library.sum(axis=(2, 3), keepdims=True)
        library = np.divide(library, total, out=np.zeros_like(library), where=total > 0)
        start = time.perf_counter()
        correlation[i] = (pattern * library).sum(axis=(2, 3))
        seconds += time.perf_counter() - start
    found = []
    for kept in range(3):
        weight = correlation.sum(axis=tuple({0, 1, 2} - {kept}))
        weight -= weight.min()
        found.append(float(weight @ axes[kept] / weight.sum()))
    return found, seconds


def as_published(network: NanobeamNN) -> nn.Module:
    """The same layers in plain PyTorch: labels of counts (n, 1, ny, nx)."""
    return nn.Sequential(*network.operation, nn.Flatten(), network.fc1)


def share_of_plain_time(network: NanobeamNN, batch: Tensor, pairs: int = 15) -> float:
    """Time of a network over that of the same layers in plain PyTorch: median of pairs in turn."""
    plain = as_published(network)
    shares = []
    with torch.inference_mode():
        for _ in range(pairs):
            seconds = []
            for run in (plain, network):
                time.sleep(0.02)  # PyTorch's threads spin for a while after their work
                start = time.perf_counter()
                run(batch)
                seconds.append(time.perf_counter() - start)
            shares.append(seconds[1] / seconds[0])
    return float(np.median(shares))


def main() -> None:
    geometry = Geometry.published()
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (2048, 3)) * [0.005, 0.05, 0.1]
    counts = rng.poisson(4.5 * forward(*truth.T, geometry)).astype(np.float32)
    print(f"{'models':52s} {'now':>10s} {'must':>10s} {'ratio':>7s}")

    start = time.perf_counter()
    library = CorrelationLibrary.simulate(geometry)
    row("marginals of the 41³ library", time.perf_counter() - start, 5, "s")
    fit = best(lambda: correlation_fit(counts, geometry, library=library), 10) / len(counts)
    row("correlation_fit", 1e3 * fit, 0.02, "ms a pattern")
    axes = [library.axes[name] for name in PARAMETERS]
    direct, seconds = direct_fit(counts[0], geometry, axes)
    fitted = correlation_fit(counts[:1], geometry, library=library)
    worst = max(
        abs(getattr(fitted, name)[0] - value) / axis[-1]
        for name, value, axis in zip(PARAMETERS, direct, axes, strict=True)
    )
    row("  difference from the direct fit, of the range", worst, 1e-6, "")
    print(f"  the direct fit takes {1e3 * seconds:.0f} ms a pattern, {seconds / fit:.0f} × longer")

    network = NanobeamNN((64, 64)).eval()
    plain_network = as_published(network)
    batch = torch.from_numpy(counts[:64])[:, None]
    with torch.inference_mode():
        plain = best(lambda: plain_network(batch), 30) / 64
        published = best(lambda: network(batch), 30) / 64
        labels = network(batch) * network.label_scale
        worst = float((labels - plain_network(batch)).abs().max())
    print(f"published NanobeamNN, batch 64: {1e3 * published:.3f} ms a pattern")
    row("  difference from plain PyTorch, of the labels", worst, 1e-5, "")
    threads = torch.get_num_threads()
    for some in sorted({1, threads}):
        torch.set_num_threads(some)
        share = share_of_plain_time(network, batch)
        row(f"  on {some} threads, of plain PyTorch's time", share, 1 / 1.7, "")
    torch.set_num_threads(threads)
    refining = Analyzer.for_geometry(geometry, device="cpu")
    refined = best(lambda: refining.process(counts), 10) / len(counts)
    analyzer = Analyzer.for_geometry(geometry, method="network", device="cpu")
    alone = best(lambda: analyzer.process(counts), 10) / len(counts)
    print(
        f"shipped network {1e3 * alone:.3f} ms a pattern with flags and σ, refined "
        f"{1e3 * refined:.3f} ms; the published one in plain PyTorch {1e3 * plain:.3f} ms"
    )
    shipped = evaluate(analyzer, geometry, counts=4300, seed=1)
    for name, reference in PUBLISHED_CONTINUOUS.items():
        row(f"  RMSE at 4300 counts, continuous model, {name}", shipped.rmse[name], reference, "")
        print(f"    Cramér–Rao bound {shipped.bound[name]:.2e}")

    start, cpu = time.perf_counter(), time.process_time()
    trained, card = train(geometry, sampling="published", peak=7)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    row(f"training, {card.training['steps']} steps ({cpu:.0f} s of CPU)", wall, 120, "s")
    reached = evaluate(trained, geometry, sampling="published", peak=7, n=8192, seed=1)
    for name, reference in PUBLISHED.items():
        row(f"  RMSE between grid points, published, {name}", reached.rmse[name], reference, "")


if __name__ == "__main__":
    main()
