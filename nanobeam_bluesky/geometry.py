"""Geometry of an SXDM measurement: numbers with units, checked, with a fingerprint.

Everything the forward model needs to know about the beam, the optics, the film and
the detector stands in one frozen `Geometry`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "HC_KEV_ANGSTROM",
    "LARGEST_PUPIL_PX",
    "ROI",
    "Geometry",
    "GeometryError",
    "Optics",
    "Orientation",
    "RectangularPupil",
    "ZonePlate",
]

T = TypeVar("T", bound=np.generic)

HC_KEV_ANGSTROM = 12.39841984
"""Planck constant times speed of light, keV Å (CODATA 2018)."""

LARGEST_PUPIL_PX = 30
"""Half-width of the pupil, binned pixels, above which `Geometry` bins more unless told."""

# the ROI that is chosen where none is given, binned pixels
_ROI_PER_PUPIL = 1.25  # its half-width over the pupil's: room for shifts
_SMALLEST_ROI = 32
_ROI_STEP = 8
_SMALLEST_PATTERN = 8
_LARGEST_BINNING = 64

Orientation = Literal[
    "identity",
    "flip_x",
    "flip_y",
    "rotate_180",
    "transpose",
    "rotate_90",
    "rotate_270",
    "antitranspose",
]
"""What turns a detector frame so that columns run along increasing 2θ.

``rotate_90`` is counter-clockwise as in `numpy.rot90`; ``antitranspose`` mirrors at the
other diagonal.
"""


class GeometryError(ValueError):
    """A geometry that is missing something or cannot exist."""


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        # the message names the field; a value may be a whole start document
        hide_input_in_errors=False,
    )


class ROI(_Frozen):
    """A rectangle of unbinned detector pixels."""

    row: Annotated[int, Field(ge=0)]
    """First row, e.g. 192."""
    col: Annotated[int, Field(ge=0)]
    """First column, e.g. 192."""
    height: Annotated[int, Field(gt=0)]
    """Number of rows, e.g. 128."""
    width: Annotated[int, Field(gt=0)]
    """Number of columns, e.g. 128."""

    @property
    def slices(self) -> tuple[slice, slice]:
        """(rows, columns) to index a frame with."""
        return (
            slice(self.row, self.row + self.height),
            slice(self.col, self.col + self.width),
        )

    def check_inside(self, frame_shape: tuple[int, int]) -> None:
        """Raise `GeometryError` unless the ROI lies within a frame of `frame_shape`."""
        rows, cols = frame_shape
        if self.row + self.height > rows or self.col + self.width > cols:
            raise GeometryError(
                f"ROI off the detector: rows {self.row}..{self.row + self.height}, columns "
                f"{self.col}..{self.col + self.width} on a frame of {rows} × {cols} pixels; "
                "correct roi_shape, roi_origin_px or bragg_center_px"
            )


class ZonePlate(_Frozen):
    """Fresnel zone plate with a central stop: the pupil is a ring."""

    kind: Literal["zone_plate"] = "zone_plate"
    diameter_um: Annotated[float, Field(gt=0)]
    """Diameter of the zone plate, µm, e.g. 149."""
    outermost_zone_width_nm: Annotated[float, Field(gt=0)] | None = None
    """Width of the outermost zone, nm, e.g. 16.1; not needed with a focal length."""
    focal_length_mm: Annotated[float, Field(gt=0)] | None = None
    """Focal length at this energy, mm, e.g. 21.874; follows from the zone width if absent."""
    central_stop_diameter_um: Annotated[float, Field(ge=0)] = 0.0
    """Diameter of the central stop, µm, e.g. 77; 0 for none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.central_stop_diameter_um >= self.diameter_um:
            raise ValueError(
                f"central_stop_diameter_um = {self.central_stop_diameter_um:g} must be smaller "
                f"than the zone plate's diameter_um = {self.diameter_um:g}"
            )
        if self.outermost_zone_width_nm is None and self.focal_length_mm is None:
            raise ValueError("give outermost_zone_width_nm or focal_length_mm")
        return self

    def focal_length_at(self, wavelength_angstrom: float) -> float:
        """Focal length, mm: the given one, else diameter × outermost zone width / λ."""
        if self.focal_length_mm is not None:
            return self.focal_length_mm
        assert self.outermost_zone_width_nm is not None
        return 1e-2 * self.diameter_um * self.outermost_zone_width_nm / wavelength_angstrom


class RectangularPupil(_Frozen):
    """Kirkpatrick-Baez mirrors or multilayer Laue lenses: the pupil is a rectangle."""

    kind: Literal["rectangular"] = "rectangular"
    divergence_x_mrad: Annotated[float, Field(gt=0, lt=200)]
    """Full convergence angle in the scattering plane (along 2θ), mrad, e.g. 6."""
    divergence_y_mrad: Annotated[float, Field(gt=0, lt=200)]
    """Full convergence angle across the scattering plane, mrad, e.g. 6."""
    stop_x_mrad: Annotated[float, Field(ge=0)] = 0.0
    """Full angle that a beam stop blocks along 2θ, mrad, e.g. 1; 0 for none."""
    stop_y_mrad: Annotated[float, Field(ge=0)] = 0.0
    """Full angle that a beam stop blocks across, mrad; both are needed for a stop."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.stop_x_mrad > 0) != (self.stop_y_mrad > 0):
            raise ValueError("a stop needs both stop_x_mrad and stop_y_mrad")
        if self.stop_x_mrad >= self.divergence_x_mrad and (
            self.stop_y_mrad >= self.divergence_y_mrad
        ):
            raise ValueError(
                f"the stop ({self.stop_x_mrad:g} × {self.stop_y_mrad:g} mrad) covers the whole "
                f"pupil ({self.divergence_x_mrad:g} × {self.divergence_y_mrad:g} mrad)"
            )
        return self


Optics = Annotated[ZonePlate | RectangularPupil, Field(discriminator="kind")]


class Geometry(_Frozen):
    """One SXDM geometry; lengths and angles in the units that the names say.

    Raises
    ------
    pydantic.ValidationError
        If a value is impossible; names the field, the value and the bound.
    """

    energy_keV: Annotated[float, Field(gt=0.1, lt=200)] | None = None  # noqa: N815
    """Photon energy, keV, e.g. 11.3; this or `wavelength_angstrom`."""
    wavelength_angstrom: Annotated[float, Field(gt=0.05, lt=120)] = None  # type: ignore[assignment]
    """X-ray wavelength, Å, e.g. 1.0972; follows from the energy if absent."""
    detector_distance_m: Annotated[float, Field(gt=0, lt=100)]
    """Distance from sample to detector, m, e.g. 0.85 (NXdetector ``distance``)."""
    pixel_size_um: Annotated[float, Field(gt=0, lt=10000)]
    """Size of an unbinned (square) pixel, µm, e.g. 55 (NXdetector ``x_pixel_size``)."""
    binning: Annotated[int, Field(ge=1, le=_LARGEST_BINNING)] = None  # type: ignore[assignment]
    """Pixels summed along each axis before analysis, e.g. 2; if absent, the smallest that
    makes the pupil's half-widths `LARGEST_PUPIL_PX` or less (and divides a given ROI)."""
    roi_shape: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = None  # type: ignore[assignment]
    """(rows, columns) of the region of interest, unbinned pixels, e.g. (128, 128); if absent,
    1.25 times the pupil, at least 32 binned pixels, cut at the detector's edge."""
    roi_origin_px: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    """(row, column) of the ROI's first pixel, e.g. (192, 192); centred on the Bragg
    centre if absent."""
    detector_shape: tuple[int, int] | None = None
    """(rows, columns) of a whole frame, e.g. (512, 512); the ROI is checked against it."""
    bragg_center_px: tuple[float, float]
    """(x, y) = (column, row) where the beam of exactly 2θB falls, unbinned pixels of the
    full frame, pixel i spans [i, i+1), e.g. (256.0, 256.0). Not NeXus's
    ``beam_center_x/y``, which is the direct beam."""
    detector_two_theta_deg: float | None = None
    """2θ of the detector's normal, deg, e.g. 31.7; 2θB if absent."""
    lattice_c_angstrom: Annotated[float, Field(gt=0)] | None = None
    """Out-of-plane lattice constant, Å, e.g. 4.013; with `reflection_l`."""
    reflection_l: Annotated[int, Field(ge=1)] | None = None
    """Order of the 00l reflection, e.g. 2."""
    d_spacing_angstrom: Annotated[float, Field(gt=0)] = None  # type: ignore[assignment]
    """Lattice plane spacing c/l, Å, e.g. 2.0065; follows from `lattice_c_angstrom` if absent."""
    thickness_nm: Annotated[float, Field(gt=0)]
    """Film thickness, nm, e.g. 11.7."""
    delta_theta_deg: float = 0.0
    """Incidence minus Bragg angle, deg, e.g. 0.1."""
    orientation: Orientation = "identity"
    """What turns a frame so that columns run along increasing 2θ, e.g. "transpose"."""
    pixel_mask: tuple[tuple[int, int], ...] = ()
    """Bad pixels as (row, column) of the unbinned full frame, e.g. ((10, 200), (11, 200))."""
    saturation_value: Annotated[float, Field(gt=0)] | None = None
    """Counts at which an unbinned pixel is saturated, e.g. 65535."""
    pupil_blur_px: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Standard deviation of the pupil's blur (source size, detector), binned pixels, e.g. 0.5."""
    optics: Optics
    """The focusing optics, e.g. ZonePlate(diameter_um=149, focal_length_mm=21.874)."""

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        values = {k: v for k, v in data.items() if v is not None or k not in _FITTED}
        _derive_one(
            values,
            "wavelength_angstrom",
            ("energy_keV",),
            lambda energy: HC_KEV_ANGSTROM / energy,
        )
        _derive_one(
            values,
            "d_spacing_angstrom",
            ("lattice_c_angstrom", "reflection_l"),
            lambda c, order: c / order,
        )
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        ratio = self.wavelength_angstrom / (2 * self.d_spacing_angstrom)
        if ratio >= 1:
            raise ValueError(
                f"reflection not reachable: wavelength {self.wavelength_angstrom:.4g} Å must be "
                f"below twice the lattice plane spacing, 2 × {self.d_spacing_angstrom:.4g} Å; "
                "check energy_keV, lattice_c_angstrom and reflection_l"
            )
        for name, angle in (
            ("incidence θB + delta_theta_deg", self.incidence_deg),
            ("exit θB - delta_theta_deg", 2 * self.bragg_angle_deg - self.incidence_deg),
        ):
            if not 0 < angle < 90:
                raise ValueError(
                    f"{name} = {angle:.4g}° must lie between 0° and 90°: "
                    f"delta_theta_deg = {self.delta_theta_deg:g}"
                )
        if abs(self.detector_tilt_deg) > 45:
            raise ValueError(
                f"detector_two_theta_deg = {self.detector_two_theta_deg} must be within 45° of "
                f"2θB = {2 * self.bragg_angle_deg:.4g}°"
            )
        self._fit()
        if any(n % self.binning for n in self.roi_shape):
            raise ValueError(
                f"roi_shape = {self.roi_shape} must be a multiple of binning = {self.binning}"
            )
        if min(self.pattern_shape) < _SMALLEST_PATTERN:
            raise ValueError(
                f"roi_shape = {self.roi_shape} with binning = {self.binning} leaves "
                f"{self.pattern_shape} pixels; at least {_SMALLEST_PATTERN} × "
                f"{_SMALLEST_PATTERN} are needed"
            )
        roi = self.roi  # raises if it starts left of or above the detector
        if self.detector_shape is not None:
            roi.check_inside(self.detector_shape)
        x, y = self.bragg_center_px
        if not (
            roi.col - roi.width <= x <= roi.col + 2 * roi.width
            and roi.row - roi.height <= y <= roi.row + 2 * roi.height
        ):
            raise ValueError(
                f"bragg_center_px = ({x:g}, {y:g}) must lie within one ROI size of the ROI, "
                f"rows {roi.row}..{roi.row + roi.height}, columns {roi.col}..{roi.col + roi.width}"
            )
        return self

    def _fit(self) -> None:
        """Choose binning and ROI where they were not given."""
        # absent fields are None until here
        binning: int | None = self.binning
        shape: tuple[int, int] | None = self.roi_shape
        rx, ry, _, _ = self.model_copy(update={"binning": 1}).pupil_px
        chosen: dict[str, Any] = {}
        if binning is None:
            binning = chosen["binning"] = _fitting_binning(max(rx, ry), shape)
        if shape is None:
            # off the Bragg angle the pupil moves along 2θ
            moved = math.tan(math.radians(2 * abs(self.delta_theta_deg)))
            moved *= self.detector_distance_m * 1e6 / self.pixel_size_um
            chosen |= self._fitting_roi((ry, rx), (ry, rx + moved), binning)
        for name, value in chosen.items():
            object.__setattr__(self, name, value)  # frozen, but still in the making

    def _fitting_roi(
        self, pupil: tuple[float, float], reach: tuple[float, float], binning: int
    ) -> dict[str, Any]:
        """ROI for half-widths (y, x) of the pupil and of what it may reach, unbinned pixels."""
        if self.orientation in _SWAPPING:
            pupil, reach = pupil[::-1], reach[::-1]
        x, y = self.bragg_center_px
        detector = self.detector_shape or (None, None)
        for center, side in zip((y, x), detector, strict=True):
            if center < 0 or (side is not None and center > side):
                frame = "" if side is None else f" of {detector[0]} rows × {detector[1]} columns"
                raise ValueError(
                    f"bragg_center_px = ({x:g}, {y:g}), (column, row), is off the detector{frame}: "
                    "give the pixel where the beam of exactly 2θB falls, or say with roi_shape and "
                    "roi_origin_px which part to analyse"
                )
        for half, side, word in zip(pupil, detector, ("high", "wide"), strict=True):
            if side is not None and 2 * half > side:
                nearest = _rounded_down(self.detector_distance_m * side / (2 * half))
                raise ValueError(
                    f"the pupil is {2 * half:.0f} pixels {word}, the detector {side} "
                    f"(detector_shape): move the detector to at most {nearest:g} m, or say with "
                    "roi_shape which part of the pattern to analyse"
                )
        step = _ROI_STEP * binning
        smallest = _SMALLEST_ROI * binning
        rows, cols = (max(smallest, step * round(2 * _ROI_PER_PUPIL * r / step)) for r in reach)
        whole = {"roi_shape": (rows, cols)}
        if self.roi_origin_px is not None:
            return whole
        cut = []
        for center, size, side in zip((y, x), (rows, cols), detector, strict=True):
            first = math.floor(center - size / 2 + 0.5)
            stop = first + size if side is None else min(first + size, side)
            cut.append((max(first, 0), (stop - max(first, 0)) // binning * binning))
        (row, height), (col, width) = cut
        if (height, width) == (rows, cols):
            return whole
        return {"roi_shape": (height, width), "roi_origin_px": (row, col)}

    @classmethod
    def published(cls) -> Geometry:
        """The test condition of Luo et al., Sci. Rep. (2025): SrIrO3 002 at 11.3 keV."""
        return cls(
            energy_keV=11.3,
            detector_distance_m=0.85,
            pixel_size_um=55,
            binning=2,
            roi_shape=(128, 128),
            detector_shape=(512, 512),
            bragg_center_px=(256.0, 256.0),
            lattice_c_angstrom=4.013,
            reflection_l=2,
            thickness_nm=11.7,
            optics=ZonePlate(diameter_um=149, focal_length_mm=21.874, central_stop_diameter_um=77),
        )

    @classmethod
    def from_start(
        cls,
        start: Mapping[str, Any],
        *,
        baseline: Mapping[str, Any] | None = None,
        configuration: Mapping[str, Any] | None = None,
        preset: Any = "default",
    ) -> Geometry:
        """Read the geometry from a run-start document.

        Parameters
        ----------
        start
            The run-start document.
        baseline
            Readings of the baseline stream: name → value, or name →
            ``{"value": …, "units": …}``.
        configuration
            The detector's configuration, in the same form.
        preset
            A `nanobeam_bluesky.presets.Preset`, the name of a shipped one, or a path
            of a TOML file.

        Raises
        ------
        GeometryError
            Names the missing or impossible field, and where it was looked for.
        """
        from nanobeam_bluesky.presets import Preset  # presets build on this module

        return Preset.load(preset).read_geometry(
            start, baseline=baseline, configuration=configuration
        )

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str) -> Geometry:
        """Validate `values`; `GeometryError` in one line a problem, prefixed by `where`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = []
            for e in error.errors(include_url=False):
                field = ".".join(str(part) for part in e["loc"] if part not in _TAGS)
                text = e["msg"].removeprefix("Value error, ")
                if e["type"] == "missing":
                    problems.append(f"{field}: missing")
                elif field and e["type"] != "value_error":
                    problems.append(f"{field} = {e['input']!r}: {text}")
                else:
                    problems.append(f"{field}: {text}" if field else text)
            raise GeometryError(f"{where}: " + "; ".join(problems)) from error

    # ------------------------------------------------------------------ derived

    @property
    def bragg_angle_deg(self) -> float:
        """θB = asin(λ / 2d), deg."""
        return math.degrees(math.asin(self.wavelength_angstrom / (2 * self.d_spacing_angstrom)))

    @property
    def incidence_deg(self) -> float:
        """θ = θB + Δθ, deg."""
        return self.bragg_angle_deg + self.delta_theta_deg

    @property
    def detector_tilt_deg(self) -> float:
        """2θB minus the 2θ of the detector's normal, deg; 0 for a detector that faces 2θB."""
        if self.detector_two_theta_deg is None:
            return 0.0
        return 2 * self.bragg_angle_deg - self.detector_two_theta_deg

    @property
    def roi(self) -> ROI:
        """The region of interest in the full, unturned frame."""
        height, width = self.roi_shape
        if self.roi_origin_px is not None:
            row, col = self.roi_origin_px
        else:
            x, y = self.bragg_center_px
            row, col = math.floor(y - height / 2 + 0.5), math.floor(x - width / 2 + 0.5)
        if row < 0 or col < 0:
            raise ValueError(
                f"ROI off the detector: roi_shape = {self.roi_shape} around bragg_center_px = "
                f"{self.bragg_center_px} starts at row {row}, column {col}; "
                "both must be 0 or more"
            )
        return ROI(row=row, col=col, height=height, width=width)

    @property
    def pattern_shape(self) -> tuple[int, int]:
        """(ny, nx) of a pattern: ROI binned and turned, e.g. (64, 64)."""
        rows, cols = (n // self.binning for n in self.roi_shape)
        return (cols, rows) if self.orientation in _SWAPPING else (rows, cols)

    @property
    def pattern_center(self) -> tuple[float, float]:
        """(x, y) of the Bragg centre in the turned pattern, binned pixels, e.g. (32.0, 32.0)."""
        roi = self.roi
        x = (self.bragg_center_px[0] - roi.col) / self.binning
        y = (self.bragg_center_px[1] - roi.row) / self.binning
        width, height = roi.width / self.binning, roi.height / self.binning
        return {
            "identity": (x, y),
            "flip_x": (width - x, y),
            "flip_y": (x, height - y),
            "rotate_180": (width - x, height - y),
            "transpose": (y, x),
            "rotate_90": (y, width - x),
            "rotate_270": (height - y, x),
            "antitranspose": (height - y, width - x),
        }[self.orientation]

    @property
    def good_pixels(self) -> NDArray[np.bool_]:
        """False for the masked pixels of the ROI, unbinned and not turned: (rows, columns)."""
        roi = self.roi
        good = np.ones(self.roi_shape, dtype=bool)
        for row, col in self.pixel_mask:
            if 0 <= row - roi.row < roi.height and 0 <= col - roi.col < roi.width:
                good[row - roi.row, col - roi.col] = False
        return good

    @property
    def pattern_mask(self) -> NDArray[np.bool_]:
        """True for pixels of a pattern that hold a masked pixel: (ny, nx)."""
        b = self.binning
        height, width = self.roi_shape
        bins = self.good_pixels.reshape(height // b, b, width // b, b)
        return self.orient(np.any(~bins, axis=(1, 3)))

    @property
    def binned_pixel_um(self) -> float:
        """Size of a binned pixel, µm."""
        return self.pixel_size_um * self.binning

    @property
    def pupil_px(self) -> tuple[float, float, float, float]:
        """Outer and stop half-widths of the pupil, binned pixels on the detector.

        ``(Ro, Ro, Ri, Ri)``, the radii of rim and stop, for a zone plate; the half-widths
        ``(outer x, outer y, stop x, stop y)`` of a rectangular pupil.
        """
        per_radian = self.detector_distance_m * 1e6 / self.binned_pixel_um
        optics = self.optics
        if isinstance(optics, ZonePlate):
            focal_um = optics.focal_length_at(self.wavelength_angstrom) * 1e3
            outer = optics.diameter_um / (2 * focal_um) * per_radian
            stop = optics.central_stop_diameter_um / (2 * focal_um) * per_radian
            return (outer, outer, stop, stop)
        half = per_radian * 1e-3 / 2
        return (
            optics.divergence_x_mrad * half,
            optics.divergence_y_mrad * half,
            optics.stop_x_mrad * half,
            optics.stop_y_mrad * half,
        )

    @property
    def fringe_px(self) -> float:
        """Period of the film's thickness fringes along 2θ, binned pixels: λD / (2 t p cos θ).

        Below 2 the pixels no longer resolve them: error bars still hold, but more and more fits
        end flagged. It grows in proportion with a thinner film, a larger distance, less binning.
        """
        wavelength_um = self.wavelength_angstrom * 1e-4
        distance_px = self.detector_distance_m * 1e6 / self.binned_pixel_um
        twice_um = 2e-3 * self.thickness_nm * math.cos(math.radians(self.incidence_deg))
        return wavelength_um * distance_px / twice_um

    def orient(self, frames: NDArray[T]) -> NDArray[T]:
        """Turn frames (…, rows, columns) so that columns run along increasing 2θ (a view)."""
        turned: NDArray[T] = {
            "identity": lambda f: f,
            "flip_x": lambda f: f[..., ::-1],
            "flip_y": lambda f: f[..., ::-1, :],
            "rotate_180": lambda f: f[..., ::-1, ::-1],
            "transpose": lambda f: np.swapaxes(f, -1, -2),
            "rotate_90": lambda f: np.swapaxes(f, -1, -2)[..., ::-1, :],
            "rotate_270": lambda f: np.swapaxes(f, -1, -2)[..., ::-1],
            "antitranspose": lambda f: np.swapaxes(f, -1, -2)[..., ::-1, ::-1],
        }[self.orientation](frames)
        return turned

    def unorient(self, patterns: NDArray[T]) -> NDArray[T]:
        """Undo `orient`: patterns (…, ny, nx) to the axes of the detector (a view)."""
        inverse: dict[str, Orientation] = {
            "rotate_90": "rotate_270",
            "rotate_270": "rotate_90",
        }
        name = inverse.get(self.orientation, self.orientation)
        return self.model_copy(update={"orientation": name}).orient(patterns)

    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes the patterns' physics.

        Where the ROI lies on the detector, how the frame is turned and which unit a
        number was given in do not matter; numbers are taken to 9 digits.
        """
        physics = {
            "wavelength": self.wavelength_angstrom,
            "spacing": self.d_spacing_angstrom,
            "distance": self.detector_distance_m,
            "pixel": self.binned_pixel_um,
            "shape": self.pattern_shape,
            "center": self.pattern_center,
            "tilt": self.detector_tilt_deg,
            "delta_theta": self.delta_theta_deg,
            "thickness": self.thickness_nm,
            "blur": self.pupil_blur_px,
            "optics": self.optics.kind,
            "pupil": self.pupil_px,
        }
        text = json.dumps(physics, sort_keys=True, default=float, allow_nan=False)
        rounded = json.dumps(
            json.loads(text, parse_float=lambda s: f"{float(s) + 0.0:.9g}"), sort_keys=True
        )
        return hashlib.sha256(rounded.encode()).hexdigest()[:16]


_TAGS = ("zone_plate", "rectangular")
_FITTED = ("binning", "roi_shape")
_SWAPPING = ("transpose", "rotate_90", "rotate_270", "antitranspose")


def _derive_one(
    values: dict[str, Any], target: str, sources: tuple[str, ...], formula: Any
) -> None:
    """Fill `target` from `sources`; refuse a contradiction; name what is missing."""
    given = [values.get(name) for name in sources]
    missing = [name for name, value in zip(sources, given, strict=True) if value is None]
    if missing:
        if values.get(target) is None:
            raise ValueError(f"{' and '.join(missing)} missing: give it, or {target}")
        return
    try:
        numbers = [float(value) for value in given if value is not None]
        if min(numbers) <= 0:
            raise ValueError
        derived = float(formula(*numbers))
    except (TypeError, ValueError):
        pairs = ", ".join(f"{n} = {v!r}" for n, v in zip(sources, given, strict=True))
        raise ValueError(f"{pairs}: must be positive numbers") from None
    if values.get(target) is None:
        values[target] = derived
    elif not math.isclose(float(values[target]), derived, rel_tol=1e-3):
        pairs = ", ".join(f"{n} = {v}" for n, v in zip(sources, given, strict=True))
        raise ValueError(
            f"contradiction: {target} = {values[target]} but {pairs} give {derived:.6g}; "
            "give one of them"
        )


def _fitting_binning(half_width: float, roi_shape: tuple[int, int] | None) -> int:
    """Choose the smallest binning that fits the pupil; it blurs the film's fringes least.

    A given ROI is divided into whole binned pixels, 8 or more a side; if no such binning is
    large enough, the largest.
    """
    needed = math.ceil(half_width / LARGEST_PUPIL_PX - 1e-9)
    if roi_shape is None:
        return min(max(needed, 1), _LARGEST_BINNING)
    most = min(_LARGEST_BINNING, min(roi_shape) // _SMALLEST_PATTERN)
    whole = [b for b in range(1, most + 1) if math.gcd(*roi_shape) % b == 0] or [1]
    return next((b for b in whole if b >= needed), whole[-1])


def _rounded_down(value: float) -> float:
    """Three digits, never more than the value."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.floor(value / step) * step
