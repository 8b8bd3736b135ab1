"""Training of the shipped network: ``python -m nanobeam_bluesky.training.universal FOLDER``.

Patterns of geometries drawn from the envelope, simulated with the exact model while the
network learns, with fresh noise at every step. The folder holds a checkpoint, from which the
same command goes on, and in the end ``weights.safetensors`` and ``card.json``.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from nanobeam_bluesky.models.reduced import (
    CONDITIONS,
    LIMITS,
    Reduced,
    random_geometry,
    reduce_geometry,
)
from nanobeam_bluesky.models.universal import UniversalNet
from nanobeam_bluesky.physics.continuous import render_continuous
from nanobeam_bluesky.physics.information import shift_information, standard_errors
from nanobeam_bluesky.training.noise import poisson
from nanobeam_bluesky.training.train import follow, part_of_rate

__all__ = ["train_universal"]

COUNTS = (70.0, 3e5)
"""Counts of a pattern."""
BACKGROUND = 0.2
"""Largest background, counts per binned pixel; four patterns in ten have none."""

_SIZE = 84  # largest pattern, pixels
_OF_EACH = 32
_BATCH = (16, 16)  # geometries, patterns of each
_MARGIN = 1.1  # beyond the ranges
_RATE = 2e-3
_WARM_UP = 0.02  # of the training
_MEMORY = 0.9995  # of the running mean of the weights
_OFF = 0.15  # part of the patterns whose thickness is up to 10 % off
_HOT = 0.1  # part of the patterns with hot pixels that nobody has masked
_MASKED = 0.3  # part of the geometries with bad pixels or a module gap, filled by neighbours
_DARKEST = 0.02  # patterns with less of the light are not learnt from
_FLOOR = (0.002, 0.002, 0.004)  # errors below are no gain, in units of the labels
_KNEE = 3.0  # of the loss, in σ: quadratic below, linear above
_IMPORTANCE = (1.0, 1.0, 3.0)  # strain is the hardest
_STUDENT = 0.79  # of the likeliest t distribution with 3 degrees for normal errors, per σ
_CHECKPOINT = 1000  # steps
_TRIED = 60  # batches of new geometries, in the end


class _Batch(NamedTuple):
    """g geometries, b patterns of each."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of `UniversalNet`
    labels: Tensor  # (g, b, 3)
    sigma: Tensor  # (g, b, 3), the bound; infinite where there is nothing to learn


class _Patterns:
    """Geometries that come and go, and batches with fresh noise from them."""

    def __init__(self, seed: int, geometries: int) -> None:
        self._rng = np.random.default_rng(seed)
        n, m = geometries, _OF_EACH
        self._patterns = np.zeros((n, m, _SIZE, _SIZE), np.float32)  # of unit sum
        self._labels = np.zeros((n, m, 3), np.float32)
        self._sigma = np.full((n, m, 3), np.inf, np.float32)  # at 1000 counts
        self._lit = np.zeros(n)  # pixels in the pupil
        self._shape = np.zeros((n, 2), np.int64)
        self._filled: list[NDArray[np.int64] | None] = [None] * n
        self._columns = np.zeros((n, _SIZE + 1), np.float32)
        self._rows = np.zeros((n, _SIZE + 1), np.float32)
        self._units = np.zeros((n, 3), np.float32)
        self._condition = np.zeros((n, CONDITIONS), np.float32)
        self._next = 0
        for _ in range(n):
            self.replace_one()

    def replace_one(self) -> None:
        """Draw a geometry, in the place of the oldest."""
        i = self._next
        self._next = (i + 1) % len(self._patterns)
        geometry = random_geometry(self._rng)
        reduced = reduce_geometry(geometry)
        labels, patterns, sigma = _simulate(self._rng, reduced, _OF_EACH)
        ny, nx = geometry.pattern_shape
        total = patterns.sum((1, 2))
        half_x, half_y = reduced.units[:2]
        self._lit[i] = math.pi * half_x * half_y
        dark = total < _DARKEST * self._lit[i]
        self._patterns[i] = 0
        self._patterns[i, :, :ny, :nx] = patterns / np.maximum(total, 1e-9)[:, None, None]
        self._labels[i] = labels
        self._sigma[i] = np.where(dark[:, None], np.inf, sigma)
        self._shape[i] = ny, nx
        self._filled[i] = _bad_pixels(self._rng, ny, nx) if self._rng.random() < _MASKED else None
        self._columns[i] = _prolonged(reduced.columns)
        self._rows[i] = _prolonged(reduced.rows)
        self._units[i] = reduced.units
        self._condition[i] = reduced.condition

    def batch(self) -> _Batch:
        """Patterns with noise, after a geometry was replaced."""
        self.replace_one()
        rng = self._rng
        g, b = _BATCH
        chosen = rng.choice(len(self._patterns), g, replace=False)
        which = chosen[:, None] * _OF_EACH + rng.integers(_OF_EACH, size=(g, b))
        n = which.size
        low, high = np.log(COUNTS)
        counts = np.exp(rng.uniform(low, high, n))
        background = np.where(rng.random(n) < 0.4, 0, rng.uniform(0, BACKGROUND, n))
        flat = self._patterns.reshape(-1, _SIZE, _SIZE)
        drawn = poisson(
            flat,
            which.ravel(),
            counts.astype(np.float32),
            background.astype(np.float32),
            int(rng.integers(2**62)),
        )
        self._spoil(drawn.reshape(g, b, -1), chosen)
        noisy = drawn.reshape(g, b, _SIZE, _SIZE)
        for patterns, (ny, nx) in zip(noisy, self._shape[chosen], strict=True):
            patterns[:, ny:] = 0
            patterns[:, :, nx:] = 0
        # the background adds noise to the whole pupil
        worse = (1 + 0.5 * background * np.repeat(self._lit[chosen], b) / counts) * 1000 / counts
        sigma = self._sigma.reshape(-1, 3)[which.ravel()] * np.sqrt(worse)[:, None]
        return _Batch(
            (
                torch.from_numpy(noisy),
                *(
                    torch.from_numpy(a[chosen])
                    for a in (self._columns, self._rows, self._units, self._condition)
                ),
            ),  # type: ignore[arg-type]
            torch.from_numpy(self._labels.reshape(-1, 3)[which]),
            torch.from_numpy(sigma.astype(np.float32).reshape(g, b, 3)),
        )

    def _spoil(self, noisy: NDArray[np.float32], chosen: NDArray[np.int64]) -> None:
        """Put hot pixels into some patterns (g, b, pixels), and fill bad ones."""
        rng = self._rng
        for k, i in enumerate(chosen):
            ny, nx = self._shape[i]
            for pattern in noisy[k]:
                if rng.random() < _HOT:
                    hot = rng.integers(1, 4)
                    where = rng.integers(ny, size=hot) * _SIZE + rng.integers(nx, size=hot)
                    pattern[where] += np.exp(rng.uniform(math.log(10), math.log(1000), hot))
            filled = self._filled[i]
            if filled is not None:
                noisy[k] = noisy[k][:, filled]


def _simulate(
    rng: np.random.Generator, reduced: Reduced, n: int
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float64]]:
    """Labels (n, 3), patterns (n, ny, nx), and the labels' bound at 1000 counts (n, 3)."""
    plan = reduced.plan
    labels = rng.uniform(-_MARGIN, _MARGIN, (n, 3)) * LIMITS
    x, y, dq = reduced.shifts(labels)
    film = plan.thickness * np.where(rng.random(n) < _OFF, rng.uniform(0.9, 1.1, n), 1)
    ny, nx = len(reduced.rows) - 1, len(reduced.columns) - 1
    patterns = np.empty((n, ny, nx), np.float32)
    render_continuous(plan, x, y, dq, np.zeros(n), patterns, film)
    np.maximum(patterns, 0, out=patterns)
    scale = 1000 / np.maximum(patterns.sum((1, 2)), 1e-3)
    # a trace of background: without, a sharp pupil has no regular likelihood
    used = np.ones((ny, nx), bool)
    known = shift_information(plan, x, y, dq, film, scale, np.full(n, 0.02), used)
    jacobian = np.zeros((6, 5))
    jacobian[0, 0], jacobian[1, 1] = reduced.units[:2]
    jacobian[2, 0] = reduced.units[0] * reduced.slope
    jacobian[2, 2] = reduced.units[2] * reduced.slope
    jacobian[4, 3] = jacobian[5, 4] = 1
    return labels, patterns, standard_errors(jacobian.T @ known @ jacobian)[:, :3]


def _bad_pixels(rng: np.random.Generator, ny: int, nx: int) -> NDArray[np.int64]:
    """Where every pixel's value is taken from: its own, or the nearest good one's."""
    bad = np.zeros((_SIZE, _SIZE), bool)
    bad[rng.integers(ny, size=8), rng.integers(nx, size=8)] = True
    if rng.random() < 0.5:
        first, width = rng.integers(min(ny, nx)), rng.integers(1, 4)
        gap = slice(first, first + width)
        if rng.random() < 0.5:
            bad[gap, :nx] = True
        else:
            bad[:ny, gap] = True
    bad[ny:] = bad[:, nx:] = True  # nothing comes from outside
    rows, columns = distance_transform_edt(bad, return_distances=False, return_indices=True)
    source: NDArray[np.int64] = (rows * _SIZE + columns).ravel()
    return source


def _prolonged(borders: NDArray[np.float32]) -> NDArray[np.float32]:
    """Borders of a pattern, continued to `_SIZE` pixels."""
    more = np.arange(1, _SIZE + 2 - len(borders))
    return np.concatenate([borders, borders[-1] + more]).astype(np.float32)


def _loss(out: Tensor, batch: _Batch) -> Tensor:
    """Errors in σ of the bound; and the likelihood of what the network says of its own."""
    known = torch.isfinite(batch.sigma)
    error = out[..., :3] - batch.labels
    floor = torch.tensor(_FLOOR)
    sigma = torch.where(known, torch.hypot(batch.sigma, floor), 1)
    square = (error / sigma).square()
    loss = _KNEE**2 * (torch.sqrt(1 + square / _KNEE**2) - 1) * torch.tensor(_IMPORTANCE)
    own = 3 * out[..., 3:].clamp(-6, 3)
    # Student's t, fitted to normal errors: a few lost patterns must not spoil the rest
    surprise = own + 2 * torch.log1p((error.detach() * torch.exp(-own) / _STUDENT).square() / 3)
    return (loss + 0.2 * surprise)[known].mean()


def train_universal(
    folder: Path, *, steps: int, seed: int = 0, geometries: int = 384
) -> Iterator[dict[str, Any]]:
    """Train, or go on from the folder's checkpoint; yields how it stands every 1000 steps.

    Parameters
    ----------
    folder
        Of the checkpoint, and of the weights in the end.
    steps, seed
        Length of the training; of weights, geometries and noise.
    geometries
        At a time; one of them is replaced at every step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    network = UniversalNet()
    averaged = copy.deepcopy(network).eval()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_RATE, weight_decay=1e-4, betas=(0.9, 0.98)
    )
    checkpoint = folder / "checkpoint.safetensors"
    step, seconds = 0, 0.0
    if checkpoint.is_file():
        step, seconds = _resume(checkpoint, network, averaged, optimizer)
    patterns = _Patterns(seed + step, geometries)  # new ones after a break
    started = time.perf_counter() - seconds
    losses: list[float] = []
    with ThreadPoolExecutor(1) as simulation:
        upcoming: deque[Future[_Batch]] = deque()
        upcoming.extend(simulation.submit(patterns.batch) for _ in range(2))
        while step < steps:
            for group in optimizer.param_groups:
                group["lr"] = _RATE * part_of_rate(step / steps, _WARM_UP)
            upcoming.append(simulation.submit(patterns.batch))
            batch = upcoming.popleft().result()
            first, second = network(*batch.inputs)
            loss = _loss(first, batch) + _loss(second, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            step += 1
            losses.append(float(loss.detach()))
            follow(averaged, network, 1 - min(_MEMORY, step / (step + 10)))
            if step % _CHECKPOINT == 0 or step == steps:
                seconds = time.perf_counter() - started
                _save(checkpoint, network, averaged, optimizer, step, seconds)
                yield {
                    "step": step,
                    "seconds": round(seconds),
                    "loss": round(float(np.mean(losses)), 4),
                }
                losses.clear()
    weights = {k: v.contiguous() for k, v in averaged.state_dict().items()}
    _replace(folder / "weights.safetensors", weights, {})
    card = {
        "steps": steps,
        "seed": seed,
        "batch": math.prod(_BATCH),
        "geometries": geometries + steps,
        "error_over_bound": _tried(averaged, _Patterns(seed + steps + 1, 2 * geometries)),
        "counts": COUNTS,
        "background": BACKGROUND,
        "limits": LIMITS,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "version": version("nanobeam-bluesky"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


@torch.no_grad()
def _tried(network: UniversalNet, patterns: _Patterns) -> dict[str, list[float]]:
    """Median error in σ of the bound of strain, x and y, for normal errors 1, from counts on."""
    found: dict[int, list[Tensor]] = {100: [], 1000: [], 10_000: [], 100_000: []}
    for _ in range(_TRIED):
        batch = patterns.batch()
        _, out = network(*batch.inputs)
        off = ((out[..., :3] - batch.labels) / batch.sigma).abs()[..., [2, 0, 1]]
        counts = batch.inputs[0].sum((-1, -2))
        for least, errors in found.items():
            chosen = (counts >= least) & (counts < 10 * least) & (batch.sigma < torch.inf).all(-1)
            errors.append(off[chosen])
    return {
        str(least): [round(v / 0.6745, 2) for v in torch.cat(errors).median(0).values.tolist()]
        for least, errors in found.items()
    }


def _save(
    path: Path,
    network: UniversalNet,
    averaged: UniversalNet,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"averaged.{k}": v for k, v in averaged.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{k}.{i}": torch.as_tensor(v) for k, v in state.items()}
    _replace(path, tensors, {"step": str(step), "seconds": f"{seconds:.1f}"})


def _replace(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)
    os.replace(part, path)


def _resume(
    path: Path,
    network: UniversalNet,
    averaged: UniversalNet,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    tensors = load_file(path)
    for name, module in (("network.", network), ("averaged.", averaged)):
        module.load_state_dict(
            {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
        )
    state = {
        i: {k: tensors[f"{k}.{i}"] for k in ("step", "exp_avg", "exp_avg_sq")}
        for i, _ in enumerate(network.parameters())
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return int(metadata["step"]), float(metadata["seconds"])


def main(
    folder: Path,
    steps: Annotated[int, typer.Option(help="256 patterns each.")] = 29_500,
    seed: Annotated[int, typer.Option(help="Of weights, geometries and noise.")] = 0,
) -> None:
    """Train the shipped network, or go on where an earlier training ended."""
    torch.set_num_threads(1)  # the other core simulates
    for state in train_universal(folder, steps=steps, seed=seed):
        typer.echo(json.dumps(state))


if __name__ == "__main__":
    typer.run(main)
