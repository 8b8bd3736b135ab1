"""Ingested files are found again, and what cannot be read is told in a line."""

import os
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import pytest
import tifffile
from tiled.client.utils import ClientError
from typer.testing import CliRunner

from nanobeam_bluesky.cli import app
from nanobeam_bluesky.documents import FrameReader, PointBlock, ReadStatus, StoredRows
from nanobeam_bluesky.geometry import ROI
from nanobeam_bluesky.retrospective import ingest
from nanobeam_bluesky.retrospective.readers import readers
from nanobeam_bluesky.tiled_adapters import open_catalog

FRAMES = np.random.default_rng(3).poisson(2, (20, 24, 16)).astype(np.uint16)
FILM = """
energy_keV = 11.3
detector_distance_m = 0.85
pixel_size_um = 440
binning = 1
roi_shape = [16, 16]
bragg_center_px = [8.0, 12.0]
d_spacing_angstrom = 2.0065
thickness_nm = 11.7
optics = {kind = "zone_plate", diameter_um = 149, focal_length_mm = 21.874}
"""
GEOMETRY = {
    "energy_keV": 11.3,
    "detector_distance_m": 0.85,
    "pixel_size_um": 440,
    "binning": 1,
    "roi_shape": [16, 16],
    "bragg_center_px": [8.0, 12.0],
    "d_spacing_angstrom": 2.0065,
    "thickness_nm": 11.7,
    "optics": {"kind": "zone_plate", "diameter_um": 149, "focal_length_mm": 21.874},
}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    client = open_catalog(
        tmp_path_factory.mktemp("catalog"), readable_storage=[tmp_path_factory.getbasetemp()]
    )
    yield client
    client.context.close()


@pytest.fixture
def take(catalog):
    def take(*files, geometry=GEOMETRY, shape=(4, 5), **options):
        return list(ingest(files, geometry, to=catalog, shape=shape, **options))

    return take


def status(results):
    return [one.status for one in results]


# ------------------------------------------------------------------------- found again


def test_the_same_file_with_the_same_settings_is_one_run(tmp_path, take, catalog):
    file = tmp_path / "a.npy"
    np.save(file, FRAMES)
    (first,) = take(file)
    before = len(catalog["raw"])
    (again,) = take(os.path.relpath(file))
    assert (first.status, again.status, again.uid) == ("new", "there", first.uid)
    (tmp_path / "link.npy").symlink_to(file)
    assert take(tmp_path / "link.npy")[0].uid == first.uid
    assert len(catalog["raw"]) == before
    assert status(take(file, geometry=GEOMETRY | {"thickness_nm": 12.0})) == ["new"]
    np.save(file, FRAMES + 1)
    assert status(take(file)) == ["new"]
    assert len(catalog["raw"]) == before + 2


def test_a_run_whose_recording_was_cut_off_is_recorded_again(tmp_path, take, catalog, monkeypatch):
    from nanobeam_bluesky.tiled_adapters import writers

    file = tmp_path / "a.npy"
    np.save(file, FRAMES)

    class Breaks:
        def __init__(self, client):
            self._write = whole(client)

        def __call__(self, name, doc):
            if name == "stop":
                raise OSError("gone")
            self._write(name, doc)

    whole = writers.whole_run_writer
    monkeypatch.setattr(writers, "whole_run_writer", Breaks)
    (broken,) = take(file)
    assert (broken.status, broken.notes) == ("failed", ("gone",))
    monkeypatch.undo()
    (done,) = take(file)
    assert done.status == "new"
    run = catalog["raw"][done.uid]
    assert run.metadata["stop"]["num_events"] == {"primary": 20}
    np.testing.assert_array_equal(run["primary"]["frames"].read(), FRAMES)


def test_tiled_reads_any_slice_of_a_stack(tmp_path, take, catalog):
    file = tmp_path / "a.npy"
    np.save(file, FRAMES.astype(np.float32))
    (one,) = take(file)
    stored = catalog["raw"][one.uid]["primary"]["frames"]
    for slices in (np.s_[3], np.s_[2:9, 4], np.s_[:, 1:3, 5:2:-1], np.s_[-2:], np.s_[::7, 0, 0]):
        np.testing.assert_array_equal(stored[slices], FRAMES[slices])


def test_an_image_that_leads_out_of_the_readable_folders_is_refused(
    tmp_path, tmp_path_factory, take, catalog
):
    (tmp_path / "scan").mkdir()
    for i in range(20):
        tifffile.imwrite(tmp_path / "scan" / f"{i}.tif", FRAMES[i])
    (one,) = take(tmp_path / "scan")
    stored = catalog["raw"][one.uid]["primary"]["frames"]
    np.testing.assert_array_equal(stored[7:], FRAMES[7:])
    with TemporaryDirectory(dir=tmp_path_factory.getbasetemp().parent) as outside:
        (tmp_path / "scan" / "9.tif").rename(f"{outside}/9.tif")
        (tmp_path / "scan" / "9.tif").symlink_to(f"{outside}/9.tif")
        with pytest.raises(ClientError, match="outside the folders"):
            stored[7:]
    np.testing.assert_array_equal(stored[:9, 0], FRAMES[:9, 0])


# ---------------------------------------------------------------------------- plug-ins


def test_the_plug_in_of_the_docs_is_asked_before_the_layouts_that_are_known(
    tmp_path, take, catalog, monkeypatch
):
    text = (Path(__file__).parents[2] / "docs/reference/ingest.md").read_text("utf-8")
    code = text.rpartition("```python\n")[2].partition("```")[0]
    (tmp_path / "mybeamline.py").write_text(code)
    info = tmp_path / "mybeamline-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mybeamline\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nanobeam.readers]\nmine = mybeamline:read\n")
    monkeypatch.syspath_prepend(tmp_path)
    slow, fast = np.divmod(np.arange(20), 5)
    with h5py.File(tmp_path / "a.scan", "w") as file:
        file["det"], file["x"], file["y"] = FRAMES, np.where(slow % 2, 4 - fast, fast), slow
        file.attrs["shape"], file.attrs["energy"] = (4, 5), 11.3
    assert next(iter(readers())) == "mine"
    (one,) = take(tmp_path / "a.scan", shape=None)
    assert (one.status, one.layout, one.points) == ("new", "mine", 20)
    start = catalog["raw"][one.uid].metadata["start"]
    assert (start["motors"], start["snaking"]) == (["y", "x"], [False, True])
    assert start["extents"] == [[0.0, 3.0], [0.0, 4.0]]


# --------------------------------------------------------------------------- bad input


def hdf5(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


MDA = struct.pack(">f5i", 1.3, 1, 2, 4, 5, 1)


def saved(path, values, keep=None):
    np.save(path, values, allow_pickle=True)
    if keep is not None:
        path.write_bytes(path.read_bytes()[:keep])
    return path


def truncated_tiffs(folder):
    folder.mkdir()
    for i in range(3):
        tifffile.imwrite(folder / f"{i}.tif", FRAMES[i])
        data = (folder / f"{i}.tif").read_bytes()
        (folder / f"{i}.tif").write_bytes(data[: len(data) // 2])
    return folder


def test_what_cannot_be_read_is_one_line_and_the_rest_goes_on(tmp_path, take):
    make = {
        "none.h5": (lambda path: None, "no such file or folder"),
        "empty": (lambda path: path.mkdir(), "no folder of a known layout"),
        "no.h5": (lambda path: hdf5(path, x=np.ones(5)), "no frames in it"),
        "two.h5": (
            lambda path: hdf5(path, x=FRAMES, y=FRAMES),
            "several datasets of frames, /x, /y: say which by --dataset",
        ),
        "small.h5": (
            lambda path: hdf5(path, x=FRAMES[:, :10]),
            "ROI off the detector: rows 4..20, columns 0..16 on a frame of 10 × 16 pixels",
        ),
        "text.h5": (lambda path: path.write_bytes(b"text"), "not readable as HDF5"),
        "short.npy": (lambda path: saved(path, FRAMES, 5000), "cut off: 6 patterns of the 20"),
        "object.npy": (
            lambda path: saved(path, np.array([{}] * 3)),
            "expected numbers, found object",
        ),
        "one.npy": (lambda path: saved(path, FRAMES[0]), "expected frames (n, rows, columns)"),
        "tiffs": (truncated_tiffs, "0.tif, page 0"),
        "12.mda": (lambda path: path.write_bytes(MDA), "cut off, or no MDA file"),
        "13.mda": (lambda path: path.write_bytes(b"text" * 9), "no MDA file of version 1"),
        "good.npy": (lambda path: saved(path, FRAMES), ""),
    }
    for name, (write, _) in make.items():
        write(tmp_path / name)
    results = take(*(tmp_path / name for name in make))
    assert status(results) == ["failed"] * (len(make) - 1) + ["new"]
    for one, (_, words) in zip(results[:-1], make.values(), strict=False):
        assert words in one.notes[0] and "\n" not in one.notes[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "/z"}, "expected frames (n, rows, columns) at /z, found None"),
        (
            {"shape": (4, 6)},
            "20 frames, 4 × 6 points: 4,5, 2,10, 1,20 would fit; --interrupted if the scan was",
        ),
        ({"shape": (3, 5)}, "20 frames, 3 × 5 points: 4,5, 2,10, 1,20 would fit"),
        ({"shape": None}, "--shape 4,5, 2,10, 1,20"),
        ({"geometry": {**GEOMETRY, "thickness_nm": None}}, "thickness_nm missing"),
        ({"geometry": {**GEOMETRY, "detector_shape": [9, 9]}}, "detector_shape = [9, 9]"),
        ({"layout": "npy"}, "no file of layout 'npy'"),
        ({"layout": "spec"}, "known are aps26id, bliss"),
    ],
)
def test_settings_that_do_not_suit_a_file_are_told(tmp_path, take, options, words):
    hdf5(tmp_path / "a.h5", x=FRAMES)
    (one,) = take(tmp_path / "a.h5", **options)
    assert one.status == "failed" and words in one.notes[0]


def test_an_interrupted_scan_has_the_points_that_it_came_to(tmp_path, take, catalog):
    np.save(tmp_path / "a.npy", FRAMES[:13])
    (one,) = take(tmp_path / "a.npy", interrupted=True)
    assert (one.status, one.points) == ("new", 13)
    frames = np.asarray(catalog["scans"][one.uid]["frames"][:]).reshape(20, 24, 16)
    np.testing.assert_array_equal(frames[:13], FRAMES[:13])
    assert not frames[13:].any()


def test_the_command_says_what_became_of_each_file_and_how_it_ends(tmp_path):
    (tmp_path / "film.toml").write_text(f"[nanobeam]{FILM}")
    np.save(tmp_path / "a.npy", FRAMES)

    def run(*arguments):
        command = ["ingest", *map(str, arguments), "--to", str(tmp_path / "to")]
        result = CliRunner().invoke(app, [*command, "--geometry", str(tmp_path / "film.toml")])
        return result.exit_code, result.output

    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    code, text = run(a, a, "--shape", "4,5", "--snake")
    assert code == 0
    assert f"{a}: npy, run " in text and "20 points" in text and "was there already" in text
    assert f"nanobeam serve {tmp_path}/to --readable-storage {tmp_path}" in text
    code, text = run(b, a, "--shape", "4,5", "--snake")
    assert code == 1 and f"{b}: no such file or folder" in text and "was there already" in text
    assert run(tmp_path / "a.npy", "--shape", "4")[0] == 2
    assert run(tmp_path / "a.npy", "--shape", "4,x")[0] == 2
    (tmp_path / "film.toml").write_text("energy = = 3")
    assert run(tmp_path / "a.npy")[0] == 2


# ------------------------------------------------------------------- reading NumPy files


def test_a_numpy_file_that_is_still_written_is_read_as_far_as_it_is(tmp_path):
    path = tmp_path / "a.npy"
    block = PointBlock(1, 20, StoredRows(str(path), "", 0))
    roi = ROI(row=2, col=3, height=10, width=8)
    reader = FrameReader()
    assert reader.frames(block, roi)[1].tolist() == [ReadStatus.RETRY] * 20
    saved(path, FRAMES, 128 + 7 * 24 * 16 * 2 + 10)
    frames, found, reason = reader.frames(block, roi)
    assert found.tolist() == [ReadStatus.OK] * 7 + [ReadStatus.RETRY] * 13
    assert "7 frames" in reason
    np.testing.assert_array_equal(frames[:7], FRAMES[:7, 2:12, 3:11])
    saved(path, np.array([{}]))
    assert set(reader.frames(block, roi)[1]) == {ReadStatus.NEVER}
