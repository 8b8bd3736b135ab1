"""Folders whose files may be read: whatever a path, a link or a dataset refers to lies in them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import h5py

from nanobeam_bluesky.documents.formats import NeverError, NotYetError, check_regular

__all__ = ["Roots"]

MAX_STEPS = 100
"""Links from one name to its dataset."""
MAX_DEPTH = 8
"""Files that refer to each other."""


class Roots:
    """Refuses what lies outside some folders.

    Parameters
    ----------
    folders
        Files in them, and below, may be read.
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]]) -> None:
        self._folders = tuple(os.path.realpath(folder) for folder in folders)

    def resolve(self, path: str) -> str:
        """Return a path without links.

        Raises
        ------
        NeverError
            If it leads out of the folders.
        """
        real = os.path.realpath(path)
        if not any(os.path.commonpath([folder, real]) == folder for folder in self._folders):
            raise NeverError("outside the folders that may be read (readable_storage)")
        return real

    def check(self, file: h5py.File, dataset: str, *, depth: int = 0) -> None:
        """Follow a name in an open HDF5 file, before the library does.

        Raises
        ------
        NeverError
            If an external link, a virtual dataset or external storage leads out of the folders.
        NotYetError
            If a file that is referred to is not there.
        """
        if depth > MAX_DEPTH:
            raise NeverError(f"more than {MAX_DEPTH} files refer to each other")
        here: Any = file["/"]
        parts = dataset.split("/")
        for _ in range(MAX_STEPS):
            parts = [part for part in parts if part not in ("", ".")]
            if not parts or not isinstance(here, h5py.Group):
                break
            try:
                link = here.get(parts[0], getlink=True)
            except TypeError as error:  # user-defined links
                raise NeverError(f"{dataset}: {error}") from None
            if link is None:
                return
            if isinstance(link, h5py.ExternalLink):
                self._other(file, link.filename, "/".join([link.path, *parts[1:]]), depth)
                return
            if isinstance(link, h5py.SoftLink):
                if link.path.startswith("/"):
                    here = file["/"]
                parts = [*link.path.split("/"), *parts[1:]]
            else:
                here, parts = here[parts[0]], parts[1:]
        else:
            raise NeverError(f"{dataset}: more than {MAX_STEPS} links")
        if not isinstance(here, h5py.Dataset):
            return
        if here.external:
            raise NeverError(f"{dataset} has its values in files without HDF5")
        if here.is_virtual:
            for name, source in {(s.file_name, s.dset_name) for s in here.virtual_sources()}:
                if name == ".":
                    self.check(file, source, depth=depth + 1)
                else:
                    self._other(file, name, source, depth)

    def _other(self, file: h5py.File, name: str, dataset: str, depth: int) -> None:
        """Check a dataset in a file that another one refers to."""
        if "%" in name:  # a virtual dataset may count files so
            raise NeverError(f"refers to {name!r}, which may be any file")
        try:
            path = self.resolve(os.path.join(os.path.dirname(file.filename), name))
        except NeverError as error:
            raise NeverError(f"refers to {name!r}, {error}") from None
        check_regular(path)
        try:
            with h5py.File(path, "r", libver="latest", swmr=True) as other:
                self.check(other, dataset, depth=depth + 1)
        except OSError as error:
            raise NotYetError(f"{path}: {error}") from error
