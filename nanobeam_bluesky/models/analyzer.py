"""`Analyzer`: the only door to the numerics, live, offline and in tests."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.correlation import RANGES, correlation_fit, default_library
from nanobeam_bluesky.models.estimates import DEFAULT_FIT, MIN_COUNTS, Estimates, Flag
from nanobeam_bluesky.models.networks import outputs, pick_device
from nanobeam_bluesky.models.refinement import check, refine_checked
from nanobeam_bluesky.models.search import library_search
from nanobeam_bluesky.models.store import (
    Card,
    ModelNotFoundError,
    ModelRefusedError,
    ModelStore,
)

__all__ = ["Analyzer"]

Method = Literal["refine", "network", "correlation"]

BATCH = 64
"""Patterns of one pass; the last batch is padded, so that a pattern's result does not
depend on what came with it."""
CORRELATION_STEPS = 21
"""Of the correlation fit's library: an eighth of the published one's patterns."""
BEYOND_SIGMA = 3.0
"""How far out of the range an estimate must lie to be flagged, σ: at the very edge every
other pattern would be, otherwise."""

logger = logging.getLogger("nanobeam_bluesky")


class Analyzer:
    """Patterns in, `Estimates` out, for one geometry. Make it with `for_geometry`.

    Parameters
    ----------
    geometry
        The geometry.
    network, card
        A trained network and its card; a library without.
    fit
        What `refine` takes as unknown; no refinement without.
    device
        Torch device of the network.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        network: torch.nn.Module | None = None,
        card: Card | None = None,
        fit: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        self.geometry = geometry
        self.card = card
        self.fit = tuple(fit)
        self.device = device
        self._network = None if network is None else network.to(device).eval()
        mask = geometry.pattern_mask
        self._mask = mask if mask.any() else None
        # where a network or a library wants a value, the nearest good pixel's is the likeliest
        self._nearest = distance_transform_edt(mask, return_distances=False, return_indices=True)

    @classmethod
    def for_geometry(
        cls,
        geometry: Geometry,
        *,
        method: Method = "refine",
        fit: Sequence[str] = DEFAULT_FIT,
        store: ModelStore | None = None,
        device: str = "auto",
    ) -> Analyzer:
        """Return the analyzer of a geometry.

        Parameters
        ----------
        geometry
            The geometry.
        method
            "refine": maximum likelihood, started by the network of this geometry, or of the
            same without blur, or by `library_search` where none is trained. "network": the
            network alone. "correlation": the correlation fit alone.
        fit
            What `refine` takes as unknown, e.g. "thickness" too.
        store
            Where networks are; the user's store by default.
        device
            Torch device of the network; "auto" takes an accelerator where there is one.

        Raises
        ------
        ModelNotFoundError, ModelRefusedError
            If the method is "network" and there is none, or not a sound one.
        """
        if method not in get_args(Method):
            raise ValueError(f"method = {method!r} must be one of {get_args(Method)}")
        if method == "correlation":
            return cls(geometry)
        store = store or ModelStore()
        device = pick_device(device)
        if method == "network":
            network, card = store.load(geometry)
            return cls(geometry, network=network, card=card, device=device)
        for blur in dict.fromkeys((geometry.pupil_blur_px, 0.0)):
            near = geometry.model_copy(update={"pupil_blur_px": blur})
            try:
                network, card = store.load(near)
            except ModelNotFoundError:
                continue
            except ModelRefusedError as error:
                logger.warning("%s; starting from the library", error)
                break
            return cls(geometry, network=network, card=card, fit=fit, device=device)
        return cls(geometry, fit=fit)

    @property
    def settings(self) -> dict[str, Any]:
        """Provenance: what determines the results, beside geometry and patterns."""
        start = {"start": "library"}
        if self.card is not None:
            start = {
                "start": "network",
                "architecture": self.card.architecture,
                "weights_hash": self.card.sha256,
            }
        if self.fit:
            return {"method": "refine", "fit": list(self.fit)} | start
        if self.card is None:
            return {"method": "correlation", "steps": CORRELATION_STEPS}
        return {"method": start.pop("start")} | start

    def process(self, patterns: NDArray[Any]) -> Estimates:
        """Estimate strain and tilts.

        Parameters
        ----------
        patterns
            (n, ny, nx), counts, of the geometry's `pattern_shape`; pixels of its mask are
            not looked at.

        Returns
        -------
        Estimates
            n points. Flags: MISFIT where a pixel is negative or not finite (no values), else
            as of `refine`; FEW_COUNTS below `MIN_COUNTS` counts; OUT_OF_RANGE where an
            estimate lies 3 σ out of the network's or the library's range. Without refinement
            σ is the network's error at these counts, as measured on patterns that it was not
            trained on; the correlation fit has none.

        Raises
        ------
        ValueError
            If the array does not have this shape, or does not hold numbers.
        """
        checked = check(patterns, self.geometry, self._mask)
        shown, broken = checked.counts, checked.broken
        if broken.any():
            shown = np.where(broken[:, None, None], np.float32(0), shown)
        if self._mask is not None:
            shown = shown[:, *self._nearest]
        estimates = self._start(shown)
        if self.fit:
            estimates = refine_checked(checked, estimates, self.geometry, self.fit, self._mask)
            flags = estimates.flags
        else:
            flags = np.where(checked.total < MIN_COUNTS, int(Flag.FEW_COUNTS), 0)
            estimates = replace(estimates, counts=checked.total)
            if self.card is not None:
                estimates = self._with_sigma(estimates, self.card)
        blank = (flags & Flag.FEW_COUNTS) > 0
        flags = flags | np.where(self._outside(estimates) & ~blank, int(Flag.OUT_OF_RANGE), 0)
        estimates = replace(estimates, flags=flags.astype(np.int64))
        return estimates.put(broken, Estimates.empty(int(broken.sum()), Flag.MISFIT))

    def _start(self, patterns: NDArray[np.float32]) -> Estimates:
        if self._network is None and self.fit:
            return library_search(patterns, self.geometry)
        if self._network is None:
            library = default_library(self.geometry, CORRELATION_STEPS)
            return correlation_fit(patterns, self.geometry, library=library)
        n = len(patterns)
        names = outputs(self.card.ranges if self.card else ())
        found = np.empty((n, len(names)))
        with torch.inference_mode():
            for first in range(0, n, BATCH):
                part = patterns[first : first + BATCH]
                batch = np.zeros((BATCH, *part.shape[1:]), np.float32)
                batch[: len(part)] = part
                out = self._network(torch.from_numpy(batch)[:, None].to(self.device))
                found[first : first + BATCH] = out[: len(part)].cpu().numpy()
        columns: dict[str, Any] = dict(zip(names, found.T, strict=True))
        return replace(Estimates.empty(n), **columns)

    def _outside(self, estimates: Estimates) -> NDArray[np.bool_]:
        outside = np.zeros(len(estimates), dtype=bool)
        for name, limit in (RANGES if self.card is None else self.card.ranges).items():
            middle = 0.0
            if name == "thickness":
                if self.fit and name not in self.fit:
                    continue  # not estimated: taken as the geometry's
                middle = self.geometry.thickness_nm
            tolerance = BEYOND_SIGMA * np.nan_to_num(getattr(estimates, f"{name}_sigma"))
            outside |= ~(np.abs(getattr(estimates, name) - middle) <= limit + tolerance)
        return outside

    @staticmethod
    def _with_sigma(estimates: Estimates, card: Card) -> Estimates:
        """Interpolate the card's errors in log counts; beyond them, as the root of counts."""
        levels = np.log([a.counts for a in card.accuracy])
        log_counts = np.log(np.maximum(estimates.counts, 1))
        sigma = {}
        for name in card.ranges:
            errors = np.log([a.rmse[name] for a in card.accuracy])
            below = np.maximum(levels[0] - log_counts, 0) / 2
            sigma[f"{name}_sigma"] = np.exp(np.interp(log_counts, levels, errors) + below)
        return replace(estimates, **sigma)
