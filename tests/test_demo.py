"""The demo, in one process."""

import io

import numpy as np
from rich.console import Console

from nanobeam_bluesky import to_maps
from nanobeam_bluesky.demo import run_demo
from nanobeam_bluesky.tiled_adapters import open_catalog


def test_a_geometry_never_seen_is_mapped_with_no_preparation(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOBEAM_HOME", str(tmp_path / "home"))
    text = io.StringIO()
    console = Console(file=text, width=200)
    assert run_demo((6, 8), 6000, "figure3", tmp_path, console, random_seed=3)
    for words in ("7.13 keV", "mirrors", "35.5 nm", "pattern of 56 × 32", "to first values"):
        assert words in text.getvalue()
    run = open_catalog(tmp_path)["derived"].values().last()
    assert run.metadata["start"]["nanobeam"]["analyzer"]["start"] == "universal"
    maps = to_maps(run)
    assert (maps["flags"] == 0).mean() > 0.9
    sigma = maps["strain_sigma"]
    assert float((sigma / abs(maps["strain"]).max()).median()) < 0.1  # a map, not noise
    assert np.isfinite(maps["omega"]).mean() > 0.9
