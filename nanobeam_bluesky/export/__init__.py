"""Maps and scans as files that others open: pictures, tables, NeXus, Zarr, a report."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy

if TYPE_CHECKING:
    from nanobeam_bluesky.export.files import run_title, to_csv, to_png, to_tiff
    from nanobeam_bluesky.export.nexus import Frames, write_nexus
    from nanobeam_bluesky.export.report import Report
    from nanobeam_bluesky.export.zarr import write_zarr

__all__ = [
    "Frames",
    "Report",
    "run_title",
    "to_csv",
    "to_png",
    "to_tiff",
    "write_nexus",
    "write_zarr",
]

__getattr__ = lazy(
    __name__,
    {
        "Frames": "nexus",
        "Report": "report",
        "run_title": "files",
        "to_csv": "files",
        "to_png": "files",
        "to_tiff": "files",
        "write_nexus": "nexus",
        "write_zarr": "zarr",
    },
)
