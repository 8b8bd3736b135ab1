"""`LiveMaps`: what is shown, from which documents, and in which thread."""

import threading
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
from bluesky import RunEngine
from bluesky.plan_stubs import sleep

from nanobeam_bluesky.callbacks import live_maps
from nanobeam_bluesky.callbacks.live_maps import LiveMaps
from nanobeam_bluesky.callbacks.sink import BackgroundSink

SHAPE = (5, 4)


@pytest.fixture
def maps():
    yield LiveMaps()
    plt.close("all")


def feed(callback, documents):
    for name, doc in documents:
        callback(name, doc)


def shown(maps, field):
    """The array on the screen, in the unit of its colour bar; NaN where it is blank."""
    return np.ma.filled(maps._panels[field].image.get_array(), np.nan)


def title(maps):
    return maps.figure.get_suptitle()


@pytest.mark.parametrize("snaking", [True, False])
def test_every_point_is_shown_at_its_place(maps, derived_documents, snaking):
    feed(maps, derived_documents(SHAPE, snaking=snaking, page=7))
    maps.draw()
    number = np.arange(20.0).reshape(SHAPE)
    np.testing.assert_allclose(shown(maps, "strain"), number * 0.1, atol=1e-12)  # 10⁻⁶
    np.testing.assert_allclose(shown(maps, "omega"), number * 0.01 - 10)  # m°
    np.testing.assert_allclose(shown(maps, "counts"), 5000 + number)
    left, right, bottom, top = maps._panels["chi"].image.get_extent()
    assert (left, right, bottom, top) == pytest.approx((-0.05, 0.35, -0.05, 0.45))
    assert "20 of 20 points · done" in title(maps)


def test_maps_fill_in_and_what_has_not_come_is_blank(maps, derived_documents):
    documents = derived_documents(SHAPE, snaking=False, page=6)
    feed(maps, documents[:3])
    maps.draw()
    image = maps._panels["strain"].image
    np.testing.assert_array_equal(np.isnan(shown(maps, "strain")).ravel(), np.arange(20) >= 6)
    assert "6 of 20 points" in title(maps)
    feed(maps, documents[3:5])
    maps.draw()
    np.testing.assert_array_equal(np.isnan(shown(maps, "strain")).ravel(), np.arange(20) >= 18)
    assert maps._panels["strain"].image is image, "artists are kept"


def test_single_events_are_shown_too(maps, derived_documents):
    documents = derived_documents((1, 2), page=1)
    for name, doc in documents:
        if name == "event_page":
            data = {key: values[0] for key, values in doc["data"].items()}
            maps("event", {"descriptor": doc["descriptor"], "data": data})
        else:
            maps(name, doc)
    maps.draw()
    np.testing.assert_allclose(shown(maps, "counts"), [[5000, 5001]])


def test_flagged_points_are_blank_but_their_counts_are_shown(maps, derived_documents):
    flags = np.zeros(SHAPE, dtype=int)
    flags[2, 1] = 8
    feed(maps, derived_documents(SHAPE, change={"flags": flags}))
    maps.draw()
    for field in ("strain", "omega", "chi"):
        np.testing.assert_array_equal(np.isnan(shown(maps, field)), flags != 0)
    assert np.isfinite(shown(maps, "counts")).all()
    assert "1 flagged" in title(maps)


def test_last_event_of_a_rewound_point_wins(maps, derived_documents):
    documents = derived_documents(SHAPE, snaking=False, page=5)
    again = {**documents[2][1], "data": dict(documents[2][1]["data"])}
    again["data"]["counts"] = [7.0] * 5
    feed(maps, [*documents[:-1], ("event_page", again), documents[-1]])
    maps.draw()
    np.testing.assert_allclose(shown(maps, "counts").ravel()[:6], [7, 7, 7, 7, 7, 5005])
    maps.draw()
    assert "20 of 20 points" in title(maps)


def test_points_without_a_place_are_left_out(maps, derived_documents):
    documents = derived_documents(SHAPE, page=20)
    page = documents[2][1]
    page["data"]["row"][3] = page["data"]["col"][3] = -1
    page["data"]["row"][4] = 99
    feed(maps, documents)
    maps.draw()
    assert np.isnan(shown(maps, "counts")).sum() == 2


def test_next_run_takes_the_window_over(maps, derived_documents):
    feed(maps, derived_documents(SHAPE, sample="first"))
    maps.draw()
    second = derived_documents((2, 3), sample="second")
    feed(maps, second[:2])
    maps.draw()
    assert shown(maps, "strain").shape == (2, 3)
    assert np.isnan(shown(maps, "strain")).all()
    assert title(maps).startswith("second · ")
    feed(maps, second[2:])
    maps.draw()
    assert "6 of 6 points" in title(maps)


def test_documents_of_a_raw_run_change_nothing(maps, derived_documents):
    feed(maps, derived_documents(SHAPE))
    maps.draw()
    before = title(maps)
    descriptor = {"uid": "d", "run_start": "raw", "data_keys": {"img": {}}}
    feed(
        maps,
        [
            ("start", {"uid": "raw", "shape": [2, 2]}),
            ("descriptor", descriptor),
            ("event", {"descriptor": "d", "data": {"img": 1}}),
            ("stop", {"uid": "s", "run_start": "raw"}),
            ("stream_datum", {"descriptor": "d"}),
        ],
    )
    maps.draw()
    assert title(maps) == before
    assert shown(maps, "strain").shape == SHAPE


def test_failure_of_a_run_and_its_reason_stand_in_the_title(maps, derived_documents):
    documents = derived_documents(SHAPE, page=6)
    stop = {**documents[-1][1], "exit_status": "fail", "reason": "no photon energy"}
    feed(maps, [*documents[:3], ("stop", stop)])
    maps.draw()
    assert "6 of 20 points · fail: no photon energy" in title(maps)


def test_scan_without_extents_is_shown_by_row_and_column(maps, derived_documents):
    documents = derived_documents(SHAPE)
    del documents[0][1]["extents"]
    feed(maps, documents)
    maps.draw()
    extent = maps._panels["strain"].image.get_extent()
    assert tuple(extent) == (-0.5, 3.5, -0.5, 4.5)


def test_fourth_map_can_be_chosen(derived_documents):
    maps = LiveMaps("chi_sigma")
    feed(maps, derived_documents(SHAPE))
    maps.draw()
    np.testing.assert_allclose(shown(maps, "chi_sigma"), 0.5)
    plt.close("all")
    with pytest.raises(ValueError, match=r"'phase'.*strain_sigma"):
        LiveMaps("phase")


def test_documents_may_come_in_any_thread_but_drawing_may_not(maps, derived_documents, tmp_path):
    sink = BackgroundSink(maps)
    feed(sink, derived_documents(SHAPE))
    assert sink.close(10)
    assert sink.health.errors == 0
    errors = []

    def elsewhere():
        for action in (maps.draw, LiveMaps):
            try:
                action()
            except RuntimeError as error:
                errors.append(str(error))

    thread = threading.Thread(target=elsewhere, name="elsewhere")
    thread.start()
    thread.join()
    assert len(errors) == 2
    assert all("main thread" in error and "elsewhere" in error for error in errors)

    maps.save(tmp_path / "maps.png")
    assert plt.imread(tmp_path / "maps.png").std() > 0.1
    np.testing.assert_allclose(shown(maps, "counts").max(), 5019)


def test_run_engine_keeps_the_maps_alive_while_a_plan_runs(maps, derived_documents):
    drawings = []
    maps.figure.canvas.mpl_connect("draw_event", lambda event: drawings.append(title(maps)))
    documents = derived_documents((30, 4), page=4)
    engine = RunEngine(during_task=maps)

    def plan():
        for name, doc in documents:
            maps(name, doc)  # in the RunEngine's thread
            yield from sleep(0.05)

    begin = time.monotonic()
    engine(plan())
    took = time.monotonic() - begin
    assert len(drawings) >= 2
    assert len(drawings) <= took / live_maps.INTERVAL_SECONDS + 2
    assert "120 of 120 points · done" in drawings[-1]


def test_nothing_new_is_not_drawn_again(maps, derived_documents):
    feed(maps, derived_documents(SHAPE))
    drawings = []
    maps.figure.canvas.mpl_connect("draw_event", drawings.append)
    ended = threading.Event()
    ended.set()
    for _ in range(3):
        maps.block(ended)
    assert len(drawings) == 1


def test_plan_goes_on_when_the_maps_cannot_be_drawn(maps, derived_documents, monkeypatch, caplog):
    def fail():
        raise RuntimeError("the window is gone")

    monkeypatch.setattr(maps.figure.canvas, "draw", fail)
    documents = derived_documents(SHAPE, page=5)

    def plan():
        for name, doc in documents:
            maps(name, doc)
            yield from sleep(0.1)
        return "finished"

    assert RunEngine(during_task=maps, call_returns_result=True)(plan()).plan_result == "finished"
    assert caplog.text.count("could not be drawn") == 1
