"""``nanobeam analyze``: what `analyze` does, on the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from nanobeam_bluesky.retrospective.analysis import Analysis, analyze
from nanobeam_bluesky.retrospective.runs import RawRun

__all__ = ["run_analyze"]


def run_analyze(
    runs: Any, methods: Sequence[str], console: Console, errors: Console, **options: Any
) -> list[Analysis]:
    """Analyse runs by each method, a line for each run; return what became of them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results = []
    with ProgressBar(*columns, console=errors, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(run: RawRun, done: int, total: int) -> None:
            if run.uid not in tasks:
                tasks[run.uid] = bar.add_task(_name(run.start, run.uid), total=total)
            bar.update(tasks[run.uid], completed=done)

        for method in methods:
            for analysis in analyze(runs, analyzer=method, progress=progress, **options):  # type: ignore[arg-type]
                if analysis.raw_uid in tasks:
                    bar.remove_task(tasks.pop(analysis.raw_uid))
                results.append(analysis)
                say = errors if analysis.failed else console
                say.print(
                    _line(analysis, method if len(methods) > 1 else ""),
                    style="red" if analysis.failed else None,
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
    counts = Counter(analysis.status for analysis in results)
    if not results:
        errors.print("no run matches", style="red")
    elif len(results) > 1:
        total = ", ".join(f"{n} {status}" for status, n in counts.items())
        console.print(f"{len(results)} runs: {total}", highlight=False)
    return results


def _name(start: Any, uid: str) -> str:
    return " ".join(str(part) for part in (start.get("scan_id"), uid[:8]) if part is not None)


def _line(analysis: Analysis, method: str) -> str:
    """Return what a user wants to know of a run."""
    words = [_name(analysis.start, analysis.raw_uid), method, analysis.status]
    if analysis.derived_uid is not None:
        words.append(f"→ {analysis.derived_uid[:8]}")
    if analysis.points:
        about = "about " if analysis.status == "pending" else ""
        flagged = f", {analysis.flagged} flagged" if analysis.flagged else ""
        words.append(
            f"{analysis.points} points{flagged}, {analysis.model}, {about}{analysis.seconds:.3g} s"
        )
    return " ".join(filter(None, words)) + (f": {analysis.reason}" if analysis.reason else "")
