"""Documents as bytes. What is read may come from anyone, so nothing in it is ever called.

Bluesky's own ZMQ publisher sends pickles, which may name any function to be called. Here they
are read with names for plain arrays and sets alone, all of them bound to what stands below;
one that names anything else is refused.

Arrays in msgpack follow msgpack-numpy, as bluesky-kafka does: a map with the keys ``nd``,
``type``, ``kind``, ``shape`` and ``data``. That package itself is not used, as it unpickles
arrays of objects (``msgpack_numpy.decode``).
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

__all__ = ["decode", "to_json", "to_msgpack"]

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


def decode(data: bytes) -> Any:
    """Read what `to_json`, `to_msgpack` or ``pickle.dumps`` has written.

    Parameters
    ----------
    data
        One document, or ``[name, document]``.

    Raises
    ------
    ValueError
        If it is none of these, or holds other things than a document does.
    """
    first = data[0] if data else 0
    if chr(first) in "{[":
        return json.loads(data)
    if first in _MAP or first in _ARRAY:
        return msgpack.unpackb(data, object_hook=_unpacked)
    if first == 0x80 and data.endswith(pickle.STOP):
        return _filled(_Unpickler(io.BytesIO(data)).load())
    raise ValueError(f"expected JSON, msgpack or a pickle, found {data[:16]!r}")


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
    shape = found["shape"] if found["nd"] else ()
    return _array(found["data"], _text(found["type"]), shape)


def _array(data: bytes, dtype: str, shape: Sequence[int], order: str = "C") -> Any:
    """Return an array, or a number where there is no shape."""
    if not re.fullmatch(r"[<>|=]?[biufcSU]\d+", dtype):
        raise ValueError(f"array of {dtype!r}: expected numbers or text")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape, order="F" if order == "F" else "C") if len(shape) else array[0]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class _Dtype:
    """Stands for numpy's."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name = str(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.name = f"{state[1]}{self.name}"


class _Array:
    """Stands for numpy's, until all of it has been read."""

    def __init__(self, data: bytes = b"", dtype: Any = None, shape: Any = (), order: str = "C"):
        self._given = data, dtype, shape, order

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self._given = data, dtype, shape, "F" if fortran else "C"

    def array(self) -> Any:
        data, dtype, shape, order = self._given
        return _array(data, dtype.name, shape, order)


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): lambda text, codec: str(text).encode("latin1"),
    ("__builtin__", "bytes"): lambda: b"",
    ("collections", "OrderedDict"): dict,
}
for _name in ("set", "frozenset"):
    _KNOWN |= {("builtins", _name): list, ("__builtin__", _name): list}
for _core in ("numpy.core", "numpy._core"):
    _KNOWN |= {
        (f"{_core}.multiarray", "_reconstruct"): lambda *_: _Array(),
        (f"{_core}.multiarray", "scalar"): lambda dtype, data: _Array(data, dtype),
        (f"{_core}.numeric", "_frombuffer"): _Array,
    }


class _Unpickler(pickle._Unpickler):  # in Python: C's takes memory for whatever index it is told
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise ValueError(
                f"a pickle with {module}.{name}, which a document has no need of and which is not "
                "looked up, as that could run any program; publish with "
                "Publisher(…, serializer=nanobeam_bluesky.transports.to_msgpack)"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("a pickle that refers to things elsewhere")


def _filled(item: Any) -> Any:
    """Arrays and plain containers in the place of what stood for them."""
    if isinstance(item, _Array):
        return item.array()
    if isinstance(item, dict):
        return {key: _filled(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [_filled(value) for value in item]
    return item
