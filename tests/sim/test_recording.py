"""The raw run as stock Bluesky tools see it: Tiled and the best-effort callback."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bluesky import RunEngine
from bluesky.callbacks.best_effort import BestEffortCallback
from bluesky_tiled_plugins.writing.validator import validate

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.sim import EmbeddedSXDM, SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import open_catalog, raw_writer


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Any]:
    client = open_catalog(tmp_path)
    yield client["raw"]
    client.context.close()


def test_tiled_writer_records_frames_and_positions(
    RE: RunEngine, geometry: Geometry, tmp_path: Path, raw: Any
) -> None:
    sxdm = SimulatedSXDM(phantom("unique", (4, 5)), geometry, tmp_path / "frames")
    RE.subscribe(raw_writer(raw))
    (uid,) = RE(sxdm_fly(sxdm))
    run = raw[uid]
    assert run.metadata["stop"]["exit_status"] == "success"
    assert run["baseline"].read()["energy"].values.tolist() == pytest.approx([11.3, 11.3])
    frames = run["primary"]["sxdm_image"].read()
    expected = [sxdm.frame(point) for point in range(1, 21)]
    np.testing.assert_array_equal(frames.squeeze(), expected)
    truth = sxdm.sample.in_scan_order(snake=True)
    for motor, axis in (("sample_y", "y"), ("sample_x", "x")):
        np.testing.assert_allclose(run["primary"][motor].read(), truth[axis], atol=0.01)
    assert validate(run)


def test_tiled_writer_records_frames_within_events(
    RE: RunEngine, geometry: Geometry, tmp_path: Path, raw: Any
) -> None:
    sxdm = EmbeddedSXDM(phantom("unique", (3, 2)), geometry)
    RE.subscribe(raw_writer(raw))
    (uid,) = RE(sxdm_fly(sxdm))
    frames = raw[uid]["primary"].base["sxdm_image"].read()
    np.testing.assert_array_equal(frames, [sxdm.frame(point) for point in range(1, 7)])


@pytest.mark.parametrize("dialect", [SimulatedSXDM, EmbeddedSXDM])
def test_best_effort_callback_follows_the_scan(
    RE: RunEngine,
    geometry: Geometry,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dialect: type[SimulatedSXDM | EmbeddedSXDM],
) -> None:
    RE.subscribe(BestEffortCallback())
    RE(sxdm_fly(dialect(phantom("unique", (3, 2)), geometry, tmp_path)))
    assert "New stream: 'primary'" in capsys.readouterr().out
