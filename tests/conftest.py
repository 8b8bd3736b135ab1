import os

os.environ.setdefault("MPLBACKEND", "Agg")
# pytest-xdist has a process for every core: a second torch thread costs ten times what it brings
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
from bluesky import RunEngine
from event_model import compose_run

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Estimates

FIELDS = Estimates.UNITS | {"row": "", "col": ""}


@pytest.fixture(scope="session")
def derived_documents():
    """Make the (name, document) pairs of a derived run, every value its own.

    ``make(shape, snaking=…, page=…, change={"strain": array})``; a changed field is given
    as (rows, columns), unsnaked.
    """

    def make(shape, *, snaking=True, page=512, change=None, extents=None, sample="film"):
        rows, cols = shape
        number = np.arange(rows * cols)
        row, col = np.divmod(number, cols)
        if snaking:
            col = np.where(row % 2, cols - 1 - col, col)
        extents = extents or [[0.0, 0.1 * (rows - 1)], [0.0, 0.1 * (cols - 1)]]
        ordered = row * cols + col  # so that an image made of it counts up along its rows
        columns = {
            "strain": ordered * 1e-7,
            "omega": ordered * 1e-5 - 0.01,
            "chi": 0.03 - ordered * 1e-5,
            "thickness": np.full(len(number), np.nan),
            "thickness_sigma": np.full(len(number), np.nan),
            "counts": 5000.0 + ordered,
            "flags": np.zeros(len(number), dtype=int),
            "row": row,
            "col": col,
            "sample_y": np.linspace(*extents[0], rows)[row],
            "sample_x": np.linspace(*extents[1], cols)[col],
        }
        columns |= {k: np.full(len(number), 0.5) for k in FIELDS if k not in columns}
        for name, image in (change or {}).items():
            columns[name] = np.asarray(image)[row, col]

        run = compose_run(
            metadata={
                "original_run_uid": "3f2a91c0-0000-4000-8000-000000000000",
                "plan_name": "nanobeam",
                "plan_type": "generator",
                "scan_id": 0,
                "sample": sample,
                "shape": [rows, cols],
                "extents": extents,
                "snaking": [False, snaking],
                "motors": ["sample_y", "sample_x"],
                "num_points": rows * cols,
                "hints": {
                    "dimensions": [[["sample_y"], "primary"], [["sample_x"], "primary"]],
                    "gridding": "rectilinear",
                },
                "tiled_specs": [{"name": "NanobeamRun", "version": "1.0"}],
                "nanobeam": {"version": "0"},
            }
        )
        units = FIELDS | {"sample_y": "um", "sample_x": "um"}
        whole = ("flags", "row", "col")
        stream = run.compose_descriptor(
            name="primary",
            data_keys={
                name: {
                    "source": "test",
                    "dtype": "integer" if name in whole else "number",
                    "dtype_numpy": "<i8" if name in whole else "<f8",
                    "shape": [],
                    "units": unit,
                }
                for name, unit in units.items()
            },
        )
        pages = []
        for first in range(0, len(number), page):
            part = slice(first, min(first + page, len(number)))
            count = part.stop - part.start
            data = {name: columns[name][part].tolist() for name in units}
            pages.append(
                stream.compose_event_page(
                    data=data,
                    timestamps={name: [1.7e9] * count for name in units},
                    seq_num=list(range(first + 1, part.stop + 1)),
                    time=[1.7e9 + i for i in range(first, part.stop)],
                    validate=False,
                )
            )
        return [
            ("start", run.start_doc),
            ("descriptor", stream.descriptor_doc),
            *(("event_page", doc) for doc in pages),
            ("stop", run.compose_stop()),
        ]

    return make


@pytest.fixture
def geometry():
    """The published condition on a small detector, the pattern off its middle."""
    return Geometry.published().model_copy(
        update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
    )


@pytest.fixture
def RE():
    """A RunEngine that pauses without waiting for Ctrl-C."""
    engine = RunEngine(context_managers=[])
    yield engine
    if engine.state == "paused":
        engine.halt()
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join()
    engine.loop.close()
