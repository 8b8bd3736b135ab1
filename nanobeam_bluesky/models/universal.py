"""The shipped network for every geometry of an envelope, and what it becomes for one.

It works in reduced coordinates (`models.reduced`) and looks twice: first around the Bragg
centre, then around where it has found the pupil, where only small corrections are left.
Layers are modulated by numbers that a small network makes of the geometry's (Perez et al.,
FiLM, AAAI 2018, arXiv 1709.07871); for one geometry they are constants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.reduced import (
    CONDITIONS,
    VIEW,
    Reduced,
    check_envelope,
    reduce_geometry,
)
from nanobeam_bluesky.models.view import PATCHES, View, view

__all__ = ["ReducedNet", "UniversalNet", "universal_network"]

CELLS = (44, 55)
"""Of the first look and the second, along each axis."""
CLOSE_VIEW = 1.2
"""How far the second look goes, in half-widths of the pupil around where it lies."""

_FARTHEST = 1.3  # where the second look may go, half-widths
_HIDDEN = 96  # of the network that makes the modulations

Modulation = tuple[Tensor, Tensor]
"""Gain − 1 and offset, (g, 1, width), of a layer's outputs."""
Looker = Callable[[View, Tensor], Tensor]
"""What is seen of patterns, and more of each → three values and log σ, (g, b, 6)."""


class _Look(nn.Module):
    """What is seen of b patterns of each of g geometries → three values and log σ each.

    `extra` numbers of every pattern, such as the logarithm of its counts, add to every layer.
    """

    def __init__(self, cells: int, features: int, widths: tuple[int, ...], extra: int) -> None:
        super().__init__()
        inputs = (features * PATCHES**2 + 4 * cells, *widths[:-1])
        self.widths = (features, *widths)
        self.patches = nn.Linear((2 * cells // (PATCHES + 1)) ** 2, features)
        self.dense = nn.ModuleList(map(nn.Linear, inputs, widths))
        self.extras = nn.ModuleList(nn.Linear(extra, w, bias=False) for w in self.widths)
        self.last = nn.Linear(widths[-1], 6)

    def forward(self, seen: View, extra: Tensor, modulations: list[Modulation]) -> Tensor:
        hidden = self.patches(seen.patches)  # (g, b, patches, features)
        gain, offset = modulations[0]
        offset = offset + self.extras[0](extra)
        hidden = torch.addcmul(offset[:, :, None], hidden, 1 + gain[:, :, None])
        hidden = functional.silu(hidden, inplace=True)
        hidden = torch.cat([hidden.flatten(2), seen.profiles], -1)
        for layer, more, (gain, offset) in zip(
            self.dense, self.extras[1:], modulations[1:], strict=True
        ):
            hidden = functional.silu(torch.addcmul(offset + more(extra), layer(hidden), 1 + gain))
        out: Tensor = self.last(hidden)
        return out

    def folded(self, modulations: list[Modulation]) -> Looker:
        """`forward` of one geometry, its modulations made part of the weights."""
        weights, offsets = [], []
        layers: tuple[Any, ...] = (self.patches, *self.dense)
        for layer, (gain, offset) in zip(layers, modulations, strict=True):
            weights.append((layer.weight * (1 + gain[0, 0, :, None])).T.contiguous())
            offsets.append(layer.bias * (1 + gain[0, 0]) + offset[0, 0])
        more = torch.cat([extra.get_parameter("weight") for extra in self.extras]).T.contiguous()
        return partial(self._run, weights, torch.cat(offsets), more)

    def _run(
        self, weights: list[Tensor], offsets: Tensor, more: Tensor, seen: View, extra: Tensor
    ) -> Tensor:
        first, *others = torch.addmm(offsets, extra[0], more).split(self.widths, -1)
        hidden = torch.matmul(seen.patches[0], weights[0]).add_(first[:, None])
        hidden = functional.silu(hidden, inplace=True)
        hidden = torch.cat([hidden.flatten(1), seen.profiles[0]], -1)
        for weight, offset in zip(weights[1:], others, strict=True):
            hidden = functional.silu(torch.addmm(offset, hidden, weight), inplace=True)
        out: Tensor = self.last(hidden)
        return out[None]


class _TwoLooks(nn.Module):
    """What `UniversalNet` and `ReducedNet` share; g geometries, b patterns of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _Look(CELLS[0], 12, (128, 96), 1)
        self.second = _Look(CELLS[1], 20, (304, 256, 128), 7)

    def _looks(
        self,
        patterns: Tensor,  # (g, b, ny, nx)
        columns: Tensor,  # (g, nx + 1)
        rows: Tensor,  # (g, ny + 1)
        units: Tensor,  # (g, 3)
        lit: Tensor,  # (g, n, n), what `_pupil` makes of the condition
        first_look: Looker,
        second_look: Looker,
    ) -> tuple[Tensor, Tensor]:
        """Shifts in `Reduced.units` and log σ of both looks, each (g, b, 6)."""
        half_x, half_y = units[:, 0], units[:, 1]
        nowhere = patterns.new_zeros(patterns.shape[:2])
        everywhere = patterns.new_ones(len(patterns), CELLS[0], CELLS[0])
        borders = columns, rows
        seen = view(patterns, *borders, nowhere, nowhere, half_x, half_y, VIEW, everywhere)
        area = (2 * VIEW) ** 2 * half_x * half_y
        counts = torch.log((seen.counts * area[:, None]).clamp_min(1))
        level = ((counts - 8) / 2.5)[..., None]
        first = first_look(seen, level)
        known = first.detach()
        place = known[..., :3].clamp(-_FARTHEST, _FARTHEST)
        x = _on_border(-place[..., 0] * half_x[:, None], columns)
        y = _on_border(-place[..., 1] * half_y[:, None], rows)
        place = torch.stack([-x / half_x[:, None], -y / half_y[:, None], place[..., 2]], -1)
        seen = view(patterns, *borders, x, y, half_x, half_y, CLOSE_VIEW, lit)
        extra = torch.cat([level, place, known[..., 3:]], -1)
        second = second_look(seen, extra)
        return first, torch.cat([place + 0.1 * second[..., :3], second[..., 3:]], -1)


class UniversalNet(_TwoLooks):
    """The network of all geometries, for training; `at` makes that of one."""

    def __init__(self) -> None:
        super().__init__()
        self.modulators = nn.ModuleList(
            nn.Sequential(
                nn.Linear(CONDITIONS, _HIDDEN),
                nn.GELU(),
                nn.Linear(_HIDDEN, _HIDDEN),
                nn.GELU(),
                nn.Linear(_HIDDEN, 2 * sum(look.widths)),
            )
            for look in (self.first, self.second)
        )
        for modulator in self.modulators:
            last = modulator[-1]  # type: ignore[index]
            nn.init.zeros_(last.bias)
            with torch.no_grad():
                last.weight.mul_(0.3)

    def modulations(self, condition: Tensor) -> tuple[list[Modulation], list[Modulation]]:
        """Of both looks, for conditions (g, CONDITIONS)."""
        looks = zip((self.first, self.second), self.modulators, strict=True)
        first, second = (_split(modulator(condition), look.widths) for look, modulator in looks)
        return first, second

    def forward(
        self, patterns: Tensor, columns: Tensor, rows: Tensor, units: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Labels and log σ of both looks, each (g, b, 6), of patterns (g, b, ny, nx)."""
        lookers = (
            partial(look, modulations=modulations)
            for look, modulations in zip(
                (self.first, self.second), self.modulations(condition), strict=True
            )
        )
        return self._looks(patterns, columns, rows, units, _pupil(condition), *lookers)

    @torch.no_grad()
    def at(self, reduced: Reduced) -> ReducedNet:
        """Return the network of one geometry, in evaluation mode."""
        shape = (len(reduced.rows) - 1, len(reduced.columns) - 1)
        network = ReducedNet(shape)
        network.first.load_state_dict(self.first.state_dict())
        network.second.load_state_dict(self.second.state_dict())
        condition = torch.from_numpy(reduced.condition)
        for mine, modulator in zip(network.modulated, self.modulators, strict=True):
            mine.copy_(modulator(condition))
        plan = reduced.plan
        network.condition.copy_(condition)
        network.columns.copy_(torch.from_numpy(reduced.columns))
        network.rows.copy_(torch.from_numpy(reduced.rows))
        network.units.copy_(torch.from_numpy(reduced.units))
        network.scales.copy_(
            torch.tensor(
                [reduced.slope, reduced.offset, plan.g, plan.omega_px, plan.chi_px, plan.dq_px],
                dtype=torch.float64,
            )
        )
        return network.eval()


class ReducedNet(_TwoLooks):
    """The universal network for one geometry: strain and tilts, and how sure it is of them.

    Parameters
    ----------
    pattern_shape
        (ny, nx).
    thickness_nm
        Must be absent: this network does not tell the thickness.
    """

    condition: Tensor
    columns: Tensor
    rows: Tensor
    units: Tensor
    scales: Tensor

    def __init__(
        self, pattern_shape: tuple[int, int], *, thickness_nm: float | None = None
    ) -> None:
        if thickness_nm is not None:
            raise ValueError("ReducedNet does not tell the thickness; train SeparableNet")
        super().__init__()
        ny, nx = pattern_shape
        self.modulated = nn.ParameterList(
            nn.Parameter(torch.zeros(2 * sum(look.widths))) for look in (self.first, self.second)
        )
        self.register_buffer("condition", torch.zeros(CONDITIONS))
        self.register_buffer("columns", torch.arange(nx + 1.0))
        self.register_buffer("rows", torch.arange(ny + 1.0))
        self.register_buffer("units", torch.ones(3))
        # slope and offset of `Reduced`; g, omega_px, chi_px and dq_px of its plan
        self.register_buffer("scales", torch.ones(6, dtype=torch.float64))
        # what tells the weights from others, and what is made of them: one, for several threads
        self._fold: tuple[Any, tuple[Tensor, Looker, Looker]] | None = None

    def forward(self, counts: Tensor) -> Tensor:
        """Of counts (n, 1, ny, nx): strain, ω, χ (deg) and their σ, (n, 6)."""
        return self._angles(self._labels(counts)[1])

    def both(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """What the first look finds, and the second, each as of `forward`."""
        known, labels = self._labels(counts)
        return self._angles(known), self._angles(labels)

    def _labels(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        lit, *lookers = self._lookers() if torch.is_grad_enabled() else self._folded()
        borders = self.columns[None], self.rows[None]
        known, labels = self._looks(counts[None, :, 0], *borders, self.units[None], lit, *lookers)
        return known[0], labels[0]

    def _lookers(self, *, folded: bool = False) -> tuple[Tensor, Looker, Looker]:
        first, second = (
            look.folded(modulations) if folded else partial(look, modulations=modulations)
            for look, modulations in (
                (look, _split(values[None], look.widths))
                for look, values in zip((self.first, self.second), self.modulated, strict=True)
            )
        )
        return _pupil(self.condition[None]), first, second

    def _folded(self) -> tuple[Tensor, Looker, Looker]:
        """`_lookers`, folded once for the weights as they are."""
        weights = (*self.parameters(), self.condition)
        key = [(w.data_ptr(), w._version) for w in weights]
        fold = self._fold
        if fold is None or fold[0] != key:
            fold = self._fold = key, self._lookers(folded=True)
        return fold[1]

    def _angles(self, labels: Tensor) -> Tensor:
        """From `Reduced.units` and log σ, (n, 6), to strain and tilts."""
        slope, offset, g, omega_px, chi_px, dq_px = self.scales.to(labels.dtype)
        x, y, e = (labels[:, :3] * self.units).unbind(1)
        # g − G/(1+ε) of the strained film
        moved = e * slope + x * (slope - dq_px) - offset
        strained = g - moved
        per_px = torch.stack([slope / g, 1 / (g * omega_px), 1 / (g * chi_px)])
        degrees = labels.new_tensor([1.0, 180 / torch.pi, 180 / torch.pi])
        per_px = per_px * degrees
        found = torch.stack(
            [moved / strained, x / (strained * omega_px), y / (strained * chi_px)], 1
        )
        found = found * degrees
        order = self.units[[2, 0, 1]] * per_px
        sigma = torch.exp(3 * labels[:, [5, 3, 4]].clamp(-6, 3)) * order
        return torch.cat([found, sigma], 1)


_in_use: WeakValueDictionary[Geometry, ReducedNet] = WeakValueDictionary()


def universal_network(
    geometry: Geometry, *, share: bool = False
) -> tuple[ReducedNet, Reduced, str]:
    """Return the shipped network for a geometry, its reduced coordinates and the weights' hash.

    To make one takes 70 ms: `share` takes one that others share already, and must not change.

    Raises
    ------
    OutsideEnvelopeError
        If it was not trained for such a geometry; says what is outside.
    ValueError
        If there is no continuous model of the geometry.
    """
    reduced = reduce_geometry(geometry)
    check_envelope(geometry, reduced)
    network, digest = _shipped()
    made = _in_use.get(geometry) if share else None
    if made is None:
        made = network.at(reduced)
        if share:
            _in_use[geometry] = made
    return made, reduced, digest


@lru_cache(maxsize=1)
def _shipped() -> tuple[UniversalNet, str]:
    path = files("nanobeam_bluesky.models").joinpath("weights", "universal", "weights.safetensors")
    content = path.read_bytes()
    network = UniversalNet()
    network.load_state_dict(load(content))
    return network.eval(), hashlib.sha256(content).hexdigest()


def _split(values: Tensor, widths: tuple[int, ...]) -> list[Modulation]:
    """(g, 2 Σ widths) → a modulation for every layer."""
    parts = values[:, None].split([w for width in widths for w in (width, width)], -1)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _on_border(middle: Tensor, borders: Tensor) -> Tensor:
    """The nearest border between pixels to a middle (g, b), at most 0.75 pixels away.

    So the cells cut the pixels in the same way in every pattern of a geometry.
    """
    nearest = (middle[..., None] - borders[:, None]).abs().argmin(-1)
    away: Tensor = borders.gather(1, nearest) - middle
    return middle + away.clamp(-0.75, 0.75)


def _pupil(condition: Tensor) -> Tensor:
    """1 on the cells of the second look that the pupil lets light into, (g, n, n)."""
    n = CELLS[1]
    t = (torch.arange(n, device=condition.device) + 0.5) * (2 * CLOSE_VIEW / n)
    y = (t - CLOSE_VIEW).abs()[None, None, :]
    x = y.mT
    stop_x, stop_y = ((condition[:, i, None, None] + 1) / 2 - 0.03 for i in (1, 2))
    r = torch.hypot(x, y)
    ring = (r < 1.03) & (r > stop_x)
    rectangle = (torch.maximum(x, y) < 1.03) & ~((x < stop_x) & (y < stop_y))
    return torch.where(condition[:, :1, None] > 0, ring, rectangle).to(condition.dtype)
