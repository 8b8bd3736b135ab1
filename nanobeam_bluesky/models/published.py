"""Reading the published ``.pth`` files without running anything of them.

They are pickles, of a state dict or of a whole module of class ``__main__.CNN``, and loading
a pickle runs what it says. Here its instructions are read one by one into plain dicts and
arrays instead: classes and functions stay names, only those of `_MODULES` and `_CALLS` may
occur, and there is nothing that could call anything else.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nanobeam_bluesky.models.networks import NanobeamNN
from nanobeam_bluesky.models.store import ModelRefusedError

__all__ = ["read_published"]

_LARGEST = 16 * 2**20  # bytes of a file: the published ones have 0.1 MB
_LARGEST_PICKLE = 2**20
_MOST_NUMBERS = 2**22
_LONGEST_NAME = 200

_STORAGES = {"torch.FloatStorage": "f4", "torch.DoubleStorage": "f8", "torch.HalfStorage": "f2"}
_NN = "torch.nn.modules."
_MODULES = {
    "__main__.CNN",
    "torch.nn.parallel.data_parallel.DataParallel",
    *(_NN + name for name in ("container.Sequential", "conv.Conv2d", "linear.Linear")),
    *(_NN + name for name in ("activation.ReLU", "pooling.MaxPool2d", "flatten.Flatten")),
}
_CONVOLUTION = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
_ADVICE = "expected a published network: a state dict, or a module of class CNN"


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names."""

    name: str


@dataclass(eq=False)
class _Module:
    """What is left of a module: its attributes."""

    name: str
    state: dict[Any, Any] = field(default_factory=dict)


def read_published(path: Path | str, pattern_shape: tuple[int, int]) -> tuple[NanobeamNN, str]:
    """Read the weights of a published network.

    Parameters
    ----------
    path
        A file of ``torch.save`` (PyTorch 1.6 or later): a state dict or a module of class
        ``__main__.CNN``, also within ``DataParallel``. Six convolutions and one linear layer
        are taken in the order of the file; their names do not matter.
    pattern_shape
        (ny, nx) that the network is for.

    Returns
    -------
    network : NanobeamNN
        In evaluation mode.
    sha256 : str
        Of the file.

    Raises
    ------
    ModelRefusedError
        If the file is none, damaged, too large, of another architecture or pattern shape,
        has weights that are not finite, or names anything but the layers of this network.
        Nothing in it is executed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ModelRefusedError(f"larger than {_LARGEST} bytes; {_ADVICE}")
        network = NanobeamNN(pattern_shape)
        expected = dict(network.named_parameters())
        found = _in_order(_parameters(_load(content)))
        _check(found, [tuple(p.shape) for p in expected.values()], pattern_shape)
    except (OSError, ValueError) as error:  # what is refused, and a pattern that is too small
        raise ModelRefusedError(f"{path}: {error}") from None
    state = zip(expected, map(torch.from_numpy, found), strict=True)
    network.load_state_dict(dict(state))
    return network.eval(), hashlib.sha256(content).hexdigest()


def _check(
    found: list[NDArray[np.float32]],
    expected: list[tuple[int, ...]],
    pattern_shape: tuple[int, int],
) -> None:
    shapes = [a.shape for a in found]
    if shapes[:-2] != expected[:-2] or len(shapes[-2]) != 2 or shapes[-2][0] != 3:
        raise ModelRefusedError(
            f"another architecture: weights and biases of shapes {_listed(shapes)}, "
            f"expected {_listed(expected)}"
        )
    if shapes != expected:
        raise ModelRefusedError(
            f"of another pattern shape: its linear layer takes {shapes[-2][1]} numbers, patterns "
            f"of {pattern_shape} pixels make {expected[-2][1]}; check the geometry's ROI and "
            "binning"
        )
    if not all(np.isfinite(a).all() for a in found):
        raise ModelRefusedError("holds weights that are not finite")


def _listed(shapes: list[tuple[int, ...]]) -> str:
    texts = ["×".join(map(str, shape)) or "()" for shape in shapes[:16]]
    return ", ".join(texts) + (", …" if len(shapes) > 16 else "")


def _in_order(parameters: list[tuple[str, NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
    """Weights and biases, of convolutions first: a module may list its linear layer before."""
    arrays = [array for _, array in parameters]
    layers = list(zip(arrays[::2], arrays[1::2], strict=False))
    if len(arrays) != 14 or not all(w.ndim in (2, 4) and b.ndim == 1 for w, b in layers):
        raise ModelRefusedError(
            f"another architecture: {len(arrays)} weights and biases of shapes "
            f"{_listed([a.shape for a in arrays])}, expected those of six convolutions "
            "and a linear layer"
        )
    layers.sort(key=lambda layer: -layer[0].ndim)  # stable
    return [array for layer in layers for array in layer]


def _parameters(top: object) -> list[tuple[str, NDArray[np.float32]]]:
    """Names and arrays of a state dict or of a module, in their order."""
    if isinstance(top, dict):
        for name, value in top.items():
            if not isinstance(name, str) or not isinstance(value, np.ndarray):
                raise ModelRefusedError(
                    f"not a state dict: entry {str(name)[:40]!r} is no tensor; {_ADVICE}"
                )
        return list(top.items())
    if not isinstance(top, _Module):
        raise ModelRefusedError(f"holds neither a state dict nor a module; {_ADVICE}")
    return list(_walk(top, "", set()))


def _walk(
    module: _Module, prefix: str, seen: set[int]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    if id(module) in seen or len(seen) > 100:
        raise ModelRefusedError(f"module {prefix[:80]!r} occurs twice, or there are too many")
    seen.add(id(module))
    if module.name == _NN + "conv.Conv2d":
        for name, value in _CONVOLUTION.items():
            if name not in module.state or not _same(module.state[name], value):
                raise ModelRefusedError(f"another architecture: {prefix}{name} is not {value}")
    for kind in ("_parameters", "_buffers", "_modules"):
        entries = module.state.get(kind, {})
        if not isinstance(entries, dict):
            raise ModelRefusedError(f"{prefix}{kind} is not a dict")
        for name, value in entries.items():
            if isinstance(value, _Module):
                yield from _walk(value, f"{prefix}{name}.", seen)
            elif isinstance(value, np.ndarray):
                yield f"{prefix}{name}", value
            elif value is not None:
                raise ModelRefusedError(f"{prefix}{name} is neither a tensor nor a module")


def _same(found: object, expected: object) -> bool:
    """Whether found is this number or these; deep tuples are never compared."""
    if isinstance(expected, tuple):
        return (
            isinstance(found, tuple)
            and len(found) == len(expected)
            and all(map(_same, found, expected))
        )
    return type(found) is int and found == expected


def _load(content: bytes) -> object:
    """Return what a file of torch.save holds: dicts, lists, arrays and `_Module`."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ModelRefusedError(
            "truncated, not a file of torch.save, or of PyTorch before 1.6; if you trust it, "
            "load it with PyTorch and save its state_dict() again"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = _records(archive)
            reader = _Reader(archive, records)
            return reader.read(archive.read(records["data.pkl"]))
    except ModelRefusedError:
        raise
    except _DAMAGES as error:
        raise ModelRefusedError(f"damaged: {type(error).__name__}: {str(error)[:200]}") from None


_DAMAGES = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def _records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Records by their name below the archive's one folder; none is compressed."""
    records = {}
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise ModelRefusedError(
                f"record {info.filename[:80]!r} is compressed; torch.save compresses none"
            )
        records[info.filename.partition("/")[2]] = info
    if sum(info.file_size for info in records.values()) > _LARGEST:
        raise ModelRefusedError(f"its records add up to more than {_LARGEST} bytes")
    if "data.pkl" not in records:
        raise ModelRefusedError(f"no data.pkl in it: not a file of torch.save; {_ADVICE}")
    if records["data.pkl"].file_size > _LARGEST_PICKLE:
        raise ModelRefusedError(f"its data.pkl is larger than {_LARGEST_PICKLE} bytes")
    return records


@dataclass(frozen=True)
class _Storage:
    numbers: NDArray[Any]


class _Reader:
    """Reads the instructions of one pickle; whatever it does not know is refused."""

    def __init__(self, archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> None:
        self._archive, self._records = archive, records
        self._storages: dict[str, _Storage] = {}
        order = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
        self._order = ">" if order == b"big" else "<"
        self._numbers = 0  # in tensors so far
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, pickle: bytes) -> object:
        for opcode, value, _ in _operations(pickle):
            if opcode.name == "STOP":
                break
            if opcode.name in _LITERALS:
                self._stack.append(value)
            elif opcode.name in _INSTRUCTIONS:
                _INSTRUCTIONS[opcode.name](self, value)
            elif opcode.name not in ("PROTO", "FRAME"):
                raise ModelRefusedError(f"its pickle has the instruction {opcode.name}; {_ADVICE}")
        return self._stack.pop()

    def _marked(self) -> list[Any]:
        """Take what lies above the last mark."""
        mark = self._marks.pop()
        taken = self._stack[mark:]
        del self._stack[mark:]
        return taken

    def _taken(self, n: int) -> list[Any]:
        if n > len(self._stack):
            raise IndexError("its pickle takes more than it has put")
        taken = self._stack[len(self._stack) - n :]
        del self._stack[len(self._stack) - n :]
        return taken

    def _mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def _remember(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _name(self, value: str | None) -> None:
        # GLOBAL has "module name" in it, STACK_GLOBAL takes both from the stack
        module, name = self._taken(2) if value is None else value.split(" ", 1)
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is not text")
        full = f"{module}.{name}"
        if full not in _MODULES and full not in _CALLS and full not in _STORAGES:
            raise ModelRefusedError(
                f"names {full[:80]!r}, which is no part of a published network; nothing was "
                f"executed; {_ADVICE}"
            )
        self._stack.append(_Name(full))

    def _items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError("items are put into what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or len(key) > _LONGEST_NAME:
                raise TypeError("a key that is no name")
            target[key] = value

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError("values are appended to what is not a list")
        target.extend(values)

    def _new(self, _: object) -> None:
        cls, args = self._taken(2)
        empty = isinstance(args, tuple) and not args
        if not empty or not isinstance(cls, _Name) or cls.name not in _MODULES:
            raise TypeError("a new object that is no module")
        self._stack.append(_Module(cls.name))

    def _reduce(self, _: object) -> None:
        function, args = self._taken(2)
        if not isinstance(function, _Name) or function.name not in _CALLS:
            raise TypeError("a call of what is no function")
        if not isinstance(args, tuple) or len(args) > 8:
            raise TypeError("a call with what are no arguments")
        self._stack.append(_CALLS[function.name](self, *args))

    def _build(self, _: object) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, _Module) and isinstance(state, dict):
            target.state = state
        elif not isinstance(target, dict):  # a state dict carries version numbers: not needed
            raise TypeError("a state for what is no module")

    def _persistent(self, _: object) -> None:
        """Put a storage: ("storage", class, key, device, number of elements)."""
        reference = self._stack.pop()
        if not isinstance(reference, tuple) or len(reference) != 5:
            raise TypeError("a reference to what is no storage")
        kind, cls, key, _device, size = reference
        known = isinstance(cls, _Name) and cls.name in _STORAGES
        if not known or not isinstance(kind, str) or kind != "storage" or not isinstance(key, str):
            raise TypeError("a reference to what is no storage of floating-point numbers")
        if key not in self._storages:
            dtype = np.dtype(self._order + _STORAGES[cls.name])
            numbers = np.frombuffer(self._archive.read(self._records[f"data/{key}"]), dtype)
            self._storages[key] = _Storage(numbers)
        if type(size) is not int or self._storages[key].numbers.size != size:
            raise ModelRefusedError(
                f"storage {key[:40]!r} has {self._storages[key].numbers.size} numbers, other than "
                "its pickle says: truncated or altered"
            )
        self._stack.append(self._storages[key])

    def _tensor(
        self, storage: object, offset: object, size: object, stride: object, *_: object
    ) -> NDArray[np.float32]:
        """Copy a tensor out of its storage."""
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor without a storage")
        starts, sizes, strides = _naturals((offset,)), _naturals(size), _naturals(stride)
        self._numbers += math.prod(sizes)
        if self._numbers > _MOST_NUMBERS:
            raise ModelRefusedError("larger tensors than a published network has")
        last = starts[0] + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if 0 in sizes or last >= storage.numbers.size:
            raise ModelRefusedError("a tensor is empty or reaches beyond its storage")
        steps = [step * storage.numbers.itemsize for step in strides]
        view = np.lib.stride_tricks.as_strided(storage.numbers[starts[0] :], sizes, steps)
        with np.errstate(over="ignore"):  # what does not fit is not finite, and refused as that
            return view.astype(np.float32, order="C")

    def _parameter(self, data: object, *_: object) -> object:
        return data

    def _empty_dict(self) -> dict[str, Any]:
        return {}

    def _nothing(self, *_: object) -> None:
        """Stands for sets and devices, which the weights do not depend on."""


def _naturals(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > 8:
        raise TypeError("a tensor's size is not a tuple of numbers")
    if not all(type(v) is int and v >= 0 for v in values):
        raise TypeError("a tensor's size is not a tuple of natural numbers")
    return values


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Reader._empty_dict,
    "torch._utils._rebuild_tensor_v2": _Reader._tensor,
    "torch._utils._rebuild_parameter": _Reader._parameter,
    "__builtin__.set": _Reader._nothing,
    "builtins.set": _Reader._nothing,
    "torch.device": _Reader._nothing,
}
"""Functions that may be named → what takes their place."""

_LITERALS = {
    *("NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE"),
}

_INSTRUCTIONS: dict[str, Callable[[_Reader, Any], object]] = {
    "MARK": _Reader._mark,
    "BINPUT": _Reader._remember,
    "LONG_BINPUT": _Reader._remember,
    "MEMOIZE": _Reader._remember,
    "BINGET": _Reader._recall,
    "LONG_BINGET": _Reader._recall,
    "GLOBAL": _Reader._name,
    "STACK_GLOBAL": _Reader._name,
    "NEWTRUE": lambda r, _: r._stack.append(True),
    "NEWFALSE": lambda r, _: r._stack.append(False),
    "EMPTY_DICT": lambda r, _: r._stack.append({}),
    "EMPTY_LIST": lambda r, _: r._stack.append([]),
    "EMPTY_SET": lambda r, _: r._stack.append([]),
    "EMPTY_TUPLE": lambda r, _: r._stack.append(()),
    "TUPLE": lambda r, _: r._stack.append(tuple(r._marked())),
    "TUPLE1": lambda r, _: r._stack.append(tuple(r._taken(1))),
    "TUPLE2": lambda r, _: r._stack.append(tuple(r._taken(2))),
    "TUPLE3": lambda r, _: r._stack.append(tuple(r._taken(3))),
    "SETITEM": lambda r, _: r._items(r._taken(2)),
    "SETITEMS": lambda r, _: r._items(r._marked()),
    "APPEND": lambda r, _: r._append(r._taken(1)),
    "APPENDS": lambda r, _: r._append(r._marked()),
    "ADDITEMS": lambda r, _: r._append(r._marked()),
    "NEWOBJ": _Reader._new,
    "REDUCE": _Reader._reduce,
    "BUILD": _Reader._build,
    "BINPERSID": _Reader._persistent,
}
"""What moves things about. Everything else that a pickle can say is refused."""


def _operations(pickle: bytes) -> list[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    """Opcodes of a pickle; an odd escape in an altered one is no matter for the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return list(pickletools.genops(pickle))
