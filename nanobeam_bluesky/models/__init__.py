"""Estimators: patterns in, strain and tilts with error bars and flags out."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy
from nanobeam_bluesky.models.estimates import DEFAULT_FIT, Estimates, Flag

if TYPE_CHECKING:
    from nanobeam_bluesky.models.analyzer import Analyzer
    from nanobeam_bluesky.models.calibration import (
        Calibration,
        CalibrationError,
        Measured,
        calibrate,
    )
    from nanobeam_bluesky.models.correlation import CorrelationLibrary, correlation_fit
    from nanobeam_bluesky.models.joint import Together, refine_together
    from nanobeam_bluesky.models.networks import NanobeamNN, SeparableNet
    from nanobeam_bluesky.models.refinement import refine
    from nanobeam_bluesky.models.search import library_search
    from nanobeam_bluesky.models.store import (
        Accuracy,
        Card,
        ModelNotFoundError,
        ModelRefusedError,
        ModelStore,
    )
    from nanobeam_bluesky.models.systematics import Sensitivity, sensitivity

__all__ = [
    "DEFAULT_FIT",
    "Accuracy",
    "Analyzer",
    "Calibration",
    "CalibrationError",
    "Card",
    "CorrelationLibrary",
    "Estimates",
    "Flag",
    "Measured",
    "ModelNotFoundError",
    "ModelRefusedError",
    "ModelStore",
    "NanobeamNN",
    "Sensitivity",
    "SeparableNet",
    "Together",
    "calibrate",
    "correlation_fit",
    "library_search",
    "refine",
    "refine_together",
    "sensitivity",
]

__getattr__ = lazy(
    __name__,
    {
        "Accuracy": "store",
        "Analyzer": "analyzer",
        "Calibration": "calibration",
        "CalibrationError": "calibration",
        "Card": "store",
        "CorrelationLibrary": "correlation",
        "Measured": "calibration",
        "ModelNotFoundError": "store",
        "ModelRefusedError": "store",
        "ModelStore": "store",
        "NanobeamNN": "networks",
        "Sensitivity": "systematics",
        "SeparableNet": "networks",
        "Together": "joint",
        "calibrate": "calibration",
        "correlation_fit": "correlation",
        "library_search": "search",
        "refine": "refinement",
        "refine_together": "joint",
        "sensitivity": "systematics",
    },
)
