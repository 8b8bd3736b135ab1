import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import h5py
import numpy as np
import pytest
from bluesky import RunEngine
from bluesky.utils import FailedStatus, RunEngineInterrupted

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.physics import forward
from nanobeam_bluesky.sim import EmbeddedSXDM, SimulatedSXDM, phantom, sxdm_fly

Dialect = type[SimulatedSXDM | EmbeddedSXDM]
Of = Callable[[str], list[dict[str, Any]]]
both = pytest.mark.parametrize("dialect", [SimulatedSXDM, EmbeddedSXDM])


def path_in(resource: dict[str, Any]) -> Path:
    return Path(unquote(urlparse(resource["uri"]).path))


def announced(of: Of, key: str) -> list[tuple[int, np.ndarray]]:
    """(point number, value) of everything that the documents refer to or hold, in order."""
    pages = of("event_page")
    if pages:
        return [
            (point, value)
            for page in pages
            for point, value in zip(page["seq_num"], page["data"][key], strict=True)
        ]
    (resource,) = (doc for doc in of("stream_resource") if doc["data_key"] == key)
    found = []
    with h5py.File(path_in(resource)) as file:
        dataset = file[resource["parameters"]["dataset"]]
        for doc in of("stream_datum"):
            if doc["stream_resource"] == resource["uid"]:
                points = range(doc["seq_nums"]["start"], doc["seq_nums"]["stop"])
                indices = range(doc["indices"]["start"], doc["indices"]["stop"])
                found += [(p, dataset[i]) for p, i in zip(points, indices, strict=True)]
    return found


def interrupt(
    sxdm: SimulatedSXDM | EmbeddedSXDM, *, at: int, action: Callable[[], object], collected: bool
) -> None:
    """Call `action` from another thread when frame `at` is taken, and `collected` if asked.

    The flight waits until it is ended, so that `at` is the last frame of the attempt.
    """
    take, held = sxdm._take, threading.Event()

    def hold(index: int, row: int, col: int) -> None:
        take(index, row, col)
        if index == at - 1 and not held.is_set():
            held.set()
            sxdm._flush(at)
            while collected and sxdm._announced < at:
                time.sleep(0.005)
            threading.Thread(target=action).start()
            assert sxdm._halt.wait(20)

    sxdm._take = hold


@both
@pytest.mark.parametrize("snake", [True, False])
def test_every_announced_frame_is_the_rendered_one(
    RE: RunEngine, of: Of, geometry: Geometry, tmp_path: Path, dialect: Dialect, snake: bool
) -> None:
    sxdm = dialect(phantom("unique", (5, 7)), geometry, tmp_path)
    RE(sxdm_fly(sxdm, snake=snake))
    frames = announced(of, "sxdm_image")
    assert [point for point, _ in frames] == list(range(1, 36))
    for point, frame in frames:
        np.testing.assert_array_equal(frame, sxdm.frame(point, snake=snake))
    truth = sxdm.sample.in_scan_order(snake=snake)
    for motor, axis in (("sample_y", "y"), ("sample_x", "x")):
        positions = [value for _, value in announced(of, motor)]
        np.testing.assert_allclose(positions, truth[axis], atol=0.2 * 0.05)
    (stop,) = of("stop")
    assert stop["exit_status"] == "success"
    assert stop["num_events"] == {"baseline": 2, "primary": 35}


@both
@pytest.mark.parametrize("snake", [True, False])
def test_every_frame_shows_the_strain_and_tilts_of_its_point(
    RE: RunEngine, of: Of, geometry: Geometry, tmp_path: Path, dialect: Dialect, snake: bool
) -> None:
    sxdm = dialect(phantom("unique", (4, 5)), geometry, tmp_path, background=0.1)
    RE(sxdm_fly(sxdm, snake=snake))
    truth = sxdm.sample.in_scan_order(snake=snake)
    expected = 0.1 + sxdm.scale * forward(
        truth["strain"], truth["omega"], truth["chi"], geometry
    ).astype(float)
    for point, frame in announced(of, "sxdm_image"):
        roi = frame[geometry.roi.slices]
        pattern = roi.reshape(64, 2, 64, 2).sum(axis=(1, 3))
        likelihood = (pattern * np.log(expected) - expected).sum(axis=(1, 2))
        assert likelihood.argmax() + 1 == point


def test_stream_documents_have_the_form_of_today(
    RE: RunEngine, of: Of, documents: list[Any], geometry: Geometry, tmp_path: Path
) -> None:
    RE(sxdm_fly(SimulatedSXDM(phantom("unique", (2, 3)), geometry, tmp_path / "a b")))
    _, primary = of("descriptor")
    assert primary["name"] == "primary"
    assert primary["data_keys"].keys() == {"sxdm_image", "sample_y", "sample_x"}
    image, x = primary["data_keys"]["sxdm_image"], primary["data_keys"]["sample_x"]
    assert (image["shape"], image["dtype"], image["dtype_numpy"]) == ([1, 160, 144], "array", "<u2")
    assert (x["shape"], x["dtype"], x["dtype_numpy"], x["units"]) == ([1], "number", "<f8", "um")
    assert image["external"] == x["external"] == "STREAM:"
    resources = {doc["data_key"]: doc for doc in of("stream_resource")}
    assert resources.keys() == primary["data_keys"].keys()
    assert len({doc["uri"] for doc in resources.values()}) == 1  # one file a scan
    for doc in resources.values():
        assert doc["mimetype"] == "application/x-hdf5"
        assert doc["uri"].startswith("file://localhost/") and "a%20b" in doc["uri"]
        assert doc["parameters"].keys() == {"dataset", "chunk_shape"}
    assert resources["sxdm_image"]["parameters"]["chunk_shape"] == [1, 160, 144]
    names = [name for name, _ in documents]
    assert "event_page" not in names
    assert names[:3] == ["start", "descriptor", "event"]  # the baseline comes first


@both
def test_the_start_document_describes_the_scan(
    RE: RunEngine, of: Of, geometry: Geometry, tmp_path: Path, dialect: Dialect
) -> None:
    sxdm = dialect(phantom("film", (3, 5)), geometry, tmp_path, motors=("my", "mx"))
    RE(sxdm_fly(sxdm, md={"sample": "SrIrO3 4"}))
    (start,) = of("start")
    assert start["shape"] == [3, 5]
    assert start["num_points"] == 15
    assert start["snaking"] == [False, True]
    assert start["motors"] == ["my", "mx"]
    assert start["sample"] == "SrIrO3 4"
    np.testing.assert_allclose(start["extents"], [[-0.05, 0.05], [-0.1, 0.1]])
    assert start["hints"] == {
        "dimensions": [[["my"], "primary"], [["mx"], "primary"]],
        "gridding": "rectilinear",
    }
    assert start["nanobeam"]["detector"] == "sxdm_image"


@pytest.mark.parametrize("energy_in", ["baseline", "start"])
@pytest.mark.parametrize("unit", ["energy_keV", "wavelength_angstrom"])
def test_the_geometry_can_be_read_back_from_the_run(
    RE: RunEngine, of: Of, geometry: Geometry, tmp_path: Path, energy_in: str, unit: str
) -> None:
    other = "wavelength_angstrom" if unit == "energy_keV" else "energy_keV"
    given = Geometry.model_validate(
        {
            **geometry.model_dump(exclude={other}),
            "orientation": "rotate_90",
            "pixel_mask": ((3, 4),),
            "pupil_blur_px": 0.5,
        }
    )
    sxdm = SimulatedSXDM(phantom("film", (2, 3)), given, tmp_path, energy_in=energy_in)
    RE(sxdm_fly(sxdm))
    (start,) = of("start")
    events = of("event")
    if energy_in == "start":
        assert not events
        assert unit in start["nanobeam"] and other not in start["nanobeam"]
        read = Geometry.from_start(start)
    else:
        assert not {unit, other} & start["nanobeam"].keys()
        units = of("descriptor")[0]["data_keys"]["energy"]["units"]
        value = events[0]["data"]["energy"]
        read = Geometry.from_start(start, baseline={"energy": {"value": value, "units": units}})
    assert read.fingerprint() == given.fingerprint()
    assert (read.roi, read.orientation, read.pixel_mask) == (
        given.roi,
        given.orientation,
        given.pixel_mask,
    )


@both
def test_a_scan_can_end_within_a_row(
    RE: RunEngine, of: Of, geometry: Geometry, tmp_path: Path, dialect: Dialect
) -> None:
    sxdm = dialect(phantom("unique", (5, 7)), geometry, tmp_path)
    RE(sxdm_fly(sxdm, stop_after=17))
    assert [point for point, _ in announced(of, "sample_x")] == list(range(1, 18))
    assert of("start")[0]["num_points"] == 35
    assert of("stop")[0]["num_events"]["primary"] == 17
    with pytest.raises(ValueError, match="stop_after = 0"):
        RE(sxdm_fly(sxdm, stop_after=0))


@both
def test_after_a_pause_the_row_is_flown_again_under_the_same_numbers(
    RE: RunEngine, of: Of, geometry: Geometry, tmp_path: Path, dialect: Dialect
) -> None:
    sxdm = dialect(phantom("unique", (4, 20)), geometry, tmp_path)
    interrupt(sxdm, at=33, action=RE.request_pause, collected=True)
    with pytest.raises(RunEngineInterrupted):
        RE(sxdm_fly(sxdm, flush_period=0.02))
    before = [point for point, _ in announced(of, "sample_x")]
    assert RE.state == "paused"
    assert before == list(range(1, 34))
    RE.resume()
    frames = announced(of, "sxdm_image")
    points = [point for point, _ in frames]
    assert points == before + list(range(21, 81))
    last = dict(frames)
    for point in range(1, 81):
        np.testing.assert_array_equal(last[point], sxdm.frame(point))
    # photons are not the same twice: who keeps the first frame of a point is found out
    for point, frame in frames[20 : len(before)]:
        assert not np.array_equal(frame, last[point])
    assert of("stop")[0]["exit_status"] == "success"
    assert of("stop")[0]["num_events"]["primary"] == 80


def test_indices_count_on_while_numbers_repeat(
    RE: RunEngine, of: Of, geometry: Geometry, tmp_path: Path
) -> None:
    sxdm = SimulatedSXDM(phantom("unique", (4, 20)), geometry, tmp_path)
    interrupt(sxdm, at=45, action=RE.request_pause, collected=True)
    with pytest.raises(RunEngineInterrupted):
        RE(sxdm_fly(sxdm, flush_period=0.02))
    RE.resume()
    for resource in of("stream_resource"):
        indices = [
            range(doc["indices"]["start"], doc["indices"]["stop"])
            for doc in of("stream_datum")
            if doc["stream_resource"] == resource["uid"]
        ]
        flat = [i for one in indices for i in one]
        assert flat == list(range(len(flat)))
        assert len(flat) == 85
        with h5py.File(path_in(resource)) as file:
            assert len(file[resource["parameters"]["dataset"]]) == len(flat)


@both
@pytest.mark.parametrize(
    ("how", "status"), [("abort", "abort"), ("stop", "success"), ("halt", "abort")]
)
def test_an_ended_scan_keeps_what_was_flown(
    RE: RunEngine,
    of: Of,
    geometry: Geometry,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    dialect: Dialect,
    how: str,
    status: str,
) -> None:
    caplog.set_level(logging.CRITICAL, logger="bluesky")
    sxdm = dialect(phantom("unique", (4, 20)), geometry, tmp_path)
    interrupt(sxdm, at=33, action=getattr(RE, how), collected=False)
    with pytest.raises(RunEngineInterrupted):
        RE(sxdm_fly(sxdm, flush_period=20))
    (stop,) = of("stop")
    assert stop["exit_status"] == status
    frames = announced(of, "sxdm_image")
    assert [point for point, _ in frames] == list(range(1, 34))
    for point, frame in frames:
        np.testing.assert_array_equal(frame, sxdm.frame(point))
    # and the next scan is none the worse
    RE(sxdm_fly(sxdm))
    assert of("stop")[1]["num_events"]["primary"] == 80


def test_a_detector_that_fails_ends_the_scan_with_its_reason(
    RE: RunEngine,
    of: Of,
    geometry: Geometry,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.CRITICAL, logger="bluesky")
    sxdm = SimulatedSXDM(phantom("unique", (4, 5)), geometry, tmp_path)
    take = sxdm._take

    def no_space(index: int, row: int, col: int) -> None:
        if row == 2:
            raise OSError(28, "No space left on device")
        take(index, row, col)

    monkeypatch.setattr(sxdm, "_take", no_space)
    with pytest.raises(FailedStatus) as failure:
        RE(sxdm_fly(sxdm))
    assert isinstance(failure.value.__cause__, OSError)
    assert of("stop")[0]["exit_status"] == "fail"
    assert [point for point, _ in announced(of, "sxdm_image")] == list(range(1, 11))


def test_documents_come_during_the_flight(
    RE: RunEngine, of: Of, geometry: Geometry, tmp_path: Path
) -> None:
    sxdm = SimulatedSXDM(phantom("unique", (1, 20)), geometry, tmp_path)
    flying = []
    RE.subscribe(lambda name, doc: flying.append(not sxdm.complete().done), "stream_datum")
    RE(sxdm_fly(sxdm, dwell_s=0.02, flush_period=0.05))
    assert flying[0] and not flying[-1]


def test_binning_and_roi_that_were_chosen_are_left_to_the_reader(
    RE: RunEngine, of: Of, tmp_path: Path
) -> None:
    fitted = {"wavelength_angstrom", "binning", "roi_shape"}
    given = Geometry.model_validate(
        Geometry.published().model_dump(exclude=fitted, exclude_none=True)
    )
    RE(sxdm_fly(SimulatedSXDM(phantom("film", (2, 3)), given, tmp_path, energy_in="start")))
    (start,) = of("start")
    assert not fitted & start["nanobeam"].keys()
    assert Geometry.from_start(start).fingerprint() == given.fingerprint()
