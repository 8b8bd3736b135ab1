"""`evaluate`: how far estimates lie from the truth, beside what the photons allow."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.analyzer import Analyzer
from nanobeam_bluesky.models.correlation import RANGES
from nanobeam_bluesky.models.networks import outputs
from nanobeam_bluesky.models.store import Accuracy
from nanobeam_bluesky.models.universal import ReducedNet
from nanobeam_bluesky.physics import Sampling, cramer_rao, forward
from nanobeam_bluesky.training.noise import poisson

__all__ = ["MARGIN", "checked_ranges", "evaluate", "simulate"]

MARGIN = 1.1
"""Trained beyond the ranges, so that what lies outside is seen to lie outside."""

_BOUNDS = 512  # patterns of which the bound is averaged


def evaluate(
    estimator: nn.Module | Analyzer,
    geometry: Geometry,
    *,
    sampling: Sampling = "continuous",
    ranges: dict[str, float] | None = None,
    counts: float | None = None,
    peak: float | None = None,
    n: int = 2048,
    seed: int = 0,
) -> Accuracy:
    """Measure an estimator on simulated patterns between grid points.

    Parameters
    ----------
    estimator
        A network, or an `Analyzer`.
    geometry
        The geometry that the patterns are simulated in.
    sampling
        Of the simulation, see `physics.forward`.
    ranges
        Half-ranges of strain, omega (deg) and chi (deg), those of the published library
        if absent; and of thickness (nm) around the geometry's, which is fixed if absent.
    counts
        Mean counts of a pattern.
    peak
        Counts at the peak of the full library, e.g. 7 as published; instead of `counts`.
    n, seed
        Number of patterns; of their parameters and noise.

    Returns
    -------
    Accuracy
        The bound is that of the continuous model with an unknown scale, without background;
        of an unknown thickness, if it has a range.

    Raises
    ------
    ValueError
        Unless exactly one of `counts` and `peak` is given; if a range is impossible, see
        `checked_ranges`.
    """
    if (counts is None) == (peak is None):
        raise ValueError(f"give either counts or peak, found counts = {counts}, peak = {peak}")
    limits = checked_ranges(geometry, ranges)
    names = outputs(limits)
    # a stream of its own: no seed of a training draws the same parameters
    rng = np.random.default_rng([seed, 1])
    truth, patterns = simulate(rng, n, geometry, limits, sampling)
    unit = float(patterns.sum(axis=(1, 2)).mean())
    scale = counts / unit if counts is not None else peak
    assert scale is not None
    noisy = poisson(
        patterns, np.arange(n), np.full(n, scale, np.float32), np.zeros(n, np.float32), seed
    )
    if isinstance(estimator, ReducedNet):
        estimator = Analyzer(geometry, network=estimator, ranges=limits)
    if isinstance(estimator, Analyzer):
        estimates = estimator.process(noisy)
        found = np.stack([getattr(estimates, name) for name in names], axis=1)
    else:
        found = _apply(estimator, noisy)
    error = found - truth[:, : found.shape[1]]  # a network need not give the thickness
    strain, omega, chi, *film = truth[:_BOUNDS].T
    bound = cramer_rao(
        strain,
        omega,
        chi,
        geometry,
        scale=scale,
        thickness=film[0] if film else None,
        fit=(*names, "scale"),
    )
    return Accuracy(
        counts=scale * unit,
        rmse=_named(np.sqrt(np.square(error).mean(axis=0))),
        bias=_named(error.mean(axis=0)),
        bound={name: _finite_rms(bound[name]) for name in names},
    )


def checked_ranges(geometry: Geometry, ranges: dict[str, float] | None) -> dict[str, float]:
    """Half-ranges of what a network estimates, the published ones where none are given.

    Raises
    ------
    ValueError
        If one is of something else, or if it is not above 0, or if `MARGIN` times that of the
        thickness reaches the geometry's.
    """
    limits = RANGES | (ranges or {})
    for name, limit in limits.items():
        most = math.inf
        if name == "thickness":
            most = geometry.thickness_nm / MARGIN
        elif name not in RANGES:
            raise ValueError(f"ranges: unknown {name!r}; known are {', '.join(RANGES)}, thickness")
        if not 0 < limit < most:
            raise ValueError(
                f"ranges: {name} = {limit} is a half-range and must lie between 0 and {most:.4g}"
            )
    return limits


def simulate(
    rng: np.random.Generator,
    n: int,
    geometry: Geometry,
    ranges: dict[str, float],
    sampling: Sampling,
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Parameters drawn uniformly, in the order of `outputs` (n, 3 or 4), and their patterns."""
    names = outputs(ranges)
    truth = rng.uniform(-1, 1, (n, len(names))) * [ranges[name] for name in names]
    thickness = None
    if "thickness" in ranges:
        truth[:, 3] += geometry.thickness_nm
        thickness = truth[:, 3]
    strain, omega, chi = truth[:, :3].T
    patterns = forward(strain, omega, chi, geometry, sampling=sampling, thickness=thickness)
    return truth, patterns


def _apply(network: nn.Module, patterns: NDArray[np.float32]) -> NDArray[np.float64]:
    """Outputs (n, 3 or 4) of a network on the CPU for counts (n, ny, nx)."""
    with torch.inference_mode():
        parts = [network(part[:, None]) for part in torch.from_numpy(patterns).split(64)]
    return torch.cat(parts).double().numpy()


def _named(values: NDArray[np.float64]) -> dict[str, float]:
    names = outputs(("thickness",))
    return {name: float(f"{v:.3g}") for name, v in zip(names, values, strict=False)}


def _finite_rms(values: NDArray[np.float64]) -> float:
    """Root mean square where the pattern determines the parameter at all."""
    finite = values[np.isfinite(values)]
    return float(f"{math.sqrt(np.square(finite).mean()):.3g}") if len(finite) else math.nan
