"""Scans of one area at several angles become one map."""

from types import SimpleNamespace

import numpy as np
import pytest
from bluesky import RunEngine
from event_model import DocumentNames, schema_validators
from typer.testing import CliRunner

from nanobeam_bluesky.cli import app
from nanobeam_bluesky.documents import to_maps
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.physics import cramer_rao, fisher_information, forward
from nanobeam_bluesky.plots import plot_combination
from nanobeam_bluesky.retrospective import combine
from nanobeam_bluesky.sim import Phantom, SimulatedSXDM, sxdm_fly
from nanobeam_bluesky.tiled_adapters import open_catalog, raw_writer

SHAPE = (16, 18)
STEP = 0.05
COUNTS, BACKGROUND = 6000, 0.02
ANGLES = (0.0, -0.05, 0.05)
DRIFTS = ((0.0, 0.0), (2.4, -1.7), (-1.6, 3.3))
BASE = Geometry.published().model_copy(
    update={
        "detector_distance_m": 0.425,
        "roi_shape": (64, 64),
        "detector_shape": (64, 64),
        "bragg_center_px": (32.0, 32.0),
        "pupil_blur_px": 0.5,
    }
)
GEOMETRIES = [BASE.model_copy(update={"delta_theta_deg": angle}) for angle in ANGLES]
FIELDS = ("strain", "omega", "chi")


def sample(drift):
    """A smooth film with a crack and a hole, whose features lie `drift` points farther on."""
    y, x = (np.indices(SHAPE) - np.array(drift)[:, None, None]).astype(float)
    rng = np.random.default_rng(5)

    def field():
        waves = rng.normal(size=(5, 2)) / 20
        phases = rng.uniform(0, 2 * np.pi, 5)
        return (
            sum(
                np.sin(2 * np.pi * (a * y + b * x) + p)
                for (a, b), p in zip(waves, phases, strict=True)
            )
            / 2
        )

    hole = 0.7 * np.exp(-((np.hypot(y - 6, x - 10) / 2) ** 2))
    crack = 0.6 * np.exp(-(((y - 0.6 * x - 4) / 1.5) ** 2))
    return Phantom(
        name="film",
        strain=6e-4 * field(),
        omega=0.006 * field(),
        chi=0.012 * field(),
        intensity=np.clip(1 - hole - crack, 0.05, 1),
        y=STEP * np.arange(SHAPE[0]),
        x=STEP * np.arange(SHAPE[1]),
    )


def fly(folder, drift, geometry, seed, **md):
    """Fly one scan; return its documents."""
    engine, documents = RunEngine(context_managers=[]), []
    engine.subscribe(lambda name, doc: documents.append((name, doc)))
    device = SimulatedSXDM(
        sample(drift), geometry, folder, counts=COUNTS, background=BACKGROUND, seed=seed,
        position_jitter=0,
    )  # fmt: skip
    engine(sxdm_fly(device, md=md))
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join()
    engine.loop.close()
    return documents


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    runs = [
        fly(folder, drift, geometry, seed)
        for seed, (drift, geometry) in enumerate(zip(DRIFTS, GEOMETRIES, strict=True))
    ]
    return SimpleNamespace(folder=folder, runs=runs, combined=combine(runs))


def at(maps):
    """How far the map's points lie from the first scan's, points."""
    return tuple(float(maps[m][0]) / STEP for m in ("sample_y", "sample_x"))


def test_drift_is_found_and_told_in_points_and_in_the_motors_units(series):
    scans = series.combined.scans
    found = np.stack([scans.drift_row, scans.drift_col], 1)
    np.testing.assert_allclose(found, DRIFTS, atol=0.2)
    np.testing.assert_allclose(scans.drift_sample_x, STEP * found[:, 1])
    assert scans.drift_sample_x.units == "um"
    assert scans.used.all()
    assert scans.quality.min() > 0.9
    assert np.abs(scans.offset_row).max() <= 0.5


def test_sigma_shrinks_as_the_fisher_information_says_and_errors_are_sigma(series):
    maps, scans = series.combined.maps, series.combined.scans
    true = sample([-d for d in at(maps)])
    full = (maps.scans_used == 3).to_numpy() & (maps.flags == 0).to_numpy()
    assert full.sum() > 0.4 * full.size
    values = [getattr(true, name)[full] for name in FIELDS]
    together, alone = 0, []
    for geometry in GEOMETRIES:
        scale = COUNTS / forward(0.0, 0.0, 0.0, geometry).sum() * true.intensity[full]
        options = {"scale": scale, "background": BACKGROUND}
        alone.append(list(cramer_rao(*values, geometry, **options).values())[:3])
        covariance = np.linalg.inv(fisher_information(*values, geometry, **options))
        together = together + np.linalg.inv(covariance[:, :3, :3])
    bound = np.sqrt(np.diagonal(np.linalg.inv(together), axis1=1, axis2=2))
    for a, name in enumerate(FIELDS):
        sigma = maps[f"{name}_sigma"].to_numpy()[full]
        best = np.nanmin(scans[f"{name}_sigma"].to_numpy()[:, full], axis=0)
        predicted = bound[:, a] / np.min([single[a] for single in alone], axis=0)
        assert np.median(sigma / best) == pytest.approx(np.median(predicted), rel=0.1)
        expected = maps[f"{name}_sigma_expected"].to_numpy()[full]
        np.testing.assert_allclose(np.median(sigma / expected), 1, atol=0.05)
        error = maps[name].to_numpy()[full] - values[a]
        assert np.sqrt(np.mean((error / sigma) ** 2)) < 1.25  # of some 130 points


def test_points_that_only_some_scans_have_are_fitted_from_these(series):
    maps = series.combined.maps
    assert set(np.unique(maps.scans_used)) == {1, 2, 3}
    assert (maps.flags == 0).mean() > 0.97
    few, many = (maps.omega_sigma.where(maps.scans_used == n).median() for n in (1, 3))
    assert many < 0.8 * few


def test_the_derived_run_is_valid_and_says_what_it_is_made_of(series):
    documents = series.combined.documents
    for name, doc in documents:
        schema_validators[DocumentNames[name]].validate(doc)
    start, stop = documents[0][1], documents[-1][1]
    uids = [run[0][1]["uid"] for run in series.runs]
    assert start["original_run_uid"] == uids[0]
    assert start["nanobeam"]["analyzer"]["runs"] == uids
    assert stop["num_events"] == {"primary": SHAPE[0] * SHAPE[1]}
    np.testing.assert_array_equal(to_maps(documents).strain, series.combined.maps.strain)


def test_the_figure_shows_drift_maps_and_how_sigma_shrinks(series):
    figure = plot_combination(series.combined.maps, series.combined.scans, ["chi"])
    titles = [ax.get_title() for ax in figure.axes]
    assert "Drift (scan: Δθ)" in titles
    assert "How σ of tilt χ shrinks" in titles


def test_a_drift_that_is_known_is_taken_as_it_is(series):
    found = combine(series.runs[:2], drift=[(1.0, 1.0), (3.0, -1.0)])
    assert found.scans.drift_row.values.tolist() == [0, 2]
    assert found.scans.drift_col.values.tolist() == [0, -2]
    assert at(found.maps) == pytest.approx((0, 0), abs=1e-9)


def test_a_scan_of_another_place_is_told_of_and_not_used(tmp_path, series):
    other = fly(tmp_path, (400.0, -300.0), BASE, 9)
    with pytest.raises(ValueError, match=r"no drift is beyond doubt .* give drift = \[\(0, 0\)"):
        combine([series.runs[0], other])
    found = combine([*series.runs, other])
    assert found.scans.used.values.tolist() == [True, True, True, False]
    assert found.maps.scans_used.max() == 3


def changed(run, **start):
    name, doc = run[0]
    block = {**doc["nanobeam"], **start.pop("nanobeam", {})}
    return [(name, {**doc, "nanobeam": block, **start}), *run[1:]]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"nanobeam": {"reflection_l": 1}}, r"run \w{8}: d_spacing_angstrom = 4.013, but 2.00"),
        ({"nanobeam": {"thickness_nm": 20}}, r"run \w{8}: thickness_nm = 20, but 11.7 in run"),
        ({"sample": "chip"}, r"run \w{8}: sample = 'chip', but 'film' in run"),
        ({"shape": [18, 16]}, r"run \w{8}: shape = \[18, 16\], but \[16, 18\] in run"),
        ({"original_run_uid": "x"}, r"run \w{8}: no preset matches: .* a derived run"),
    ],
)
def test_scans_that_do_not_belong_together_are_refused(series, start, message):
    with pytest.raises(ValueError, match=message):
        combine([series.runs[0], changed(series.runs[1], **start)])


def test_one_scan_alone_or_twice_is_refused(series):
    with pytest.raises(ValueError, match="1 run: expected two or more"):
        combine(series.runs[:1])
    with pytest.raises(ValueError, match="is named twice"):
        combine([series.runs[0], series.runs[0]])


def test_the_command_finds_runs_in_a_catalogue_and_puts_the_derived_run_there(series, tmp_path):
    catalog = open_catalog(tmp_path / "runs")
    for run in series.runs[:2]:
        write = raw_writer(catalog["raw"])
        for name, doc in run:
            write(name, doc)
    uids = [run[0][1]["uid"] for run in series.runs[:2]]
    out = tmp_path / "out"
    arguments = ["combine", uids[0][:8], uids[1], "--catalog", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "σ of strain" in result.output
    assert (out / "combined.png").stat().st_size > 50_000
    (derived,) = catalog["derived"].values()
    assert derived.metadata["start"]["original_run_uid"] == uids[0]
    maps = to_maps(derived)
    assert (maps.flags & Flag.FRAME_MISSING == 0).all()
    rows = (out / "combined.csv").read_text().splitlines()
    assert len(rows) > SHAPE[0] * SHAPE[1]
    catalog.context.close()
