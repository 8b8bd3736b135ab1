"""Bluesky documents in, frame references, estimates and derived documents out."""

from nanobeam_bluesky.documents.derived_run import DerivedRun, Document
from nanobeam_bluesky.documents.frames import FrameReader, ReadStatus
from nanobeam_bluesky.documents.maps import to_maps
from nanobeam_bluesky.documents.pipeline import Executor, RunPipeline, Tally
from nanobeam_bluesky.documents.processing import AnalyzerChoice, Processed, Processor, Task
from nanobeam_bluesky.documents.references import PointBlock, RunReferences, StoredRows
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
    "to_maps",
]
