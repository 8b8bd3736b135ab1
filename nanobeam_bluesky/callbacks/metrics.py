"""The health of a callback as Prometheus metrics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from nanobeam_bluesky.callbacks.nanobeam import Health, NanobeamCallback

__all__ = ["serve_metrics"]

_COUNTERS = (
    "runs",
    "points_seen",
    "points_analysed",
    "points_flagged",
    "worker_restarts",
    "errors",
)
_DESCRIPTIONS = {
    "runs": "Raw runs that matched the preset",
    "points_seen": "Distinct points announced by documents",
    "points_analysed": "Points with an estimate, flagged or not",
    "points_flagged": "Points with any flag",
    "points_pending": "Points that wait for positions, frames or the worker",
    "lag_seconds": "How long the oldest of them has waited",
    "queue_bytes": "Embedded frames in memory",
    "documents_pending": "Documents not looked at yet",
    "worker_ready": "Whether the worker is warm",
    "worker_restarts": "How often the worker had to be started again",
    "spooled": "Derived documents that wait on disk",
    "errors": "Things that went wrong",
}


@contextmanager
def serve_metrics(callback: NanobeamCallback, port: int) -> Iterator[int]:
    """Serve `callback.health` on http://127.0.0.1:port/metrics for the length of a ``with`` block.

    Parameters
    ----------
    callback
        Whose health.
    port
        Any free one if 0.

    Yields
    ------
    port
        The port.

    Raises
    ------
    OSError
        If the port is taken.
    """
    # an extra, so not at import
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    class Collector:
        def collect(self) -> Iterator[Any]:
            health: Health = callback.health
            for name in (f.name for f in fields(health)):
                if name in _DESCRIPTIONS:
                    kind = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
                    value = float(getattr(health, name))
                    yield kind(f"nanobeam_{name}", _DESCRIPTIONS[name], value=value)
            last = {"message": health.last_error}
            yield InfoMetricFamily("nanobeam_last_error", "The last error", value=last)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        assert isinstance(thread, threading.Thread)
        thread.join()
