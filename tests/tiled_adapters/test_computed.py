"""Maps of raw runs that nobody has analysed, made when they are asked for."""

import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import xarray as xr
from bluesky import RunEngine
from tiled.client import from_uri

from nanobeam_bluesky.callbacks import NanobeamCallback
from nanobeam_bluesky.documents import read_documents, to_maps
from nanobeam_bluesky.documents.derived_run import failed_run
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.sim import SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import computed, derived_writer, raw_writer, serve
from nanobeam_bluesky.tiled_adapters.computed import BusyError, Computer
from nanobeam_bluesky.tiled_adapters.scans import UnreadableError

GEOMETRY = Geometry.published().model_copy(
    update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
)


def fly(folder, **metadata):
    documents = []
    RE = RunEngine(metadata, context_managers=[])
    RE.subscribe(lambda name, doc: documents.append((name, doc)))
    RE(sxdm_fly(SimulatedSXDM(phantom("figure3", (3, 4)), GEOMETRY, folder), dwell_s=0))
    return documents


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server that computes, and three raw runs: good, without its file, still running."""
    folder = tmp_path_factory.mktemp("computing")
    with serve(folder, compute=True) as url:
        client = from_uri(url)
        runs = {}
        for name in ("good", "lost", "running"):
            runs[name] = fly(folder / "frames" / name)
            write = raw_writer(client["raw"])
            for document in runs[name][: -1 if name == "running" else None]:
                write(*document)
        for file in (folder / "frames" / "lost").rglob("*.h5"):
            file.unlink()
        base, key = url.split("?api_key=")
        with httpx.Client(
            base_url=f"{base}/api/v1", headers={"Authorization": f"Apikey {key}"}
        ) as http:
            yield SimpleNamespace(folder=folder, client=client, runs=runs, http=http)
        client.context.close()


def uid(documents):
    return documents[0][1]["uid"]


def finished(served, name):
    """Metadata of a run once it is not being computed any more."""
    path = f"/metadata/maps/{uid(served.runs[name])}"
    until = time.monotonic() + 120
    while time.monotonic() < until:
        metadata = served.http.get(path).raise_for_status().json()["data"]["attributes"]["metadata"]
        if not metadata.get("computing"):
            return metadata
        time.sleep(0.2)
    raise AssertionError("still being computed after two minutes")


def test_maps_of_a_raw_run_are_those_of_the_live_path_made_once_and_then_a_recorded_run_counts(
    served,
):
    documents = served.runs["good"]
    path = f"/array/full/maps/{uid(documents)}/strain"
    first = served.http.get(path)
    assert (first.status_code, "being computed" in first.text) == (503, True)
    assert first.headers["Retry-After"] == "2"
    metadata = finished(served, "good")
    assert metadata["computed"] and metadata["start"]["original_run_uid"] == uid(documents)
    maps = served.client["maps"][uid(documents)].to_dataset()
    (kept,) = (served.folder / "computed").iterdir()
    written = kept.stat().st_ino

    derived = []
    callback = NanobeamCallback()
    callback.subscribe(lambda name, doc: derived.append((name, doc)))
    for document in documents:
        callback(*document)
    assert callback.wait(60)
    callback.close()
    live = to_maps(derived)
    assert (live.flags == 0).all()
    assert derived[0][1]["nanobeam"]["analysis_id"] == metadata["start"]["nanobeam"]["analysis_id"]
    xr.testing.assert_allclose(maps, live, rtol=1e-6, atol=1e-12)

    scan = served.client["scans"][uid(documents)]
    xr.testing.assert_identical(scan.maps().to_dataset(), maps)
    assert [f.stat().st_ino for f in (served.folder / "computed").iterdir()] == [written]

    write = derived_writer(served.client["derived"])
    for document in derived:
        write(*document)
    start, stop = failed_run(documents[0][1], "tried again, in vain")
    for document in (start, stop):
        write(*document)
    recorded = served.client["maps"][uid(documents)]
    assert recorded.metadata["start"]["uid"] == uid(derived)
    assert "computed" not in recorded.metadata


@pytest.mark.parametrize(
    ("name", "reason"), [("lost", "No such file"), ("running", "it still goes on")]
)
def test_what_cannot_be_computed_says_why(served, name, reason):
    assert reason in finished(served, name)["problem"]
    answer = served.http.get(f"/array/full/maps/{uid(served.runs[name])}/strain")
    assert (answer.status_code, reason in answer.text) == (422, True)


def test_what_is_in_neither_catalogue_is_not_there(served):
    assert served.http.get("/metadata/maps/nothing").status_code == 404


@pytest.fixture
def computer(tmp_path):
    computer = Computer(tmp_path / "kept", roots=[tmp_path])
    yield computer
    computer.close()


def wait(computer, documents):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = computer.result(documents)
        if found is not None:
            return found
        time.sleep(0.1)
    raise AssertionError("no result after two minutes")


def test_files_elsewhere_are_refused_where_they_are_read_and_what_is_oldest_makes_room(
    tmp_path, tmp_path_factory, computer, monkeypatch
):
    monkeypatch.setattr(computed, "KEPT_RUNS", 1)
    monkeypatch.setattr(computed, "WAITING", 1)
    older = tmp_path / "kept" / "older.jsonl"
    older.touch()
    documents = fly(tmp_path_factory.mktemp("elsewhere"))
    path = wait(computer, documents)
    maps = to_maps(read_documents(path))
    assert (maps.flags != 0).all() and np.isnan(maps.strain).all()
    assert "outside the folders" in path.read_text()
    assert computer.result(documents) == path
    assert list(older.parent.iterdir()) == [path]
    # what is done waits no more
    assert computer.result([("start", {"uid": "a"}), ("stop", {})]) is None


def test_only_so_many_runs_may_wait(computer, monkeypatch):
    monkeypatch.setattr(computed, "WAITING", 1)
    assert computer.result([("start", {"uid": "a"}), ("stop", {})]) is None
    with pytest.raises(BusyError, match="1 scans wait"):
        computer.result([("start", {"uid": "b"}), ("stop", {})])


def test_a_process_that_fails_is_not_begun_again_at_once(computer):
    documents = [("start", {"uid": "a", "shape": [1, 1]}), ("stop", {"uid": "b"})]
    with pytest.raises(UnreadableError, match="not analysed: preset 'auto' does not match"):
        wait(computer, documents)
    with pytest.raises(UnreadableError, match="not analysed"):
        computer.result(documents)
