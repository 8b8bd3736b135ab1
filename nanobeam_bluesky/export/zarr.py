"""Maps as a Zarr store."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from nanobeam_bluesky.export.files import run_title

__all__ = ["write_zarr"]


def write_zarr(
    target: Path | str,
    maps: xr.Dataset,
    start: Mapping[str, Any],
    stop: Mapping[str, Any] | None = None,
) -> None:
    """Write maps as a Zarr store, format 2, which ``xarray.open_zarr`` reads.

    Parameters
    ----------
    target
        A new folder; or a new file in which the store is zipped, if its name ends in ``.zip``.
    maps
        Of `to_maps`.
    start, stop
        Documents of the derived run: JSON among the attributes, beside ``title``.

    Raises
    ------
    FileExistsError
        If the folder is there.
    """
    target = Path(target)
    folder = target.with_suffix(".folder") if target.suffix == ".zip" else target
    documents = {"start": start, "stop": stop}
    texts = {name: json.dumps(doc, default=_plain) for name, doc in documents.items() if doc}
    described = maps.assign_attrs(title=run_title(start), **texts)
    folder.mkdir()
    described.to_zarr(folder, zarr_format=2, consolidated=True)
    if folder == target:
        return
    try:
        with zipfile.ZipFile(target, "x") as file:  # its chunks are compressed
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    file.write(path, path.relative_to(folder))
    finally:
        shutil.rmtree(folder)


def _plain(value: Any) -> Any:
    """Return Tiled's views of dictionaries and lists, and NumPy's values, as these."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else list(value)
