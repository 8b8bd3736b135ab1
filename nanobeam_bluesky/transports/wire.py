"""Documents as bytes. What is read may come from anyone, so it is never unpickled unasked.

Arrays in msgpack follow msgpack-numpy, as bluesky-kafka does: a map with the keys ``nd``,
``type``, ``kind``, ``shape`` and ``data``. That package itself is not used, as it unpickles
arrays of objects (``msgpack_numpy.decode``).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

__all__ = ["SERIALIZERS", "decode", "to_json", "to_msgpack"]

_MAP = frozenset([*range(0x81, 0x90), 0xDE, 0xDF])
"""First bytes of a msgpack map that is not empty."""
_ARRAY = frozenset([0x92])
"""First byte of a msgpack array of two, as ``[name, document]``."""


def to_json(doc: Any) -> bytes:
    """Write a document as JSON; arrays become lists, NaN stays ``NaN`` as Python reads it."""
    return json.dumps(doc, default=_plain, separators=(",", ":")).encode()


def to_msgpack(doc: Any) -> bytes:
    """Write a document as msgpack: ten times quicker than JSON where frames are embedded."""
    data: bytes = msgpack.packb(doc, default=_packed)
    return data


SERIALIZERS: dict[str, Callable[[Any], bytes]] = {
    "json": to_json,
    "msgpack": to_msgpack,
    "pickle": pickle.dumps,
}
"""How to write a document, by name; `decode` tells them apart."""


def decode(data: bytes, *, allow_pickle: bool = False) -> Any:
    """Read what `to_json` or `to_msgpack` has written.

    Parameters
    ----------
    data
        One document, or ``[name, document]``.
    allow_pickle
        Whether a pickle is read too. Who can send one runs programs as this user.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    first = data[0] if data else 0
    if chr(first) in "{[":
        return json.loads(data)
    if first in _MAP or first in _ARRAY:
        return msgpack.unpackb(data, object_hook=_unpacked)
    if first == 0x80 and data.endswith(pickle.STOP):
        if allow_pickle:
            return pickle.loads(data)
        raise ValueError(
            "expected JSON or msgpack, found a pickle, which can run any program: publish with "
            "Publisher(…, serializer=nanobeam_bluesky.transports.to_msgpack), or, on a network "
            "where everyone is trusted, allow it with --serializer pickle"
        )
    raise ValueError(f"expected JSON or msgpack, found {data[:16]!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be sent as a part of a document")


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {
            b"nd": True,
            b"type": value.dtype.str,
            b"kind": b"",
            b"shape": value.shape,
            b"data": np.ascontiguousarray(value).tobytes(),
        }
    return _plain(value)


def _unpacked(item: dict[Any, Any]) -> Any:
    if b"nd" not in item and "nd" not in item:
        return item
    found = {k.decode() if isinstance(k, bytes) else k: v for k, v in item.items()}
    dtype = np.dtype(_text(found["type"]))
    if dtype.kind not in "biufcUS":
        raise ValueError(f"array of {dtype}: expected numbers or text")
    array = np.frombuffer(found["data"], dtype)
    return array.reshape(found["shape"]) if found["nd"] else array[0]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
