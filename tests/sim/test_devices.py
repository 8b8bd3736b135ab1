import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlparse

import h5py
import numpy as np
import pytest
from bluesky.protocols import EventPageCollectable, Flyable, Pausable, WritesStreamAssets

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.sim import EmbeddedSXDM, Flight, SimulatedSXDM, phantom


@pytest.fixture
def sxdm(geometry: Geometry, tmp_path: Path) -> SimulatedSXDM:
    return SimulatedSXDM(phantom("unique", (3, 4)), geometry, tmp_path)


def fly(sxdm: SimulatedSXDM | EmbeddedSXDM, flight: Flight) -> None:
    sxdm.prepare(flight).wait(20)
    sxdm.kickoff().wait(1)
    sxdm.complete().wait(20)


def path_of(sxdm: SimulatedSXDM) -> Path:
    source = sxdm.describe_collect()[sxdm.image_key]["source"]
    return Path(unquote(urlparse(source).path))


def test_the_devices_speak_the_protocols_of_their_dialects(
    sxdm: SimulatedSXDM, geometry: Geometry
) -> None:
    embedded = EmbeddedSXDM(phantom("unique", (3, 4)), geometry)
    for device in (sxdm, embedded):
        assert isinstance(device, Flyable)
        assert isinstance(device, Pausable)
    assert isinstance(sxdm, WritesStreamAssets)
    assert not isinstance(embedded, WritesStreamAssets)
    assert isinstance(embedded, EventPageCollectable)


def test_the_file_holds_what_was_flown_and_nothing_else(sxdm: SimulatedSXDM) -> None:
    sxdm.stage()
    fly(sxdm, Flight(range(3, 7)))
    path = path_of(sxdm)
    sxdm.unstage()
    with h5py.File(path) as file:
        frames = file["/entry/data/data"]
        assert frames.dtype == np.uint16
        assert frames.chunks == (1, 160, 144)
        np.testing.assert_array_equal(frames[:], [sxdm.frame(p) for p in (3, 4, 5, 6)])


def test_positions_scatter_about_the_grid(geometry: Geometry, tmp_path: Path) -> None:
    sample = phantom("unique", (12, 12))
    sxdm = SimulatedSXDM(sample, geometry, tmp_path, position_jitter=0.05)
    sxdm.stage()
    fly(sxdm, Flight(range(1, 145)))
    path = path_of(sxdm)
    sxdm.unstage()
    truth = sample.in_scan_order(snake=True)
    with h5py.File(path) as file:
        for motor, axis in (("sample_y", "y"), ("sample_x", "x")):
            off = file[f"/entry/positions/{motor}"][:] - truth[axis]
            assert off.std() == pytest.approx(0.05 * 0.05, rel=0.3)  # steps of 0.05 µm


def test_another_process_can_read_while_the_file_grows(sxdm: SimulatedSXDM) -> None:
    script = (
        "import h5py, sys\n"
        "file = h5py.File(sys.argv[1], 'r', swmr=True, libver='latest')\n"
        "frames, x = file['/entry/data/data'], file['/entry/positions/sample_x']\n"
        "print(len(frames), frames[:].sum(), len(x), flush=True)\n"
        "input()\n"
        "frames.refresh(), x.refresh()\n"
        "print(len(frames), frames[:].sum(), len(x), flush=True)\n"
    )
    sxdm.stage()
    fly(sxdm, Flight(range(1, 5)))
    with subprocess.Popen(
        [sys.executable, "-c", script, path_of(sxdm)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        seen = [reader.stdout.readline()]
        list(sxdm.collect_asset_docs())
        fly(sxdm, Flight(range(5, 9)))
        reader.stdin.write("\n")
        reader.stdin.flush()
        seen.append(reader.stdout.readline())
    sxdm.unstage()
    frames = [sxdm.frame(p) for p in range(1, 9)]
    assert [line.split() for line in seen] == [
        ["4", str(np.sum(frames[:4])), "4"],
        ["8", str(np.sum(frames)), "8"],
    ]


def test_frames_can_be_collected_during_the_flight(sxdm: SimulatedSXDM) -> None:
    sxdm.stage()
    sxdm.prepare(Flight(range(1, 13), dwell_s=0.05)).wait(20)
    sxdm.kickoff().wait(1)
    docs = []
    flown = sxdm.complete()
    enough = threading.Event()
    while not docs and not flown.done:
        docs = list(sxdm.collect_asset_docs())
        enough.wait(0.01)
    assert docs and not flown.done
    flown.wait(20)
    docs += sxdm.collect_asset_docs()
    sxdm.unstage()
    names = [name for name, _ in docs]
    assert names[:6] == ["stream_resource"] * 3 + ["stream_datum"] * 3
    ranges = [doc["indices"] for name, doc in docs if name == "stream_datum"]
    assert ranges[0]["start"] == 0 and ranges[-1]["stop"] == 12
    for one, next_one in zip(ranges[::3], ranges[3::3], strict=False):
        assert one["stop"] == next_one["start"]


def test_a_flight_takes_its_dwell_time(sxdm: SimulatedSXDM) -> None:
    sxdm.stage()
    sxdm.prepare(Flight(range(1, 11), dwell_s=0.02)).wait(20)
    start = time.monotonic()
    sxdm.kickoff().wait(1)
    sxdm.complete().wait(20)
    assert time.monotonic() - start >= 0.2
    sxdm.unstage()


@pytest.mark.parametrize("dialect", [SimulatedSXDM, EmbeddedSXDM])
def test_frames_that_nobody_collected_are_dropped_by_the_next_flight(
    dialect: type[SimulatedSXDM | EmbeddedSXDM], geometry: Geometry, tmp_path: Path
) -> None:
    sxdm = dialect(phantom("unique", (3, 4)), geometry, tmp_path)
    sxdm.stage()
    fly(sxdm, Flight(range(1, 5)))
    first_attempt = sxdm.frame(2)
    fly(sxdm, Flight(range(1, 4)))
    if isinstance(sxdm, SimulatedSXDM):
        docs = [doc for name, doc in sxdm.collect_asset_docs() if name == "stream_datum"]
        assert [doc["indices"] for doc in docs] == [{"start": 0, "stop": 3}] * 3
        path = path_of(sxdm)
        sxdm.unstage()
        with h5py.File(path) as file:
            taken = file["/entry/data/data"][1]
    else:
        (page,) = sxdm.collect_pages()
        assert len(page["data"]["sample_x"]) == 3
        taken = page["data"][sxdm.image_key][1]
        sxdm.unstage()
    np.testing.assert_array_equal(taken, sxdm.frame(2))
    assert not np.array_equal(taken, first_attempt)


def test_what_cannot_be_flown_is_refused(sxdm: SimulatedSXDM) -> None:
    with pytest.raises(ValueError, match=r"range\(10, 14\); the sample has points 1 to 12"):
        sxdm.prepare(Flight(range(10, 14)))
    with pytest.raises(ValueError, match=r"cannot fly points range\(0, 3\)"):
        sxdm.prepare(Flight(range(0, 3)))
    with pytest.raises(RuntimeError, match="complete before kickoff"):
        sxdm.complete()
    sxdm.prepare(Flight(range(1, 5))).wait(20)
    with pytest.raises(RuntimeError, match="stage and prepare"):
        sxdm.kickoff()
    sxdm.stage()
    sxdm.prepare(Flight(range(1, 5), dwell_s=10)).wait(20)
    sxdm.kickoff()
    with pytest.raises(RuntimeError, match="is flying"):
        sxdm.kickoff()
    with pytest.raises(RuntimeError, match="is flying"):
        sxdm.prepare(Flight(range(1, 5)))
    sxdm.unstage()  # ends the flight
    assert sxdm.complete().done
