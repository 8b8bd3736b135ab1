"""`evaluate`: how far estimates lie from the truth, beside what the photons allow."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.analyzer import Analyzer
from nanobeam_bluesky.models.correlation import PARAMETERS, RANGES
from nanobeam_bluesky.models.store import Accuracy
from nanobeam_bluesky.physics import Sampling, cramer_rao, forward
from nanobeam_bluesky.training.noise import poisson

__all__ = ["evaluate", "random_parameters"]

_BOUNDS = 512  # patterns of which the bound is averaged


def evaluate(
    estimator: nn.Module | Analyzer,
    geometry: Geometry,
    *,
    sampling: Sampling = "continuous",
    ranges: dict[str, float] | None = None,
    counts: float | None = None,
    peak: float | None = None,
    n: int = 4096,
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
        if absent.
    counts
        Mean counts of a pattern.
    peak
        Counts at the peak of the full library, e.g. 7 as published; instead of `counts`.
    n, seed
        Number of patterns; of their parameters and noise.

    Returns
    -------
    Accuracy
        The bound is that of the continuous model with an unknown scale, without background.

    Raises
    ------
    ValueError
        Unless exactly one of `counts` and `peak` is given.
    """
    if (counts is None) == (peak is None):
        raise ValueError(f"give either counts or peak, found counts = {counts}, peak = {peak}")
    # a stream of its own: no seed of a training draws the same parameters
    rng = np.random.default_rng([seed, 1])
    truth = random_parameters(rng, n, RANGES | (ranges or {}))
    strain, omega, chi = truth.T
    patterns = forward(strain, omega, chi, geometry, sampling=sampling)
    unit = float(patterns.sum(axis=(1, 2)).mean())
    scale = counts / unit if counts is not None else peak
    assert scale is not None
    noisy = poisson(
        patterns, np.arange(n), np.full(n, scale, np.float32), np.zeros(n, np.float32), seed
    )
    if isinstance(estimator, Analyzer):
        estimates = estimator.process(noisy)
        found = np.stack([getattr(estimates, name) for name in PARAMETERS], axis=1)
    else:
        found = _apply(estimator, noisy)
    error = found - truth
    strain, omega, chi = truth[:_BOUNDS].T
    fit = ("strain", "omega", "chi", "scale")
    bound = cramer_rao(strain, omega, chi, geometry, scale=scale, fit=fit)
    return Accuracy(
        counts=scale * unit,
        rmse=_named(np.sqrt(np.square(error).mean(axis=0))),
        bias=_named(error.mean(axis=0)),
        bound={name: _finite_rms(bound[name]) for name in PARAMETERS},
    )


def random_parameters(
    rng: np.random.Generator, n: int, ranges: dict[str, float]
) -> NDArray[np.float64]:
    """Draw strain, ω (deg) and χ (deg) uniformly: (n, 3)."""
    return rng.uniform(-1, 1, (n, 3)) * [ranges[name] for name in PARAMETERS]


def _apply(network: nn.Module, patterns: NDArray[np.float32]) -> NDArray[np.float64]:
    """Estimates (n, 3) of a network on the CPU for counts (n, ny, nx)."""
    with torch.inference_mode():
        parts = [network(part[:, None]) for part in torch.from_numpy(patterns).split(64)]
    return torch.cat(parts).double().numpy()


def _named(values: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(f"{v:.3g}") for name, v in zip(PARAMETERS, values, strict=True)}


def _finite_rms(values: NDArray[np.float64]) -> float:
    """Root mean square where the pattern determines the parameter at all."""
    finite = values[np.isfinite(values)]
    return float(f"{math.sqrt(np.square(finite).mean()):.3g}") if len(finite) else math.nan
