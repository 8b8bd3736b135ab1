"""Stored runs: found by queries or made of plain files, analysed, compared and combined."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy

if TYPE_CHECKING:
    from nanobeam_bluesky.retrospective.analysis import Analysis, analyze
    from nanobeam_bluesky.retrospective.combine import Combined, combine
    from nanobeam_bluesky.retrospective.compare import Agreement, Comparison, compare
    from nanobeam_bluesky.retrospective.runs import Query

__all__ = [
    "Agreement",
    "Analysis",
    "Combined",
    "Comparison",
    "Query",
    "analyze",
    "combine",
    "compare",
]

__getattr__ = lazy(
    __name__,
    {
        "Agreement": "compare",
        "Analysis": "analysis",
        "Combined": "combine",
        "Comparison": "compare",
        "Query": "runs",
        "analyze": "analysis",
        "combine": "combine",
        "compare": "compare",
    },
)
