"""`sensitivity`: what an error of the geometry does to the estimates, and whether it shows.

σ is statistical. An error of the geometry moves all points of a map alike, and mostly leaves
no trace in any pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nanobeam_bluesky.geometry import HC_KEV_ANGSTROM, Geometry
from nanobeam_bluesky.physics import forward
from nanobeam_bluesky.physics.forward import columns

__all__ = ["Sensitivity", "sensitivity"]

Floats = NDArray[np.float64]

_STEP_PX = 0.05  # of the differences, binned pixels: rims are sharp, numbers float32


@dataclass(frozen=True)
class Sensitivity:
    """What is added to the estimates when a geometry states one unit more than is true."""

    unit: str
    """Unit of the geometry's error, e.g. "eV"."""
    strain: float
    """Added to ε by one unit."""
    omega: float
    """Added to ω by one unit, deg."""
    chi: float
    """Added to χ by one unit, deg."""
    excess_deviance: float
    """Excess of a pattern's deviance by one unit; grows as the error's square and as the
    counts. The noise of the deviance is about 70 at 6000 counts in 64 × 64 pixels."""

    def __str__(self) -> str:
        return (
            f"per {self.unit}: ε {self.strain:+.2e}, ω {self.omega:+.2e}°, χ {self.chi:+.2e}°, "
            f"excess deviance {self.excess_deviance:.2g}"
        )


def sensitivity(
    geometry: Geometry,
    *,
    strain: ArrayLike = 0.0,
    omega: ArrayLike = 0.0,
    chi: ArrayLike = 0.0,
    counts: float = 6000.0,
    background: float = 0.01,
) -> dict[str, Sensitivity]:
    """Systematic errors of maximum-likelihood estimates by errors of the geometry.

    To first order: patterns of a geometry that differs by Δμ move the estimate by
    I⁻¹ Σ (∂μ/∂θ) Δμ / μ, with I the Fisher information and θ = (ε, ω, χ, scale, background).

    Parameters
    ----------
    geometry
        The geometry.
    strain, omega, chi
        Where to look (1, deg, deg), scalars or (n,); the result is the mean over them. The
        relaxed, untilted film by default.
    counts
        Photons in a pattern; mostly the excess deviance depends on it.
    background
        Counts per pixel, above 0: a perfectly dark pixel would tell arbitrarily much.

    Returns
    -------
    dict
        By the geometry's quantity, with ROI and everything else as they are:
        ``bragg_center_x``, ``bragg_center_y`` (columns, rows of the frame) per *unbinned*
        pixel; ``energy`` per eV where the centre was found otherwise, as on a known
        reflection; ``energy_at_fixed_angles`` per eV where the centre was computed from the
        angles of sample and detector, and follows; ``detector_distance`` per mm (its
        relative error is that of the pixel size, negative); ``thickness`` per nm;
        ``delta_theta`` (incidence) and ``detector_two_theta`` (the detector's inclination
        alone: where the centre follows it, it counts as that many pixels) per mrad. A focal
        length follows the energy unless given.

    Raises
    ------
    ValueError
        If the ROI is dark there, or counts or background are not above 0.
    """
    if not (counts > 0 and background > 0):
        raise ValueError(f"counts = {counts:g} and background = {background:g} must be above 0")
    strain, omega, chi = columns(strain=strain, omega=omega, chi=chi)
    truth = {"strain": strain, "omega": omega, "chi": chi}

    def patterns(geometry: Geometry, **moved: Floats) -> Floats:
        at = truth | moved
        images = forward(at["strain"], at["omega"], at["chi"], geometry)
        return images.reshape(strain.size, -1).astype(float)

    unit = patterns(geometry)
    total = unit.sum(axis=1, keepdims=True)
    if not (total > 0).all():
        raise ValueError("sensitivity: no light reaches the ROI at these strains and tilts")
    scale = counts / total
    expected = scale * unit + background
    slopes = []
    for name, per_pixel in center_effect(geometry).items():
        step = _STEP_PX * geometry.binning * per_pixel
        above = patterns(geometry, **{name: truth[name] + step})
        below = patterns(geometry, **{name: truth[name] - step})
        slopes.append(scale * (above - below) / (2 * step))
    weight = 1 / np.sqrt(expected)  # of residuals of unit variance
    design = np.stack([*slopes, unit, np.ones_like(unit)], axis=2) * weight[..., None]
    found = {}
    for name, (quantity, step, moved) in _perturbations(geometry).items():
        # the geometry states more than is true: the patterns have less
        less = (patterns(moved(-step)) - patterns(moved(step))) / (2 * step) * scale * weight
        shift = (np.linalg.pinv(design) @ less[..., None])[..., 0]  # (n, 5)
        unexplained = less - (design @ shift[..., None])[..., 0]
        mean = shift.mean(axis=0)
        found[name] = Sensitivity(
            unit=quantity,
            strain=float(mean[0]),
            omega=float(mean[1]),
            chi=float(mean[2]),
            excess_deviance=float((unexplained**2).sum(axis=1).mean()),
        )
    return found


def center_effect(geometry: Geometry) -> dict[str, float]:
    """ε, ω (deg) and χ (deg) that move a pattern by one unbinned pixel.

    ε and ω along 2θ, χ across; what a centre that is off by one pixel adds.
    """
    pixel = geometry.pixel_size_um * 1e-6 / geometry.detector_distance_m
    bragg = math.radians(geometry.bragg_angle_deg)
    return {
        "strain": pixel / (2 * math.tan(bragg)),
        "omega": math.degrees(pixel / 2),
        "chi": math.degrees(pixel / (2 * math.sin(bragg))),
    }


def frame_direction(geometry: Geometry, axis: Literal["x", "y"]) -> tuple[int, int]:
    """(column, row) step in the frame that goes one pixel along x or y of the pattern."""
    ramp = np.arange(3) if axis == "x" else np.arange(3)[:, None]
    turned = geometry.unorient(np.broadcast_to(ramp, (3, 3)))
    return int(turned[0, 1] - turned[0, 0]), int(turned[1, 0] - turned[0, 0])


def _perturbations(
    geometry: Geometry,
) -> dict[str, tuple[str, float, Callable[[float], Geometry]]]:
    """By quantity: its unit, a small step in it, and the geometry that has it added."""
    roi, (x, y) = geometry.roi, geometry.bragg_center_px
    tilt = geometry.detector_tilt_deg
    two_theta = 2 * geometry.bragg_angle_deg - tilt
    energy = HC_KEV_ANGSTROM / geometry.wavelength_angstrom
    distance_px = geometry.detector_distance_m * 1e6 / geometry.pixel_size_um
    step = _STEP_PX * geometry.binning  # unbinned pixels
    tangent = 2e-3 * math.tan(math.radians(geometry.bragg_angle_deg))
    mrad = math.degrees(1e-3)

    def with_(**update: Any) -> Geometry:
        return geometry.model_copy(update={"roi_origin_px": (roi.row, roi.col)} | update)

    def at_energy(eV: float, **update: Any) -> Geometry:
        keV = energy + eV * 1e-3
        return with_(energy_keV=keV, wavelength_angstrom=HC_KEV_ANGSTROM / keV, **update)

    def at_fixed_angles(eV: float) -> Geometry:
        bragg = at_energy(eV).bragg_angle_deg
        new_tilt = 2 * bragg - two_theta
        moved = distance_px * (math.tan(math.radians(new_tilt)) - math.tan(math.radians(tilt)))
        right, down = frame_direction(geometry, "x")
        return at_energy(
            eV,
            delta_theta_deg=geometry.incidence_deg - bragg,
            detector_two_theta_deg=two_theta,
            bragg_center_px=(x + right * moved, y + down * moved),
        )

    return {
        "bragg_center_x": ("px", step, lambda px: with_(bragg_center_px=(x + px, y))),
        "bragg_center_y": ("px", step, lambda px: with_(bragg_center_px=(x, y + px))),
        "energy": ("eV", energy, at_energy),  # 0.1 %, as of the distance and the thickness
        "energy_at_fixed_angles": ("eV", energy * step / distance_px / tangent, at_fixed_angles),
        "detector_distance": (
            "mm",
            geometry.detector_distance_m,
            lambda mm: with_(detector_distance_m=geometry.detector_distance_m + mm * 1e-3),
        ),
        "thickness": (
            "nm",
            1e-3 * geometry.thickness_nm,
            lambda nm: with_(thickness_nm=geometry.thickness_nm + nm),
        ),
        "delta_theta": (
            "mrad",
            1e3 * step / (2 * distance_px),
            lambda units: with_(delta_theta_deg=geometry.delta_theta_deg + units * mrad),
        ),
        "detector_two_theta": (
            "mrad",
            1.0,
            lambda units: with_(detector_two_theta_deg=two_theta + units * mrad),
        ),
    }
