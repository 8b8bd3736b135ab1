"""Every dialect of documents gives the same map of the same sample, point by point.

Devices write the frames and positions of one simulated scan to files, or into documents, the
way beamlines do; a RunEngine emits the documents.
"""

import json
from itertools import pairwise
from pathlib import Path

import bluesky.plan_stubs as bps
import bluesky.preprocessors as bpp
import h5py
import numpy as np
import pytest
import tifffile
from bluesky import RunEngine
from bluesky.utils import RunEngineInterrupted
from event_model import compose_resource, compose_stream_resource
from hypothesis import given, settings
from hypothesis import strategies as st
from ophyd.status import Status
from ophyd_async.core import StaticPathProvider, TriggerInfo, UUIDFilenameProvider, init_devices
from ophyd_async.sim import SimBlobDetector

from nanobeam_bluesky.callbacks import NanobeamCallback
from nanobeam_bluesky.documents import (
    AnalyzerChoice,
    FrameReader,
    RunPipeline,
    Tally,
    derive,
    processing,
    read_documents,
)
from nanobeam_bluesky.documents.binning import bin_frames
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Analyzer, Flag
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.sim import SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import open_catalog, raw_writer

SHAPE = ROWS, COLUMNS = 4, 5
POINTS = ROWS * COLUMNS
MOTORS = ("sample_y", "sample_x")
CHOICE = AnalyzerChoice("network")


@pytest.fixture(scope="module")
def engine():
    made = RunEngine(context_managers=[])
    yield made
    made.loop.call_soon_threadsafe(made.loop.stop)
    made._th.join()
    made.loop.close()


@pytest.fixture(scope="module")
def geometry():
    return Geometry.published().model_copy(
        update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
    )


class Scan:
    """What was measured: frames (n, rows, columns) and positions {motor: (n,)}, in scan order."""

    def __init__(self, documents):
        self.documents = documents
        start = documents[0][1]
        self.md = {k: v for k, v in start.items() if k not in ("uid", "time", "scan_id")}
        resources = {d["data_key"]: d for n, d in documents if n == "stream_resource"}
        with h5py.File(resources["sxdm_image"]["uri"].removeprefix("file://localhost")) as file:
            self.frames, *positions = (
                file[resources[key]["parameters"]["dataset"]][:] for key in ("sxdm_image", *MOTORS)
            )
        self.positions = dict(zip(MOTORS, positions, strict=True))
        self.baseline = [
            (n, d)
            for n, d in documents
            if (n == "descriptor" and d["name"] == "baseline")
            or (n == "event" and "beam_energy" in str(d["data"]))
        ]


@pytest.fixture(scope="module")
def scan(engine, geometry, tmp_path_factory):
    """Fly once."""
    sxdm = SimulatedSXDM(
        phantom("unique", SHAPE),
        geometry,
        tmp_path_factory.mktemp("sxdm"),
        counts=20_000,
        energy_in="start",
        position_jitter=0.1,
    )
    documents = []
    engine(sxdm_fly(sxdm), lambda name, doc: documents.append((name, doc)))
    return Scan(documents)


@pytest.fixture(scope="module")
def expected(scan, geometry):
    """What the scan's points must become, without a document."""
    rows, cols = geometry.roi.slices
    patterns, _ = bin_frames(scan.frames[:, rows, cols], geometry)
    estimates = Analyzer.for_geometry(geometry, method="network").process(patterns)
    assert not estimates.flags.any()
    return estimates.columns() | scan.positions


# --------------------------------------------------------------------------- devices


class Flyer:
    """Flies at once; what is collected is the subclass's."""

    parent, collects = None, 1

    def __init__(self, scan, folder, **options):
        self.name, self.scan, self.folder = "sxdm", scan, Path(folder)
        self.folder.mkdir(exist_ok=True)
        self.__dict__ |= options
        self.write()

    def write(self):
        """Write the files."""

    def kickoff(self):
        return finished()

    complete = kickoff

    def describe_collect(self):
        image = {"source": "sim", "dtype": "array", "shape": [160, 144], "dtype_numpy": "<u2"}
        number = {"source": "sim", "dtype": "number", "shape": [], "dtype_numpy": "<f8"}
        return {"sxdm_image": image, **{motor: dict(number) for motor in MOTORS}}


def finished():
    status = Status(timeout=None)
    status.set_finished()
    return status


class Events(Flyer):
    """A page with a list of frames."""

    def collect(self):
        for i in range(POINTS):
            data = {m: float(v[i]) for m, v in self.scan.positions.items()}
            data["sxdm_image"] = self.image(i)
            yield {"data": data, "timestamps": dict.fromkeys(data, 0.0), "time": float(i)}

    def image(self, i):
        return self.scan.frames[i]


class Pages(Flyer):
    """Pages with one array of frames."""

    def collect_pages(self):
        for part in (slice(0, 7), slice(7, 8), slice(8, POINTS)):
            data = {m: list(v[part]) for m, v in self.scan.positions.items()}
            data["sxdm_image"] = self.scan.frames[part]
            times = [0.0] * len(data["sxdm_image"])
            yield {"data": data, "timestamps": dict.fromkeys(data, times), "time": times}


class Datums(Flyer):
    """Resource and datum documents; an event holds `points` points of `frames` frames each."""

    spec, points, frames, samples = "AD_HDF5", 1, 1, 1

    def write(self):
        halves = np.stack([self.scan.frames // 2, self.scan.frames - self.scan.frames // 2], axis=1)
        stack = self.scan.frames if self.frames == 1 else halves.reshape(-1, 160, 144)
        if self.spec.startswith("AD_HDF5"):
            path, kwargs = "a/frames.h5", {"frame_per_point": self.points * self.frames}
            (self.folder / "a").mkdir()
            with h5py.File(self.folder / path, "w") as file:
                file["entry/data/data"] = stack
        elif self.spec == "AD_TIFF":
            path, kwargs = (
                "a",
                {
                    "template": "%s%s_%6.6d.tiff",
                    "filename": "img",
                    "frame_per_point": self.points * self.frames,
                },
            )
            (self.folder / "a").mkdir()
            for i, frame in enumerate(stack):
                tifffile.imwrite(self.folder / f"a/img_{i:06d}.tiff", frame)
        else:  # ophyd's NPY_SEQ, by its handler: one file an event
            path, kwargs = "img", {}
            for i, frames in enumerate(stack.reshape(-1, *self._event_shape())):
                np.save(self.folder / f"img_{i}.npy", frames)
        resource = compose_resource(
            start={"uid": "unused"},
            spec=self.spec,
            root=str(self.folder),
            resource_path=path,
            resource_kwargs=kwargs,
        )
        self.resource = {k: v for k, v in resource.resource_doc.items() if k != "run_start"}
        key = "index" if self.spec == "NPY_SEQ" else "point_number"
        self.datums = [
            resource.compose_datum(datum_kwargs={key: i}) for i in range(POINTS // self.points)
        ]

    def _event_shape(self):
        n = self.points * self.frames
        return (160, 144) if n == 1 else (n, 160, 144)

    def describe_collect(self):
        described = super().describe_collect()
        described["sxdm_image"] |= {"external": "FILESTORE:", "shape": list(self._event_shape())}
        if self.points > 1:
            for motor in MOTORS:
                shape = [self.points * self.samples]
                described[motor] |= {"dtype": "array", "shape": shape}
        return described

    def collect_asset_docs(self):
        yield "resource", self.resource
        yield from (("datum", datum) for datum in self.datums)

    def collect(self):
        spread = np.linspace(-1, 1, self.samples) if self.samples > 1 else np.zeros(1)
        for i, datum in enumerate(self.datums):
            part = slice(i * self.points, (i + 1) * self.points)
            data = {m: (v[part, None] + spread).ravel() for m, v in self.scan.positions.items()}
            data = {m: v.tolist() if self.points > 1 else float(v[0]) for m, v in data.items()}
            data["sxdm_image"] = datum["datum_id"]
            yield {
                "data": data,
                "timestamps": dict.fromkeys(data, 0.0),
                "time": 0.0,
                "filled": {"sxdm_image": False},
            }


class Streams(Flyer):
    """Stream resources and datums, of `frames` frames a point, in files of `rows` rows."""

    frames, samples, rows, widths, tiff, parameters = 1, 1, ROWS, (3, 1, 7), False, {}

    def write(self):
        halves = np.stack([self.scan.frames // 2, self.scan.frames - self.scan.frames // 2], axis=1)
        stack = self.scan.frames[:, None] if self.frames == 1 else halves
        spread = np.linspace(-1, 1, self.samples) if self.samples > 1 else np.zeros(1)
        self.chunks = []
        for n, first in enumerate(range(0, POINTS, self.rows * COLUMNS)):
            part = slice(first, first + self.rows * COLUMNS)
            frames = stack[part].reshape(-1, 160, 144)
            path = self.folder / f"{n}.h5"
            with h5py.File(path, "w") as file:
                for motor, values in self.scan.positions.items():
                    file[f"entry/{motor}"] = (values[part, None] + spread).ravel()
                if not self.tiff:
                    file["entry/data/data"] = frames
            bundles = [
                self.stream("application/x-hdf5", path, motor, {"dataset": f"entry/{motor}"})
                for motor in MOTORS
            ]
            if self.tiff:
                for i, frame in enumerate(frames):
                    tifffile.imwrite(self.folder / f"{n}_{i:05d}.tif", frame)
                parameters = {"template": f"{n}_{{:05d}}.tif", "chunk_shape": [1, 160, 144]}
                kind = "multipart/related;type=image/tiff"
                bundles.append(self.stream(kind, f"{self.folder}/", "sxdm_image", parameters))
            else:
                parameters = {"dataset": "/entry/data/data", "chunk_shape": [1, 160, 144]}
                parameters = self.parameters or parameters
                bundles.append(self.stream("application/x-hdf5", path, "sxdm_image", parameters))
            edges = np.cumsum([0, *self.widths]).tolist()
            points = self.rows * COLUMNS
            edges = [*(e for e in edges if e < points), points]
            new = [("stream_resource", bundle.stream_resource_doc) for bundle in bundles]
            for start, stop in pairwise(edges):
                indices = {"start": start, "stop": stop}
                datums = [("stream_datum", b.compose_stream_datum(indices)) for b in bundles]
                self.chunks.append(new + datums)
                new = []
        self.collects = len(self.chunks)

    @staticmethod
    def stream(mimetype, path, key, parameters):
        uri = f"file://localhost{path}"
        return compose_stream_resource(
            mimetype=mimetype, uri=uri, data_key=key, parameters=parameters
        )

    def describe_collect(self):
        described = super().describe_collect()
        described["sxdm_image"]["shape"] = [self.frames, 160, 144]
        for motor in MOTORS:
            described[motor]["shape"] = [self.samples]
        return {k: v | {"external": "STREAM:"} for k, v in described.items()}

    def get_index(self):
        return POINTS

    def collect_asset_docs(self, index=None):
        yield from self.chunks.pop(0)


def fly(device):
    """Collect what a device has, in a run of its own."""

    @bpp.run_decorator(md=device.scan.md)
    def run():
        yield from bps.declare_stream(device, name="primary", collect=True)
        yield from bps.kickoff(device, wait=True)
        yield from bps.complete(device, wait=True)
        for _ in range(device.collects):
            yield from bps.collect(device, name="primary")

    return run()


def recorded(engine, plan):
    documents = []
    engine(plan, lambda name, doc: documents.append((name, doc)))
    return documents


def columns(derived):
    """Every field of a derived run, by point; the last event of a point wins."""
    found = {}
    for name, doc in derived:
        if name == "event_page":
            for key, values in doc["data"].items():
                found.setdefault(key, {}).update(zip(doc["seq_num"], values, strict=True))
    assert {tuple(sorted(points)) for points in found.values()} == {tuple(range(1, POINTS + 1))}
    return {k: np.array([v[p] for p in range(1, POINTS + 1)]) for k, v in found.items()}


def assert_same_map(documents, expected, **options):
    tally = Tally()
    derived = list(derive(documents, choice=CHOICE, tally=tally, **options))
    assert derived[-1][1]["exit_status"] == "success", derived[-1][1]
    assert (tally.points_seen, tally.errors) == (POINTS, 0), tally.last_error
    found = columns(derived)
    for name, values in expected.items():
        exact = name not in MOTORS
        np.testing.assert_allclose(
            found[name], values, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-12
        )


def late(documents):
    """Positions after the frames, as from a PandA that lags."""
    motors = {d["uid"] for n, d in documents if n == "stream_resource" and d["data_key"] in MOTORS}
    lag = [x for x in documents if x[1].get("stream_resource") in motors]
    rest = [x for x in documents if x not in lag]
    return [*rest[:-1], *lag, rest[-1]]


def apart(documents):
    """Positions in a stream of their own."""
    name, descriptor = documents[1]
    keys = descriptor["data_keys"]
    image, motors = ({k: keys[k] for k in keys if (k in MOTORS) == own} for own in (False, True))
    own = {d["uid"] for n, d in documents if n == "stream_resource" and d["data_key"] in MOTORS}
    yield documents[0]
    yield name, descriptor | {"uid": "panda", "name": "panda", "data_keys": motors}
    yield name, descriptor | {"data_keys": image}
    for n, d in documents[2:]:
        yield n, d | {"descriptor": "panda"} if d.get("stream_resource") in own else d


def rewound(documents):
    """Rows that were flown before, into a file that is no good."""
    at = next(i for i, (n, _) in enumerate(documents) if n == "stream_datum")
    images = next(
        d for n, d in documents if n == "stream_resource" and d["data_key"] == "sxdm_image"
    )
    frames = next(d for _, d in documents if d.get("stream_resource") == images["uid"])
    flown = [
        ("stream_resource", images | {"uid": "before", "uri": images["uri"] + ".lost"}),
        (
            "stream_datum",
            frames | {"stream_resource": "before", "seq_nums": {"start": 1, "stop": 8}},
        ),
    ]
    return [*documents[:at], *flown, *documents[at:]]


def events_first(documents):
    """Datums after the events, resources at the end, as HXN replays them."""
    order = {"datum": 1, "resource": 2, "stop": 3}
    return sorted(documents, key=lambda item: order.get(item[0], 0))


def one_by_one(documents):
    """Pages as single events with nested lists, as read back from JSON."""
    for name, doc in documents:
        if name == "event_page":
            for i, number in enumerate(doc["seq_num"]):
                data = {k: np.asarray(v[i]).tolist() for k, v in doc["data"].items()}
                yield "event", {"descriptor": doc["descriptor"], "seq_num": number, "data": data}
        else:
            yield name, doc


def twice(documents):
    for name, doc in documents:
        yield name, doc
        if name not in ("start", "stop"):
            yield name, doc


DIALECTS = {
    "events with embedded frames": (Events, {}, list),
    "pages with an array of frames": (Pages, {}, list),
    "nested lists": (Pages, {}, one_by_one),
    "datums, an event a point": (Datums, {}, list),
    "datums, two frames a point": (Datums, {"frames": 2}, list),
    "datums, an event a row": (Datums, {"points": COLUMNS, "samples": 10}, list),
    "datums, an event the scan": (Datums, {"points": POINTS, "samples": 10}, list),
    "datums after their events": (Datums, {"spec": "AD_HDF5_SWMR"}, events_first),
    "datums of TIFF files": (Datums, {"spec": "AD_TIFF", "frames": 2}, list),
    "datums of TIFF files, an event a row": (
        Datums,
        {"spec": "AD_TIFF", "points": COLUMNS},
        list,
    ),
    "datums by a handler": (Datums, {"spec": "NPY_SEQ"}, list),
    "datums by a handler, an event a row": (
        Datums,
        {"spec": "NPY_SEQ", "points": COLUMNS, "samples": 3},
        list,
    ),
    "streams": (Streams, {}, list),
    "streams, every document twice": (Streams, {}, twice),
    "streams, one chunk": (Streams, {"widths": (POINTS,)}, list),
    "streams, a file a row": (Streams, {"rows": 1, "widths": (2, 2)}, list),
    "streams, two frames a point": (Streams, {"frames": 2}, list),
    "streams, oversampled positions": (Streams, {"samples": 10}, list),
    "streams, positions late": (Streams, {}, late),
    "streams, positions in their own": (Streams, {"samples": 10}, apart),
    "streams, a row flown again": (Streams, {}, rewound),
    "streams of TIFF files": (Streams, {"tiff": True, "frames": 2, "rows": 2}, list),
    "streams with the older parameters": (
        Streams,
        {"frames": 2, "parameters": {"path": "/entry/data/data", "multiplier": 2, "swmr": True}},
        list,
    ),
}


@pytest.mark.parametrize(("device", "options", "change"), DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_gives_the_same_map(
    engine, scan, expected, tmp_path, device, options, change
):
    documents = recorded(engine, fly(device(scan, tmp_path, **options)))
    assert_same_map(change(documents), expected)


# --------------------------------------------------------------------------- replays


def test_documents_from_lines_of_json_give_the_same_map(engine, scan, expected, tmp_path):
    """Both as they are kept by Bluesky and with the separators of Tiled's sequences."""
    documents = recorded(engine, fly(Pages(scan, tmp_path)))
    lines = [
        json.dumps({"name": name, "doc": doc}, default=lambda array: array.tolist())
        for name, doc in documents
    ]
    (tmp_path / "run.jsonl").write_text("\n".join(lines))
    assert_same_map(read_documents(tmp_path / "run.jsonl"), expected)
    (tmp_path / "run.jsonl").write_text("".join(f"\x1e{line}\n" for line in lines))
    assert_same_map(read_documents(tmp_path / "run.jsonl"), expected)


def test_lines_that_are_no_documents_are_named(tmp_path):
    (tmp_path / "run.jsonl").write_text('["start", {}]\n{"name": "stop"}\n')
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2: expected a document"):
        list(read_documents(tmp_path / "run.jsonl"))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    client = open_catalog(tmp_path_factory.mktemp("catalog"))
    yield client
    client.context.close()


@pytest.mark.parametrize(
    ("device", "options"),
    [(Streams, {"frames": 2}), (Pages, {})],
)
def test_documents_read_back_from_tiled_give_the_same_map(
    engine, scan, expected, tmp_path, catalog, device, options
):
    documents = recorded(engine, fly(device(scan, tmp_path, **options)))
    write = raw_writer(catalog["raw"])
    for name, doc in documents:
        write(name, doc)
    run = catalog["raw"][documents[0][1]["uid"]]
    assert_same_map(run.documents(), expected)


def test_runs_are_derived_one_after_the_other_and_others_are_skipped(engine, scan, tmp_path):
    one = recorded(engine, fly(Pages(scan, tmp_path)))
    cut = one[:-1]
    other = [("start", {"uid": "other", "time": 0.0}), *one[1:]]
    derived = list(derive([*cut, *other, *one], choice=CHOICE))
    ends = [doc["exit_status"] for name, doc in derived if name == "stop"]
    assert [d["original_run_uid"] for n, d in derived if n == "start"] == [one[0][1]["uid"]] * 2
    assert ends == ["fail", "success"]


def test_points_whose_datum_never_came_are_flagged_and_the_others_are_not(
    engine, scan, expected, tmp_path
):
    documents = recorded(engine, fly(Datums(scan, tmp_path, points=COLUMNS)))
    lost = next(d for n, d in documents if n == "datum" and d["datum_kwargs"]["point_number"] == 2)
    tally = Tally()
    kept = [item for item in documents if item[1] is not lost]
    derived = list(derive(kept, choice=CHOICE, tally=tally))
    assert f"{lost['datum_id']} was announced, and never came" in derived[-1][1]["reason"]
    found = columns(derived)
    missing = np.arange(POINTS) // COLUMNS == 2
    assert (found["flags"] == np.where(missing, Flag.FRAME_MISSING, 0)).all()
    np.testing.assert_array_equal(found["strain"][~missing], expected["strain"][~missing])


def test_rows_without_their_event_are_counted_as_points(engine, scan, tmp_path):
    documents = recorded(engine, fly(Datums(scan, tmp_path, points=COLUMNS)))
    for i, (name, doc) in enumerate(documents):
        if name == "event_page":  # the last row of it is lost
            data = {k: v[:-1] for k, v in doc["data"].items()}
            documents[i] = (name, doc | {"data": data, "seq_num": doc["seq_num"][:-1]})
    derived = list(derive(documents, choice=CHOICE))
    assert derived[-1][1]["exit_status"] == "fail"
    assert f"{COLUMNS} of {POINTS} announced points" in derived[-1][1]["reason"]


def test_a_million_points_announced_by_mistake_cost_nothing(engine, scan, expected, tmp_path):
    documents = recorded(engine, fly(Streams(scan, tmp_path)))
    images = next(d["uid"] for _, d in documents if d.get("data_key") == "sxdm_image")
    datum = next(d for _, d in documents if d.get("stream_resource") == images)
    absurd = datum | {"uid": "absurd", "seq_nums": {"start": 10**9, "stop": 10**12}}
    tally = Tally()
    documents.insert(-1, ("stream_datum", absurd))
    documents.insert(-1, ("stream_datum", {"descriptor": datum["descriptor"]}))
    derived = list(derive(documents, choice=CHOICE, tally=tally))
    assert (tally.points_seen, tally.errors) == (POINTS, 2)
    np.testing.assert_array_equal(columns(derived)["strain"], expected["strain"])


# --------------------------------------------------- interrupted, incomplete, in disorder


class Steps:
    """A detector that is read point by point; its frames go into events or a growing file."""

    parent, name = None, "sxdm"

    def __init__(self, scan, folder, dialect):
        self.scan, self.dialect = scan, dialect
        self.path = Path(folder) / "steps.h5"
        self.taken, self.point, self.spoiled, self.new = 0, 0, {7}, []
        with h5py.File(self.path, "w") as file:
            file.create_dataset("d", (0, 160, 144), "u2", maxshape=(None, 160, 144))
        parameters = {"dataset": "d", "chunk_shape": [1, 160, 144]}
        self.stream = Streams.stream("application/x-hdf5", self.path, "sxdm_image", parameters)
        self.resource = compose_resource(
            start={"uid": "unused"},
            spec="AD_HDF5",
            root=str(folder),
            resource_path=self.path.name,
            resource_kwargs={"frame_per_point": 1, "dataset": "d"},
        )

    def set(self, point):
        self.point = point
        return finished()

    def trigger(self):
        """Take a frame; the first of the eighth point is no good."""
        self.frame = self.scan.frames[self.point]
        if self.point in self.spoiled:
            self.spoiled.remove(self.point)
            self.frame = self.frame[::-1]
        if self.dialect != "embedded":
            with h5py.File(self.path, "a") as file:
                file["d"].resize(self.taken + 1, axis=0)
                file["d"][self.taken] = self.frame
        if self.dialect == "datums":
            if not self.taken:
                resource = self.resource.resource_doc
                self.new.append(
                    ("resource", {k: resource[k] for k in resource if k != "run_start"})
                )
            self.datum = self.resource.compose_datum(datum_kwargs={"point_number": self.taken})
            self.new.append(("datum", self.datum))
        if self.dialect == "streams":
            if not self.taken:
                self.new.append(("stream_resource", self.stream.stream_resource_doc))
            indices = {"start": self.taken, "stop": self.taken + 1}
            self.new.append(("stream_datum", self.stream.compose_stream_datum(indices)))
        self.taken += 1
        return finished()

    def describe(self):
        described = Flyer.describe_collect(self)
        if self.dialect == "datums":
            described["sxdm_image"]["external"] = "FILESTORE:"
        if self.dialect == "streams":
            described["sxdm_image"] |= {"external": "STREAM:", "shape": [1, 160, 144]}
        return described

    def read(self):
        values = {m: float(v[self.point]) for m, v in self.scan.positions.items()}
        if self.dialect == "embedded":
            values["sxdm_image"] = self.frame
        if self.dialect == "datums":
            values["sxdm_image"] = self.datum["datum_id"]
        return {key: {"value": value, "timestamp": 0.0} for key, value in values.items()}

    def get_index(self):
        return self.taken

    def collect_asset_docs(self, index=None):
        new, self.new = self.new, []
        yield from new


def step(device):
    """Take all points, and pause after the eighth."""
    yield from bps.open_run(device.scan.md)
    for point in range(POINTS):
        yield from bps.checkpoint()
        yield from bps.abs_set(device, point, wait=True)
        yield from bps.trigger_and_read([device])
        if point == 7:
            yield from bps.pause()
    yield from bps.close_run()


@pytest.mark.parametrize(
    ("action", "status", "points"),
    [
        ("resume", "success", POINTS),
        ("stop", "success", 8),
        ("abort", "abort", 8),
        ("halt", "abort", 8),
    ],
)
@pytest.mark.parametrize("dialect", ["embedded", "datums", "streams"])
def test_an_interrupted_scan_keeps_every_point_that_was_announced(
    engine, scan, expected, tmp_path, dialect, action, status, points
):
    documents = []
    with pytest.raises(RunEngineInterrupted):
        engine(
            step(Steps(scan, tmp_path, dialect)), lambda name, doc: documents.append((name, doc))
        )
    token = engine.subscribe(lambda name, doc: documents.append((name, doc)))
    getattr(engine, action)(*(["the beam is gone"] if action == "abort" else []))
    engine.unsubscribe(token)
    derived = list(derive(documents, choice=CHOICE))
    stop = derived[-1][1]
    assert (stop["exit_status"], documents[-1][1]["exit_status"]) == (status, status)
    assert stop["num_events"] == {"primary": points}
    assert ("the beam is gone" in stop["reason"]) == (action == "abort")
    found = by_point(derived)
    assert {f["flags"] for p, f in found.items() if p != 8} == {0}
    # of the eighth there is no good frame unless it was taken again
    assert_as_expected(found, expected, {*found} - ({8} if points == 8 else set()))


def assert_as_expected(found, expected, points):
    for name, values in expected.items():
        there = [found[point][name] for point in points]
        wanted = [values[point - 1] for point in points]
        np.testing.assert_allclose(there, wanted, rtol=0, atol=1e-12)


def by_point(derived):
    """Point number → its fields."""
    return {
        number: {key: column[i] for key, column in doc["data"].items()}
        for name, doc in derived
        if name == "event_page"
        for i, number in enumerate(doc["seq_num"])
    }


class Ready:
    """An executor that works at once, its analyzer made once."""

    def __init__(self, geometry):
        self.analyzer = Analyzer.for_geometry(geometry, method="network")

    def open(self, pipeline, geometry, choice):
        self.reader = FrameReader(geometry)
        pipeline.opened(self.analyzer.settings)

    in_flight = 3

    def submit(self, pipeline, task):
        pipeline.processed(processing._process(task, self.analyzer, self.reader))

    def close(self, pipeline):
        self.reader.close()


@pytest.fixture(scope="module")
def ready(geometry):
    return Ready(geometry)


RECORDED = {
    "embedded": (Pages, {}),
    "datums": (Datums, {}),
    "streams": (Streams, {"rows": 1, "widths": (2, 2)}),
}


@pytest.fixture(scope="module")
def complete(engine, scan, tmp_path_factory):
    """Documents of one scan in each dialect; events are single where they may be."""
    return {
        name: list(
            one_by_one(recorded(engine, fly(kind(scan, tmp_path_factory.mktemp(name), **options))))
        )
        for name, (kind, options) in RECORDED.items()
    }


def points_of(name, doc, documents):
    """Points that cannot be known without a document."""
    if name == "event":
        return {doc["seq_num"]}
    if name == "stream_datum":
        return set(range(doc["seq_nums"]["start"], doc["seq_nums"]["stop"]))
    if name == "datum":
        events = [d for n, d in documents if n == "event"]
        return {d["seq_num"] for d in events if doc["datum_id"] in d["data"].values()}
    if name == "stream_resource":
        uses = [d for _, d in documents if d.get("stream_resource") == doc["uid"]]
        return set().union(*(points_of("stream_datum", d, documents) for d in uses))
    return set(range(1, POINTS + 1))


@pytest.mark.parametrize("dialect", RECORDED)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_whatever_is_lost_repeated_or_late_costs_its_own_points_only(
    dialect, complete, expected, ready, data
):
    """Documents come in any order after their descriptor, with keys that nobody knows."""
    documents = complete[dialect]
    start, descriptor, *rest, stop = documents
    draw = data.draw
    lost = [rest[i] for i in draw(st.sets(st.integers(0, len(rest) - 1), max_size=2))]
    kept = [item for item in rest if item not in lost]
    kept += draw(st.lists(st.sampled_from(kept), max_size=3))
    order = draw(st.permutations(kept))
    unknown = draw(st.dictionaries(st.text(max_size=3).map("x_{}".format), st.integers()))
    senseless = {"uid": "x", "seq_num": None, "seq_nums": None, "datum_id": {}}
    broken = [(n, doc | senseless) for n, doc in draw(st.lists(st.sampled_from(rest), max_size=2))]
    come = [*((n, doc | unknown) for n, doc in order), *broken]
    derived = []
    pipeline = RunPipeline(
        start[1], Preset.load("default"), ready, lambda n, d: derived.append((n, d))
    )
    for i, item in enumerate([descriptor, *come, stop]):
        pipeline.document(*item)
        if i % 8 == 0:
            pipeline.poll()
    pipeline.poll()
    assert pipeline.closed
    found = by_point(derived)
    affected = set().union(*(points_of(*item, documents) for item in lost))
    good = {number for number, point in found.items() if not point["flags"]}
    assert good | affected == set(range(1, POINTS + 1)), derived[-1][1]
    assert_as_expected(found, expected, good)
    if len(found) < POINTS:
        assert derived[-1][1]["exit_status"] == "fail"


# --------------------------------------------------------------------- the callback's


def test_datums_reach_the_worker_process_that_reads_them(engine, scan, expected, tmp_path):
    """By a handler, under another mount, while another run is interleaved."""
    device = Datums(scan, tmp_path, spec="NPY_SEQ", points=COLUMNS)
    device.resource["root"] = "/ioc/data"
    other = recorded(engine, fly(Datums(scan, tmp_path / "a")))
    uid = other[0][1]["uid"]
    callback = NanobeamCallback(
        "network", root_map={"/ioc": str(tmp_path.parent), "/ioc/data": str(tmp_path)}
    )
    derived = []
    callback.subscribe(lambda name, doc: derived.append((name, doc)))
    between = iter(other)

    def both(name, doc):
        callback(name, doc)
        for item in between:
            callback(*item)
            if name != "stop":
                break

    engine(fly(device), both)
    try:
        assert callback.wait(100)
        assert (callback.health.points_seen, callback.health.errors) == (2 * POINTS, 0)
    finally:
        callback.close()
    starts = {
        doc["uid"]: doc["original_run_uid"] == uid for name, doc in derived if name == "start"
    }
    ours = {doc["uid"]: starts[doc["run_start"]] for name, doc in derived if name == "descriptor"}
    for which in (True, False):
        found = columns([(n, d) for n, d in derived if ours.get(d.get("descriptor")) is which])
        for name in ("strain", "counts", "flags", *MOTORS):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)


def test_datums_before_their_resource_are_of_the_run_that_flies(engine, scan, tmp_path):
    """Not of the one before, which has stopped and is still analysed."""
    documents = events_first(recorded(engine, fly(Datums(scan, tmp_path))))
    callback = NanobeamCallback("correlation")
    derived = []
    callback.subscribe(lambda name, doc: derived.append((name, doc)))
    text = json.dumps(documents)
    uids = [doc["uid"] for name, doc in documents if name in ("start", "descriptor", "resource")]
    for mark in "ab":
        for uid in uids:
            text = text.replace(uid, mark + uid[1:])
        uids = [mark + uid[1:] for uid in uids]
        for name, doc in json.loads(text):
            callback(name, doc)
    try:
        assert callback.wait(60)
        assert (callback.health.points_analysed, callback.health.errors) == (2 * POINTS, 0)
    finally:
        callback.close()
    assert [d["exit_status"] for n, d in derived if n == "stop"] == ["success"] * 2
    assert not any(sum(d["data"]["flags"]) for n, d in derived if n == "event_page")


# ----------------------------------------------------------------------- ophyd-async


def geometry_block(geometry):
    block = geometry.model_dump(mode="json", exclude_defaults=True, exclude_unset=True)
    for name in ("wavelength_angstrom", "d_spacing_angstrom"):
        block.pop(name, None)
    return block | {"optics": geometry.optics.model_dump(mode="json", exclude_none=True)}


def test_ophyd_async_detectors_restaged_for_each_row(engine, tmp_path):
    """Two of its simulated detectors, two frames a point, a file a row."""
    rows, columns = 3, 4
    paths = StaticPathProvider(UUIDFilenameProvider(), tmp_path)
    with init_devices():
        det, det2 = (SimBlobDetector(paths, name=name) for name in ("det", "det2"))
    start = geometry_block(
        Geometry.published().model_copy(update={"bragg_center_px": (160.0, 120.0)})
    )
    md = {"shape": [rows, columns], "snaking": [False, True]}

    @bpp.run_decorator(md=md | {"nanobeam": start | {"detector": "det"}})
    def fly_rows():
        for row in range(rows):
            det.pattern_generator.set_x(row)
            yield from bps.stage_all(det, det2)
            trigger = TriggerInfo(number_of_events=columns, livetime=0.02, collections_per_event=2)
            yield from bps.prepare(det, trigger, group="all")
            yield from bps.prepare(det2, trigger, wait=True, group="all")
            if not row:
                yield from bps.declare_stream(det, det2, name="primary", collect=True)
            yield from bps.kickoff_all(det, det2, wait=True)
            yield from bps.collect_while_completing(
                [det, det2], [det, det2], flush_period=0.05, stream_name="primary"
            )
            yield from bps.unstage_all(det, det2)

    documents = recorded(engine, fly_rows())
    tally = Tally()
    derived = list(derive(documents, choice=AnalyzerChoice("network"), tally=tally))
    assert (tally.points_seen, tally.errors) == (rows * columns, 0)
    files = [d["uri"] for n, d in documents if n == "stream_resource" and d["data_key"] == "det"]
    assert len(files) == rows
    sums = []
    for uri in files:
        with h5py.File(uri.removeprefix("file://localhost")) as file:
            frames = file["entry/data/data"][:, 56:184, 96:224].astype(int)
        sums += frames.sum(axis=(1, 2)).reshape(columns, 2).sum(axis=1).tolist()
    assert sums[0] != sums[4] != sums[8]
    found = {}
    for name, doc in derived:
        if name == "event_page":
            found |= dict(zip(doc["seq_num"], doc["data"]["counts"], strict=True))
    assert [found[p] for p in range(1, rows * columns + 1)] == sums
