import importlib
import operator
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from nanobeam_bluesky.models import ModelRefusedError, NanobeamNN
from nanobeam_bluesky.models.published import read_published

SHAPE = (36, 36)
SCRIPT = """
import sys, torch
from torch import nn

class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 3)  # listed before the convolutions
        self.features = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))

torch.manual_seed(3)
model = CNN()
counts = torch.poisson(4 * torch.rand(8, 1, 36, 36))
folder = sys.argv[1]
torch.save({"counts": counts, "labels": model(counts).detach()}, folder + "/expected.pt")
torch.save(model, folder + "/module.pth")
torch.save(model, folder + "/module4.pth", pickle_protocol=4)
torch.save(nn.DataParallel(model), folder + "/parallel.pth")
torch.save(model.state_dict(), folder + "/state.pth")
torch.save(nn.DataParallel(model).state_dict(), folder + "/parallel_state.pth")
torch.save(model.double(), folder + "/double.pth")
torch.save(model.float(), folder + "/legacy.pth", _use_new_zipfile_serialization=False)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with files as the published ones: written where CNN is a class of __main__."""
    folder = tmp_path_factory.mktemp("published")
    subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], check=True)
    return folder


def sequence():
    """Layers of the published network for `SHAPE`, without its class."""
    network = NanobeamNN(SHAPE)
    return nn.Sequential(network.operation, nn.Flatten(), network.fc1)


def save(path, thing):
    torch.save(thing, path)
    return path


def with_record(source, target, name, content):
    """Copy a file of torch.save with another content of one record."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            found = info.filename.partition("/")[2] == name
            new.writestr(info.filename, content if found else old.read(info))
    return target


@pytest.mark.parametrize(
    "name", ["module", "module4", "parallel", "state", "parallel_state", "double"]
)
def test_published_file_gives_the_labels_of_its_own_network(saved, name):
    network, sha256 = read_published(saved / f"{name}.pth", SHAPE)
    expected = torch.load(saved / "expected.pt", weights_only=True)
    with torch.inference_mode():
        labels = network(expected["counts"]) * network.label_scale
    np.testing.assert_allclose(labels, expected["labels"], atol=1e-5)
    assert not network.training
    assert len(sha256) == 64


def test_file_before_zip_is_refused_with_what_to_do(saved):
    with pytest.raises(ModelRefusedError, match=r"legacy\.pth.*before 1\.6.*state_dict"):
        read_published(saved / "legacy.pth", SHAPE)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelRefusedError, match="No such file"):
        read_published(tmp_path / "none.pth", SHAPE)


@pytest.mark.parametrize("shape", [(64, 64), (36, 52)])
def test_network_for_another_pattern_shape_is_refused(saved, shape):
    with pytest.raises(ModelRefusedError, match=r"another pattern shape: .* takes 64 numbers"):
        read_published(saved / "module.pth", shape)


def test_pattern_too_small_for_the_network_is_refused(saved):
    with pytest.raises(ModelRefusedError, match="36×36"):
        read_published(saved / "module.pth", (16, 16))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layers: layers[0].pop(10), "12 weights and biases"),
        (lambda layers: layers[0].append(nn.Conv2d(64, 64, 1)), "16 weights and biases"),
        (lambda layers: layers[0].__setitem__(0, nn.Conv2d(1, 2, 5)), "2×1×5×5"),
        (lambda layers: layers[0].__setitem__(0, nn.Conv2d(1, 2, 3, padding=1)), "0.padding is"),
        (lambda layers: layers[0].__setitem__(2, nn.Conv2d(2, 4, 3, stride=2)), "2.stride is"),
        (lambda layers: layers[0].__setitem__(2, nn.Conv2d(2, 4, 3, bias=False)), "13 weights"),
        (lambda layers: layers.__setitem__(2, nn.Linear(64, 4)), "4×64"),
        (lambda layers: layers[0].__setitem__(1, nn.Tanh()), r"activation\.Tanh"),
        (lambda layers: layers[0].__setitem__(1, nn.BatchNorm2d(2)), r"batchnorm\.BatchNorm2d"),
    ],
)
def test_another_architecture_is_refused(tmp_path, change, reason):
    layers = sequence()
    change(layers)
    with pytest.raises(ModelRefusedError, match=reason):
        read_published(save(tmp_path / "a.pth", layers), SHAPE)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    layers = sequence()
    with torch.no_grad():
        layers[0][0].weight[0, 0, 1, 1] = value
    with pytest.raises(ModelRefusedError, match="not finite"):
        read_published(save(tmp_path / "a.pth", layers.state_dict()), SHAPE)


@pytest.mark.parametrize(
    ("thing", "reason"),
    [
        ({"state_dict": {}}, "not a state dict: entry 'state_dict'"),
        ({"epoch": 3}, "not a state dict"),
        ([1, 2], "neither a state dict nor a module"),
        ({}, "0 weights"),
        ({"a": torch.arange(3)}, "LongStorage"),
        ({"a": torch.zeros(1).expand(2**40)}, "larger tensors"),
        (OrderedDict(a=torch.zeros(0)), "empty"),
    ],
    ids=str,
)
def test_what_is_no_network_is_refused(tmp_path, thing, reason):
    with pytest.raises(ModelRefusedError, match=reason):
        read_published(save(tmp_path / "a.pth", thing), SHAPE)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_truncated_file_is_refused(saved, tmp_path, share):
    content = (saved / "module.pth").read_bytes()
    path = tmp_path / "a.pth"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelRefusedError, match="truncated"):
        read_published(path, SHAPE)


def test_truncated_or_missing_storage_is_refused(saved, tmp_path):
    path = with_record(saved / "state.pth", tmp_path / "a.pth", "data/0", b"\0" * 8)
    with pytest.raises(ModelRefusedError, match=r"storage '0' has 2 numbers.*truncated"):
        read_published(path, SHAPE)
    with zipfile.ZipFile(saved / "state.pth") as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith("data/0"):
                new.writestr(info.filename, old.read(info))
    with pytest.raises(ModelRefusedError, match="damaged: KeyError"):
        read_published(path, SHAPE)


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def touching(target):
    """Pickles that make a file at `target` when they are loaded, by what the reader must name."""
    shell, python = f"touch {target}", f"open({str(target)!r}, 'w').close()"
    system = Call(getattr, Call(importlib.import_module, "os"), "system")
    return {
        "system": pickle.dumps(Call(os.system, shell), 2),
        "eval": pickle.dumps(Call(eval, python), 2),
        "exec": pickle.dumps(Call(exec, python), 4),
        "getattr": pickle.dumps(Call(operator.call, system, shell), 4),
        "Popen": pickle.dumps(Call(subprocess.Popen, ["touch", str(target)]), 2),
        "load": pickle.dumps(Call(torch.load, str(target)), 2),
        "S": f"cos\nsystem\n(S'{shell}'\ntR.".encode(),
        "INST": f"(V{shell}\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nV{shell}\no.".encode(),
    }


def test_hostile_pickles_would_run_if_they_were_loaded(tmp_path):
    """The next test proves nothing without this one."""
    target = tmp_path / "touched"
    for name in ("system", "eval", "exec", "getattr", "S", "INST", "OBJ"):
        pickle.loads(touching(target)[name])
        assert target.exists(), name
        target.unlink()


@pytest.mark.parametrize("name", touching(""))
def test_hostile_file_is_refused_and_nothing_of_it_runs(saved, tmp_path, name):
    target = tmp_path / "touched"
    content = touching(target)[name]
    path = with_record(saved / "module.pth", tmp_path / "a.pth", "data.pkl", content)
    with pytest.raises(ModelRefusedError, match=r"nothing was executed|the instruction"):
        read_published(path, SHAPE)
    path.write_bytes(content)
    with pytest.raises(ModelRefusedError, match="not a file of torch"):
        read_published(path, SHAPE)
    assert not target.exists()


def test_hostile_part_behind_a_good_network_is_refused(saved, tmp_path):
    target = tmp_path / "touched"
    state = torch.load(saved / "state.pth", weights_only=True)
    state["extra"] = Call(os.system, f"touch {target}")
    with pytest.raises(ModelRefusedError, match="system"):
        read_published(save(tmp_path / "a.pth", state), SHAPE)
    layers = sequence()
    layers[0][0].register_forward_hook(print)
    with pytest.raises(ModelRefusedError, match="print"):
        read_published(save(tmp_path / "b.pth", layers), SHAPE)
    assert not target.exists()


def bombs():
    """Small pickles that would take memory or time without end."""
    tuples = b"\x80\x02)" + b"".join(b"q\x00h\x00\x86" for _ in range(60))
    modules = b"\x80\x02c__main__\nCNN\n)\x81"
    doubled = b"".join(
        b"q\x00c__main__\nCNN\n)\x81}X\x08\0\0\0_modules}(X\x01\0\0\0ah\x00X\x01\0\0\0bh\x00usb"
        for _ in range(60)
    )
    return {
        "huge text": b"\x80\x02X\xff\xff\xff\x7fa.",
        "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        "huge memo index": b"\x80\x02)r\xff\xff\xff\xff.",
        "tuples of tuples": tuples + b".",
        "tuple of tuples as a key": b"\x80\x02" + tuples[2:] + b"}q\x01h\x00Ns.",
        "modules of modules": modules + doubled + b".",
        "module in itself": modules + b"q\x00}X\x08\0\0\0_modules}X\x01\0\0\0ah\x00ssb.",
    }


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", bombs())
def test_small_pickle_that_asks_for_much_is_refused(saved, tmp_path, name):
    content = bombs()[name]
    path = with_record(saved / "module.pth", tmp_path / "a.pth", "data.pkl", content)
    with pytest.raises(ModelRefusedError):
        read_published(path, SHAPE)


def test_compressed_record_is_refused(saved, tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(ModelRefusedError, match="compressed"):
        read_published(path, SHAPE)


def test_large_file_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ModelRefusedError, match="larger than"):
        read_published(path, SHAPE)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=8))
@example(changes=[(3, 92)])
def test_altered_pickle_gives_a_network_or_is_refused(saved, tmp_path, changes):
    with zipfile.ZipFile(saved / "module.pth") as archive:
        content = bytearray(archive.read("module/data.pkl"))
    for position, value in changes:
        content[position % len(content)] = value
    path = with_record(saved / "module.pth", tmp_path / "a.pth", "data.pkl", bytes(content))
    try:
        network, _ = read_published(path, SHAPE)
    except ModelRefusedError:
        return
    assert all(torch.isfinite(p).all() for p in network.parameters())


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(saved, tmp_path, content):
    path = with_record(saved / "module.pth", tmp_path / "a.pth", "data.pkl", content)
    with pytest.raises(ModelRefusedError):
        read_published(path, SHAPE)
