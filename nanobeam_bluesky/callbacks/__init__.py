"""What one subscribes to a RunEngine, and to each other."""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy

if TYPE_CHECKING:
    from nanobeam_bluesky.callbacks.live_maps import LiveMaps
    from nanobeam_bluesky.callbacks.nanobeam import Health, NanobeamCallback
    from nanobeam_bluesky.callbacks.sink import BackgroundSink, SinkHealth

__all__ = ["BackgroundSink", "Health", "LiveMaps", "NanobeamCallback", "SinkHealth"]

# a Tiled server needs no matplotlib, which takes a second to import
__getattr__ = lazy(
    __name__,
    {
        "BackgroundSink": "sink",
        "Health": "nanobeam",
        "LiveMaps": "live_maps",
        "NanobeamCallback": "nanobeam",
        "SinkHealth": "sink",
    },
)
