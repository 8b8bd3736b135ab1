"""Strain and tilt maps from scanning X-ray diffraction microscopy, live in Bluesky."""
