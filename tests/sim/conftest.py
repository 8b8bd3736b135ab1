from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bluesky import RunEngine
from event_model import DocumentNames, schema_validators

from nanobeam_bluesky.geometry import Geometry

Documents = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def geometry() -> Geometry:
    """The published condition on a small detector, the pattern off its middle."""
    return Geometry.published().model_copy(
        update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
    )


@pytest.fixture
def documents() -> Documents:
    """What the RunEngine has emitted."""
    return []


@pytest.fixture
def RE(documents: Documents) -> Iterator[RunEngine]:
    """A RunEngine whose documents are validated, that pauses without waiting for Ctrl+C."""

    def record(name: str, doc: dict[str, Any]) -> None:
        schema_validators[DocumentNames[name]].validate(doc)
        documents.append((name, doc))

    engine = RunEngine(context_managers=[])
    engine.subscribe(record)
    yield engine
    if engine.state == "paused":
        engine.halt()
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join()
    engine.loop.close()


@pytest.fixture
def of(documents: Documents) -> Callable[[str], list[dict[str, Any]]]:
    """The documents of one name, in the order of their arrival."""
    return lambda name: [doc for n, doc in documents if n == name]
