"""A folder of runs, mapped while they flew."""

from types import SimpleNamespace

import pytest
from bluesky import RunEngine
from bluesky.plans import count
from ophyd.sim import det

from nanobeam_bluesky.callbacks import BackgroundSink, NanobeamCallback
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.sim import EmbeddedSXDM, SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import derived_writer, open_catalog, raw_writer

SHAPE = (6, 7)


@pytest.fixture(scope="session")  # modules of other packages come in between
def stored(tmp_path_factory):
    """Two scans, one with frames in a file and one in its events, and a count.

    Their folder and catalogue, raw uids by name, and documents as they were emitted.
    """
    folder = tmp_path_factory.mktemp("stored")
    geometry = Geometry.published().model_copy(
        update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
    )
    catalog = open_catalog(folder)
    engine = RunEngine(context_managers=[])
    callback = NanobeamCallback("refine", preset="auto")
    live: list = []
    derived: list = []
    raw = BackgroundSink(raw_writer(catalog["raw"]))
    callback.subscribe(derived_writer(catalog["derived"]))
    callback.subscribe(lambda name, doc: derived.append((name, doc)))
    for sink in (callback, raw, lambda name, doc: live.append((name, doc))):
        engine.subscribe(sink)
    sample = phantom("film", SHAPE)
    in_file = SimulatedSXDM(sample, geometry, folder / "frames", counts=3000)
    embedded = EmbeddedSXDM(sample, geometry, counts=3000)
    uids = {}
    for name, plan in (
        ("file", sxdm_fly(in_file, md={"sample": "film"})),
        ("embedded", sxdm_fly(embedded, md={"sample": "other"})),
        ("count", count([det])),
    ):
        (uids[name],) = engine(plan)
    assert callback.wait(60)
    assert raw.wait(60)
    callback.close()
    raw.close()
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join()
    engine.loop.close()
    yield SimpleNamespace(
        folder=folder, catalog=catalog, uids=uids, documents=live, derived=derived
    )
    catalog.context.close()
