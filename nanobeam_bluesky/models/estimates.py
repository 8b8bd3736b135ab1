"""`Estimates`: what every estimator gives, and `Flag`: why not to trust a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntFlag
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEFAULT_FIT", "MIN_COUNTS", "Estimates", "Flag", "check_fit"]

DEFAULT_FIT = ("strain", "omega", "chi", "scale", "background")
"""What `refine` takes as unknown."""
_ALWAYS = DEFAULT_FIT[:4]
_OPTIONAL = ("background", "thickness", "blur")
MIN_COUNTS = 100
"""Fewer are no pattern: at these the Cramér-Rao bound of ε is 7e-4, a seventh of the
published half-range."""


def check_fit(fit: Sequence[str]) -> None:
    """Raise ValueError unless `refine` can take these as unknown."""
    missing = [name for name in _ALWAYS if name not in fit]
    if missing or set(fit) - {*_ALWAYS, *_OPTIONAL}:
        raise ValueError(
            f"fit = {tuple(fit)}: must hold {_ALWAYS} and may hold {_OPTIONAL}"
            + (f"; {missing} missing" if missing else "")
        )


class Flag(IntFlag):
    """Reasons to distrust a point; several may hold at once."""

    FEW_COUNTS = 1
    """Too few photons for an estimate."""
    SATURATED = 2
    """A pixel reached the detector's saturation value."""
    OUT_OF_RANGE = 4
    """An estimate lies outside the range in which the estimator is valid."""
    MISFIT = 8
    """The pattern is none that the model can make."""
    NOT_CONVERGED = 16
    """The estimator found no solution."""
    FRAME_MISSING = 32
    """The frame could not be read."""
    POSITION_MISSING = 64
    """The position is unknown."""


@dataclass(frozen=True, eq=False)
class Estimates:
    """Results for n points, each an array (n,); NaN where an estimator gives none."""

    strain: NDArray[np.float64]
    """Out-of-plane lattice strain ε."""
    strain_sigma: NDArray[np.float64]
    """Its standard deviation."""
    omega: NDArray[np.float64]
    """Tilt ω in the scattering plane, deg."""
    omega_sigma: NDArray[np.float64]
    """Its standard deviation, deg."""
    chi: NDArray[np.float64]
    """Tilt χ across the scattering plane, deg."""
    chi_sigma: NDArray[np.float64]
    """Its standard deviation, deg."""
    thickness: NDArray[np.float64]
    """Film thickness, nm."""
    thickness_sigma: NDArray[np.float64]
    """Its standard deviation, nm."""
    counts: NDArray[np.float64]
    """Sum of the pattern."""
    background: NDArray[np.float64]
    """Uniform background, counts per binned pixel."""
    deviance: NDArray[np.float64]
    """(D - E[D]) / sd(D): 0 ± 1 where the model fits."""
    flags: NDArray[np.int64]
    """Sum of `Flag` values; 0 for a good point."""

    UNITS: ClassVar[dict[str, str]] = {
        "strain": "",
        "strain_sigma": "",
        "omega": "deg",
        "omega_sigma": "deg",
        "chi": "deg",
        "chi_sigma": "deg",
        "thickness": "nm",
        "thickness_sigma": "nm",
        "counts": "counts",
        "background": "counts",
        "deviance": "",
        "flags": "",
    }
    """Unit of every field, in order."""

    DIAGNOSTICS: ClassVar[tuple[str, ...]] = ("counts", "background", "deviance", "flags")
    """Fields that maps show for flagged points too: they say why a point is flagged."""

    def __len__(self) -> int:
        return len(self.flags)

    @classmethod
    def empty(cls, n: int, flags: int = 0) -> Estimates:
        """n points without a value, all with the same flags."""
        columns: dict[str, Any] = {name: np.full(n, np.nan) for name in cls.UNITS}
        return cls(**columns | {"flags": np.full(n, int(flags), dtype=np.int64)})

    @classmethod
    def concatenate(cls, parts: Sequence[Estimates]) -> Estimates:
        """Put parts one after the other."""
        names = [field.name for field in fields(cls)]
        return cls(**{k: np.concatenate([getattr(part, k) for part in parts]) for k in names})

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return name → array of every field."""
        return {name: getattr(self, name) for name in self.UNITS}

    def select(self, which: NDArray[Any]) -> Estimates:
        """Return the points that an index or a mask chooses."""
        return replace(self, **{name: values[which] for name, values in self.columns().items()})

    def put(self, where: NDArray[np.bool_], other: Estimates) -> Estimates:
        """Return a copy in which the points of a mask (n,) are those of `other`."""
        columns = {name: values.copy() for name, values in self.columns().items()}
        for name, values in columns.items():
            values[where] = getattr(other, name)
        return replace(self, **columns)
