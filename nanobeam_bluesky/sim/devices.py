"""Ophyd devices of the simulated beamline: a detector that takes frames while flying."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import h5py
import numpy as np
from bluesky.protocols import StreamAsset
from event_model import compose_stream_resource
from event_model.documents import PartialEventPage, StreamRange
from numpy.typing import NDArray
from ophyd import Device, Signal
from ophyd.status import Status

from nanobeam_bluesky.geometry import HC_KEV_ANGSTROM, Geometry
from nanobeam_bluesky.sim.rendering import Renderer
from nanobeam_bluesky.sim.samples import Phantom, scan_order

__all__ = ["EmbeddedSXDM", "Flight", "SimulatedSXDM"]

FLUSH_S = 0.01
"""Frames become readable after this time at the latest; each flush costs 0.3 to 0.5 ms."""


@dataclass(frozen=True)
class Flight:
    """One stretch of a scan that is flown without a stop, usually a row."""

    points: range
    """Point numbers, 1-based in the order of the scan, e.g. range(65, 129)."""
    snake: bool = True
    """Whether every second row of the scan is flown backwards."""
    dwell_s: float = 0.0
    """Time per point, s, e.g. 0.002; 0 for as fast as possible."""


class Quantity(Signal):
    """A soft signal whose description has a unit."""

    def __init__(self, *, name: str, value: float, units: str) -> None:
        super().__init__(name=name, value=value)
        self._units = units

    def describe(self) -> dict[str, Any]:
        """Describe the reading, with its unit and type."""
        description: dict[str, Any] = super().describe()
        description[self.name].update(units=self._units, dtype_numpy="<f8")
        return description


class _FlyScanner(Device):
    """Flies over a sample in its own thread; subclasses say where the frames go.

    Frames count from 0 in the order in which they were taken (*index*). Frames that no
    document has announced when a flight starts are dropped and their indices used again.
    """

    def __init__(
        self,
        sample: Phantom,
        geometry: Geometry,
        directory: str | Path = ".",
        *,
        name: str = "sxdm",
        motors: tuple[str, str] = ("sample_y", "sample_x"),
        energy_in: Literal["baseline", "start"] = "baseline",
        counts: float = 6000,
        background: float = 0.0,
        hot_pixels: Mapping[tuple[int, int], int] | None = None,
        dead_rows: Sequence[int] = (),
        position_jitter: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name)
        self.sample = sample
        self.geometry = geometry
        self.directory = Path(directory).absolute()
        self.motors = motors
        self.image_key = f"{name}_image"
        self.energy = Quantity(
            name="energy", value=HC_KEV_ANGSTROM / geometry.wavelength_angstrom, units="keV"
        )
        self.baseline = [self.energy] if energy_in == "baseline" else []
        self._renderer = Renderer(
            sample,
            geometry,
            counts=counts,
            background=background,
            hot_pixels=hot_pixels or {},
            dead_rows=dead_rows,
            seed=seed,
        )
        self._jitter = position_jitter
        self._rng = np.random.default_rng([seed, 1])
        self._attempts = np.zeros(sample.shape, np.intp)
        self._flight: Flight | None = None
        self._thread: threading.Thread | None = None
        self._status: Status | None = None
        self._halt = threading.Event()
        self._is_staged = False
        self._announced = 0  # frames that documents have told of
        self._ready = 0  # frames that can be read
        self._first = 0  # index of the flight's first frame
        self._positions = np.empty((2, 0))  # slow, fast of the flight's points

    @property
    def scale(self) -> float:
        """What `physics.forward` times the sample's intensity is multiplied with, counts."""
        return self._renderer.scale

    def frame(self, point: int, *, snake: bool = True) -> NDArray[np.uint16]:
        """Return the frame (rows, columns) last taken, or to be taken next, of a point."""
        row, col = self._grid(range(point, point + 1), snake=snake)
        self._renderer.render_missing()
        return self._renderer.frame(int(row[0]), int(col[0]))

    # ------------------------------------------------------------ Bluesky protocols

    def stage(self) -> list[object]:
        """Open what the frames go to; a new scan counts from 0."""
        staged: list[object] = super().stage()
        self._announced = self._ready = self._first = 0
        self._open()
        self._is_staged = True
        return staged

    def unstage(self) -> list[object]:
        """End the flight, if any, and close what the frames went to."""
        self._end_flight()
        if self._is_staged:
            self._is_staged = False
            self._close()
        self._attempts[:] = 0
        unstaged: list[object] = super().unstage()
        return unstaged

    def prepare(self, flight: Flight) -> Status:
        """Make ready for a flight: render, in a thread, what is not rendered yet.

        The first time that is the whole sample. Points that this scan has flown before
        get new photon noise.
        """
        self._check_not_flying()
        if not flight.points or min(flight.points) < 1 or max(flight.points) > self.sample.size:
            raise ValueError(
                f"{self.name}: cannot fly points {flight.points}; "
                f"the sample has points 1 to {self.sample.size}"
            )
        self._flight = None
        row, col = self._grid(flight.points, snake=flight.snake)

        def render() -> None:
            self._renderer.render_missing()
            self._renderer.render(row, col, self._attempts[row, col])
            self._flight = flight

        status = Status(obj=self, timeout=None)
        _in_thread(f"{self.name} rendering", render, status)
        return status

    def kickoff(self) -> Status:
        """Start the prepared flight."""
        self._check_not_flying()
        if self._flight is None or not self._is_staged:
            raise RuntimeError(f"{self.name}: stage and prepare a flight before kickoff")
        flight, self._flight = self._flight, None
        row, col = self._grid(flight.points, snake=flight.snake)
        grid = np.stack([self.sample.y[row], self.sample.x[col]])
        step = np.array([_step(self.sample.y), _step(self.sample.x)])[:, None]
        self._positions = grid + self._jitter * step * self._rng.standard_normal(grid.shape)
        self._ready = self._first = self._announced
        self._halt.clear()
        self._attempts[row, col] += 1
        self._status = Status(obj=self, timeout=None)
        self._thread = _in_thread(
            f"{self.name} flight", lambda: self._fly(row, col, flight.dwell_s), self._status
        )
        started = Status(obj=self, timeout=None)
        started.set_finished()
        return started

    def complete(self) -> Status:
        """Return the status of the flight; it is done when the last frame can be read."""
        if self._status is None:
            raise RuntimeError(f"{self.name}: complete before kickoff")
        return self._status

    def pause(self) -> None:
        """End the flight after the current frame; it is flown again from its start."""
        self._end_flight()

    def resume(self) -> None:
        """Do nothing: the plan starts the flight again."""

    def stop(self, *, success: bool = False) -> None:
        """End the flight after the current frame."""
        self._end_flight()

    def describe_collect(self) -> dict[str, dict[str, Any]]:
        """Describe the frame and both positions."""
        frame = {
            "source": self.name,
            "dtype": "array",
            "shape": list(self._renderer.frame_shape),
            "dtype_numpy": "<u2",
            "units": "counts",
        }
        position = {
            "source": self.name,
            "dtype": "number",
            "shape": [],
            "dtype_numpy": "<f8",
            "units": "um",
        }
        return {self.image_key: frame, **{motor: dict(position) for motor in self.motors}}

    # ------------------------------------------------------------ flight

    def _fly(self, row: NDArray[np.intp], col: NDArray[np.intp], dwell_s: float) -> None:
        start = flushed = time.monotonic()
        for k in range(len(row)):
            # deadlines from the start: a late frame does not delay the rest
            due = start + (k + 1) * dwell_s - time.monotonic()
            if self._halt.wait(due) if due > 0 else self._halt.is_set():
                break
            self._take(self._first + k, int(row[k]), int(col[k]))
            if (now := time.monotonic()) - flushed >= FLUSH_S:
                self._flush(self._first + k + 1)
                flushed = now
        else:
            k = len(row)
        self._flush(self._first + k)

    def _end_flight(self) -> None:
        self._halt.set()
        if self._thread is not None:
            self._thread.join()

    def _check_not_flying(self) -> None:
        if self._status is not None and not self._status.done:
            raise RuntimeError(f"{self.name}: is flying; wait for complete() or call stop()")

    def _grid(self, points: range, *, snake: bool) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        row, col = scan_order(self.sample.shape, snake=snake)
        return row[points.start - 1 : points.stop - 1], col[points.start - 1 : points.stop - 1]

    def _open(self) -> None:
        """Make ready to take frames from index 0."""

    def _close(self) -> None:
        """Take no more frames."""

    def _take(self, index: int, row: int, col: int) -> None:
        """Take the frame of one point."""
        raise NotImplementedError

    def _flush(self, stop: int) -> None:
        """Make frames below `stop` readable."""
        self._ready = stop


class SimulatedSXDM(_FlyScanner):
    """Detector and fly scanner that streams frames and positions to an HDF5 file.

    One file a scan, in SWMR mode: it can be read while it grows. Collecting gives a
    ``stream_resource`` and ``stream_datum`` for the frames and for each motor.

    Parameters
    ----------
    sample
        What is scanned, e.g. phantom("figure3").
    geometry
        Where the pattern falls; the detector has 512 × 512 pixels unless it says otherwise.
    directory
        Where the files go; made if missing.
    name
        Of the device; the frames' data key is this with ``_image``.
    motors
        Names of the slow and the fast motor; the data keys of the positions.
    energy_in
        Whether the photon energy is in the baseline stream or in the start document.
    counts
        Expected photons in the pattern of a point without strain and tilt.
    background
        Expected counts per binned pixel, everywhere on the detector.
    hot_pixels
        Counts of pixels that always read the same, by (row, column) of the frame.
    dead_rows
        Rows of the frame that read 0.
    position_jitter
        Standard deviation of the measured positions about the grid, in steps.
    seed
        Of the photon noise and of the positions.
    """

    def describe_collect(self) -> dict[str, dict[str, Any]]:
        """Describe the streamed frame and both streamed positions."""
        described = super().describe_collect()
        for key, data_key in described.items():
            data_key["shape"] = [1, *data_key["shape"]]
            data_key["external"] = "STREAM:"
            data_key["source"] = self._bundles[key].stream_resource_doc["uri"]
        return described

    def get_index(self) -> int:
        """Return the number of frames that can be read."""
        return self._ready

    def collect_asset_docs(self, index: int | None = None) -> Iterator[StreamAsset]:
        """Announce the frames and positions below `index` that are not announced yet."""
        stop = self._ready if index is None else min(index, self._ready)
        indices = StreamRange(start=self._announced, stop=stop)
        if stop <= self._announced:
            return
        self._announced = stop
        for bundle in self._bundles.values() if not indices["start"] else ():
            yield "stream_resource", bundle.stream_resource_doc
        for bundle in self._bundles.values():
            yield "stream_datum", bundle.compose_stream_datum(indices)

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{uuid.uuid4()}.h5"
        self._file = h5py.File(path, "w", libver="latest")
        self._datasets: dict[str, h5py.Dataset] = {}
        self._bundles = {}
        for key, dataset, chunk, dtype in (
            (self.image_key, "/entry/data/data", (1, *self._renderer.frame_shape), "<u2"),
            *((motor, f"/entry/positions/{motor}", (1024,), "<f8") for motor in self.motors),
        ):
            self._datasets[key] = self._file.create_dataset(
                dataset,
                shape=(0, *chunk[1:]),
                maxshape=(None, *chunk[1:]),
                chunks=chunk,
                dtype=dtype,
            )
            self._bundles[key] = compose_stream_resource(
                mimetype="application/x-hdf5",
                uri=f"file://localhost{quote(path.as_posix())}",
                data_key=key,
                parameters={"dataset": dataset, "chunk_shape": list(chunk)},
            )
        self._file.swmr_mode = True

    def _close(self) -> None:
        self._file.close()

    def _take(self, index: int, row: int, col: int) -> None:
        frames = self._datasets[self.image_key]
        if frames.shape[0] <= index:
            frames.resize(index + 1, axis=0)
        # 1.5 times as fast as frames[index] = …, which copies
        frames.id.write_direct_chunk((index, 0, 0), self._renderer.paste(row, col))

    def _flush(self, stop: int) -> None:
        for motor, positions in zip(self.motors, self._positions, strict=True):
            dataset = self._datasets[motor]
            if dataset.shape[0] < stop:
                dataset.resize(stop, axis=0)
            dataset[self._ready : stop] = positions[self._ready - self._first : stop - self._first]
        for dataset in self._datasets.values():
            dataset.flush()
        super()._flush(stop)


class EmbeddedSXDM(_FlyScanner):
    """Detector and fly scanner whose frames travel within the documents.

    Collecting gives event pages with the frames as one array (n, rows, columns). The
    parameters are those of `SimulatedSXDM`; nothing is written to the directory.
    """

    def collect_pages(self) -> Iterator[PartialEventPage]:
        """Give the frames and positions taken since the last call, as one page."""
        taken = slice(self._announced - self._first, self._ready - self._first)
        self._announced = self._ready
        points = self._taken[taken]
        if not points:
            return
        slow, fast = self._positions[:, taken].tolist()
        times = [when for _, _, when in points]
        data = {
            self.image_key: np.stack([self._renderer.frame(r, c) for r, c, _ in points]),
            self.motors[0]: slow,
            self.motors[1]: fast,
        }
        yield {"data": data, "timestamps": {key: times for key in data}, "time": times}

    def _open(self) -> None:
        self._taken: list[tuple[int, int, float]] = []  # row, column, time

    def _take(self, index: int, row: int, col: int) -> None:
        del self._taken[index - self._first :]
        self._taken.append((row, col, time.time()))


def _step(axis: NDArray[np.float64]) -> float:
    """Distance of neighbouring positions; 0 where there is only one."""
    return float(axis[-1] - axis[0]) / max(len(axis) - 1, 1)


def _in_thread(name: str, work: Callable[[], None], status: Status) -> threading.Thread:
    """Start `work` in a thread; `status` tells when it is done and how it went."""

    def run() -> None:
        try:
            work()
        except Exception as error:
            status.set_exception(error)
        else:
            status.set_finished()

    thread = threading.Thread(target=run, name=name)
    thread.start()
    return thread
