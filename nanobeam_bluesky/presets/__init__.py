"""Presets: small TOML files that say where a facility keeps what a `Geometry` needs.

See ``default.toml`` beside this module for the layout. A *source* is a text such as
``start:nanobeam.energy_keV``, ``baseline:energy`` or ``config:eiger_distance``; a field
takes the first of its sources that is there. Anything else is a constant.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from nanobeam_bluesky.geometry import ROI, Geometry, GeometryError

__all__ = ["MissingMetadataError", "Preset", "ScanMetadata", "unit_registry"]

_SCOPES = ("start", "baseline", "config")
_UNITS = {
    "keV": "keV",
    "m": "m",
    "um": "um",
    "nm": "nm",
    "mm": "mm",
    "deg": "deg",
    "mrad": "mrad",
    "angstrom": "angstrom",
}
_REQUIRED: tuple[tuple[tuple[str, ...], ...], ...] = (
    # each row: the alternatives, any one of which is enough
    (("energy_keV",), ("wavelength_angstrom",)),
    (("lattice_c_angstrom", "reflection_l"), ("d_spacing_angstrom",)),
    (("detector_distance_m",),),
    (("pixel_size_um",),),
    (("bragg_center_px",),),
    (("thickness_nm",),),
    (("optics",),),
)


class MissingMetadataError(GeometryError):
    """Something is not there yet: it may still come with the baseline."""


@dataclass(frozen=True)
class ScanMetadata:
    """How the scan visits its points."""

    shape: tuple[int, int]
    """Points along (slow, fast), e.g. (64, 64)."""
    snaking: bool
    """Whether every second row is flown backwards."""
    motors: tuple[str, str]
    """Names of the (slow, fast) motors, e.g. ("sy", "sx")."""
    extents: tuple[tuple[float, float], tuple[float, float]] | None
    """First and last nominal position along (slow, fast)."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _Match(_Strict):
    start: tuple[str, ...] = ()
    """Dotted keys that the start document must have, e.g. ("nanobeam",)."""
    plan_name: tuple[str, ...] = ()
    """Plan names, any of which matches; all if empty."""


class _Detector(_Strict):
    key: Any = None
    """Data key of the frames; the only image of the run if absent."""


class _Scan(_Strict):
    shape: Any
    """Number of points along both axes."""
    order: Literal["slow-fast", "fast-slow"] = "slow-fast"
    """The order of `shape`, `motors` and `extents`."""
    snaking: Any = False
    """One boolean, or one for each axis."""
    motors: Any = None
    """Names of the two motors."""
    extents: Any = None
    """First and last position of each motor."""


class Preset(_Strict):
    """Where one facility keeps the geometry and the shape of its scans."""

    name: str
    """Name of the preset, e.g. "default"."""
    description: str = ""
    """One line for people."""
    match: _Match
    """Which runs are meant."""
    detector: _Detector = _Detector()
    """Where the frames are."""
    scan: _Scan
    """How the scan visits its points."""
    geometry: dict[str, Any]
    """For each field of `Geometry`: a source, a list of sources, ``{from = …, units = …}``
    or a constant."""

    @field_validator("geometry")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(value) - set(Geometry.model_fields))
        if unknown:
            raise ValueError(
                f"unknown field(s) {', '.join(unknown)}; "
                f"known are {', '.join(sorted(Geometry.model_fields))}"
            )
        return value

    @classmethod
    def load(cls, preset: Preset | str | Path) -> Preset:
        """Return a preset from its name, the path of a TOML file, or itself.

        Raises
        ------
        GeometryError
            If there is no such preset or it is not valid.
        """
        return preset if isinstance(preset, Preset) else _load(preset)

    def matches(self, start: Mapping[str, Any]) -> bool:
        """Whether this start document describes a raw SXDM run of this facility.

        A derived run (one with ``original_run_uid``) never matches.
        """
        if start.get("original_run_uid") is not None:
            return False
        if self.match.plan_name and start.get("plan_name") not in self.match.plan_name:
            return False
        return all(_walk(start, key) is not None for key in self.match.start)

    def detector_key(self, start: Mapping[str, Any]) -> str | None:
        """Data key of the frames, or None to take the only image."""
        found = _Lookup(start, {}, {}).find(self.detector.key)
        return None if found is None else str(found.value)

    def scan_metadata(self, start: Mapping[str, Any]) -> ScanMetadata:
        """Read shape, snaking, motors and extents; `GeometryError` names what is wrong."""
        look = _Lookup(start, {}, {})
        where = f"run {str(start.get('uid', '?'))[:8]}"
        found = {name: look.find(source) for name, source in self.scan if name != "order"}

        def pair(name: str, example: str) -> list[Any] | None:
            item = found[name]
            if item is None:
                return None
            try:
                values = list(item.value)
            except TypeError:
                values = []
            if len(values) != 2:
                raise GeometryError(
                    f"{where}: scan {name} = {item.value!r} at {item.where}: "
                    f"expected two, {self.scan.order}, e.g. {example}"
                )
            return values if self.scan.order == "slow-fast" else values[::-1]

        shape = pair("shape", "[64, 64]")
        if shape is None:
            raise MissingMetadataError(
                f"{where}: scan shape missing: looked at {_describe(self.scan.shape)}; "
                "set it, e.g. shape = [64, 64], or name it in the preset"
            )
        if not all(_is_count(n) for n in shape):
            raise GeometryError(
                f"{where}: scan shape = {shape!r} at {_describe(self.scan.shape)}: "
                "expected two whole numbers of 1 or more"
            )
        snaking = found["snaking"].value if found["snaking"] is not None else False
        if not isinstance(snaking, bool):
            flags = pair("snaking", "[False, True]")
            assert flags is not None
            snaking = bool(flags[1])
        motors = pair("motors", '["sy", "sx"]') or ["slow", "fast"]
        extents = pair("extents", "[[0, 1], [0, 1]]")
        try:
            limits = extents and tuple((float(a), float(b)) for a, b in extents)
        except (TypeError, ValueError):
            raise GeometryError(
                f"{where}: scan extents = {extents!r}: expected [[first, last], [first, last]]"
            ) from None
        return ScanMetadata(
            shape=(int(shape[0]), int(shape[1])),
            snaking=snaking,
            motors=(str(motors[0]), str(motors[1])),
            extents=limits or None,  # type: ignore[arg-type]
        )

    def geometry_values(
        self,
        start: Mapping[str, Any],
        *,
        baseline: Mapping[str, Any] | None = None,
        configuration: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Look every field up and convert it to its unit; absent ones are left out."""
        look = _Lookup(start, baseline or {}, configuration or {})
        values: dict[str, Any] = {}
        for field, source in self.geometry.items():
            found = look.find(source)
            if found is not None:
                values[field] = _in_units(field, found)
        return values

    def read_geometry(
        self,
        start: Mapping[str, Any],
        *,
        baseline: Mapping[str, Any] | None = None,
        configuration: Mapping[str, Any] | None = None,
        roi: ROI | None = None,
    ) -> Geometry:
        """Read a `Geometry` from a run; `roi` takes the place of the run's own.

        Raises
        ------
        MissingMetadataError
            If a required field is nowhere: it may still come with the baseline.
        GeometryError
            If a value is impossible.
        """
        where = f"run {str(start.get('uid', '?'))[:8]}"
        values = self.geometry_values(start, baseline=baseline, configuration=configuration)
        problems = []
        for alternatives in _REQUIRED:
            if any(all(name in values for name in group) for group in alternatives):
                continue
            names = " or ".join(" with ".join(group) for group in alternatives)
            places = [
                _describe(self.geometry[name])
                for group in alternatives
                for name in group
                if name in self.geometry
            ]
            looked = ", ".join(places) if places else "nowhere: the preset names no source"
            problems.append(f"{names} missing: looked at {looked}")
        if problems:
            raise MissingMetadataError(
                f"{where}: {'; '.join(problems)}; set it there or name its place in the preset "
                f"(now {self.name!r})"
            )
        if roi is not None:
            values["roi_shape"] = (roi.height, roi.width)
            values["roi_origin_px"] = (roi.row, roi.col)
            where += f" with roi = {roi!r}"
        return Geometry.parse(values, where=where)


@dataclass(frozen=True)
class _Found:
    value: Any
    units: str | None
    where: str


@dataclass(frozen=True)
class _Lookup:
    start: Mapping[str, Any]
    baseline: Mapping[str, Any]
    config: Mapping[str, Any]

    def find(self, source: Any) -> _Found | None:
        """Return the first of the sources that is there."""
        units = None
        if isinstance(source, Mapping) and "from" in source:
            units, source = source.get("units"), source["from"]
        if not _is_source(source):
            return None if source is None else _Found(source, units, "the preset")
        for text in [source] if isinstance(source, str) else source:
            scope, _, key = text.partition(":")
            document: Mapping[str, Any] = getattr(self, scope)
            value = _walk(document, key) if scope == "start" else document.get(key)
            if value is None:
                continue
            if isinstance(value, Mapping) and "value" in value:
                return _Found(value["value"], value.get("units") or units, _describe(text))
            return _Found(value, units, _describe(text))
        return None


def _is_source(source: Any) -> bool:
    items = [source] if isinstance(source, str) else source
    return (
        isinstance(items, list)
        and bool(items)
        and all(isinstance(i, str) and i.partition(":")[0] in _SCOPES for i in items)
    )


def _walk(document: Mapping[str, Any], dotted: str) -> Any:
    value: Any = document
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _describe(source: Any) -> str:
    """Say a source as a user would write it: start['nanobeam']['energy_keV']."""
    if isinstance(source, Mapping):
        source = source.get("from", source)
    if not _is_source(source):
        return "the preset"
    texts = []
    for item in [source] if isinstance(source, str) else source:
        scope, _, key = item.partition(":")
        if scope == "start":
            texts.append("start" + "".join(f"['{part}']" for part in key.split(".")))
        else:
            texts.append(f"{'configuration' if scope == 'config' else scope} {key!r}")
    return " and ".join(texts)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def _in_units(field: str, found: _Found) -> Any:
    """Convert to the unit that the field's name ends in."""
    value = (
        found.value.tolist() if isinstance(found.value, np.ndarray | np.generic) else found.value
    )
    target = _UNITS.get(field.rpartition("_")[2])
    if target is None or found.units in (None, target):
        return value
    try:
        return float(unit_registry().Quantity(float(value), found.units).to(target).magnitude)
    except (TypeError, ValueError, AttributeError) as error:  # pint's own are among them
        raise GeometryError(
            f"{field}: cannot turn {value!r} {found.units!r} ({found.where}) into {target}: {error}"
        ) from None


@cache
def unit_registry() -> Any:
    """Return pint's registry; making it takes most of a second."""
    import pint

    return pint.UnitRegistry()


@cache
def _load(preset: str | Path) -> Preset:
    shipped = files(__name__)
    names = sorted(
        p.name.removesuffix(".toml") for p in shipped.iterdir() if p.name[-5:] == ".toml"
    )
    if str(preset) in names:
        text = shipped.joinpath(f"{preset}.toml").read_text("utf-8")
    else:
        path = Path(preset)
        if not path.is_file():
            raise GeometryError(
                f"no preset {str(preset)!r}: shipped are {', '.join(names)}; "
                "or give the path of a TOML file"
            )
        text = path.read_text("utf-8")
    try:
        return Preset.model_validate({"name": Path(preset).stem, **tomllib.loads(text)})
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise GeometryError(f"preset {str(preset)!r}: {error}") from None
