import numpy as np
import pytest
import torch

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Accuracy, Card, SeparableNet
from nanobeam_bluesky.physics import forward

HALF_RANGES = np.array([0.005, 0.05, 0.1])


@pytest.fixture(scope="session")
def geometry():
    """The published condition on a quarter of its pixels: binned 4×4."""
    published = Geometry.published()
    return published.model_copy(update={"binning": 4, "roi_shape": (128, 128)})


@pytest.fixture
def simulate(geometry):
    """Patterns of random parameters with Poisson noise: parameters (n, 3), counts (n, ny, nx)."""

    def _simulate(n, scale=30.0, seed=0):
        rng = np.random.default_rng(seed)
        truth = rng.uniform(-1, 1, (n, 3)) * HALF_RANGES
        patterns = forward(*truth.T, geometry)
        return truth, rng.poisson(scale * patterns).astype(np.float32)

    return _simulate


@pytest.fixture
def network(geometry):
    torch.manual_seed(0)
    return SeparableNet(geometry.pattern_shape).eval()


@pytest.fixture
def card(geometry):
    def accuracy(counts, rmse):
        errors = {"strain": rmse, "omega": 10 * rmse, "chi": 20 * rmse}
        return Accuracy(counts=counts, rmse=errors, bias=errors, bound=errors)

    return Card(
        fingerprint=geometry.fingerprint(),
        geometry=geometry,
        architecture="SeparableNet",
        ranges={"strain": 0.005, "omega": 0.05, "chi": 0.1},
        training={"seed": 0},
        accuracy=(accuracy(1e3, 4e-4), accuracy(1e5, 4e-5)),
        version="0.1",
        created="2026-01-01T00:00:00+00:00",
    )
