"""Runs as HXN and SRX write them: the shipped presets map every point where it was measured."""

import itertools

import bluesky.plan_stubs as bps
import bluesky.preprocessors as bpp
import h5py
import numpy as np
import pytest
from bluesky import RunEngine
from event_model import compose_resource
from ophyd.sim import SynAxis
from ophyd.status import Status

from nanobeam_bluesky.documents import AnalyzerChoice, Tally, derive
from nanobeam_bluesky.documents.binning import bin_frames
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Analyzer
from nanobeam_bluesky.physics import forward
from nanobeam_bluesky.sim.devices import Quantity

SHAPE = ROWS, COLUMNS = 3, 4
POINTS = ROWS * COLUMNS
Y, X = np.linspace(-1, 1, ROWS), np.linspace(-3, 3, COLUMNS)


@pytest.fixture(scope="module")
def geometry():
    return Geometry.published().model_copy(
        update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
    )


@pytest.fixture(scope="module")
def film(geometry):
    """Frames (rows, columns, height, width) of a film whose strain tells where it is."""
    strain = np.linspace(-0.004, 0.004, POINTS)
    patterns = 20 * forward(strain, 0.0, 0.0, geometry)
    frames = np.zeros((POINTS, 160, 144), np.uint16)
    rows, cols = geometry.roi.slices
    frames[:, rows, cols] = np.random.default_rng(0).poisson(
        patterns.repeat(2, axis=1).repeat(2, axis=2)
    )
    return frames.reshape(*SHAPE, 160, 144)


@pytest.fixture(scope="module")
def engine():
    made = RunEngine(context_managers=[])
    yield made
    made.loop.call_soon_threadsafe(made.loop.stop)
    made._th.join()
    made.loop.close()


class Flyer:
    """Keeps what it is given in HDF5 files, and tells of it in resource and datum documents."""

    parent, name = None, "flyer"

    def __init__(self, folder, shapes):
        self.folder, self.shapes = folder, shapes
        self.events, self.documents, self.count = [], [], itertools.count()

    def file(self, spec, datasets, **kwargs):
        """Write a file; return what makes datums of it."""
        path = self.folder / f"{next(self.count)}.h5"
        with h5py.File(path, "w") as file:
            for name, values in datasets.items():
                file[name] = values
        made = compose_resource(
            start={"uid": "-"},
            spec=spec,
            root=str(path.parent),
            resource_path=path.name,
            resource_kwargs=kwargs,
        )
        resource = {k: v for k, v in made.resource_doc.items() if k != "run_start"}
        self.documents.append(("resource", resource))

        def datum(**kwargs):
            document = made.compose_datum(datum_kwargs=kwargs)
            self.documents.append(("datum", document))
            return document["datum_id"]

        return datum

    def kickoff(self):
        status = Status(timeout=None)
        status.set_finished()
        return status

    complete = kickoff

    def describe_collect(self):
        external = {"source": "sim", "dtype": "array", "external": "FILESTORE:"}
        return {k: external | {"shape": shape} for k, shape in self.shapes.items()}

    def collect_asset_docs(self):
        yield from self.documents
        self.documents = []

    def collect(self):
        for data in self.events:
            zeros = dict.fromkeys(data, 0.0)
            yield {
                "data": data,
                "timestamps": zeros,
                "time": 0.0,
                "filled": dict.fromkeys(data, False),
            }
        self.events = []


def facility_start(geometry, **scan):
    """Start document of a facility that knows nothing of the film."""
    film = ("bragg_center_px", "thickness_nm", "lattice_c_angstrom", "reflection_l", "optics")
    block = {k: geometry.model_dump(mode="json")[k] for k in film}
    block["optics"] = {k: v for k, v in block["optics"].items() if v is not None}
    return {
        "nanobeam": block,
        "scan": {"scan_input": [-3.0, 3.0, COLUMNS, -1.0, 1.0, ROWS], **scan},
    }


def hxn(film, geometry, folder):
    """One event for the whole scan, ten encoder counts a point, two kinds of arrays."""
    pixels = {"merlin1": [POINTS, 160, 144], "xspress3_ch1": [POINTS, 4096]}
    encoders = {"inenc2_val": [10 * POINTS], "inenc3_val": [10 * POINTS]}
    flyer = Flyer(folder, pixels | encoders)
    y, x = (np.repeat(v.ravel(), 10) for v in np.meshgrid(Y, X, indexing="ij"))
    wobble = np.tile(np.arange(10) - 4.5, POINTS).round()
    counts = {
        "INENC2.VAL.Value": (x / -9.7e-5).round() + wobble,
        "INENC3.VAL.Value": (y / 1.006e-4).round() + wobble,
    }
    image = flyer.file(
        "MERLIN_HDF5_BULK",
        {"entry/data/data": film.reshape(POINTS, 160, 144)},
        frame_per_point=POINTS,
    )
    panda = flyer.file("PANDA", counts)
    flyer.events.append(
        {
            "merlin1": image(point_number=0),
            "xspress3_ch1": image(point_number=0),
            "inenc2_val": panda(field="INENC2.VAL.Value"),
            "inenc3_val": panda(field="INENC3.VAL.Value"),
        }
    )
    md = facility_start(
        geometry,
        type="2D_FLY_PANDA",
        detectors=["xspress3", "merlin1", "panda1"],
        detector_distance=0.85,
        fast_axis={"motor_name": "zpssx", "units": "um"},
        slow_axis={"motor_name": "zpssy", "units": "um"},
        shape=(COLUMNS, ROWS),
    )

    @bpp.baseline_decorator([Quantity(name="energy", value=11.3, units="")])
    @bpp.run_decorator(md=md | {"shape": [COLUMNS, ROWS], "motors": ["zpssx", "zpssy"]})
    def plan():
        yield from bps.declare_stream(flyer, name="primary", collect=True)
        yield from bps.kickoff(flyer, wait=True)
        yield from bps.complete(flyer, wait=True)
        yield from bps.collect(flyer, name="primary")

    return plan(), {"zpssy": Y, "zpssx": X}, False


def srx(film, geometry, folder):
    """An event a row, every second row backwards; the slow motor in a stream of its own."""
    shapes = {"merlin_image": [COLUMNS, 160, 144], "fluor": [COLUMNS, 4, 4096]}
    flyer = Flyer(folder, shapes | {"enc1": [COLUMNS], "enc2": [COLUMNS]})
    slow = SynAxis(name="nano_stage_sy")
    md = facility_start(
        geometry,
        type="XRF_FLY",
        energy=11.3,
        detectors=["nano_zebra", "xs", "merlin"],
        fast_axis={"motor_name": "nano_stage_sx", "units": "um"},
        slow_axis={"motor_name": "nano_stage_sy", "units": "um"},
        snake=True,
        shape=(COLUMNS, ROWS),
    )
    md["nanobeam"]["detector_distance_m"] = 0.85

    @bpp.run_decorator(md=md)
    def plan():
        yield from bps.declare_stream(flyer, name="stream0", collect=True)
        for row in range(ROWS):
            yield from bps.mv(slow, Y[row])
            yield from bps.trigger_and_read([slow])
            way = slice(None, None, -1 if row % 2 else 1)
            image = flyer.file(
                "MERLIN_FLY_STREAM_V2", {"entry/data/data": film[row][way]}, frame_per_point=COLUMNS
            )
            places = {"enc1": X[way], "enc2": np.full(COLUMNS, Y[row])}
            zebra = flyer.file("ZEBRA_HDF51", places, frame_per_point=COLUMNS)
            flyer.events.append(
                {
                    "merlin_image": image(point_number=0),
                    "fluor": image(point_number=0),
                    "enc1": zebra(column="enc1"),
                    "enc2": zebra(column="enc2"),
                }
            )
            yield from bps.kickoff(flyer, wait=True)
            yield from bps.complete(flyer, wait=True)
            yield from bps.collect(flyer, name="stream0")

    return plan(), {"nano_stage_sy": Y, "nano_stage_sx": X}, True


@pytest.mark.parametrize("facility", [hxn, srx])
def test_a_facilitys_fly_scan_is_mapped_point_by_point(facility, engine, film, geometry, tmp_path):
    plan, axes, snaking = facility(film, geometry, tmp_path)
    documents = []
    engine(plan, lambda name, doc: documents.append((name, doc)))
    tally = Tally()
    derived = list(derive(documents, preset="auto", choice=AnalyzerChoice("network"), tally=tally))
    stop = derived[-1][1]
    assert (stop["exit_status"], tally.errors) == ("success", 0), stop
    assert derived[0][1]["motors"] == list(axes)
    assert derived[0][1]["shape"] == list(SHAPE)
    found = {}
    for name, doc in derived:
        if name == "event_page":
            for key, values in doc["data"].items():
                found.setdefault(key, []).extend(values)
    row, col = np.divmod(np.arange(POINTS), COLUMNS)
    if snaking:
        col = np.where(row % 2, COLUMNS - 1 - col, col)
    assert (found["row"], found["col"]) == (row.tolist(), col.tolist())
    frames = film[row, col][:, *geometry.roi.slices]
    expected = Analyzer.for_geometry(geometry, method="network").process(
        bin_frames(frames, geometry)[0]
    )
    np.testing.assert_allclose(found["strain"], expected.strain, atol=1e-9)
    for (motor, positions), index in zip(axes.items(), (row, col), strict=True):
        np.testing.assert_allclose(found[motor], positions[index], atol=1e-3)
