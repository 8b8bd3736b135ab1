"""How fast the simulated beamline flies: it must never be the bottleneck (500 Hz)."""

import tempfile
import time
from pathlib import Path

from bluesky import RunEngine

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.sim import Flight, SimulatedSXDM, phantom, sxdm_fly

SHAPE = (16, 64)


def main() -> None:
    points = SHAPE[0] * SHAPE[1]
    with tempfile.TemporaryDirectory() as folder:
        sxdm = SimulatedSXDM(phantom("figure3", SHAPE), Geometry.published(), folder)
        start = time.perf_counter()
        sxdm.prepare(Flight(range(1, 65))).wait()
        rendering = (time.perf_counter() - start) / points
        RE = RunEngine(context_managers=[])
        times: list[float] = []
        RE.subscribe(lambda name, doc: times.append(time.perf_counter()))

        def fly(dwell_s: float) -> float:
            times.clear()
            RE(sxdm_fly(sxdm, dwell_s=dwell_s))
            for file in Path(folder).iterdir():
                file.unlink()  # so that the page cache, not the disk, takes the frames
            return times[-1] - times[0]

        free = min(fly(0) for _ in range(5))
        paced = min(fly(0.002) for _ in range(3))
    print(
        f"simulated fly scan, 512×512 uint16, page cache: {points / free:.0f} Hz at most "
        f"(must 500), paced at 500 Hz {paced / (points * 0.002):.3f} × the dwell time, "
        f"rendering {1e3 * rendering:.2f} ms a pattern"
    )


if __name__ == "__main__":
    main()
