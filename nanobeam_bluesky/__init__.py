"""Strain and tilt maps from scanning X-ray diffraction microscopy, live in Bluesky."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanobeam_bluesky.documents import to_maps
    from nanobeam_bluesky.geometry import ROI, Geometry

__all__ = ["ROI", "Geometry", "to_maps"]

_HOMES = {"ROI": "geometry", "Geometry": "geometry", "to_maps": "documents"}


def __getattr__(name: str) -> Any:
    # on first use: a part that needs little should not import all
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
