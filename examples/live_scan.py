"""Map a scan while it flies: five lines attach the callback to a RunEngine.

The beamline is simulated here; at a real one, `RE` and the plan are yours.

    python examples/live_scan.py
"""

import tempfile

from bluesky import RunEngine

from nanobeam_bluesky import Geometry, to_maps
from nanobeam_bluesky.callbacks import LiveMaps, NanobeamCallback
from nanobeam_bluesky.sim import SimulatedSXDM, phantom, sxdm_fly

if __name__ == "__main__":
    RE = RunEngine()
    folder = tempfile.mkdtemp(prefix="live-scan-")
    sxdm = SimulatedSXDM(phantom("film", (24, 32)), Geometry.published(), folder)

    callback = NanobeamCallback()  # 1. reads the geometry from the start document
    documents = []
    callback.subscribe(lambda name, doc: documents.append((name, doc)))  # 2. any sink
    live = LiveMaps()  # 3. a window, where there is a display
    callback.subscribe(live)
    RE.subscribe(callback)  # 4.

    RE(sxdm_fly(sxdm, dwell_s=0.002))  # scan as always

    callback.wait()  # 5. every point is mapped
    live.save(f"{folder}/maps.png")
    print(to_maps(documents))
    print(callback.health)
    print(f"figure: {folder}/maps.png")
    callback.close()
