"""The forward model: strain and tilts in, diffraction patterns out. Arrays only."""

from nanobeam_bluesky.physics.forward import Sampling, forward, simulate_library

__all__ = ["Sampling", "forward", "simulate_library"]
