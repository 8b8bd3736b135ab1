"""``nanobeam live``: from another process's documents, or files, to maps and back."""

import io
import threading
import time
import urllib.request

import h5py
import numpy as np
import pytest
import tifffile
from bluesky.callbacks.zmq import Publisher
from bluesky.plans import count
from ophyd.sim import det
from rich.console import Console
from tiled.client import from_uri
from typer.testing import CliRunner

from nanobeam_bluesky import to_maps
from nanobeam_bluesky.callbacks import BackgroundSink, NanobeamCallback
from nanobeam_bluesky.cli import _to_toml, app
from nanobeam_bluesky.live import LiveOptions, run_live
from nanobeam_bluesky.sim import EmbeddedSXDM, SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import raw_writer, serve, writers
from nanobeam_bluesky.transports import ZMQSource, to_msgpack

SAMPLE = phantom("unique", (4, 5))


@pytest.fixture(scope="module")
def callback():
    callback = NanobeamCallback()
    yield callback
    callback.close()


@pytest.fixture
def live(callback, tmp_path):
    """Run ``nanobeam live`` here, as windows are drawn in the main thread, and `action` beside."""

    def run(action, callback=callback, **options):
        text, stop, failures = io.StringIO(), threading.Event(), []

        def beside():
            try:
                while "Listening" not in text.getvalue():
                    time.sleep(0.02)
                action(text)
            except BaseException as error:
                failures.append(error)
            finally:
                stop.set()

        thread = threading.Thread(target=beside)
        thread.start()
        options = LiveOptions(spool=tmp_path / "spool", **options)
        ok = run_live(options, Console(file=text, width=500), callback=callback, stop=stop)
        stop.set()
        thread.join()
        assert not failures, failures
        return ok, text.getvalue()

    return run


def compare(documents):
    maps = to_maps(documents)
    assert not maps["flags"].any()
    for key, tolerance in (("strain", 8e-4), ("omega", 2.5e-3), ("chi", 6e-3)):
        np.testing.assert_allclose(maps[key], getattr(SAMPLE, key), atol=tolerance)


def derived_run(documents):
    """The documents of the only derived run among those of others."""
    (start,) = [doc for name, doc in documents if "original_run_uid" in doc]
    uids = {start["uid"]}
    uids |= {doc["uid"] for _, doc in documents if doc.get("run_start") in uids}
    return [
        (name, doc)
        for name, doc in documents
        if (name == "event_page" and doc["descriptor"] in uids) or str(doc["uid"]) in uids
    ]


def test_a_scan_of_another_process_is_mapped_shown_measured_and_published(
    live, RE, zmq_proxy, listen, until, geometry, tmp_path, caplog
):
    """Its frames are mounted elsewhere here, and the thickness is fitted as well."""
    caplog.set_level("INFO", "nanobeam_bluesky")
    publisher = Publisher(zmq_proxy[0], serializer=to_msgpack)
    came = listen(ZMQSource(zmq_proxy[1]))
    sxdm = SimulatedSXDM(SAMPLE, geometry, tmp_path / "frames", counts=20_000)
    metrics = []

    def from_its_host(name, doc):
        if "uri" in doc:
            doc = doc | {"uri": doc["uri"].replace(f"localhost{tmp_path}", "ioc1/disk")}
        publisher(name, doc)

    def fly(text):
        for name in ("descriptor", "stop"):  # of a run that began earlier
            publisher(name, {"uid": name, "run_start": "3f2a91c0-1"})
        RE(sxdm_fly(sxdm), from_its_host)
        until(lambda: [name for name, _ in list(came)].count("stop") == 3)
        address = text.getvalue().partition("Metrics: ")[2].split()[0]
        with urllib.request.urlopen(address) as answer:
            metrics.append(answer.read().decode())

    ok, text = live(
        fly,
        callback=None,  # its own, as the options say
        zmq=zmq_proxy[1],
        root_map=(f"//ioc1/disk={tmp_path}",),
        fit=("thickness",),
        publish_zmq=zmq_proxy[0],
        maps=True,
        metrics=0,
    )
    publisher.close()
    assert ok
    assert "begin scans after this line" in text
    assert "1 runs met in their middle" in text
    assert caplog.text.count("run 3f2a91c0 was met in its middle") == 1
    run = derived_run(came)
    compare(run)
    np.testing.assert_allclose(to_maps(run)["thickness"], geometry.thickness_nm, atol=0.5)
    assert "nanobeam_points_analysed_total 20.0" in metrics[0]
    assert "nanobeam_worker_ready 1.0" in metrics[0]
    assert "points_analysed 20" in text
    (line,) = [r.getMessage() for r in caplog.records if "is done; so far" in r.getMessage()]
    assert "points_seen 20, points_analysed 20, points_flagged 0, points_pending 0" in line


@pytest.fixture
def tiled(tmp_path, monkeypatch):
    """A server: its address, and a client."""
    monkeypatch.setattr(writers, "RAW_BATCH", 8)
    with serve(tmp_path) as url:
        client = from_uri(url)
        yield url, client
        client.context.close()


@pytest.mark.filterwarnings(
    # Tiled's client and today's websockets
    "ignore:connect.. must be used as a context manager:DeprecationWarning"
)
def test_runs_that_tiled_records_are_mapped_meanwhile_and_their_maps_recorded_there(
    live, RE, tiled, until, geometry, tmp_path
):
    url, client = tiled
    sink = BackgroundSink(raw_writer(client["raw"]))
    RE.subscribe(sink)
    RE(count([det]))  # what is done before is left alone
    assert sink.wait(60)

    def fly(text):
        for dialect in (SimulatedSXDM, EmbeddedSXDM):
            RE(sxdm_fly(dialect(SAMPLE, geometry, tmp_path / "frames", counts=20_000)))
        assert sink.wait(60)
        until(
            lambda: (
                [r.metadata.get("stop") for r in client["derived"].values()].count(None) == 0
                and len(client["derived"]) == 2
            ),
            60,
        )

    ok, _ = live(fly, tiled=url, to=url)
    assert ok
    assert sink.close(30)
    assert sink.health.errors == 0, sink.health.last_error
    for run in client["derived"].values():
        compare(run)
        np.testing.assert_allclose(to_maps(run)["sample_x"], SAMPLE.x, atol=0.01)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Frames of the sample in scan order (n, rows, columns), and a geometry file."""
    from nanobeam_bluesky.geometry import Geometry

    geometry = Geometry.published().model_copy(
        update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
    )
    folder = tmp_path_factory.mktemp("frames")
    (folder / "film.toml").write_text(_to_toml(geometry))
    sxdm = SimulatedSXDM(SAMPLE, geometry, folder, counts=20_000)
    return np.stack([sxdm.frame(n) for n in range(1, SAMPLE.size + 1)]), folder / "film.toml"


def grow_hdf5(folder, frames):
    with h5py.File(folder / "scan.h5", "w", libver="latest", locking=False) as file:
        dataset = file.create_dataset(
            "data", (0, *frames.shape[1:]), "u2", maxshape=(None, *frames.shape[1:])
        )
        file.swmr_mode = True
        for count in (7, 20):
            dataset.resize(count, axis=0)
            dataset[:count] = frames[:count]
            dataset.flush()
            time.sleep(0.3)


def grow_tiffs(folder, frames):
    for number, frame in enumerate(frames, 1):
        tifffile.imwrite(folder / f"scan_{number:04d}.tif", frame)


@pytest.mark.parametrize(("pattern", "grow"), [("*.h5", grow_hdf5), ("*.tif", grow_tiffs)])
def test_files_without_bluesky_are_mapped_while_they_grow(
    live, callback, frames, until, tmp_path, pattern, grow
):
    stack, film = frames
    derived = []
    token = callback.subscribe(lambda name, doc: derived.append((name, doc)))

    def measure(text):
        grow(tmp_path, stack)
        until(lambda: derived and derived[-1][0] == "stop")

    ok, text = live(
        measure, watch=str(tmp_path / pattern), geometry=film, shape=SAMPLE.shape, snake=True
    )
    callback.unsubscribe(token)
    assert ok, text
    assert derived[-1][1]["exit_status"] == "success", derived[-1][1]["reason"]
    compare(derived)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of --zmq, --nats, --kafka, --tiled, --watch; found none"),
        (["--zmq", "a:1", "--nats", "b"], "found --zmq and --nats"),
        (["--kafka", "a:1"], "--kafka needs --topic"),
        (["--watch", "*.h5"], "--watch needs --geometry"),
        (["--zmq", "beamline"], "expected HOST:PORT"),
        (["--zmq", "a:1", "--root-map", "/data"], "expected OLD=NEW"),
        (["--zmq", "a:1", "--analyzer", "magic"], "analyzer = 'magic' must be one of"),
        (["--zmq", "a:1", "--fit", "phase"], "may hold ('background', 'thickness', 'blur')"),
    ],
)
def test_wrong_usage_ends_with_2_and_the_reason(arguments, words):
    found = CliRunner().invoke(app, ["live", *arguments])
    assert found.exit_code == 2
    assert words in found.output


def test_a_source_that_is_not_there_ends_with_1(live, monkeypatch, caplog, callback):
    nats = pytest.importorskip("nanobeam_bluesky.transports.nats")
    monkeypatch.setattr(nats, "CONNECT_SECONDS", 0.2)
    options = LiveOptions(nats="nats://user:secret@127.0.0.1:9")
    assert not run_live(options, Console(file=io.StringIO()), callback=callback)
    assert "no NATS server at nats://127.0.0.1:9" in caplog.text
    assert "secret" not in caplog.text
