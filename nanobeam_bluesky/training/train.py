"""`train`: from a geometry to a network, in about a minute on two cores."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.correlation import PARAMETERS, RANGES
from nanobeam_bluesky.models.networks import ARCHITECTURES, SeparableNet
from nanobeam_bluesky.models.store import Card
from nanobeam_bluesky.physics import Sampling, forward
from nanobeam_bluesky.training.evaluate import evaluate, random_parameters
from nanobeam_bluesky.training.noise import poisson

__all__ = ["Progress", "train"]

COUNTS = (300.0, 1e5)
"""Mean counts of a pattern, from a weak film at a fast dwell to a bright one."""

_MARGIN = 1.1  # trained beyond the ranges, so that what lies outside is seen to lie outside
_WEIGHTS = (1.0, 4.0, 4.0)  # of the errors relative to the ranges: tilts are found more sharply
_CEILING = 4e4  # counts from which more of them do not help the network
_RATES = {"SeparableNet": 8e-3, "NanobeamNN": 2e-3}  # learning rates at their largest
_STEPS = 6000
_BATCH = 128
_WARM_UP = 0.1  # of the training
_MEMORY = 0.99  # of the running mean of the weights
_HELD_OUT = 2048
_VALIDATIONS = 20
_PATIENCE = 6  # validations without progress before training stops


@dataclass(frozen=True)
class Progress:
    """Where a training stands."""

    fraction: float
    """0 to 1."""
    seconds: float
    """Since the beginning, simulation included."""
    loss: float
    """Of the held-out patterns: mean squared error relative to the ranges."""


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Leave the second core to the noise.

    Two torch threads wait for each other in every product: on two busy cores a step took
    100 ms instead of 5.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_torch_thread()
def train(
    geometry: Geometry,
    *,
    sampling: Sampling = "continuous",
    architecture: str = "SeparableNet",
    ranges: dict[str, float] | None = None,
    counts: float | tuple[float, float] = COUNTS,
    peak: float | None = None,
    background: float = 0.0,
    steps: int | None = None,
    seconds: float | None = None,
    pool: int = 32768,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[Progress], object] | None = None,
) -> tuple[nn.Module, Card]:
    """Train a network for one geometry on simulated patterns between grid points.

    Parameters
    ----------
    geometry
        The geometry.
    sampling
        Of the simulation, see `physics.forward`.
    architecture
        A key of `models.networks.ARCHITECTURES`.
    ranges
        Half-ranges of strain, omega (deg) and chi (deg), those of the published library
        if absent.
    counts
        Mean counts of a pattern, or their range (drawn uniformly in the logarithm).
    peak
        Counts at the peak of the full library, e.g. 7 as published; instead of `counts`.
    background
        Largest uniform background, as a part of the pattern's mean, e.g. 0.05.
    steps, seconds
        Length of the training (6000 steps if neither is given; what is reached first if
        both are). The learning rate follows a warm-up and a cosine over it. It ends early
        when the held-out patterns gain nothing any more. Only with `steps` alone does the
        same seed give the same network.
    pool
        Number of simulated patterns; Poisson noise is drawn anew whenever one is used.
    seed
        Of parameters, noise and initial weights.
    device
        Torch device.
    progress
        Called at every validation.

    Returns
    -------
    network : torch.nn.Module
        In evaluation mode, on the CPU: the running mean of the weights that was best on
        held-out patterns.
    card : Card
        With the accuracy at levels within `counts`, or at `peak`.

    Raises
    ------
    ValueError
        If the architecture is unknown, or takes no patterns as small as these.
    """
    started = time.perf_counter()
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture = {architecture!r}: known are {', '.join(ARCHITECTURES)}")
    if steps is None and seconds is None:
        steps = _STEPS
    limits = RANGES | (ranges or {})
    beyond = {name: _MARGIN * limit for name, limit in limits.items()}
    rng = np.random.default_rng([seed, 0])
    truth = random_parameters(rng, pool + _HELD_OUT, beyond)
    strain, omega, chi = truth.T
    patterns = forward(strain, omega, chi, geometry, sampling=sampling).clip(0)
    unit = float(patterns.sum(axis=(1, 2)).mean())
    if peak is not None:
        counts = peak * unit
    low, high = counts if isinstance(counts, tuple) else (counts, counts)

    def batch(which: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Counts (n, 1, ny, nx) with fresh noise, labels (n, 3) and weights (n, 1)."""
        level = np.exp(rng.uniform(math.log(low), math.log(high), len(which)))
        floor = rng.uniform(0, background, len(which)) * level / patterns[0].size
        noisy = poisson(
            patterns,
            which,
            (level / unit).astype(np.float32),
            floor.astype(np.float32),
            int(rng.integers(2**62)),
        )
        # errors fall as 1/√counts: every level has the same say
        weight = 1 / (low / level + low / _CEILING)
        columns = (noisy[:, None], truth[which], weight[:, None])
        counts_, labels, weights = (torch.from_numpy(c.astype(np.float32)) for c in columns)
        return counts_.to(device), labels.to(device), weights.to(device)

    def loss(network: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        found: Tensor = network(data[0])
        return ((found - data[1]).mul(per_span).square() * data[2]).mean()

    torch.manual_seed(seed)
    span = torch.tensor([limits[name] for name in PARAMETERS], dtype=torch.float32)
    per_span = (torch.tensor(_WEIGHTS) / span).to(device)
    network = ARCHITECTURES[architecture](geometry.pattern_shape)
    if isinstance(network, SeparableNet):
        network.fit_features(torch.from_numpy(patterns[:8192]), span)
    network = network.to(device)
    averaged = copy.deepcopy(network).eval()
    rate = _RATES[architecture]
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-4)
    held_out = batch(np.arange(pool, pool + _HELD_OUT))

    best, best_state, stale, step, validations = math.inf, averaged.state_dict(), 0, 0, 0
    fraction = 0.0
    with ThreadPoolExecutor(1) as noise:

        def prepare() -> Future[tuple[Tensor, Tensor, Tensor]]:
            return noise.submit(lambda: batch(rng.integers(pool, size=_BATCH)))

        upcoming = deque([prepare(), prepare()])
        while fraction < 1 and stale < _PATIENCE:
            for group in optimizer.param_groups:
                group["lr"] = rate * _schedule(fraction)
            upcoming.append(prepare())
            error = loss(network, upcoming.popleft().result())
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            step += 1
            _follow(averaged, network, 1 - min(_MEMORY, step / (step + 10)))
            elapsed = time.perf_counter() - started
            fraction = min(1.0, max(step / (steps or math.inf), elapsed / (seconds or math.inf)))
            if fraction * _VALIDATIONS < validations + 1:
                continue
            validations = int(fraction * _VALIDATIONS)
            with torch.inference_mode():
                found = float(loss(averaged, held_out))
            stale = 0 if found < best else stale + 1
            if found < best:
                best, best_state = found, copy.deepcopy(averaged.state_dict())
            if progress is not None:
                progress(Progress(fraction, elapsed, found))
    averaged.load_state_dict(best_state)
    averaged = averaged.cpu().eval()
    card = Card(
        fingerprint=geometry.fingerprint(),
        geometry=geometry,
        architecture=architecture,
        ranges=limits,
        training={
            "sampling": sampling,
            "counts": [low, high],
            "background": background,
            "steps": step,
            "batch": _BATCH,
            "pool": pool,
            "seed": seed,
            "loss": best,
            "seconds": round(time.perf_counter() - started, 1),
        },
        accuracy=tuple(
            evaluate(averaged, geometry, sampling=sampling, ranges=limits, counts=level)
            for level in _levels(low, high)
        ),
        version=version("nanobeam-bluesky"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return averaged, card


@torch.no_grad()
def _follow(averaged: nn.Module, network: nn.Module, share: float) -> None:
    """Move the running mean of the weights towards a network's."""
    for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, share)


def _schedule(fraction: float) -> float:
    """Learning rate over a training: linear warm-up, then half a cosine."""
    if fraction < _WARM_UP:
        return (fraction + 1e-3) / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (fraction - _WARM_UP) / (1 - _WARM_UP)))


def _levels(low: float, high: float) -> list[float]:
    """Count levels of the card: half-decades from low to high."""
    n = 1 + max(0, round(2 * math.log10(high / low)))
    return [float(f"{level:.4g}") for level in np.geomspace(low, high, n)]
