"""Phantom samples: maps of strain and tilt whose true values are known."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Phantom", "PhantomName", "phantom"]

PhantomName = Literal["figure3", "film", "unique"]

STEP_UM = 0.05
"""Distance of neighbouring points of the shipped phantoms, µm."""


@dataclass(frozen=True, eq=False)
class Phantom:
    """True values of a sample on a scan grid; the arrays are read-only.

    Raises
    ------
    ValueError
        If the arrays do not have one shape, or the coordinates do not match it.
    """

    name: str
    """What the sample is called in the start document, e.g. "figure3"."""
    strain: NDArray[np.float64]
    """Lattice strain ε, (rows, columns), e.g. 5e-4."""
    omega: NDArray[np.float64]
    """In-plane tilt ω, (rows, columns), deg, e.g. 0.01."""
    chi: NDArray[np.float64]
    """Out-of-plane tilt χ, (rows, columns), deg, e.g. 0.015."""
    intensity: NDArray[np.float64]
    """Diffracting fraction, (rows, columns), from 0 (no film) to 1."""
    y: NDArray[np.float64]
    """Position of each row along the slow axis, (rows,), µm, e.g. -1.6 to 1.6."""
    x: NDArray[np.float64]
    """Position of each column along the fast axis, (columns,), µm, e.g. -1.6 to 1.6."""

    def __post_init__(self) -> None:
        expected = {
            "omega": self.shape,
            "chi": self.shape,
            "intensity": self.shape,
            "y": self.shape[:1],
            "x": self.shape[1:],
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"phantom {self.name!r}: {name} has shape {getattr(self, name).shape}, "
                    f"must have {shape} to match strain {self.strain.shape}"
                )
        for field in fields(self):
            if field.name != "name":
                array = np.array(getattr(self, field.name), dtype=np.float64)
                array.setflags(write=False)
                object.__setattr__(self, field.name, array)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.strain.shape
        return rows, columns

    @property
    def size(self) -> int:
        """Number of points."""
        return self.strain.size

    def in_scan_order(self, *, snake: bool) -> dict[str, NDArray[np.float64]]:
        """Return the true values of every point in the order of flight.

        Parameters
        ----------
        snake
            Whether every second row is flown backwards.

        Returns
        -------
        dict
            strain, omega, chi, intensity, row, col, y and x, each (n,); point number p is
            entry p - 1.
        """
        row, col = scan_order(self.shape, snake=snake)
        maps = {name: getattr(self, name) for name in ("strain", "omega", "chi", "intensity")}
        return {
            **{name: values[row, col] for name, values in maps.items()},
            "row": row.astype(np.float64),
            "col": col.astype(np.float64),
            "y": self.y[row],
            "x": self.x[col],
        }


def scan_order(shape: tuple[int, int], *, snake: bool) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return row and column of every point in the order of flight, each (n,)."""
    row, col = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    if snake:
        col = np.where(row % 2 == 1, shape[1] - 1 - col, col)
    return row, col


def phantom(name: PhantomName, shape: tuple[int, int] = (64, 64), *, seed: int = 0) -> Phantom:
    """Make one of the shipped samples.

    Parameters
    ----------
    name
        ``figure3``, the strain and tilts of Figure 3 of Luo et al. (2025);
        ``film``, domains of different strain and tilt, a crack and a region without film;
        ``unique``, every point different from every other in all three values, for tests
        that must notice a swapped point, row or column or a mirrored row.
    shape
        (rows, columns).
    seed
        Chooses the domains of ``film`` and the strains of ``unique``.

    Raises
    ------
    ValueError
        If the name is unknown or the shape is empty.
    """
    makers = {"figure3": _figure3, "film": _film, "unique": _unique}
    if name not in makers:
        raise ValueError(f"no phantom {name!r}; choose one of {', '.join(makers)}")
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise ValueError(f"phantom shape = {shape}: needs at least one row and one column")
    strain, omega, chi, intensity = makers[name]((rows, columns), np.random.default_rng(seed))
    return Phantom(
        name=name,
        strain=strain,
        omega=omega,
        chi=chi,
        intensity=intensity,
        y=_centred(rows),
        x=_centred(columns),
    )


_Map = NDArray[np.float64]


def _centred(points: int) -> NDArray[np.float64]:
    return np.asarray(STEP_UM * (np.arange(points) - (points - 1) / 2), np.float64)


def _mesh(
    shape: tuple[int, int],
    x: tuple[float, float] = (-1, 1),
    y: tuple[float, float] = (-1, 1),
) -> tuple[_Map, _Map]:
    xs, ys = np.meshgrid(np.linspace(*x, shape[1]), np.linspace(*y, shape[0]))
    return xs, ys


def _figure3(shape: tuple[int, int], rng: np.random.Generator) -> tuple[_Map, _Map, _Map, _Map]:
    """Luo et al. (2025), Figure 3: a strain wave and three tilt steps."""
    x, y = _mesh(shape)
    strain = 5e-4 * np.sin(2 * np.pi * (x + y) / 0.4)

    def step(xy: tuple[_Map, _Map], theta: float) -> _Map:
        across = xy[0] * np.cos(theta) - xy[1] * np.sin(theta)
        return np.asarray(1 / (1 + np.exp(-across / 0.07)))

    steps = (
        step(_mesh(shape, x=(-3, -1)), np.pi / 3)
        - step(_mesh(shape, x=(-1.5, 0.5)), np.pi / 3)
        - step(_mesh(shape, x=(1, 3), y=(1, -1)), 2 * np.pi / 3)
    )
    return strain, 0.01 * steps + 0.005, 0.015 * steps + 0.0075, np.ones(shape)


def _film(shape: tuple[int, int], rng: np.random.Generator) -> tuple[_Map, _Map, _Map, _Map]:
    """Twelve domains, strain that relaxes towards a crack, a corner without film."""
    x, y = _mesh(shape)
    centres = rng.uniform(-1, 1, (12, 2))
    domain = np.argmin(
        (x[..., None] - centres[:, 0]) ** 2 + (y[..., None] - centres[:, 1]) ** 2, axis=-1
    )
    crack = x - 0.35 - 0.25 * y - 0.08 * np.sin(5 * y)
    relaxed = np.exp(-np.abs(crack) / 0.15)
    strain = rng.uniform(-2e-3, 2e-3, 12)[domain] * (1 - relaxed) + 5e-4 * y
    omega = rng.uniform(-0.02, 0.02, 12)[domain] + 0.005 * np.tanh(crack / 0.1)
    chi = rng.uniform(-0.03, 0.03, 12)[domain] + 0.01 * x * y
    intensity = 1 - 0.98 * np.exp(-((crack / 0.04) ** 2))
    empty = x + y < -1.3
    intensity[empty] = 0
    for values in (strain, omega, chi):
        values[empty] = 0
    return strain, omega, chi, intensity


def _unique(shape: tuple[int, int], rng: np.random.Generator) -> tuple[_Map, _Map, _Map, _Map]:
    """ω rises from row to row and χ from column to column; ε differs from its neighbours'.

    ω also rises within a row, and χ within a column, by less than a step: no two points
    have a value in common. The strains are an additive quasi-random sequence (two
    irrational steps): a mirrored row, whose χ a mirrored pattern could make up for, shows.
    """
    rows, columns = shape
    row, col = np.indices(shape)
    omega = 0.08 * ((row + (col + 0.5) / columns) / rows - 0.5)
    chi = 0.16 * ((col + (row + 0.5) / rows) / columns - 0.5)
    strain = 6e-3 * ((rng.random() + row * 0.7548776662 + col * 0.5698402910) % 1 - 0.5)
    return strain, omega, chi, np.ones(shape)
