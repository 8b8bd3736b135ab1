import pytest

from nanobeam_bluesky.geometry import Geometry


@pytest.fixture(scope="session")
def geometry():
    """The published condition, binned 4×4: 32×32 pixels."""
    return Geometry.published().model_copy(update={"binning": 4})
