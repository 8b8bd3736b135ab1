"""Regions read from chunks equal what the HDF5 library reads; damaged chunks are errors."""

import math
import os

import h5py
import hdf5plugin
import numpy as np
import pytest

from nanobeam_bluesky.documents.chunks import _lz4, chunk_layout, read_region
from nanobeam_bluesky.geometry import ROI

FILTERS = {
    "raw": {},
    "gzip": {"compression": "gzip"},
    "shuffled gzip": {"compression": "gzip", "shuffle": True},
    "bitshuffle": dict(hdf5plugin.Bitshuffle()),
}
SHAPE = (67, 53)  # 3551 pixels: neither blocks nor eights come out even
REGIONS = (ROI(row=0, col=0, height=67, width=53), ROI(row=11, col=5, height=32, width=20))


def frames(dtype, seed=0):
    """Sparse counts, and a frame of noise that no filter makes smaller."""
    rng = np.random.default_rng(seed)
    made = rng.poisson(0.1, (4, *SHAPE)).astype(dtype)
    made[1, 20:40, 10:30] = rng.poisson(30, (20, 20))
    made[2] = rng.integers(0, 2**8, SHAPE)
    return made


def write(path, data, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", data=data, chunks=(1, *data.shape[1:]), **options)
    return path


def read(path, roi, first=0, n=4):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with h5py.File(path) as file:
            dataset = file["frames"]
            layout = chunk_layout(dataset)
            assert layout is not None
            return read_region(dataset, layout, descriptor, first, n, roi)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4"])
def test_a_region_equals_the_librarys(tmp_path, options, dtype):
    data = frames(dtype)
    path = write(tmp_path / "scan.h5", data, **options)
    for roi in REGIONS:
        np.testing.assert_array_equal(read(path, roi, 1, 3), data[1:, *roi.slices])


def test_many_blocks_and_long_matches(tmp_path):
    """256 kB a frame: 32 blocks, of which a region needs some."""
    data = np.zeros((2, 256, 512), "u2")
    data[0, 100:140, 200:260] = np.random.default_rng(1).poisson(5, (40, 60))
    data[1] = np.arange(512)
    path = write(tmp_path / "scan.h5", data, **FILTERS["bitshuffle"])
    roi = ROI(row=90, col=190, height=64, width=96)
    np.testing.assert_array_equal(read(path, roi, 0, 2), data[:, *roi.slices])


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_a_frame_that_was_never_written_is_left_to_the_library(tmp_path, options):
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("frames", (4, *SHAPE), "u2", chunks=(1, *SHAPE), **options)
        dataset[1] = 7
    assert (read(path, REGIONS[0], 1, 1) == 7).all()
    try:
        assert read(path, REGIONS[0]) is None
    except OSError:
        assert options


def test_frames_that_come_later_are_found(tmp_path):
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w", libver="latest") as writer:
        shape = {"shape": (0, *SHAPE), "maxshape": (None, *SHAPE), "chunks": (1, *SHAPE)}
        frames_of = writer.create_dataset("frames", dtype="u2", **shape)
        writer.swmr_mode = True
        with h5py.File(path, "r", libver="latest", swmr=True) as file:
            dataset = file["frames"]
            layout = chunk_layout(dataset)
            direct = 0
            for n in range(1, 30):
                frames_of.resize(n, axis=0)
                frames_of[n - 1] = n
                writer.flush()
                dataset.refresh()
                descriptor = file.id.get_vfd_handle()
                found = read_region(dataset, layout, descriptor, n - 1, 1, REGIONS[1])
                if found is not None:
                    direct += 1
                    assert (found == n).all()
    assert 10 < direct < 29  # all are looked through when a tenth is new


@pytest.mark.parametrize(
    "options",
    [dict(hdf5plugin.Blosc()), {"compression": "lzf"}, {"fletcher32": True}],
    ids=["blosc", "lzf", "checksum"],
)
def test_other_filters_are_left_to_the_library(tmp_path, options):
    path = write(tmp_path / "scan.h5", frames("u2"), **options)
    with h5py.File(path) as file:
        assert chunk_layout(file["frames"]) is None


def test_chunks_of_several_or_parts_of_frames_are_left_to_the_library(tmp_path):
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        for name, chunks in (("many", (2, *SHAPE)), ("tiles", (1, 16, 16)), ("no", None)):
            dataset = file.create_dataset(name, data=frames("u2"), chunks=chunks)
            assert chunk_layout(dataset) is None


def test_a_truncated_file_is_an_error(tmp_path):
    path = write(tmp_path / "scan.h5", frames("u2"))
    with h5py.File(path) as file:
        dataset = file["frames"]
        info = dataset.id.get_chunk_info_by_coord((3, 0, 0))
        os.truncate(path, info.byte_offset + info.size // 2)
        descriptor = file.id.get_vfd_handle()
        with pytest.raises(OSError, match="truncated"):
            read_region(dataset, chunk_layout(dataset), descriptor, 3, 1, REGIONS[0])


def test_damaged_chunks_never_read_beyond_themselves(tmp_path):
    """Random bytes in place of each compressed one: an error, or other numbers."""
    path = write(tmp_path / "scan.h5", frames("u2"), **FILTERS["bitshuffle"])
    whole, rng = path.read_bytes(), np.random.default_rng(3)
    with h5py.File(path) as file:
        info = file["frames"].id.get_chunk_info_by_coord((1, 0, 0))
    errors = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 8)):
            damaged[info.byte_offset + int(rng.integers(info.size))] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            assert read(path, REGIONS[1], 1, 1).shape == (1, 32, 20)
        except OSError:
            errors += 1
    assert errors > 20


def test_damaged_blocks_never_write_beyond_their_memory(tmp_path):
    path = write(tmp_path / "scan.h5", frames("u2"), **FILTERS["bitshuffle"])
    with h5py.File(path) as file:
        _, chunk = file["frames"].id.read_direct_chunk((1, 0, 0))
        elements = math.prod(file["frames"].shape[1:])
    size = min(int.from_bytes(chunk[8:12], "big"), elements // 8 * 16)
    source = np.frombuffer(chunk, np.uint8)[16 : 16 + int.from_bytes(chunk[12:16], "big")]
    memory = np.full(size + 8 + 64, 0xA5, np.uint8)
    assert _lz4(source, memory[: size + 8], size)
    rng, good = np.random.default_rng(4), 0
    for _ in range(3000):
        damaged = source.copy()
        where = rng.integers(len(source), size=rng.integers(1, 6))
        damaged[where] = rng.choice([0, 1, 15, 240, 255, *rng.integers(256, size=5)], len(where))
        good += _lz4(damaged[: rng.integers(1, len(source) + 1)], memory[: size + 8], size)
    assert good < 3000
    assert (memory[size + 8 :] == 0xA5).all()
