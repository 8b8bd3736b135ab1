import json

import numpy as np
import pytest
import torch

from nanobeam_bluesky.models import ModelNotFoundError, ModelRefusedError, ModelStore, SeparableNet


@pytest.fixture
def store(tmp_path, network, card):
    store = ModelStore(tmp_path)
    store.save(network, card)
    return store


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_stored_network_gives_the_same_answers(store, network, geometry, simulate):
    _, counts = simulate(4)
    loaded, card = store.load(geometry)
    x = torch.from_numpy(counts)[:, None]
    with torch.inference_mode():
        np.testing.assert_array_equal(loaded(x).numpy(), network(x).numpy())
    assert not loaded.training
    assert card.geometry == geometry


def test_network_is_found_where_only_the_place_of_the_roi_differs(store, geometry):
    moved = geometry.model_copy(update={"bragg_center_px": (260.0, 250.0)})
    assert store.load(moved)[1].fingerprint == geometry.fingerprint()


def test_missing_network_says_where_it_looked_and_what_to_do(tmp_path, geometry):
    with pytest.raises(ModelNotFoundError, match=rf"{tmp_path}.*nanobeam train"):
        ModelStore(tmp_path).load(geometry)


def test_truncated_weights_are_refused(store, geometry):
    path = store.root / f"{geometry.fingerprint()}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelRefusedError, match="altered or truncated"):
        store.load(geometry)


def test_altered_weights_are_refused(store, geometry):
    path = store.root / f"{geometry.fingerprint()}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelRefusedError, match="altered or truncated"):
        store.load(geometry)


def test_missing_weights_are_refused(store, geometry):
    (store.root / f"{geometry.fingerprint()}.safetensors").unlink()
    with pytest.raises(ModelRefusedError, match="safetensors"):
        store.load(geometry)


def test_network_of_another_geometry_is_refused(store, geometry):
    other = geometry.model_copy(update={"thickness_nm": 20.0})
    for suffix in (".json", ".safetensors"):
        path = store.root / f"{geometry.fingerprint()}{suffix}"
        path.rename(store.root / f"{other.fingerprint()}{suffix}")
    with pytest.raises(ModelRefusedError, match=f"describes geometry {geometry.fingerprint()}"):
        store.load(other)


def test_unknown_architecture_is_refused(store, geometry):
    edit(store.root / f"{geometry.fingerprint()}.json", architecture="Transformer")
    with pytest.raises(ModelRefusedError, match=r"'Transformer'.*SeparableNet"):
        store.load(geometry)


def test_weights_of_another_architecture_are_refused(store, geometry):
    smaller = geometry.model_copy(update={"roi_shape": (64, 64)})
    card = store.load(geometry)[1]
    store.save(
        SeparableNet(geometry.pattern_shape),
        card.model_copy(update={"geometry": smaller, "fingerprint": smaller.fingerprint()}),
    )
    with pytest.raises(
        ModelRefusedError, match=r"not weights of SeparableNet for patterns of \(16, 16\)"
    ):
        store.load(smaller)


def test_network_with_a_thickness_comes_back_with_it_and_takes_the_place_of_one_without(
    store, geometry, card, simulate
):
    network = SeparableNet(geometry.pattern_shape, thickness_nm=geometry.thickness_nm).eval()
    store.save(network, card.model_copy(update={"ranges": card.ranges | {"thickness": 2.0}}))
    loaded, found = store.load(geometry)
    x = torch.from_numpy(simulate(3)[1])[:, None]
    with torch.inference_mode():
        np.testing.assert_array_equal(loaded(x).numpy(), network(x).numpy())
    assert loaded(x).shape == (3, 4)
    assert found.ranges["thickness"] == 2.0


def test_card_and_weights_must_agree_on_the_thickness(store, geometry, card):
    path = store.root / f"{geometry.fingerprint()}.json"
    edit(path, ranges=card.ranges | {"thickness": 2.0})
    with pytest.raises(ModelRefusedError, match=r"not weights of SeparableNet.*'thickness'"):
        store.load(geometry)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"geometry": 1}'])
def test_damaged_card_is_refused(store, geometry, content):
    (store.root / f"{geometry.fingerprint()}.json").write_text(content)
    with pytest.raises(ModelRefusedError, match="not a model card"):
        store.load(geometry)


def test_saving_again_replaces_and_leaves_nothing_behind(store, geometry, card):
    torch.manual_seed(1)
    saved = store.save(SeparableNet(geometry.pattern_shape), card)
    assert store.load(geometry)[1].sha256 == saved.sha256
    assert len(list(store.root.iterdir())) == 2


def test_home_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOBEAM_HOME", str(tmp_path))
    assert ModelStore().root == tmp_path / "models"


def test_fingerprint_may_be_shortened_while_it_is_unique(store, geometry):
    fingerprint = geometry.fingerprint()
    assert store.find(fingerprint[:6]) == fingerprint
    other = "0" if fingerprint[0] != "0" else "1"
    with pytest.raises(ModelNotFoundError, match=f"{other * 9} is the beginning of no network"):
        store.find(other * 9)
    twin = store.root / f"{fingerprint[:-1]}{'0' if fingerprint[-1] != '0' else '1'}.json"
    twin.write_text("{}")
    with pytest.raises(ModelNotFoundError, match=f"several.*{fingerprint}"):
        store.find(fingerprint[:6])


@pytest.mark.parametrize("prefix", ["", "../../etc/passwd", "ABC", "*", "a b"])
def test_fingerprint_is_made_of_hex_digits(store, prefix):
    with pytest.raises(ValueError, match="hex digits"):
        store.find(prefix)


def test_removing_never_leaves_the_folder(store, tmp_path):
    outside = tmp_path.parent / "outside.json"
    outside.write_text("{}")
    with pytest.raises(ModelNotFoundError):
        store.remove("../outside")
    assert outside.exists()


def test_verify_finds_an_altered_network_and_one_under_another_name(store, geometry):
    path = store.root / f"{geometry.fingerprint()}.json"
    assert store.verify(geometry.fingerprint()).geometry == geometry
    path.rename(path.with_stem("0123456789abcdef"))
    with pytest.raises(ModelRefusedError, match="expected 0123456789abcdef"):
        store.verify("0123456789abcdef")
    path.with_stem("0123456789abcdef").rename(path)
    path.with_suffix(".safetensors").write_bytes(b"")
    with pytest.raises(ModelRefusedError, match="altered or truncated"):
        store.verify(geometry.fingerprint())
