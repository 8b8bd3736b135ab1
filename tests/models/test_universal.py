"""The shipped network: reduced coordinates, the envelope, and fresh geometries."""

import math
from importlib.resources import files

import numpy as np
import pytest
import torch

from nanobeam_bluesky.geometry import Geometry, RectangularPupil, ZonePlate
from nanobeam_bluesky.models import Analyzer, Flag, ModelNotFoundError, ModelStore
from nanobeam_bluesky.models.reduced import (
    LIMITS,
    OutsideEnvelopeError,
    check_envelope,
    envelope_ranges,
    random_geometry,
    reduce_geometry,
)
from nanobeam_bluesky.models.universal import UniversalNet, _shipped, universal_network
from nanobeam_bluesky.models.view import _compiled, _plain, view
from nanobeam_bluesky.physics import cramer_rao, forward
from nanobeam_bluesky.physics.continuous import angles

PUBLISHED = Geometry.published()
NAMES = ("strain", "omega", "chi")


def fresh(n, seed=2026):
    """Blurred geometries that no training has drawn."""
    rng = np.random.default_rng([seed, 4])
    found = []
    while len(found) < n:
        geometry = random_geometry(rng)
        if geometry.pupil_blur_px:
            found.append(geometry)
    return found


def draw(geometry, n, counts, seed=0):
    """Parameters (n, 3) within the ranges, patterns with noise, and their scale."""
    reduced, rng = reduce_geometry(geometry), np.random.default_rng(seed)
    labels = rng.uniform(-1, 1, (n, 3)) * LIMITS
    truth = np.stack(angles(reduced.plan, *reduced.shifts(labels)), axis=1)
    patterns = forward(*truth.T, geometry)
    scale = counts / patterns.sum((1, 2))
    return truth, rng.poisson(patterns * scale[:, None, None]), scale


# ------------------------------------------------------------------ reduced coordinates


def test_labels_are_strain_and_tilts_in_other_units():
    for geometry in (PUBLISHED, *fresh(4)):
        reduced = reduce_geometry(geometry)
        labels = np.random.default_rng(1).uniform(-1, 1, (20, 3))
        parameters = angles(reduced.plan, *reduced.shifts(labels))
        np.testing.assert_allclose(reduced.labels(*parameters), labels, atol=1e-9)


def test_published_condition_in_reduced_coordinates():
    """PHYSICS: Ro = 26.3, f = 0.01327; ω = 0.05° ↔ 13.5, χ = 0.1° ↔ 7.4, ε = 0.005 ↔ 22 px."""
    reduced = reduce_geometry(PUBLISHED)
    assert reduced.units[:2] == pytest.approx(26.3, abs=0.05)
    assert reduced.fringes == pytest.approx(0.01327, rel=0.01)
    for at, pixels in (((0, 0.05, 0), 13.5), ((0, 0, 0.1), 7.4), ((0.005, 0, 0), 22)):
        labels = reduced.labels(*np.array(at)[:, None])[0] * reduced.units
        assert np.abs(labels).max() == pytest.approx(pixels, rel=0.02)


def test_other_energies_and_distances_are_the_same_problem():
    """Twice the distance with twice the pixel is the very same, though its fingerprint is not."""
    twin = PUBLISHED.model_copy(update={"detector_distance_m": 1.7, "pixel_size_um": 110.0})
    assert twin.fingerprint() != PUBLISHED.fingerprint()
    ours, theirs = reduce_geometry(PUBLISHED), reduce_geometry(twin)
    np.testing.assert_allclose(ours.condition, theirs.condition, atol=1e-5)
    np.testing.assert_allclose(ours.columns, theirs.columns, rtol=1e-5)


def test_a_rocked_film_has_its_ranges_around_another_strain():
    rocked = PUBLISHED.model_copy(update={"delta_theta_deg": 0.02})
    reduced = reduce_geometry(rocked)
    middle = angles(reduced.plan, *reduced.shifts(np.zeros((1, 3))))[0][0]
    # Bragg's law: the film diffracts on the axis at Δθ = −tan θ · ε
    expected = -math.radians(0.02) / math.tan(math.radians(rocked.incidence_deg))
    assert middle == pytest.approx(expected, rel=0.03)
    assert envelope_ranges(reduced)["strain"] > envelope_ranges(reduce_geometry(PUBLISHED))[
        "strain"
    ] + 0.9 * abs(middle)


def looks(geometry, rng):
    """Arguments of `view`, around middles anywhere, also beyond the pattern."""
    reduced = reduce_geometry(geometry)
    patterns = rng.poisson(2, (1, 6, len(reduced.rows) - 1, len(reduced.columns) - 1))
    patterns[0, 0], patterns[0, 1, 5, 5] = 0, 10_000  # empty, and a hot pixel
    half = torch.tensor(reduced.units[:2, None], dtype=torch.float32)
    middles = torch.from_numpy(rng.uniform(-1.5, 1.5, (2, 1, 6)).astype(np.float32))
    return (
        torch.from_numpy(patterns.astype(np.float32)),
        *(torch.from_numpy(borders)[None] for borders in (reduced.columns, reduced.rows)),
        *(middles * half[..., None]),
        *half,
    )


@pytest.mark.parametrize(("cells", "extent"), [(44, 1.4), (55, 1.2)])
def test_the_compiled_view_equals_the_plain_one(cells, extent):
    rng = np.random.default_rng(0)
    for geometry in (PUBLISHED, *fresh(4)):
        lit = torch.from_numpy(rng.integers(0, 2, (1, cells, cells)).astype(np.float32))
        arguments = (*looks(geometry, rng), extent, lit)
        for ours, plain in zip(_compiled(*arguments), _plain(*arguments), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_view_that_holds_the_pattern_holds_its_counts():
    x = torch.rand(1, 2, 40, 50)
    columns, rows = (torch.arange(n + 1.0)[None] - n / 2 for n in (50, 40))
    half = torch.full((1,), 20.0)
    seen = view(x, columns, rows, *torch.zeros(2, 1, 2), half, half, 1.4, torch.ones(1, 44, 44))
    torch.testing.assert_close(seen.counts * (2 * 1.4 * 20) ** 2, x.sum((-1, -2)))


# ------------------------------------------------------------------ the network


def test_network_of_one_geometry_equals_the_one_of_all():
    for geometry in fresh(2):
        network, reduced, _ = universal_network(geometry)
        _, counts, _ = draw(geometry, 8, 3000)
        patterns = torch.from_numpy(counts.astype(np.float32))
        everything: UniversalNet = _shipped()[0]
        with torch.inference_mode():
            found = network(patterns[:, None]).double().numpy()
            _, labels = everything(
                patterns[None],
                *(
                    torch.from_numpy(np.asarray(a, np.float32))[None]
                    for a in (reduced.columns, reduced.rows, reduced.units, reduced.condition)
                ),
            )
        expected = angles(reduced.plan, *reduced.shifts(labels[0, :, :3].double().numpy()))
        np.testing.assert_allclose(found[:, :3], np.stack(expected, 1), rtol=1e-4, atol=1e-6)
        assert (found[:, 3:] > 0).all()


def test_the_folded_network_equals_the_one_that_learns():
    geometry = fresh(1)[0]
    network, _, _ = universal_network(geometry)
    patterns = torch.from_numpy(draw(geometry, 8, 3000)[1].astype(np.float32))[:, None]
    for _ in range(2):
        plain = torch.cat(network.both(patterns)).detach()  # with gradients
        with torch.inference_mode():
            folded = torch.cat(network.both(patterns))
        torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-6)
        with torch.no_grad():  # another step of training
            for weight in network.parameters():
                weight.mul_(1.01)


@pytest.mark.parametrize("geometry", fresh(6), ids=lambda g: g.fingerprint()[:6])
def test_a_geometry_never_seen_is_refined_to_the_bound(geometry, tmp_path):
    truth, counts, scale = draw(geometry, 200, 4300)
    analyzer = Analyzer.for_geometry(geometry, store=ModelStore(tmp_path))
    assert analyzer.settings["start"] == "universal"
    estimates = analyzer.process(counts)
    good = estimates.flags == 0
    assert good.mean() > 0.97
    bound = cramer_rao(*truth[good].T, geometry, scale=scale[good])
    for column, name in enumerate(NAMES):
        error = getattr(estimates, name)[good] - truth[good, column]
        # sampling error of a root mean square of 200: 5 %
        assert np.sqrt(np.mean(error**2) / np.mean(bound[name] ** 2)) < 1.3, name


def test_a_pattern_that_tells_nothing_is_flagged(tmp_path):
    network = Analyzer.for_geometry(PUBLISHED, method="network", store=ModelStore(tmp_path))
    noise = np.random.default_rng(5).poisson(0.2, (20, 64, 64))
    assert (network.process(noise).flags != 0).mean() > 0.9


def test_strain_alone_is_near_the_bound_at_the_published_condition(tmp_path):
    truth = np.random.default_rng(3).uniform(-1, 1, (2000, 3)) * [0.005, 0.05, 0.1]
    patterns = forward(*truth.T, PUBLISHED)
    scale = 4300 / patterns.sum((1, 2))
    counts = np.random.default_rng(4).poisson(patterns * scale[:, None, None])
    analyzer = Analyzer.for_geometry(PUBLISHED, method="network", store=ModelStore(tmp_path))
    error = analyzer.process(counts).strain - truth[:, 0]
    assert np.sqrt(np.mean(error**2)) < 1.3e-4


def test_weights_are_small():
    path = files("nanobeam_bluesky.models").joinpath("weights", "universal", "weights.safetensors")
    assert len(path.read_bytes()) < 5e6


# ------------------------------------------------------------------ outside

SHORT = ZonePlate(diameter_um=149, focal_length_mm=21.874, central_stop_diameter_um=140)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"binning": 1}, "52.6 binned pixels, at most 30: binning = 2 would do"),
        ({"binning": 8}, "6.58 binned pixels, at least 8: binning = 6 would do"),
        ({"optics": SHORT}, "the stop covers 0.94"),
        ({"thickness_nm": 900.0}, "a film up to"),
        ({"thickness_nm": 3.0}, "expected 5 to 300"),
        ({"pupil_blur_px": 3.0}, "at most 2"),
        ({"bragg_center_px": (310.0, 256.0), "roi_origin_px": (192, 192)}, "a ROI around"),
        (
            {"optics": RectangularPupil(divergence_x_mrad=6.8, divergence_y_mrad=1)},
            "at least 8: a detector",
        ),
    ],
)
def test_outside_the_envelope_says_what_works_and_starts_from_the_library(
    changes, words, tmp_path, caplog
):
    geometry = PUBLISHED.model_copy(update=changes)
    with pytest.raises(OutsideEnvelopeError, match=words):
        check_envelope(geometry, reduce_geometry(geometry))
    store = ModelStore(tmp_path)
    settings = Analyzer.for_geometry(geometry, store=store).settings
    assert settings["start"] == "library"
    assert words in settings["reason"]
    assert words in caplog.text
    with pytest.raises(ModelNotFoundError, match=words):
        Analyzer.for_geometry(geometry, method="network", store=store)


def test_drawn_geometries_lie_inside():
    for geometry in fresh(10, seed=7):
        check_envelope(geometry, reduce_geometry(geometry))


@pytest.mark.parametrize(("method", "beyond"), [("network", 1.15), ("refine", 1.55)])
def test_values_beyond_the_ranges_are_flagged(method, beyond, tmp_path):
    blurred = PUBLISHED.model_copy(update={"pupil_blur_px": 0.4})
    analyzer = Analyzer.for_geometry(blurred, method=method, store=ModelStore(tmp_path))
    limits = [analyzer.ranges[name] for name in NAMES]
    truth = np.diag(beyond * np.array(limits))
    patterns = forward(*truth.T, blurred)
    counts = np.round(patterns * (2e4 / patterns.sum((1, 2)))[:, None, None])
    assert (analyzer.process(counts).flags & Flag.OUT_OF_RANGE > 0).all()
    truth *= 0.7
    patterns = forward(*truth.T, blurred)
    counts = np.random.default_rng(0).poisson(
        patterns * (2e4 / patterns.sum((1, 2)))[:, None, None]
    )
    assert not analyzer.process(counts).flags.any()
