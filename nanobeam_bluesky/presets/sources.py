"""Sources: texts that say where in a run's documents a value is, and what is found there.

``start:scan.energy`` is a dotted key of the start document, ``baseline:energy`` a reading of the
baseline stream, ``config:eiger_distance`` one of the detector's configuration. The last part of
a key of the start document may pick items of a list, ``start:scan.scan_input[0:2]``; names of
readings may have a ``*`` for any text, ``config:*-distance``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import numpy as np

from nanobeam_bluesky.geometry import GeometryError

__all__ = ["Found", "Lookup", "check_source", "describe", "in_units", "unit_registry"]

SCOPES = ("start", "baseline", "config")
_UNITS = ("keV", "m", "um", "nm", "mm", "deg", "mrad", "angstrom")
_MODIFIED = {"from", "units", "offset"}
_UNIT = re.compile(r"[^\d*^]{1,30}")
"""A unit by name, such as "mdeg"; pint would evaluate any expression, 9**9**9 among them."""
_ITEMS = re.compile(r"\[(\d+|\d*:\d*)\]")


@dataclass(frozen=True)
class Found:
    """A value as it was found."""

    value: Any
    units: Any
    """Unit that the document or the preset says; None or a text, if all is well."""
    where: str
    """E.g. "start['nanobeam']['energy_keV']" or "the preset"."""
    offset: float = 0.0
    """To add once the value is in the field's unit."""


@dataclass(frozen=True)
class Lookup:
    """Documents of one run to look values up in."""

    start: Mapping[str, Any]
    baseline: Mapping[str, Any]
    config: Mapping[str, Any]

    def find(self, source: Any) -> Found | None:
        """Return the first of the sources that is there; a constant is itself."""
        units, offset = None, 0.0
        if isinstance(source, Mapping) and "from" in source:
            units, offset = source.get("units"), source.get("offset", 0.0)
            source = source["from"]
        if not _is_source(source):
            return None if source is None else Found(source, units, "the preset", offset)
        for text in [source] if isinstance(source, str) else source:
            scope, _, key = text.partition(":")
            document: Mapping[str, Any] = getattr(self, scope)
            if scope != "start" and "*" in key:
                key = next((k for k in sorted(document) if fnmatchcase(k, key)), key)
            value = walk(document, key) if scope == "start" else document.get(key)
            if value is None:
                continue
            where = describe(f"{scope}:{key}")
            if isinstance(value, Mapping) and "value" in value:
                return Found(value["value"], value.get("units") or units, where, offset)
            return Found(value, units, where, offset)
        return None


def walk(document: Mapping[str, Any], dotted: str) -> Any:
    """Return what a dotted key, with items of a list at the end of a part, leads to; or None."""
    value: Any = document
    for part in dotted.split("."):
        name, bracket, _ = part.partition("[")
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
        if bracket:
            value = _items(value, part[len(name) + 1 : -1])
    return value


def _items(values: Any, index: str) -> Any:
    if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
        return None
    first, colon, stop = index.partition(":")
    if not colon:
        return values[int(first)] if int(first) < len(values) else None
    end = int(stop) if stop else len(values)
    return values[int(first or 0) : end] if end <= len(values) else None


def describe(source: Any) -> str:
    """Say a source as a user would write it: start['nanobeam']['energy_keV']."""
    if isinstance(source, Mapping):
        source = source.get("from", source)
    if not _is_source(source):
        return "the preset"
    texts = []
    for item in [source] if isinstance(source, str) else source:
        scope, _, key = item.partition(":")
        if scope == "start":
            parts = [part.partition("[") for part in key.split(".")]
            texts.append("start" + "".join(f"['{p[0]}']{p[1]}{p[2]}" for p in parts))
        else:
            texts.append(f"{'configuration' if scope == 'config' else scope} {key!r}")
    return " and ".join(texts)


def check_source(source: Any) -> None:
    """Raise ValueError if this is neither a constant nor a well-formed source."""
    if isinstance(source, Mapping):
        if "from" not in source:
            return  # a constant table, such as optics
        unknown = sorted(set(source) - _MODIFIED)
        if unknown:
            raise ValueError(f"{', '.join(unknown)} beside from; known are units and offset")
        source = source["from"]
        if not _is_source(source):
            raise ValueError(f"from = {source!r}: expected a source such as 'start:scan.energy'")
    texts = [source] if isinstance(source, str) else source
    if not isinstance(texts, list) or not all(isinstance(t, str) and ":" in t for t in texts):
        return
    for text in texts:
        scope, _, key = text.partition(":")
        if scope not in SCOPES or not key:
            raise ValueError(f"{text!r}: a source begins with start:, baseline: or config:")
        for part in key.split(".") if scope == "start" else ():
            name, bracket, _ = part.partition("[")
            if not name or (bracket and not _ITEMS.fullmatch(part[len(name) :])):
                raise ValueError(
                    f"{text!r}: expected names between dots, the items of a list as [0] or [0:2]"
                )


def _is_source(source: Any) -> bool:
    items = [source] if isinstance(source, str) else source
    return (
        isinstance(items, list)
        and bool(items)
        and all(isinstance(i, str) and i.partition(":")[0] in SCOPES for i in items)
    )


def unit_of(field: str) -> str | None:
    """Return the unit that a field's name ends in, if it is one that pint knows."""
    suffix = field.rpartition("_")[2]
    return suffix if suffix in _UNITS else None


def in_units(field: str, found: Found) -> Any:
    """Convert to the unit that the field's name ends in, and add the offset.

    Raises
    ------
    GeometryError
        If the value cannot be converted.
    """
    value = (
        found.value.tolist() if isinstance(found.value, np.ndarray | np.generic) else found.value
    )
    target, units = unit_of(field), found.units
    try:
        if target is not None and units not in (None, "", target):
            if not isinstance(units, str) or not _UNIT.fullmatch(units):
                raise ValueError("not the name of a unit")
            quantity = unit_registry().Quantity(float(value), units)
            value = float(quantity.to(target).magnitude)
        return float(value) + found.offset if found.offset else value
    except Exception as error:  # pint raises of many kinds, its parser's among them
        raise GeometryError(
            f"{field}: cannot turn {value!r} {units!r} ({found.where}) into {target}: "
            f"{str(error) or type(error).__name__}"
        ) from None


@cache
def unit_registry() -> Any:
    """Return pint's registry; making it takes most of a second."""
    import pint

    return pint.UnitRegistry()
