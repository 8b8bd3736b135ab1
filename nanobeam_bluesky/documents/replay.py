"""Documents of stored runs, analysed in this process: no worker, no RunEngine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanobeam_bluesky.documents.derived_run import Document
from nanobeam_bluesky.documents.pipeline import RunPipeline, Tally
from nanobeam_bluesky.documents.processing import AnalyzerChoice, Processor, Task
from nanobeam_bluesky.documents.roots import Roots
from nanobeam_bluesky.geometry import ROI, Geometry
from nanobeam_bluesky.presets import Preset

__all__ = ["as_json", "derive", "read_documents", "recorded_descriptor", "write_documents"]

POLL_SECONDS = 0.02


class _Inline:
    """Executor that works at once."""

    in_flight = 1

    def __init__(self, roots: Roots | None) -> None:
        self._processor = Processor(roots)

    def open(self, pipeline: RunPipeline, geometry: Geometry, choice: AnalyzerChoice) -> None:
        try:
            settings = self._processor.open(pipeline.key, geometry, choice)
        except Exception as error:
            pipeline.fail(f"no analyzer: {type(error).__name__}: {error}")
            return
        pipeline.opened(settings)

    def submit(self, pipeline: RunPipeline, task: Task) -> None:
        pipeline.processed(self._processor.process(task))

    def close(self, pipeline: RunPipeline) -> None:
        self._processor.close(pipeline.key)

    def shutdown(self) -> None:
        self._processor.shutdown()


def derive(
    documents: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    preset: Preset | str | Path = "default",
    choice: AnalyzerChoice | None = None,
    roi: ROI | None = None,
    root_map: Mapping[str, str] | None = None,
    roots: Roots | None = None,
    tally: Tally | None = None,
) -> Iterator[Document]:
    """Analyse runs one after the other; yield the documents of their derived runs.

    Parameters
    ----------
    documents
        (name, document) of stored runs, each from its start to its stop: `read_documents`, or
        ``run.documents()`` of Tiled and databroker. What the preset does not match is skipped.
    preset, roi, root_map
        As for `NanobeamCallback`.
    choice
        Which estimator to use.
    roots
        Files elsewhere are refused.
    tally
        Counts are added to it.

    Notes
    -----
    Tiled gives back each stream's frames as one whole-scan document that names one file: a
    scan that was rewound, or wrote several files, is better replayed from what was emitted.
    Files that are not there are waited for, 10 s (``pipeline.DEADLINE_SECONDS``).
    """
    presets = Preset.choices(preset)
    derived: list[Document] = []
    executor = _Inline(roots)
    run: RunPipeline | None = None

    def emit(name: str, doc: dict[str, Any]) -> None:
        derived.append((name, doc))

    def emitted() -> Iterator[Document]:
        yield from derived
        derived.clear()

    try:
        for name, doc in documents:
            if name == "start":
                if run is not None:
                    run.fail("the documents of the next run came before its stop document")
                run = None
                matching = next((p for p in presets if p.matches(doc)), None)
                if matching is not None:
                    run = RunPipeline(
                        doc,
                        matching,
                        executor,
                        emit,
                        choice=choice,
                        roi=roi,
                        tally=tally,
                        root_map=root_map,
                    )
            elif run is not None and doc.get("run_start", run.start["uid"]) == run.start["uid"]:
                run.document(name, doc)
                run.poll()
                while run.stopped and not run.closed:
                    yield from emitted()
                    run.poll()
                    if not run.closed:
                        time.sleep(POLL_SECONDS)
                run = None if run.closed else run
            yield from emitted()
        if run is not None:
            run.fail("there was no stop document")
            yield from emitted()
    finally:
        executor.shutdown()


def recorded_descriptor(name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the descriptor that `TiledWriter` has put into the metadata of a stream.

    Which device a key belongs to stands at the key there.
    """
    owned: dict[str, list[str]] = {}
    for key, description in metadata["data_keys"].items():
        owned.setdefault(description.get("object_name", key), []).append(key)
    return {"object_keys": owned, **metadata, "name": name}


def read_documents(path: str | Path) -> Iterator[Document]:
    """Read documents from lines of JSON: ``{"name": …, "doc": …}`` or ``[name, doc]``.

    Raises
    ------
    ValueError
        If a line is neither: says which.
    """
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip("\x1e \t\r\n")  # Tiled's JSON sequences begin with this separator
            if not text:
                continue
            try:
                item = json.loads(text)
                name, doc = (item["name"], item["doc"]) if isinstance(item, dict) else item
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a document, as "
                    f'{{"name": "start", "doc": {{…}}}}: {error}'
                ) from None
            yield name, doc


def write_documents(path: str | Path, documents: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Write documents as lines of JSON, which `read_documents` reads."""
    with open(path, "w", encoding="utf-8") as file:
        for name, doc in documents:
            file.write(json.dumps({"name": name, "doc": doc}, default=as_json) + "\n")


def as_json(value: Any) -> Any:
    """Return NumPy's numbers and arrays as what JSON knows: the `default` of ``json.dumps``."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
