"""The command line, run as a user would."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

from nanobeam_bluesky import Geometry, to_maps
from nanobeam_bluesky.cli import app, console
from nanobeam_bluesky.models import ModelStore
from nanobeam_bluesky.physics import forward

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def nanobeam(monkeypatch, tmp_path):
    """Run the command in this process; return what it printed."""
    monkeypatch.setenv("NANOBEAM_HOME", str(tmp_path))
    monkeypatch.setattr(console, "width", 200)

    def run(*arguments, code=0):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == code, done.output
        return done.output

    return run


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Run one of the examples in this process; return what it printed."""
    monkeypatch.setenv("NANOBEAM_HOME", str(tmp_path))

    def run(name, *arguments):
        script = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def start_document(**changes):
    block = Geometry.published().model_dump(mode="json", exclude_none=True)
    return {"uid": "3f2a91c0-1", "nanobeam": block | changes}


def test_the_demo_maps_records_and_draws(nanobeam, tmp_path):
    from nanobeam_bluesky.tiled_adapters import open_catalog

    out = tmp_path / "demo"
    text = nanobeam("demo", "--shape", "8", "12", "--out", out, "--phantom", "film")
    for words in ("96", "points/s", "µs a document", "Cramér–Rao bound", str(out)):
        assert words in text
    image = matplotlib.image.imread(out / "demo.png")
    assert image.std() > 0.1
    client = open_catalog(out)
    maps = to_maps(client["derived"].values().last())
    assert maps.sizes == {"row": 8, "col": 12}
    assert np.isfinite(maps["strain"]).sum() > 48
    raw = client["raw"].values().last()
    assert maps.attrs["original_run_uid"] == raw.metadata["start"]["uid"]
    frames = raw["primary"]["sxdm_image"].read()
    assert frames.shape[-2:] == (512, 512)
    counts = frames.reshape(96, 512, 512)[:, 192:320, 192:320].sum(axis=(1, 2))
    row, col = np.divmod(np.arange(96), 12)
    col = np.where(row % 2, 11 - col, col)
    np.testing.assert_array_equal(maps["counts"].to_numpy()[row, col], counts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--phantom", "moon"], "no phantom 'moon'"),
        (["demo", "--seed", "3"], "--seed is that of --random-geometry, which is missing"),
        (["train"], "give either --start start.json or --geometry film.toml"),
        (["train", "--geometry", "missing.toml"], "missing.toml"),
        (["calibrate", "--frames", "scan.h5"], "give either --start start.json or --geometry"),
    ],
)
def test_wrong_usage_ends_with_2_and_the_reason(nanobeam, arguments, words):
    assert words in nanobeam(*arguments, code=2)


def test_train_specialises_and_stores_the_network_of_a_start_document(nanobeam, tmp_path):
    document = start_document(thickness_nm=20.0)
    (tmp_path / "start.json").write_text(json.dumps(document))
    options = ("--start", tmp_path / "start.json", "--steps", "1", "--counts", "4000", "4000")
    text = nanobeam("train", *options)
    geometry = Geometry.from_start(document)
    assert f"{geometry.fingerprint()}, specialised from the shipped network" in text
    assert "before" in text
    _, card = ModelStore(tmp_path / "models").load(geometry)
    assert card.geometry == geometry


def test_train_with_a_thickness_range_states_its_accuracy_too(nanobeam, tmp_path):
    document = start_document(roi_shape=(64, 64))
    path = tmp_path / "start.json"
    path.write_text(json.dumps(document))
    options = ("--start", path, "--steps", "20", "--counts", "1000", "1000")
    text = nanobeam("train", *options, "--thickness-range", "2")
    assert len([line for line in text.splitlines() if "thickness" in line and " nm" in line]) == 1
    assert "from scratch, because the shipped network does not tell the thickness" in text
    network, card = ModelStore(tmp_path / "models").load(Geometry.from_start(document))
    assert card.ranges["thickness"] == 2
    assert network.middle.tolist() == pytest.approx([0, 0, 0, 11.7])


def test_train_refuses_an_impossible_geometry(nanobeam, tmp_path):
    (tmp_path / "film.toml").write_text(
        "energy_keV = 2.0\ndetector_distance_m = 0.85\npixel_size_um = 55\n"
        "roi_shape = [128, 128]\nbragg_center_px = [256.0, 256.0]\n"
        "lattice_c_angstrom = 4.013\nreflection_l = 2\nthickness_nm = 11.7\n"
        '[optics]\nkind = "zone_plate"\ndiameter_um = 149\nfocal_length_mm = 21.874\n'
    )
    text = nanobeam("train", "--geometry", tmp_path / "film.toml", code=2)
    assert "film.toml: reflection not reachable" in text


@pytest.fixture(scope="module")
def recorded():
    """Geometry and 60 frames of a film that its start document describes badly."""
    published = Geometry.published()
    truth = published.model_copy(
        update={"pupil_blur_px": 0.8, "thickness_nm": 14.0, "orientation": "transpose"}
    )
    rng = np.random.default_rng(0)
    spread = np.array([0.003, 0.02, 0.05])
    patterns = forward(*(rng.uniform(-1, 1, (60, 3)) * spread).T, truth, background=0.02)
    expected = truth.unorient(2 * patterns).repeat(2, axis=1).repeat(2, axis=2)
    frames = rng.poisson(0.02, (60, 512, 512)).astype(np.uint16)
    frames[:, 192:320, 192:320] = rng.poisson(expected)
    frames[:, 200, 201] = 700
    return truth, frames


def test_calibrate_writes_a_geometry_that_is_read_again(nanobeam, recorded, tmp_path):
    truth, frames = recorded
    np.save(tmp_path / "scan.npy", frames)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file.create_dataset("/entry/data/data", data=frames, chunks=(1, 512, 512))
    (tmp_path / "start.json").write_text(json.dumps(start_document()))
    out = tmp_path / "film.toml"

    def calibrate(*options):
        return nanobeam("calibrate", *options, "--rows", "5:60", "--out", out)

    start = "--start", tmp_path / "start.json"
    text = calibrate(*start, "--frames", tmp_path / "scan.h5")
    for words in ("transpose", "thickness, nm", "(4, 4)", "No pattern tells where the Bragg"):
        assert words in text
    read = Geometry.parse(tomllib.loads(out.read_text("utf-8")), where="film.toml")
    assert read.fingerprint() in text
    assert read.orientation == "transpose"
    assert abs(read.thickness_nm - 14) < 0.2
    assert abs(read.pupil_blur_px - 0.8) < 0.05
    assert (200, 201) in read.pixel_mask
    assert read.optics == truth.optics
    assert read.bragg_center_px == truth.bragg_center_px
    again = calibrate("--geometry", out, "--frames", tmp_path / "scan.npy")
    assert "Rows and columns are exchanged" in text
    assert "Rows and columns are exchanged" not in again
    after = Geometry.parse(tomllib.loads(out.read_text("utf-8")), where="film.toml")
    assert after.thickness_nm == pytest.approx(read.thickness_nm, abs=0.02)
    assert after.orientation == "transpose"


def test_calibrate_says_what_is_wrong_with_the_frames(recorded, tmp_path):
    (tmp_path / "start.json").write_text(json.dumps(start_document()))
    np.save(tmp_path / "dark.npy", np.zeros((30, 512, 512), np.uint16))
    np.save(tmp_path / "small.npy", np.zeros((30, 64, 64), np.uint16))
    np.save(tmp_path / "flat.npy", np.zeros(30))
    for frames, rows, words, code in (
        ("dark.npy", "0:30", "0 of 30 patterns", 1),
        ("small.npy", "0:30", "ROI off the detector", 2),
        ("flat.npy", "0:30", "expected frames (n, rows, columns), found float64 (30,)", 2),
        ("dark.npy", "30", "--rows 30: expected two numbers such as 0:500", 2),
        ("none.h5", "0:30", "none.h5: No such file", 1),
        ("none.npy", "0:30", "none.npy", 1),
    ):
        options = ("--start", tmp_path / "start.json", "--frames", tmp_path / frames)
        done = CliRunner().invoke(app, ["calibrate", *map(str, options), "--rows", rows])
        assert done.exit_code == code
        assert words in done.output


def test_the_example_of_a_live_scan_runs(tmp_path):
    """In a process of its own, which its RunEngine and worker must not keep from ending."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "live_scan.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"NANOBEAM_HOME": str(tmp_path)},
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert "points_analysed 768" in done.stdout


def test_the_example_of_a_training_runs(example):
    assert "stored for geometry" in example("train_from_run", "--seconds", "1")


@pytest.mark.timeout(300)
def test_the_paper_is_regenerated(example, tmp_path):
    out = tmp_path / "paper"
    example("reproduce_paper", "--quick", "--out", out)
    page = (out / "README.md").read_text()
    figures = re.findall(r"\]\((figure-.+?\.png)\)", page)
    assert len(figures) == 5
    for figure in figures:
        assert matplotlib.image.imread(out / figure).std() > 0.1

    def errors(what):
        values = re.search(rf"^\| {what}[^|]*\|[^|]*\|([^|;]+)", page, re.MULTILINE)[1]
        return np.array([float(value.rstrip("° ")) for value in values.split("/")])

    coarse, network, refined, bound = (
        errors(f"4300 counts: {name}")
        for name in ("correlation fit", "network", "refined", "Cramér–Rao bound")
    )
    assert (refined < 1.3 * bound).all()
    assert (network < 5 * bound).all()
    assert (coarse > 5 * network).all()
    assert (errors("thickness off by 30 %: refined, thickness fitted") < 1.5 * bound).all()
