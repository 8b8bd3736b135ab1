"""What one subscribes to a RunEngine, and to each other."""

from nanobeam_bluesky.callbacks.live_maps import LiveMaps
from nanobeam_bluesky.callbacks.nanobeam import Health, NanobeamCallback
from nanobeam_bluesky.callbacks.sink import BackgroundSink, SinkHealth

__all__ = ["BackgroundSink", "Health", "LiveMaps", "NanobeamCallback", "SinkHealth"]
