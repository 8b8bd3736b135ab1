import numpy as np
import pytest

from nanobeam_bluesky.documents import to_maps
from nanobeam_bluesky.geometry import Geometry

FLAGS = np.zeros((4, 6), dtype=int)
FLAGS[0, 0] = 32  # no frame
FLAGS[2, 3] = 1 + 8  # few counts, misfit


@pytest.fixture(scope="session")
def run(derived_documents):
    """Make maps of 4 × 6 points, start and stop; with whatever else the start has."""

    def make(**start):
        documents = derived_documents((4, 6), change={"flags": FLAGS})
        begin = documents[0][1]
        begin["nanobeam"] |= {
            "analysis_id": "a1",
            "fingerprint": "f1",
            "geometry": Geometry.published().model_dump(mode="json", exclude_none=True),
            "analyzer": {"method": "refine", "fit": ["strain", "omega"]},
            "original_plan_name": "fly",
            "original_scan_id": 12,
        }
        begin.update(start)
        return to_maps(documents), begin, documents[-1][1]

    return make
