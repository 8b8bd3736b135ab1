"""Messages between the callback and its worker."""

import io

import numpy as np
import pytest

from nanobeam_bluesky.documents import PointBlock, Processed, StoredRows, Task
from nanobeam_bluesky.models import Estimates, Flag
from nanobeam_bluesky.worker import (
    decode_processed,
    decode_task,
    encode_processed,
    encode_task,
    receive,
    send,
)

TASK = Task(
    "run",
    7,
    (
        PointBlock(1, 3, stored=StoredRows("/a b.h5", "d", 4, 2)),
        PointBlock(9, 2, values=np.arange(12, dtype=">u2").reshape(2, 2, 3)),
        PointBlock(11, 1, problem="gone"),
    ),
    {"x": (PointBlock(1, 3, stored=StoredRows("/p.h5", "x", 0)),)},
)


def through_a_pipe(message, arrays):
    pipe = io.BytesIO()
    send(pipe, message, arrays)
    pipe.seek(0)
    return receive(pipe)


def test_a_task_arrives_as_it_was():
    task = decode_task(*through_a_pipe(*encode_task(TASK)))
    np.testing.assert_array_equal(task.frames[1].values, TASK.frames[1].values)
    assert task.frames[0] == TASK.frames[0]
    assert task.frames[2] == TASK.frames[2]
    assert task.positions == TASK.positions
    assert task.points.tolist() == [1, 2, 3, 9, 10, 11]


def test_an_answer_arrives_as_it_was():
    done = Processed(
        TASK,
        np.arange(6, dtype=np.int8),
        Estimates.empty(6, Flag.MISFIT),
        {"x": np.linspace(0, 1, 6)},
        np.zeros(6, np.int8),
        "why",
    )
    back = decode_processed(*through_a_pipe(*encode_processed(done)), TASK)
    assert back.status.tolist() == list(range(6))
    assert back.reason == "why"
    assert back.estimates.flags.tolist() == [Flag.MISFIT] * 6
    assert np.isnan(back.estimates.strain).all()
    np.testing.assert_array_equal(back.positions["x"], done.positions["x"])


def test_an_empty_array_arrives():
    _, (array,) = through_a_pipe({"kind": "x"}, [np.empty((0, 3))])
    assert array.shape == (0, 3)


def test_a_message_that_breaks_off_is_the_end():
    pipe = io.BytesIO()
    send(pipe, {"kind": "x"}, [np.arange(10)])
    for length in (0, 5, len(pipe.getvalue()) - 1):
        assert receive(io.BytesIO(pipe.getvalue()[:length])) is None


def test_an_array_of_objects_is_refused():
    with pytest.raises(ValueError, match="expected numbers"):
        receive(io.BytesIO(b'{"arrays": [["|O", [1]]]}\n' + bytes(8)))
