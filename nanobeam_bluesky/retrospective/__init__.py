"""Stored runs: found by queries or made of plain files, analysed, compared and combined."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy

if TYPE_CHECKING:
    from nanobeam_bluesky.retrospective.analysis import Analysis, analyze
    from nanobeam_bluesky.retrospective.runs import Query, find_catalog

__all__ = ["Analysis", "Query", "analyze", "find_catalog"]

__getattr__ = lazy(
    __name__,
    {"Analysis": "analysis", "Query": "runs", "analyze": "analysis", "find_catalog": "runs"},
)
