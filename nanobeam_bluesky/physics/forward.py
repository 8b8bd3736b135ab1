"""The forward model: diffraction patterns from strain and lattice tilts.

Source: Luo et al., Sci. Rep. (2025), doi 10.1038/s41598-025-97183-0.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.physics._numba import in_threads
from nanobeam_bluesky.physics.continuous import (
    TiltReciprocal,
    continuous_plan,
    render_continuous,
    shifts,
)
from nanobeam_bluesky.physics.published import published_peak, published_plan, render_published

Sampling = Literal["continuous", "published"]

_LEAST = {"strain": -1, "thickness": 0}


def forward(
    strain: ArrayLike,
    omega: ArrayLike,
    chi: ArrayLike,
    geometry: Geometry,
    *,
    sampling: Sampling = "continuous",
    background: ArrayLike = 0.0,
    thickness: ArrayLike | None = None,
    tilt_reciprocal: TiltReciprocal | None = None,
) -> NDArray[np.float32]:
    """Diffraction patterns, scaled so that the peak of the full library is 1.

    Parameters
    ----------
    strain, omega, chi
        Out-of-plane strain (1) and lattice tilts along and across 2θ (deg): scalars or
        arrays of length n.
    geometry
        The geometry; its `pattern_shape` is (ny, nx). In the continuous model its
        `pupil_blur_px` is the standard deviation, in binned pixels, of an isotropic
        Gaussian that the pupil's transmission is convolved with.
    sampling
        "continuous": intensity integrated over every pixel; the peak is a pixel wholly
        inside the pupil at the maximum of sinc². "published": the windows and the grid of
        the published code; the peak is the maximum of its 41³ library (strain ± 0.005,
        ω ± 0.05°, χ ± 0.1°).
    background
        Added to every pixel, in the unit of the pattern; a scalar or (n,).
    thickness
        Of the film, nm, a scalar or (n,), continuous sampling only; the geometry's if absent.
        The peak stays that of the geometry's thickness: fringes change, not the brightness.
    tilt_reciprocal
        Whether tilts turn the reciprocal vector of the strained film, G/(1+ε), or of the
        relaxed one, G. By default strained, but unstrained with the published sampling,
        as in the published library.

    Returns
    -------
    ndarray
        Patterns (n, ny, nx), float32.

    Raises
    ------
    ValueError
        If parameters are not finite, a strain is not above -1, a thickness not above 0, or
        lengths do not fit; if a thickness is given to the published sampling; if the geometry
        is one that the sampling cannot serve (`published_plan`, `published_peak`,
        `continuous_plan`).
    """
    film = geometry.thickness_nm if thickness is None else thickness
    strain, omega, chi, film, background = columns(
        strain=strain, omega=omega, chi=chi, thickness=film, background=background
    )
    out = np.empty((strain.size, *geometry.pattern_shape), np.float32)
    if sampling == "published":
        if thickness is not None:
            raise ValueError("thickness: the published sampling has only the geometry's")
        peak = published_peak(geometry)
        published = published_plan(geometry)
        strained = published.g / (1 + strain)
        tilting = strained if tilt_reciprocal == "strained" else published.g
        gx, gy = tilting * np.radians(omega), tilting * np.radians(chi)
        in_threads(
            lambda part: render_published(
                published, gx[part], gy[part], strained[part], 1 / peak, background[part], out[part]
            ),
            strain.size,
        )
    elif sampling == "continuous":
        plan = continuous_plan(geometry)
        shift_x, shift_y, dq = shifts(
            plan, strain, omega, chi, tilt_reciprocal=tilt_reciprocal or "strained"
        )
        in_threads(
            lambda part: render_continuous(
                plan,
                shift_x[part],
                shift_y[part],
                dq[part],
                background[part],
                out[part],
                10 * film[part],
            ),
            strain.size,
        )
        np.maximum(out, 0, out=out)  # differences of integrals leave -5e-8
    else:
        raise ValueError(f"sampling = {sampling!r} must be 'continuous' or 'published'")
    return out


def simulate_library(
    geometry: Geometry,
    strain: ArrayLike,
    omega: ArrayLike,
    chi: ArrayLike,
    *,
    sampling: Sampling = "published",
) -> NDArray[np.float32]:
    """Patterns of every combination of strain, ω and χ (deg).

    Parameters
    ----------
    geometry
        The geometry; its `pattern_shape` is (ny, nx).
    strain, omega, chi
        The axes of the library, 1-D; ω and χ in degrees.
    sampling
        As in `forward`.

    Returns
    -------
    ndarray
        Patterns (n_strain, n_omega, n_chi, ny, nx), float32: 1.1 GB for 41³ of 64×64.
    """
    axes = [np.asarray(axis, float) for axis in (strain, omega, chi)]
    grid = np.meshgrid(*axes, indexing="ij")
    eps, om, ch = (a.ravel() for a in grid)
    patterns = forward(eps, om, ch, geometry, sampling=sampling)
    return patterns.reshape(*grid[0].shape, *patterns.shape[1:])


def columns(**values: ArrayLike) -> list[NDArray[np.float64]]:
    """Parameters as arrays of one common length."""
    arrays = {name: np.atleast_1d(np.asarray(value, float)) for name, value in values.items()}
    shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
    sizes = [a.size for a in arrays.values()]
    n = max(sizes) if min(sizes) else 0
    if any(a.ndim != 1 or a.size not in (1, n) for a in arrays.values()):
        raise ValueError(f"scalars or arrays of one length are needed, found shapes {shapes}")
    for name, a in arrays.items():
        least = _LEAST.get(name, -np.inf)
        wrong = ~(np.isfinite(a) & (a > least))
        if wrong.any():
            bound = f"finite and above {least}" if name in _LEAST else "finite"
            i = int(wrong.argmax())
            raise ValueError(f"{name}[{i}] = {a[i]} must be {bound}")
    return [np.ascontiguousarray(np.broadcast_to(a, n)) for a in arrays.values()]
