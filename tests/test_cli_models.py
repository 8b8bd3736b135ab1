"""``nanobeam models``: published networks imported, listed, shown, verified and removed."""

import hashlib
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nanobeam_bluesky import Geometry
from nanobeam_bluesky.cli import app, console
from nanobeam_bluesky.models import Analyzer, ModelStore, NanobeamNN
from nanobeam_bluesky.physics import forward

GEOMETRY = Geometry.published().model_copy(update={"thickness_nm": 20.0})


@pytest.fixture(scope="module")
def published_file(tmp_path_factory):
    """State dict of a network that knows `GEOMETRY`: random convolutions, the last layer fitted."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (2000, 3)) * [0.005, 0.05, 0.1]
    patterns = forward(*truth.T, GEOMETRY, sampling="published")
    counts = torch.from_numpy(rng.poisson(7 * patterns).astype(np.float32))
    torch.manual_seed(0)
    network = NanobeamNN((64, 64))
    with torch.inference_mode():
        x = torch.cat([network.operation(part).flatten(1) for part in counts[:, None].split(500)])
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
        labels = torch.from_numpy(truth) * network.label_scale
        ridge = 1e-6 * x.square().mean() * len(x) * torch.eye(x.shape[1])
        weights = torch.linalg.solve(x.T @ x + ridge, x.T @ labels).T
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    state["module.fc1.weight"] = weights[:, :-1].float().clone()
    state["module.fc1.bias"] = weights[:, -1].float().clone()
    path = tmp_path_factory.mktemp("published") / "seed0.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Run ``nanobeam models …``; return what it printed."""
    monkeypatch.setenv("NANOBEAM_HOME", str(tmp_path))
    monkeypatch.setattr(console, "width", 200)
    # measured at all levels it takes three times as long
    monkeypatch.setattr("nanobeam_bluesky.training.published.LEVELS", (1e3, 1e4))

    def run(*arguments, code=0):
        done = CliRunner().invoke(app, ["models", *map(str, arguments)])
        assert done.exit_code == code, done.output
        return done.output

    return run


@pytest.fixture
def start(tmp_path):
    """Write a start document; return its path."""

    def write(geometry):
        block = geometry.model_dump(mode="json", exclude_none=True)
        path = tmp_path / "start.json"
        path.write_text(json.dumps({"uid": "3f2a91c0-1", "nanobeam": block}))
        return path

    return write


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path / "models")


def test_imported_network_is_measured_stored_and_used(models, published_file, start, store):
    text = models("import", published_file, "--start", start(GEOMETRY))
    assert GEOMETRY.fingerprint() in text
    card = store.verify(GEOMETRY.fingerprint())
    assert card.architecture == "NanobeamNN"
    assert card.training["source"] == "seed0.pth"
    digest = hashlib.sha256(published_file.read_bytes()).hexdigest()
    assert card.training["source_sha256"] == digest
    levels = [level.counts for level in card.accuracy]
    assert levels == pytest.approx([1e3, card.training["counts"][0], 1e4], rel=1e-3)
    (own,) = (
        a for a in card.accuracy if a.counts == pytest.approx(card.training["counts"][0], 1e-3)
    )
    assert own.rmse["omega"] < 0.015  # a constant answer: 0.029
    pattern = forward([0.001], [0.02], [0.03], GEOMETRY, sampling="published")
    analyzer = Analyzer.for_geometry(GEOMETRY, method="network", store=store)
    found = analyzer.process(7 * pattern)
    assert abs(found.omega[0] - 0.02) < 3 * own.rmse["omega"]

    assert "--replace" in models("import", published_file, "--start", start(GEOMETRY), code=1)
    before = card.created, card.sha256
    models("import", published_file, "--start", start(GEOMETRY), "--replace")
    after = store.verify(GEOMETRY.fingerprint())
    assert before[0] <= after.created
    assert before[1] == after.sha256

    listed = models("list")
    assert GEOMETRY.fingerprint() in listed
    shown = models("show", GEOMETRY.fingerprint()[:8])
    assert digest in shown
    assert "Cramér-Rao bound" in shown
    models("remove", GEOMETRY.fingerprint()[:8])
    assert list(store.root.iterdir()) == []


def test_network_of_another_geometry_is_refused_and_not_stored(
    models, published_file, start, store
):
    other = GEOMETRY.model_copy(update={"detector_distance_m": 1.6})
    text = models("import", published_file, "--start", start(other), code=1)
    assert "trained for another geometry" in text
    smaller = GEOMETRY.model_copy(update={"roi_shape": (112, 128)})
    text = models("import", published_file, "--start", start(smaller), code=1)
    assert "another pattern shape" in text
    assert not store.root.exists()


def test_verify_goes_on_after_a_bad_network(models, published_file, start, store):
    models("import", published_file, "--start", start(GEOMETRY))
    sound = GEOMETRY.fingerprint()
    for name in ("00aa", "zz"):
        (store.root / f"{name}.json").write_text("{}")
    text = models("verify", code=1)
    assert "00aa: bad" in text
    assert "zz: bad" in text
    assert f"{sound}: sound" in text
    assert "unreadable" in models("list")
    assert "not a model card" in models("show", "00aa", code=1)
    models("remove", "00aa")
    models("verify", sound[:5])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["import", "a.pth"], 2, "give either --start"),
        (["import", "a.pth", "--geometry", "missing.toml"], 2, "missing.toml"),
        (["show", "ffff"], 1, "no network"),
        (["verify", "ffff"], 1, "no network"),
        (["remove", "ffff"], 1, "no network"),
        (["show", "../../x"], 2, "hex digits"),
        (["verify", "../../x"], 2, "hex digits"),
        (["remove", "../../x"], 2, "hex digits"),
    ],
)
def test_what_cannot_be_done_is_said(models, arguments, code, words):
    assert words in models(*arguments, code=code)
