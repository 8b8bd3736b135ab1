"""`train`: from a geometry to its network, in about a minute on two cores."""

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
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.networks import (
    ARCHITECTURES,
    SeparableNet,
    outputs,
    pick_device,
)
from nanobeam_bluesky.models.reduced import OutsideEnvelopeError
from nanobeam_bluesky.models.store import Card
from nanobeam_bluesky.models.universal import ReducedNet, universal_network
from nanobeam_bluesky.physics import Sampling
from nanobeam_bluesky.training.evaluate import MARGIN, checked_ranges, evaluate, simulate
from nanobeam_bluesky.training.noise import poisson

__all__ = ["Progress", "train"]

COUNTS = (300.0, 1e5)
"""Mean counts of a pattern, from a weak film at a fast dwell to a bright one."""

_VALIDATIONS = 20


class _Schedule(NamedTuple):
    steps: int
    batch: int
    rate: float  # at its largest
    beta: float  # of the optimizer's mean square of the gradients
    memory: float  # of the running mean of the weights
    patience: int  # validations without progress before training stops


_SCHEDULES = {  # about a minute on two cores
    # it begins trained, and is worse for a while
    "ReducedNet": _Schedule(1100, 64, 2e-3, 0.98, 0.995, patience=_VALIDATIONS),
    "SeparableNet": _Schedule(6000, 128, 8e-3, 0.999, 0.99, patience=6),
    "NanobeamNN": _Schedule(6000, 128, 2e-3, 0.999, 0.99, patience=6),
}
_WARM_UP = 0.1  # of the training
# of the errors relative to the ranges: tilts are found more sharply, thickness less
_WEIGHTS = {"strain": 1.0, "omega": 4.0, "chi": 4.0, "thickness": 0.5}
_BACKGROUND = 0.1  # largest in specialising, of the pattern's mean
_CLEAN = 0.4  # part of the patterns without background
_CEILING = 4e4  # counts from which more of them hardly help the network

_POOL = 8192  # simulated patterns, of 64×64 pixels or less
_FRESH = 16  # of them simulated anew at every step: 0.6 ms
_HELD_OUT = 1024

Batch = tuple[Tensor, Tensor, Tensor]
"""Counts (n, 1, ny, nx), `outputs` (n, 3 or 4), weights (n, 1)."""


@dataclass(frozen=True)
class Progress:
    """Where a training stands."""

    fraction: float
    """0 to 1."""
    seconds: float
    """Since the beginning, simulation included."""
    loss: float
    """Of the held-out patterns: mean squared error relative to the ranges; of `ReducedNet`, which
    gives its own σ, the negative logarithm of the likelihood."""


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Have every thread of ours compute on its own.

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
    architecture: str = "ReducedNet",
    ranges: dict[str, float] | None = None,
    counts: float | tuple[float, float] = COUNTS,
    peak: float | None = None,
    background: float | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[Progress], object] | None = None,
) -> tuple[nn.Module, Card]:
    """Train a network for one geometry on simulated patterns between grid points.

    By default it begins with the shipped network for every geometry and specialises it. Where
    that is of no use, `SeparableNet` is trained from scratch, and the card says why: outside the
    shipped network's envelope, for the published sampling, with a range of the thickness.

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
        if absent; with one of thickness (nm), around the geometry's, the network has the
        thickness as its fourth output.
    counts
        Mean counts of a pattern, or their range (drawn uniformly in the logarithm).
    peak
        Counts at the peak of the full library, e.g. 7 as published; instead of `counts`.
    background
        Largest uniform background, as a part of the pattern's mean, e.g. 0.05; four patterns
        in ten have none. If absent, 0.1 of `ReducedNet`, which would forget what the shipped
        network knows of it (at 0.05 counts a pixel errors were 2.6 σ), and 0 of the others.
    steps, seconds
        Length of the training (if neither is given, as many steps as two cores make in about a
        minute; what is reached first if both are). The learning rate follows a warm-up and a
        cosine over it. It ends early when the held-out patterns gain nothing any more. Only
        with `steps` alone does the same seed give the same network.
    seed
        Of parameters, noise and initial weights.
    device
        Torch device; "auto" takes an accelerator where there is one.
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
        If the architecture is unknown or takes no patterns as small as these, if a range is
        impossible or of thickness for the published sampling, or if the beam misses the ROI.
    """
    started = time.perf_counter()
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture = {architecture!r}: known are {', '.join(ARCHITECTURES)}")
    limits = checked_ranges(geometry, ranges)
    torch.manual_seed(seed)
    network, origin = _beginning(geometry, architecture, sampling, limits)
    architecture = type(network).__name__
    schedule = _SCHEDULES[architecture]
    if steps is None and seconds is None:
        steps = schedule.steps
    if background is None:
        background = _BACKGROUND if architecture == "ReducedNet" else 0.0
    patterns = _Patterns(geometry, sampling, limits, counts, peak, background, schedule.batch, seed)
    if isinstance(network, SeparableNet):
        span = torch.tensor([limits[name] for name in outputs(limits)])
        network.fit_features(torch.from_numpy(patterns.pool), span)

    def done(step: int) -> tuple[float, float]:
        elapsed = time.perf_counter() - started
        return max(step / (steps or math.inf), elapsed / (seconds or math.inf)), elapsed

    fitted, loss, step = _fit(network.to(pick_device(device)), schedule, patterns, done, progress)
    if isinstance(fitted, ReducedNet):
        _recalibrate(fitted, patterns)
    low, high = patterns.counts
    return fitted, Card(
        fingerprint=geometry.fingerprint(),
        geometry=geometry,
        architecture=architecture,
        ranges=limits,
        training=origin
        | {
            "sampling": sampling,
            "counts": [round(low, 1), round(high, 1)],
            "background": background,
            "steps": step,
            "batch": schedule.batch,
            "seed": seed,
            "loss": loss,
            "seconds": round(time.perf_counter() - started, 1),
        },
        accuracy=tuple(
            evaluate(fitted, geometry, sampling=sampling, ranges=limits, counts=level)
            for level in _levels(low, high)
        ),
        version=version("nanobeam-bluesky"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _beginning(
    geometry: Geometry, architecture: str, sampling: Sampling, ranges: dict[str, float]
) -> tuple[nn.Module, dict[str, str]]:
    """Return the network to train, and for its card where it comes from."""
    origin = {"start": "scratch"}
    if architecture == "ReducedNet":
        if sampling == "published":
            reason = "the shipped network is of the continuous sampling"
        elif "thickness" in ranges:
            reason = "the shipped network does not tell the thickness"
        else:
            try:
                network, _, digest = universal_network(geometry)
            except OutsideEnvelopeError as error:
                reason = f"the shipped network does not know this geometry: {error}"
            else:
                return network.train(), {"start": "universal", "start_sha256": digest}
        architecture, origin["reason"] = "SeparableNet", reason
    thickness = geometry.thickness_nm if "thickness" in ranges else None
    return ARCHITECTURES[architecture](geometry.pattern_shape, thickness_nm=thickness), origin


class _Patterns:
    """A pool of simulated patterns that changes slowly, and batches with fresh noise from it."""

    def __init__(
        self,
        geometry: Geometry,
        sampling: Sampling,
        ranges: dict[str, float],
        counts: float | tuple[float, float],
        peak: float | None,
        background: float,
        batch: int,
        seed: int,
    ) -> None:
        self._geometry, self._sampling, self._background = geometry, sampling, background
        self._batch = batch
        self._beyond = {name: MARGIN * limit for name, limit in ranges.items()}
        self._rng = np.random.default_rng([seed, 0])
        ny, nx = geometry.pattern_shape
        size = max(batch, min(_POOL, _POOL * 64 * 64 // (ny * nx)))  # 0.1 GB
        self._truth, self.pool = self._simulate(size)
        self._unit = float(self.pool.sum(axis=(1, 2)).mean())
        if self._unit == 0:
            raise ValueError(
                f"no light falls on the ROI for any strain and tilt within {ranges}: check "
                "bragg_center_px and the ROI, or train with other ranges"
            )
        if peak is not None:
            counts = peak * self._unit
        self.counts = counts if isinstance(counts, tuple) else (counts, counts)
        # of the error relative to the ranges
        self.per_range = np.array([_WEIGHTS[name] / ranges[name] for name in outputs(ranges)])
        self._next = 0

    def held_out(self) -> list[Batch]:
        """Batches of patterns that are never trained on."""
        batches = []
        for _ in range(_HELD_OUT // self._batch):
            truth, patterns = self._simulate(self._batch)
            batches.append(self._with_noise(truth, patterns, np.arange(self._batch)))
        return batches

    def batch(self) -> Batch:
        """Patterns of the pool with fresh noise, after a few of the pool were replaced."""
        replaced = slice(self._next, self._next + _FRESH)
        self._truth[replaced], self.pool[replaced] = self._simulate(_FRESH)
        self._next = (self._next + _FRESH) % (len(self.pool) // _FRESH * _FRESH)
        which = self._rng.integers(len(self.pool), size=self._batch)
        return self._with_noise(self._truth, self.pool, which)

    def _simulate(self, n: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        return simulate(self._rng, n, self._geometry, self._beyond, self._sampling)

    def _with_noise(
        self, truth: NDArray[np.float64], patterns: NDArray[np.float32], which: NDArray[np.int64]
    ) -> Batch:
        low, high = self.counts
        level = np.exp(self._rng.uniform(math.log(low), math.log(high), len(which)))
        scale = level / self._unit
        share = self._rng.uniform(0, self._background, len(which))
        share[self._rng.random(len(which)) < _CLEAN] = 0
        floor = share * level / patterns[0].size
        noisy = poisson(
            patterns,
            which,
            scale.astype(np.float32),
            floor.astype(np.float32),
            int(self._rng.integers(2**62)),
        )
        # errors fall as 1/√counts: every level has the same say
        weight = 1 / (low / level + low / _CEILING)
        columns = noisy[:, None], truth[which], weight[:, None]
        counts, labels, weights = (torch.from_numpy(c.astype(np.float32)) for c in columns)
        return counts, labels, weights


def _fit(
    network: nn.Module,
    schedule: _Schedule,
    patterns: _Patterns,
    done: Callable[[int], tuple[float, float]],
    progress: Callable[[Progress], object] | None,
) -> tuple[nn.Module, float, int]:
    """Return the averaged network, its loss on held-out patterns and the number of steps."""
    device = next(network.parameters()).device
    per_range = torch.from_numpy(patterns.per_range.astype(np.float32)).to(device)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        counts, labels, weights = (column.to(device) for column in batch)
        if isinstance(network, ReducedNet):
            looks = torch.stack(network.both(counts))
            sigma = looks[..., 3:] * per_range
            pull = (looks[..., :3] - labels) * per_range / sigma
            return (torch.log(sigma) + pull.square() / 2).mean()
        error: Tensor = (network(counts) - labels) * per_range
        return (error.square() * weights).mean()

    parameters = list(network.parameters())

    def gradient(batch: Batch) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(network, batch), parameters)

    averaged = copy.deepcopy(network).eval()
    optimizer = torch.optim.AdamW(
        parameters,
        lr=schedule.rate,
        betas=(0.9, schedule.beta),
        weight_decay=1e-4,
        fused=True,
    )
    held_out = patterns.held_out()

    def validate() -> float:
        with torch.inference_mode():
            return float(np.mean([float(loss(averaged, batch)) for batch in held_out]))

    best, best_state = validate(), copy.deepcopy(averaged.state_dict())
    stale, step, validations = 0, 0, 0
    fraction = 0.0
    with ThreadPoolExecutor(1) as simulation, ThreadPoolExecutor(2) as learning:
        upcoming: deque[Future[Batch]] = deque()
        upcoming.extend(simulation.submit(patterns.batch) for _ in range(2))
        while fraction < 1 and stale < schedule.patience:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate * part_of_rate(fraction, _WARM_UP)
            upcoming.append(simulation.submit(patterns.batch))
            # half of the batch on each core
            halves = zip(*(column.chunk(2) for column in upcoming.popleft().result()), strict=True)
            gradients = learning.map(gradient, halves)
            for parameter, *parts in zip(parameters, *gradients, strict=True):
                parameter.grad = torch.stack(parts).mean(0)
            optimizer.step()
            step += 1
            follow(averaged, network, 1 - min(schedule.memory, step / (step + 10)))
            fraction, elapsed = done(step)
            if fraction * _VALIDATIONS < validations + 1:
                continue
            validations = int(fraction * _VALIDATIONS)
            found = validate()
            stale = 0 if found < best else stale + 1
            if found < best:
                best, best_state = found, copy.deepcopy(averaged.state_dict())
            if progress is not None:
                progress(Progress(min(fraction, 1.0), elapsed, found))
    averaged.load_state_dict(best_state)
    return averaged.cpu(), best, step


def _recalibrate(network: ReducedNet, patterns: _Patterns) -> None:
    """Fit the part of the last layer that gives σ once more, to the averaged network's errors.

    It was learnt from weights that still moved: these err more, by a quarter at 30 000 counts.
    """
    last = network.second.last
    given: list[Tensor] = []
    pulls = []
    hook = last.register_forward_hook(lambda _, inputs, __: given.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for _ in range(_HELD_OUT // 16):
            counts, labels, _ = patterns.batch()
            found = network(counts)
            pulls.append((found[:, :3] - labels) / found[:, 3:])
    hook.remove()
    features, square = torch.cat(given), torch.cat(pulls).square()
    change = nn.Linear(features.shape[1], 3)  # of log σ of strain, ω, χ
    nn.init.zeros_(change.weight)
    nn.init.zeros_(change.bias)
    optimizer = torch.optim.LBFGS(change.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def surprise() -> Tensor:
        optimizer.zero_grad()
        more = change(features)
        loss: Tensor = (more + square * torch.exp(-2 * more) / 2).mean()
        loss.backward()
        return loss

    optimizer.step(surprise)
    with torch.no_grad():  # the layer gives a third of log σ, of the shifts: along x, along y, se
        last.weight[[5, 3, 4]] += change.weight / 3
        last.bias[[5, 3, 4]] += change.bias / 3


@torch.no_grad()
def follow(averaged: nn.Module, network: nn.Module, share: float) -> None:
    """Move the running mean of the weights towards a network's."""
    for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, share)


def part_of_rate(fraction: float, warm_up: float) -> float:
    """Learning rate over a training: linear warm-up, then half a cosine."""
    if fraction < warm_up:
        return (fraction + 1e-3) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (fraction - warm_up) / (1 - warm_up)))


def _levels(low: float, high: float) -> list[float]:
    """Count levels of the card: half-decades from low to high."""
    n = 1 + max(0, round(2 * math.log10(high / low)))
    return [float(f"{level:.4g}") for level in np.geomspace(low, high, n)]
