from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from nanobeam_bluesky.models.networks import ARCHITECTURES, NanobeamNN, SeparableNet


def test_published_network_has_the_published_parameters_in_order():
    shapes = [tuple(p.shape) for p in NanobeamNN((64, 64)).parameters()]
    channels = [1, 2, 4, 8, 16, 32, 64]
    expected = []
    for inputs, outputs in pairwise(channels):
        expected += [(outputs, inputs, 3, 3), (outputs,)]
    assert shapes == [*expected, (3, 1024), (3,)]
    assert sum(np.prod(shape) for shape in shapes) == 27_771


def test_published_network_returns_physical_units():
    network = NanobeamNN((64, 64))
    with torch.no_grad():
        network.fc1.weight.zero_()
        network.fc1.bias.fill_(1)  # labels: strain × 100, ω × 10, χ × 5
        found = network(torch.ones(1, 1, 64, 64))
    np.testing.assert_allclose(found.numpy(), [[0.01, 0.1, 0.2]], rtol=1e-6)


def test_thickness_is_a_fourth_output_around_the_nominal_one():
    network = NanobeamNN((64, 64), thickness_nm=50.0)
    assert [tuple(p.shape) for p in network.parameters()][-2:] == [(4, 1024), (4,)]
    with torch.no_grad():
        network.fc1.weight.zero_()
        network.fc1.bias.fill_(0.5)  # labels: strain × 100, ω × 10, χ × 5, thickness 20 % off
        found = network(torch.ones(1, 1, 64, 64))
    np.testing.assert_allclose(found.numpy(), [[0.005, 0.05, 0.1, 60.0]], rtol=1e-6)


def test_published_network_refuses_patterns_that_it_would_pool_to_nothing():
    with pytest.raises(ValueError, match=r"\(36, 35\).*36×36.*SeparableNet"):
        NanobeamNN((36, 35))


@pytest.mark.parametrize("shape", [(64, 64), (37, 80)])
@pytest.mark.parametrize("n", [0, 1, 31, 64, 70])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_network_equals_plain_torch(shape, n, threads):
    torch.manual_seed(n)
    network = NanobeamNN(shape).eval()
    plain = nn.Sequential(*network.operation, nn.Flatten(), network.fc1)
    counts = torch.poisson(4 * torch.rand(n, 1, *shape))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            labels = network(counts) * network.label_scale
            assert labels.shape == (n, 3)
            np.testing.assert_allclose(labels, plain(counts), rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_compiled_network_follows_its_weights_and_leaves_gradients_to_torch():
    network = NanobeamNN((40, 40))
    counts = torch.ones(3, 1, 40, 40)
    network(counts).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad():
        before = network(counts)
        network.fc1.bias += 1
        after = network(counts)
    np.testing.assert_allclose(after - before, np.tile([0.01, 0.1, 0.2], (3, 1)), atol=1e-6)


def test_compiled_network_does_not_hide_a_pixel_that_is_not_a_number():
    network = NanobeamNN((64, 64))
    counts = torch.ones(2, 1, 64, 64)
    counts[1, 0, 30, 30] = torch.nan
    with torch.inference_mode():
        found = network(counts)
    assert torch.isfinite(found[0]).all()
    assert torch.isnan(found[1]).all()


@pytest.mark.parametrize("name", ["NanobeamNN", "SeparableNet"])
@pytest.mark.parametrize("shape", [(64, 64), (36, 80)])
def test_every_network_takes_rectangular_patterns(name, shape):
    network = ARCHITECTURES[name](shape)
    assert network(torch.ones(2, 1, *shape)).shape == (2, 3)
    network = ARCHITECTURES[name](shape, thickness_nm=20.0)
    with torch.no_grad():
        compiled = network(torch.ones(2, 1, *shape))
    assert compiled.shape == (2, 4)
    np.testing.assert_allclose(compiled, network(torch.ones(2, 1, *shape)).detach(), atol=1e-5)


def test_network_with_error_bars_does_not_tell_the_thickness():
    assert ARCHITECTURES["ReducedNet"]((36, 80))(torch.ones(2, 1, 36, 80)).shape == (2, 6)
    with pytest.raises(ValueError, match="does not tell the thickness; train SeparableNet"):
        ARCHITECTURES["ReducedNet"]((36, 80), thickness_nm=20.0)


def test_separable_network_takes_the_smallest_pattern_and_an_empty_one():
    network = SeparableNet((8, 8))
    network.fit_features(torch.rand(50, 8, 8), torch.ones(3))
    assert torch.isfinite(network(torch.zeros(1, 1, 8, 8))).all()


def test_default_network_does_not_depend_on_the_intensity(geometry, simulate):
    _, counts = simulate(20)
    network = SeparableNet(geometry.pattern_shape)
    network.fit_features(torch.from_numpy(counts), torch.ones(3))
    x = torch.from_numpy(counts)[:, None]
    with torch.inference_mode():
        np.testing.assert_allclose(network(37 * x).numpy(), network(x).numpy(), atol=1e-4)


def test_features_keep_what_patterns_differ_in(geometry, simulate):
    """24×24 numbers of a pattern restore it to 2 % of its variation."""
    _, counts = simulate(400, scale=1e6)
    network = SeparableNet(geometry.pattern_shape)
    network.fit_features(torch.from_numpy(counts), torch.ones(3))
    y = np.sqrt(counts / counts.mean((1, 2), keepdims=True) + 1)
    y = torch.from_numpy(y - y.mean(0))
    kept = network.rows.T @ (network.rows @ y @ network.columns) @ network.columns.T
    assert (y - kept).square().mean() < 0.02 * y.square().mean()
