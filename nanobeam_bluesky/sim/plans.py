"""Plans of the simulated beamline."""

from __future__ import annotations

from typing import Any

import bluesky.plan_stubs as bps
import bluesky.preprocessors as bpp
from bluesky.utils import MsgGenerator

from nanobeam_bluesky.sim.devices import EmbeddedSXDM, Flight, SimulatedSXDM

__all__ = ["sxdm_fly"]


def sxdm_fly(
    sxdm: SimulatedSXDM | EmbeddedSXDM,
    *,
    snake: bool = True,
    dwell_s: float = 0.0,
    stop_after: int | None = None,
    flush_period: float = 0.1,
    md: dict[str, Any] | None = None,
) -> MsgGenerator[str]:
    """Fly over the whole sample, row by row, collecting while flying.

    Every row starts with a checkpoint: after a pause the row is flown again from its
    start and its points come again, under the same ``seq_num``.

    Parameters
    ----------
    sxdm
        The device that flies.
    snake
        Whether every second row is flown backwards.
    dwell_s
        Time per point, s, e.g. 0.002; 0 for as fast as possible.
    stop_after
        Number of points after which the scan ends early; all of them by default.
    flush_period
        Time between documents within a row, s.
    md
        Added to the start document, over what the plan writes there.

    Returns
    -------
    str
        The uid of the run.
    """
    rows, columns = sxdm.sample.shape
    total = rows * columns if stop_after is None else min(stop_after, rows * columns)
    if total < 1:
        raise ValueError(f"stop_after = {stop_after}: must be at least 1 point")
    flights = [
        Flight(range(first, min(first + columns, total + 1)), snake=snake, dwell_s=dwell_s)
        for first in range(1, total + 1, columns)
    ]

    def fly() -> MsgGenerator[None]:
        for flight in flights:
            yield from bps.checkpoint()
            yield from bps.prepare(sxdm, flight, wait=True)
            yield from bps.kickoff(sxdm, wait=True)
            yield from bps.collect_while_completing(
                [sxdm], [sxdm], flush_period=flush_period, stream_name="primary"
            )
        yield from bps.checkpoint()

    def collect_rest(error: Exception) -> MsgGenerator[None]:
        # an interrupted flight leaves frames that no document has announced
        yield from bps.stop(sxdm)
        yield from bps.collect(sxdm, name="primary")

    @bpp.baseline_decorator(sxdm.baseline)
    @bpp.run_decorator(md={**_start(sxdm, snake=snake, dwell_s=dwell_s), **(md or {})})
    @bpp.stage_decorator([sxdm])
    def run() -> MsgGenerator[None]:
        yield from bps.declare_stream(sxdm, name="primary", collect=True)
        yield from bpp.contingency_wrapper(fly(), except_plan=collect_rest)

    # the sample is rendered here, so that the run's time is the time of flight
    yield from bps.prepare(sxdm, flights[0], wait=True)
    uid: str = yield from run()
    return uid


def _start(sxdm: SimulatedSXDM | EmbeddedSXDM, *, snake: bool, dwell_s: float) -> dict[str, Any]:
    """Return what the start document says about the scan and the geometry."""
    sample = sxdm.sample
    return {
        "plan_name": "sxdm_fly",
        "detectors": [sxdm.name],
        "motors": list(sxdm.motors),
        "shape": list(sample.shape),
        "extents": [[float(axis[0]), float(axis[-1])] for axis in (sample.y, sample.x)],
        "snaking": [False, snake],
        "num_points": sample.size,
        "dwell_s": dwell_s,
        "sample": sample.name,
        "hints": {
            "dimensions": [[[motor], "primary"] for motor in sxdm.motors],
            "gridding": "rectilinear",
        },
        "nanobeam": {"detector": sxdm.image_key, **_geometry(sxdm)},
    }


def _geometry(sxdm: SimulatedSXDM | EmbeddedSXDM) -> dict[str, Any]:
    """Return the geometry as the `default` preset reads it, without what follows from it."""
    # what `Geometry` has chosen is unset: the reader chooses the same
    block = sxdm.geometry.model_dump(mode="json", exclude_defaults=True, exclude_unset=True)
    if sxdm.baseline or "energy_keV" in block:
        block.pop("wavelength_angstrom")
    if sxdm.baseline:
        block.pop("energy_keV", None)
    if "lattice_c_angstrom" in block:
        block.pop("d_spacing_angstrom")
    block["optics"] = sxdm.geometry.optics.model_dump(mode="json", exclude_none=True)
    return block
