"""How precise five angles of one film are together, when the scans have drifted.

64×64 points, each scan displaced by up to 10 points along rows and columns, to a fraction of a
point; 6000 counts and a background of 0.02 a pixel. Must: σ of the combination
over that of the best single scan is within 10 % of what the Fisher information of the five
patterns predicts. ✗ marks what misses. Run: ``python -m benchmarks.combining [ROWS]``, in two
minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import numpy as np
from bluesky import RunEngine
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import refine_together
from nanobeam_bluesky.physics import cramer_rao, fisher_information, forward
from nanobeam_bluesky.retrospective import combine
from nanobeam_bluesky.sim import Phantom, SimulatedSXDM, sxdm_fly

ANGLES = (0.0, -0.1, -0.05, 0.05, 0.1)
DRIFT = 10.0  # points, at most
STEP = 0.05  # µm
COUNTS, BACKGROUND = 6000.0, 0.02
BASE = Geometry.published().model_copy(
    update={
        "pupil_blur_px": 0.5,
        "detector_shape": (128, 128),  # 0.7 GB on disk
        "bragg_center_px": (64.0, 64.0),
    }
)
GEOMETRIES = [BASE.model_copy(update={"delta_theta_deg": angle}) for angle in ANGLES]
SYMBOLS = {"strain": "ε", "omega": "ω", "chi": "χ"}
TIMED = 512  # patterns


def sample(rows: int, drift: NDArray[np.float64]) -> Phantom:
    """A smooth film with a crack and a hole, known everywhere; its features are moved by drift."""
    y, x = np.indices((rows, rows)) - drift[:, None, None]
    rng = np.random.default_rng(5)

    def field() -> NDArray[np.float64]:
        total = np.zeros((rows, rows))
        for _ in range(6):
            (a, b), phase = rng.normal(size=2) / (rows / 3), rng.uniform(0, 2 * np.pi)
            total += np.sin(2 * np.pi * (a * y + b * x) + phase)
        return total / np.sqrt(6)

    hole = 0.7 * np.exp(-((np.hypot(y - 0.4 * rows, x - 0.55 * rows) / (0.1 * rows)) ** 2))
    crack = 0.6 * np.exp(-(((y - 0.6 * x - 0.3 * rows) / 1.5) ** 2))
    return Phantom(
        name="film",
        strain=6e-4 * field(),
        omega=0.006 * field(),
        chi=0.012 * field(),
        intensity=np.clip(1 - hole - crack, 0.05, 1),
        y=STEP * np.arange(rows),
        x=STEP * np.arange(rows),
    )


def measure(rows: int, drifts: NDArray[np.float64], folder: str) -> list[list[Any]]:
    """Fly the scans; return their documents."""
    engine = RunEngine(context_managers=[])
    runs: list[list[Any]] = []
    engine.subscribe(lambda name, doc: runs[-1].append((name, doc)))
    for seed, (geometry, drift) in enumerate(zip(GEOMETRIES, drifts, strict=True)):
        runs.append([])
        device = SimulatedSXDM(
            sample(rows, drift),
            geometry,
            folder,
            counts=COUNTS,
            background=BACKGROUND,
            seed=seed,
            position_jitter=0,
        )
        engine(sxdm_fly(device))
    return runs


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    rng = np.random.default_rng(11)
    drifts = np.concatenate([np.zeros((1, 2)), rng.uniform(-DRIFT, DRIFT, (len(ANGLES) - 1, 2))])
    drifts *= rows / 64
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(rows, drifts, folder)
        begin = time.perf_counter()
        found = combine(runs)
        print(f"{len(runs)} scans of {rows}×{rows} points in {time.perf_counter() - begin:.0f} s")
    maps, scans = found.maps, found.scans
    error = np.stack([scans.drift_row, scans.drift_col], 1) - drifts
    worst = float(np.abs(error).max())
    print(
        f"drift: up to {np.abs(drifts).max():.1f} points, found to {worst:.3f}", mark(worst < 0.2)
    )

    origin = np.array([float(maps[motor][0]) / STEP for motor in ("sample_y", "sample_x")])
    true = sample(rows, -origin)
    full = ((maps.scans_used == len(runs)) & (maps.flags == 0)).to_numpy()
    print(
        f"{full.sum()} points in all scans, {int((maps.flags != 0).sum())} flagged of {full.size}"
    )
    values = [getattr(true, name)[full] for name in SYMBOLS]
    together: Any = 0
    alone = []
    for geometry in GEOMETRIES:
        scale = COUNTS / forward(0.0, 0.0, 0.0, geometry).sum() * true.intensity[full]
        options: dict[str, Any] = {"scale": scale, "background": BACKGROUND}
        alone.append(list(cramer_rao(*values, geometry, **options).values())[:3])
        covariance = np.linalg.inv(fisher_information(*values, geometry, **options))
        together = together + np.linalg.inv(covariance[:, :3, :3])
    bound = np.sqrt(np.diagonal(np.linalg.inv(together), axis1=1, axis2=2))
    print("\n     σ/σ of best scan   predicted   ratio      RMSE/bound   RMSE/σ   within 2σ")
    for a, (name, symbol) in enumerate(SYMBOLS.items()):
        sigma = maps[f"{name}_sigma"].to_numpy()[full]
        best = np.nanmin(scans[f"{name}_sigma"].to_numpy()[:, full], axis=0)
        shrunk = float(np.median(sigma / best))
        predicted = float(np.median(bound[:, a] / np.min([single[a] for single in alone], axis=0)))
        off = maps[name].to_numpy()[full] - values[a]
        over = float(np.sqrt(np.mean((off / bound[:, a]) ** 2)))
        print(
            f"{symbol}    {shrunk:16.3f} {predicted:11.3f} {shrunk / predicted:7.3f}",
            mark(abs(shrunk / predicted - 1) < 0.1),
            f"{over:10.3f}",
            mark(over < 1.1),
            f"{np.sqrt(np.mean((off / sigma) ** 2)):7.3f} {np.mean(np.abs(off) < 2 * sigma):11.1%}",
        )
    time_of_fit()


def time_of_fit() -> None:
    """Time of the joint fit alone; only valid on a quiet machine."""
    from nanobeam_bluesky.models import Analyzer

    rng = np.random.default_rng(0)
    limits = (1e-3, 0.01, 0.02)
    values = [rng.uniform(-limit, limit, TIMED) for limit in limits]
    patterns = []
    for geometry in GEOMETRIES:
        rates = forward(*values, geometry) * (COUNTS / forward(0.0, 0.0, 0.0, geometry).sum())
        patterns.append(rng.poisson(rates + BACKGROUND).astype(np.float32))
    singles = [
        Analyzer.for_geometry(g).process(p) for g, p in zip(GEOMETRIES, patterns, strict=True)
    ]
    times = []
    for _ in range(5):
        begin = time.process_time()
        refine_together(patterns, singles, GEOMETRIES)
        times.append(time.process_time() - begin)
    print(f"\njoint fit of {len(ANGLES)} patterns: {min(times) / TIMED * 1e3:.2f} ms a point (CPU)")


def mark(good: bool) -> str:
    return " " if good else "✗"


if __name__ == "__main__":
    main()
