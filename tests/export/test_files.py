"""Pictures and tables: every value where, and as, a reader expects it."""

import io
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pandas as pd
import pytest
import tifffile
import xarray as xr
from matplotlib.colors import Normalize
from PIL import Image

from nanobeam_bluesky.export import run_title, to_csv, to_png, to_tiff


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def points(png, shape):
    """Colours (rows, columns, 4) of a picture without axes."""
    image = pixels(png)
    side = image.shape[0] // shape[0]
    assert image.shape[:2] == (side * shape[0], side * shape[1])
    return image[side // 2 :: side, side // 2 :: side]


@pytest.mark.parametrize("down", [(), ("row",), ("col",), ("row", "col")])
def test_bare_picture_has_the_colour_of_each_point_where_the_motors_say(run, down):
    strain = run()[0]["strain"]
    strain = strain.isel({dim: slice(None, None, -1) for dim in down})  # motors run down
    low, high = 2e-7, 2e-6
    png = to_png(strain, cmap="magma", limits=(low, high), colorbar=False)
    upright = strain.sortby("sample_y", ascending=False).sortby("sample_x").to_numpy()
    expected = matplotlib.colormaps["magma"](Normalize(low, high)(upright), bytes=True)
    expected[np.isnan(upright)] = 0
    found = points(png, upright.shape)
    np.testing.assert_array_equal(found[..., 3] == 0, np.isnan(upright))
    difference = found.astype(int) - expected
    assert abs(difference[np.isfinite(upright)]).max() <= 2  # float32 in matplotlib
    assert np.isnan(upright).sum() == 2


def test_missing_point_leaves_the_others_their_colours(run):
    strain = run()[0]["strain"]
    colours = points(to_png(strain, colorbar=False), strain.shape)
    assert len(np.unique(colours.reshape(-1, 4), axis=0)) > 15


def test_picture_names_sample_and_scan_and_has_a_pixel_for_every_point(run):
    start = run()[1]
    assert run_title(start) == "film, scan 12 fly"
    image = xr.DataArray(np.zeros((3, 1200)), dims=("row", "col"), name="counts")
    picture = pixels(to_png(image, title=run_title(start)))
    assert picture.shape[1] > 1200
    assert (picture[..., 3] == 255).all()  # on white, as in print


def test_names_that_look_like_mathematics_are_drawn_as_they_are(run):
    maps = run()[0].rename({"sample_x": r"$\frac{", "sample_y": "$y$"})
    maps["strain"].attrs["units"] = r"$\nope$"
    png = to_png(maps["strain"], title=r"$\frac{")
    assert pixels(png).size


def test_pictures_drawn_in_many_threads_are_those_drawn_in_one(run):
    maps = run()[0]
    names = ["strain", "flags", "counts"]
    expected = [to_png(maps[name], colorbar=False) for name in names] * 3
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda name: to_png(maps[name], colorbar=False), names * 3)
        assert list(found) == expected


def test_tiff_has_a_page_for_each_map(run):
    maps = run()[0]
    with tifffile.TiffFile(io.BytesIO(to_tiff(maps))) as file:
        pages = {page.tags["PageName"].value: page for page in file.pages}
        assert list(pages) == list(maps.data_vars)
        for name, page in pages.items():
            np.testing.assert_array_equal(page.asarray(), maps[name].astype(np.float32))
        assert pages["omega"].description == "omega (deg)"


def test_csv_has_every_value_of_every_point_exactly(run):
    maps = run()[0]
    table = pd.read_csv(io.BytesIO(to_csv(maps)), float_precision="round_trip")
    assert len(table) == 24
    for name, column in (
        ("strain", "strain"),
        ("omega_sigma", "omega_sigma (deg)"),
        ("sample_x_measured", "sample_x_measured (um)"),
        ("sample_y", "sample_y (um)"),
    ):
        expected = maps[name].broadcast_like(maps["strain"]).to_numpy()
        np.testing.assert_array_equal(expected[table["row"], table["col"]], table[column])
    flags = table.set_index(["row", "col"])["flags"]
    assert flags[2, 3] == "few_counts|misfit"
    assert flags[0, 0] == "frame_missing"
    assert flags.isna().sum() == 22


def test_csv_of_a_motor_named_like_a_formula_is_text(run):
    maps = run()[0].rename({"sample_x": "=1+1"})
    assert "'=1+1" in pd.read_csv(io.BytesIO(to_csv(maps))).columns[3]
