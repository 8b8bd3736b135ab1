"""One strain and tilt from the patterns of several angles."""

import numpy as np
import pytest
from scipy.optimize import minimize

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Analyzer, Estimates, Flag, refine, refine_together
from nanobeam_bluesky.physics import fisher_information, forward

ANGLES = (0.0, -0.05, 0.05)
BASE = Geometry.published().model_copy(
    update={"detector_distance_m": 0.425, "roi_shape": (64, 64), "pupil_blur_px": 0.5}
)
GEOMETRIES = [BASE.model_copy(update={"delta_theta_deg": angle}) for angle in ANGLES]
BACKGROUND = 0.05
FIELDS = ("strain", "omega", "chi")


def scale(geometry):
    return 6000 / forward(0.0, 0.0, 0.0, geometry).sum()


def truth(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.uniform(-limit, limit, n) for limit in (1.5e-3, 0.01, 0.03)]


def measured(values, geometry, seed):
    rates = forward(*values, geometry) * scale(geometry) + BACKGROUND
    return np.random.default_rng(seed).poisson(rates).astype(np.float32)


def near(values, sigma=(3e-4, 1e-3, 3e-3)):
    """Estimates as a scan alone might give them."""
    rng = np.random.default_rng(9)
    empty = Estimates.empty(len(values[0]))
    columns = empty.columns()
    for name, value, s in zip(FIELDS, values, sigma, strict=True):
        columns[name] = value + s * rng.standard_normal(len(value))
        columns[f"{name}_sigma"] = np.full(len(value), s)
    return Estimates(**columns | {"background": np.full(len(value), BACKGROUND)})


@pytest.fixture(scope="module")
def series():
    """Patterns of every angle, what each angle gives alone, and the true values."""
    values = truth(400)
    patterns = [measured(values, g, seed) for seed, g in enumerate(GEOMETRIES)]
    singles = [
        Analyzer.for_geometry(g).process(p) for p, g in zip(patterns, GEOMETRIES, strict=True)
    ]
    return patterns, singles, values


@pytest.fixture(scope="module")
def bounds():
    """Root of the Cramér–Rao bound of every angle alone (k, n, 3), and of all (n, 3)."""
    values = truth(400)
    together, alone = 0, []
    for geometry in GEOMETRIES:
        information = fisher_information(
            *values, geometry, scale=scale(geometry), background=BACKGROUND
        )
        covariance = np.linalg.inv(information)[:, :3, :3]
        alone.append(np.sqrt(np.diagonal(covariance, axis1=1, axis2=2)))
        together = together + np.linalg.inv(covariance)
    joint = np.sqrt(np.diagonal(np.linalg.inv(together), axis1=1, axis2=2))
    return np.stack(alone), joint


def test_errors_and_sigma_are_those_of_the_joint_fisher_information(series, bounds):
    patterns, singles, values = series
    alone, joint = bounds
    found = refine_together(patterns, singles, GEOMETRIES)
    good = found.estimates.flags == 0
    assert good.mean() > 0.98
    for a, name in enumerate(FIELDS):
        error = (getattr(found.estimates, name) - values[a])[good]
        sigma = getattr(found.estimates, f"{name}_sigma")[good]
        assert np.sqrt(np.mean((error / joint[good, a]) ** 2)) < 1.1
        assert np.sqrt(np.mean((error / sigma) ** 2)) == pytest.approx(1, abs=0.1)
        # the must: σ shrinks as the Fisher information says, within 10 %
        best = np.nanmin([getattr(s, f"{name}_sigma")[good] for s in singles], axis=0)
        predicted = joint[good, a] / alone[:, good, a].min(axis=0)
        np.testing.assert_allclose(np.median(sigma / best), np.median(predicted), rtol=0.05)
        np.testing.assert_allclose(
            np.median(found.expected[name][good] / joint[good, a]), 1, atol=0.02
        )
    assert np.abs(found.estimates.deviance[good].mean()) < 0.3
    assert np.abs(np.mean(found.disagreement[good])) < 0.3
    assert (found.scans_used == 3).all()


def test_it_is_where_a_plain_minimisation_of_all_likelihoods_ends(series):
    patterns, singles, values = series
    few = np.arange(2)
    found = refine_together(
        [p[few] for p in patterns], [s.select(few) for s in singles], GEOMETRIES
    ).estimates
    steps = np.array([1e-4, 1e-4, 3e-4] + [1, 0.01] * 3)
    for i in few:

        def cost(x, i=i):
            strain, omega, chi, *own = x * steps
            total = 0.0
            for k, geometry in enumerate(GEOMETRIES):
                rates = own[2 * k] * forward(strain, omega, chi, geometry)[0].astype(float)
                rates = np.maximum(rates + own[2 * k + 1], 1e-9)
                total += (rates - patterns[k][i] * np.log(rates)).sum()
            return total

        own = np.array([[scale(g), BACKGROUND] for g in GEOMETRIES]).ravel()
        begin = np.concatenate([[v[i] for v in values], own]) / steps
        best = minimize(cost, begin, method="L-BFGS-B", options={"eps": 0.02})
        for a, name in enumerate(FIELDS):
            sigma = getattr(found, f"{name}_sigma")[i]
            assert getattr(found, name)[i] == pytest.approx(best.x[a] * steps[a], abs=0.1 * sigma)


def test_a_point_of_one_scan_is_what_refine_makes_of_it(series):
    patterns, singles, _ = series
    few = np.arange(20)
    used = np.array([[True], [False], [False]]).repeat(20, axis=1)
    found = refine_together(
        [p[few] for p in patterns], [s.select(few) for s in singles], GEOMETRIES, used=used
    )
    alone = refine(patterns[0][few], singles[0].select(few), GEOMETRIES[0])
    assert (found.scans_used == 1).all()
    for name in FIELDS:
        sigma = getattr(alone, f"{name}_sigma")
        difference = getattr(found.estimates, name) - getattr(alone, name)
        assert np.abs(difference / sigma).max() < 0.05
        np.testing.assert_allclose(getattr(found.estimates, f"{name}_sigma"), sigma, rtol=0.02)
    np.testing.assert_allclose(found.estimates.deviance, alone.deviance, atol=0.1)


def test_a_point_of_no_scan_has_no_value_and_says_why(series):
    patterns, _, _ = series
    empty = Estimates.empty(3, Flag.FEW_COUNTS)
    found = refine_together(
        [p[:3] for p in patterns], [empty] * 3, GEOMETRIES, used=np.zeros((3, 3), bool)
    )
    assert (found.estimates.flags == Flag.FEW_COUNTS).all()
    assert np.isnan(found.estimates.strain).all()
    assert (found.scans_used == 0).all()


def test_what_changes_on_the_way_to_a_scans_point_is_taken_into_account():
    n = 100
    values = truth(n, seed=2)
    apart = np.zeros((3, n, 3))
    apart[1], apart[2] = [4e-4, 1e-3, 2e-3], [-2e-4, -1e-3, 1e-3]
    there = [[v + d for v, d in zip(values, a.T, strict=True)] for a in apart]
    patterns = [
        measured(v, g, 7 + k) for k, (v, g) in enumerate(zip(there, GEOMETRIES, strict=True))
    ]
    singles = [near(v, (1e-4, 2e-4, 5e-4)) for v in there]
    kept, dropped = (refine_together(patterns, singles, GEOMETRIES, apart=a) for a in (apart, None))
    for a, name in enumerate(FIELDS):
        error = (getattr(kept.estimates, name) - values[a]) / getattr(
            kept.estimates, f"{name}_sigma"
        )
        assert np.sqrt(np.mean(error**2)) < 1.25
    assert np.nanmedian(dropped.disagreement) > 5 + np.nanmedian(kept.disagreement)


def test_a_thickness_that_is_wrong_is_seen_and_one_that_is_fitted_found():
    n = 40
    values = truth(n, seed=3)
    thicker = [g.model_copy(update={"thickness_nm": 1.2 * g.thickness_nm}) for g in GEOMETRIES]
    patterns = [measured(values, g, seed) for seed, g in enumerate(thicker)]
    singles = [near(values)] * 3
    wrong = refine_together(patterns, singles, GEOMETRIES).estimates
    assert ((wrong.flags & Flag.MISFIT) > 0).mean() > 0.9
    fit = ("strain", "omega", "chi", "scale", "background", "thickness")
    found = refine_together(patterns, singles, GEOMETRIES, fit=fit).estimates
    good = found.flags == 0
    assert good.mean() > 0.9
    error = (found.thickness - 1.2 * BASE.thickness_nm)[good] / found.thickness_sigma[good]
    assert np.sqrt(np.mean(error**2)) == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit": ("strain", "omega", "chi", "scale", "blur")}, "blur"),
        ({"used": np.ones((2, 3), bool)}, r"used has shape \(2, 3\): expected \(3, 5\)"),
    ],
)
def test_what_does_not_fit_together_is_named(series, change, message):
    patterns, singles, _ = series
    few = np.arange(5)
    with pytest.raises(ValueError, match=message):
        refine_together(
            [p[few] for p in patterns], [s.select(few) for s in singles], GEOMETRIES, **change
        )
