from importlib import import_module

import numpy as np
import pytest
import torch

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import DEFAULT_FIT, Analyzer, ModelStore
from nanobeam_bluesky.physics import forward
from nanobeam_bluesky.training import evaluate, train

QUICK = {"steps": 5, "counts": 6000, "architecture": "SeparableNet"}


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    """Validate on 256 patterns: that is most of a training of a few steps."""
    module = import_module("nanobeam_bluesky.training.train")
    monkeypatch.setattr(module, "_HELD_OUT", 256)


def test_specialised_network_is_better_than_the_shipped_one_and_knows_its_errors(
    geometry, tmp_path, monkeypatch
):
    # its error bars come from these: 256 would leave them uncertain by 5 %
    monkeypatch.setattr(import_module("nanobeam_bluesky.training.train"), "_HELD_OUT", 2048)
    network, card = train(geometry, counts=6000, steps=150)
    assert (card.architecture, card.training["start"]) == ("ReducedNet", "universal")
    store = ModelStore(tmp_path)
    store.save(network, card)
    shipped, special = (
        Analyzer.for_geometry(geometry, method="network", store=s, device="cpu")
        for s in (ModelStore(tmp_path / "empty"), store)
    )
    assert [a.settings["start"] for a in (shipped, special)] == ["universal", "network"]
    before, after = (
        evaluate(a, geometry, counts=6000, n=500, seed=1).rmse for a in (shipped, special)
    )
    assert np.mean([after[name] / before[name] for name in before]) < 1
    truth = np.random.default_rng(2).uniform(-1, 1, (3, 1000)).T * [0.005, 0.05, 0.1]
    patterns = forward(*truth.T, geometry)
    noisy = np.random.default_rng(3).poisson(patterns * 6000 / patterns.sum((1, 2)).mean())
    found = special.process(noisy)
    for name, expected in zip(("strain", "omega", "chi"), truth.T, strict=True):
        pull = (getattr(found, name) - expected) / getattr(found, f"{name}_sigma")
        assert 0.9 < pull.std() < 1.1, name


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"thickness_nm": 400.0}, {}, "thickness_nm = 400, expected 5 to 300"),
        ({}, {"sampling": "published"}, "continuous sampling"),
        ({}, {"ranges": {"thickness": 2.0}}, "does not tell the thickness"),
    ],
)
def test_where_the_shipped_network_is_of_no_use_one_is_trained_from_scratch(
    geometry, change, options, reason
):
    changed = geometry.model_copy(update=change)
    _, card = train(changed, counts=6000, steps=2, **options)
    assert (card.architecture, card.training["start"]) == ("SeparableNet", "scratch")
    assert reason in card.training["reason"]


def test_network_from_scratch_beats_the_correlation_fit_in_seconds(geometry):
    network, card = train(geometry, architecture="SeparableNet", counts=(1e3, 1e5), steps=250)
    conventional = Analyzer.for_geometry(geometry, method="correlation")
    trained, fitted = (
        evaluate(estimator, geometry, counts=6000, n=1000, seed=1).rmse
        for estimator in (network, conventional)
    )
    for name in ("strain", "omega", "chi"):
        assert trained[name] < 0.3 * fitted[name], name
    assert not network.training
    assert [round(a.counts) for a in card.accuracy] == [1000, 3162, 10000, 31620, 100000]
    assert card.accuracy[-1].rmse["chi"] < card.accuracy[0].rmse["chi"]


def test_trained_network_is_stored_and_found(geometry, tmp_path):
    network, card = train(geometry, **QUICK)
    store = ModelStore(tmp_path)
    store.save(network, card)
    patterns = torch.rand(3, *geometry.pattern_shape) * 20
    analyzer = Analyzer.for_geometry(geometry, method="network", store=store, device="cpu")
    with torch.inference_mode():
        expected = network(patterns[:, None]).numpy()
    estimates = analyzer.process(patterns.numpy())
    np.testing.assert_allclose(estimates.chi, expected[:, 2], rtol=1e-4, atol=1e-6)
    assert analyzer.card.training["steps"] == QUICK["steps"]


def test_same_seed_gives_the_same_network(geometry):
    first, second, other = (train(geometry, seed=seed, **QUICK)[0] for seed in (1, 1, 2))
    x = torch.rand(1, 1, *geometry.pattern_shape)
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))


def test_time_ends_the_training(geometry):
    seen = []
    _, card = train(
        geometry, architecture="SeparableNet", counts=6000, seconds=0.5, progress=seen.append
    )
    assert seen[-1].fraction == 1
    assert seen[-1].seconds >= 0.5
    assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
    assert card.training["steps"] > 0


def test_other_architecture_ranges_and_peak():
    network, card = train(
        Geometry.published().model_copy(update={"roi_shape": (80, 80)}),
        sampling="published",
        architecture="NanobeamNN",
        ranges={"chi": 0.05},
        peak=7,
        steps=5,
    )
    assert type(network).__name__ == card.architecture == "NanobeamNN"
    assert card.ranges == {"strain": 0.005, "omega": 0.05, "chi": 0.05}
    assert len(card.accuracy) == 1


def test_network_with_a_thickness_range_finds_the_thickness(geometry, tmp_path):
    ranges = {"thickness": 2.34}
    network, card = train(geometry, ranges=ranges, counts=6000, steps=400)
    (level,) = card.accuracy
    assert card.ranges["thickness"] == 2.34
    assert level.rmse["thickness"] < 0.5 * 2.34 / np.sqrt(3)  # of what a constant answer has
    assert level.rmse["strain"] < 0.3 * 0.005 / np.sqrt(3)
    store = ModelStore(tmp_path)
    store.save(network, card)
    fit = (*DEFAULT_FIT, "thickness")
    refined = evaluate(
        Analyzer.for_geometry(geometry, fit=fit, store=store),
        geometry,
        ranges=ranges,
        counts=6000,
        n=500,
        seed=1,
    )
    for name, bound in refined.bound.items():
        assert refined.rmse[name] < 1.2 * bound, name


def test_thickness_needs_the_continuous_sampling(geometry):
    with pytest.raises(ValueError, match="thickness: the published sampling"):
        train(geometry, sampling="published", ranges={"thickness": 2.0})


def test_torch_threads_are_given_back(geometry):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(geometry, **QUICK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_unknown_architecture_is_refused(geometry):
    with pytest.raises(ValueError, match=r"'ResNet'.*SeparableNet"):
        train(geometry, architecture="ResNet")


def test_beam_beside_the_roi_is_refused(geometry):
    narrow = geometry.optics.model_copy(update={"focal_length_mm": 100.0})
    aside = geometry.model_copy(
        update={
            "optics": narrow,
            "roi_shape": (32, 32),
            "roi_origin_px": (300, 256),
            "bragg_center_px": (272.0, 272.0),
        }
    )
    with pytest.raises(ValueError, match=r"no light falls on the ROI.*bragg_center_px"):
        train(aside, ranges={"omega": 0.001, "chi": 0.001})
