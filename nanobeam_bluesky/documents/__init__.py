"""Bluesky documents in, frame references, estimates and derived documents out."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy

if TYPE_CHECKING:
    from nanobeam_bluesky.documents.derived_run import DerivedRun, Document
    from nanobeam_bluesky.documents.frames import FrameReader, ReadStatus
    from nanobeam_bluesky.documents.maps import to_maps
    from nanobeam_bluesky.documents.pipeline import Executor, RunPipeline, Tally
    from nanobeam_bluesky.documents.processing import AnalyzerChoice, Processed, Processor, Task
    from nanobeam_bluesky.documents.references import PointBlock, RunReferences, StoredRows
    from nanobeam_bluesky.documents.replay import derive, read_documents
    from nanobeam_bluesky.documents.scan_grid import ScanGrid

__all__ = [
    "AnalyzerChoice",
    "DerivedRun",
    "Document",
    "Executor",
    "FrameReader",
    "PointBlock",
    "Processed",
    "Processor",
    "ReadStatus",
    "RunPipeline",
    "RunReferences",
    "ScanGrid",
    "StoredRows",
    "Tally",
    "Task",
    "derive",
    "read_documents",
    "to_maps",
]

__getattr__ = lazy(
    __name__,
    {
        "AnalyzerChoice": "processing",
        "DerivedRun": "derived_run",
        "Document": "derived_run",
        "Executor": "pipeline",
        "FrameReader": "frames",
        "PointBlock": "references",
        "Processed": "processing",
        "Processor": "processing",
        "ReadStatus": "frames",
        "RunPipeline": "pipeline",
        "RunReferences": "references",
        "ScanGrid": "scan_grid",
        "StoredRows": "references",
        "Tally": "pipeline",
        "Task": "processing",
        "derive": "replay",
        "read_documents": "replay",
        "to_maps": "maps",
    },
)
