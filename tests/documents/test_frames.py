"""Frames and positions are read from real files, finished or growing, whole or damaged."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import get_args

import h5py
import numpy as np
import pytest
import tifffile

from nanobeam_bluesky.documents import FrameReader, PointBlock, ReadStatus, StoredRows
from nanobeam_bluesky.documents import frames as module
from nanobeam_bluesky.documents.binning import bin_frames
from nanobeam_bluesky.documents.frames import MAX_OPEN_FILES
from nanobeam_bluesky.geometry import Geometry, Orientation

OK, RETRY, NEVER = ReadStatus.OK, ReadStatus.RETRY, ReadStatus.NEVER


def geometry(**changes):
    values = Geometry.published().model_dump() | {"roi_shape": (32, 48)} | changes
    return Geometry.model_validate(values)


def frames(n, shape=(512, 512), dtype=np.uint16):
    return np.random.default_rng(n).integers(0, 50, (n, *shape)).astype(dtype)


def write(path, data, **options):
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset("entry/data", data=data, chunks=(1, *data.shape[1:]), **options)
    return StoredRows(str(path), "entry/data", 0)


def plain_pattern(frame, geometry):
    """What a pattern is, pixel by pixel."""
    roi, b = geometry.roi, geometry.binning
    binned = np.zeros((roi.height // b, roi.width // b), np.float32)
    for i in range(binned.shape[0]):
        for j in range(binned.shape[1]):
            row, col = roi.row + i * b, roi.col + j * b
            binned[i, j] = frame[row : row + b, col : col + b].sum()
    turns = {
        "identity": binned,
        "flip_x": np.fliplr(binned),
        "flip_y": np.flipud(binned),
        "rotate_180": np.rot90(binned, 2),
        "transpose": binned.T,
        "rotate_90": np.rot90(binned),
        "rotate_270": np.rot90(binned, 3),
        "antitranspose": np.rot90(binned, 2).T,
    }
    return turns[geometry.orientation]


@pytest.mark.parametrize("orientation", get_args(Orientation))
@pytest.mark.parametrize("binning", [1, 2, 4])
def test_patterns_are_the_binned_turned_roi(tmp_path, orientation, binning):
    g = geometry(orientation=orientation, binning=binning)
    data = frames(3)
    patterns, _, status, _ = FrameReader(g).patterns(
        PointBlock(1, 3, write(tmp_path / "a.h5", data))
    )
    assert status.tolist() == [OK] * 3
    for pattern, frame in zip(patterns, data, strict=True):
        np.testing.assert_array_equal(pattern, plain_pattern(frame, g))


def test_the_bragg_centre_turns_with_the_pattern():
    """A bright pixel at the Bragg centre ends up at `pattern_center`."""
    for orientation in ("identity", "flip_x", "transpose", "rotate_90", "rotate_270"):
        g = geometry(orientation=orientation, bragg_center_px=(251.5, 259.5), binning=1)
        frame = np.zeros((512, 512), np.uint16)
        frame[259, 251] = 1
        pattern = bin_frames(frame[None][(slice(None), *g.roi.slices)], g)[0][0]
        row, col = np.argwhere(pattern)[0]
        assert (col + 0.5, row + 0.5) == g.pattern_center


@pytest.mark.parametrize("compression", ["bslz4", "gzip"])
def test_compressed_frames_are_read(tmp_path, compression):
    import hdf5plugin

    options = {"bslz4": dict(hdf5plugin.Bitshuffle(cname="lz4")), "gzip": {"compression": "gzip"}}
    data = frames(2)
    stored = write(tmp_path / "a.h5", data, **options[compression])
    patterns, *_ = FrameReader(geometry()).patterns(PointBlock(1, 2, stored))
    np.testing.assert_array_equal(patterns[1], plain_pattern(data[1], geometry()))


def test_several_frames_of_a_point_are_summed(tmp_path):
    data = frames(6)
    stored = write(tmp_path / "a.h5", data)
    rows = StoredRows(stored.path, stored.dataset, 2, rows_per_point=2)
    patterns, *_ = FrameReader(geometry()).patterns(PointBlock(2, 2, rows))
    np.testing.assert_array_equal(patterns[1], plain_pattern(data[4] + data[5], geometry()))


def test_a_masked_pixel_takes_the_mean_of_its_bin_and_does_not_saturate():
    g = geometry(
        pixel_mask=((240, 240), (250, 250), (250, 251), (251, 250), (251, 251)),
        saturation_value=1000,
    )
    roi = np.full((1, 32, 48), 3, np.uint16)
    rows, cols = g.roi.row, g.roi.col
    roi[0, 240 - rows, 240 - cols] = 5000
    patterns, saturated = bin_frames(roi, g)
    assert not saturated[0]
    assert patterns[0, (240 - rows) // 2, (240 - cols) // 2] == 12
    assert patterns[0, (250 - rows) // 2, (250 - cols) // 2] == 0
    assert np.sort(np.unique(patterns)).tolist() == [0, 12]


def test_a_counter_that_has_run_full_is_saturated_without_being_told():
    roi = np.zeros((2, 4, 4), np.uint16)
    roi[1, 2, 3] = 65535
    assert bin_frames(roi, geometry())[1].tolist() == [False, True]
    assert bin_frames(roi.astype(float), geometry())[1].tolist() == [False, False]


def test_a_saturated_pixel_is_noticed_in_its_frame_only():
    roi = np.zeros((3, 32, 48), np.uint16)
    roi[1, 4, 5] = 1000
    assert bin_frames(roi, geometry(saturation_value=1000))[1].tolist() == [False, True, False]


def test_a_growing_file_is_read_as_far_as_it_is(tmp_path):
    data = frames(4)
    reader = FrameReader(geometry())
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        dataset = file.create_dataset(
            "d", (0, 512, 512), "<u2", maxshape=(None, 512, 512), chunks=(1, 512, 512)
        )
        file.swmr_mode = True
        block = PointBlock(1, 4, StoredRows(str(tmp_path / "a.h5"), "d", 0))
        for n in range(5):
            if n:
                dataset.resize(n, axis=0)
                dataset[n - 1] = data[n - 1]
                dataset.flush()
            patterns, _, status, reason = reader.patterns(block)
            assert status.tolist() == [OK] * n + [RETRY] * (4 - n)
            assert bool(reason) == (n < 4)
    np.testing.assert_array_equal(patterns[3], plain_pattern(data[3], geometry()))


def test_rows_that_are_allocated_before_they_are_written_are_read_afresh(tmp_path):
    data = frames(2)
    reader = FrameReader(geometry())
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        dataset = file.create_dataset("d", (2, 512, 512), "<u2", chunks=(1, 512, 512))
        file.swmr_mode = True
        stored = StoredRows(str(tmp_path / "a.h5"), "d", 0)
        for i in range(2):
            dataset[i] = data[i]
            dataset.flush()
            patterns, *_ = reader.patterns(PointBlock(1, i + 1, stored))
            np.testing.assert_array_equal(patterns[i], plain_pattern(data[i], geometry()))


def test_a_file_that_appears_later_is_found_then(tmp_path):
    reader = FrameReader(geometry())
    block = PointBlock(1, 2, StoredRows(str(tmp_path / "a.h5"), "entry/data", 0))
    _, _, status, reason = reader.patterns(block)
    assert status.tolist() == [RETRY] * 2
    assert "No such file" in reason
    write(tmp_path / "a.h5", frames(2))
    assert reader.patterns(block)[2].tolist() == [OK] * 2


def test_a_file_whose_writer_has_no_swmr_is_read_when_it_is_closed(tmp_path):
    reader = FrameReader(geometry())
    block = PointBlock(1, 1, StoredRows(str(tmp_path / "a.h5"), "d", 0))
    code = (
        "import h5py, numpy, sys\n"
        "with h5py.File(sys.argv[1], 'w') as f:\n"
        "    f['d'] = numpy.ones((1, 512, 512), 'u2'); print(1, flush=True); input()\n"
    )
    command = [sys.executable, "-c", code, block.stored.path]
    with Popen(command, stdin=PIPE, stdout=PIPE) as writer:
        writer.stdout.readline()
        assert reader.patterns(block)[2].tolist() == [RETRY]
        writer.communicate(b"\n")
    assert reader.patterns(block)[2].tolist() == [OK]


def test_rows_that_are_announced_before_they_are_written_are_waited_for(tmp_path):
    """HDF5 would give zeros for them."""
    data = frames(4)
    reader = FrameReader(geometry())
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        for name, options in (("d", {}), ("z", {"compression": "gzip"})):
            file.create_dataset(name, data.shape, "<u2", chunks=(1, 512, 512), **options)
        file.swmr_mode = True
        for name in "dz":
            block = PointBlock(1, 4, StoredRows(str(tmp_path / "a.h5"), name, 0))
            for n in range(5):
                if n:
                    file[name][n - 1] = data[n - 1]
                    file[name].flush()
                patterns, _, status, reason = reader.patterns(block)
                assert status.tolist() == [OK] * n + [RETRY] * (4 - n)
                assert n == 4 or "row 3 is not written yet" in reason
            np.testing.assert_array_equal(patterns[3], plain_pattern(data[3], geometry()))


def test_frames_of_a_virtual_dataset_wait_for_their_file(tmp_path):
    data = frames(4)
    layout = h5py.VirtualLayout(data.shape, "u2")
    for i in range(2):
        layout[2 * i : 2 * i + 2] = h5py.VirtualSource(f"{i}.h5", "entry/data", (2, 512, 512))
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("d", layout)
    reader = FrameReader(geometry())
    block = PointBlock(1, 4, StoredRows(str(tmp_path / "a.h5"), "d", 0))
    write(tmp_path / "0.h5", data[:2])
    _, _, status, reason = reader.patterns(block)
    assert (status.tolist(), "1.h5 is not there" in reason) == ([OK, OK, RETRY, RETRY], True)
    write(tmp_path / "1.h5", data[2:])
    patterns, _, status, _ = reader.patterns(block)
    assert status.tolist() == [OK] * 4
    np.testing.assert_array_equal(patterns[3], plain_pattern(data[3], geometry()))


@pytest.mark.parametrize("swmr", [False, True])
@pytest.mark.parametrize("how", ["replaced", "written over"])
def test_another_file_of_the_same_name_is_read_instead(tmp_path, how, swmr):
    data = frames(5)
    reader = FrameReader(geometry())
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        file.create_dataset("entry/data", data=data[:3], chunks=(1, 512, 512))
        if swmr:
            file.swmr_mode = True
        else:
            file.close()
        block = PointBlock(1, 3, StoredRows(str(tmp_path / "a.h5"), "entry/data", 0))
        assert reader.patterns(block)[2].tolist() == [OK] * 3
    if how == "replaced":
        write(tmp_path / "b.h5", data[3:])
        os.replace(tmp_path / "b.h5", tmp_path / "a.h5")
    else:
        (tmp_path / "a.h5").write_bytes(Path(write(tmp_path / "b.h5", data[3:]).path).read_bytes())
    patterns, _, status, _ = reader.patterns(block)
    assert status.tolist() == [OK, OK, RETRY]
    np.testing.assert_array_equal(patterns[0], plain_pattern(data[3], geometry()))


def test_what_was_open_when_its_file_was_moved_away_is_read_on(tmp_path):
    stored = write(tmp_path / "a.h5", frames(2))
    reader = FrameReader(geometry())
    assert reader.patterns(PointBlock(1, 1, stored))[2].tolist() == [OK]
    os.rename(stored.path, tmp_path / "b.h5")
    patterns, _, status, _ = reader.patterns(PointBlock(1, 2, stored))
    assert status.tolist() == [OK] * 2
    np.testing.assert_array_equal(patterns[1], plain_pattern(frames(2)[1], geometry()))


def test_a_file_that_is_truncated_while_it_is_read_loses_only_what_is_cut_off(tmp_path):
    stored = write(tmp_path / "a.h5", frames(4))
    reader = FrameReader(geometry())
    assert reader.patterns(PointBlock(1, 1, stored))[2].tolist() == [OK]
    os.truncate(stored.path, os.path.getsize(stored.path) * 5 // 8)
    assert reader.patterns(PointBlock(1, 4, stored))[2].tolist() == [OK, OK, RETRY, RETRY]


def test_a_truncated_file_loses_only_what_is_cut_off(tmp_path):
    stored = write(tmp_path / "a.h5", frames(4))
    os.truncate(stored.path, os.path.getsize(stored.path) * 5 // 8)
    patterns, _, status, reason = FrameReader(geometry()).patterns(PointBlock(1, 4, stored))
    assert status.tolist() == [OK, OK, RETRY, RETRY]
    assert "truncated" in reason
    np.testing.assert_array_equal(patterns[1], plain_pattern(frames(4)[1], geometry()))


def test_one_damaged_chunk_costs_one_point(tmp_path):
    stored = write(tmp_path / "a.h5", frames(4), compression="gzip")
    with h5py.File(stored.path, "r+") as file:
        file["entry/data"].id.write_direct_chunk((2, 0, 0), b"this is no gzip")
    patterns, _, status, reason = FrameReader(geometry()).patterns(PointBlock(1, 4, stored))
    assert status.tolist() == [OK, OK, RETRY, OK]
    assert "row 2" in reason
    np.testing.assert_array_equal(patterns[3], plain_pattern(frames(4)[3], geometry()))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((2, 100, 100), np.uint16), "100 × 100"),
        (np.zeros((2, 512), np.uint16), r"shape \(2, 512\)"),
        (np.zeros((2, 512, 512), "S3"), "expected a dataset of numbers"),
    ],
)
def test_frames_of_the_wrong_kind_are_never_readable(tmp_path, data, words):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["d"] = data
    stored = StoredRows(str(tmp_path / "a.h5"), "d", 0)
    _, _, status, reason = FrameReader(geometry()).patterns(PointBlock(1, 2, stored))
    assert status.tolist() == [NEVER] * 2
    assert re.search(words, reason)


@pytest.mark.parametrize(
    ("dataset", "changes"),
    [
        ("d", {}),
        ("d", {"rows_per_file": 1}),
        ("", {"rows_per_file": 1}),
        ("", {"handler": json.dumps(["NPY_SEQ", {}, {"index": 0}])}),
    ],
    ids=["HDF5", "HDF5 files", "TIFF files", "handler"],
)
def test_what_is_no_file_of_its_own_is_never_opened(tmp_path, dataset, changes):
    """A FIFO that nobody writes to would be waited for for ever."""
    os.mkfifo(tmp_path / "fifo")
    write(tmp_path / "real.h5", frames(1))
    (tmp_path / "link").symlink_to(tmp_path / "real.h5")
    reader = FrameReader(geometry())
    for path in ("/dev/zero", tmp_path / "fifo", tmp_path / "link"):
        stored = StoredRows(str(path), dataset, 0, **changes)
        for read in (reader.patterns, reader.scalars):
            *_, status, reason = read(PointBlock(1, 1, stored))
            assert (status.tolist(), "regular file" in reason) == ([NEVER], True), (path, reason)


def test_links_of_folders_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    stored = write(tmp_path / "real" / "a.h5", frames(1))
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    reader = FrameReader(geometry())
    through = replace(stored, path=str(tmp_path / "folder" / "a.h5"))
    assert reader.patterns(PointBlock(1, 1, through))[2].tolist() == [OK]


def test_frames_of_four_axes_follow_each_other(tmp_path):
    data = frames(6)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["d"] = data.reshape(2, 3, 512, 512)
    reader = FrameReader(geometry())
    stored = StoredRows(str(tmp_path / "a.h5"), "d", 2)
    patterns, _, status, _ = reader.patterns(PointBlock(1, 5, stored))
    assert status.tolist() == [OK] * 4 + [RETRY]
    for pattern, frame in zip(patterns, data[2:], strict=False):
        np.testing.assert_array_equal(pattern, plain_pattern(frame, geometry()))
    summed = replace(stored, row=0, rows_per_point=3)
    patterns, *_ = reader.patterns(PointBlock(1, 2, summed))
    np.testing.assert_array_equal(patterns[1], plain_pattern(data[3:].sum(axis=0), geometry()))


def test_more_frames_of_a_point_than_fit_into_memory_are_summed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FRAMES", 2)
    data = frames(6)
    stored = replace(write(tmp_path / "a.h5", data), rows_per_point=3)
    patterns, *_ = FrameReader(geometry()).patterns(PointBlock(1, 2, stored))
    np.testing.assert_array_equal(patterns[1], plain_pattern(data[3:].sum(axis=0), geometry()))


@pytest.mark.parametrize("limit", [None, 1000])
def test_a_point_is_saturated_where_one_of_its_frames_is(tmp_path, limit):
    """And not where only their sum would be."""
    data = np.full((6, 512, 512), 600, np.uint16)
    data[3, 256, 256] = limit or 65535
    stored = replace(write(tmp_path / "a.h5", data), rows_per_point=2)
    reader = FrameReader(geometry(saturation_value=limit))
    assert reader.patterns(PointBlock(1, 3, stored))[1].tolist() == [False, True, False]


def test_an_absurd_number_of_frames_of_a_point_is_given_up_at_once(tmp_path):
    stored = replace(write(tmp_path / "a.h5", frames(2)), rows_per_point=10**15)
    _, _, status, _ = FrameReader(geometry()).patterns(PointBlock(1, 3, stored))
    assert status.tolist() == [RETRY] * 3


def test_the_points_of_a_scan_share_a_dataset_of_a_length_not_told(tmp_path):
    """Encoders that were read so often for each point that their number divides."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(30.0)
    reader = FrameReader(geometry())
    block = PointBlock(1, 3, StoredRows(str(path), "x", 0, shared_by=3, scale=-0.5))
    assert reader.scalars(block)[0].tolist() == [-2.25, -7.25, -12.25]
    assert reader.scalars(block.part(2, 4))[0].tolist() == [-7.25, -12.25]
    for points in (4, 31):
        uneven = PointBlock(1, points, StoredRows(str(path), "x", 0, shared_by=points))
        _, status, reason = reader.scalars(uneven)
        assert status.tolist() == [RETRY] * points
        assert "do not share equally" in reason


def tiff(path, data):
    tifffile.imwrite(path, data, photometric="minisblack")


def test_a_tiff_file_of_each_frame_is_read_when_it_is_there(tmp_path):
    data = frames(4)
    reader = FrameReader(geometry())
    stored = StoredRows(f"{tmp_path}/i_{{:04d}}.tif", "", 0, rows_per_file=1)
    tiff(tmp_path / "i_0000.tif", data[0])
    tiff(tmp_path / "i_0002.tif", data[2])
    tiff(tmp_path / "i_0003.tif", data[3])
    with open(tmp_path / "i_0003.tif", "r+b") as file:
        file.truncate(100)
    patterns, _, status, reason = reader.patterns(PointBlock(1, 4, stored))
    assert status.tolist() == [OK, RETRY, OK, RETRY]
    assert "i_0003.tif" in reason
    np.testing.assert_array_equal(patterns[2], plain_pattern(data[2], geometry()))
    tiff(tmp_path / "i_0001.tif", data[1])
    pairs = replace(stored, rows_per_point=2)
    patterns, *_ = reader.patterns(PointBlock(1, 1, pairs))
    np.testing.assert_array_equal(patterns[0], plain_pattern(data[:2].sum(axis=0), geometry()))


def test_files_of_several_frames_are_read_one_after_the_other(tmp_path):
    data = frames(6)
    for i in range(2):
        tiff(tmp_path / f"{i}.tif", data[3 * i : 3 * i + 3])
        write(tmp_path / f"{i}.h5", data[3 * i : 3 * i + 3])
    for end, dataset in ((".tif", ""), (".h5", "entry/data")):
        stored = StoredRows(f"{tmp_path}/{{:d}}{end}", dataset, 1, 2, rows_per_file=3)
        patterns, _, status, _ = FrameReader(geometry()).patterns(PointBlock(1, 2, stored))
        assert status.tolist() == [OK] * 2
        for i, pattern in enumerate(patterns):
            whole = data[1 + 2 * i : 3 + 2 * i].sum(axis=0)
            np.testing.assert_array_equal(pattern, plain_pattern(whole, geometry()))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((100, 100), np.uint16), "100 × 100"),
        (np.zeros((512, 512, 3), np.uint8), "expected a grey image"),
    ],
)
def test_tiff_files_of_the_wrong_kind_are_never_readable(tmp_path, image, words):
    tifffile.imwrite(tmp_path / "0.tif", image)
    stored = StoredRows(f"{tmp_path}/{{:d}}.tif", "", 0, rows_per_file=1)
    _, _, status, reason = FrameReader(geometry()).patterns(PointBlock(1, 1, stored))
    assert (status.tolist(), words in reason) == ([NEVER], True)


def by_handler(path, spec="NPY_SEQ", index=0, **changes):
    text = json.dumps([spec, {}, {"index": index}])
    return StoredRows(str(path), "", 0, handler=text, **changes)


def test_a_registered_handler_reads_what_is_not_hdf5(tmp_path):
    data = frames(4)
    reader = FrameReader(geometry())
    _, _, status, reason = reader.patterns(PointBlock(1, 1, by_handler(tmp_path / "a")))
    assert (status.tolist(), "FileNotFoundError" in reason) == ([RETRY], True)
    np.save(tmp_path / "a_0.npy", data)
    block = PointBlock(1, 5, by_handler(tmp_path / "a"))
    patterns, _, status, reason = reader.patterns(block)
    assert status.tolist() == [OK] * 4 + [RETRY]
    np.testing.assert_array_equal(patterns[3], plain_pattern(data[3], geometry()))
    np.save(tmp_path / "a_1.npy", np.arange(6.0))
    numbers = by_handler(tmp_path / "a", index=1, rows_per_point=3)
    assert reader.scalars(PointBlock(1, 2, numbers))[0].tolist() == [1, 4]


@pytest.mark.parametrize(
    ("data", "spec", "words"),
    [
        (np.zeros((2, 100, 100), np.uint16), "NPY_SEQ", "100 × 100"),
        (np.zeros(5), "NPY_SEQ", "expected frames"),
        (np.full((512, 512), "a"), "NPY_SEQ", "expected numbers"),
        (np.zeros((512, 512)), "NO_SUCH_SPEC", "databroker.handlers"),
    ],
)
def test_what_a_handler_cannot_give_is_never_readable(tmp_path, data, spec, words):
    np.save(tmp_path / "a_0.npy", data)
    block = PointBlock(1, 1, by_handler(tmp_path / "a", spec))
    _, _, status, reason = FrameReader(geometry()).patterns(block)
    assert status.tolist() == [NEVER]
    assert words in reason


def test_scalars_are_read_and_oversampled_ones_averaged(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.arange(20.0)
    reader = FrameReader(geometry())
    one, status, _ = reader.scalars(PointBlock(3, 2, StoredRows(str(tmp_path / "a.h5"), "x", 2)))
    assert (one.tolist(), status.tolist()) == ([2, 3], [OK, OK])
    ten, *_ = reader.scalars(PointBlock(2, 1, StoredRows(str(tmp_path / "a.h5"), "x", 10, 10)))
    assert ten.tolist() == [14.5]


def test_a_file_a_row_does_not_exhaust_open_files(tmp_path):
    reader = FrameReader(geometry())
    before = len(os.listdir("/proc/self/fd"))
    for i in range(3 * MAX_OPEN_FILES):
        stored = write(tmp_path / f"{i}.h5", frames(1))
        assert reader.patterns(PointBlock(1, 1, stored))[2].tolist() == [OK]
    assert len(os.listdir("/proc/self/fd")) <= before + MAX_OPEN_FILES
    reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_dataset_with_two_names_is_read_by_either(tmp_path):
    """To refresh one of two handles loses the chunks of the other, silently."""
    data = frames(2)
    stored = write(tmp_path / "a.h5", data)
    reader = FrameReader(geometry())
    for name in (stored.dataset, f"/{stored.dataset}", stored.dataset):
        block = PointBlock(1, 2, replace(stored, dataset=name))
        patterns, _, status, reason = reader.patterns(block)
        assert status.tolist() == [OK] * 2, reason
        np.testing.assert_array_equal(patterns[1], plain_pattern(data[1], geometry()))
