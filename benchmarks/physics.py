"""How fast the forward model is, against the direct four-dimensional sum.

Run: ``python -m benchmarks.physics``, from the repository's root, in under a minute.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.physics import cramer_rao, forward, simulate_library
from nanobeam_bluesky.physics.published import LIBRARY_HALF_RANGE, LIBRARY_STEPS, published_peak

REFERENCE = Path(__file__).parents[1] / "tests" / "physics" / "conftest.py"


def best(
    run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Shortest of several times, seconds: other load only adds."""
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def main() -> None:
    geometry = Geometry.published()
    direct_sum = runpy.run_path(str(REFERENCE))["direct_sum"]
    axes = [np.linspace(-r, r, LIBRARY_STEPS) for r in LIBRARY_HALF_RANGE]
    parameters = np.random.default_rng(0).uniform(-1, 1, (3, 2000)) * np.array(
        [[r] for r in LIBRARY_HALF_RANGE]
    )
    compiling = time.perf_counter()
    cramer_rao(0, 0, 0, geometry, scale=7)
    for sampling in ("continuous", "published"):
        forward(0, 0, 0, geometry, sampling=sampling)
    compiling = time.perf_counter() - compiling

    library = best(lambda: simulate_library(geometry, *axes), 3)
    n = LIBRARY_STEPS**3
    print(f"first calls (compiled or from the cache): {compiling:.1f} s\n")
    print(f"{'physics':44s} {'now':>10s} {'must':>10s} {'ratio':>7s}")

    def row(name: str, value: float, must: float, unit: str) -> None:
        print(f"{name:44s} {value:10.3g} {must:10.3g} {value / must:7.2f}  {unit}")

    row(f"library of {LIBRARY_STEPS}³ patterns of 64×64", library, 5.0, "s")
    for sampling in ("continuous", "published"):
        seconds = best(lambda s=sampling: forward(*parameters, geometry, sampling=s), 5)
        row(f"forward, {sampling}", seconds / 2000 * 1e3, 0.1, "ms a pattern")
    blurred = geometry.model_copy(update={"pupil_blur_px": 0.5})
    row(
        "forward, continuous, blur 0.5 px",
        best(lambda: forward(*parameters, blurred), 5) / 2000 * 1e3,
        0.1,
        "ms a pattern",
    )
    row(
        "Cramér–Rao bound, blur 0.5 px",
        best(lambda: cramer_rao(*parameters, blurred, scale=7), 3) / 2000 * 1e3,
        0.3,
        "ms a pattern",
    )

    points = [(0.0, 0.0, 0.0), (0.003, 0.02, -0.05), (-0.005, -0.05, 0.1)]
    start = time.perf_counter()
    direct = [direct_sum(*point, geometry) / published_peak(geometry) for point in points]
    direct_time = (time.perf_counter() - start) / len(points)
    worst = max(
        abs(forward(*point, geometry, sampling="published")[0] - expected).max()
        for point, expected in zip(points, direct, strict=True)
    )
    row("largest difference from the direct sum", worst, 1e-6, "of the maximum")
    print(
        f"\ndirect sum: {direct_time:.2f} s a pattern ({len(points)} timed), so "
        f"{direct_time * n / 3600:.0f} h for the library (extrapolated): "
        f"{direct_time * n / library:,.0f} times as long"
    )


if __name__ == "__main__":
    main()
