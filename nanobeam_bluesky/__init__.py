"""Strain and tilt maps from scanning X-ray diffraction microscopy, live in Bluesky."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy

if TYPE_CHECKING:
    from nanobeam_bluesky.documents import to_maps
    from nanobeam_bluesky.geometry import ROI, Geometry
    from nanobeam_bluesky.retrospective import analyze

__all__ = ["ROI", "Geometry", "analyze", "to_maps"]

__getattr__ = lazy(
    __name__,
    {
        "ROI": "geometry",
        "Geometry": "geometry",
        "analyze": "retrospective.analysis",
        "to_maps": "documents.maps",
    },
)
