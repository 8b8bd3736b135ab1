from collections.abc import Callable
from typing import Any

import pytest
from bluesky import RunEngine
from event_model import DocumentNames, schema_validators

Documents = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def documents() -> Documents:
    """What the RunEngine has emitted."""
    return []


@pytest.fixture
def RE(RE: RunEngine, documents: Documents) -> RunEngine:
    """A RunEngine whose documents are validated and kept."""

    def record(name: str, doc: dict[str, Any]) -> None:
        schema_validators[DocumentNames[name]].validate(doc)
        documents.append((name, doc))

    RE.subscribe(record)
    return RE


@pytest.fixture
def of(documents: Documents) -> Callable[[str], list[dict[str, Any]]]:
    """The documents of one name, in the order of their arrival."""
    return lambda name: [doc for n, doc in documents if n == name]
