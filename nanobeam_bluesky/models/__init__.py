"""Estimators: patterns in, strain and tilts with error bars and flags out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanobeam_bluesky.models.estimates import Estimates, Flag

if TYPE_CHECKING:
    from nanobeam_bluesky.models.analyzer import Analyzer
    from nanobeam_bluesky.models.correlation import CorrelationLibrary, correlation_fit
    from nanobeam_bluesky.models.networks import NanobeamNN, SeparableNet
    from nanobeam_bluesky.models.store import (
        Accuracy,
        Card,
        ModelNotFoundError,
        ModelRefusedError,
        ModelStore,
    )

__all__ = [
    "Accuracy",
    "Analyzer",
    "Card",
    "CorrelationLibrary",
    "Estimates",
    "Flag",
    "ModelNotFoundError",
    "ModelRefusedError",
    "ModelStore",
    "NanobeamNN",
    "SeparableNet",
    "correlation_fit",
]

_HOMES = {
    "Accuracy": "store",
    "Analyzer": "analyzer",
    "Card": "store",
    "CorrelationLibrary": "correlation",
    "ModelNotFoundError": "store",
    "ModelRefusedError": "store",
    "ModelStore": "store",
    "NanobeamNN": "networks",
    "SeparableNet": "networks",
    "correlation_fit": "correlation",
}


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import and has no place in the RunEngine's
    # process, where only Estimates and Flag are needed.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
