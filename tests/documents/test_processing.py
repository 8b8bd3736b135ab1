"""What is chosen for a run, and what is trained behind it."""

import subprocess
import sys
import time

import numpy as np
import pytest

from nanobeam_bluesky.documents import AnalyzerChoice, PointBlock, Processor, Task, processing
from nanobeam_bluesky.models import Flag, ModelNotFoundError, ModelStore
from nanobeam_bluesky.physics import forward

SHORT = """
import importlib

train = importlib.import_module("nanobeam_bluesky.training.train")
train._SCHEDULES["ReducedNet"] = train._Schedule(2, 64, 1e-3, 0.98, 0.9, 20)
train._POOL, train._HELD_OUT = 128, 64
train._levels = lambda low, high: [low]
importlib.import_module("nanobeam_bluesky.training.__main__").main()
"""


@pytest.fixture
def untrained(geometry, tmp_path, monkeypatch):
    """A geometry within the shipped network's envelope, and an empty store."""
    monkeypatch.setenv("NANOBEAM_HOME", str(tmp_path))
    return geometry.model_copy(update={"thickness_nm": 14.0, "roi_shape": (112, 112)})


@pytest.fixture
def processor():
    made = Processor()
    yield made
    made.shutdown()


def test_the_points_of_a_task_may_be_worked_on_in_parts(processor, geometry, monkeypatch):
    rng = np.random.default_rng(3)
    n, binning = 23, geometry.binning
    patterns = forward(*(rng.uniform(-w, w, n) for w in (1e-3, 0.01, 0.01)), geometry)
    patterns *= 3000 / patterns.sum(axis=(1, 2), keepdims=True) / binning**2
    frames = rng.poisson(patterns.repeat(binning, axis=1).repeat(binning, axis=2))
    blocks = [
        PointBlock(1, 9, values=frames[:9]),
        PointBlock(10, 1, values=frames[9:10]),
        PointBlock(11, 2, problem="lost"),
        PointBlock(13, 11, values=frames[12:]),
    ]
    processor.open("run", geometry, AnalyzerChoice())
    whole = processor.process(Task("run", 1, tuple(blocks)))
    assert (whole.reason, whole.estimates.flags[10]) == ("lost", Flag.FRAME_MISSING)
    assert np.isfinite(whole.estimates.strain).sum() == n - 2
    for size in (1, 4, 9):
        monkeypatch.setattr(processing, "_BATCH", size)
        parts = processor.process(Task("run", 1, tuple(blocks)))
        np.testing.assert_array_equal(parts.status, whole.status)
        for name, values in whole.estimates.columns().items():
            np.testing.assert_array_equal(parts.estimates.columns()[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("method", "policy", "start"),
    [
        ("auto", "universal", "universal"),
        ("network", "universal", "universal"),
        ("auto", "fit", "library"),
        ("network", "fit", None),
        ("auto", "skip", None),
        ("network", "skip", None),
    ],
)
def test_without_a_network_of_the_geometry_the_policy_decides(
    processor, untrained, method, policy, start
):
    choice = AnalyzerChoice(method, policy)
    if start is None:
        with pytest.raises(ModelNotFoundError, match="nanobeam train"):
            processor.open("run", untrained, choice)
    else:
        assert processor.open("run", untrained, choice)["start"] == start


def test_outside_the_envelope_a_library_starts_and_the_run_says_so(processor, untrained, caplog):
    thick = untrained.model_copy(update={"thickness_nm": 400.0})
    settings = processor.open("run", thick, AnalyzerChoice())
    assert settings["start"] == "library"
    assert "thickness_nm = 400, expected 5 to 300" in settings["reason"]


def test_next_run_starts_from_the_network_that_was_trained_meanwhile(
    processor, untrained, monkeypatch
):
    monkeypatch.setattr(processing, "TRAINING", (sys.executable, "-c", SHORT))
    choice = AnalyzerChoice(on_missing_model="train")
    assert processor.open("first", untrained, choice)["start"] == "universal"
    end = time.monotonic() + 60
    while not ModelStore().paths().get(untrained.fingerprint()) and time.monotonic() < end:
        time.sleep(0.1)
    settings = processor.open("second", untrained, choice)
    assert (settings["start"], settings["architecture"]) == ("network", "ReducedNet")


def test_one_network_is_trained_at_a_time_and_each_once(
    processor, untrained, monkeypatch, tmp_path
):
    log = tmp_path / "begun"
    note = f"import sys; print(sys.stdin.readline(), file=open({str(log)!r}, 'a')); "
    wait, choice = "sys.stdin.read()", AnalyzerChoice(on_missing_model="train")
    other = untrained.model_copy(update={"thickness_nm": 15.0})

    def begun(code, geometry):
        monkeypatch.setattr(processing, "TRAINING", (sys.executable, "-c", note + code))
        processor.open("run", geometry, choice)
        time.sleep(0.5)
        return log.read_text().count("energy_keV") if log.exists() else 0

    assert begun(wait, untrained) == 1
    assert begun(wait, untrained) == 1
    assert begun(wait, other) == 1


def test_training_that_cannot_begin_is_logged_once_and_costs_nothing_else(
    processor, untrained, monkeypatch, caplog
):
    monkeypatch.setattr(processing, "TRAINING", ("no-such-program",))
    for _ in range(2):
        settings = processor.open("run", untrained, AnalyzerChoice(on_missing_model="train"))
        assert settings["start"] == "universal"
    assert caplog.text.count("no network can be trained") == 1


def test_training_ends_with_whoever_wanted_it(untrained):
    request = untrained.model_dump_json(exclude_none=True) + "\n"
    done = subprocess.run(processing.TRAINING, input=request, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert not ModelStore().paths().get(untrained.fingerprint())
