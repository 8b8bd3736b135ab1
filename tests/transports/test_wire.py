"""Documents as bytes: what is written is read, what could harm is not."""

import json
import pickle
from contextlib import suppress
from functools import partial

import msgpack
import msgpack_numpy
import numpy as np
import pytest
from event_model import compose_run
from hypothesis import given, settings
from hypothesis import strategies as st

from nanobeam_bluesky.transports import Receiver, decode, to_json, to_msgpack

DOC = {
    "uid": "a",
    "seq_num": 3,
    "data": {"x": np.float64(1.5), "n": [1, 2], "nan": float("nan"), "text": "µm", "none": None},
}


@pytest.mark.parametrize(
    "encode", [to_json, to_msgpack, *(partial(pickle.dumps, protocol=p) for p in range(2, 6))]
)
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


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "value",
    [
        np.arange(12, dtype=">u2").reshape(3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["ab", "µ"]),
        np.array([True, False]),
        np.zeros((0, 3)),
        np.float32(1.5),
        np.bool_(True),
    ],
)
def test_arrays_in_pickles_are_read(value, protocol):
    found = decode(pickle.dumps({"x": [value]}, protocol))["x"][0]
    np.testing.assert_array_equal(found, value)
    assert np.asarray(found).dtype == value.dtype


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("it was run",))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps({"x": Harm()}), "a pickle with _pytest.outcomes"),
        (pickle.dumps(np.array([Harm()]), protocol=2), "a pickle with _pytest.outcomes"),
        (pickle.dumps({"x": np.array([None])}), "expected numbers"),
        (pickle.dumps(Harm(), protocol=0), "expected JSON"),
        (
            msgpack.packb(
                {b"nd": True, b"type": "|O", b"kind": b"O", b"data": pickle.dumps(Harm())}
                | {b"shape": [1]}
            ),
            "expected numbers",
        ),
        (b"", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
    ],
)
def test_nothing_in_a_message_is_called(data, words):
    with pytest.raises(ValueError, match=words):
        decode(data)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_altered_pickles_give_plain_things_or_are_refused(changes):
    image = np.arange(6, dtype=np.uint16).reshape(2, 3)
    data = bytearray(pickle.dumps({"uid": "a", "img": image, "s": {1}}, protocol=4))
    for at, value in changes:
        data[at % len(data)] = value
    with suppress(Exception):
        plain = to_json(decode(bytes(data)))
        assert isinstance(plain, bytes)


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
