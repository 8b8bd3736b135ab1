import numpy as np
import pytest
import torch

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Analyzer
from nanobeam_bluesky.training import evaluate


class Constant(torch.nn.Module):
    """Answers the same for every pattern."""

    def forward(self, counts):
        return torch.tensor([0.001, 0.0, 0.0]).repeat(len(counts), 1)


def test_constant_answer_has_the_spread_of_the_truth_as_its_error(geometry):
    found = evaluate(Constant(), geometry, counts=1000, n=2000)
    assert found.rmse["omega"] == pytest.approx(0.05 / np.sqrt(3), rel=0.03)
    assert found.rmse["chi"] == pytest.approx(0.1 / np.sqrt(3), rel=0.03)
    assert found.bias["strain"] == pytest.approx(0.001, abs=2e-4)
    assert found.counts == pytest.approx(1000)


def test_bound_falls_with_the_root_of_the_counts(geometry):
    few, many = (evaluate(Constant(), geometry, counts=c, n=600).bound for c in (1e3, 1e5))
    for name in few:
        assert few[name] == pytest.approx(10 * many[name], rel=0.01), name


def test_unknown_thickness_raises_the_bound_of_strain(geometry):
    known, unknown = (
        evaluate(Constant(), geometry, counts=6000, ranges=ranges, n=600)
        for ranges in (None, {"thickness": 2.0})
    )
    assert unknown.bound["strain"] > 1.3 * known.bound["strain"]
    assert unknown.bound["omega"] < 1.1 * known.bound["omega"]
    assert 0.1 < unknown.bound["thickness"] < 0.4
    assert list(unknown.rmse) == ["strain", "omega", "chi"]  # what this network gives


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"thickness": 11.7}, r"thickness = 11.7 is a half-range .* between 0 and 10.64"),
        ({"omega": 0.0}, "omega = 0.0 .* between 0 and inf"),
        ({"tilt": 1.0}, "unknown 'tilt'; known are strain, omega, chi, thickness"),
    ],
)
def test_impossible_range_is_refused(geometry, ranges, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Constant(), geometry, counts=6000, ranges=ranges)


def test_peak_is_that_of_the_library():
    found = evaluate(Constant(), Geometry.published(), sampling="published", peak=7, n=500)
    assert found.counts == pytest.approx(5900, rel=0.02)


def test_analyzer_is_measured_like_a_network(geometry):
    analyzer = Analyzer.for_geometry(geometry, method="correlation")
    found = evaluate(analyzer, geometry, counts=6000, n=500)
    assert 1e-3 < found.rmse["strain"] < 4e-3
    assert found.rmse["strain"] > 5 * found.bound["strain"]


@pytest.mark.parametrize("level", [{}, {"counts": 100, "peak": 7}])
def test_counts_or_peak_must_be_given(geometry, level):
    with pytest.raises(ValueError, match="either counts or peak"):
        evaluate(Constant(), geometry, **level)
