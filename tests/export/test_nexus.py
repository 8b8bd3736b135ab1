"""NeXus files open where NeXus opens, and tell where their maps come from."""

import json

import h5py
import numpy as np
import pytest
import xarray as xr
from silx.io import nxdata

from nanobeam_bluesky.export import Frames, write_nexus
from nanobeam_bluesky.models import Flag


@pytest.fixture
def file(run, tmp_path):
    maps, start, stop = run()
    write_nexus(tmp_path / "maps.h5", maps, start, stop)
    with h5py.File(tmp_path / "maps.h5") as opened:
        yield opened, maps, start


def test_silx_shows_strain_and_finds_every_map_with_axes_and_errors(file):
    opened, maps, _ = file
    default = nxdata.get_default(opened)
    assert (default.signal_name, default.is_image) == ("strain", True)
    for name, values in maps.data_vars.items():
        found = nxdata.NXdata(opened["entry"][name])
        assert found.is_valid, found.issues
        assert found.interpretation == "image"
        np.testing.assert_array_equal(found.signal[()], values)
        np.testing.assert_array_equal(found.axes[0][()], maps["sample_y"])
        np.testing.assert_array_equal(found.axes[1][()], maps["sample_x"])
        assert found.axes[1].attrs["units"] == "um"
        assert found.signal.attrs.get("units", "") == maps[name].attrs["units"]
        sigma = f"{name}_sigma"
        if sigma in maps:
            np.testing.assert_array_equal(found.errors[()], maps[sigma])


def test_instrument_and_provenance_are_those_of_the_run(file):
    opened, _, start = file
    entry = opened["entry"]
    assert opened.attrs["default"] == "entry"
    assert entry["title"].asstr()[()] == "film, scan 12 fly"
    instrument = entry["instrument"]
    assert instrument["beam/incident_energy"][()] == pytest.approx(11.3)
    assert instrument["detector/distance"].attrs["units"] == "m"
    assert instrument["detector/x_pixel_size"][()] == 55
    assert instrument["zone_plate/central_stop_diameter"][()] == 77
    process = entry["process"]
    assert process["program"].asstr()[()] == "nanobeam-bluesky"
    assert process["raw_run_uid"].asstr()[()] == start["original_run_uid"]
    assert process["analysis_id"].asstr()[()] == "a1"
    assert process["analyzer/method"].asstr()[()] == "refine"
    np.testing.assert_array_equal(process["geometry/roi_shape"], [128, 128])
    assert json.loads(entry["bluesky/start/data"][()]) == json.loads(json.dumps(start))
    classes = {}
    opened.visititems(lambda name, node: classes.update({name: node.attrs.get("NX_class")}))
    groups = {name for name in classes if isinstance(opened[name], h5py.Group)}
    assert all(classes[name] for name in groups)


def test_flags_say_what_they_mean(file):
    opened, _, _ = file
    flags = opened["entry/flags/flags"]
    meanings = dict(
        zip(flags.attrs["flag_masks"], flags.attrs["flag_meanings"].split(), strict=True)
    )
    assert meanings[Flag.MISFIT] == "misfit"
    assert flags[2, 3] == Flag.MISFIT | Flag.FEW_COUNTS


def test_metadata_that_hdf5_cannot_hold_are_written_otherwise(run, tmp_path):
    maps, start, stop = run(
        sample={"name": "a\0b", "layers": [1, "x", None]}, proposal="p" * 100_000
    )
    start["nanobeam"]["analyzer"] |= {"a/b": 10**30, "..": [[1], [2, 3]], "ü": "\ud800"}
    maps = maps.rename({"sample_x": "x/1", "sample_y": "x.1"})
    maps["strain"].attrs["units"] = "u" * 100_000
    write_nexus(tmp_path / "maps.h5", maps, start, stop)
    with h5py.File(tmp_path / "maps.h5") as opened:
        found = nxdata.get_default(opened)
        assert found.axes_dataset_names == ["x_1", "x_1_"]
        np.testing.assert_array_equal(found.axes[1][()], maps["x/1"])
        assert len(opened["entry/process/analyzer"]) == 5


def test_run_without_any_metadata_is_written(run, tmp_path):
    maps = run()[0]
    write_nexus(tmp_path / "maps.h5", maps, {"uid": "u", "nanobeam": None})
    with h5py.File(tmp_path / "maps.h5") as opened:
        assert nxdata.get_default(opened).signal_name == "strain"


def test_frames_of_a_scan_are_an_image_stack_on_its_grid(tmp_path):
    stack = np.random.default_rng(0).poisson(3, (2, 3, 8, 9)).astype(np.uint16)
    data = xr.Dataset(
        {"intensity": (("row", "col"), stack.sum((2, 3)).astype(float))},
        {"y": ("row", [0.0, 1.0]), "x": ("col", [0.0, 1.0, 2.0])},
    )
    frames = Frames(stack.shape, stack.dtype, iter(stack))
    write_nexus(tmp_path / "scan.h5", data, {"uid": "u", "plan_name": "fly"}, frames=frames)
    with h5py.File(tmp_path / "scan.h5") as opened:
        assert nxdata.get_default(opened).signal_name == "intensity"
        found = nxdata.NXdata(opened["entry/frames"])
        assert found.is_valid, found.issues
        np.testing.assert_array_equal(found.signal[()], stack)
        np.testing.assert_array_equal(found.axes[1][()], [0, 1, 2])
        assert opened["entry/instrument/detector/data"].shape == stack.shape
