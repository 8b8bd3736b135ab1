"""Real files that grow: each becomes one run, announced while it grows, closed when complete."""

import os
import threading

import h5py
import numpy as np
import pytest
import tifffile
from event_model import DocumentNames, schema_validators

from nanobeam_bluesky.transports import FileWatch, files

GEOMETRY = {"energy_keV": 11.3}
FRAMES = np.arange(8 * 4 * 5, dtype=np.uint16).reshape(8, 4, 5)

WRITER = {"libver": "latest", "locking": False}
"""Within one process HDF5 opens a file one way only; a writer of its own may lock it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(files, "CLOSED_SECONDS", 0.2)


@pytest.fixture
def watch(listen):
    def begin(pattern, **options):
        return listen(FileWatch(str(pattern), GEOMETRY, **options))

    return begin


def points(documents):
    return sum(
        doc["seq_nums"]["stop"] - doc["seq_nums"]["start"]
        for name, doc in list(documents)
        if name == "stream_datum"
    )


def check(documents):
    for name, doc in documents:
        schema_validators[DocumentNames[name]].validate(doc)
    assert documents[0][1]["nanobeam"] == GEOMETRY | {"detector": "frames"}
    return [doc for name, doc in documents if name == "stop"]


def write(file, count, size=0):
    """Make a dataset with room for 8 frames and write some of them; in its full size at once."""
    dataset = file.create_dataset("entry/data", (size or 8, 4, 5), "u2", chunks=(1, 4, 5))
    dataset[:count] = FRAMES[:count]
    return dataset


def test_frames_are_announced_as_they_are_written_and_the_last_one_ends_the_run(
    tmp_path, watch, until
):
    (tmp_path / "old.h5").write_bytes(b"old")
    documents = watch(tmp_path / "*.h5", shape=(2, 4), snake=True)
    with h5py.File(tmp_path / "scan 1.h5", "w", **WRITER) as file:
        dataset = write(file, 3)
        file.swmr_mode = True
        until(lambda: points(documents) == 3)
        dataset[3:5] = FRAMES[3:5]
        dataset.flush()
        until(lambda: points(documents) == 5)
        dataset[5:] = FRAMES[5:]
        dataset.flush()
        until(lambda: documents[-1][0] == "stop")
    (stop,) = check(documents)
    assert (stop["exit_status"], stop["num_events"]) == ("success", {"primary": 8})
    start = documents[0][1]
    assert (start["shape"], start["snaking"]) == ([2, 4], [False, True])
    resource = documents[2][1]
    assert resource["uri"] == f"file://localhost{tmp_path}/scan%201.h5"
    assert resource["parameters"] == {"dataset": "/entry/data", "chunk_shape": [1, 4, 5]}


def test_a_closed_file_of_unknown_length_is_one_row_and_an_idle_one_ends(tmp_path, watch, until):
    closed = watch(tmp_path / "a*.h5")
    idle = watch(tmp_path / "b*.h5", shape=(3, 4), idle=0.3)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x/frames", data=FRAMES, maxshape=(None, 4, 5))
    with h5py.File(tmp_path / "b.h5", "w", **WRITER) as file:
        write(file, 6)
        file.swmr_mode = True
        until(lambda: closed and closed[-1][0] == "stop")
        until(lambda: idle and idle[-1][0] == "stop")
    assert check(closed)[0]["num_events"] == {"primary": 8}
    assert closed[0][1]["shape"] == [1, 8]
    (stop,) = check(idle)
    assert (stop["num_events"], stop["reason"]) == ({"primary": 6}, "no growth for 0.3 s")


def test_a_file_of_the_same_name_is_a_new_run(tmp_path, watch, until):
    documents = watch(tmp_path / "*.h5", shape=(2, 4))
    for i in (1, 2):
        with h5py.File(tmp_path / "new", "w", **WRITER) as file:
            write(file, 8)
        os.replace(tmp_path / "new", tmp_path / "scan.h5")
        until(lambda n=i: [name for name, _ in documents].count("stop") == n)
    uids = [doc["uid"] for name, doc in documents if name == "start"]
    assert len(set(uids)) == 2


def test_what_is_no_scan_is_told_of_and_makes_no_run(tmp_path, watch, until, caplog):
    documents = watch(tmp_path / "*.*", idle=0.1)
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"], file["b"] = FRAMES, FRAMES
    tifffile.imwrite(tmp_path / "photo.tif", FRAMES[0])
    tifffile.imwrite(tmp_path / "img_1.tif", FRAMES[0])
    words = ("not readable as HDF5", "say which by --dataset", "expected a number", "--shape")
    until(lambda: all(text in caplog.text for text in words))
    assert documents == []


def test_numbered_tiff_files_are_points_also_late_ones(tmp_path, watch, until):
    documents = watch(tmp_path / "*" / "*.tif", shape=(2, 3), idle=1.0)
    for scan, numbers in (("s1", [98, 99, 101, 100, 102, 103]), ("s2", [1, 2, 4])):
        (tmp_path / scan).mkdir()
        for number in numbers:
            tifffile.imwrite(tmp_path / scan / f"img_{number:05d}.tif", FRAMES[number % 8])
    until(lambda: [name for name, _ in documents].count("stop") == 2)
    stops = check(documents)
    assert [stop["num_events"]["primary"] for stop in stops] == [6, 3]
    found = {}
    for name, doc in documents:
        if name == "stream_resource":
            found[doc["uid"]] = (doc["uri"], doc["parameters"]["template"], {})
        if name == "stream_datum":
            numbers = range(doc["indices"]["start"], doc["indices"]["stop"])
            seq_nums = range(doc["seq_nums"]["start"], doc["seq_nums"]["stop"])
            found[doc["stream_resource"]][2].update(zip(seq_nums, numbers, strict=True))
    assert list(found.values()) == [
        (f"file://localhost{tmp_path}/s1/", "img_{:05d}.tif", {i + 1: 98 + i for i in range(6)}),
        (f"file://localhost{tmp_path}/s2/", "img_{:05d}.tif", {1: 1, 2: 2, 4: 4}),
    ]


def test_the_end_closes_what_is_not_complete_as_aborted(tmp_path, until):
    stop, documents, ready = threading.Event(), [], threading.Event()
    source = FileWatch(str(tmp_path / "*.h5"), GEOMETRY, shape=(2, 4))
    thread = threading.Thread(
        target=source.run, args=(lambda *pair: documents.append(pair), stop, ready.set)
    )
    thread.start()
    assert ready.wait(10)
    with h5py.File(tmp_path / "scan.h5", "w", **WRITER) as file:
        write(file, 2)
    until(lambda: points(documents) == 2)
    stop.set()
    thread.join(10)
    assert check(documents)[0]["exit_status"] == "abort"
