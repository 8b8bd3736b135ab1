"""Estimators: patterns in, strain and tilts with error bars and flags out."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy
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
    from nanobeam_bluesky.models.systematics import Sensitivity, sensitivity

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
    "Sensitivity",
    "SeparableNet",
    "correlation_fit",
    "sensitivity",
]

__getattr__ = lazy(
    __name__,
    {
        "Accuracy": "store",
        "Analyzer": "analyzer",
        "Card": "store",
        "CorrelationLibrary": "correlation",
        "ModelNotFoundError": "store",
        "ModelRefusedError": "store",
        "ModelStore": "store",
        "NanobeamNN": "networks",
        "Sensitivity": "systematics",
        "SeparableNet": "networks",
        "correlation_fit": "correlation",
        "sensitivity": "systematics",
    },
)
