"""Documents of real devices become references to the right frames."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from event_model import unpack_event_page
from hypothesis import given, settings
from hypothesis import strategies as st

from nanobeam_bluesky.documents import PointBlock, RunReferences, StoredRows
from nanobeam_bluesky.documents import references as references_module
from nanobeam_bluesky.documents.references import SURPLUS_POINTS
from nanobeam_bluesky.documents.resources import Resource
from nanobeam_bluesky.geometry import ROI

RECORDINGS = Path(__file__).with_name("recordings")
WHOLE = ROI(row=0, col=0, height=8, width=8)


def recording(name):
    """Documents of a recording; arrays that it left out count up from the point number."""

    def fill(value, number):
        if isinstance(value, dict) and "__ndarray__" in value:
            return np.full(value["__ndarray__"], number, value["dtype"])
        return [fill(v, number) for v in value] if isinstance(value, list) else value

    for line in (RECORDINGS / f"{name}.jsonl").read_text().splitlines():
        item = json.loads(line.replace("{DATA}", "/data"))
        if item["name"] == "event_page":
            data = item["doc"]["data"]
            for key, column in data.items():
                if isinstance(column, dict):
                    data[key] = np.stack(
                        [np.full(column["__ndarray__"][1:], n) for n in item["doc"]["seq_num"]]
                    )
                else:
                    pairs = zip(column, item["doc"]["seq_num"], strict=True)
                    data[key] = [fill(v, n) for v, n in pairs]
        yield item["name"], item["doc"]


def rows_of_points(documents, references, label="frames"):
    """Point number → (file, dataset, first row, rows), as the last document said."""
    found = {}
    for kind, doc in recording(documents) if isinstance(documents, str) else documents:
        for key, block in references.document(kind, doc, WHOLE):
            if key == label:
                for point in range(block.first, block.stop):
                    one = block.part(point, point + 1).stored
                    found[point] = (one.path, one.dataset, one.row, one.rows_per_point)
    return found


@pytest.mark.parametrize("name", ["ophyd_async_fly", "ophyd_async_rows_reprepare"])
def test_every_point_of_a_fly_scan_has_the_row_of_its_frame(name):
    references = RunReferences(("y", "x"), detector="det")
    rows = rows_of_points(name, references)
    count = max(rows)
    assert sorted(rows) == list(range(1, count + 1))
    assert [rows[p][2] for p in sorted(rows)] == list(range(count))
    assert {(d, k) for _, d, _, k in rows.values()} == {("/entry/data/data", 1)}


def test_a_restaged_row_counts_from_zero_in_its_own_file():
    rows = rows_of_points("restage_rows", RunReferences(("y", "x")))
    assert [rows[p][2] for p in range(1, 13)] == [0, 1, 2, 3] * 3
    assert len({rows[p][0] for p in range(1, 13)}) == 3


def test_several_frames_of_a_point_are_that_many_rows():
    rows = rows_of_points("ophyd_async_cpe2", RunReferences(("y", "x")))
    assert [rows[p][2:] for p in range(1, 6)] == [(2 * i, 2) for i in range(5)]


def test_a_streamed_scalar_named_as_motor_is_a_position():
    references = RunReferences(("det-sum", "x"), detector="det")
    rows = rows_of_points("ophyd_async_fly", references, label="det-sum")
    assert [rows[p][1:3] for p in range(1, 13)] == [("/entry/sum", i) for i in range(12)]
    assert references.announced == {"det-sum"}


def as_events(documents):
    """Every event page as single events."""
    for kind, doc in documents:
        if kind == "event_page":
            yield from (("event", event) for event in unpack_event_page(doc))
        else:
            yield kind, doc


@pytest.mark.parametrize("form", [iter, as_events])
@pytest.mark.parametrize("name", ["embedded_events", "embedded_pages"])
def test_embedded_images_come_with_their_point_and_position(name, form):
    references = RunReferences(("y", "x"))
    images, positions = {}, {}
    for kind, doc in form(recording(name)):
        for label, block in references.document(kind, doc, ROI(row=1, col=2, height=4, width=3)):
            target = images if label == "frames" else positions
            for point in range(block.first, block.stop):
                target[point] = block.part(point, point + 1).values[0]
    assert sorted(images) == sorted(positions) == list(range(1, len(images) + 1))
    for point, image in images.items():
        assert image.shape == (4, 3)
        assert np.all(image == point)


def test_several_images_without_a_choice_are_refused_with_their_names():
    references = RunReferences(("y", "x"))
    with pytest.raises(ValueError, match=r"det, det2.*nanobeam\['detector'\]"):
        rows_of_points("ophyd_async_fly", references)


def moved(documents, name, where):
    """The documents of one kind moved to the front, or to the end, of their run."""
    start, descriptor, *others = documents
    these = [d for d in others if d[0] == name]
    rest = [d for d in others if d[0] != name]
    return (
        [start, descriptor, *these, *rest] if where == "front" else [*documents[:2], *rest, *these]
    )


ORDERS = {
    "as they came": list,
    "events before datums": lambda documents: moved(documents, "datum", "end"),
    "datums before resources": lambda documents: moved(documents, "resource", "end"),
    "all twice": lambda documents: [d for d in documents for _ in range(2)],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(
    ("name", "shape", "count", "frames"),
    [
        ("legacy_fly_event_per_row", (3, 4), 12, 1),
        ("legacy_fly_event_per_row", (3, 1), 3, 4),  # as many as no row has: of one point
        ("legacy_fly_one_event", (3, 4), 12, 1),
        ("legacy_fly_one_event", None, 1, 12),
    ],
)
def test_an_event_holds_a_point_a_row_or_the_scan(name, shape, count, frames, order):
    documents = order(list(recording(name)))
    rows = rows_of_points(documents, RunReferences(("y", "x"), shape=shape))
    assert rows.keys() == set(range(1, count + 1))
    assert [rows[p][1:] for p in sorted(rows)] == [
        ("/entry/data/data", i * frames, frames) for i in range(count)
    ]


def test_an_event_with_one_number_of_the_fast_motor_is_a_point():
    documents = list(recording("legacy_fly_event_per_row"))
    documents[1][1]["data_keys"]["x"] = {"dtype": "number", "shape": [], "source": "SIM"}
    rows = rows_of_points(documents, RunReferences(("y", "x"), shape=(3, 4)))
    assert [rows[p][2:] for p in sorted(rows)] == [(0, 4), (4, 4), (8, 4)]


def test_one_number_of_the_slow_motor_holds_for_its_row():
    documents = list(recording("legacy_fly_event_per_row"))
    documents[-2][1]["data"]["y"] = [0.5, 1.5, 2.5]
    documents[1][1]["data_keys"]["y"] = {"dtype": "number", "shape": [], "source": "SIM"}
    references = RunReferences(("y", "enc1"), shape=(3, 4))
    blocks = [
        b for n, d in documents for label, b in references.document(n, d, WHOLE) if label == "y"
    ]
    assert [v for b in blocks for v in b.values] == [0.5] * 4 + [1.5] * 4 + [2.5] * 4
    # and the same in a file
    uid = documents[1][1]["uid"]
    documents[1][1]["data_keys"]["y"]["external"] = "STREAM:"
    documents[-2:-1] = [
        (
            "stream_resource",
            {
                "uid": "s",
                "data_key": "y",
                "mimetype": "application/x-hdf5",
                "uri": "file:///data/p.h5",
                "parameters": {"dataset": "y"},
            },
        ),
        (
            "stream_datum",
            {
                "uid": "s/0",
                "stream_resource": "s",
                "descriptor": uid,
                "seq_nums": {"start": 1, "stop": 4},
                "indices": {"start": 0, "stop": 3},
            },
        ),
    ]
    references = RunReferences(("y", "enc1"), shape=(3, 4))
    rows = rows_of_points(documents, references, label="y")
    assert [rows[p][2] for p in range(1, 13)] == [0] * 4 + [1] * 4 + [2] * 4
    assert rows[1][0] == "/data/p.h5"


@pytest.mark.parametrize("name", ["legacy_fly_event_per_row", "legacy_fly_one_event"])
def test_oversampled_positions_of_an_event_are_averaged_for_each_of_its_points(name):
    references = RunReferences(("y", "enc1"), shape=(3, 4))
    positions = {}
    for kind, doc in recording(name):
        if kind == "event_page":
            samples = np.repeat(np.arange(12.0), 10) + np.tile(np.linspace(-0.1, 0.1, 10), 12)
            doc["data"]["enc1"] = list(samples.reshape(len(doc["seq_num"]), -1))
        for label, block in references.document(kind, doc, WHOLE):
            if label == "enc1":
                positions |= dict(zip(range(block.first, block.stop), block.values, strict=True))
    assert sorted(positions) == list(range(1, 13))
    np.testing.assert_allclose([positions[p] for p in range(1, 13)], np.arange(12.0), atol=1e-12)


@pytest.mark.parametrize(
    ("resource", "datum", "where"),
    [
        ({"spec": "AD_HDF5_SWMR"}, {"point_number": 3}, ("/entry/data/data", 12, 4, 0)),
        (
            {"spec": "AD_HDF5_SWMR_STREAM", "resource_kwargs": {"dataset": "/a/b"}},
            {"point_number": 3},
            ("/a/b", 3, 1, 0),
        ),
        (
            {"spec": "AD_HDF5_GERM", "resource_kwargs": {}},
            {"frame": 5},
            ("/entry/data/data", 5, 1, 0),
        ),
        ({"spec": "MERLIN_HDF5_BULK", "resource_kwargs": {}}, {}, ("/entry/data/data", 0, 4, 0)),
    ],
)
def test_datums_of_area_detectors_are_rows_of_their_file(resource, datum, where):
    documents = list(recording("legacy_fly_event_per_row"))
    kind, doc = documents[2]
    documents[2] = (kind, doc | resource)
    documents[3:6] = [(n, d | {"datum_kwargs": datum}) for n, d in documents[3:6]]
    references = RunReferences(("y", "x"))
    (block,) = {
        (b.stored.dataset, b.stored.row, b.stored.rows_per_point, b.stored.shared_by)
        for n, d in documents
        for label, b in references.document(n, d, WHOLE)
    }
    assert block == where


def test_numbers_of_a_whole_dataset_are_shared_by_the_points_of_the_event():
    """As HXN's PandA: the datum names a dataset, the descriptor nothing of its length."""
    documents = list(recording("legacy_fly_one_event"))
    documents[1][1]["data_keys"]["enc1"] |= {"shape": [], "external": "FILESTORE:"}
    uid = documents[0][1]["uid"]
    page = documents[-2][1]
    page["data"]["enc1"], page["filled"]["enc1"] = ["p/0"], [False]
    panda = {"uid": "p", "spec": "PANDA", "root": "/data", "resource_path": "p.h5"}
    documents[2:2] = [
        ("resource", panda | {"resource_kwargs": {}, "run_start": uid}),
        ("datum", {"resource": "p", "datum_id": "p/0", "datum_kwargs": {"field": "inenc2_val"}}),
    ]
    references = RunReferences(("y", "enc1"), shape=(3, 4))
    blocks = [
        b for n, d in documents for label, b in references.document(n, d, WHOLE) if label == "enc1"
    ]
    stored = StoredRows("/data/p.h5", "inenc2_val", 0, shared_by=12)
    assert blocks == [PointBlock(1, 12, stored=stored)]


@pytest.mark.parametrize("kind", ["datum_page", "bulk_datum"])
def test_datums_come_in_pages_too(kind):
    documents = list(recording("legacy_fly_event_per_row"))
    datums = [d for n, d in documents if n == "datum"]
    page = {
        "datum_page": {
            "datum_id": [d["datum_id"] for d in datums],
            "datum_kwargs": {"point_number": [0, 1, 2]},
        },
        "bulk_datum": {
            "datum_ids": [d["datum_id"] for d in datums],
            "datum_kwarg_list": [d["datum_kwargs"] for d in datums],
        },
    }[kind]
    documents[3:6] = [(kind, {"resource": datums[0]["resource"], **page})]
    rows = rows_of_points(documents, RunReferences(("y", "x"), shape=(3, 4)))
    assert [rows[p][2] for p in range(1, 13)] == list(range(12))


def test_what_never_came_is_a_problem_of_its_points_when_the_run_stops():
    for missing in ("datum", "resource"):
        documents = [d for d in recording("legacy_fly_event_per_row") if d[0] != missing]
        references = RunReferences(("y", "x"), shape=(3, 4))
        assert not rows_of_points(documents, references)
        blocks = [b for _, b in references.finish()]
        assert [p for b in blocks for p in range(b.first, b.stop)] == list(range(1, 13))
        assert all("never came" in b.problem for b in blocks)
    documents = [d for d in recording("restage_rows") if d[0] != "stream_resource"]
    references = RunReferences(("y", "x"))
    rows_of_points(documents, references)
    blocks = [b for _, b in references.finish()]
    assert sorted({p for b in blocks for p in range(b.first, b.stop)}) == list(range(1, 13))


def test_a_datum_before_its_resource_is_kept():
    documents = list(recording("restage_rows"))
    resources = [d for d in documents if d[0] == "stream_resource"]
    others = [d for d in documents if d[0] != "stream_resource"]
    references = RunReferences(("y", "x"))
    points = [
        block.first
        for kind, doc in [*others, *resources]
        for label, block in references.document(kind, doc, WHOLE)
        if label == "frames"
    ]
    assert sorted(points) == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"uri": "https://example.org/a.h5"}, "file on this machine"),
        ({"uri": "file://elsewhere/data/a.h5"}, r"root_map=\{'//elsewhere/"),
        ({"uri": "file://localhost/data/%2e%2e/etc/a.h5"}, r"without '\.\.'"),
        ({"uri": "file://localhost/data/a%00.h5"}, "expected a path"),
        ({"uri": "a.h5"}, "absolute path"),
        ({"uri": None}, "file on this machine|absolute path"),
        ({"mimetype": "text/csv"}, "expected HDF5, TIFF or NumPy, found 'text/csv'"),
        ({"parameters": {}}, "name of a dataset"),
        ({"parameters": {"dataset": "d", "template": "{0.__class__}.h5"}}, "expected a number"),
        ({"parameters": {"dataset": "d", "template": "{:09999999d}.h5"}}, "expected a number"),
        ({"parameters": {"dataset": "d", "template": "/../{:d}.h5"}}, r"without '\.\.'"),
        ({"parameters": {"dataset": "d", "template": "{:d}{:d}.h5"}}, "one number"),
    ],
)
def test_frames_that_must_not_be_read_are_a_problem_of_their_points(changes, words):
    references = RunReferences(("y", "x"))
    blocks = []
    for kind, doc in recording("restage_rows"):
        changed = doc | changes if kind == "stream_resource" else doc
        blocks += [b for _, b in references.document(kind, changed, WHOLE)]
    assert sorted({p for b in blocks for p in range(b.first, b.stop)}) == list(range(1, 13))
    assert all(re.search(words, b.problem) for b in blocks), blocks[0].problem


@pytest.mark.parametrize("spec", ["AD_HDF5", "AD_TIFF", "NPY_SEQ"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resource_path": "../etc/a"}, r"without '\.\.'"),
        ({"resource_path": "..\\a", "path_semantics": "windows"}, r"without '\.\.'"),
        ({"root": "/data/..", "resource_path": "a"}, r"without '\.\.'"),
        ({"root": "http://elsewhere", "resource_path": "a"}, "absolute path"),
        ({"root": "", "resource_path": "a"}, "absolute path"),
        ({"root": "/up", "resource_path": "a"}, r"without '\.\.'"),
        ({"root": "/relative", "resource_path": "a"}, "absolute path"),
        ({"resource_path": "a\0"}, "expected a path"),
    ],
)
def test_a_resource_leads_nowhere_but_to_an_absolute_path_below_its_root(spec, changes, words):
    kwargs = {"template": "%s%s_%d.tif", "filename": "i"} if spec == "AD_TIFF" else {}
    doc = {"uid": "r", "spec": spec, "root": "/data", "resource_kwargs": kwargs} | changes
    resource = Resource.parse(doc, {"/up": "/mnt/../etc", "/relative": "mnt"})
    assert re.search(words, resource.problem), resource


@pytest.mark.parametrize(
    ("template", "filename"),
    [("%s/../%s_%d.tif", "i"), ("%s%s_%d.tif", "../i"), ("%s%s_%d/../i", "")],
)
def test_the_files_of_a_sequence_lie_below_their_folder(template, filename):
    kwargs = {"template": template, "filename": filename}
    doc = {"uid": "r", "spec": "AD_TIFF", "root": "/data", "resource_path": "a"}
    assert "without '..'" in Resource.parse(doc | {"resource_kwargs": kwargs}, {}).problem


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file://localhost/ioc/data/a.h5", "/mnt/a.h5"),
        ("file:///ioc/data2/a.h5", "/ioc/data2/a.h5"),
        ("file://ioc1/disk/x/a.h5", "/nfs/x/a.h5"),
        ("file://localhost/C:/x/a.h5", "/windows/x/a.h5"),
    ],
)
def test_paths_of_other_mounts_are_mapped_by_their_longest_prefix(uri, path):
    root_map = {
        "/ioc": "/wrong",
        "/ioc/data": "/mnt",
        "/ioc/data2": "/ioc/data2",
        "//ioc1/disk": "/nfs/",
        "/C:": "/windows",
    }
    references = RunReferences(("y", "x"), root_map=root_map)
    documents = [
        (n, d | {"uri": uri} if n == "stream_resource" else d) for n, d in recording("restage_rows")
    ]
    assert {r[0] for r in rows_of_points(documents, references).values()} == {path}


@pytest.mark.parametrize(
    ("resource", "path"),
    [
        ({"root": "/data", "resource_path": "a/b.h5"}, "/data/a/b.h5"),
        ({"root": "/data/", "resource_path": "/data/a/b.h5"}, "/data/a/b.h5"),
        ({"root": "/", "resource_path": "data/b.h5"}, "/data/b.h5"),
        ({"root": "", "resource_path": "/data/b.h5"}, "/data/b.h5"),
        (
            {"root": "C:\\data", "resource_path": "a\\b.h5", "path_semantics": "windows"},
            "/mnt/data/a/b.h5",
        ),
    ],
)
def test_root_and_path_of_a_resource_are_joined(resource, path):
    references = RunReferences(("y", "x"), root_map={"C:": "/mnt"})
    documents = [
        (n, d | resource if n == "resource" else d)
        for n, d in recording("legacy_fly_event_per_row")
    ]
    assert {r[0] for r in rows_of_points(documents, references).values()} == {path}


def test_the_oldest_stream_resources_are_read():
    """Those with spec, root and resource_path instead of mimetype and uri."""
    documents = list(recording("restage_rows"))
    for i, (kind, doc) in enumerate(documents):
        if kind == "stream_resource":
            doc = {k: doc[k] for k in ("uid", "data_key", "run_start")}
            doc |= {"spec": "AD_HDF5_SWMR_STREAM", "root": "/data", "resource_path": f"{i}.h5"}
            documents[i] = (kind, doc | {"resource_kwargs": {"path": "/d"}})
    rows = rows_of_points(documents, RunReferences(("y", "x")))
    assert {d for _, d, _, _ in rows.values()} == {"/d"}


@pytest.mark.parametrize(
    ("kind", "mimetype", "parameters", "frames", "where"),
    [
        ("stream", "image/tiff", {"template": "/i_{:06d}.tif"}, 1, ("/d/i_{:06d}.tif", 2, 1, 1)),
        ("stream", "image/tiff", {"template": "/i_%05d.tif"}, 1, ("/d/i_{:05d}.tif", 2, 1, 1)),
        (
            "stream",
            "image/tiff",
            {"template": "/%s_%6.6d.tif", "filename": "a{b}"},
            2,
            ("/d/a{{b}}_{:06d}.tif", 4, 2, 2),
        ),
        (
            "stream",
            "image/tiff",
            {"template": "/{filename}_{}.tif", "filename": "ab", "chunk_shape": [1, 8, 8]},
            2,
            ("/d/ab_{:d}.tif", 4, 2, 1),
        ),
        (
            "stream",
            "image/tiff",
            {"template": "/{:d}.tif", "files_per_datum": 2},
            4,
            ("/d/{:d}.tif", 8, 4, 2),
        ),
        (
            "stream",
            "x-hdf5",
            {"template": "/{:d}.h5", "dataset": "d", "multiplier": 2},
            1,
            ("/d/{:d}.h5", 4, 2, 1),
        ),
    ],
)
def test_sequences_of_files_are_numbered(kind, mimetype, parameters, frames, where):
    references = RunReferences(("y", "x"))
    documents = list(recording("restage_rows"))[:5]
    documents[1][1]["data_keys"]["det"]["shape"] = [frames, 240, 320]
    prefix = "multipart/related;type=" if mimetype == "image/tiff" else "application/"
    documents[2] = (
        "stream_resource",
        documents[2][1]
        | {"uri": "file:///d/", "mimetype": prefix + mimetype, "parameters": parameters},
    )
    datum = documents[4][1] | {
        "seq_nums": {"start": 3, "stop": 5},
        "indices": {"start": 2, "stop": 4},
    }
    documents[4] = ("stream_datum", datum)
    (block,) = (b for n, d in documents for _, b in references.document(n, d, WHOLE))
    s = block.stored
    assert (block.first, block.count) == (3, 2)
    assert (s.path, s.row, s.rows_per_point, s.rows_per_file) == where
    assert s.path.format(7)


HOSTILE = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**12, -(10**12), 2**63, 10**30, 1e308, float("nan")])
    | st.sampled_from(["", "det", "x", "../..", "{}", "%s%s", "\0"])
    | st.lists(st.integers(-1, 10**9), max_size=4)
    | st.dictionaries(st.sampled_from(["start", "stop", "shape"]), st.integers(-2, 10**13))
)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_whatever_a_document_says_costs_at_most_itself(data):
    """Fields of every depth are replaced, left out or doubled, and documents reordered."""
    name = data.draw(
        st.sampled_from(["legacy_fly_event_per_row", "restage_rows", "embedded_pages"])
    )
    documents = [(n, d) for n, d in recording(name) if n != "start"]
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(documents) - 1))
        value = documents[i][1]
        while isinstance(value, dict) and value:
            key = data.draw(st.sampled_from(sorted(value)))
            if not isinstance(value[key], dict) or data.draw(st.booleans()):
                if data.draw(st.booleans()):
                    value[key] = data.draw(HOSTILE)
                else:
                    del value[key]
                break
            value = value[key]
    if data.draw(st.booleans()):
        documents = data.draw(st.permutations(documents))
    notes = []
    references = RunReferences(("y", "x"), shape=(3, 4), note=notes.append)
    try:
        blocks = [b for n, d in documents for _, b in references.document(n, d, WHOLE)]
    except ValueError as error:
        assert "several images" in str(error)
        return
    blocks += [b for _, b in references.finish()]
    for block in blocks:
        assert 1 <= block.first < block.stop <= 12 + SURPLUS_POINTS + 1
        assert (block.stored is None) + (block.values is None) + (not block.problem) == 2
        if block.values is not None:
            assert len(block.values) == block.count
        json.dumps(block.stored and asdict(block.stored))


@pytest.mark.parametrize(
    ("numbers", "points"),
    [
        ({"start": 1, "stop": 10**12}, 12 + SURPLUS_POINTS),
        ({"start": 10**12, "stop": 10**12 + 5}, 0),
        ({"start": 5, "stop": 2}, 0),
        ({"start": -5, "stop": 2}, 0),
        ({"start": "1", "stop": "5"}, 0),
        ({"start": 3, "stop": 3}, 0),
        ({}, 0),
    ],
)
def test_impossible_numbers_of_points_are_ignored_with_a_reason(numbers, points):
    notes = []
    references = RunReferences(("y", "x"), shape=(3, 4), note=notes.append)
    documents = list(recording("restage_rows"))[:5]
    documents[4] = ("stream_datum", documents[4][1] | {"seq_nums": numbers})
    blocks = [b for n, d in documents for _, b in references.document(n, d, WHOLE)]
    assert sum(b.count for b in blocks) == points
    assert bool(notes) == (numbers != {"start": 3, "stop": 3})


def test_datums_that_no_event_asks_for_are_forgotten(monkeypatch):
    monkeypatch.setattr(references_module, "MAX_KEPT", 50)
    notes = []
    references = RunReferences(("y", "x"), note=notes.append)
    documents = list(recording("legacy_fly_event_per_row"))
    for n, d in documents[:3]:
        list(references.document(n, d, WHOLE))
    datum, page = documents[3][1], documents[6][1]
    for i in range(200):
        d = datum | {"datum_id": f"never asked for {i}", "datum_kwargs": {"point_number": i}}
        list(references.document("datum", d, WHOLE))
    event = page | {"seq_num": [1], "data": {"eiger1_image": ["never asked for 199"]}}
    assert len(list(references.document("event_page", event, WHOLE))) == 1
    event = page | {"seq_num": [2], "data": {"eiger1_image": ["never asked for 0"]}}
    assert not list(references.document("event_page", event, WHOLE))
    assert len(list(references.finish())) == 1


def test_a_percent_encoded_path_is_decoded():
    references = RunReferences(("y", "x"))
    paths = set()
    for kind, doc in recording("restage_rows"):
        if kind == "stream_resource":
            doc = doc | {"uri": "file://localhost/data/my%20scan.h5"}
        paths |= {b.stored.path for _, b in references.document(kind, doc, WHOLE)}
    assert paths == {"/data/my scan.h5"}


def test_parts_and_joins_of_a_block_keep_rows_and_points_together():
    block = PointBlock(5, 10, stored=StoredRows("a.h5", "d", 8, rows_per_point=2))
    left, right = block.part(5, 9), block.part(9, 15)
    assert (right.stored.row, right.first, right.stop) == (16, 9, 15)
    assert left.joined(right) == block
    assert right.joined(left) is None


def test_frames_smaller_than_the_roi_cost_only_their_points():
    references = RunReferences(("y", "x"))
    blocks = []
    for kind, doc in recording("embedded_events"):
        if kind == "event_page":
            doc["data"]["img"][1] = np.zeros((4, 4), np.uint16)
            doc["data"]["img"][2] = np.array([["a"]])
        blocks += [b for label, b in references.document(kind, doc, WHOLE) if label == "frames"]
    assert [(b.first, b.count, bool(b.problem)) for b in blocks] == [
        (1, 1, False),
        (2, 1, True),
        (3, 1, True),
        (4, 1, False),
    ]
    assert "4 × 4" in blocks[1].problem
