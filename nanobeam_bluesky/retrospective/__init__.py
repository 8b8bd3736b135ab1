"""Stored runs: found by queries or made of plain files, analysed, compared and combined."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy

if TYPE_CHECKING:
    from nanobeam_bluesky.retrospective.analysis import Analysis, analyze
    from nanobeam_bluesky.retrospective.combination import Combined, combine
    from nanobeam_bluesky.retrospective.comparison import Agreement, Comparison, compare
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
        "Agreement": "comparison",
        "Analysis": "analysis",
        "Combined": "combination",
        "Comparison": "comparison",
        "Query": "runs",
        "analyze": "analysis",
        "combine": "combination",
        "compare": "comparison",
    },
)
