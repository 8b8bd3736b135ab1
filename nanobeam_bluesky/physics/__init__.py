"""The forward model: strain and tilts in, diffraction patterns out. Arrays only."""

from nanobeam_bluesky.physics.continuous import TiltReciprocal
from nanobeam_bluesky.physics.forward import Sampling, forward, simulate_library
from nanobeam_bluesky.physics.information import cramer_rao, fisher_information

__all__ = [
    "Sampling",
    "TiltReciprocal",
    "cramer_rao",
    "fisher_information",
    "forward",
    "simulate_library",
]
