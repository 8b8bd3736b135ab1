"""Fisher information and Cramér–Rao bounds of the continuous model with Poisson noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.physics._numba import in_threads, kernel
from nanobeam_bluesky.physics.continuous import (
    ContinuousPlan,
    Floats,
    TiltReciprocal,
    continuous_plan,
    pattern_channels,
    shift_derivatives,
    shifts,
)
from nanobeam_bluesky.physics.forward import columns
from nanobeam_bluesky.physics.likelihood import poisson_sums

PARAMETERS = ("strain", "omega", "chi", "thickness", "scale", "background")
"""What can be fitted; 1, deg, deg, nm, counts at the library's peak, counts per pixel."""

_DARK = 1e-7  # pixels that expect less, in units of the scale, tell nothing


def fisher_information(
    strain: ArrayLike,
    omega: ArrayLike,
    chi: ArrayLike,
    geometry: Geometry,
    *,
    scale: ArrayLike,
    background: ArrayLike = 0.0,
    thickness: ArrayLike | None = None,
    fit: Sequence[str] = ("strain", "omega", "chi", "scale", "background"),
    mask: NDArray[np.bool_] | None = None,
    tilt_reciprocal: TiltReciprocal = "strained",
) -> NDArray[np.float64]:
    """Fisher information of patterns scale · forward(…) + background with Poisson noise.

    The derivatives are exact. A perfectly sharp pupil without background has no regular
    likelihood: a rim that just touches a dark pixel tells arbitrarily much.

    Parameters
    ----------
    strain, omega, chi
        As for `forward`, scalars or (n,).
    geometry
        The geometry.
    scale
        Counts per pixel at the peak of the full library, scalar or (n,).
    background
        Counts per pixel, scalar or (n,).
    thickness
        As for `forward`, nm, scalar or (n,).
    fit
        Names of the parameters, of `PARAMETERS`: rows and columns of the result. The
        others count as known. The derivative by thickness is taken at fixed scale.
    mask
        True for pixels to leave out, (ny, nx).
    tilt_reciprocal
        As for `forward`.

    Returns
    -------
    ndarray
        (n, p, p) for the p names in `fit`.

    Raises
    ------
    ValueError
        If a name in `fit` is unknown, or shapes do not fit.
    """
    unknown = [name for name in fit if name not in PARAMETERS]
    if unknown:
        raise ValueError(f"fit: unknown {unknown}; choose from {PARAMETERS}")
    if mask is None:
        mask = np.zeros(geometry.pattern_shape, bool)
    if mask.shape != geometry.pattern_shape:
        raise ValueError(f"mask {mask.shape} must have the pattern's {geometry.pattern_shape}")
    film = geometry.thickness_nm if thickness is None else thickness
    strain, omega, chi, film, scale, background = columns(
        strain=strain, omega=omega, chi=chi, thickness=film, scale=scale, background=background
    )
    plan = continuous_plan(geometry)
    dx, dy, dq = shifts(plan, strain, omega, chi, tilt_reciprocal=tilt_reciprocal)
    raw = shift_information(plan, dx, dy, dq, 10 * film, scale, background, ~mask)
    jacobian = np.zeros((strain.size, 6, 6))
    jacobian[:, :4, :4] = shift_derivatives(
        plan, strain, omega, chi, tilt_reciprocal=tilt_reciprocal
    )
    jacobian[:, 4, 4] = jacobian[:, 5, 5] = 1
    jacobian = jacobian[:, :, [PARAMETERS.index(name) for name in fit]]
    information: NDArray[np.float64] = np.swapaxes(jacobian, 1, 2) @ raw @ jacobian
    return information


def shift_information(
    plan: ContinuousPlan,
    shift_x: Floats,
    shift_y: Floats,
    dq: Floats,
    thickness: Floats,
    scale: Floats,
    background: Floats,
    used: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Fisher information (n, 6, 6) of shifts (pixels), dq (Å⁻¹), thickness (Å), scale, background.

    Pixels that are not `used` (ny, nx) are left out.
    """
    out = np.empty((len(shift_x), 6, 6))
    columns = np.ascontiguousarray(used.T, dtype=np.float64)
    in_threads(
        lambda part: _accumulate(
            plan,
            shift_x[part],
            shift_y[part],
            dq[part],
            thickness[part],
            scale[part],
            background[part],
            columns,
            out[part],
        ),
        len(shift_x),
    )
    return out


def cramer_rao(
    strain: ArrayLike, omega: ArrayLike, chi: ArrayLike, geometry: Geometry, **options: Any
) -> dict[str, NDArray[np.float64]]:
    """Smallest standard deviations that unbiased estimates can have.

    Parameters
    ----------
    strain, omega, chi, geometry, **options
        As for `fisher_information`.

    Returns
    -------
    dict
        For every name in `fit`, (n,) in the parameter's unit; infinite where the
        pattern does not determine the parameters.
    """
    information = fisher_information(strain, omega, chi, geometry, **options)
    names = options.get("fit", ("strain", "omega", "chi", "scale", "background"))
    return dict(zip(names, standard_errors(information).T, strict=True))


def standard_errors(information: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root of the diagonal of the inverse of (n, p, p), infinite where there is none: (n, p)."""
    size = np.sqrt(np.diagonal(information, axis1=1, axis2=2))
    safe = np.where(size > 0, size, 1)
    correlation = information / (safe[:, :, None] * safe[:, None, :])
    values, vectors = np.linalg.eigh(correlation)
    bad = (values[:, 0] < 1e-12) | (size == 0).any(axis=1)
    variance = (vectors**2 / np.where(bad[:, None], 1, values)[:, None, :]).sum(axis=2)
    return np.where(bad[:, None], np.inf, np.sqrt(variance) / safe)


@kernel
def _accumulate(
    plan: ContinuousPlan,
    shift_x: NDArray[np.floating[Any]],
    shift_y: NDArray[np.floating[Any]],
    dq: NDArray[np.floating[Any]],
    thickness: NDArray[np.floating[Any]],
    scale: NDArray[np.floating[Any]],
    background: NDArray[np.floating[Any]],
    used: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Fill out (n, 6, 6) for (shift_x, shift_y, dq, thickness/Å, scale, background)."""
    nx, ny = used.shape
    channels, nothing = np.empty((5, nx, ny)), np.zeros((nx, ny))
    work, bits, score = np.empty((13, ny)), np.empty((2, ny), np.int32), np.empty(6)
    for i in range(out.shape[0]):
        pattern_channels(plan, shift_x[i], shift_y[i], dq[i], thickness[i], channels)
        dark = _DARK * scale[i]
        poisson_sums(
            channels, scale[i], background[i], nothing, used, dark, work, bits, out[i], score
        )
