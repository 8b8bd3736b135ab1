"""What Tiled's own client makes of runs in the views: `tiled.special_client` names these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tiled.client.constructors import from_context
from tiled.client.container import Container
from tiled.client.utils import ClientError
from tiled.client.xarray import DatasetClient
from tiled.queries import Key

from nanobeam_bluesky.plots import MAPS, MapAxes, own_figure, plot_maps

__all__ = ["MapsClient", "ScanClient"]

_TREES = 100
"""How many trees beside its own a client looks into."""


class MapsClient(DatasetClient):
    """The maps of a derived run, as ``client["maps"][uid]``."""

    def to_dataset(self) -> xr.Dataset:
        """Return all maps, as `to_maps` gives them.

        Raises
        ------
        ValueError
            If the run has none: says why.
        """
        _check(self)
        maps: xr.Dataset = self.read()
        return maps

    def plot(self, fields: Sequence[str] = MAPS) -> Figure:
        """Draw maps side by side, as `nanobeam_bluesky.plots.plot_maps`.

        Raises
        ------
        ValueError
            If the run has no maps.
        KeyError
            If a field is not among them.
        """
        maps = self.to_dataset()
        return plot_maps(maps, fields, figure=own_figure(len(fields), MapAxes.of(maps)))

    @property
    def raw(self) -> ScanClient:
        """The scan that the maps are of, as ``client["scans"][uid]``.

        Raises
        ------
        LookupError
            If no tree beside this one has it.
        """
        start = self.metadata["start"]
        uid = start.get("original_run_uid", start["uid"])
        looked = []
        for path in beside(self, "scans"):
            scan = opened(self, [*path, uid])
            if scan is not None and _is(scan, "NanobeamScan"):
                found: ScanClient = scan
                return found
            looked.append("/".join(path))
        raise LookupError(f"raw run {uid}: no scan of it in {looked}")


class ScanClient(Container):
    """A raw scan on its grid, as ``client["scans"][uid]``."""

    def pattern(self, row: int, col: int) -> NDArray[np.float32]:
        """Read the pattern (ny, nx) of a point, counts; NaN where the scan has not been.

        Raises
        ------
        IndexError
            If the scan has no such point.
        ValueError
            If it has no patterns: says why.
        """
        return self._of_point("patterns", row, col)

    def frame(self, row: int, col: int) -> NDArray[Any]:
        """Read the whole detector frame (y, x) of a point; raises as `pattern` does."""
        return self._of_point("frames", row, col)

    def maps(self) -> MapsClient:
        """Return the maps of this scan: the newest complete ones, else the newest.

        All of them are ``client["maps"].search(Key("start.original_run_uid") == uid)``.

        Raises
        ------
        LookupError
            If no tree beside this one has any.
        """
        uid = self.metadata["start"]["uid"]
        looked = []
        for path in beside(self, "maps"):
            tree = opened(self, path)
            if isinstance(tree, Container):
                found = _maps_of(tree, uid)
                if found:
                    return max(found, key=_rank)
            looked.append("/".join(path))
        raise LookupError(f"run {uid}: no maps of it in {looked}")

    def _of_point(self, name: str, row: int, col: int) -> NDArray[Any]:
        _check(self)
        if name not in self:
            raise ValueError(f"run {self.item['id']}: {self.metadata.get('note', f'no {name}')}")
        array = self[name]
        for what, number, count in zip(("row", "col"), (row, col), array.shape, strict=False):
            if not -count <= number < count:
                raise IndexError(f"{what} = {number}: the scan has {what}s 0 to {count - 1}")
        rows, cols = array.shape[:2]
        return np.asarray(array[row % rows, col % cols])


def _check(run: Any) -> None:
    """Raise ValueError if the server says that a run cannot be shown, or not yet."""
    computing = "being computed: ask again" if run.metadata.get("computing") else ""
    problem = run.metadata.get("problem") or computing
    if problem:
        raise ValueError(f"run {run.item['id']}: {problem}")


def _is(node: Any, spec: str) -> bool:
    return any(s.name == spec for s in node.specs)


def _maps_of(tree: Any, uid: str) -> list[MapsClient]:
    """Return all maps of a raw run in a tree; those that a server computes have its own uid."""
    try:
        found = list(tree.search(Key("start.original_run_uid") == uid).values())
    except ClientError:  # a tree that cannot be searched so
        return []
    if not found and uid in tree:
        found = [tree[uid]]
    return [node for node in found if _is(node, "NanobeamMaps")]


def _rank(maps: MapsClient) -> tuple[bool, bool, float]:
    stop = maps.metadata.get("stop") or {}
    shown = not maps.metadata.get("problem")
    return stop.get("exit_status") == "success", shown, maps.metadata["start"]["time"]


def beside(run: Any, name: str) -> Iterator[list[str]]:
    """Yield paths of trees beside that of a run, and beside what that lies in: `name` first."""
    own = run.path_parts[:-1]
    for depth in range(len(own) - 1, -1, -1):
        above = own[:depth]
        yield [*above, name]
        parent = opened(run, above)
        others = [] if parent is None else parent.keys().head(_TREES)
        yield from ([*above, key] for key in others if key not in (name, own[depth]))


def opened(run: Any, path: Sequence[str]) -> Any:
    """Return what lies at a path, or None."""
    try:
        return from_context(
            run.context, structure_clients=run.structure_clients, node_path_parts=list(path)
        )
    except (ClientError, KeyError):
        return None
