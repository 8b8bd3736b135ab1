"""`import_published`: from a published file and a geometry to a network with a measured card."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from torch import nn

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.correlation import PARAMETERS, RANGES
from nanobeam_bluesky.models.published import read_published
from nanobeam_bluesky.models.store import Accuracy, Card, ModelRefusedError
from nanobeam_bluesky.training.evaluate import evaluate

__all__ = ["import_published"]

PEAK = 7.0
"""Counts at the peak of the library that the published networks were trained on."""
LEVELS = (300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
"""Mean counts of the card's other rows: away from its own level such a network fails."""
LARGEST_ERROR = 0.5
"""Of what a constant answer has; published networks reach 0.02 to 0.05."""


def import_published(path: Path | str, geometry: Geometry) -> tuple[nn.Module, Card]:
    """Read a published network and measure it on simulated patterns of a geometry.

    Parameters
    ----------
    path
        The file, see `models.published.read_published`.
    geometry
        The geometry that it was trained for.

    Returns
    -------
    network : torch.nn.Module
        In evaluation mode.
    card : Card
        With the file's name and hash, and the accuracy at the published intensity and at
        `LEVELS`, published sampling, between grid points.

    Raises
    ------
    ModelRefusedError
        If the file is refused, or if the network does not know this geometry: an error above
        `LARGEST_ERROR` at the published intensity.
    """
    path = Path(path)
    network, sha256 = read_published(path, geometry.pattern_shape)

    def measure(counts: float | None, peak: float | None) -> Accuracy:
        return evaluate(network, geometry, sampling="published", counts=counts, peak=peak, n=2048)

    published = measure(None, PEAK)
    for name in PARAMETERS:
        constant = RANGES[name] / math.sqrt(3)
        if not published.rmse[name] <= LARGEST_ERROR * constant:
            raise ModelRefusedError(
                f"{path}: trained for another geometry: on simulated patterns of geometry "
                f"{geometry.fingerprint()} its RMSE of {name} is {published.rmse[name]:.2g}, a "
                f"constant answer's {constant:.2g}; check the geometry"
            )
    accuracy = sorted(
        [published, *(measure(level, None) for level in LEVELS)], key=lambda a: a.counts
    )
    return network, Card(
        fingerprint=geometry.fingerprint(),
        geometry=geometry,
        architecture="NanobeamNN",
        ranges=dict(RANGES),
        training={
            "source": path.name,
            "source_sha256": sha256,
            "sampling": "published",
            "counts": [round(published.counts, 1)] * 2,
        },
        accuracy=tuple(accuracy),
        version=version("nanobeam-bluesky"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
