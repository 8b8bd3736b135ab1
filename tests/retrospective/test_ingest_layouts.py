"""True files of each layout become the run that the same frames make in Bluesky."""

import struct
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
import tifffile
from event_model import DocumentNames, compose_run, schema_validators

from nanobeam_bluesky.documents import derive, to_maps
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.physics import forward
from nanobeam_bluesky.retrospective.ingestion import documents_of, ingest
from nanobeam_bluesky.retrospective.readers import Options, find_scans
from nanobeam_bluesky.tiled_adapters import open_catalog

ROWS, COLUMNS, HEIGHT, WIDTH = 4, 5, 72, 80
POINTS = ROWS * COLUMNS
SHAPE = ROWS, COLUMNS
GEOMETRY = {
    "energy_keV": 11.3,
    "detector_distance_m": 0.85,
    "pixel_size_um": 110,
    "binning": 1,
    "roi_shape": [64, 64],
    "bragg_center_px": [42.0, 36.0],
    "lattice_c_angstrom": 4.013,
    "reflection_l": 2,
    "thickness_nm": 11.7,
    "optics": {
        "kind": "zone_plate",
        "diameter_um": 149,
        "focal_length_mm": 21.874,
        "central_stop_diameter_um": 77,
    },
}


def positions(shape):
    """Of the slow and of the fast motor at each point."""
    slow, fast = np.indices(shape)
    return slow.ravel() * 0.5, fast.ravel() * 0.1


SLOW, FAST = positions(SHAPE)


@pytest.fixture(scope="module")
def frames():
    """Patterns of a film in the middle of a detector, in scan order (20, 72, 80)."""
    random = np.random.default_rng(7)
    geometry = Geometry.parse(GEOMETRY, where="test")
    values = (random.uniform(-w, w, POINTS) for w in (1e-3, 0.02, 0.02))
    patterns = forward(*values, geometry)
    patterns *= 5000 / patterns.sum(axis=(1, 2)).mean()
    frames = np.zeros((POINTS, HEIGHT, WIDTH), np.int32)
    frames[(slice(None), *geometry.roi.slices)] = random.poisson(patterns)
    return frames


@pytest.fixture(scope="module")
def expected(frames):
    """Maps of documents with the frames in them, as of a RunEngine."""

    def analyse(snake=False, nanobeam=GEOMETRY):
        run = compose_run(
            metadata={
                "shape": [ROWS, COLUMNS],
                "snaking": [False, snake],
                "nanobeam": {**nanobeam, "detector_shape": [HEIGHT, WIDTH]},
            }
        )
        key = {"source": "t", "dtype": "array", "dtype_numpy": "<i4", "shape": [HEIGHT, WIDTH]}
        stream = run.compose_descriptor(name="primary", data_keys={"img": key})
        documents = [("start", run.start_doc), ("descriptor", stream.descriptor_doc)]
        for frame in frames:
            event = stream.compose_event(
                data={"img": frame}, timestamps={"img": 0.0}, validate=False
            )
            documents.append(("event", event))
        return to_maps(list(derive([*documents, ("stop", run.compose_stop())])))

    found = {}

    def maps(**options):
        name = repr(options)
        if name not in found:
            found[name] = analyse(**options)
        return found[name]

    return maps


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    client = open_catalog(
        tmp_path_factory.mktemp("catalog"), readable_storage=[tmp_path_factory.getbasetemp()]
    )
    yield client
    client.context.close()


@pytest.fixture
def taken(catalog):
    """Ingest a file: its documents, checked, what Tiled shows of it, and what was said."""

    def take(path, geometry=GEOMETRY, shape=None, snake=None, dataset=None, index=0):
        options = Options(shape, dataset)
        layout, scans = find_scans(Path(path), options)
        documents = documents_of(
            scans[index], geometry, Path(path), layout, shape=shape, snake=snake
        )
        for name, doc in documents:
            schema_validators[DocumentNames[name]].validate(doc)
        results = list(
            ingest([path], geometry, to=catalog, shape=shape, snake=snake, dataset=dataset)
        )
        result = results[index]
        assert (result.status, result.layout) == ("new", layout), result
        assert result.uid == documents[0][1]["uid"]
        return documents, catalog["scans"][result.uid], result

    return take


def analysed(documents):
    return to_maps(list(derive(documents)))


def same(maps, expected, *, but=()):
    """Assert that every value is the same, bit for bit."""
    for name in ("strain", "omega", "chi", "strain_sigma", "counts", "deviance", "flags"):
        found, wanted = maps[name].values.copy(), expected[name].values.copy()
        for place in but:
            found[place] = wanted[place] = 0
        np.testing.assert_array_equal(found, wanted, err_msg=name)


def grid(frames, snake=False):
    """Frames in scan order as (rows, columns, height, width)."""
    frames = frames.reshape(ROWS, COLUMNS, *frames.shape[1:]).copy()
    if snake:
        frames[1::2] = frames[1::2, ::-1]
    return frames


# --------------------------------------------------------------------------- NumPy


def test_a_stack_already_cut_is_mapped_as_it_lies(tmp_path, taken, frames, expected):
    g = Geometry.parse(GEOMETRY, where="test")
    cut = np.ascontiguousarray(frames[(slice(None), *g.roi.slices)].astype(np.float32))
    np.save(tmp_path / "exp_data.npy", cut)
    geometry = GEOMETRY | {"bragg_center_px": [32.0, 32.0]}
    documents, scan, _ = taken(
        tmp_path / "exp_data.npy", geometry, shape=(ROWS, COLUMNS), snake=True
    )
    same(analysed(documents), expected(snake=True))
    np.testing.assert_array_equal(np.asarray(scan["frames"][:]), grid(cut, snake=True))
    np.testing.assert_array_equal(np.asarray(scan["patterns"][1]), grid(cut, snake=True)[1])


def test_the_axes_of_a_stack_tell_the_shape(tmp_path, taken, frames, expected):
    np.save(tmp_path / "a.npy", frames.astype(">u2").reshape(ROWS, COLUMNS, HEIGHT, WIDTH))
    documents, scan, _ = taken(tmp_path / "a.npy")
    assert documents[0][1]["shape"] == [ROWS, COLUMNS]
    same(analysed(documents), expected())
    np.testing.assert_array_equal(np.asarray(scan["frames"][2]), grid(frames)[2])


# ---------------------------------------------------------------------------- HDF5


def test_any_dataset_is_found_however_it_is_compressed(tmp_path, taken, frames, expected):
    with h5py.File(tmp_path / "scan_0012.h5", "w") as file:
        file.create_dataset("deep/down/img", data=frames, chunks=(1, HEIGHT, WIDTH), **BSLZ4)
        file["a link"] = h5py.SoftLink("/deep/down/img")
        file["counts"] = frames.sum(axis=(1, 2))
    documents, scan, _ = taken(tmp_path / "scan_0012.h5", shape=(ROWS, COLUMNS), snake=True)
    assert documents[0][1]["scan_id"] == 12
    same(analysed(documents), expected(snake=True))
    np.testing.assert_array_equal(np.asarray(scan["frames"][:]), grid(frames, snake=True))


BSLZ4 = dict(hdf5plugin.Bitshuffle(cname="lz4"))


def test_parts_of_a_series_follow_each_other(tmp_path, taken, frames, expected):
    with h5py.File(tmp_path / "master.h5", "w") as file:
        for i, part in enumerate(np.split(frames, [8, 16]), 1):
            with h5py.File(tmp_path / f"part_{i}.h5", "w") as other:
                other["entry/data/data"] = part
            link = h5py.ExternalLink(f"part_{i}.h5", "/entry/data/data")
            file[f"entry/data/data_{i:06d}"] = link
    documents, scan, _ = taken(tmp_path / "master.h5", shape=(ROWS, COLUMNS))
    same(analysed(documents), expected())
    np.testing.assert_array_equal(np.asarray(scan["frames"][:]), grid(frames))


def write_nexus(path, frames, mask, shape=SHAPE):
    """With all that the standard has for the geometry, in units of its own."""
    with h5py.File(path, "w") as file:
        file.attrs["default"] = "entry"
        entry = group(file, "entry", "NXentry", default="data")
        entry["title"] = "mesh y x"
        detector = group(group(entry, "instrument", "NXinstrument"), "eiger", "NXdetector")
        detector["data"] = frames.reshape(*shape, *frames.shape[1:])
        for name, value, units in (
            ("distance", 850.0, "mm"),
            ("x_pixel_size", 1.1e-4, "m"),
            ("beam_center_x", 11.0, "pixel"),
        ):
            detector[name] = value
            detector[name].attrs["units"] = units
        detector["pixel_mask"], detector["saturation_value"] = mask, 60000
        beam = group(entry["instrument"], "beam", "NXbeam")
        beam["incident_energy"] = 11300.0
        beam["incident_energy"].attrs["units"] = "eV"
        data = group(entry, "data", "NXdata", signal="images", axes=["y", "x", ".", "."])
        data["images"] = h5py.SoftLink("/entry/instrument/eiger/data")
        data["y"], data["x"] = np.arange(shape[0]) * 0.5, np.arange(shape[1]) * 0.1
        data["y"].attrs["units"] = data["x"].attrs["units"] = "um"
        # another detector, which is not the default
        other = group(entry["instrument"], "camera", "NXdetector")
        other["data"] = np.zeros((3, 8, 8))
    return path


TOLD = ("energy_keV", "detector_distance_m", "pixel_size_um")
"""What NeXus files tell of the geometry."""


def test_nexus_tells_the_geometry_that_is_lacking_whatever_its_units(
    tmp_path, taken, frames, expected
):
    mask = np.zeros((HEIGHT, WIDTH), np.uint32)
    mask[10, 20], mask[:, 0] = 2, 1
    geometry = {k: v for k, v in GEOMETRY.items() if k not in TOLD}
    documents, _, _ = taken(write_nexus(tmp_path / "scan.nxs", frames, mask), geometry)
    start = documents[0][1]
    assert [start["nanobeam"][k] for k in TOLD] == pytest.approx([11.3, 0.85, 110])
    assert start["nanobeam"]["pixel_mask"] == [[10, 20]]  # of the ROI
    assert start["nanobeam"]["bragg_center_px"] == GEOMETRY["bragg_center_px"]
    maps = analysed(documents)
    same(maps, expected(nanobeam=GEOMETRY | {"pixel_mask": [[10, 20]], "saturation_value": 60000}))
    np.testing.assert_allclose(maps["y"], np.arange(ROWS) * 0.5)
    np.testing.assert_allclose(maps["x"], np.arange(COLUMNS) * 0.1)
    assert documents[1][1]["data_keys"]["x"]["units"] == "um"


def group(parent, name, kind, **attributes):
    made = parent.create_group(name)
    made.attrs["NX_class"] = kind
    made.attrs.update(attributes)
    return made


def write_bliss(folder, frames, done=None, shape=SHAPE):
    """One file for all scans, with frames in files of the detector."""
    slow, fast = positions(shape)
    done = done or len(slow)
    (folder / "scan0001").mkdir()
    with h5py.File(folder / "scan0001" / "mpx1x4_0000.h5", "w") as file:
        file["entry/measurement/data"] = frames[:done]
    layout = h5py.VirtualLayout(frames.shape, frames.dtype)
    source = h5py.VirtualSource(
        "scan0001/mpx1x4_0000.h5", "entry/measurement/data", (done, *frames.shape[1:])
    )
    layout[:done] = source
    with h5py.File(folder / "sample.h5", "w") as file:
        alignment = file.create_group("1.1")
        alignment["title"], alignment["measurement/epoch"] = "ascan piy 0 1 10", np.ones(11)
        scan = file.create_group("2.1")
        scan["title"] = f"sxdm( pix, 0, 0.4, {shape[1]}, piy, 0, 1.5, {shape[0]}, 0.01 )"
        scan["start_time"] = "2026-11-02T10:11:12+01:00"
        scan["technique/dim0"], scan["technique/dim1"] = shape[::-1]
        measurement = scan.create_group("measurement")
        measurement.create_virtual_dataset("mpx1x4", layout)
        for name, values in (("pix", fast), ("piy", slow), ("epoch", 1.7e9 + fast + slow)):
            padded = values.copy()
            padded[done:] = 0
            key = name if name == "epoch" else f"{name}_position"
            measurement[key] = padded
            measurement[key].attrs["units"] = "s" if name == "epoch" else "um"
    return folder / "sample.h5"


def test_bliss_scans_are_found_in_their_file_with_shape_and_positions(
    tmp_path, taken, frames, expected
):
    documents, scan, _ = taken(write_bliss(tmp_path, frames))
    start = documents[0][1]
    assert (start["shape"], start["motors"], start["scan_id"]) == ([4, 5], ["piy", "pix"], 2)
    assert start["time"] == 1793610672.0
    maps = analysed(documents)
    same(maps, expected())
    np.testing.assert_allclose(maps["pix_measured"].values.ravel(), FAST)
    np.testing.assert_allclose(np.asarray(scan["piy_measured"]).ravel(), SLOW)
    np.testing.assert_array_equal(np.asarray(scan["frames"][3]), grid(frames)[3])


def test_bliss_pads_an_interrupted_scan_and_the_padding_is_no_frame(
    tmp_path, taken, frames, expected
):
    documents, scan, result = taken(write_bliss(tmp_path, frames, done=13))
    assert (result.points, documents[-1][1]["num_events"]) == (13, {"primary": 13})
    assert result.notes == ("2.1: 7 of 20 points were not measured",)
    maps = analysed(documents)
    missing = [divmod(i, COLUMNS) for i in range(13, POINTS)]
    assert all(np.isnan(maps["counts"].values[place]) for place in missing)
    same(maps, expected(), but=missing)
    assert not np.asarray(scan["frames"][3]).any()


def write_nanomax(path, frames, shape=SHAPE):
    """With the command, which counts intervals, and measured positions."""
    slow, fast = positions(shape)
    command = f"npointflyscan sx 0 0.4 {shape[1] - 1} sy 0 1.5 {shape[0] - 1} 0.05 0.02"
    with h5py.File(path, "w") as file:
        file["entry/description"] = [command.encode()]
        file["entry/measurement/merlin/frames"] = frames
        file["entry/measurement/alba2/1"] = np.ones(len(slow))
        file["entry/measurement/pseudo/x"], file["entry/measurement/pseudo/y"] = fast, slow
    return path


def test_nanomax_tells_the_shape_in_its_command(tmp_path, taken, frames, expected):
    documents, _, _ = taken(write_nanomax(tmp_path / "000041.h5", frames))
    start = documents[0][1]
    assert (start["shape"], start["motors"], start["scan_id"]) == ([4, 5], ["sy", "sx"], 41)
    maps = analysed(documents)
    same(maps, expected())
    np.testing.assert_allclose(maps["sy_measured"].values.ravel(), SLOW)


# ---------------------------------------------------------------------------- TIFF


def write_tiffs(folder, frames, name="img_{:05d}.tif", first=1, leave_out=()):
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        if i not in leave_out:
            tifffile.imwrite(folder / name.format(i + first), frame)
    return folder


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("nanobeam_bluesky.documents.pipeline.DEADLINE_SECONDS", 0.0)


@pytest.mark.parametrize("lost", [(7, 8), (0,)], ids=["inside", "the first"])
def test_a_missing_image_is_a_flagged_point_and_the_others_keep_theirs(
    tmp_path, taken, frames, expected, impatient, lost
):
    folder = write_tiffs(tmp_path / "scan 5", frames, leave_out=lost)
    documents, _, result = taken(folder, shape=(ROWS, COLUMNS))
    points = ", ".join(str(i + 1) for i in lost)
    assert result.notes == (f"{len(lost)} images are missing, of the points {points}",)
    maps = analysed(documents)
    places = [divmod(i, COLUMNS) for i in lost]
    assert [maps["flags"].values[place] for place in places] == [32] * len(lost)
    same(maps, expected(), but=places)


def test_one_image_stands_for_its_series_whose_numbers_may_begin_anywhere(
    tmp_path, taken, frames, expected, catalog
):
    folder = write_tiffs(tmp_path / "two", frames, "scan_7_{}.tiff", first=98)
    write_tiffs(tmp_path / "other", frames[:3], "x_{}.tif")
    for path in (tmp_path / "other").iterdir():
        path.rename(folder / path.name)
    documents, scan, result = taken(folder / "scan_7_103.tiff", shape=(ROWS, COLUMNS))
    same(analysed(documents), expected())
    np.testing.assert_array_equal(np.asarray(scan["frames"][1:3]), grid(frames)[1:3])
    stored = catalog["raw"][result.uid]["primary"]["frames"]
    np.testing.assert_array_equal(stored[5:9, 3], frames[5:9, 3])


def write_mda(path, done=None, shape=SHAPE):
    """A scan in two dimensions by the format's description, byte by byte."""
    all_rows, columns = shape
    done = done or all_rows * columns

    def integers(*values):
        return struct.pack(f">{len(values)}i", *values)

    def text(value):
        data = value.encode()
        filled = data + bytes(-len(data) % 4)
        return integers(len(data), len(data)) + filled if data else integers(0)

    def part(rank, wanted, there, pointers, name, motor, unit, positions):
        made = integers(rank, wanted, there) + integers(*pointers)
        made += text(name) + text("Nov 02, 2026 10:11:12.345678") + integers(1, 1, 1)
        made += integers(0) + text(motor) + text("stage") + text("LINEAR") + text(unit)
        made += text(motor.replace("VAL", "RBV")) + text("") + text(unit)
        made += integers(0) + text("26idc:det") + text("counts") + text("")
        made += integers(0) + text("26idc:acquire") + struct.pack(">f", 1.0)
        return made + struct.pack(f">{wanted}d", *positions) + bytes(4 * wanted)

    head = struct.pack(">f", 1.3) + integers(123, 2, all_rows, columns, 1, 0)
    full = divmod(done, columns)
    rows = -(-done // columns)
    slow = np.arange(all_rows) * 0.5
    slow[rows:] = 0
    outer = ("26idc:scan2", "26idc:hybY.VAL", "um", slow)
    at = len(head) + len(part(2, all_rows, full[0], [0] * all_rows, *outer))
    inner, pointers = b"", []
    for row in range(rows):
        pointers.append(at + len(inner))
        there = min(columns, done - row * columns)
        fast = np.arange(columns) * 0.1
        fast[there:] = 0
        inner += part(1, columns, there, [], "26idc:scan1", "26idc:hybX.VAL", "um", fast)
    pointers += [0] * (all_rows - rows)
    path.write_bytes(head + part(2, all_rows, full[0], pointers, *outer) + inner)
    return path


def test_26_id_keeps_positions_and_images_apart_and_hot_pixels_go_by_the_mask(
    tmp_path, taken, frames, expected, catalog
):
    hot = frames.copy()
    hot[:, 30, 40] = hot[:, 50, 12] = 1000
    write_tiffs(tmp_path / "images" / "123", hot, "scan_123_img_{:06d}.tif")
    write_mda(tmp_path / "123.mda")
    masked = GEOMETRY | {"pixel_mask": [[30, 40], [50, 12]]}
    documents, scan, result = taken(tmp_path / "123.mda", masked)
    start = documents[0][1]
    assert (start["scan_id"], start["motors"]) == (123, ["hybY", "hybX"])
    maps = analysed(documents)
    same(maps, expected(nanobeam=masked))
    np.testing.assert_allclose(maps["hybX_measured"].values.ravel(), FAST)
    np.testing.assert_allclose(np.asarray(scan["hybY_measured"]).ravel(), SLOW)
    np.testing.assert_array_equal(np.asarray(scan["frames"][2]), grid(hot)[2])
    replayed = analysed(catalog["raw"][result.uid].documents())
    same(replayed, maps)
    np.testing.assert_allclose(replayed["hybX_measured"], maps["hybX_measured"])


def test_an_interrupted_26_id_scan_has_the_points_that_were_measured(
    tmp_path, taken, frames, expected, impatient
):
    write_tiffs(tmp_path / "images" / "7", frames[:13], "scan_7_img_{:06d}.tif", leave_out=[4])
    write_mda(tmp_path / "7.mda", done=13)
    documents, _, result = taken(tmp_path / "7.mda")
    assert result.notes == (
        "interrupted: 13 of 4 × 5 points",
        "1 images are missing, of the points 5",
    )
    maps = analysed(documents)
    assert maps["flags"].values[0, 4] == 32
    assert np.isfinite(maps["counts"].values).sum() == 12
    same(maps, expected(), but=[divmod(i, COLUMNS) for i in (4, *range(13, POINTS))])


def test_an_mda_file_without_images_says_where_they_should_be(tmp_path):
    write_mda(tmp_path / "0123.mda")
    with pytest.raises(ValueError, match=f"no images: expected the folder {tmp_path}/images/0123"):
        find_scans(tmp_path / "0123.mda", Options())
