"""Documents of real devices become references to the right frames."""

import json
from pathlib import Path

import numpy as np
import pytest
from event_model import unpack_event_page

from nanobeam_bluesky.documents import PointBlock, RunReferences, StoredRows
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


def rows_of_points(name, references, label="frames"):
    """Point number → (file, dataset, first row, rows), as the last document said."""
    found = {}
    for kind, doc in recording(name):
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


def test_datum_documents_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="resource and datum"):
        rows_of_points("legacy_step", RunReferences(("motor", "x")))


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
    ("uri", "words"),
    [
        ("https://example.org/a.h5", "file on this machine"),
        ("file://elsewhere/data/a.h5", "file on this machine"),
    ],
)
def test_frames_that_are_not_local_are_a_problem_of_their_points(uri, words):
    references = RunReferences(("y", "x"))
    problems = []
    for kind, doc in recording("restage_rows"):
        changed = doc | {"uri": uri} if kind == "stream_resource" else doc
        problems += [b.problem for _, b in references.document(kind, changed, WHOLE)]
    assert problems
    assert all(words in problem for problem in problems)


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
