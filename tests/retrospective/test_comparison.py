"""Two derived runs, point by point."""

import json

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

from nanobeam_bluesky.cli import app
from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.plots import plot_agreement
from nanobeam_bluesky.retrospective import compare

SHAPE = (40, 50)
SIGMA = {"strain": 1e-4, "omega": 2e-3, "chi": 5e-3}


@pytest.fixture(scope="module")
def pair(derived_documents):
    """Two runs whose errors are twice the noise in the second; and 20 flagged points."""
    rng = np.random.default_rng(0)
    flags = np.zeros(SHAPE, int)
    flags[0, :20] = Flag.MISFIT
    runs = []
    for noise in (1, 2):
        change = {"flags": flags if noise == 2 else 0 * flags}
        for k, (name, sigma) in enumerate(SIGMA.items()):
            true = 3 * sigma * np.sin(np.arange(SHAPE[1]) / (4 + k)) + np.zeros(SHAPE)
            change[name] = true + noise * sigma * rng.standard_normal(SHAPE)
            change[f"{name}_sigma"] = np.full(SHAPE, noise * sigma)
        runs.append(derived_documents(SHAPE, change=change))
    return runs


def test_errors_of_both_explain_the_difference(pair):
    found = compare(*pair)
    assert set(found.agreement) == {"strain", "omega", "chi"}  # no thickness was fitted
    for name, agreement in found.agreement.items():
        assert agreement.points == 40 * 50 - 20
        assert agreement.within == pytest.approx((0.683, 0.954), abs=0.03)
        # an ordinary slope would be 4.5 / 5.5
        assert agreement.slope == pytest.approx(1, abs=0.07)
        assert agreement.rms == pytest.approx(np.sqrt(5) * SIGMA[name], rel=0.05)
        assert abs(agreement.mean) < 0.1 * agreement.rms
        x, y = found.first[name].to_numpy(), found.second[name].to_numpy()
        both = np.isfinite(x) & np.isfinite(y)
        assert agreement.r == pytest.approx(np.corrcoef(x[both], y[both])[0, 1])
        difference = found.difference[name].to_numpy()
        np.testing.assert_array_equal(np.isfinite(difference), both)


def test_a_run_compared_with_itself_agrees_in_all(pair):
    for agreement in compare(pair[0], pair[0]).agreement.values():
        assert (agreement.r, agreement.slope) == pytest.approx((1, 1))
        assert (agreement.mean, agreement.rms, agreement.within) == (0, 0, (1, 1))


def test_estimates_without_sigma_say_so(pair, derived_documents):
    nothing = {f"{name}_sigma": np.full(SHAPE, np.nan) for name in SIGMA}
    change = nothing | {"strain": np.random.default_rng(1).normal(size=SHAPE)}
    found = compare(pair[0], derived_documents(SHAPE, change=change))
    assert all(a.within is None for a in found.agreement.values())
    assert all(np.isfinite(a.slope) for a in found.agreement.values())


def test_points_that_are_all_flagged_leave_nothing_to_compare(pair, derived_documents):
    flags = np.full(SHAPE, int(Flag.FEW_COUNTS))
    found = compare(pair[0], derived_documents(SHAPE, change={"flags": flags}))
    assert found.agreement["strain"].points == 0
    assert np.isnan(found.agreement["strain"].r)
    plot_agreement(found.first, found.second, ["chi"], names=found.names)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"shape": (40, 49)}, "has 40 × 49 points, but 40 × 50 points"),
        ({"shape": SHAPE, "sample": "chip"}, "sample 'chip', but 'film'"),
        ({"shape": SHAPE, "extents": [[0.0, 3.9], [9.0, 13.9]]}, "sample_x from 9 to 13.9, but 0"),
    ],
)
def test_runs_of_different_points_are_refused(pair, derived_documents, other, message):
    with pytest.raises(ValueError, match=message):
        compare(pair[0], derived_documents(**other))


def test_the_figure_has_maps_difference_and_correlation(pair):
    found = compare(*pair)
    lines = {name: (a.slope, a.intercept, a.r) for name, a in found.agreement.items()}
    figure = plot_agreement(found.first, found.second, ["chi"], names=found.names, lines=lines)
    titles = [ax.get_title() for ax in figure.axes]
    r = found.agreement["chi"].r
    assert any(title.startswith(f"r = {r:.4g}") for title in titles)
    assert sum("rms" in title for title in titles) == 1


def test_the_command_prints_a_table_and_draws_the_figure(pair, tmp_path):
    paths = []
    for i, run in enumerate(pair):
        paths.append(tmp_path / f"{i}.jsonl")
        paths[-1].write_text("\n".join(json.dumps({"name": n, "doc": d}) for n, d in run))
    out = tmp_path / "figures"
    result = CliRunner().invoke(app, ["compare", *map(str, paths), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "strain" in result.output
    (figure,) = out.glob("*.png")
    assert matplotlib.image.imread(figure).shape[0] > 1000
    result = CliRunner().invoke(app, ["compare", str(paths[0]), "3f2a91c0"])
    assert result.exit_code == 2
    assert "--catalog" in result.output
