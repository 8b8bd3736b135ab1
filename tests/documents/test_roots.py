"""Files are read where they may be, however they are named."""

import h5py
import numpy as np
import pytest

from nanobeam_bluesky.documents import FrameReader, PointBlock, ReadStatus, StoredRows
from nanobeam_bluesky.documents.formats import NeverError
from nanobeam_bluesky.documents.roots import Roots
from nanobeam_bluesky.geometry import ROI

FRAMES = np.arange(4 * 6 * 8, dtype=np.uint16).reshape(4, 6, 8)


def write(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", data=FRAMES, chunks=(1, 6, 8))
    return path


def count_files(file, name):
    """Make a virtual dataset of files with a number in their names."""
    unlimited, whole = h5py.h5s.UNLIMITED, (1, 6, 8)
    space = h5py.h5s.create_simple(FRAMES.shape, (unlimited, 6, 8))
    space.select_hyperslab((0, 0, 0), (unlimited, 1, 1), (1, 1, 1), whole)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_virtual(space, name.encode(), b"frames", h5py.h5s.create_simple(whole))
    h5py.h5d.create(file.id, b"frames", h5py.h5t.NATIVE_UINT16, space, creation)


def virtual(file, source):
    layout = h5py.VirtualLayout(FRAMES.shape, "u2")
    layout[:] = h5py.VirtualSource(source, "frames", FRAMES.shape)
    file.create_virtual_dataset("frames", layout)


def leading_out(folder, name):
    """Make a file in ``folder / "in"`` that leads out of it."""
    away, inside = write(folder / "away.h5"), folder / "in" / "scan.h5"
    inside.parent.mkdir()
    if name == "path":
        return away
    if name == "dots":
        return inside.parent / ".." / "away.h5"
    if name == "symbolic link":
        inside.symlink_to(away)
        return inside
    if name == "linked folder":
        (inside.parent / "link").symlink_to(folder)
        return inside.parent / "link" / "away.h5"
    if name == "beside":  # its name begins as the folder's
        (folder / "in2").mkdir()
        return write(folder / "in2" / "scan.h5")
    with h5py.File(inside, "w") as file:
        if name == "external link":
            file["frames"] = h5py.ExternalLink(str(away), "/frames")
        elif name == "soft link to an external group":
            file["there"] = h5py.ExternalLink("../away.h5", "/")
            file["frames"] = h5py.SoftLink("/there/frames")
        elif name == "external storage":
            raw = [(str(away), 0, FRAMES.nbytes)]
            file.create_dataset("frames", FRAMES.shape, "u2", external=raw)
        elif name == "virtual dataset":
            virtual(file, str(away))
        elif name == "counted files":
            count_files(file, f"{away}%b")
        else:
            (inside.parent / "again").mkdir()
            with h5py.File(inside.parent / "again" / "b.h5", "w") as second:
                virtual(second, str(away))
            file["frames"] = h5py.ExternalLink("again/b.h5", "/frames")
    return inside


@pytest.mark.parametrize(
    "name",
    [
        *("path", "dots", "symbolic link", "linked folder", "beside"),
        *("external link", "soft link to an external group", "external storage"),
        *("virtual dataset", "counted files", "virtual dataset behind a link"),
    ],
)
def test_what_leads_out_of_the_folders_is_refused(tmp_path, name):
    path = str(leading_out(tmp_path, name))
    reader = FrameReader(roots=Roots([tmp_path / "in"]))
    with pytest.raises(NeverError):
        reader.shape(path, "frames")
    roi = ROI(row=0, col=0, height=6, width=8)
    frames, status, reason = reader.frames(PointBlock(1, 4, StoredRows(path, "frames", 0)), roi)
    assert frames is None and (status == ReadStatus.NEVER).all() and reason
    reader.close()
    free = FrameReader()  # each would be read, but for the folders
    if name not in ("symbolic link", "counted files", "external storage"):
        assert free.shape(path, "frames") == FRAMES.shape
    free.close()


def test_links_and_virtual_datasets_within_the_folders_are_followed(tmp_path):
    write(tmp_path / "whole.h5")
    with h5py.File(tmp_path / "master.h5", "w") as file:
        virtual(file, "whole.h5")
        file["soft"] = h5py.SoftLink("/frames")
        file["entry"] = h5py.ExternalLink("whole.h5", "/")
        file["loop"] = h5py.SoftLink("/loop")
    reader = FrameReader(roots=Roots([tmp_path]), refresh=False)
    roi = ROI(row=1, col=2, height=3, width=4)
    for dataset in ("frames", "/soft", "entry/frames"):
        stored = StoredRows(str(tmp_path / "master.h5"), dataset, 1)
        frames, status, _ = reader.frames(PointBlock(1, 2, stored), roi)
        assert (status == ReadStatus.OK).all()
        np.testing.assert_array_equal(frames, FRAMES[1:3, 1:4, 2:6])
    with pytest.raises(NeverError, match="100 links"):
        reader.shape(str(tmp_path / "master.h5"), "loop")
    reader.close()
