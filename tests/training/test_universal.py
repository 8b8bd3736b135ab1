"""Training of the shipped network, a few steps of it."""

import json

import numpy as np
from safetensors.torch import load_file

from nanobeam_bluesky.models.universal import UniversalNet
from nanobeam_bluesky.training.universal import train_universal


def test_training_goes_on_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("nanobeam_bluesky.training.universal._TRIED", 2)
    monkeypatch.setattr("nanobeam_bluesky.training.universal._BATCH", (8, 16))
    (before,) = train_universal(tmp_path, steps=2, geometries=8)
    early = load_file(tmp_path / "checkpoint.safetensors")
    (after,) = train_universal(tmp_path, steps=3, geometries=8)
    assert (before["step"], after["step"]) == (2, 3)
    assert after["seconds"] >= before["seconds"]
    late = load_file(tmp_path / "checkpoint.safetensors")
    name = "network.first.patches.weight"
    moved = (late[name] - early[name]).abs().max()
    assert 0 < moved < 0.01  # one step from there, not a new beginning
    weights = load_file(tmp_path / "weights.safetensors")
    UniversalNet().load_state_dict(weights)
    assert np.isfinite([float(w.sum()) for w in weights.values()]).all()
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["steps"] == 3
    assert all(len(errors) == 3 for errors in card["error_over_bound"].values())
