"""Stored runs: found by queries or made of plain files, analysed, compared and combined."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy

if TYPE_CHECKING:
    from nanobeam_bluesky.retrospective.analysis import Analysis, analyze
    from nanobeam_bluesky.retrospective.combination import Combined, combine
    from nanobeam_bluesky.retrospective.comparison import Comparison, compare
    from nanobeam_bluesky.retrospective.ingestion import Ingested, ingest
    from nanobeam_bluesky.retrospective.runs import Query, find_catalog

__all__ = [
    "Analysis",
    "Combined",
    "Comparison",
    "Ingested",
    "Query",
    "analyze",
    "combine",
    "compare",
    "find_catalog",
    "ingest",
]

__getattr__ = lazy(
    __name__,
    {
        "Analysis": "analysis",
        "Combined": "combination",
        "Comparison": "comparison",
        "Ingested": "ingestion",
        "Query": "runs",
        "analyze": "analysis",
        "combine": "combination",
        "compare": "comparison",
        "find_catalog": "runs",
        "ingest": "ingestion",
    },
)
