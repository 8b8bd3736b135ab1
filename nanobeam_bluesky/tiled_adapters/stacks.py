"""Frames in one NumPy file, or in numbered TIFF files, as arrays of Tiled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from bluesky_tiled_plugins.writing.consolidators import CONSOLIDATOR_REGISTRY, ConsolidatorBase
from fastapi import HTTPException
from ndindex import ndindex
from numpy.typing import NDArray
from tiled.adapters.core import Adapter
from tiled.structures.array import ArrayStructure
from tiled.structures.core import StructureFamily
from tiled.structures.data_source import Asset

from nanobeam_bluesky.documents import FrameReader, PointBlock
from nanobeam_bluesky.documents.frames import ReadStatus
from nanobeam_bluesky.documents.resources import NPY, NUMBERED_TIFF, Resource
from nanobeam_bluesky.documents.roots import Roots
from nanobeam_bluesky.geometry import ROI

__all__ = ["STACKS", "FrameStack"]

STACKS = dict.fromkeys((NPY, NUMBERED_TIFF), f"{__name__}:FrameStack")
"""``adapters_by_mimetype`` of a catalogue in Tiled's configuration."""
BLOCK_BYTES = 4_000_000


class FrameStack(Adapter[ArrayStructure]):
    """Frames (n, rows, columns) that are read where they lie.

    Tiled's own adapter of NumPy files loads and keeps all of one.
    """

    structure_family = StructureFamily.array
    roots: Roots | None = None
    """Files elsewhere are refused."""

    def __init__(self, structure: ArrayStructure, resource: Resource, **options: Any) -> None:
        super().__init__(structure, **options)
        self._resource = resource

    @classmethod
    def from_catalog(cls, data_source: Any, node: Any, /, **parameters: Any) -> FrameStack:
        """Make one of what a catalogue knows."""
        document = {
            "data_key": "",
            "uri": data_source.assets[0].data_uri,
            "mimetype": data_source.mimetype,
            "parameters": parameters,
        }
        resource = Resource.parse(document, {})
        return cls(data_source.structure, resource, metadata=node.metadata_, specs=node.specs)

    def read(self, slice: Any = ...) -> NDArray[Any]:
        """Return a slice of the whole."""
        shape = self._structure.shape
        first, *rest = ndindex(slice if isinstance(slice, tuple) else (slice,)).expand(shape).raw
        numbers = np.arange(shape[0])[first]
        wanted = np.atleast_1d(numbers)
        frames = np.zeros((0, *shape[1:]), self._dtype)
        if wanted.size:
            low, high = int(wanted.min()), int(wanted.max()) + 1
            frames = self._frames(low, high - low)[wanted - low]
        values = frames[(np.s_[:], *rest)]
        return values if numbers.ndim else values[0]

    def read_block(self, block: Any, slice: Any = ...) -> NDArray[Any]:
        """Return a slice of a block."""
        values = self.read(tuple(block.slice_from_chunks(self._structure.chunks)))
        return values[slice if slice else ...]

    @property
    def _dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self._structure.data_type.to_numpy_dtype()
        return dtype

    def _frames(self, first: int, count: int) -> NDArray[Any]:
        if self._resource.problem:
            raise HTTPException(422, self._resource.problem)
        height, width = self._structure.shape[-2:]
        block = PointBlock(first + 1, count, self._resource.event(first, 1))
        reader = FrameReader(roots=self.roots)
        roi = ROI(row=0, col=0, height=height, width=width)
        frames, status, reason = reader.frames(block, roi)
        if frames is None or (status != ReadStatus.OK).any():
            raise HTTPException(422, f"cannot be read: {reason}")
        return frames.astype(self._dtype, copy=False)


class _Consolidator(ConsolidatorBase):
    """Tells Tiled of one file, or one folder, for all the frames."""

    supported_mimetypes = {NPY, NUMBERED_TIFF}  # noqa: RUF012  of the base class
    default_asset_role = "data_uri"

    def __init__(self, stream_resource: Any, descriptor: Any) -> None:
        super().__init__(stream_resource, descriptor)
        self.assets = [
            Asset(data_uri=self.uri, is_directory=self.uri.endswith("/"), parameter="data_uri")
        ]
        frame = self.data_type.to_numpy_dtype().itemsize * math.prod(self.datum_shape)
        self.chunk_shape = (max(1, BLOCK_BYTES // frame),)

    def adapter_parameters(self) -> dict[str, Any]:
        """Return what says which file has which frame."""
        given = self._sres_parameters
        return {n: given[n] for n in ("template", "first", "chunk_shape") if n in given}


CONSOLIDATOR_REGISTRY.update(dict.fromkeys(_Consolidator.supported_mimetypes, _Consolidator))
