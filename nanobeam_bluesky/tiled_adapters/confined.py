"""Tiled's own adapters, held to the folders that a catalogue may read.

Tiled compares the path that a run names with these folders; it does not follow ``..``, symbolic
links, or what one HDF5 file says of another.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlparse

import h5py
from fastapi import HTTPException
from tiled.adapters.hdf5 import SWMR_DEFAULT
from tiled.storage import FileStorage, get_storage
from tiled.utils import path_from_uri

from nanobeam_bluesky.documents.formats import NeverError, NotYetError
from nanobeam_bluesky.documents.roots import Roots
from nanobeam_bluesky.tiled_adapters.stacks import FrameStack

__all__ = ["Confined", "folders_of"]

_HDF5 = ("application/x-hdf5", "application/x-netcdf")


def folders_of(context: Any) -> list[str]:
    """Return the folders that a catalogue may read."""
    return [str(s.path) for s in context.readable_storage.values() if type(s) is FileStorage]


class Confined(Mapping[str, Any]):
    """Adapters by mimetype that refuse, by 422, what lies outside some folders.

    Parameters
    ----------
    adapters
        Of a catalogue; they are imported when they are first needed.
    roots
        Folders that may be read.
    """

    def __init__(self, adapters: Mapping[str, Any], roots: Roots) -> None:
        self._adapters = adapters
        self._roots = roots
        self._confined: dict[str, Any] = {}

    def __getitem__(self, mimetype: str) -> Any:
        if mimetype not in self._confined:
            self._confined[mimetype] = _confined(self._adapters[mimetype], mimetype, self._roots)
        return self._confined[mimetype]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


def _confined(adapter: Any, mimetype: str, roots: Roots) -> Any:
    """Return a subclass of an adapter that looks before it opens."""

    class Within(adapter):
        @classmethod
        def from_catalog(cls, source: Any, node: Any, /, **parameters: Any) -> Any:
            uris = [a.data_uri for a in source.assets if a.parameter is not None]
            # of a sequence of files, Tiled names those that it is about to read
            uris += [uri for uri in parameters.get("data_uris") or () if uri]
            external = str(getattr(source.management, "value", source.management)) == "external"
            try:
                for path in _paths(uris, roots):
                    if issubclass(adapter, FrameStack):  # looks at each file itself
                        continue
                    if external and os.path.isdir(path):
                        _check_folder(path, roots)
                    elif mimetype in _HDF5:
                        _check_hdf5(path, parameters, roots)
            except (NeverError, NotYetError, OSError, ValueError) as error:
                raise HTTPException(422, f"cannot be read: {error}") from None
            return super().from_catalog(source, node, **parameters)

    if issubclass(adapter, FrameStack):
        Within.roots = roots
    Within.__name__ = Within.__qualname__ = adapter.__name__
    return Within


def _paths(uris: Iterable[str], roots: Roots) -> Iterator[str]:
    for uri in uris:
        if urlparse(uri).scheme != "file":
            try:
                get_storage(uri)  # databases and object stores are known by name
            except KeyError:
                raise NeverError("not a storage of this server") from None
            continue
        path = os.fspath(path_from_uri(uri))
        roots.resolve(path)
        yield path


def _check_folder(path: str, roots: Roots) -> None:
    """Follow all links in a folder, such as a Zarr store."""
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(folder, name)):
                roots.resolve(os.path.join(folder, name))


def _check_hdf5(path: str, parameters: Mapping[str, Any], roots: Roots) -> None:
    """Follow the dataset that is meant, or everything in a group."""
    dataset = parameters.get("dataset") or "/"
    dataset = dataset if isinstance(dataset, str) else "/".join(dataset)
    swmr = parameters.get("swmr", SWMR_DEFAULT)  # as it will be opened
    with h5py.File(path, "r", swmr=swmr, libver=parameters.get("libver", "latest")) as file:
        names, seen = [dataset], set()
        while names:
            name = names.pop()
            roots.check(file, name)
            group = file.get(name)
            if isinstance(group, h5py.Group) and group.id not in seen:
                seen.add(group.id)  # links may lead round
                names += [f"{name.rstrip('/')}/{key}" for key in group]
