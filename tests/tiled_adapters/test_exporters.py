"""Downloads over HTTP: what the package writes of the same values, and reasons where it cannot."""

import io

import h5py
import httpx
import numpy as np
import pandas as pd
import pytest
import tifffile
import xarray as xr
from PIL import Image
from silx.io import nxdata

from nanobeam_bluesky.documents import to_maps
from nanobeam_bluesky.export import run_title, to_csv, to_png, to_tiff
from nanobeam_bluesky.tiled_adapters import exporters


@pytest.fixture(scope="module")
def get(served):
    """Get an export: ``get("maps", "maps", "strain", format="png")`` of a tree, run and array."""
    base, key = served.url.split("?api_key=")
    with httpx.Client(base_url=f"{base}/api/v1/", headers={"Authorization": f"Apikey {key}"}) as c:

        def request(tree, run, *names, **params):
            kind = "array" if names else "container"
            path = "/".join(["full", tree, served.uids[run], *names])
            return c.get(f"{kind}/{path}", params=params)

        yield request


@pytest.fixture(scope="module")
def maps(served):
    return to_maps(served.documents)


def content(answer):
    assert answer.status_code == 200, answer.text
    return answer.content


# --------------------------------------------------------------------------- pictures


def test_map_is_drawn_as_the_package_draws_it_with_the_axes_of_what_is_shown(served, get, maps):
    title = run_title(served.documents[0][1])
    found = content(get("maps", "maps", "omega", format="png", slice="1:3,::2"))
    assert found == to_png(maps["omega"][1:3, ::2], title=title)


def test_parameters_of_the_format_reach_the_picture(get, maps):
    media_type = "image/png;cmap=magma;vmin=0;vmax=1e-6;colorbar=0"
    answer = get("maps", "maps", "strain", format=media_type)
    assert answer.headers["content-type"] == media_type
    options = {"cmap": "magma", "limits": (0, 1e-6), "colorbar": False}
    assert content(answer) == to_png(maps["strain"], **options)
    log = get("maps", "maps", "counts", format="image/png;colorbar=0;scale=log;vmax=5010")
    expected = to_png(maps["counts"], log=True, limits=(None, 5010), colorbar=False)
    assert content(log) == expected


def test_run_is_drawn_as_its_four_maps_or_those_asked_for(get):
    four, two, one = (
        Image.open(io.BytesIO(content(get("maps", "maps", **params))))
        for params in (
            {"format": "png"},
            {"format": "png", "field": ["background", "chi_sigma"]},
            {"format": "image/png;cmap=gray", "field": "chi_sigma"},
        )
    )
    assert four.width > 1.5 * one.width < two.width
    assert four.height > 1.5 * one.height > two.height


def test_pattern_and_frame_of_a_point_are_drawn_logarithmic(served, get):
    for name, shape, options in (
        ("frames", (160, 144), "colorbar=0"),
        ("patterns", (64, 64), "colorbar=0"),
        ("mean_pattern", (64, 64), "colorbar=0;scale=log"),
    ):
        slice_ = {} if name == "mean_pattern" else {"slice": "1,1"}
        png = content(get("scans", "scan", name, format=f"image/png;{options}", **slice_))
        image = np.asarray(Image.open(io.BytesIO(png)))
        side = 512 // max(shape)
        assert image.shape[:2] == (shape[0] * side, shape[1] * side)
        if name == "frames":
            expected = xr.DataArray(served.frames[8], dims=("y", "x"), name="frames")
            assert png == to_png(expected, log=True, colorbar=False)


# -------------------------------------------------------------------- files of a run


def test_tiff_and_csv_of_a_run_are_those_of_its_maps(get, maps):
    found, expected = (
        tifffile.TiffFile(io.BytesIO(tiff)).asarray(key=slice(None))
        for tiff in (content(get("maps", "maps", format="tiff")), to_tiff(maps))
    )
    np.testing.assert_array_equal(found, expected)
    assert content(get("maps", "maps", format="csv")) == to_csv(maps)
    some = content(get("maps", "maps", format="csv", field="strain"))
    columns = ["row", "col", "sample_y (um)", "sample_x (um)", "strain"]
    assert list(pd.read_csv(io.BytesIO(some)).columns) == columns


def test_nexus_of_maps_has_every_map(get, maps):
    with h5py.File(io.BytesIO(content(get("maps", "maps", format="h5")))) as file:
        assert nxdata.get_default(file).signal_name == "strain"
        for name, values in maps.data_vars.items():
            found = nxdata.NXdata(file["entry"][name])
            np.testing.assert_array_equal(found.signal[()], values)
            np.testing.assert_array_equal(found.axes[1][()], maps["sample_x"])


def test_nexus_of_a_scan_has_its_frames_and_what_they_sum_to(served, get):
    with h5py.File(io.BytesIO(content(get("scans", "scan", format="h5")))) as file:
        assert nxdata.get_default(file).signal_name == "intensity (counts)"
        scan = served.client["scans"][served.uids["scan"]]
        for name in ("frames", "intensity", "mean_pattern", "sample_x_measured"):
            found = nxdata.NXdata(file["entry"][name])
            assert found.is_valid, found.issues
            np.testing.assert_array_equal(found.signal[()], scan[name].read())
        assert "patterns" not in file["entry"]  # parts of the frames
        assert file["entry/instrument/beam/incident_energy"][()] == pytest.approx(11.3)
        assert "start_time" in file["entry"]
    some = content(get("scans", "scan", format="h5", field=["patterns", "intensity"]))
    with h5py.File(io.BytesIO(some)) as file:
        assert file["entry/patterns/patterns"].shape == (4, 5, 64, 64)
        assert "frames" not in file["entry"]


def test_report_tells_of_the_run(get):
    page = get("maps", "maps", format="html")
    assert page.headers["content-type"].startswith("text/html")
    assert "Complete: 19 of 20 points are good" in page.text


def test_run_that_goes_on_is_exported_as_far_as_it_is(get):
    for format in ("image/png;colorbar=0", "h5", "csv"):
        content(get("maps", "running", format=format, field="strain"))
    assert "Still being analysed" in get("maps", "running", format="md").text


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("names", "params", "words"),
    [
        (["strain"], {"format": "image/png;cmap=none"}, "cmap = 'none': no colour map"),
        (["strain"], {"format": "image/png;vmin=2;vmax=1"}, "limits 2 to 1"),
        (["strain"], {"format": "image/png;vmin=1"}, "one of them is of the values: give both"),
        (["strain"], {"format": "image/png;vmin=nan"}, "vmin = nan: expected a number"),
        (["strain"], {"format": "image/png;vmax=1e999"}, "vmax = 1e999: expected a number"),
        (["strain"], {"format": "image/png;vmin=x"}, "vmin = x: expected a number"),
        (["strain"], {"format": "image/png;scale=ln"}, "scale = ln: expected linear or log"),
        (["strain"], {"format": "image/png;colorbar=2"}, "colorbar = 2: expected 0 or 1"),
        (["strain"], {"format": "image/png;cmpa=gray"}, "cmpa = gray: image/png takes cmap"),
        (["strain"], {"format": "image/png;cmap"}, "Could not parse cmap"),
        (["strain"], {"format": "image/png;scale=log;vmin=-1"}, "above 0 on a logarithmic scale"),
        (["flags"], {"format": "image/png;cmap=gray"}, "flags have colours"),
        (["strain"], {"format": "png", "slice": "1"}, "shape"),
        (["strain"], {"format": "png", "slice": "1:1"}, "no pixel"),
        ([], {"format": "image/png;cmap=gray"}, "for one map alone"),
        ([], {"format": "csv", "field": "sample_x"}, "no map among"),
        ([], {"format": "h5", "field": "nothing"}, "No such field nothing"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(get, names, params, words):
    answer = get("maps", "maps", *names, **params)
    assert 400 <= answer.status_code < 500
    assert words in answer.text


@pytest.mark.parametrize("format", ["png", "h5", "tiff", "csv", "html", "md"])
def test_run_without_maps_is_refused_with_the_reason(get, format):
    answer = get("maps", "failed", format=format)
    assert (answer.status_code, "no photon energy" in answer.text) == (422, True)


def test_run_that_is_no_scan_is_refused_with_the_reason(get):
    answer = get("scans", "count", format="h5")
    assert (answer.status_code, "no SXDM scan" in answer.text) == (422, True)


def test_frames_that_no_answer_holds_are_left_out_and_the_file_says_so(get, monkeypatch):
    monkeypatch.setattr(exporters, "RESPONSE_BYTES", 500_000)
    with h5py.File(io.BytesIO(content(get("scans", "scan", format="h5")))) as file:
        assert "intensity" in file["entry"] and "frames" not in file["entry"]
        assert "ask for slices" in file["entry/note/data"].asstr()[()]
    answer = get("scans", "scan", format="h5", field="frames")
    assert answer.status_code == 400
    assert "ask for slices" in answer.text


def test_a_picture_is_drawn_once_for_all_who_ask_and_anew_for_other_values(get, monkeypatch):
    drawn = []
    draw = exporters.export.to_png
    monkeypatch.setattr(
        exporters.export, "to_png", lambda *a, **k: drawn.append(k) or draw(*a, **k)
    )
    first, again, other, third = (
        content(get("maps", "maps", name, format=f"image/png;cmap={cmap}"))
        for name, cmap in [("omega", "cividis")] * 2 + [("omega", "gray"), ("chi", "cividis")]
    )
    assert first == again and len({first, other, third}) == 3
    assert len(drawn) == 3
