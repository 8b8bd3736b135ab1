"""``nanobeam export``: every file holds what the derived run says, as another program reads it."""

import io
import json
import re
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import xarray as xr
import zarr
from PIL import Image
from silx.io.nxdata import get_default
from typer.testing import CliRunner

from nanobeam_bluesky import to_maps
from nanobeam_bluesky.cli import app
from nanobeam_bluesky.retrospective.export import export_run


@pytest.fixture(scope="module")
def maps(stored):
    """Maps of the scan whose frames are in a file; they are recorded."""
    (run,) = stored.catalog["derived"].values().head(1)
    found = to_maps(run)
    assert found.attrs["original_run_uid"] == stored.uids["file"]
    return found


@pytest.fixture
def export(stored, tmp_path, monkeypatch):
    """Run the command in a folder of its own; return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "FALSE")  # so that it is as it was afterwards

    def run(*arguments, code=0, catalog=stored.folder):
        command = ["export", *map(str, arguments), "--catalog", str(catalog)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == code, done.output
        return done.output

    return run


def read_nexus(path):
    with h5py.File(path) as file:
        shown = get_default(file)
        assert (shown.signal_name, shown.axes_dataset_names) == (
            "strain",
            ["sample_y", "sample_x"],
        )
        assert json.loads(file["entry/bluesky/stop/data"][()])["exit_status"] == "success"
        assert json.loads(file["entry/bluesky/start/data"][()])["sample"] == "film"
        return {name: file[f"entry/{name}/{name}"][:] for name in ("strain", "flags", "counts")}


def read_csv(path):
    table = pd.read_csv(path, float_precision="round_trip").set_index(["row", "col"])
    return {name: table[name].unstack().to_numpy() for name in ("strain", "counts")}


def read_tiff(path):
    with tifffile.TiffFile(path) as file:
        return {page.tags[285].value: page.asarray() for page in file.pages}


def read_zarr(path):
    group = zarr.open_group(path, mode="r")
    assert group.attrs["title"].startswith("film, scan")
    assert json.loads(group.attrs["start"])["sample"] == "film"
    return {name: group[name][:] for name in ("strain", "flags", "counts")}


def read_zipped(path):
    assert zipfile.ZipFile(path).testzip() is None
    with zarr.storage.ZipStore(path, mode="r") as store:
        return read_zarr(store)


@pytest.mark.parametrize(
    ("to", "name", "read"),
    [
        ("nexus", "maps.nxs", read_nexus),
        ("csv", "maps.csv", read_csv),
        ("tiff", "maps.tiff", read_tiff),
        ("zarr", "maps.zarr", read_zarr),
        ("zarr", "maps.zarr.zip", read_zipped),
    ],
)
def test_values_are_those_of_the_run(stored, maps, tmp_path, to, name, read):
    export_run(stored.catalog, maps.attrs["uid"], to, tmp_path / name)
    found = read(tmp_path / name)
    assert np.isfinite(found["strain"]).sum() > 20
    for field, values in found.items():
        if field in maps:
            expected = maps[field].to_numpy()
            expected = expected.astype("f4") if to == "tiff" else expected
            np.testing.assert_allclose(values, expected, rtol=1e-15)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_zarr_store_is_the_dataset(stored, maps, tmp_path):
    with xr.open_zarr(export_run(stored.catalog, maps.attrs["uid"], "zarr", tmp_path)) as found:
        described = {key: found.attrs.pop(key) for key in ("title", "start", "stop")}
        xr.testing.assert_identical(found.load(), maps)
    assert json.loads(described["stop"])["exit_status"] == "success"


def test_picture_and_reports_are_named_after_scan_and_uid(export, stored, maps, tmp_path):
    raw, own = stored.uids["file"], maps.attrs["uid"]
    assert f"scan_1_{own[:8]}.html" in export(raw[:10], "--to", "html")
    for to in ("png", "md"):
        path = export_run(stored.catalog, own[:10], to)
        assert path == Path(f"scan_1_{own[:8]}.{to}")
    image = Image.open(io.BytesIO((tmp_path / f"scan_1_{own[:8]}.png").read_bytes()))
    assert np.asarray(image.convert("L")).std() > 10
    for to in ("html", "md"):
        text = (tmp_path / f"scan_1_{own[:8]}.{to}").read_text("utf-8")
        assert re.search(r"of 42 points are good", text)
        assert raw in text.replace("\\", "")


@pytest.mark.parametrize("name", ["file", "embedded"])
def test_frames_of_the_raw_run_go_with_the_maps(stored, tmp_path, name):
    raw = stored.uids[name]
    expected = stored.catalog["scans"][raw]["frames"].read()
    path = export_run(stored.catalog, raw, "nexus", tmp_path, frames=True)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["entry/frames/frames"], expected)
        assert file["entry/frames/frames"].shape == (6, 7, 160, 144)
        assert file["entry"].attrs["default"] == "strain"


def test_what_is_there_is_replaced_on_request_only_and_never_by_a_part(export, stored, tmp_path):
    raw, path = stored.uids["file"], tmp_path / "scan.nxs"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"scan.nxs is there already.* --force"):
        export_run(stored.catalog, raw, "nexus", path)
    (frames,) = (stored.folder / "frames").iterdir()
    hidden = frames.rename(tmp_path / "hidden")
    try:
        options = ("--to", "nexus", "--out", path, "--force", "--frames")
        said = export(raw, *options, code=1)
    finally:
        hidden.rename(frames)
    assert len(said.splitlines()) == 1
    assert str(frames) in said
    assert path.read_text() == "mine"
    export_run(stored.catalog, raw, "nexus", path, force=True)
    assert read_nexus(path)
    for name, read in (("scan.zarr", read_zarr), ("scan.zarr.zip", read_zipped)):
        for _ in range(2):
            export_run(stored.catalog, raw, "zarr", tmp_path / name, force=True)
            assert read(tmp_path / name)
    names = {"scan.nxs", "scan.zarr", "scan.zarr.zip"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_one_that_fails_is_said_in_a_line_and_the_others_are_written(export, stored, tmp_path):
    uids = stored.uids["embedded"], stored.uids["count"], "nothing", stored.uids["file"]
    (tmp_path / "files").mkdir()
    said = export(*uids, "--to", "csv", "--out", "files", code=1).splitlines()
    assert len(said) == 4
    for uid in ("nothing", stored.uids["count"]):
        assert "no derived run" in next(line for line in said if line.startswith(uid))
    assert len(list((tmp_path / "files").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "png", "--frames"], 2, "--frames go into NeXus, not into png"),
        (["another", "--to", "png", "--out", "a.png"], 2, "expected a folder for the files"),
        (["--to", "jpeg"], 2, "jpeg"),
        (["--to", "csv", "--out", "nowhere/a.csv"], 1, "no folder nowhere"),
        (["--to", "nexus", "--frames", "--preset", "hxn"], 1, "preset 'hxn' does not match"),
    ],
)
def test_what_cannot_be_done_is_said(export, stored, tmp_path, arguments, code, words):
    assert words in export(stored.uids["file"], *arguments, code=code)
    assert list(tmp_path.iterdir()) == []


def test_where_no_catalogue_is_the_usage_is_wrong(export, tmp_path):
    assert "no catalogue in this folder" in export("a", "--to", "csv", catalog=tmp_path, code=2)
    assert "expected a folder" in export("a", "--to", "csv", catalog="nobody", code=2)
