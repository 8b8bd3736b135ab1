"""A served scan of 4 × 5 points, with maps of it, and runs that have none."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from event_model import compose_run
from tiled.client import from_uri

from nanobeam_bluesky.documents.derived_run import failed_run
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.tiled_adapters import derived_writer, raw_writer, serve

HEIGHT, WIDTH = 160, 144


def raw_documents(frames, **metadata):
    """A snaked scan, in which frames are values of its events."""
    geometry = Geometry.published().model_copy(
        update={"detector_shape": (HEIGHT, WIDTH), "bragg_center_px": (70.0, 80.0)}
    )
    block = geometry.model_dump(mode="json", exclude_none=True)
    del block["wavelength_angstrom"], block["d_spacing_angstrom"]
    run = compose_run(
        metadata={
            "plan_name": "fly",
            "scan_id": 7,
            "sample": "film",
            "shape": [4, 5],
            "snaking": [False, True],
            "motors": ["sample_y", "sample_x"],
            "extents": [[0.0, 0.3], [0.0, 0.4]],
            "nanobeam": block,
        }
        | metadata
    )
    number = {"source": "test", "dtype": "number", "dtype_numpy": "<f8", "shape": []}
    image = {"source": "test", "dtype": "array", "dtype_numpy": "<u2", "shape": [HEIGHT, WIDTH]}
    keys = {"img": image} | dict.fromkeys(("sample_y", "sample_x"), number | {"units": "um"})
    stream = run.compose_descriptor(name="primary", data_keys=keys)
    yield "start", run.start_doc
    yield "descriptor", stream.descriptor_doc
    for i, frame in enumerate(frames):
        row, col = divmod(i, 5)
        x = 0.1 * (4 - col if row % 2 else col)
        data = {"img": frame, "sample_y": 0.1 * row, "sample_x": x}
        times = dict.fromkeys(data, 0.0)
        yield "event", stream.compose_event(data=data, timestamps=times, validate=False)
    yield "stop", run.compose_stop()


@pytest.fixture(scope="session")  # modules of other packages come in between
def served(tmp_path_factory, derived_documents):
    """A folder, its address and client; documents of the maps; and uids of what there is."""
    folder = tmp_path_factory.mktemp("served")
    frames = np.random.default_rng(0).poisson(3, (20, HEIGHT, WIDTH)).astype(np.uint16)
    with serve(folder) as url:
        client = from_uri(url)
        write = raw_writer(client["raw"])
        uids = {}
        for name, metadata in (("scan", {}), ("count", {"nanobeam": None})):
            documents = list(raw_documents(frames[: None if name == "scan" else 2], **metadata))
            uids[name] = documents[0][1]["uid"]
            for document in documents:
                write(*document)
        write = derived_writer(client["derived"])
        flags = np.zeros((4, 5), dtype=int)
        flags[1, 2] = 8

        def derive(name, stop="success", **start):
            documents = derived_documents((4, 5), change={"flags": flags})
            documents[0][1].update({"original_run_uid": uids["scan"]} | start)
            documents[-1][1]["exit_status"] = stop
            uids[name] = documents[0][1]["uid"]
            for document in documents[: None if stop else -1]:
                write(*document)
            return documents

        documents = derive("maps", time=2.0)
        derive("older", time=1.0)
        derive("aborted", stop="fail", time=3.0)
        derive("running", stop="", time=4.0, original_run_uid="elsewhere")
        failed = failed_run({"uid": "raw"}, "no photon energy")
        uids["failed"] = failed[0][1]["uid"]
        for document in failed:
            write(*document)
        yield SimpleNamespace(
            folder=folder, url=url, client=client, frames=frames, documents=documents, uids=uids
        )
        client.context.close()


@pytest.fixture
def free_port():
    """Give a port of 127.0.0.1 that nobody listens on: ``free_port()``."""

    def find():
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    return find


@pytest.fixture
def running():
    """Run a server: ``with running("-m", "nanobeam_bluesky.cli", "serve") as served``."""

    @contextmanager
    def running(*arguments, **environment):
        """A server in a process of its own, its address, and what it has printed by its end."""
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"COLUMNS": "300", "PYTHONUNBUFFERED": "1"} | environment,
        )
        running = SimpleNamespace(process=process, text="", url="")
        try:
            while "http://" not in running.text:
                line = process.stdout.readline()
                assert line, running.text
                running.text += line
            running.url = next(word for word in running.text.split() if word.startswith("http://"))
            yield running
        finally:
            process.send_signal(signal.SIGINT)
            running.text += process.communicate(timeout=30)[0]

    return running
