"""A real RunEngine flies, the callback maps, point by point, whatever happens."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from bluesky.callbacks.best_effort import BestEffortCallback
from bluesky.callbacks.mpl_plotting import LivePlot
from bluesky.utils import RunEngineInterrupted
from event_model import DocumentNames, schema_validators

from nanobeam_bluesky.callbacks import BackgroundSink, NanobeamCallback
from nanobeam_bluesky.documents import to_maps
from nanobeam_bluesky.geometry import ROI, Geometry
from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.sim import EmbeddedSXDM, SimulatedSXDM, phantom, sxdm_fly

TOLERANCE = {"strain": 8e-4, "omega": 2.5e-3, "chi": 6e-3}
"""Five times what the network misses; the points of "unique" are farther apart."""
SHAPE = (6, 7)


@pytest.fixture(scope="module")
def callback():
    """One callback for all runs, as at a beamline."""
    callback = NanobeamCallback()
    yield callback
    callback.close()


@pytest.fixture
def derived(callback):
    """Documents of the derived runs; every one is validated."""
    documents = []
    token = callback.subscribe(lambda name, doc: documents.append((name, doc)))
    yield documents
    callback.unsubscribe(token)
    for name, doc in documents:
        schema_validators[DocumentNames[name]].validate(doc)
    for run in split(documents):
        check_run(run)


def split(documents):
    """Derived runs by their start, in order."""
    runs = {}
    owner = {}
    for name, doc in documents:
        if name == "start":
            uid = doc["uid"]
        elif name in ("descriptor", "stop"):
            uid = doc["run_start"]
            owner[doc["uid"]] = uid
        else:
            uid = owner[doc["descriptor"]]
        runs.setdefault(uid, []).append((name, doc))
    return list(runs.values())


def check_run(run):
    """What holds for every derived run."""
    names = [name for name, _ in run]
    assert names[0] == "start"
    assert names[-1] == "stop"
    assert Counter(names)["stop"] == 1
    numbers = set()
    for name, doc in run:
        if name == "event_page":
            assert doc["seq_num"] == sorted(set(doc["seq_num"]))
            numbers |= set(doc["seq_num"])
    assert run[-1][1]["num_events"].get("primary", 0) == len(numbers)


@pytest.fixture
def engine(RE, callback, derived, geometry, tmp_path):
    """Fly a sample: ``fly(sample, …)`` returns the documents of its derived run."""

    def fly(sample, dialect=SimulatedSXDM, change=None, timeout=60, **options):
        plan = {k: options.pop(k) for k in ("snake", "stop_after", "md") if k in options}
        sxdm = dialect(sample, geometry, tmp_path, **{"counts": 20_000} | options)
        before = len(split(derived))
        token = RE.subscribe(_changed(callback, change) if change else callback)
        try:
            RE(sxdm_fly(sxdm, **plan))
        finally:
            RE.unsubscribe(token)
        assert callback.wait(timeout)
        runs = split(derived)[before:]
        assert len(runs) == 1
        return runs[0]

    return fly


def _changed(callback, change):
    """Let the callback see other documents than the RunEngine has emitted."""

    def receive(name, doc):
        for item in change(name, dict(doc)):
            callback(*item)

    return receive


def compare(run, sample, points=None, *, snake=True):
    """Check every point of a derived run against the sample."""
    truth = sample.in_scan_order(snake=snake)
    last = {}
    for name, doc in run:
        if name == "event_page":
            for i, number in enumerate(doc["seq_num"]):
                last[number] = {key: column[i] for key, column in doc["data"].items()}
    assert sorted(last) == list(range(1, (points or sample.size) + 1))
    for number, found in last.items():
        assert found["flags"] == 0, (number, Flag(found["flags"]))
        assert (found["row"], found["col"]) == (truth["row"][number - 1], truth["col"][number - 1])
        for key, tolerance in TOLERANCE.items():
            assert found[key] == pytest.approx(truth[key][number - 1], abs=tolerance), (number, key)
        for motor, key in (("sample_y", "y"), ("sample_x", "x")):
            assert found[motor] == pytest.approx(truth[key][number - 1], abs=0.01)
    return last


# ------------------------------------------------------------------------ pairing


@pytest.mark.parametrize("snake", [True, False])
@pytest.mark.parametrize("dialect", [SimulatedSXDM, EmbeddedSXDM])
def test_every_point_has_its_own_values(engine, dialect, snake):
    sample = phantom("unique", SHAPE)
    run = engine(sample, dialect, snake=snake)
    compare(run, sample, snake=snake)
    assert run[-1][1]["exit_status"] == "success"
    maps = to_maps(run)
    for key, tolerance in TOLERANCE.items():
        np.testing.assert_allclose(maps[key], getattr(sample, key), atol=tolerance)
    np.testing.assert_allclose(maps["sample_x"], sample.x, atol=0.01)
    np.testing.assert_allclose(maps["sample_y"], sample.y, atol=0.01)


def test_a_truncated_scan_leaves_the_rest_blank(engine):
    sample = phantom("unique", SHAPE)
    run = engine(sample, stop_after=17)
    compare(run, sample, points=17)
    maps = to_maps(run)
    assert int(np.isfinite(maps["strain"]).sum()) == 17
    assert int((maps["flags"] == Flag.FRAME_MISSING).sum()) == sample.size - 17
    np.testing.assert_allclose(maps["sample_y"], sample.y, atol=0.01)


@pytest.mark.parametrize("dialect", [SimulatedSXDM, EmbeddedSXDM])
def test_a_paused_and_rewound_scan_keeps_the_last_frame_of_a_point(
    RE, callback, derived, geometry, tmp_path, dialect
):
    sample = phantom("unique", SHAPE)
    sxdm = dialect(sample, geometry, tmp_path, counts=20_000)
    take, pauses = sxdm._take, iter([10])

    def pause_in_second_row(index, row, col):
        take(index, row, col)
        if index == 9 and next(pauses, None):
            sxdm._flush(10)
            time.sleep(0.3)  # documents of the first attempt get out
            RE.request_pause()

    sxdm._take = pause_in_second_row
    token = RE.subscribe(callback)
    with pytest.raises(RunEngineInterrupted):
        RE(sxdm_fly(sxdm, dwell_s=0.02, flush_period=0.02))
    RE.resume()
    RE.unsubscribe(token)
    assert callback.wait(60)
    (run,) = split(derived)
    last = compare(run, sample)
    # the rewound points have new photon noise: their last frames are the sample's
    for number in range(8, 15):
        roi = geometry.roi
        frame = sxdm.frame(number)[roi.slices]
        assert last[number]["counts"] == frame.sum()


def test_positions_that_come_after_the_frames_are_joined_by_point(engine):
    late = []

    def lag(name, doc):
        """Hold the motors' documents back until the end."""
        if name == "stream_resource" and doc["data_key"].startswith("sample_"):
            late.append(doc["uid"])
        if name == "stream_datum" and doc["stream_resource"] in late:
            held.append((name, doc))
            return
        if name == "stop":
            yield from reversed(held)
        yield name, doc

    held = []
    sample = phantom("unique", SHAPE)
    compare(engine(sample, change=lag), sample)


def test_a_point_without_position_is_flagged_not_lost(engine):
    def drop(name, doc):
        if name == "stream_datum" and doc["seq_nums"]["start"] == 1 and doc["uid"] in first:
            return
        if name == "stream_resource" and doc["data_key"] == "sample_x":
            first.append(f"{doc['uid']}/0")
        yield name, doc

    first = []
    sample = phantom("unique", SHAPE)
    run = engine(sample, change=drop)
    flags = np.concatenate([d["data"]["flags"] for n, d in run if n == "event_page"])
    assert set(flags) == {0, Flag.POSITION_MISSING}
    assert len(flags) == sample.size


def test_interleaved_runs_do_not_mix(RE, callback, derived, geometry, tmp_path):
    samples = [phantom("unique", SHAPE, seed=seed) for seed in (1, 2)]
    recorded = [[], []]
    for sample, documents in zip(samples, recorded, strict=True):
        sxdm = SimulatedSXDM(sample, geometry, tmp_path, counts=20_000)
        RE(sxdm_fly(sxdm), lambda name, doc, into=documents: into.append((name, doc)))
    for pair in zip(*recorded, strict=False):
        for name, doc in pair:
            callback(name, doc)
    longest = max(recorded, key=len)
    for name, doc in longest[min(map(len, recorded)) :]:
        callback(name, doc)
    assert callback.wait(60)
    for run, sample in zip(split(derived), samples, strict=True):
        compare(run, sample)


# -------------------------------------------------------------------- derived run


def test_the_derived_run_says_where_it_comes_from(engine, geometry):
    run = engine(phantom("figure3", (4, 5)), md={"sample": "film 7"})
    start, descriptor = run[0][1], run[1][1]
    assert start["sample"] == "film 7"
    assert start["shape"] == [4, 5]
    assert start["nanobeam"]["analyzer"]["method"] == "refine"
    assert Geometry.model_validate(start["nanobeam"]["geometry"]) == geometry
    assert start["nanobeam"]["roi"] == geometry.roi.model_dump()
    configuration = descriptor["configuration"]["nanobeam"]["data"]
    assert configuration["nanobeam_thickness_nm"] == 11.7
    assert all(key["units"] is not None for key in descriptor["data_keys"].values())


def test_stock_callbacks_work_on_the_derived_run(engine, callback):
    plot = LivePlot("strain", "sample_x")
    best = BestEffortCallback()
    best.disable_plots()
    tokens = [callback.subscribe(sink) for sink in (plot, best)]
    run = engine(phantom("figure3", (4, 5)))
    assert callback.wait(30)
    for token in tokens:
        sink = callback._sinks[token]
        assert sink.health.errors == 0, sink.health.last_error
        callback.unsubscribe(token)
    assert len(plot.y_data) == 20
    assert run[-1][1]["exit_status"] == "success"


def test_a_derived_run_is_not_analysed_again(callback, engine, derived):
    run = engine(phantom("figure3", (2, 3)))
    for name, doc in run:
        callback(name, doc)
    assert callback.wait(10)
    assert len(split(derived)) == 1


def test_what_it_is_given_counts_in_place_of_the_defaults(RE, geometry, tmp_path):
    roi = ROI(row=20, col=10, height=96, width=112)
    callback = NanobeamCallback("correlation", preset="auto", roi=roi)
    documents = []
    callback.subscribe(lambda name, doc: documents.append((name, doc)))
    scan = {"type": "2D_FLY_PANDA"}  # as at HXN, but without a shape
    callback("start", {"uid": "raw", "time": 0.0, "scan": scan, "nanobeam": {}})
    RE(sxdm_fly(SimulatedSXDM(phantom("figure3", (2, 3)), geometry, tmp_path)), callback)
    assert callback.wait(60)
    callback.close()
    other, run = split(documents)
    assert "looked at start['scan']['shape']" in other[-1][1]["reason"]
    block = run[0][1]["nanobeam"]
    assert block["roi"] == {"row": 20, "col": 10, "height": 96, "width": 112}
    assert block["analyzer"]["method"] == "correlation"
    assert run[-1][1]["exit_status"] == "success"


# ------------------------------------------------------------------------- faults


def flagged(run):
    """Point number → flags."""
    return {
        number: flags
        for name, doc in run
        if name == "event_page"
        for number, flags in zip(doc["seq_num"], doc["data"]["flags"], strict=True)
    }


def without(*keys):
    def change(name, doc):
        if name == "start":
            doc["nanobeam"] = {k: v for k, v in doc["nanobeam"].items() if k not in keys}
        yield name, doc

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("thickness_nm"), "thickness_nm missing: looked at start['nanobeam']"),
        (without("optics", "roi_shape"), "optics missing"),
    ],
)
def test_missing_metadata_fail_the_derived_run_and_say_what_to_add(engine, change, words):
    run = engine(phantom("figure3", (2, 3)), change=change)
    assert [name for name, _ in run] == ["start", "stop"]
    assert run[-1][1]["exit_status"] == "fail"
    assert words in run[-1][1]["reason"]


def test_an_energy_that_contradicts_the_wavelength_is_refused(engine):
    def change(name, doc):
        if name == "start":
            doc["nanobeam"] = doc["nanobeam"] | {"energy_keV": 11.3, "wavelength_angstrom": 2.0}
        yield name, doc

    run = engine(phantom("figure3", (2, 3)), change=change)
    assert "contradiction: wavelength_angstrom" in run[-1][1]["reason"]


def test_a_run_that_no_preset_matches_is_ignored(callback, derived, RE):
    from bluesky.plans import count
    from ophyd.sim import SynSignal

    RE(count([SynSignal(func=lambda: 1, name="diode")], 3), callback)
    assert callback.wait(10)
    assert derived == []


def test_a_killed_worker_loses_no_point(RE, callback, derived, geometry, tmp_path):
    sample = phantom("unique", (10, 20))
    sxdm = SimulatedSXDM(sample, geometry, tmp_path, counts=20_000)
    restarts = callback.health.worker_restarts

    def kill_once(name, doc):
        if (
            name == "stream_datum"
            and doc["seq_nums"]["start"] > 50
            and callback.health.worker_pid in alive
        ):
            alive.clear()
            os.kill(callback.health.worker_pid, signal.SIGKILL)
        callback(name, doc)

    alive = [callback.health.worker_pid]
    RE(sxdm_fly(sxdm, dwell_s=0.005), kill_once)
    assert callback.wait(90)
    (run,) = split(derived)
    compare(run, sample)
    assert run[-1][1]["exit_status"] == "success"
    assert callback.health.worker_restarts == restarts + 1


def recorded(RE, geometry, tmp_path, sample):
    """Documents of a scan, and its stream resource of frames."""
    documents = []
    sxdm = SimulatedSXDM(sample, geometry, tmp_path, counts=20_000)
    RE(sxdm_fly(sxdm), lambda name, doc: documents.append((name, doc)))
    resources = [doc for name, doc in documents if name == "stream_resource"]
    return documents, next(doc for doc in resources if doc["data_key"] == "sxdm_image")


def test_a_worker_that_hangs_costs_the_points_that_it_hangs_on(
    RE, callback, derived, geometry, tmp_path, monkeypatch
):
    monkeypatch.setattr("nanobeam_bluesky.callbacks.worker_client.HUNG_SECONDS", 2.0)
    monkeypatch.setattr("nanobeam_bluesky.documents.pipeline.TASK_POINTS", 7)
    os.mkfifo(tmp_path / "fifo")  # HDF5 waits for ever for who writes to it
    with h5py.File(tmp_path / "hangs.h5", "w") as file:
        file["frames"] = h5py.ExternalLink(str(tmp_path / "fifo"), "frames")
    sample = phantom("unique", SHAPE)
    documents, images = recorded(RE, geometry, tmp_path / "raw", sample)
    (raw,) = (tmp_path / "raw").iterdir()
    content, restarts = raw.read_bytes(), callback.health.worker_restarts
    hangs = images | {
        "uid": "hangs",
        "uri": f"file://localhost{tmp_path}/hangs.h5",
        "parameters": images["parameters"] | {"dataset": "frames"},
    }
    for name, doc in documents:
        ours = doc.get("stream_resource") == images["uid"]
        fourth = ours and doc["seq_nums"]["start"] == 22
        callback(name, doc | {"stream_resource": "hangs"} if fourth else doc)
        if doc is images:
            callback(name, hangs)
    assert callback.wait(60)
    (run,) = split(derived)
    flags = flagged(run)
    assert {point for point, flag in flags.items() if flag} == set(range(22, 29))
    assert len(flags) == sample.size
    assert run[-1][1]["reason"] == "the worker process did not answer for 2 s"
    assert callback.health.worker_restarts >= restarts + 2
    assert raw.read_bytes() == content


def test_a_writer_without_swmr_is_never_kept_from_its_file(
    RE, callback, derived, geometry, tmp_path, monkeypatch
):
    """Row by row it opens the file, appends and closes, while the worker looks for the row."""
    monkeypatch.setattr("nanobeam_bluesky.documents.pipeline.RETRY_SECONDS", (0.0,))
    sample = phantom("unique", (4, 5))
    documents, images = recorded(RE, geometry, tmp_path / "raw", sample)
    with h5py.File(next((tmp_path / "raw").iterdir())) as file:
        frames = file["entry/data/data"][:]
    path = tmp_path / "plain.h5"
    for name, doc in documents[:-1]:
        if doc.get("stream_resource") == images["uid"]:
            datum = doc
        else:
            callback(name, doc | {"uri": f"file://localhost{path}"} if doc is images else doc)
    with h5py.File(path, "w") as file:
        file.create_dataset("entry/data/data", (0, 160, 144), "u2", maxshape=(None, 160, 144))
    while not derived:  # the worker is at work
        time.sleep(0.02)
    for first in range(0, 20, 5):
        limits = {"start": first, "stop": first + 5}
        numbers = {"start": first + 1, "stop": first + 6}
        row = {"uid": f"row {first}", "indices": limits, "seq_nums": numbers}
        callback("stream_datum", datum | row)
        for count in range(first + 1, first + 6):
            for _ in range(10):
                with h5py.File(path, "a"):
                    pass
                time.sleep(0.003)
            with h5py.File(path, "a") as file:
                file["entry/data/data"].resize(count, axis=0)
                file.flush()  # the frame is not there yet
                time.sleep(0.02)
                file["entry/data/data"][count - 1] = frames[count - 1]
    callback(*documents[-1])
    assert callback.wait(60)
    (run,) = split(derived)
    compare(run, sample)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["entry/data/data"], frames)


KILLED = """
import os, signal, sys, time
from bluesky import RunEngine
from nanobeam_bluesky.callbacks import BackgroundSink, NanobeamCallback
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.sim import SimulatedSXDM, phantom, sxdm_fly

def refuse(name, doc):
    pages.append(name)
    raise ConnectionRefusedError("Tiled is down")

def kill(name, doc):
    callback(name, doc)
    if name == "stream_datum" and doc["seq_nums"]["stop"] > 30:
        while callback.health.spooled < 3:
            time.sleep(0.01)
        print(callback.health.worker_pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

pages = []
geometry = Geometry.model_validate_json(sys.stdin.read())
callback = NanobeamCallback()
callback.subscribe(BackgroundSink(refuse, spool=f"{sys.argv[1]}/spool"))
RE = RunEngine(context_managers=[])
sample = phantom("unique", (6, 7))
RE(sxdm_fly(SimulatedSXDM(sample, geometry, f"{sys.argv[1]}/raw"), dwell_s=0.02), kill)
"""


def test_after_the_run_engine_was_killed_the_next_process_goes_on(
    RE, callback, derived, geometry, tmp_path
):
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        input=geometry.model_dump_json(exclude_none=True),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert found.returncode == -signal.SIGKILL
    end = time.monotonic() + 10
    while Path(f"/proc/{int(found.stdout)}").exists():  # its worker ends by itself
        assert time.monotonic() < end
        time.sleep(0.05)
    with h5py.File(next((tmp_path / "raw").iterdir()), locking=False, swmr=True) as file:
        assert len(file["entry/data/data"]) >= 30
    tiled = []
    sink = BackgroundSink(lambda name, doc: tiled.append((name, doc)), spool=tmp_path / "spool")
    token = callback.subscribe(sink)
    sample = phantom("unique", (4, 5))
    RE(sxdm_fly(SimulatedSXDM(sample, geometry, tmp_path, counts=20_000)), callback)
    assert callback.wait(30)
    callback.unsubscribe(token)
    interrupted, complete = split(tiled)
    assert [name for name, _ in interrupted[:2]] == ["start", "descriptor"]
    assert {name for name, _ in interrupted[2:]} == {"event_page"}  # and no stop
    assert complete == derived
    compare(complete, sample)


def test_vanished_frames_are_flagged_and_the_rest_analysed(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("nanobeam_bluesky.documents.pipeline.DEADLINE_SECONDS", 1.0)

    def redirect(name, doc):
        """Points from 22 on are said to be in a file that does not exist."""
        if name == "stream_resource" and doc["data_key"] == "sxdm_image":
            resources.append(doc)
            yield name, doc
            yield name, doc | {"uid": "gone", "uri": f"file://localhost{tmp_path}/gone.h5"}
        elif name == "stream_datum" and doc["stream_resource"] == resources[0]["uid"]:
            if doc["seq_nums"]["start"] > 21:
                doc = doc | {"stream_resource": "gone"}
            yield name, doc
        else:
            yield name, doc

    resources = []
    sample = phantom("unique", SHAPE)
    run = engine(sample, change=redirect)
    flags = flagged(run)
    assert sorted(flags) == list(range(1, 43))
    assert {flags[p] for p in range(1, 22)} == {0}
    assert {flags[p] for p in range(22, 43)} == {Flag.FRAME_MISSING}
    assert run[-1][1]["exit_status"] == "success"
    assert "No such file" in run[-1][1]["reason"]


def test_frames_smaller_than_the_roi_are_flagged(engine, tmp_path, monkeypatch):
    with h5py.File(tmp_path / "small.h5", "w") as file:
        file["d"] = np.zeros((6, 100, 100), np.uint16)

    def redirect(name, doc):
        if name == "stream_resource" and doc["data_key"] == "sxdm_image":
            doc = doc | {
                "uri": f"file://localhost{tmp_path}/small.h5",
                "parameters": {"dataset": "d", "chunk_shape": [1, 100, 100]},
            }
        yield name, doc

    run = engine(phantom("figure3", (2, 3)), change=redirect)
    assert set(flagged(run).values()) == {Flag.FRAME_MISSING}
    assert "100 × 100" in run[-1][1]["reason"]


def test_a_missing_stop_document_is_said_when_the_callback_closes_for_good(RE, geometry, tmp_path):
    callback = NanobeamCallback()
    documents = []
    callback.subscribe(lambda name, doc: documents.append((name, doc)))

    def lose_stop(name, doc):
        if name != "stop":
            callback(name, doc)

    RE(sxdm_fly(SimulatedSXDM(phantom("figure3", (2, 3)), geometry, tmp_path)), lose_stop)
    assert not callback.wait(0.3)
    callback.close()
    stop = documents[-1][1]
    assert stop["exit_status"] == "fail"
    assert "before the run had stopped" in stop["reason"]
    pending = callback.health.documents_pending
    callback("start", {"uid": "late"})
    assert callback.health.documents_pending == pending
    assert callback.wait()


def test_an_aborted_scan_closes_its_derived_run_likewise(RE, callback, derived, geometry, tmp_path):
    sxdm = SimulatedSXDM(phantom("unique", SHAPE), geometry, tmp_path)

    def abort(name, doc):
        callback(name, doc)
        if name == "stream_datum" and doc["seq_nums"]["start"] > 7 and not aborted:
            aborted.append(threading.Thread(target=RE.request_pause))
            aborted[0].start()

    aborted = []
    with pytest.raises(RunEngineInterrupted):
        RE(sxdm_fly(sxdm, dwell_s=0.01, flush_period=0.02), abort)
    RE.abort("enough seen")
    assert callback.wait(60)
    (run,) = split(derived)
    assert run[-1][1]["exit_status"] == "abort"
    assert 7 <= run[-1][1]["num_events"]["primary"] < sxdm.sample.size


def test_more_points_than_the_shape_has_are_kept_and_said(engine):
    def shrink(name, doc):
        if name == "start":
            doc["shape"] = [5, 7]
        yield name, doc

    run = engine(phantom("unique", SHAPE), change=shrink)
    assert run[-1][1]["exit_status"] == "fail"
    assert "7 points more than shape" in run[-1][1]["reason"]
    assert sum(bool(f & Flag.POSITION_MISSING) for f in flagged(run).values()) == 7


def test_a_sink_that_fails_is_counted_and_disturbs_no_other(engine, callback):
    def broken(name, doc):
        raise OSError("No space left on device")

    token = callback.subscribe(broken)
    run = engine(phantom("figure3", (2, 3)))
    assert run[-1][1]["exit_status"] == "success"
    assert callback.health.errors >= 1
    callback.unsubscribe(token)


@pytest.mark.parametrize(
    "options", [{"analyzer": "magic"}, {"on_missing_model": "guess"}, {"fit": ("strain", "phase")}]
)
def test_unknown_options_are_refused_at_once(options):
    with pytest.raises(ValueError, match=r"must be one of|must hold"):
        NanobeamCallback(**options)


def test_documents_that_make_no_sense_stop_nothing(engine, callback):
    errors = callback.health.errors
    for item in [("start", {}), ("event", {"descriptor": []}), ("descriptor", 5)]:
        callback(*item)
    run = engine(phantom("figure3", (2, 3)))
    assert run[-1][1]["exit_status"] == "success"
    assert callback.health.errors == errors + 2
