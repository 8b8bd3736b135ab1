"""Views over HTTP: scans and maps on their grid are, value by value, what was recorded."""

import re
from types import SimpleNamespace

import h5py
import httpx
import numpy as np
import obstore
import pytest
import tifffile
import xarray as xr
import zarr
from event_model import compose_resource, compose_run
from tiled.client import from_uri
from tiled.client.utils import ClientError
from tiled.queries import Key

from nanobeam_bluesky.documents import to_maps
from nanobeam_bluesky.documents.binning import bin_frames
from nanobeam_bluesky.documents.derived_run import failed_run
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.tiled_adapters import derived_writer, raw_writer, serve, writers

SHAPE = ROWS, COLUMNS = 4, 5
POINTS = ROWS * COLUMNS
HEIGHT, WIDTH = 160, 144
GEOMETRY = Geometry.published().model_copy(
    update={"detector_shape": (HEIGHT, WIDTH), "bragg_center_px": (70.0, 80.0)}
)
FRAMES = np.random.default_rng(0).poisson(3, (POINTS, HEIGHT, WIDTH)).astype(np.uint16)
Y, X = (np.random.default_rng(1 + i).normal(i, 0.1, POINTS) for i in range(2))
IMAGE = {"source": "test", "dtype": "array", "dtype_numpy": "<u2", "shape": [HEIGHT, WIDTH]}
NUMBER = {"source": "test", "dtype": "number", "dtype_numpy": "<f8", "shape": [], "units": "um"}


def start(*, snake=True, **changes):
    block = GEOMETRY.model_dump(mode="json", exclude_none=True)
    block.pop("wavelength_angstrom")
    block.pop("d_spacing_angstrom")
    block["energy_keV"] = 12.398419843320026 / GEOMETRY.wavelength_angstrom
    return {
        "plan_name": "fly",
        "sample": "film",
        "shape": list(SHAPE),
        "snaking": [False, snake],
        "motors": ["y", "x"],
        "extents": [[0.0, 3.0], [0.0, 4.0]],
        "nanobeam": block,
    } | changes


def grid(values, *, snake=True, blank=0):
    """Put points in scan order on (row, column)."""
    values = np.asarray(values)
    out = np.full((POINTS, *values.shape[1:]), blank, values.dtype)
    out[: len(values)] = values
    out = out.reshape(*SHAPE, *values.shape[1:])
    if snake:
        out[1::2] = out[1::2, ::-1].copy()
    return out


def patterns(frames):
    rows, cols = GEOMETRY.roi.slices
    return bin_frames(np.ascontiguousarray(frames[:, rows, cols]), GEOMETRY)[0]


class Recorder:
    """Composes runs and records them."""

    def __init__(self, client, folder):
        self.client, self.folder = client, folder

    def __call__(self, documents, batch=writers.RAW_BATCH):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writers, "RAW_BATCH", batch)
            write = raw_writer(self.client["raw"])
        for name, doc in documents:
            write(name, doc)
            if name == "start":
                uid = doc["uid"]
        self.last = write
        return uid

    def file(self, name, frames=FRAMES, dataset="/entry/data/data", **others):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            file.create_dataset(dataset, data=frames, chunks=(1, *frames.shape[1:]))
            for key, values in others.items():
                file[key] = values
        return path

    def streamed(
        self, paths, md, *, n=POINTS, stop=True, table=None, motors=(), dataset="/entry/data/data"
    ):
        """Frames, and positions where asked for, in files; each has equally many points."""
        run = compose_run(metadata=md)
        stored = {"external": "STREAM:"}
        keys = {"img": IMAGE | stored}
        keys |= {m: NUMBER | stored for m in motors} | dict.fromkeys("yx" if table else "", NUMBER)
        stream = run.compose_descriptor(name="primary", data_keys=keys)
        yield "start", run.start_doc
        yield "descriptor", stream.descriptor_doc
        if table:
            seq_num, data = table
            yield (
                "event_page",
                stream.compose_event_page(
                    data=data,
                    timestamps={k: [0.0] * len(seq_num) for k in data},
                    seq_num=seq_num,
                    time=[0.0] * len(seq_num),
                    validate=False,
                ),
            )
        each = -(-n // len(paths))
        where = {"img": dataset} | {motor: f"/{motor}" for motor in motors}
        for k, path in enumerate(paths):
            for key, name in where.items():
                resource = run.compose_stream_resource(
                    mimetype="application/x-hdf5",
                    uri=f"file://localhost{path}",
                    data_key=key,
                    parameters={"dataset": name},
                )
                yield "stream_resource", resource.stream_resource_doc
                first, end = k * each, min((k + 1) * each, n)
                yield (
                    "stream_datum",
                    resource.compose_stream_datum(
                        indices={"start": 0, "stop": end - first},
                        seq_nums={"start": first + 1, "stop": end + 1},
                        descriptor=stream.descriptor_doc,
                    ),
                )
        if stop:
            counted = len(set(table[0])) if table else n
            yield "stop", run.compose_stop() | {"num_events": {"primary": counted}}


def table(n=POINTS, order=None):
    order = np.arange(n) if order is None else np.asarray(order)
    data = {"y": Y[order].tolist(), "x": X[order].tolist()}
    return [int(i) + 1 for i in order], data


def embedded(md):
    run = compose_run(metadata=md)
    keys = {"img": IMAGE, "y": NUMBER, "x": NUMBER}
    stream = run.compose_descriptor(name="primary", data_keys=keys)
    yield "start", run.start_doc
    yield "descriptor", stream.descriptor_doc
    for i in range(POINTS):
        data = {"img": FRAMES[i], "y": Y[i], "x": X[i]}
        times = dict.fromkeys(data, 0.0)
        yield "event", stream.compose_event(data=data, timestamps=times, validate=False)
    yield "stop", run.compose_stop()


def legacy(md, path):
    run = compose_run(metadata=md)
    keys = {"img": IMAGE | {"external": "FILESTORE:"}, "y": NUMBER, "x": NUMBER}
    stream = run.compose_descriptor(name="primary", data_keys=keys)
    resource = compose_resource(
        spec="AD_HDF5",
        root="/",
        resource_path=str(path).lstrip("/"),
        resource_kwargs={"frame_per_point": 1},
        start=run.start_doc,
    )
    yield "start", run.start_doc
    yield "descriptor", stream.descriptor_doc
    yield "resource", resource.resource_doc
    for i in range(POINTS):
        datum = resource.compose_datum(datum_kwargs={"point_number": i})
        yield "datum", datum
        data = {"img": datum["datum_id"], "y": Y[i], "x": X[i]}
        yield (
            "event",
            stream.compose_event(
                data=data, timestamps=dict.fromkeys(data, 0.0), filled={"img": False}
            ),
        )
    yield "stop", run.compose_stop()


def tiffs(md, folder):
    run = compose_run(metadata=md)
    keys = {"img": IMAGE | {"external": "STREAM:", "shape": [1, HEIGHT, WIDTH]}}
    stream = run.compose_descriptor(name="primary", data_keys=keys)
    resource = run.compose_stream_resource(
        mimetype="multipart/related;type=image/tiff",
        uri=f"file://localhost{folder}/",
        data_key="img",
        parameters={"template": "scan_{:04d}.tif", "chunk_shape": [1, HEIGHT, WIDTH]},
    )
    yield "start", run.start_doc
    yield "descriptor", stream.descriptor_doc
    yield "stream_resource", resource.stream_resource_doc
    yield (
        "stream_datum",
        resource.compose_stream_datum(
            indices={"start": 0, "stop": POINTS},
            seq_nums={"start": 1, "stop": POINTS + 1},
            descriptor=stream.descriptor_doc,
        ),
    )
    yield "stop", run.compose_stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with a run of each kind: its client, address, and the runs' uids."""
    folder = tmp_path_factory.mktemp("views")
    with serve(folder) as url:
        client = from_uri(url)
        record = Recorder(client, folder / "frames")
        file = record.file
        whole = file("whole.h5", y=Y, x=X)
        rows = [file(f"row{i}.h5", FRAMES[i * COLUMNS : (i + 1) * COLUMNS]) for i in range(ROWS)]
        for i, frame in enumerate(FRAMES):
            tifffile.imwrite(folder / "frames" / f"scan_{i:04d}.tif", frame)
        streamed, md = record.streamed, start()
        uids = {
            "snaked": record(streamed([whole], md, motors="yx")),
            "plain": record(streamed(rows, start(snake=False), table=table())),
            "short": record(streamed([whole], md, n=13)),
            "legacy": record(legacy(md, whole)),
            "embedded": record(embedded(md)),
            "tiff": record(tiffs(md, folder / "frames")),
            "count": record(streamed([whole], {"plan_name": "count"})),
            "shapeless": record(streamed([whole], {k: v for k, v in md.items() if k != "shape"})),
            "dark": record(streamed([whole], md | {"nanobeam": {"detector": "img"}})),
        }
        again = [*range(7), *range(5, POINTS)]
        rewound = file("rewound.h5", np.concatenate([FRAMES[:7] + 1, FRAMES[5:]]))
        uids["rewound"] = record(streamed([rewound], md, n=22, table=table(order=again)))
        # which frames were kept is nowhere
        uids["untold"] = record(
            (name, doc | {"num_events": {"primary": 18}} if name == "stop" else doc)
            for name, doc in streamed([whole], md)
        )
        gone = file("gone.h5")
        uids["gone"] = record(streamed([gone], md))
        gone.unlink()
        other = file("other.h5", FRAMES[:, :128])
        uids["other"] = record(streamed([other], md))
        uids["running"] = record(streamed([whole], md, n=8, stop=False), batch=1)
        yield SimpleNamespace(client=client, url=url, folder=folder, record=record, uids=uids)
        client.context.close()


def refused(request):
    with pytest.raises(ClientError) as found:
        request()
    assert found.value.response.status_code == 422
    return str(found.value)


@pytest.mark.parametrize(
    "name", ["snaked", "plain", "legacy", "embedded", "tiff", "short", "running", "rewound"]
)
def test_scan_is_on_its_grid(server, name):
    n, snake = {"short": 13, "running": 8}.get(name, POINTS), name != "plain"
    frames = FRAMES[:n].copy()
    if name == "rewound":
        frames[:5] += 1
    scan = server.client["scans"][server.uids[name]]
    assert "problem" not in scan.metadata, scan.metadata["problem"]
    assert [spec.name for spec in scan.specs] == ["NanobeamScan"]
    found = scan["frames"]
    assert (found.dtype, found.dims) == (np.uint16, ("row", "col", "y", "x"))
    np.testing.assert_array_equal(found.read(), grid(frames, snake=snake))
    expected = grid(patterns(frames), snake=snake, blank=np.nan)
    np.testing.assert_array_equal(scan["patterns"].read(), expected)
    total = expected.sum(axis=(2, 3), dtype=float)
    np.testing.assert_array_equal(scan["intensity"].read(), total)
    np.testing.assert_allclose(scan["mean_pattern"].read(), np.nanmean(expected, axis=(0, 1)))
    if name in ("tiff", "short", "running"):
        assert np.isnan(scan["x_measured"].read()).all()
        np.testing.assert_array_equal(scan["x"].read(), [0, 1, 2, 3, 4])
        return
    for motor, values in (("y", Y), ("x", X)):
        measured = scan[f"{motor}_measured"].read()
        np.testing.assert_array_equal(measured, grid(values, snake=snake))
        assert scan[motor].metadata["attrs"]["units"] == "um"
    np.testing.assert_array_equal(scan["x"].read(), np.median(grid(X, snake=snake), axis=0))


@pytest.mark.parametrize(
    "index",
    [
        (2, 3),
        (slice(None), 1),
        (slice(3, None), slice(None, None, 2), slice(10, 20), 7),
        (slice(None, None, -1), slice(4, 0, -2), slice(None, None, 50), slice(None, None, -40)),
        (1, 1, 5, 6),
        (slice(2, 2),),
    ],
)
def test_any_slice_of_frames_and_patterns_is_that_of_the_whole(server, index):
    scan = server.client["scans"][server.uids["snaked"]]
    np.testing.assert_array_equal(scan["frames"][index], grid(FRAMES)[index])
    np.testing.assert_array_equal(scan["patterns"][index], grid(patterns(FRAMES))[index])


@pytest.mark.parametrize("name", ["snaked", "plain", "short", "running"])
@pytest.mark.parametrize("version", [2, 3])
def test_zarr_clients_read_the_same(server, name, version):
    base, _, key = server.url.partition("?api_key=")
    options = {"allow_http": True, "default_headers": {"Authorization": f"Apikey {key}"}}
    scan = f"{base}/zarr/v{version}/scans/{server.uids[name]}"
    store = zarr.storage.ObjectStore(
        obstore.store.HTTPStore.from_url(scan, client_options=options), read_only=True
    )
    n, snake = {"short": 13, "running": 8}.get(name, POINTS), name != "plain"
    frames = zarr.open_array(store, path="frames", mode="r", zarr_format=version)
    np.testing.assert_array_equal(frames[:], grid(FRAMES[:n], snake=snake))
    expected = grid(patterns(FRAMES[:n]), snake=snake, blank=np.nan)
    cut = zarr.open_array(store, path="patterns", mode="r", zarr_format=version)
    np.testing.assert_array_equal(cut[1:, 2:], expected[1:, 2:])


def test_scan_can_be_followed(server):
    record = server.record
    documents = list(record.streamed([server.folder / "frames" / "whole.h5"], start(), n=8))
    uid = record(documents[:-1], batch=1)
    scan = server.client["scans"][uid]
    assert np.isfinite(scan["intensity"].read()).sum() == 8
    record.last(*documents[-1])
    assert np.isfinite(server.client["scans"][uid]["intensity"].read()).sum() == 8
    assert server.client["scans"][uid].metadata["stop"]["exit_status"] == "success"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("count", "no SXDM scan: .*start.'nanobeam'. is missing"),
        ("shapeless", "scan shape missing"),
        ("gone", "gone.h5: No such file"),
        ("other", r"frames of \(128, 144\), the run says \(160, 144\)"),
        ("untold", "20 events with frames for 18: the scan was rewound"),
    ],
)
def test_bad_run_says_what_is_wrong_and_leaves_others_alone(server, name, words):
    scan = server.client["scans"][server.uids[name]]
    assert re.search(words, scan.metadata["problem"])
    assert len(scan) == 0
    assert re.search(words, refused(lambda: scan["frames"]))
    assert len(server.client["scans"].keys()) == len(server.client["raw"].keys())


def test_scan_without_a_geometry_has_frames_and_says_why_it_has_no_patterns(server):
    scan = server.client["scans"][server.uids["dark"]]
    assert "energy_keV or wavelength_angstrom missing" in scan.metadata["note"]
    assert "patterns" not in scan
    np.testing.assert_array_equal(scan["frames"][1, 2], FRAMES[7])


def test_scans_are_found_by_what_their_start_documents_say(server):
    found = server.client["scans"].search(Key("start.plan_name") == "count")
    assert list(found) == [server.uids["count"]]
    assert server.client["scans"].values().last().metadata["start"]["uid"]


# ------------------------------------------------------------------------ paths


@pytest.mark.parametrize("name", ["path", "link"])
def test_files_outside_the_readable_folders_are_refused(server, name):
    path = away = server.folder.parent / "away.h5"
    with h5py.File(away, "w") as file:
        file["frames"] = FRAMES
    if name == "link":
        path = server.folder / "frames" / "link.h5"
        with h5py.File(path, "w") as file:
            file["frames"] = h5py.ExternalLink(str(away), "/frames")
    documents = server.record.streamed([path], start(), dataset="frames")
    scan = server.client["scans"][server.record(documents)]
    assert "outside the folders that may be read" in refused(lambda: scan["frames"])


# ------------------------------------------------------------------------- maps


@pytest.mark.parametrize("shape", [(3, 4), (4, 4)])
def test_maps_are_those_of_the_derived_run(server, derived_documents, shape):
    flags = np.zeros(shape, dtype=int)
    flags[1, 2] = 32
    documents = derived_documents(shape, page=5, change={"flags": flags})
    write = derived_writer(server.client["derived"])
    uid = documents[0][1]["uid"]
    for done, (name, doc) in enumerate(documents, 1):
        write(name, doc)
        if done == 4 and shape == (3, 4):  # while it goes on
            some = ["strain", "flags"]
            maps = server.client["maps"][uid].read([*some, "sample_y", "sample_x"])
            xr.testing.assert_equal(maps, to_maps(documents[:4])[some])
    node = server.client["maps"][uid]
    xr.testing.assert_identical(node.read(), to_maps(documents))
    strain = node["strain"]
    assert strain.dims == ("row", "col")
    np.testing.assert_array_equal(strain[1:, ::-2], to_maps(documents)["strain"][1:, ::-2])
    assert node["omega"].metadata["attrs"]["units"] == "deg"
    assert node.metadata["start"]["original_run_uid"] == documents[0][1]["original_run_uid"]
    two = node.read(variables=["sample_x", "sample_y"])
    np.testing.assert_array_equal(two["sample_y"], to_maps(documents)["sample_y"])


def test_maps_are_found_by_raw_run_sample_plan_and_time(server, derived_documents):
    write = derived_writer(server.client["derived"])
    uids = []
    for sample in ("film", "wire"):
        documents = derived_documents((2, 3), sample=sample)
        documents[0][1]["nanobeam"] |= {"original_plan_name": f"fly_{sample}"}
        documents[0][1]["original_run_uid"] = f"raw-{sample}"
        for name, doc in documents:
            write(name, doc)
        uids.append(documents[0][1]["uid"])
    maps = server.client["maps"]
    for query in (
        Key("start.sample") == "wire",
        Key("start.original_run_uid") == "raw-wire",
        Key("start.nanobeam.original_plan_name") == "fly_wire",
    ):
        (found,) = maps.search(query).values()
        assert found.metadata["start"]["uid"] == uids[1]
        assert found["strain"].shape == (2, 3)
    assert uids[1] in maps.search(Key("start.time") > 0)


def test_derived_run_that_failed_says_why(server):
    documents = failed_run({"uid": "raw"}, "no photon energy")
    write = derived_writer(server.client["derived"])
    for name, doc in documents:
        write(name, doc)
    node = server.client["maps"][documents[0][1]["uid"]]
    assert node.metadata["problem"].endswith("no photon energy")
    assert "no photon energy" in refused(lambda: node["strain"])


def test_nothing_is_written_through_a_view(server):
    base, key = server.url.split("?")
    for tree in ("maps", "scans"):
        view = server.client[tree]
        with pytest.raises(ClientError) as refusal:
            view.create_container("x")
        assert refusal.value.response.status_code == 405
        uid = server.uids["snaked"] if tree == "scans" else view.keys().last()
        for path, methods in ((tree, ("DELETE", "PUT")), (f"{tree}/{uid}", ("DELETE", "PATCH"))):
            for method in methods:
                answer = httpx.request(
                    method, f"{base}/api/v1/metadata/{path}?{key}", json={"metadata": {}}
                )
                assert 400 <= answer.status_code < 500, (method, path, answer.text)
    assert server.uids["snaked"] in server.client["raw"]


def test_lists_are_paged_and_what_makes_no_sense_is_refused(server):
    base, key = server.url.split("?")
    answer = httpx.get(f"{base}/api/v1/container/full/scans?format=json&{key}")
    assert (answer.status_code, "ask for one" in answer.text) == (400, True)
    deep = httpx.get(f"{base}/api/v1/search-deep/maps?{key}")
    assert 400 <= deep.status_code < 500
    everywhere = httpx.get(f"{base}/api/v1/search-deep/?{key}")
    assert {item["id"] for item in everywhere.json()["data"]} >= {"raw", "maps"}
    pages = f"{base}/api/v1/search/scans/{server.uids['snaked']}?{key}&page[limit]=3"
    names = []
    while pages:
        page = httpx.get(pages if key in pages else f"{pages}&{key}").json()
        names += [item["id"] for item in page["data"]]
        pages = page["links"]["next"]
    assert names == list(server.client["scans"][server.uids["snaked"]])
    query = '{"text": "film"}'
    refusal = httpx.get(
        f"{base}/api/v1/search/scans/{server.uids['snaked']}?{key}",
        params={"filter[fulltext][condition][text]": query} | dict([key.split("=")]),
    )
    assert refusal.status_code == 400
