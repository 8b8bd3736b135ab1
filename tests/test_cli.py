"""The command line, run as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nanobeam_bluesky import Geometry, to_maps
from nanobeam_bluesky.models import ModelStore

ROOT = Path(__file__).parents[1]


def run(*arguments, home, code=0):
    """Run a Python program in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"NANOBEAM_HOME": str(home), "COLUMNS": "200", "MPLBACKEND": "Agg"},
        timeout=110,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def nanobeam(*arguments, **options):
    return run("-m", "nanobeam_bluesky.cli", *arguments, **options)


def start_document(**changes):
    block = Geometry.published().model_dump(mode="json", exclude_none=True)
    return {"uid": "3f2a91c0-1", "nanobeam": block | changes}


def test_the_demo_maps_records_and_draws(tmp_path):
    from nanobeam_bluesky.tiled_adapters import open_catalog

    out = tmp_path / "demo"
    text = nanobeam("demo", "--shape", "8", "12", "--out", out, "--phantom", "film", home=tmp_path)
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
        (["train"], "give either --start start.json or --geometry film.toml"),
        (["train", "--geometry", "missing.toml"], "missing.toml"),
    ],
)
def test_wrong_usage_ends_with_2_and_the_reason(arguments, words, tmp_path):
    assert words in nanobeam(*arguments, home=tmp_path, code=2)


def test_train_stores_the_network_of_a_start_document(tmp_path):
    document = start_document(thickness_nm=20.0)
    (tmp_path / "start.json").write_text(json.dumps(document))
    path = tmp_path / "start.json"
    text = nanobeam("train", "--start", path, "--seconds", "5", home=tmp_path)
    geometry = Geometry.from_start(document)
    assert geometry.fingerprint() in text
    _, card = ModelStore(tmp_path / "models").load(geometry)
    assert card.geometry == geometry


def test_train_refuses_an_impossible_geometry(tmp_path):
    (tmp_path / "film.toml").write_text(
        "energy_keV = 2.0\ndetector_distance_m = 0.85\npixel_size_um = 55\n"
        "roi_shape = [128, 128]\nbragg_center_px = [256.0, 256.0]\n"
        "lattice_c_angstrom = 4.013\nreflection_l = 2\nthickness_nm = 11.7\n"
        '[optics]\nkind = "zone_plate"\ndiameter_um = 149\nfocal_length_mm = 21.874\n'
    )
    text = nanobeam("train", "--geometry", tmp_path / "film.toml", home=tmp_path, code=2)
    assert "film.toml: reflection not reachable" in text


@pytest.mark.parametrize("name", ["live_scan", "train_from_run"])
def test_the_examples_run(name, tmp_path):
    script = ROOT / "examples" / f"{name}.py"
    seconds = ["--seconds", "5"] if name == "train_from_run" else []
    text = run(script, *seconds, home=tmp_path)
    assert {"live_scan": "points_analysed=768", "train_from_run": "stored for geometry"}[
        name
    ] in text
