"""Stored runs are analysed as live ones are, each once, whatever becomes of the others."""

import json
import os
import signal
import threading

import h5py
import numpy as np
import pandas as pd
import pytest
from databroker import temp
from databroker.queries import Key
from distributed import Client
from distributed.deploy.subprocess import SubprocessCluster
from tiled.client import from_uri
from tiled.client.container import Container

from nanobeam_bluesky import Geometry, analyze, to_maps
from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.physics import simulate_library
from nanobeam_bluesky.retrospective import Query, analysis, executors, runs
from nanobeam_bluesky.retrospective.cluster import library_on_cluster, train_ensemble
from nanobeam_bluesky.tiled_adapters import open_catalog, raw_writer, serve

POINTS = 42
VALUES = ("strain", "omega", "chi")


def same(maps, others):
    """Both are equal to a millionth of the error bar, with the same flags."""
    assert (maps["flags"] == others["flags"]).all()
    for key in VALUES:
        off = abs(maps[key] - others[key]) / others[f"{key}_sigma"]
        assert off.max() < 1e-6
        assert off.isnull().sum() == (others["flags"] != 0).sum()


@pytest.fixture(scope="module")
def live(stored):
    """Maps that were made in flight, by raw uid."""
    maps = {}
    for run in stored.catalog["derived"].values():
        made = to_maps(run)
        maps[made.attrs["original_run_uid"]] = made
    assert len(maps) == 2
    return maps


@pytest.fixture
def elsewhere(tmp_path):
    """A catalogue for results."""
    catalog = open_catalog(tmp_path / "results")
    yield catalog
    catalog.context.close()


def test_results_are_the_live_ones(stored, live, elsewhere):
    results = list(analyze(stored.catalog, to=elsewhere))
    assert {a.raw_uid: a.status for a in results} == {
        stored.uids["file"]: "success",
        stored.uids["embedded"]: "success",
        stored.uids["count"]: "ignored",
    }
    for result in results:
        if result.status == "success":
            same(result.maps(), live[result.raw_uid])
            assert (result.points, result.model) == (POINTS, "universal, refined")


def test_what_was_done_live_is_found(stored, live):
    before = len(stored.catalog["derived"])
    for raw_uid, derived_uid, status in analyze(stored.catalog["raw"], preset="default"):
        if raw_uid in live:
            assert (derived_uid, status) == (live[raw_uid].attrs["uid"], "done")
    assert len(stored.catalog["derived"]) == before


def test_every_kind_of_source_gives_the_same(stored, live, elsewhere, tmp_path):
    uid = stored.uids["file"]
    raw = stored.catalog["raw"]
    first = next(i for i, (name, doc) in enumerate(stored.documents) if doc["uid"] == uid)
    last = next(i for i, (name, doc) in enumerate(stored.documents) if name == "stop" and i > first)
    documents = stored.documents[first : last + 1]
    lines = tmp_path / "run.jsonl"
    lines.write_text("\n".join(json.dumps({"name": n, "doc": d}) for n, d in documents))
    sources = {
        "run": raw[uid],
        "search": raw.search(Key("sample") == "film"),
        "list": [raw[uid]],
        "uid": uid[:8],
        "query": Query(plan_name="sxdm_fly", where=["sample=film"], since="2020"),
        "documents": documents,
        "generator": iter(documents),
        "file": lines,
    }
    (result,) = analyze(documents)
    assert result.documents[0][1]["original_run_uid"] == uid  # written nowhere
    same(result.maps(), live[uid])
    for name, source in sources.items():
        results = list(analyze(source, catalog=stored.catalog, to=elsewhere, redo=True))
        assert [a.raw_uid for a in results] == [uid], name
        same(results[0].maps(), live[uid])


def test_runs_of_a_mongo_broker_are_analysed(stored, live, elsewhere):
    broker = temp()
    uid = stored.uids["embedded"]
    inside = False
    for name, doc in stored.documents:
        inside = inside or doc.get("uid") == uid
        if inside:
            broker.insert(name, json.loads(json.dumps(doc, default=lambda value: value.tolist())))
            if name == "stop":
                break
    for source in (broker, broker[uid], broker(plan_name="sxdm_fly"), broker.v2):
        (result,) = analyze(source, to=elsewhere, redo=True)
        assert result.status == "success"
        same(result.maps(), live[uid])
    with pytest.raises(ValueError, match="say with to"):
        list(analyze(broker))


def test_files_that_are_not_here_are_read_by_way_of_tiled(stored, live, elsewhere):
    """As by the address of a server on the machine that has them."""
    with serve(stored.folder) as url:
        client = from_uri(url)
        (result,) = analyze(
            client["raw"][stored.uids["file"]],
            to=elsewhere,
            root_map={str(stored.folder): "/not/here"},
        )
        client.context.close()
    assert result.status == "success", result.reason
    same(result.maps(), live[stored.uids["file"]])


def test_a_run_is_read_by_one_request_as_node_by_node(stored, monkeypatch):
    """As from a server that cannot search in all a run holds at once."""
    run = stored.catalog["raw"][stored.uids["file"]]
    wanted = {"sample_x", "sample_y"}
    at_once = list(runs._recorded(run, wanted, {}))

    def refused(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(Container, "search_deep", refused)
    one_by_one = list(runs._recorded(run, wanted, {}))
    assert {name for name, _ in at_once} == {"descriptor", "event_page", "recorded"}

    def ordered(items):
        return sorted(items, key=str)

    assert ordered(at_once) == ordered(one_by_one)


def test_a_table_is_read_as_by_tileds_client(stored):
    (derived,) = (
        stored.catalog["derived"]
        .search(Key("start.original_run_uid") == stored.uids["file"])
        .values()
    )
    table = derived["primary"].base["internal"]
    columns = ["seq_num", "strain", "thickness"]
    plain = table.read(columns)
    assert plain["thickness"].isna().all()  # null in the database
    pd.testing.assert_frame_equal(runs._table(table, columns), plain)


def test_a_server_that_fails_as_results_begin_ends_that_run_alone(stored, tmp_path, monkeypatch):
    def refused(target):
        monkeypatch.undo()
        raise OSError("gone")

    monkeypatch.setattr(analysis, "derived_writer", refused)
    found = stored.catalog["raw"].search(Key("plan_name") == "sxdm_fly")
    results = list(analyze(found, to=tmp_path / "to"))
    assert sorted(a.status for a in results) == ["fail", "success"]


def test_interrupted_work_goes_on_with_the_missing_points(stored, live, elsewhere, monkeypatch):
    monkeypatch.setattr(executors.Threads, "task_points", 8)
    monkeypatch.setattr(analysis, "PAGES", (8, 10.0))
    monkeypatch.setattr(executors.Threads, "in_flight", 1)
    uid = stored.uids["file"]

    class Killed(BaseException):
        pass

    def killed(run, done, total):
        if done >= 16:
            raise Killed

    with pytest.raises(Killed):
        list(analyze(stored.catalog["raw"][uid], to=elsewhere, progress=killed))
    (unfinished,) = elsewhere["derived"].values()
    assert unfinished.metadata.get("stop") is None
    had = len(unfinished["primary"].base["internal"].read())
    assert 16 <= had < POINTS
    (result,) = analyze(stored.catalog["raw"][uid], to=elsewhere)
    assert (result.status, result.points) == ("success", POINTS - had)
    same(result.maps(), live[uid])
    (again,) = analyze(stored.catalog["raw"][uid], to=elsewhere)
    assert (again.status, again.derived_uid) == ("done", result.derived_uid)


def test_other_settings_are_another_analysis(stored, elsewhere):
    run = stored.catalog["raw"][stored.uids["file"]]
    uids = set()
    for options in (
        {},
        {"analyzer": "network"},
        {"redo": True},
        {"fit": ("strain", "omega", "chi", "scale")},
    ):
        (result,) = analyze(run, to=elsewhere, **options)
        assert result.status == "success"
        uids.add(result.derived_uid)
    assert len(uids) == 4
    (result,) = analyze(run, to=elsewhere, analyzer="network")
    assert result.status == "done"


def test_a_dry_run_writes_nothing(stored, elsewhere):
    run = stored.catalog["raw"][stored.uids["file"]]
    (result,) = analyze(run, to=elsewhere, dry_run=True)
    assert (result.status, result.points, result.model) == ("pending", POINTS, "universal, refined")
    assert result.seconds > 0
    assert len(elsewhere["derived"]) == 0


def test_a_bad_run_ends_only_itself(stored, elsewhere, tmp_path):
    """Of files that are gone or damaged, in another geometry, derived, unknown, or no scans."""
    catalog = open_catalog(tmp_path / "raw")
    write = raw_writer(catalog["raw"])
    uid = stored.uids["file"]
    runs = {}
    for name in ("gone", "damaged", "no distance", "good"):
        inside = None
        for kind, doc in stored.documents:
            if doc.get("uid") == uid or inside:
                inside = kind != "stop"
                text = json.dumps(doc, default=lambda value: value.tolist())
                doc = json.loads(text.replace(uid, f"{name.replace(' ', '-'):x<8}{uid[8:]}"))
                if name == "no distance" and kind == "start":
                    del doc["nanobeam"]["detector_distance_m"]
                if kind == "stream_resource" and name in ("gone", "damaged"):
                    doc["uri"] = f"file://localhost{tmp_path}/{name}.h5"
                    if "image" not in doc["data_key"]:
                        doc["uri"] = json.loads(text)["uri"]
                write(kind, doc)
                if not inside:
                    break
        runs[name] = f"{name.replace(' ', '-'):x<8}{uid[8:]}"
    (tmp_path / "damaged.h5").write_bytes(b"no HDF5")
    results = list(
        analyze(
            [
                *(runs[name] for name in ("gone", "damaged", "no distance")),
                stored.catalog["raw"][stored.uids["count"]],
                stored.catalog["derived"].values().first(),
                "00000000",
                runs["good"],
            ],
            catalog=catalog,
            to=elsewhere,
        )
    )
    *bad, good = sorted(results, key=lambda a: a.status == "success")
    assert good.raw_uid == runs["good"]
    reasons = [a.reason for a in bad]
    assert {a.status for a in bad} == {"fail"}
    for expected in (
        "gone.h5 is not on this machine",
        "damaged.h5",
        "detector_distance_m",
        "no preset matches",
        "is itself derived",
        "no runs whose uid begins with 00000000",
    ):
        assert sum(expected in reason for reason in reasons) == 1, (expected, reasons)
    assert [run.metadata["start"]["original_run_uid"] for run in elsewhere["derived"].values()] == [
        runs["good"]
    ]
    catalog.context.close()


def test_frames_that_are_missing_are_flagged(stored, elsewhere, tmp_path):
    """Of a file that ends early."""
    uid = stored.uids["file"]
    (path,) = (stored.folder / "frames").glob("*.h5")
    moved = tmp_path / "frames"
    moved.mkdir()
    with h5py.File(path) as whole, h5py.File(moved / path.name, "w") as cut:
        for name in ("entry",):
            whole.copy(name, cut)
        frames = whole["entry/data/data"]
        del cut["entry/data/data"]
        cut["entry/data/data"] = frames[:30]
    run = stored.catalog["raw"][uid]
    roots = {str(stored.folder / "frames"): str(moved)}
    (result,) = analyze(run, to=elsewhere, root_map=roots)
    maps = result.maps()
    assert (maps["flags"] == Flag.FRAME_MISSING).sum() == 12
    assert "has 30 rows" in result.reason


@pytest.fixture(scope="module")
def cluster(live):
    """Client of a Dask cluster of two workers; the default one, so `live` is read before."""
    with (
        SubprocessCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=True) as client,
    ):
        client.wait_for_workers(2)
        yield client


def test_a_library_is_the_same_from_a_cluster(cluster):
    geometry = Geometry.published().model_copy(update={"roi_shape": (32, 32)})
    axes = [-1e-3, 0.0, 2e-3], [-0.01, 0.02], [0.0, 0.01]
    there = library_on_cluster(cluster, geometry, *axes, sampling="continuous")
    assert (there == simulate_library(geometry, *axes, sampling="continuous")).all()


def test_the_most_accurate_network_of_an_ensemble_comes_first(cluster):
    geometry = Geometry.published().model_copy(update={"roi_shape": (32, 32)})
    trained = train_ensemble(geometry, (0, 1), scheduler=cluster, steps=2)
    ratios = [
        np.mean([np.log(a.rmse[k] / a.bound[k]) for a in card.accuracy for k in a.rmse])
        for _, card in trained
    ]
    assert {card.training["seed"] for _, card in trained} == {0, 1}
    assert ratios == sorted(ratios)


def test_a_killed_worker_loses_nothing(cluster, stored, live, elsewhere, monkeypatch):
    """On a Dask cluster, whose scheduler gives its tasks to the other one."""
    monkeypatch.setattr(executors.Cluster, "task_points", 4)
    pids = list(cluster.run(os.getpid).values())
    killed = threading.Event()

    def kill(run, done, total):
        if done and not killed.is_set():
            killed.set()
            os.kill(pids[0], signal.SIGKILL)

    found = stored.catalog["raw"].search(Key("plan_name") == "sxdm_fly")
    results = list(analyze(found, to=elsewhere, scheduler=cluster, progress=kill))
    assert killed.is_set()
    assert [a.status for a in results] == ["success"] * 2
    for result in results:
        same(result.maps(), live[result.raw_uid])


def test_interrupted_work_goes_on_on_a_cluster(cluster, stored, live, elsewhere, monkeypatch):
    """Which is also the user's own default, that reading results must not go by."""
    monkeypatch.setattr(executors.Threads, "task_points", 8)
    monkeypatch.setattr(analysis, "PAGES", (8, 10.0))
    monkeypatch.setattr(executors.Threads, "in_flight", 1)
    run = stored.catalog["raw"][stored.uids["file"]]
    found = analyze(run, to=elsewhere, progress=lambda run, done, total: 1 / (done < 16))
    with pytest.raises(ZeroDivisionError):
        list(found)
    (result,) = analyze(run, to=elsewhere, scheduler=cluster)
    assert result.status == "success", result.reason
    assert 0 < result.points < POINTS
    same(result.maps(), live[result.raw_uid])


def test_results_that_cannot_be_written_fail_their_run_alone(stored, tmp_path, caplog):
    catalog = open_catalog(tmp_path)
    (tmp_path / "tables.db").unlink(missing_ok=True)
    (tmp_path / "tables.db").mkdir()
    found = [stored.uids["file"], stored.uids["embedded"]]
    results = list(analyze(found, catalog=stored.catalog, to=catalog))
    catalog.context.close()
    assert sorted(a.raw_uid for a in results) == sorted(found)
    for result in results:
        assert result.failed
        assert "results could not be written" in result.reason
