"""Stored runs: found by queries or made of plain files, analysed, compared and combined."""

# not lazily: to import a module would put it in the place of its function
from nanobeam_bluesky.retrospective.ingest import Ingested, ingest

__all__ = ["Ingested", "ingest"]
