import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest


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
