"""Reduced coordinates, in which every geometry is nearly the same problem, and their envelope.

Measure along 2θ not on the detector but in the pupil, by s of `physics.continuous`, and all
lengths in half-widths of the pupil. A pattern is then

    I(s, v) = sinc²[f (2s + shift_x + se)] · pupil(s + shift_x, v + shift_y) · dx/ds

whatever energy, distance, film and optics: what differs between geometries is the pupil's
shape, the fringe frequency f and the blur. Source: Luo et al., Sci. Rep. (2025),
doi 10.1038/s41598-025-97183-0, the equation for I(x, y), to second order in s.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import HC_KEV_ANGSTROM, Geometry, RectangularPupil, ZonePlate
from nanobeam_bluesky.physics.continuous import ContinuousPlan, continuous_plan, shifts

__all__ = [
    "CONDITIONS",
    "LIMITS",
    "OutsideEnvelopeError",
    "Reduced",
    "check_envelope",
    "envelope_ranges",
    "random_geometry",
    "reduce_geometry",
]

LIMITS = (0.7, 0.7, 1.0)
"""Half-ranges of the three shifts, in `Reduced.units`."""
CONDITIONS = 13
"""Numbers that tell one geometry from another."""
VIEW = 1.4
"""How far the network looks, in half-widths of the pupil around the Bragg centre."""

_HALF_WIDTH_PX = (8.0, 30.0)
_STOP = 0.75  # largest, of the rim
_THICKNESS_NM = (5.0, 300.0)
_FRINGE_SPAN = 0.1  # least f · half-width: below, no pattern tells strain
_FRINGE_PX = 0.25  # largest f: a fringe is then two pixels wide
_BLUR_PX = 2.0
_TOLERANCE = 1.05  # of the limits: the network knows a little more


class OutsideEnvelopeError(ValueError):
    """A geometry that the shipped network was not trained for."""


class Reduced(NamedTuple):
    """A geometry in reduced coordinates; lengths in binned pixels of the pupil."""

    columns: NDArray[np.float32]  # (nx + 1,) s of the column borders
    rows: NDArray[np.float32]  # (ny + 1,) v of the row borders
    units: NDArray[np.float64]  # (3,) of shift_x, shift_y and se
    slope: float  # dq per pixel of se, Å⁻¹
    offset: float  # dq at which the film is at its Bragg condition in the middle of the pupil
    fringes: float  # f, fringes per pixel; of 2s + …
    condition: NDArray[np.float32]  # (CONDITIONS,), each about -1 to 1
    plan: ContinuousPlan

    def shifts(
        self, labels: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """shift_x, shift_y (pixels) and dq (Å⁻¹) of labels (n, 3) in `units`."""
        x, y, e = (labels * self.units).T
        return x, y, (e + x) * self.slope - self.offset

    def labels(
        self, strain: NDArray[np.float64], omega: NDArray[np.float64], chi: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Labels (n, 3) of strain, ω and χ (deg): undoes `shifts` and `angles`."""
        x, y, dq = shifts(self.plan, strain, omega, chi)
        return np.stack([x, y, (dq + self.offset) / self.slope - x], 1) / self.units


def reduce_geometry(geometry: Geometry) -> Reduced:
    """Return a geometry's reduced coordinates.

    Raises
    ------
    ValueError
        If there is no continuous model of the geometry, see `continuous_plan`.
    """
    plan = continuous_plan(geometry)
    half_x, half_y, stop_x, stop_y = geometry.pupil_px
    columns = plan.borders[:: plan.per_column]
    # q₀ against s within the pupil: a parabola to 2e-3 fringes
    s, q = plan.s.ravel() / half_x, plan.q.ravel()
    near = np.abs(s) < 1.5
    near |= near.sum() < 10
    bend, slope, offset = np.polyfit(s[near], q[near], 2)
    slope /= 2 * half_x
    fringes = plan.thickness * slope / (2 * math.pi)
    blur = geometry.pupil_blur_px
    ends = (
        columns[0] / half_x,
        columns[-1] / half_x,
        plan.rows[0] / half_y,
        plan.rows[-1] / half_y,
    )
    condition = (
        -1.0 if isinstance(geometry.optics, RectangularPupil) else 1.0,
        2 * min(stop_x / half_x, 1) - 1,
        2 * min(stop_y / half_y, 1) - 1,
        math.log(fringes * half_x),
        10 * blur / half_x - 0.5,
        10 * blur / half_y - 0.5,
        20 / half_x - 1.2,
        20 / half_y - 1.2,
        100 * bend / (2 * half_x * slope),
        *(3 * (min(abs(float(np.clip(end, -VIEW, VIEW))), VIEW) - 1.2) for end in ends),
    )
    return Reduced(
        columns.astype(np.float32),
        plan.rows.astype(np.float32),
        np.array([half_x, half_y, 0.6 * half_x + 0.25 / fringes]),
        float(slope),
        float(offset),
        float(fringes),
        np.array(condition, np.float32),
        plan,
    )


def envelope_ranges(reduced: Reduced) -> dict[str, float]:
    """Half-ranges of strain, omega (deg) and chi (deg) that hold all the shipped network knows.

    A film that is rocked off its Bragg condition has it in the middle of the pupil at another
    strain than 0.
    """
    plan = reduced.plan
    x, y, e = reduced.units * LIMITS
    return {
        "strain": float((e * reduced.slope + abs(reduced.offset)) / plan.g),
        "omega": math.degrees(x / (plan.g * plan.omega_px)),
        "chi": math.degrees(y / (plan.g * plan.chi_px)),
    }


def check_envelope(geometry: Geometry, reduced: Reduced) -> None:
    """Raise `OutsideEnvelopeError` unless the shipped network was trained for such a geometry.

    The message says what is outside, and the nearest thing that works.
    """
    half_x, half_y, stop_x, stop_y = geometry.pupil_px
    low, high = _HALF_WIDTH_PX
    small, large = sorted((half_x, half_y))
    problems = []
    if large > high * _TOLERANCE:
        binning = math.ceil(geometry.binning * large / high)
        problems.append(
            f"the pupil's half-width is {large:.3g} binned pixels, at most {high:g}: "
            f"binning = {binning} would do"
        )
    if small < low / _TOLERANCE:
        finer = math.floor(geometry.binning * small / low)
        advice = (
            f"binning = {finer} would do"
            if finer >= 1 and large * geometry.binning / finer <= high
            else f"a detector {low / small * geometry.detector_distance_m:.2g} m away would do"
        )
        problems.append(
            f"the pupil's half-width is {small:.3g} binned pixels, at least {low:g}: {advice}"
        )
    if max(stop_x / half_x, stop_y / half_y) > _STOP * _TOLERANCE:
        problems.append(
            f"the stop covers {max(stop_x / half_x, stop_y / half_y):.2g} of the pupil's width, "
            f"at most {_STOP:g}"
        )
    thin, thick = _THICKNESS_NM
    if not thin / _TOLERANCE <= geometry.thickness_nm <= thick * _TOLERANCE:
        problems.append(f"thickness_nm = {geometry.thickness_nm:g}, expected {thin:g} to {thick:g}")
    if reduced.fringes > _FRINGE_PX * _TOLERANCE:
        most = geometry.thickness_nm * _FRINGE_PX / reduced.fringes
        problems.append(
            f"the film's fringes are {0.5 / reduced.fringes:.2g} binned pixels apart, at least "
            f"{0.5 / _FRINGE_PX:g}: a film up to {most:.3g} nm or less binning would do"
        )
    if reduced.fringes * half_x < _FRINGE_SPAN / _TOLERANCE:
        least = geometry.thickness_nm * _FRINGE_SPAN / (reduced.fringes * half_x)
        problems.append(
            f"the pupil spans {4 * reduced.fringes * half_x:.2g} of a fringe, too little to tell "
            f"strain well: a film from {least:.3g} nm would do"
        )
    if geometry.pupil_blur_px > _BLUR_PX * _TOLERANCE:
        problems.append(f"pupil_blur_px = {geometry.pupil_blur_px:g}, at most {_BLUR_PX:g}")
    seen = min(reduced.columns[-1] / half_x, reduced.rows[-1] / half_y)
    seen = min(seen, -reduced.columns[0] / half_x, -reduced.rows[0] / half_y)
    if seen < 0.6:
        problems.append(
            f"the ROI ends {seen:.2g} half-widths of the pupil from the Bragg centre, at least "
            "0.6 expected: a ROI around bragg_center_px would do"
        )
    if problems:
        raise OutsideEnvelopeError("; ".join(problems))


def random_geometry(rng: np.random.Generator) -> Geometry:
    """Draw a geometry from the envelope: energy, reflection, distance, optics, film, ROI.

    A quarter has mirrors or multilayer Laue lenses, the rest zone plates, of which a quarter has
    a sharp pupil; all others have a blur of 0.25 to 2 binned pixels.
    """
    (low, high), (thin, thick) = _HALF_WIDTH_PX, _THICKNESS_NM
    while True:
        rectangular = rng.random() < 0.25
        half = np.exp(rng.uniform(math.log(low), math.log(high), 2))
        if not rectangular:
            half[1] = half[0]
        aperture = math.exp(rng.uniform(math.log(0.7e-3), math.log(6e-3)))  # rad, half
        energy = rng.uniform(6, 18)
        bragg = math.radians(rng.uniform(7, 45))
        thickness = math.exp(rng.uniform(math.log(thin), math.log(thick)))
        wavelength = HC_KEV_ANGSTROM / energy
        step = aperture / half[0]  # rad per binned pixel
        fringes = thickness * 10 * step * math.cos(bragg) / wavelength
        if fringes > _FRINGE_PX or fringes * half[0] < _FRINGE_SPAN:
            continue
        pixel = 55 if half.max() * 2 < 30 else 75
        binning = 1 if half.max() < 15 else 2
        sharp = rng.random() < 0.25 and not rectangular
        blur = 0.0 if sharp else math.exp(rng.uniform(math.log(0.25), math.log(2)))
        optics: ZonePlate | RectangularPupil
        if rectangular:
            stop = rng.uniform(0.2, 0.6, 2) if rng.random() < 0.5 else np.zeros(2)
            optics = RectangularPupil(
                divergence_x_mrad=2e3 * half[0] * step,
                divergence_y_mrad=2e3 * half[1] * step,
                stop_x_mrad=stop[0] * 2e3 * half[0] * step,
                stop_y_mrad=stop[1] * 2e3 * half[1] * step,
            )
        else:
            stop_um = 0.0 if rng.random() < 0.15 else 150 * rng.uniform(0.2, _STOP)
            optics = ZonePlate(
                diameter_um=150,
                focal_length_mm=0.15 / (2 * aperture),
                central_stop_diameter_um=stop_um,
            )
        shape = []
        for width in half:
            least = max(32, math.ceil(1.7 * width))
            shape.append(int(rng.integers(least, 85)) if rng.random() < 0.6 else max(least, 64))
        nx, ny = shape
        off = rng.uniform(-1, 1, 2) * (0.1 * np.array(shape) if rng.random() < 0.5 else 1.0)
        rocked = 0.0 if rng.random() < 0.7 else 0.1 * rng.standard_normal()
        off[0] -= math.tan(2 * math.radians(rocked)) / step  # the ROI goes with the pupil
        try:
            return Geometry(
                energy_keV=energy,
                detector_distance_m=pixel * binning * 1e-6 / step,
                pixel_size_um=pixel,
                binning=binning,
                roi_shape=(ny * binning, nx * binning),
                roi_origin_px=(200, 200),
                bragg_center_px=(
                    200 + (nx / 2 + off[0]) * binning,
                    200 + (ny / 2 + off[1]) * binning,
                ),
                d_spacing_angstrom=wavelength / (2 * math.sin(bragg)),
                thickness_nm=thickness,
                delta_theta_deg=rocked,
                pupil_blur_px=blur,
                optics=optics,
            )
        except ValueError:  # a distance beyond 100 m, or the beam below the horizon
            continue
