"""`Analyzer`: the only door to the numerics, live, offline and in tests."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.correlation import RANGES, correlation_fit, default_library
from nanobeam_bluesky.models.estimates import DEFAULT_FIT, MIN_COUNTS, Estimates, Flag
from nanobeam_bluesky.models.fringes import place_fringes
from nanobeam_bluesky.models.networks import outputs, pick_device
from nanobeam_bluesky.models.reduced import (
    LIMITS,
    OutsideEnvelopeError,
    Reduced,
    envelope_ranges,
    reduce_geometry,
)
from nanobeam_bluesky.models.refinement import check, refine_checked
from nanobeam_bluesky.models.store import (
    Card,
    ModelNotFoundError,
    ModelRefusedError,
    ModelStore,
)
from nanobeam_bluesky.models.universal import ReducedNet, universal_network

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
REFINED = 1.4
"""So much farther than the shipped network's range are refined estimates right as well, but for
perfectly sharp pupils, with which a fit may end beside the highest maximum."""
UNSURE = 0.2
"""σ, as a part of the range, from which a network alone has not found anything."""

logger = logging.getLogger("nanobeam_bluesky")


class Analyzer:
    """Patterns in, `Estimates` out, for one geometry. Make it with `for_geometry`.

    Parameters
    ----------
    geometry
        The geometry.
    network
        Gives first estimates; a library does without.
    card
        Of a network that was trained for this geometry.
    ranges
        Half-ranges of strain, omega (deg), chi (deg) and perhaps thickness (nm); the card's, or
        the published ones, if absent.
    reduced
        Of the shipped network: its ranges are in reduced coordinates.
    start
        Provenance of the first estimates.
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
        ranges: Mapping[str, float] | None = None,
        reduced: Reduced | None = None,
        start: Mapping[str, Any] | None = None,
        fit: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        self.geometry = geometry
        self.card = card
        self.ranges = dict(ranges or (card.ranges if card else RANGES))
        self.fit = tuple(fit)
        self.device = device
        self.start = dict(start or {})
        self._reduced = reduced
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
        universal: bool = True,
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
            "refine": maximum likelihood, started by the network that was trained for this
            geometry, or else by the shipped one for every geometry, or by `library_search`
            outside its envelope. "network": the network alone. "correlation": the
            correlation fit alone.
        universal
            Whether the shipped network may be used.
        fit
            What `refine` takes as unknown, e.g. "thickness" too.
        store
            Where networks are; the user's store by default.
        device
            Torch device of the network; "auto" takes an accelerator where there is one.

        Raises
        ------
        ModelNotFoundError
            If the method is "network" and there is none for this geometry; says why.
        ModelRefusedError
            If the method is "network" and the stored one is not sound.
        """
        if method not in get_args(Method):
            raise ValueError(f"method = {method!r} must be one of {get_args(Method)}")
        if method == "correlation":
            return cls(geometry)
        device = pick_device(device)
        fit = fit if method == "refine" else ()
        try:
            network, card = (store or ModelStore()).load(geometry)
        except (ModelNotFoundError, ModelRefusedError) as error:
            # its traceback knows this frame, and so all that is made below, and not freed at once
            missing = error.with_traceback(None)
        else:
            start = {"start": "network", "architecture": card.architecture} | {
                "weights_hash": card.sha256
            }
            return cls(
                geometry,
                network=network,
                card=card,
                # refined, what it does not know any better than before is no reason for a flag
                reduced=reduce_geometry(geometry)
                if fit and isinstance(network, ReducedNet)
                else None,
                start=start,
                fit=fit,
                device=device,
            )
        if isinstance(missing, ModelRefusedError):
            if method == "network":
                raise missing
            logger.warning("%s; not used", missing)
        reason = str(missing)
        if universal:
            try:
                shipped, reduced, digest = universal_network(geometry, share=True)
            except OutsideEnvelopeError as error:
                reason = f"the shipped network does not know this geometry: {error}"
                logger.warning("%s; starting from a library", reason)
            else:
                return cls(
                    geometry,
                    network=shipped,
                    ranges=envelope_ranges(reduced),
                    reduced=reduced,
                    start={"start": "universal", "weights_hash": digest},
                    fit=fit,
                    device=device,
                )
        if method == "network":
            raise ModelNotFoundError(f"{missing}; {reason}") from missing
        return cls(geometry, start={"start": "library", "reason": reason}, fit=fit)

    @property
    def settings(self) -> dict[str, Any]:
        """Provenance: what determines the results, beside geometry and patterns."""
        if self.fit:
            return {"method": "refine", "fit": list(self.fit)} | self.start
        if self._network is None:
            return {"method": "correlation", "steps": CORRELATION_STEPS}
        return {"method": "network"} | self.start

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
            estimate lies 3 σ out of the network's or the library's range, or, where
            the pupil is blurred, refined values out of 1.4 times that of the shipped network.
            Without refinement
            σ is the network's own, or its error at these counts as measured on patterns that
            it was not trained on, and NOT_CONVERGED where that is a fifth of the range; the
            correlation fit has none.

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
        if self.fit:
            first = None if self._network is None else self._first(shown)
            estimates = refine_checked(
                checked, first, self.geometry, self.fit, self._mask, self.ranges
            )
            flags = estimates.flags
        else:
            estimates = replace(self._first(shown), counts=checked.total)
            if isinstance(self._network, ReducedNet):
                estimates = place_fringes(shown, estimates, self.geometry, mask=self._mask)
            elif self.card is not None:
                estimates = self._with_sigma(estimates, self.card)
            flags = np.where(checked.total < MIN_COUNTS, int(Flag.FEW_COUNTS), 0)
            unsure = _unsure(estimates, self.ranges)
            flags |= np.where(unsure & (flags == 0), int(Flag.NOT_CONVERGED), 0)
        blank = (flags & Flag.FEW_COUNTS) > 0
        flags = flags | np.where(self._outside(estimates) & ~blank, int(Flag.OUT_OF_RANGE), 0)
        estimates = replace(estimates, flags=flags.astype(np.int64))
        return estimates.put(broken, Estimates.empty(int(broken.sum()), Flag.MISFIT))

    def _first(self, patterns: NDArray[np.float32]) -> Estimates:
        if self._network is None:
            library = default_library(self.geometry, CORRELATION_STEPS)
            return correlation_fit(patterns, self.geometry, library=library)
        n = len(patterns)
        names = outputs(self.ranges)
        if isinstance(self._network, ReducedNet):
            names = (*names, *(f"{name}_sigma" for name in names))
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
        if self._reduced is not None:
            trusted = self.fit and self.geometry.pupil_blur_px
            reach = np.array(LIMITS) * (REFINED if trusted else 1)
            return self._outside_envelope(estimates, self._reduced, reach)
        outside = np.zeros(len(estimates), dtype=bool)
        for name, limit in self.ranges.items():
            middle = 0.0
            if name == "thickness":
                if self.fit and name not in self.fit:
                    continue  # not estimated: taken as the geometry's
                middle = self.geometry.thickness_nm
            tolerance = BEYOND_SIGMA * np.nan_to_num(getattr(estimates, f"{name}_sigma"))
            outside |= ~(np.abs(getattr(estimates, name) - middle) <= limit + tolerance)
        return outside

    @staticmethod
    def _outside_envelope(
        estimates: Estimates, reduced: Reduced, reach: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        values = [np.nan_to_num(getattr(estimates, name)) for name in RANGES]
        sigma = [np.nan_to_num(getattr(estimates, f"{name}_sigma")) for name in RANGES]
        nominal = reduced.labels(*values)
        variance = np.zeros_like(nominal)
        for k in range(len(values)):
            moved = [
                v + s if i == k else v for i, (v, s) in enumerate(zip(values, sigma, strict=True))
            ]
            variance += np.square(reduced.labels(*moved) - nominal)
        beyond = np.abs(nominal) > reach + BEYOND_SIGMA * np.sqrt(variance)
        return np.asarray(beyond.any(axis=1))

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


def _unsure(estimates: Estimates, ranges: Mapping[str, float]) -> NDArray[np.bool_]:
    """Whether a network says itself that it has found nothing, (n,)."""
    unsure = np.zeros(len(estimates), dtype=bool)
    for name, limit in ranges.items():
        unsure |= getattr(estimates, f"{name}_sigma") > UNSURE * limit
    return unsure
