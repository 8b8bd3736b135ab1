"""Tiled's client has the maps and the scan in hand, wherever the trees are mounted."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from tiled.client import from_context, from_uri
from tiled.client.array import ArrayClient
from tiled.client.container import Container
from tiled.client.context import Context
from tiled.client.xarray import DatasetClient
from tiled.server.app import build_app_from_config

from nanobeam_bluesky.documents import to_maps
from nanobeam_bluesky.tiled_adapters.catalog import api_key
from nanobeam_bluesky.tiled_adapters.clients import MapsClient, ScanClient


@pytest.fixture
def maps(served):
    return served.client["maps"][served.uids["maps"]]


@pytest.fixture
def scan(served):
    return served.client["scans"][served.uids["scan"]]


@pytest.fixture(scope="module")
def elsewhere(served):
    """Make a client of the same runs, the views mounted at other paths; those that are given."""
    contexts = []

    def mount(**views):
        folder = served.folder
        common = {"uri": f"sqlite:///{folder / 'catalog.db'}"}
        common["readable_storage"] = [str(folder / "arrays"), f"sqlite:///{folder / 'tables.db'}"]
        node = {"scans": "raw", "maps": "derived"}
        trees = [
            {
                "path": path,
                "tree": f"nanobeam_bluesky.tiled_adapters.views:{view}",
                "args": common | {"mount_node": node[view]},
            }
            for view, path in views.items()
        ]
        config = {"trees": trees, "authentication": {"single_user_api_key": api_key()}}
        with warnings.catch_warnings():
            # Tiled talks to its own application through starlette's test client
            warnings.filterwarnings("ignore", message=".*httpx.*starlette.testclient")
            context = Context.from_app(build_app_from_config(config))
        contexts.append(context)
        return from_context(context)

    yield mount
    for context in contexts:
        context.close()


def test_maps_are_a_dataset(served, maps):
    assert isinstance(maps, MapsClient)
    xr.testing.assert_identical(maps.to_dataset(), to_maps(served.documents))


def test_maps_are_drawn_without_pyplot(maps):
    before = plt.get_fignums()
    figure = maps.plot(["strain", "strain_sigma"])
    assert isinstance(figure, Figure)
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["Strain ε", "σ of strain ε"]
    assert plt.get_fignums() == before
    with pytest.raises(KeyError, match="no map of 'nothing'"):
        maps.plot(["nothing"])


def test_pattern_and_frame_are_those_of_the_point(served, scan):
    assert isinstance(scan, ScanClient)
    np.testing.assert_array_equal(scan.frame(1, 0), served.frames[9])  # snaked
    np.testing.assert_array_equal(scan.frame(-1, -1), served.frames[15])
    np.testing.assert_array_equal(scan.pattern(1, 0), scan["patterns"][1, 0])
    assert scan.pattern(1, 0).shape == (64, 64)
    with pytest.raises(IndexError, match="col = 5: the scan has cols 0 to 4"):
        scan.pattern(0, 5)


def test_maps_lead_to_their_scan_and_the_scan_to_its_newest_complete_maps(served, maps, scan):
    assert maps.raw.uri == scan.uri
    assert scan.maps().uri == maps.uri  # neither the older nor the aborted


def test_scan_without_maps_and_maps_without_a_scan_say_where_they_looked(served):
    other = served.client["scans"][served.uids["count"]]
    with pytest.raises(LookupError, match=f"{served.uids['count']}: no maps of it in .*'maps'"):
        other.maps()
    running = served.client["maps"][served.uids["running"]]
    with pytest.raises(LookupError, match=r"elsewhere: no scan of it in .*'scans'"):
        _ = running.raw


@pytest.mark.parametrize(
    "paths",
    [
        {"scans": "/lab/id1/scans", "maps": "/lab/id1/maps"},
        {"scans": "/lab/grids", "maps": "/lab/derived/strain"},
    ],
)
def test_trees_are_found_where_they_are_mounted(served, elsewhere, paths):
    client = elsewhere(**paths)
    maps = client[paths["maps"].strip("/")][served.uids["maps"]]
    assert maps.raw.path_parts == [*paths["scans"].strip("/").split("/"), served.uids["scan"]]
    if paths["maps"].endswith("/maps"):
        assert maps.raw.maps().path_parts == maps.path_parts


def test_client_of_one_run_finds_the_other(served, maps):
    base, key = served.url.split("?")
    alone = from_uri(f"{base}/api/v1/metadata/maps/{served.uids['maps']}?{key}")
    assert alone.raw.maps().uri == maps.uri
    alone.context.close()


def test_runs_that_cannot_be_shown_say_why(served):
    with pytest.raises(ValueError, match="failed before its first point: no photon energy"):
        served.client["maps"][served.uids["failed"]].to_dataset()
    with pytest.raises(ValueError, match="no SXDM scan"):
        served.client["scans"][served.uids["count"]].pattern(0, 0)


def test_client_that_does_not_know_this_package_reads_as_well(served):
    plain = {"container": Container, "array": ArrayClient, "xarray_dataset": DatasetClient}
    client = from_uri(served.url, structure_clients=plain)
    maps = client["maps"][served.uids["maps"]]
    assert type(maps) is DatasetClient
    xr.testing.assert_identical(maps.read(), to_maps(served.documents))
    np.testing.assert_array_equal(
        client["scans"][served.uids["scan"]]["frames"][0, 0], served.frames[0]
    )
    client.context.close()
