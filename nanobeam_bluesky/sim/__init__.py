"""A simulated SXDM beamline: samples, an ophyd detector that flies over them, a plan.

Nothing outside this package knows that the beamline is simulated: it meets the rest
only through Bluesky documents and HDF5 files.
"""

from nanobeam_bluesky.sim.devices import EmbeddedSXDM, Flight, SimulatedSXDM
from nanobeam_bluesky.sim.plans import sxdm_fly
from nanobeam_bluesky.sim.samples import Phantom, phantom

__all__ = [
    "EmbeddedSXDM",
    "Flight",
    "Phantom",
    "SimulatedSXDM",
    "phantom",
    "sxdm_fly",
]
