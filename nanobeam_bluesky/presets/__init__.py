"""Presets: small TOML files that say where a facility keeps what a `Geometry` needs.

See ``docs/reference/presets.md`` for the layout, ``default.toml`` beside this module for an
example. A *source* is a text such as ``start:nanobeam.energy_keV``, ``baseline:energy`` or
``config:eiger_distance``; a field takes the first of its sources that is there. Anything else
is a constant.
"""

from nanobeam_bluesky.presets.preset import (
    Finding,
    MissingMetadataError,
    PositionKey,
    Preset,
    ScanMetadata,
)
from nanobeam_bluesky.presets.sources import unit_registry

__all__ = [
    "Finding",
    "MissingMetadataError",
    "PositionKey",
    "Preset",
    "ScanMetadata",
    "unit_registry",
]
