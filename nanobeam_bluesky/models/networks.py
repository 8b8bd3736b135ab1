"""The networks of one geometry: `ReducedNet`, `SeparableNet`, and `NanobeamNN` as published.

Every network is made from a pattern shape, takes counts (n, 1, ny, nx) and returns strain,
ω (deg) and χ (deg), (n, 3), or also the film's thickness (nm), (n, 4), if it is made with a
nominal one; `ReducedNet` (`models.universal`) instead returns a σ of each, (n, 6). How counts
and labels are scaled inside is its own affair.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from nanobeam_bluesky.models.convolutions import apply_network
from nanobeam_bluesky.models.universal import ReducedNet

__all__ = ["ARCHITECTURES", "NanobeamNN", "SeparableNet", "outputs", "pick_device"]

_COMPONENTS = 24


class NanobeamNN(nn.Module):
    """The published network: 27 771 parameters for patterns of 64×64.

    Source: Luo et al., Sci. Rep. (2025), doi 10.1038/s41598-025-97183-0. Names and order of
    the parameters are the published ones. Counts go in raw: it holds for the intensity that
    it was trained at. Without gradients, on a CPU, a compiled pass of its own takes the place
    of PyTorch's layers, on as many threads as PyTorch has.

    Parameters
    ----------
    pattern_shape
        (ny, nx), at least 36×36.
    thickness_nm
        Of the nominal film, nm, for a fourth output, the thickness; as published without.
    """

    label_scale: Tensor
    label_offset: Tensor

    def __init__(
        self, pattern_shape: tuple[int, int], *, thickness_nm: float | None = None
    ) -> None:
        super().__init__()
        if min(pattern_shape) < 36:
            raise ValueError(
                f"pattern_shape = {pattern_shape}: NanobeamNN needs 36×36 pixels or more; "
                "train SeparableNet"
            )
        layers: list[nn.Module] = []
        inputs = 1
        for first, second in ((2, 4), (8, 16), (32, 64)):
            layers += [nn.Conv2d(inputs, first, 3), nn.ReLU()]
            layers += [nn.Conv2d(first, second, 3), nn.ReLU(), nn.MaxPool2d(2)]
            inputs = second
        self.operation = nn.Sequential(*layers)
        ny, nx = pattern_shape
        for _ in range(3):
            ny, nx = (ny - 4) // 2, (nx - 4) // 2
        scale = [100.0, 10.0, 5.0]
        if thickness_nm is not None:
            scale.append(2.5 / thickness_nm)  # 20 % off is 0.5, as the others' largest labels
        self.fc1 = nn.Linear(inputs * ny * nx, len(scale))
        self.register_buffer("label_scale", torch.tensor(scale), persistent=False)
        self.register_buffer("label_offset", _nominal(thickness_nm), persistent=False)

    def forward(self, counts: Tensor) -> Tensor:
        """Strain, ω (deg), χ (deg), and thickness (nm) if any, of counts (n, 1, ny, nx)."""
        compiled = counts.device.type == "cpu" and counts.dtype == self.fc1.weight.dtype
        compiled &= counts.dtype == torch.float32 and not torch.is_grad_enabled()
        labels: Tensor = self._compiled(counts) if compiled else self._layers(counts)
        return labels / self.label_scale + self.label_offset

    def _layers(self, counts: Tensor) -> Tensor:
        labels: Tensor = self.fc1(self.operation(counts).flatten(1))
        return labels

    def _compiled(self, counts: Tensor) -> Tensor:
        *parameters, weight, bias = (p.contiguous().numpy() for p in self.parameters())
        labels = apply_network(
            counts[:, 0].contiguous().numpy(),
            tuple(parameters[::2]),
            tuple(parameters[1::2]),
            (weight, bias),
            torch.get_num_threads(),
        )
        return torch.from_numpy(labels)


class SeparableNet(nn.Module):
    """Products with two small fixed matrices, then three dense layers.

    A pattern is nearly separable (`physics.published`: B·P·Aᵀ), so the leading eigenvectors of the
    patterns' row and column covariance keep what tells strain and tilts apart in 24×24
    numbers. They are set from simulated patterns before training (`fit_features`); only the
    dense layers learn. No convolutions: all is matrix products, the fastest a CPU has.

    The input is √(counts / mean + 1). It does not depend on the intensity, and noise is
    nearly the same in every pixel. √counts would be stabler still, but its expectation
    depends on the counts: with it, ε came out with twice the error at 4300 counts.

    Parameters
    ----------
    pattern_shape
        (ny, nx).
    thickness_nm
        Of the nominal film, nm, for a fourth output, the thickness.
    """

    rows: Tensor
    columns: Tensor
    offset: Tensor
    gain: Tensor
    span: Tensor
    middle: Tensor

    def __init__(
        self, pattern_shape: tuple[int, int], *, thickness_nm: float | None = None
    ) -> None:
        super().__init__()
        ny, nx = pattern_shape
        a, b = min(_COMPONENTS, ny), min(_COMPONENTS, nx)
        self.register_buffer("rows", torch.zeros(a, ny))
        self.register_buffer("columns", torch.zeros(nx, b))
        self.register_buffer("offset", torch.zeros(a, b))
        self.register_buffer("gain", torch.ones(a, b))
        self.register_buffer("middle", _nominal(thickness_nm), persistent=False)
        self.register_buffer("span", torch.ones(len(self.middle)))
        self.dense = nn.Sequential(
            nn.Flatten(),
            nn.Linear(a * b, 256),
            nn.GELU(),
            nn.Linear(256, 128),
            nn.GELU(),
            nn.Linear(128, len(self.middle)),
        )

    @torch.no_grad()
    def fit_features(self, patterns: Tensor, span: Tensor) -> None:
        """Set the fixed matrices from expected patterns (n, ny, nx).

        Outputs are in units of span (3,) or (4,): strain, ω (deg), χ (deg), thickness (nm).
        """
        y = _stabilised(patterns)
        mean = y.mean(0)
        y = y - mean
        _, rows = torch.linalg.eigh(torch.einsum("nij,nkj->ik", y, y))
        _, columns = torch.linalg.eigh(torch.einsum("nij,nik->jk", y, y))
        self.rows.copy_(rows.flip(1)[:, : len(self.rows)].T)
        self.columns.copy_(columns.flip(1)[:, : self.columns.shape[1]])
        variance = (self.rows @ y @ self.columns).square().mean(0)
        self.offset.copy_(self.rows @ mean @ self.columns)
        # 0.02: small components would otherwise be little but amplified noise
        self.gain.copy_((variance + 0.02 * variance.max()).rsqrt())
        self.span.copy_(span)

    def forward(self, counts: Tensor) -> Tensor:
        """Strain, ω (deg), χ (deg), and thickness (nm) if any, of counts (n, 1, ny, nx)."""
        features = self.rows @ (_stabilised(counts[:, 0]) @ self.columns)
        labels: Tensor = self.dense((features - self.offset) * self.gain)
        return labels * self.span + self.middle


def _nominal(thickness_nm: float | None) -> Tensor:
    """Outputs of the nominal film."""
    return torch.tensor([0.0, 0.0, 0.0] if thickness_nm is None else [0.0, 0.0, 0.0, thickness_nm])


def _stabilised(counts: Tensor) -> Tensor:
    """√(counts / mean + 1) of (n, ny, nx); 1 where there are no counts."""
    mean = counts.mean((1, 2), keepdim=True).clamp_min(1e-12)
    return torch.sqrt(counts / mean + 1)


ARCHITECTURES: dict[str, type[NanobeamNN] | type[ReducedNet] | type[SeparableNet]] = {
    "ReducedNet": ReducedNet,
    "SeparableNet": SeparableNet,
    "NanobeamNN": NanobeamNN,
}
"""Name in a `Card` → network."""


def outputs(ranges: Container[str]) -> tuple[str, ...]:
    """Names of a network's outputs: thickness comes fourth if it has a range."""
    names = ("strain", "omega", "chi", "thickness")
    return names if "thickness" in ranges else names[:3]


def pick_device(device: str) -> str:
    """Return a torch device; "auto" takes an accelerator where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
