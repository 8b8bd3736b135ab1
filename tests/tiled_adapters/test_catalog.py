"""The embedded catalogue: written while a run goes on, read back, opened again, served."""

import asyncio
import json
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import h5py
import numpy as np
import pyarrow
import pytest
from event_model import compose_run
from tiled.catalog.adapter import CatalogContainerAdapter
from tiled.client import from_uri

from nanobeam_bluesky.callbacks.sink import BackgroundSink
from nanobeam_bluesky.tiled_adapters import (
    derived_writer,
    open_catalog,
    raw_writer,
    serve,
    writers,
)

NAMES = ["raw", "derived", "scans", "maps"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("catalog")


@pytest.fixture(scope="module")
def catalog(folder):
    client = open_catalog(folder)
    yield client
    client.context.close()


def test_every_event_page_can_be_read_before_the_run_ends(catalog, derived_documents):
    documents = derived_documents((4, 5), page=6)
    uid = documents[0][1]["uid"]
    write = derived_writer(catalog["derived"])
    lengths = []
    for name, doc in documents:
        write(name, doc)
        if name == "event_page":
            run = catalog["derived"][uid]
            assert run.metadata.get("stop") is None
            lengths.append(len(run["primary"].base["internal"].read()))
    assert lengths == [6, 12, 18, 20]


def test_derived_run_is_read_back_as_it_was_written(catalog, derived_documents):
    flags = np.zeros((3, 4), dtype=int)
    flags[1, 2] = 32
    strain = np.where(flags, np.nan, np.arange(12.0).reshape(3, 4) * 1e-4)
    documents = derived_documents((3, 4), page=5, change={"strain": strain, "flags": flags})
    write = derived_writer(catalog["derived"])
    for name, doc in documents:
        write(name, doc)
    run = catalog["derived"][documents[0][1]["uid"]]
    assert [spec.name for spec in run.specs] == ["NanobeamRun", "BlueskyRun"]
    assert run.metadata["start"]["original_run_uid"] == documents[0][1]["original_run_uid"]
    assert run.metadata["stop"]["exit_status"] == "success"
    table = run["primary"].base["internal"].read()
    assert table["seq_num"].tolist() == list(range(1, 13))
    for key in documents[1][1]["data_keys"]:
        written = np.concatenate([doc["data"][key] for name, doc in documents[2:-1]])
        np.testing.assert_array_equal(table[key].to_numpy(), written)
    assert run["primary"].read(["strain"])["strain"].shape == (12,)


def test_interleaved_derived_runs_stay_apart(catalog, derived_documents):
    runs = [derived_documents((2, 3), page=2) for _ in range(2)]
    write = derived_writer(catalog["derived"])
    for pair in zip(*runs, strict=True):
        for name, doc in pair:
            write(name, doc)
    for documents in runs:
        run = catalog["derived"][documents[0][1]["uid"]]
        assert len(run["primary"].base["internal"].read()) == 6


SECOND_PROCESS = """
import json, sys
from nanobeam_bluesky.callbacks.sink import BackgroundSink
from nanobeam_bluesky.tiled_adapters import derived_writer, open_catalog

catalog = open_catalog(sys.argv[1])
run = catalog["derived"].values().last()
print(run.metadata["start"]["uid"], run["primary"]["strain"].read().shape)
sink = BackgroundSink(derived_writer(catalog["derived"]))
for name, doc in json.load(sys.stdin):
    sink(name, doc)
"""


def test_requests_that_write_do_so_one_after_the_other(tmp_path, derived_documents, monkeypatch):
    """SQLite gives up on a second writer where the disk is slow, and its run lost a document."""
    plain, active, together = CatalogContainerAdapter.create_node, [], []

    async def watched(self, *args, **options):
        active.append(self)
        await asyncio.sleep(0.05)
        together.append(len(active))
        found = await plain(self, *args, **options)
        active.remove(self)
        return found

    monkeypatch.setattr(CatalogContainerAdapter, "create_node", watched)

    def write(url):
        client = from_uri(url)
        documents = derived_documents((4, 5), page=5)
        writer = derived_writer(client["derived"])
        for name, doc in documents:
            writer(name, doc)
        rows = len(client["derived"][documents[0][1]["uid"]]["primary"].base["internal"].read())
        client.context.close()
        return rows

    with serve(tmp_path) as url, ThreadPoolExecutor(3) as pool:
        assert list(pool.map(write, [url] * 3)) == [20] * 3
    assert set(together) == {1}


def test_second_process_reads_the_folder_and_its_exit_writes_what_is_queued(
    tmp_path, derived_documents
):
    ours, theirs = derived_documents((3, 4)), derived_documents((5, 4), page=4)
    client = open_catalog(tmp_path)
    write = derived_writer(client["derived"])
    for name, doc in ours:
        write(name, doc)
    done = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, str(tmp_path)],
        input=json.dumps(theirs),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == f"{ours[0][1]['uid']} (12,)\n", done.stderr
    run = client["derived"][theirs[0][1]["uid"]]
    assert len(run["primary"].base["internal"].read()) == 20
    assert run.metadata["stop"]["exit_status"] == "success"
    client.context.close()


def test_folder_can_be_opened_again(tmp_path, derived_documents):
    uids = []
    for shape in ((3, 4), (2, 2)):
        documents = derived_documents(shape)
        client = open_catalog(tmp_path)
        assert list(client) == NAMES
        assert list(client["derived"]) == uids
        write = derived_writer(client["derived"])
        for name, doc in documents:
            write(name, doc)
        client.context.close()
        uids.append(documents[0][1]["uid"])


def test_the_events_of_a_run_are_found_without_reading_all_others(tmp_path):
    client = open_catalog(tmp_path)
    for key in ("first", "second", "third"):
        client["raw"].create_appendable_table(pyarrow.schema({key: pyarrow.int64()}), key=key)
    client.context.close()
    with closing(sqlite3.connect(tmp_path / "tables.db")) as database:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'table%'"
        names = [name for (name,) in database.execute(query)]
        assert len(names) == 3
        for name in names:
            plan = database.execute(
                f'EXPLAIN QUERY PLAN SELECT * FROM "{name}" WHERE _dataset_id = 1'
            )
            assert [row[-1].split()[0] for row in plan] == ["SEARCH"]


FRAMES = np.arange(6 * 4 * 5, dtype=np.uint16).reshape(6, 4, 5)


def raw_documents(path):
    """Fly a scan of six frames into an HDF5 file that is always one frame ahead."""
    run = compose_run()
    key = {"source": "test", "dtype": "array", "dtype_numpy": "<u2", "shape": [1, 4, 5]}
    stream = run.compose_descriptor(
        name="primary", data_keys={"img": key | {"external": "STREAM:"}}
    )
    resource = run.compose_stream_resource(
        mimetype="application/x-hdf5",
        uri=f"file://localhost{path}",
        data_key="img",
        parameters={"dataset": "/entry/data", "chunk_shape": [1, 4, 5]},
    )
    yield "start", run.start_doc
    yield "descriptor", stream.descriptor_doc
    yield "stream_resource", resource.stream_resource_doc
    with h5py.File(path, "w", libver="latest") as file:
        dataset = file.create_dataset(
            "entry/data", (0, 4, 5), "<u2", maxshape=(None, 4, 5), chunks=(1, 4, 5)
        )
        file.swmr_mode = True
        for i in (0, 2, 4):
            dataset.resize(min(i + 3, 6), axis=0)
            dataset[i:] = FRAMES[i : i + 3]
            dataset.flush()
            yield (
                "stream_datum",
                resource.compose_stream_datum(
                    indices={"start": i, "stop": i + 2},
                    seq_nums={"start": i + 1, "stop": i + 3},
                    descriptor=stream.descriptor_doc,
                ),
            )
    yield "stop", run.compose_stop()


def test_frames_of_a_raw_run_can_be_read_while_it_flies(catalog, folder, monkeypatch):
    monkeypatch.setattr(writers, "RAW_BATCH", 4)
    sink = BackgroundSink(raw_writer(catalog["raw"]))
    documents = raw_documents(folder / "frames" / "scan.h5")
    uid = ""
    for name, doc in documents:
        uid = uid or doc["uid"]
        sink(name, doc)
        if name == "stream_datum" and doc["indices"]["stop"] == 4:
            assert sink.wait(30)
            run = catalog["raw"][uid]
            np.testing.assert_array_equal(run["primary"]["img"].read(), FRAMES[:4])
            assert "stop" not in run.metadata
    assert sink.close(30)
    assert sink.health.errors == 0, sink.health.last_error
    run = catalog["raw"][uid]
    np.testing.assert_array_equal(run["primary"]["img"].read(), FRAMES)
    assert run.metadata["stop"]["exit_status"] == "success"


def test_frames_outside_the_readable_folders_are_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    documents = list(raw_documents(tmp_path / "elsewhere" / "scan.h5"))
    uid = documents[0][1]["uid"]
    client = open_catalog(tmp_path / "catalog")
    write = raw_writer(client["raw"])
    for name, doc in documents:
        write(name, doc)
    with pytest.raises(RuntimeError, match="outside the readable storage"):
        client["raw"][uid]["primary"]["img"].read()
    client.context.close()

    client = open_catalog(tmp_path / "catalog", readable_storage=[tmp_path / "elsewhere"])
    np.testing.assert_array_equal(client["raw"][uid]["primary"]["img"].read(), FRAMES)
    client.context.close()


def test_a_failed_raw_run_goes_to_the_backup(catalog, tmp_path):
    documents = list(raw_documents(tmp_path / "scan.h5"))
    write = raw_writer(catalog["raw"], backup_directory=tmp_path / "backup")
    for name, doc in documents:
        write(name, doc)
    for name, doc in documents:  # the same uid twice is a conflict
        write(name, doc)
    (file,) = (tmp_path / "backup").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["name"] for line in lines] == [name for name, _ in documents]


def test_a_derived_run_that_comes_again_is_written_once(catalog, derived_documents):
    documents = derived_documents((2, 3), page=2)
    write = derived_writer(catalog["derived"])
    for pairs in (documents[:3], documents, documents):
        for name, doc in pairs:
            write(name, doc)
    run = catalog["derived"][documents[0][1]["uid"]]
    assert run["primary"].base["internal"].read()["seq_num"].tolist() == [1, 2, 3, 4, 5, 6]


def test_catalogues_of_one_process_do_not_lock_each_other_out(catalog, tmp_path):
    with serve(tmp_path) as url:
        other = from_uri(url)
        assert list(other) == list(catalog) == NAMES
        other.context.close()


def test_served_catalogue_wants_its_key_and_listens_on_this_machine_alone(
    tmp_path, derived_documents
):
    documents = derived_documents((2, 3))
    with serve(tmp_path) as url:
        client = from_uri(url)
        write = derived_writer(client["derived"])
        for name, doc in documents:
            write(name, doc)
        assert client["derived"].values().last()["primary"]["strain"].read().shape == (6,)
        client.context.close()

        base, key = url.split("?api_key=")
        assert len(key) == 64
        host, port = base.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        with pytest.raises(OSError, match="in use"), serve(tmp_path, port=int(port)):
            pass
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{base}/api/v1/metadata/derived")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_served_paths_cannot_climb_out_of_their_route(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    up = "/".join([".."] * 12)
    with serve(tmp_path / "catalog") as url:
        base, query = url.split("?")
        host, port = base.removeprefix("http://").split(":")
        for path in (
            f"/ui/{up}{secret}",
            f"/ui/{secret}",
            f"/ui/%2e%2e/{up}{secret}",
            f"/static/{up}{secret}",
            f"/ui/{secret}".replace("/secret", "%2fsecret"),
            "/ui/" + f"{up}{secret}".replace("/", "%5c"),
        ):
            with socket.create_connection((host, int(port))) as connection:
                request = (
                    f"GET {path}?{query} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                )
                connection.sendall(request.encode())
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert answer.endswith(b"</html>\n") or b" 404 " in answer.split(b"\r\n")[0], path
            assert b"secret" not in answer.split(b"\r\n\r\n", 1)[1], path
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{base}/api/graphql?{query}")
        page = urllib.request.urlopen(f"{base}/ui/?{query}").read()
        assert b"<html" in page


def test_a_request_reads_no_signatures(catalog, monkeypatch):
    """FastAPI would, of every function behind a route: a third of what a request takes."""
    monkeypatch.setattr("fastapi.dependencies.utils.get_dependant", None)
    assert list(catalog) == NAMES
