"""Estimators: patterns in, strain and tilts with error bars and flags out."""

from nanobeam_bluesky.models.estimates import Estimates, Flag

__all__ = ["Estimates", "Flag"]
