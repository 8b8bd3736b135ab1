"""`Preset`: where one facility keeps the geometry and the shape of its scans."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from nanobeam_bluesky.geometry import ROI, Geometry, GeometryError
from nanobeam_bluesky.presets.sources import (
    Found,
    Lookup,
    check_source,
    describe,
    in_units,
    walk,
)

__all__ = ["Finding", "MissingMetadataError", "PositionKey", "Preset", "ScanMetadata"]

AUTO = ("hxn", "srx", "grid-scan", "ophyd-async", "default")
"""Order in which "auto" tries the shipped presets: what matches fewer runs comes first."""

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


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PositionKey(_Strict):
    """Where the positions of a motor are recorded, if not under its own name."""

    key: str
    """Data key, e.g. "inenc2_val". Several samples of a point are averaged."""
    scale: float = 1.0
    """Position per recorded unit, e.g. -9.7e-5 (µm per count of an encoder)."""
    units: str | None = None
    """Unit of the position, e.g. "um"; that of the data key if absent."""


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
    positions: Mapping[str, PositionKey] = field(default_factory=dict)
    """By motor, where its positions are recorded; under its own name if it is not here."""


@dataclass(frozen=True)
class Finding:
    """What a preset found for one field, or where it looked."""

    value: Any
    """In the unit of the field's name; None if it is nowhere or cannot be converted."""
    where: str
    """E.g. "baseline 'energy'"; where it was looked for if it is nowhere."""
    problem: str = ""
    """Why a value that is there cannot be used."""


class _Match(_Strict):
    start: tuple[str, ...] = ()
    """Dotted keys that the start document must have, e.g. ("nanobeam",)."""
    plan_name: tuple[str, ...] = ()
    """Plan names, any of which matches; all if empty."""
    equal: dict[str, Any] = {}
    """Dotted keys with the value, or the values any of which, the start document must have
    there, e.g. {"scan.type": "2D_FLY_PANDA"}; a list there must hold it."""


class _Detector(_Strict):
    key: Any = None
    """Data key of the frames; the only image of the run if absent."""
    name: Any = None
    """Name(s) of the run's detectors; the first of `Preset.detectors` among them is taken."""


class _Scan(_Strict):
    shape: Any
    """Number of points along both axes."""
    order: Literal["slow-fast", "fast-slow"] = "slow-fast"
    """The order of `shape`, `snaking`, `motors` and `extents` where one source has both axes."""
    snaking: Any = False
    """One flag, or one for each axis."""
    motors: Any = None
    """Names of the two motors."""
    extents: Any = None
    """First and last position of each motor."""
    last: Literal["included", "excluded"] = "included"
    """Whether the last position is that of the last point, or one step beyond it."""


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
    detectors: dict[str, dict[str, Any]] = {}
    """By name, what is known of a detector: the data key of its frames (`key`) and constants
    for fields of `Geometry` that no source has, e.g. {"merlin1": {"pixel_size_um": 55}}."""
    scan: _Scan
    """How the scan visits its points."""
    positions: dict[str, PositionKey] = {}
    """By motor, where its positions are recorded, if not under its name."""
    geometry: dict[str, Any]
    """For each field of `Geometry`: a source, a list of sources,
    ``{from = …, units = …, offset = …}`` or a constant."""

    @field_validator("geometry")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_fields(value)
        return value

    @field_validator("detectors")
    @classmethod
    def _known_of_detectors(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for constants in value.values():
            _check_fields({name for name in constants if name != "key"})
        return value

    @model_validator(mode="after")
    def _sources(self) -> Preset:
        for source in (
            *self.geometry.values(),
            *(value for _, value in self.detector),
            *(axis for _, value in self.scan for axis in _axes(value)),
        ):
            check_source(source)
        return self

    @classmethod
    def load(cls, preset: Preset | str | Path) -> Preset:
        """Return a preset from its name, the path of a TOML file, or itself.

        Raises
        ------
        GeometryError
            If there is no such preset or it is not valid.
        """
        return preset if isinstance(preset, Preset) else _load(preset)

    @classmethod
    def choices(cls, preset: Preset | str | Path) -> tuple[Preset, ...]:
        """Return the presets to try on a run, in order: one, or with "auto" the shipped ones.

        The first that `matches` the run is to be taken.
        """
        return tuple(cls.load(p) for p in (AUTO if preset == "auto" else (preset,)))

    def matches(self, start: Mapping[str, Any]) -> bool:
        """Whether this start document describes a raw SXDM run of this facility.

        A derived run (one with ``original_run_uid``) never matches.
        """
        return not self.mismatch(start)

    def mismatch(self, start: Mapping[str, Any]) -> str:
        """Return why the start document is not of a run that is meant; "" if it is."""
        if start.get("original_run_uid") is not None:
            return "start['original_run_uid'] is there: a derived run"
        expected: dict[str, Any] = dict(self.match.equal)
        if self.match.plan_name:
            expected["plan_name"] = list(self.match.plan_name)
        for key, wanted in expected.items():
            options = wanted if isinstance(wanted, list) else [wanted]
            found = walk(start, key)
            if not any(value in options for value in _several(found)):
                words = " or ".join(map(repr, options))
                return f"{describe(f'start:{key}')} = {found!r}, expected {words}"
        for key in self.match.start:
            if walk(start, key) is None:
                return f"{describe(f'start:{key}')} is missing"
        return ""

    # ------------------------------------------------------------------- detector

    def detector_key(self, start: Mapping[str, Any]) -> str | None:
        """Data key of the frames, or None to take the only image."""
        key: str | None = self._detector(start)[1].value
        return key

    def detector_finding(self, start: Mapping[str, Any]) -> Finding:
        """Data key of the frames, as far as the start document tells, and where it does."""
        return self._detector(start)[1]

    def _detector(
        self, start: Mapping[str, Any], frames: str | None = None
    ) -> tuple[str | None, Finding]:
        """Name in `detectors`, if it is there, and data key; `frames` if nothing else tells."""
        look = Lookup(start, {}, {})
        found = look.find(self.detector.key)
        if found is not None:
            name, key = self._named(str(found.value))
            return name, Finding(key, found.where)
        found = look.find(self.detector.name)
        if found is not None:
            names = [name for name in self.detectors if name in _several(found.value)]
            if names:
                where = found.where + (f", first of {', '.join(names)}" if names[1:] else "")
                return names[0], Finding(self.detectors[names[0]].get("key"), where)
        name = self._named(frames)[0] if frames is not None else None
        return name, Finding(None, _describe_axes(self.detector.key))

    def _named(self, text: str) -> tuple[str | None, str]:
        """Name and data key of a detector that is named by either."""
        for name, constants in self.detectors.items():
            if text in (name, constants.get("key", name)):
                return name, constants.get("key", text)
        return None, text

    # ----------------------------------------------------------------------- scan

    def scan_findings(self, start: Mapping[str, Any]) -> dict[str, Finding]:
        """Shape, snaking, motors and extents as (slow, fast), unchecked, and where they are.

        Raises
        ------
        GeometryError
            If what is there is not for two axes.
        """
        where = f"run {str(start.get('uid', '?'))[:8]}"
        examples = {
            "shape": "[64, 64]",
            "snaking": "[False, True]",
            "motors": '["sy", "sx"]',
            "extents": "[[0, 1], [0, 1]]",
        }
        findings = {}
        for name, example in examples.items():
            source = getattr(self.scan, name)
            item = _both_axes(source, Lookup(start, {}, {}))
            if item is None:
                findings[name] = Finding(None, _describe_axes(source))
                continue
            if name == "snaking" and (flag := _flag(item.value)) is not None:
                findings[name] = Finding(flag, item.where)
                continue
            try:
                values = list(item.value)
            except TypeError:
                values = []
            if len(values) != 2:
                raise GeometryError(
                    f"{where}: scan {name} = {item.value!r} at {item.where}: "
                    f"expected two, {self.scan.order}, e.g. {example}"
                )
            turned = self.scan.order == "fast-slow" and not _is_by_axis(source)
            findings[name] = Finding(values[::-1] if turned else values, item.where)
        return findings

    def scan_metadata(self, start: Mapping[str, Any]) -> ScanMetadata:
        """Read shape, snaking, motors and extents; `GeometryError` names what is wrong."""
        where = f"run {str(start.get('uid', '?'))[:8]}"
        found = self.scan_findings(start)
        shape = found["shape"].value
        if shape is None:
            raise MissingMetadataError(
                f"{where}: scan shape missing: looked at {found['shape'].where}; "
                "set it, e.g. shape = [64, 64], or name it in the preset"
            )
        if not all(_is_count(n) for n in shape):
            raise GeometryError(
                f"{where}: scan shape = {shape!r} at {found['shape'].where}: "
                "expected two whole numbers of 1 or more"
            )
        snaking = found["snaking"].value or False
        if not isinstance(snaking, bool):
            snaking = bool(snaking[1])
        motors = found["motors"].value or ["slow", "fast"]
        extents = found["extents"].value
        try:
            limits = extents and tuple((float(a), float(b)) for a, b in extents)
        except (TypeError, ValueError):
            raise GeometryError(
                f"{where}: scan extents = {extents!r} at {found['extents'].where}: "
                "expected [[first, last], [first, last]]"
            ) from None
        if limits and self.scan.last == "excluded":
            limits = tuple(
                (a, b - (b - a) / n) for (a, b), n in zip(limits, map(int, shape), strict=True)
            )
        return ScanMetadata(
            shape=(int(shape[0]), int(shape[1])),
            snaking=snaking,
            motors=(str(motors[0]), str(motors[1])),
            extents=limits or None,
            positions={m: self.positions[m] for m in map(str, motors) if m in self.positions},
        )

    # ------------------------------------------------------------------- geometry

    def geometry_findings(
        self,
        start: Mapping[str, Any],
        *,
        baseline: Mapping[str, Any] | None = None,
        configuration: Mapping[str, Any] | None = None,
        frames: str | None = None,
    ) -> dict[str, Finding]:
        """Look every field up and convert it to its unit; see `read_geometry`."""
        look = Lookup(start, baseline or {}, configuration or {})
        detector, _ = self._detector(start, frames)
        constants = self.detectors.get(detector, {}) if detector is not None else {}
        findings = {}
        for name in dict.fromkeys((*self.geometry, *(n for n in constants if n != "key"))):
            source = self.geometry.get(name)
            found = look.find(source)
            if found is None and name in constants:
                found = Found(constants[name], None, f"the preset's detectors.{detector}")
            if found is None:
                findings[name] = Finding(None, self._looked_at(name, source, detector))
                continue
            try:
                findings[name] = Finding(in_units(name, found), found.where)
            except GeometryError as error:
                findings[name] = Finding(None, found.where, str(error))
        return findings

    def _looked_at(self, name: str, source: Any, detector: str | None) -> str:
        """Say where a field was looked for, the table of detectors included."""
        places = describe(source) if source is not None else ""
        known = [n for n, constants in self.detectors.items() if name in constants]
        if known and detector is None:
            places += f" and the preset's detectors ({', '.join(known)}), none of which is named"
        return places.removeprefix(" and ")

    def geometry_values(
        self,
        start: Mapping[str, Any],
        *,
        baseline: Mapping[str, Any] | None = None,
        configuration: Mapping[str, Any] | None = None,
        frames: str | None = None,
    ) -> dict[str, Any]:
        """Look every field up and convert it to its unit; absent ones are left out."""
        found = self.geometry_findings(
            start, baseline=baseline, configuration=configuration, frames=frames
        )
        problems = [finding.problem for finding in found.values() if finding.problem]
        if problems:
            raise GeometryError("; ".join(problems))
        return {name: f.value for name, f in found.items() if f.value is not None}

    def missing(self, found: Mapping[str, Finding]) -> list[tuple[str, str]]:
        """Return the required fields that are nowhere, as one text, and where they were sought."""
        gaps = []
        for alternatives in _REQUIRED:
            names = [name for group in alternatives for name in group]
            there = {n for n in names if n in found and found[n].value is not None}
            present = there | {n for n in names if n in found and found[n].problem}
            if any(present.issuperset(group) for group in alternatives):
                continue
            places = [found[n].where for n in names if n in found and n not in present]
            gaps.append(
                (
                    " or ".join(" with ".join(group) for group in alternatives),
                    ", ".join(places) or "nowhere: the preset names no source",
                )
            )
        return gaps

    def read_geometry(
        self,
        start: Mapping[str, Any],
        *,
        baseline: Mapping[str, Any] | None = None,
        configuration: Mapping[str, Any] | None = None,
        frames: str | None = None,
        roi: ROI | None = None,
    ) -> Geometry:
        """Read a `Geometry` from a run.

        Parameters
        ----------
        start
            The run-start document.
        baseline, configuration
            Readings of the baseline, and of the detector's configuration: name → value, or
            name → ``{"value": …, "units": …}``.
        frames
            Data key of the frames where it is known: finds the detector in `detectors` if the
            start document does not name it.
        roi
            Takes the place of the run's own.

        Raises
        ------
        MissingMetadataError
            If a required field is nowhere: it may still come with the baseline.
        GeometryError
            If a value is impossible.
        """
        where = f"run {str(start.get('uid', '?'))[:8]}"
        found = self.geometry_findings(
            start, baseline=baseline, configuration=configuration, frames=frames
        )
        problems = [finding.problem for finding in found.values() if finding.problem]
        if problems:
            raise GeometryError(f"{where}: {'; '.join(problems)}")
        gaps = [f"{names} missing: looked at {places}" for names, places in self.missing(found)]
        if gaps:
            raise MissingMetadataError(
                f"{where}: {'; '.join(gaps)}; set it there or name its place in the preset "
                f"(now {self.name!r})"
            )
        values = {name: f.value for name, f in found.items() if f.value is not None}
        if roi is not None:
            values["roi_shape"] = (roi.height, roi.width)
            values["roi_origin_px"] = (roi.row, roi.col)
            where += f" with roi = {roi!r}"
        return Geometry.parse(values, where=where)


def _check_fields(names: Any) -> None:
    unknown = sorted(set(names) - set(Geometry.model_fields))
    if unknown:
        raise ValueError(
            f"unknown field(s) {', '.join(unknown)}; "
            f"known are {', '.join(sorted(Geometry.model_fields))}"
        )


def _several(value: Any) -> list[Any]:
    """Return the items of a list, the keys of a table, or the value alone."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return list(value) if isinstance(value, list | tuple | Mapping) else [value]


def _is_by_axis(source: Any) -> bool:
    return isinstance(source, Mapping) and set(source) == {"slow", "fast"}


def _axes(source: Any) -> Sequence[Any]:
    """Both sources of one that is given by axis, else the source."""
    return [source["slow"], source["fast"]] if _is_by_axis(source) else [source]


def _both_axes(source: Any, look: Lookup) -> Found | None:
    """Look up (slow, fast) of a source that is given by axis, else the source."""
    items = [look.find(axis) for axis in _axes(source)]
    if None in items:
        return None
    if len(items) == 1:
        return items[0]
    values = [item.value for item in items if item is not None]
    return Found(values, None, " and ".join(item.where for item in items if item is not None))


def _describe_axes(source: Any) -> str:
    if source is None:
        return "nowhere: the preset names no source"
    return " and ".join(describe(axis) for axis in _axes(source))


def _flag(value: Any) -> bool | None:
    """Read one flag: also 0 and 1, and the text that bluesky writes as ``snake_axes``."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if isinstance(value, str):  # repr of a flag, or of the list of motors that snake
        return value not in ("False", "None", "[]", "()", "0", "")
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


@cache
def _shipped() -> dict[str, str]:
    """Texts of the shipped presets, by name."""
    return {
        path.name.removesuffix(".toml"): path.read_text("utf-8")
        for path in files("nanobeam_bluesky.presets").iterdir()
        if path.name.endswith(".toml")
    }


def _load(preset: str | Path) -> Preset:
    # a file is read anew each time: people edit it beside a running session
    text = _shipped().get(str(preset))
    try:
        if text is None:
            text = Path(preset).read_text("utf-8")
        return Preset.model_validate({"name": Path(preset).stem, **tomllib.loads(text)})
    except FileNotFoundError:
        raise GeometryError(
            f"no preset {str(preset)!r}: shipped are {', '.join(sorted(_shipped()))}; "
            "or give the path of a TOML file"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise GeometryError(f"preset {str(preset)!r}: {error}") from None
