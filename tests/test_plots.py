"""Figures of maps: where a pixel lies, which colour it gets, what the unit says."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import LogNorm

from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.plots import (
    MapAxes,
    MapPanel,
    plot_comparison,
    plot_image,
    plot_maps,
    robust_limits,
)

ROWS, COLS = 4, 6


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def dataset(y=(0.0, 0.3), x=(10.0, 10.5), units="um", **changes):
    ramp = np.linspace(-1.0, 1.0, ROWS * COLS).reshape(ROWS, COLS)
    fields = {
        "strain": (ramp * 5e-4, ""),
        "omega": (ramp * 0.02, "deg"),
        "chi": (ramp * 0.5, "deg"),
        "counts": (6000 + 100 * ramp, "counts"),
        "strain_sigma": (9e-5 + 0 * ramp, ""),
        "omega_sigma": (1e-4 + 0 * ramp, "deg"),
        "chi_sigma": (3e-4 + 0 * ramp, "deg"),
        "flags": (0 * ramp, ""),
    }
    return xr.Dataset(
        {
            name: (("row", "col"), changes.get(name, image), {"units": unit})
            for name, (image, unit) in fields.items()
        },
        coords={
            "sample_y": ("row", np.linspace(*y, ROWS), {"units": units}),
            "sample_x": ("col", np.linspace(*x, COLS), {"units": units}),
        },
    )


def map_axes(figure):
    return [ax for ax in figure.axes if ax.images]


def units(figure):
    """Texts above the colour bars."""
    return [child.get_title(loc="left") for ax in map_axes(figure) for child in ax.child_axes]


def colour_at(figure, ax, x, y):
    """RGB of the pixel of the figure at data coordinates (x, y) of `ax`."""
    figure.canvas.draw()
    buffer = np.asarray(figure.canvas.buffer_rgba())
    column, row = ax.transData.transform((x, y)).astype(int)
    return buffer[buffer.shape[0] - 1 - row, column, :3].astype(int)


def is_red(rgb):
    return rgb[0] > rgb[2] + 60


def is_blue(rgb):
    return rgb[2] > rgb[0] + 60


@pytest.mark.parametrize("y", [(0.0, 0.3), (0.3, 0.0)])
@pytest.mark.parametrize("x", [(10.0, 10.5), (10.5, 10.0)])
def test_a_pixel_lies_where_its_motors_were(x, y):
    image = np.zeros((ROWS, COLS))
    image[0, 0], image[0, -1], image[-1, 0] = 1e-3, -1e-3, -1e-3
    figure = plot_maps(dataset(y, x, strain=image), ["strain"])
    (ax,) = map_axes(figure)
    assert is_red(colour_at(figure, ax, x[0], y[0]))
    assert is_blue(colour_at(figure, ax, x[-1], y[0]))
    assert is_blue(colour_at(figure, ax, x[0], y[-1]))
    left, right = ax.get_xlim()
    bottom, top = ax.get_ylim()
    assert (left, right) == pytest.approx((9.95, 10.55))
    assert (bottom, top) == pytest.approx((-0.05, 0.35))
    assert ax.get_xlabel() == "sample_x (µm)"
    assert ax.get_ylabel() == "sample_y (µm)"


def test_a_micrometre_is_as_long_up_as_across():
    (ax,) = map_axes(plot_maps(dataset(), ["strain"]))
    assert ax.get_aspect() == 1


def test_a_line_scan_is_drawn_high_enough_to_see():
    x = ("col", np.linspace(0.0, 5.0, 100), {"units": "um"})
    y = ("row", [0.0], {"units": "um"})
    line = xr.Dataset({"counts": (("row", "col"), np.arange(100.0)[None])}, {"y": y, "x": x})
    figure = plot_maps(line, ["counts"])
    (ax,) = map_axes(figure)
    figure.canvas.draw()
    assert ax.get_window_extent().height > 50


def test_nan_looks_like_no_colour_of_the_map():
    image = np.linspace(-1e-3, 1e-3, ROWS * COLS).reshape(ROWS, COLS)
    image[1, 2] = np.nan
    figure = plot_maps(dataset(strain=image), ["strain"])
    (ax,) = map_axes(figure)
    blank = colour_at(figure, ax, 10.2, 0.1)
    assert np.ptp(blank) == 0, "grey"
    shown = ax.images[0].cmap(np.linspace(0, 1, 256))[:, :3] * 255
    assert np.abs(shown - blank).max(axis=1).min() > 15


def test_units_are_scaled_so_that_numbers_can_be_read():
    figure = plot_maps(dataset(), ["strain", "omega", "chi", "counts", "strain_sigma"])
    assert units(figure) == ["10⁻³", "m°", "°", "counts", "10⁻⁶"]
    titles = [ax.get_title() for ax in map_axes(figure)]
    assert titles == ["Strain ε", "Tilt ω", "Tilt χ", "Counts", "σ of strain ε"]
    strain, omega = (ax.images[0] for ax in map_axes(figure)[:2])
    assert strain.get_array().max() == pytest.approx(0.5)
    assert omega.get_array().max() == pytest.approx(20)


def test_map_that_is_not_there_is_named():
    with pytest.raises(KeyError, match=r"'phase'.*'chi'"):
        plot_maps(dataset(), ["phase"])


def test_map_without_any_value_is_drawn_blank():
    empty = np.full((ROWS, COLS), np.nan)
    figure = plot_maps(dataset(strain=empty, counts=empty))
    figure.canvas.draw()
    assert not map_axes(figure)[0].child_axes[0].get_visible()


def test_comparison_shows_truth_and_map_in_the_same_colours_and_states_the_error():
    truth = dataset()
    noise = np.where(np.arange(ROWS * COLS).reshape(ROWS, COLS) % 2, 2e-5, -2e-5)
    maps = dataset(strain=truth["strain"].to_numpy() + noise)
    maps["strain"][0, 0] = np.nan
    figure = plot_comparison(truth, maps, ["strain", "omega"])
    true, measured, difference, *_ = map_axes(figure)
    assert true.images[0].get_clim() == measured.images[0].get_clim()
    assert difference.images[0].get_clim() == pytest.approx((-20, 20))
    assert difference.get_title() == "map − truth, rms 20 × 10⁻⁶"
    assert units(figure)[:4] == ["10⁻³", "10⁻³", "10⁻⁶", "10⁻⁶"]
    figure.canvas.draw()


def test_comparison_has_sigma_beside_and_diagnostics_below():
    figure = plot_comparison(dataset(), dataset(), ["strain"], diagnostics=("counts", "flags"))
    titles = [ax.get_title() for ax in map_axes(figure)]
    assert titles[3:] == ["σ of strain ε", "Counts", "Flags"]


def test_every_flag_has_a_colour_and_a_name():
    flags = np.zeros((ROWS, COLS))
    flags[0, :] = [Flag.MISFIT, Flag.MISFIT | Flag.FEW_COUNTS, 0, np.nan, Flag.FRAME_MISSING, 0]
    figure = plot_maps(dataset(flags=flags), ["flags"])
    (ax,) = map_axes(figure)
    names = [text.get_text() for text in ax.child_axes[0].get_yticklabels()]
    assert len(names) == len(Flag) + 1
    colours = [tuple(colour_at(figure, ax, 10 + 0.1 * i, 0.0)) for i in range(COLS)]
    assert len(set(colours)) == 5  # the same colour for both good points
    few = ax.images[0].cmap(names.index("few counts"), bytes=True)[:3]
    assert colours[1] == pytest.approx(few, abs=2)


def test_comparison_refuses_maps_of_another_scan():
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(3, 6\)"):
        plot_comparison(dataset(), dataset().isel(row=slice(0, 3)))


def test_outliers_do_not_set_the_limits():
    values = np.random.default_rng(1).normal(size=10_000)
    values[:50] = 1e6
    low, high = robust_limits(values, diverging=True)
    assert high < 3
    assert low == -high
    low, high = robust_limits(values)
    assert high < 3


def test_common_offset_does_not_leave_one_colour():
    values = 0.3 + 0.001 * np.linspace(-1, 1, 101)
    low, high = robust_limits(values, diverging=True)
    assert (low + high) / 2 == pytest.approx(0.3)
    assert high - low < 0.003


def test_counts_that_are_all_but_constant_have_no_negative_colours():
    values = np.zeros(400)
    values[7] = 0.3
    assert robust_limits(values) == (0.0, 0.3)


@given(st.lists(st.floats(-1e9, 1e9) | st.just(np.nan), min_size=1, max_size=30), st.booleans())
def test_limits_are_a_range_that_can_be_drawn(values, diverging):
    limits = robust_limits(np.array(values), diverging=diverging)
    if np.isnan(values).all():
        assert limits is None
    else:
        low, high = limits
        assert np.isfinite([low, high]).all()
        assert low < high


def test_colour_limits_hold_still_while_little_changes():
    figure = plt.figure()
    panel = MapPanel(figure.subplots(), "strain", "", MapAxes((2, 2)))
    image = np.array([[-1e-3, 1e-3], [0.0, np.nan]])
    panel.show(image)
    limits = panel.image.get_clim()
    panel.show(image * 1.02)
    assert panel.image.get_clim() == limits
    panel.show(image * 1.5)
    assert panel.image.get_clim() == pytest.approx(np.array(limits) * 1.5)


# ----------------------------------------------------------------------- one image


def pattern(**attrs):
    counts = np.arange(12.0).reshape(3, 4)
    return xr.DataArray(counts, {"row": 2, "col": 5}, ("ny", "nx"), "patterns", attrs)


def test_image_has_the_colours_of_its_field_unless_told_otherwise():
    maps = dataset()
    names = [plot_image(maps[f]).image.get_cmap().name for f in ("strain", "chi", "counts")]
    assert names == ["RdBu_r", "RdBu_r", "viridis"]
    assert plot_image(maps["strain"], cmap="magma").image.get_cmap().name == "magma"


def test_limits_of_an_image_are_in_its_unit_and_robust_where_none_is_given():
    maps = dataset()
    panel = plot_image(maps["strain"], limits=(-2e-4, None))
    _, robust = robust_limits(maps["strain"].to_numpy(), diverging=True)
    assert panel.limits == (-2e-4, robust)
    np.testing.assert_allclose(panel.image.get_clim(), (-0.2, robust * 1e3))  # shown in 10⁻³


def test_pattern_is_logarithmic_and_tells_none_from_one_and_where_it_is():
    panel = plot_image(pattern(units="counts"))
    none, one, most = panel.image.norm([0.0, 1.0, 11.0])
    assert none == 0 < one < most == 1
    assert panel.ax.get_title() == "Pattern, row 2, column 5"
    assert panel.ax.get_ylim() == (2.5, -0.5)  # its first row on top
    assert not isinstance(plot_image(pattern(), log=False).image.norm, LogNorm)


def test_image_without_any_value_is_blank():
    for image in (pattern() * np.nan, pattern() * 0, dataset()["strain"] * np.nan):
        plot_image(image.rename("patterns")).ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cmap": "none"}, "no colour map of matplotlib"),
        ({"limits": (1, 1)}, "limits 1 to 1: the first must be below"),
        ({"limits": (1, None)}, "one of them is of the values"),
        ({"limits": (-1, 1), "log": True}, "above 0 on a logarithmic scale"),
    ],
)
def test_image_refuses_what_makes_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        plot_image(dataset()["strain"], **options)
