import subprocess
import sys
import threading
import time

import pytest


@pytest.fixture
def listen():
    """Run a source in a thread: ``documents = listen(source)``, from when it listens."""
    stop = threading.Event()
    threads = []

    def start(source, wait=True):
        documents, ready = [], threading.Event()
        thread = threading.Thread(
            target=source.run,
            args=(lambda name, doc: documents.append((str(getattr(name, "name", name)), doc)),),
            kwargs={"stop": stop, "ready": ready.set},
        )
        thread.start()
        threads.append(thread)
        assert not wait or ready.wait(30)
        return documents

    yield start
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def until():
    def wait(condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    return wait


PROXY = """
from bluesky.callbacks.zmq import Proxy
proxy = Proxy("127.0.0.1:*", "127.0.0.1:*")
print(*(str(p.decode() if isinstance(p, bytes) else p) for p in (proxy.in_port, proxy.out_port)),
      flush=True)
proxy.start()
"""


@pytest.fixture(scope="session")
def zmq_proxy():
    """Bluesky's proxy, on free ports: (incoming address, outgoing address)."""
    pytest.importorskip("zmq")
    process = subprocess.Popen([sys.executable, "-c", PROXY], stdout=subprocess.PIPE, text=True)
    with process.stdout as lines:
        yield lines.readline().split()
        process.terminate()
        process.wait(10)
