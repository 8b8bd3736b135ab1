"""A real Tiled server that streams: a run that is being recorded is mapped as if subscribed."""

import numpy as np
import pytest
from tiled.client import from_uri

from nanobeam_bluesky import to_maps
from nanobeam_bluesky.callbacks import BackgroundSink
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
    emitted = []
    RE.subscribe(lambda name, doc: emitted.append((name, doc)))
    devices = [
        dialect(sample, geometry, tmp_path / "frames", counts=20_000)
        for dialect in (SimulatedSXDM, EmbeddedSXDM)
    ]
    RE(sxdm_fly(devices[0]))
    assert sink.wait(60)
    came = listen(_source(LiveOptions(tiled=url))[1])  # what is done before is left alone
    for device in devices:
        RE(sxdm_fly(device))
    until(lambda: [name for name, _ in list(came)].count("stop") == 2, 60)
    assert sink.close(30)
    assert sink.health.errors == 0, sink.health.last_error
    starts = [i for i, (name, _) in enumerate(came) if name == "start"]
    uids = [doc["uid"] for name, doc in emitted if name == "start"]
    assert [came[i][1]["uid"] for i in starts] == uids[1:]
    first = next(i for i, (name, _) in enumerate(emitted) if name == "stop") + 1
    directly = [to_maps(run) for run in split(derive(emitted[first:]))]
    for run, expected in zip(split(derive(came)), directly, strict=True):
        maps = to_maps(run)
        assert not expected["flags"].any()
        for name in expected:
            np.testing.assert_array_equal(maps[name], expected[name])


def split(documents):
    runs = []
    for name, doc in documents:
        runs += [[]] if name == "start" else []
        runs[-1].append((name, doc))
    return runs
