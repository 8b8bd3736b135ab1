"""`Analyzer`: the only door to the numerics, live, offline and in tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.correlation import CorrelationLibrary, correlation_fit, default_library
from nanobeam_bluesky.models.estimates import Estimates, Flag
from nanobeam_bluesky.models.networks import pick_device
from nanobeam_bluesky.models.store import Card, ModelStore

__all__ = ["Analyzer"]

Method = Literal["network", "correlation"]

MIN_COUNTS = 100
"""At these the Cramér-Rao bound of ε is 7e-4, a seventh of the published half-range."""
BATCH = 64
"""Patterns of one pass; the last batch is padded, so that a pattern's result does not
depend on what came with it."""
FALLBACK_STEPS = 21
"""The correlation library of a live run: an eighth of the published one's patterns."""


class Analyzer:
    """Patterns in, `Estimates` out, for one geometry. Make it with `for_geometry`."""

    def __init__(
        self,
        geometry: Geometry,
        *,
        network: torch.nn.Module | None = None,
        card: Card | None = None,
        library: CorrelationLibrary | None = None,
        device: str = "cpu",
    ) -> None:
        self.geometry = geometry
        self.card = card
        self.device = device
        self._network = None if network is None else network.to(device).eval()
        self._library = library

    @classmethod
    def for_geometry(
        cls,
        geometry: Geometry,
        *,
        method: Method = "network",
        store: ModelStore | None = None,
        device: str = "auto",
    ) -> Analyzer:
        """Return the analyzer of a geometry.

        Parameters
        ----------
        geometry
            The geometry.
        method
            "network": the trained one of this geometry. "correlation": the correlation
            fit, for which nothing needs to be trained.
        store
            Where networks are; the user's store by default.
        device
            Torch device; "auto" takes an accelerator where there is one.

        Raises
        ------
        ModelNotFoundError, ModelRefusedError
            If there is no network, or not a sound one.
        """
        if method == "correlation":
            library = default_library(geometry, FALLBACK_STEPS)
            return cls(geometry, library=library)
        if method != "network":
            raise ValueError(f"method = {method!r} must be 'network' or 'correlation'")
        network, card = (store or ModelStore()).load(geometry)
        return cls(geometry, network=network, card=card, device=pick_device(device))

    @property
    def settings(self) -> dict[str, Any]:
        """Provenance: what determines the results, beside geometry and patterns."""
        if self.card is None:
            return {"method": "correlation", "steps": FALLBACK_STEPS}
        return {
            "method": "network",
            "architecture": self.card.architecture,
            "weights_hash": self.card.sha256,
        }

    def process(self, patterns: NDArray[Any]) -> Estimates:
        """Estimate strain and tilts.

        Parameters
        ----------
        patterns
            (n, ny, nx), counts, of the geometry's `pattern_shape`.

        Returns
        -------
        Estimates
            n points. A pattern with NaN, infinite or negative pixels is flagged MISFIT and
            has no values, one with less than `MIN_COUNTS` counts FEW_COUNTS, one outside
            the network's range OUT_OF_RANGE (the correlation fit never leaves its library).
            σ is the network's error at these counts, as measured on patterns that it was
            not trained on; the correlation fit has none.

        Raises
        ------
        ValueError
            If the array does not have this shape, or does not hold numbers.
        """
        patterns = np.asarray(patterns)
        ny, nx = self.geometry.pattern_shape
        if patterns.ndim != 3 or patterns.shape[1:] != (ny, nx):
            raise ValueError(f"patterns of shape {patterns.shape}: expected (n, {ny}, {nx})")
        if patterns.dtype.kind not in "uifb":
            raise ValueError(f"patterns of type {patterns.dtype}: expected numbers")
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is flagged
            patterns = patterns.astype(np.float32, copy=False)
            counts = patterns.sum(axis=(1, 2), dtype=np.float64)
        bad = ~np.isfinite(counts) | (patterns.min(axis=(1, 2), initial=0) < 0)
        if bad.any():
            patterns = np.where(bad[:, None, None], np.float32(0), patterns)
        few = ~bad & (counts < MIN_COUNTS)
        estimates = self._correlate(patterns) if self._network is None else self._infer(patterns)
        flags = np.where(few, int(Flag.FEW_COUNTS), 0)
        flags |= np.where(self._outside(estimates) & ~few, int(Flag.OUT_OF_RANGE), 0)
        estimates = replace(estimates, counts=counts, flags=flags.astype(np.int64))
        estimates = estimates.put(bad, Estimates.empty(int(bad.sum()), Flag.MISFIT))
        return self._with_sigma(estimates) if self.card is not None else estimates

    def _correlate(self, patterns: NDArray[np.float32]) -> Estimates:
        return correlation_fit(patterns, self.geometry, library=self._library)

    def _infer(self, patterns: NDArray[np.float32]) -> Estimates:
        assert self._network is not None
        n = len(patterns)
        found = np.empty((n, 3))
        with torch.inference_mode():
            for first in range(0, n, BATCH):
                part = patterns[first : first + BATCH]
                batch = np.zeros((BATCH, *part.shape[1:]), np.float32)
                batch[: len(part)] = part
                out = self._network(torch.from_numpy(batch)[:, None].to(self.device))
                found[first : first + BATCH] = out[: len(part)].cpu().numpy()
        strain, omega, chi = found.T
        return replace(Estimates.empty(n), strain=strain, omega=omega, chi=chi)

    def _outside(self, estimates: Estimates) -> NDArray[np.bool_]:
        if self.card is None:
            return np.zeros(len(estimates), dtype=bool)
        outside = np.zeros(len(estimates), dtype=bool)
        for name, limit in self.card.ranges.items():
            outside |= ~(np.abs(getattr(estimates, name)) <= limit)
        return outside

    def _with_sigma(self, estimates: Estimates) -> Estimates:
        """Interpolate the card's errors in log counts; beyond them, as the root of counts."""
        assert self.card is not None
        levels = np.log([a.counts for a in self.card.accuracy])
        log_counts = np.log(np.maximum(estimates.counts, 1))
        sigma = {}
        for name in self.card.ranges:
            errors = np.log([a.rmse[name] for a in self.card.accuracy])
            below = np.maximum(levels[0] - log_counts, 0) / 2
            sigma[f"{name}_sigma"] = np.exp(np.interp(log_counts, levels, errors) + below)
        return replace(estimates, **sigma)
