"""Runs that name files of others, in every way there is: nothing of them is served."""

import os
from types import SimpleNamespace

import h5py
import httpx
import numpy as np
import pytest
import tifffile
import zarr
from tiled.client import from_uri
from tiled.structures.array import ArrayStructure
from tiled.structures.core import StructureFamily
from tiled.structures.data_source import Asset, DataSource, Management

from nanobeam_bluesky.tiled_adapters import serve

SECRET = np.full((3, 4), 4321, np.uint16)
OPEN = np.arange(12, dtype=np.uint16).reshape(3, 4)
HDF5 = "application/x-hdf5"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A server, files that it may read and files that it may not."""
    away = tmp_path_factory.mktemp("away")
    folder = tmp_path_factory.mktemp("served")
    for path, values in ((away / "secret", SECRET), (folder / "frames" / "open", OPEN)):
        path.parent.mkdir(exist_ok=True)
        with h5py.File(f"{path}.h5", "w") as file:
            file["data"] = values
        tifffile.imwrite(f"{path}.tif", values)
        zarr.create_array(f"{path}.zarr", data=values)
        values.tofile(f"{path}.bin")
    with serve(folder) as url:
        client = from_uri(url)
        yield SimpleNamespace(client=client, url=url, folder=folder / "frames", away=away)
        client.context.close()


@pytest.fixture
def read(place):
    """Register a data source and ask for its values; return the answer."""

    def ask(uri, mimetype=HDF5, *, family=StructureFamily.array, inside="", **parameters):
        array = family == StructureFamily.array
        source = DataSource(
            structure_family=family,
            structure=ArrayStructure.from_array(OPEN) if array else None,
            mimetype=mimetype,
            parameters={"dataset": "data"} | parameters if mimetype == HDF5 else parameters,
            management=Management.external,
            assets=[Asset(data_uri=uri, is_directory=False, parameter="data_uris", num=0)],
        )
        node = place.client["raw"].new(structure_family=family, data_sources=[source])
        base, key = place.url.split("?")
        path = f"{node.path_parts[-1]}{inside}"
        return httpx.get(f"{base}/api/v1/array/full/raw/{path}?format=application/json&{key}")

    return ask


def hdf5(path, write):
    with h5py.File(path, "w") as file:
        write(file)
    return path


def external_link(file, other):
    file["data"] = h5py.ExternalLink(str(other), "/data")


def soft_link(file, other):
    file["links/far"] = h5py.ExternalLink(str(other), "/")
    file["data"] = h5py.SoftLink("/links/far/data")


def virtual(file, other):
    layout = h5py.VirtualLayout(OPEN.shape, OPEN.dtype)
    layout[:] = h5py.VirtualSource(str(other), "data", OPEN.shape)
    file.create_virtual_dataset("data", layout)


def external_storage(file, other):
    file.create_dataset(
        "data", OPEN.shape, OPEN.dtype, external=[(str(other.with_suffix(".bin")), 0, 24)]
    )


LINKS = [external_link, soft_link, virtual, external_storage]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("family", ["array", "container"])
def test_hdf5_files_that_refer_to_others_are_refused(place, read, link, family):
    path = hdf5(
        place.folder / f"{link.__name__}_{family}.h5", lambda f: link(f, place.away / "secret.h5")
    )
    if family == "array":
        answer = read(f"file://localhost{path}")
    else:
        answer = read(
            f"file://localhost{path}", family=StructureFamily.container, inside="/data", dataset="/"
        )
    assert (answer.status_code, "4321" in answer.text) == (422, False), answer.text
    assert "cannot be read" in answer.text


@pytest.mark.parametrize("link", LINKS[:3])
def test_hdf5_files_that_refer_to_readable_ones_are_served(place, read, link):
    other = place.folder / "open.h5"
    path = hdf5(place.folder / f"{link.__name__}_open.h5", lambda f: link(f, other))
    answer = read(f"file://localhost{path}")
    assert answer.json() == OPEN.tolist(), answer.text


def dotted(place, suffix):
    return f"{place.folder}/../../{place.away.name}/secret{suffix}"


def linked(place, suffix):
    path = place.folder / f"link{suffix}"
    if not path.is_symlink():
        path.symlink_to(place.away / f"secret{suffix}")
    return path


def folder_linked(place, suffix):
    path = place.folder / "folder"
    if not path.is_symlink():
        path.symlink_to(place.away)
    return path / f"secret{suffix}"


def parts_linked(place, suffix):
    path = place.folder / f"parts{suffix}"
    if not path.exists():
        path.mkdir()
        for name in os.listdir(place.away / f"secret{suffix}"):
            (path / name).symlink_to(place.away / f"secret{suffix}" / name)
    return path


@pytest.mark.parametrize(
    ("trick", "suffix"),
    [(t, s) for t in (dotted, linked, folder_linked) for s in (".h5", ".tif", ".zarr")]
    + [(parts_linked, ".zarr")],
)
def test_paths_that_lead_out_are_refused(place, read, trick, suffix):
    mimetype = {".h5": HDF5, ".tif": "image/tiff", ".zarr": "application/x-zarr"}[suffix]
    answer = read(f"file://localhost{trick(place, suffix)}", mimetype)
    assert (answer.status_code, "4321" in answer.text) == (422, False), answer.text
    assert "outside the folders that may be read" in answer.text


@pytest.mark.parametrize(
    "uri",
    ["file://localhost{folder}/a\0b.h5", "file://localhost{folder}", "http://127.0.0.1:9/x.zarr"],
)
def test_what_is_no_file_is_refused(place, read, uri):
    answer = read(uri.format(folder=place.folder))
    assert answer.status_code == 422, answer.text


def test_tables_of_other_databases_are_refused(place, read):
    answer = read(
        f"sqlite:///{place.away}/other.db",
        "application/x-tiled-sql-table",
        table_name="data",
        dataset_id=1,
    )
    assert answer.status_code == 422, answer.text
