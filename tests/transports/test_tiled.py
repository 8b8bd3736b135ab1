"""A real Tiled server that streams: a run that is being recorded is mapped as if subscribed."""

import numpy as np
import pytest
from bluesky.plans import count
from ophyd.sim import det
from tiled.client import from_uri

from nanobeam_bluesky import to_maps
from nanobeam_bluesky.callbacks import BackgroundSink
from nanobeam_bluesky.documents import AnalyzerChoice
from nanobeam_bluesky.documents.replay import derive
from nanobeam_bluesky.live import LiveOptions, _source
from nanobeam_bluesky.sim import EmbeddedSXDM, SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import catalog, raw_writer, serve, writers


@pytest.fixture
def server(tmp_path, monkeypatch):
    build = catalog.build_app_from_config
    streaming = {"streaming_cache": {"uri": "memory"}}
    monkeypatch.setattr(catalog, "build_app_from_config", lambda config: build(config | streaming))
    monkeypatch.setattr(writers, "RAW_BATCH", 8)
    with serve(tmp_path) as url:
        client = from_uri(url)
        yield url, client
        client.context.close()


@pytest.mark.filterwarnings(
    # Tiled's client and today's websockets
    "ignore:connect.. must be used as a context manager:DeprecationWarning"
)
def test_a_run_is_mapped_while_it_is_recorded(
    server, RE, listen, until, geometry, tmp_path, one_torch_thread
):
    url, client = server
    sample = phantom("unique", (4, 5))
    sink = BackgroundSink(raw_writer(client["raw"]))
    RE.subscribe(sink)
    RE(count([det]))
    assert sink.wait(60)
    came = listen(_source(LiveOptions(tiled=url))[1])  # what is done before is left alone
    uids = []
    for dialect in (SimulatedSXDM, EmbeddedSXDM):
        device = dialect(sample, geometry, tmp_path / "frames", counts=20_000)
        uids += RE(sxdm_fly(device))
    until(lambda: [name for name, _ in list(came)].count("stop") == 2, 60)
    assert sink.close(30)
    assert sink.health.errors == 0, sink.health.last_error
    assert [doc["uid"] for name, doc in came if name == "start"] == uids
    for run in split(derive(came, choice=AnalyzerChoice("network"))):
        maps = to_maps(run)
        assert not maps["flags"].any()
        for key, tolerance in (("strain", 8e-4), ("omega", 2.5e-3), ("chi", 6e-3)):
            np.testing.assert_allclose(maps[key], getattr(sample, key), atol=tolerance)
        np.testing.assert_allclose(maps["sample_x"], sample.x, atol=0.01)


def split(documents):
    runs = []
    for name, doc in documents:
        runs += [[]] if name == "start" else []
        runs[-1].append((name, doc))
    return runs
