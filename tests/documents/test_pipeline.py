"""One raw run becomes one derived run; here the executor works at once."""

import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from jsonschema import ValidationError

from nanobeam_bluesky.documents import (
    AnalyzerChoice,
    DerivedRun,
    Processor,
    RunPipeline,
    ScanGrid,
    Tally,
    derive,
    to_maps,
)
from nanobeam_bluesky.documents import pipeline as module
from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.sim import EmbeddedSXDM, SimulatedSXDM, phantom, sxdm_fly


class Inline:
    """An executor in the same thread."""

    def __init__(self):
        self.processor = Processor()
        self.tasks = []

    def open(self, pipeline, geometry, choice):
        pipeline.opened(self.processor.open(pipeline.key, geometry, choice))

    in_flight = 3

    def submit(self, pipeline, task):
        self.tasks.append(task)
        pipeline.processed(self.processor.process(task))

    def close(self, pipeline):
        self.processor.close(pipeline.key)


def analyse(documents, *, executor=None, seconds=20, choice=None):
    """Put a recorded run through; returns the derived documents and the tally."""
    derived, tally = [], Tally()
    pipeline = RunPipeline(
        documents[0][1],
        Preset.load("default"),
        executor or Inline(),
        lambda name, doc: derived.append((name, doc)),
        choice=choice,
        tally=tally,
    )
    for name, doc in documents[1:]:
        pipeline.document(name, doc)
        pipeline.poll()
    end = time.monotonic() + seconds
    while not pipeline.closed and time.monotonic() < end:
        time.sleep(0.02)
        pipeline.poll()
    assert pipeline.closed
    return derived, tally


@pytest.fixture
def record(RE, geometry, tmp_path):
    """Fly, and keep the documents."""

    def fly(shape=(4, 6), dialect=SimulatedSXDM, change=None, **options):
        documents = []
        changed = geometry.model_copy(update=change or {})
        sxdm = dialect(phantom("unique", shape), changed, tmp_path, counts=20_000)
        RE(sxdm_fly(sxdm, **options), lambda name, doc: documents.append((name, doc)))
        return documents

    return fly


CALIBRATE = AnalyzerChoice(calibrate=True)


@pytest.mark.parametrize("dialect", [SimulatedSXDM, EmbeddedSXDM])
def test_a_scan_calibrates_its_own_geometry(record, dialect):
    documents = record((5, 8), dialect, change={"pupil_blur_px": 0.8})
    documents[0][1]["nanobeam"] |= {"pupil_blur_px": 0.0, "thickness_nm": 13.0}
    wrong, _ = analyse(documents)
    assert sum(flag > 0 for page in pages(wrong) for flag in page["data"]["flags"]) > 30
    derived, tally = analyse(documents, choice=CALIBRATE)
    assert tally.errors == 0
    flags = [flag for page in pages(derived) for flag in page["data"]["flags"]]
    assert (len(flags), sum(flags)) == (40, 0)
    block = derived[0][1]["nanobeam"]
    assert block["geometry"]["pupil_blur_px"] == pytest.approx(0.8, abs=0.05)
    assert block["geometry"]["thickness_nm"] == pytest.approx(11.7, abs=0.1)
    assert block["analyzer"]["calibration"]["thickness_nm"]["error"] < 0.1


def test_a_scan_that_cannot_be_calibrated_is_analysed_as_it_stands(record):
    documents = record((2, 3))  # too few points
    derived, tally = analyse(documents, choice=CALIBRATE)
    assert sum(len(page["seq_num"]) for page in pages(derived)) == 6
    assert "not calibrated" in derived[0][1]["nanobeam"]["analyzer"]["calibration"]["failed"]
    assert tally.last_error == derived[0][1]["nanobeam"]["analyzer"]["calibration"]["failed"]
    assert "not calibrated" in derived[-1][1]["reason"]


def test_calibration_waits_for_frames_and_gives_up_without_any(record, monkeypatch):
    monkeypatch.setattr(module, "DEADLINE_SECONDS", 1.0)
    documents = record((5, 8))
    for name, doc in documents:
        if name == "stream_resource":
            doc["uri"] += ".not-there"
    derived, _ = analyse(documents, choice=CALIBRATE)
    assert "failed" in derived[0][1]["nanobeam"]["analyzer"]["calibration"]
    flags = {flag for page in pages(derived) for flag in page["data"]["flags"]}
    assert flags == {Flag.FRAME_MISSING | Flag.POSITION_MISSING}  # both were in these files


@pytest.mark.parametrize(
    ("policy", "status", "start"),
    [
        ("universal", "success", "universal"),
        ("fit", "success", "library"),
        ("skip", "fail", None),
    ],
)
def test_without_a_network_the_policy_decides(record, policy, status, start):
    documents = record((2, 3), change={"thickness_nm": 14.0})
    choice = AnalyzerChoice(on_missing_model=policy)
    derived = list(derive(documents, choice=choice))
    assert derived[-1][1]["exit_status"] == status
    if start:
        analyzer = derived[0][1]["nanobeam"]["analyzer"]
        assert (analyzer["method"], analyzer["start"]) == ("refine", start)
    else:
        assert "nanobeam train" in derived[-1][1]["reason"]


def pages(derived):
    return [doc for name, doc in derived if name == "event_page"]


def test_embedded_frames_beyond_the_limit_go_to_disk_and_change_nothing(record, monkeypatch):
    documents = record(dialect=EmbeddedSXDM)
    plain, _ = analyse(documents)
    monkeypatch.setattr(module, "SPOOL_BYTES", 40_000)
    executor = Inline()
    spooled, _ = analyse(documents, executor=executor)
    stored = [b.stored for task in executor.tasks for b in task.frames if b.stored]
    assert stored
    assert not any(Path(s.path).exists() for s in stored)
    for field in ("strain", "counts"):
        np.testing.assert_array_equal(to_maps(plain)[field], to_maps(spooled)[field])


def test_pages_hold_a_bounded_number_of_points_in_order(record, monkeypatch):
    monkeypatch.setattr(module, "PAGE_POINTS", 10)
    monkeypatch.setattr(module, "PAGE_SECONDS", 1e9)
    derived, tally = analyse(record())
    numbers = [doc["seq_num"] for doc in pages(derived)]
    assert max(map(len, numbers)) <= 10
    assert [n for page in numbers for n in page] == list(range(1, 25))
    assert (tally.points_seen, tally.points_analysed, tally.points_flagged) == (24, 24, 0)


def test_an_older_frame_of_a_point_never_replaces_a_newer_one(record, tmp_path, monkeypatch):
    """The first announcement of points 1 to 6 is not readable before the second is done."""
    monkeypatch.setattr(module, "PAGE_SECONDS", 0.0)
    documents = record(snake=False)
    images = next(
        d for n, d in documents if n == "stream_resource" and d["data_key"] == "sxdm_image"
    )
    datum = next(
        d for n, d in documents if n == "stream_datum" and d["stream_resource"] == images["uid"]
    )
    first = [(n, d) for n, d in documents if d is not datum]
    early = images | {"uid": "early", "uri": f"file://localhost{tmp_path}/early.h5"}
    at = first.index(("stream_resource", images)) + 1
    first[at:at] = [
        ("stream_resource", early),
        ("stream_datum", datum | {"stream_resource": "early"}),
        ("stream_datum", datum),
    ]
    # the early file appears while the run is still open, with frames of nothing
    executor = Inline()
    submit = executor.submit

    def appear(pipeline, task):
        submit(pipeline, task)
        if len(executor.tasks) == 3:
            with h5py.File(tmp_path / "early.h5", "w") as file:
                file["entry/data/data"] = np.zeros((24, 160, 144), np.uint16)

    executor.submit = appear
    derived, _ = analyse(first, executor=executor)
    reference, _ = analyse(documents)
    np.testing.assert_array_equal(to_maps(derived)["counts"], to_maps(reference)["counts"])


# ------------------------------------------------------------ files that are not readable


@contextmanager
def as_nobody():
    """Root may read everything."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def locked(path):
    path.chmod(0)
    return lambda: path.chmod(0o644)


def not_there(path):
    path.rename(path.with_suffix(".part"))
    return lambda: path.with_suffix(".part").rename(path)


def cut_off(path):
    """As on a network where its end comes late."""
    content = path.read_bytes()
    os.truncate(path, 3000)
    return lambda: path.write_bytes(content)


@pytest.fixture
def shared_folder():
    """A folder of its own that anybody may read."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("comes_back", [True, False])
@pytest.mark.parametrize("withhold", [locked, not_there, cut_off])
def test_points_wait_for_their_file_until_the_deadline(
    RE, geometry, shared_folder, monkeypatch, withhold, comes_back
):
    monkeypatch.setattr(module, "DEADLINE_SECONDS", 10.0 if comes_back else 0.3)
    documents = []
    sxdm = SimulatedSXDM(phantom("unique", (4, 5)), geometry, shared_folder, counts=20_000)
    RE(sxdm_fly(sxdm), lambda name, doc: documents.append((name, doc)))
    reference, _ = analyse(documents)
    (path,) = shared_folder.iterdir()
    content = path.read_bytes()
    give_back = withhold(path)
    executor = Inline()
    process = executor.processor.process

    def read_as_nobody(task):
        with as_nobody():
            done = process(task)
        if len(executor.tasks) == 2 and comes_back:
            give_back()
        return done

    executor.processor.process = read_as_nobody
    derived, tally = analyse(documents, executor=executor)
    if not comes_back:
        give_back()
    assert path.read_bytes() == content
    maps = to_maps(derived)
    assert derived[-1][1]["num_events"] == {"primary": 20}
    if comes_back:
        np.testing.assert_array_equal(maps["strain"], to_maps(reference)["strain"])
        assert tally.errors == 0
    else:
        assert bool((maps["flags"] == Flag.FRAME_MISSING | Flag.POSITION_MISSING).all())
        words = {locked: "ermission denied", not_there: "No such file", cut_off: "truncated"}
        assert words[withhold] in derived[-1][1]["reason"]


def test_points_that_only_the_stop_document_knows_of_make_the_run_fail(record):
    documents = record()
    name, stop = documents[-1]
    documents[-1] = (name, stop | {"num_events": {"primary": 30, "baseline": 2}})
    derived, _ = analyse(documents)
    assert derived[-1][1]["exit_status"] == "fail"
    assert "6 of 30 announced points" in derived[-1][1]["reason"]


def test_a_geometry_that_comes_with_the_baseline_is_waited_for(record):
    documents = record()
    assert "energy_keV" not in documents[0][1]["nanobeam"]
    derived, _ = analyse(documents)
    assert derived[0][1]["nanobeam"]["geometry"]["wavelength_angstrom"] == pytest.approx(
        1.0972, rel=1e-4
    )


def test_a_geometry_without_its_baseline_fails_at_the_first_frame(record):
    documents = record()
    baseline = {d["uid"] for n, d in documents if n == "descriptor" and d["name"] == "baseline"}
    cut = [
        (n, d)
        for n, d in documents
        if d.get("uid") not in baseline and d.get("descriptor") not in baseline
    ]
    derived, _ = analyse(cut)
    assert [name for name, _ in derived] == ["start", "stop"]
    assert "energy_keV" in derived[-1][1]["reason"]


def test_motors_named_like_a_result_are_refused(record):
    documents = record()
    documents[0] = ("start", documents[0][1] | {"motors": ["sample_y", "omega"]})
    derived, _ = analyse(documents)
    assert "'omega' cannot be a key of the derived run" in derived[-1][1]["reason"]


def test_a_run_without_frames_closes_empty(record):
    documents = [d for d in record() if not d[0].startswith("stream_")]
    documents[-1] = ("stop", documents[-1][1] | {"num_events": {}, "exit_status": "abort"})
    derived, _ = analyse(documents)
    assert [name for name, _ in derived] == ["start", "descriptor", "stop"]
    assert derived[-1][1]["exit_status"] == "abort"
    assert bool((to_maps(derived)["flags"] == Flag.FRAME_MISSING).all())


def test_maps_of_what_is_no_derived_run_are_refused(record):
    with pytest.raises(ValueError, match="not a derived run"):
        to_maps(record())


def test_a_document_unlike_those_before_is_validated(geometry):
    """Those that are alike are validated once."""
    start = {"uid": "raw", "shape": [2, 3], "nanobeam": {}}
    grid = ScanGrid(Preset.load("default").scan_metadata(start))
    for sample in ("film", "film 2"):
        DerivedRun(start | {"sample": sample}, geometry, grid, {}).open()
    with pytest.raises(ValidationError, match="7 is not"):
        DerivedRun(start | {"sample": 7}, geometry, grid, {}).open()
