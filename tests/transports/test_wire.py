"""Documents as bytes: what is written is read, what could harm is not."""

import json
import pickle

import msgpack
import msgpack_numpy
import numpy as np
import pytest
from event_model import compose_run

from nanobeam_bluesky.transports import Receiver, decode, to_json, to_msgpack

DOC = {
    "uid": "a",
    "seq_num": 3,
    "data": {"x": np.float64(1.5), "n": [1, 2], "nan": float("nan"), "text": "µm", "none": None},
}


@pytest.mark.parametrize("encode", [to_json, to_msgpack])
def test_a_document_is_read_as_it_was_written(encode):
    image = np.arange(6, dtype=np.uint16).reshape(2, 3)
    found = decode(encode(DOC | {"img": image}))
    np.testing.assert_array_equal(found["img"], image)
    assert np.isnan(found["data"].pop("nan"))
    assert found["data"] == {"x": 1.5, "n": [1, 2], "text": "µm", "none": None}
    assert (found["uid"], found["seq_num"]) == ("a", 3)


def test_msgpack_is_that_of_bluesky_kafka():
    image = np.arange(6, dtype="<i4").reshape(3, 2)
    theirs = msgpack.packb(
        ["event", {"img": image, "x": image[2, 1]}], default=msgpack_numpy.encode
    )
    name, doc = decode(theirs)
    assert (name, doc["x"]) == ("event", 5)
    np.testing.assert_array_equal(doc["img"], image)
    ours = msgpack.unpackb(to_msgpack({"img": image}), object_hook=msgpack_numpy.decode)
    np.testing.assert_array_equal(ours["img"], image)


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("it was run",))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps({"x": Harm()}), "found a pickle"),
        (pickle.dumps(Harm(), protocol=0), "expected JSON or msgpack"),
        (
            msgpack.packb(
                {b"nd": True, b"type": "|O", b"kind": b"O", b"data": pickle.dumps(Harm())}
            ),
            "expected numbers",
        ),
        (b"", "expected JSON or msgpack"),
        (b"\xff\xfe", "expected JSON or msgpack"),
    ],
)
def test_nothing_is_unpickled_unasked(data, words):
    with pytest.raises(ValueError, match=words):
        decode(data)


def test_pickles_are_read_where_they_are_allowed():
    assert decode(pickle.dumps({"uid": "a"}), allow_pickle=True) == {"uid": "a"}


def test_a_run_met_in_its_middle_is_told_of_once(caplog):
    run = compose_run()
    key = {"dtype": "number", "shape": [], "source": "test"}
    stream = run.compose_descriptor(name="primary", data_keys={"x": key})
    event = stream.compose_event(data={"x": 1}, timestamps={"x": 0.0})
    seen = []
    receive = Receiver(lambda name, doc: seen.append(name))
    for name, doc in [
        ("descriptor", stream.descriptor_doc),
        ("event", event),
        ("stop", run.compose_stop()),
    ]:
        receive(name, doc)
    assert receive.runs_missed == 1
    assert caplog.text.count("met in its middle") == 1
    whole = compose_run()
    receive("start", whole.start_doc)
    receive("stop", whole.compose_stop())
    assert (receive.runs_missed, receive.unreadable) == (1, 0)
    assert seen[-2:] == ["start", "stop"]


def test_what_is_no_document_is_counted_and_passed_to_no_one(caplog):
    receive = Receiver(lambda name, doc: pytest.fail(f"{name} came"))
    for name, doc in [("start", "expected JSON"), ("weather", {}), ("start", {}), ("stop", None)]:
        receive(name, doc)
    assert receive.unreadable == 4
    assert caplog.text.count("is no document") == 1
    assert json.loads(to_json({"a": {1}})) == {"a": [1]}
