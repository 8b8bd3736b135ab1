"""A facility's Tiled on PostgreSQL and Redis: recorded, followed and viewed as on SQLite."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import xarray as xr
import yaml
from bluesky_tiled_plugins import subscribe_to_streams
from tiled.client import from_uri
from tiled.commandline.main import cli_app
from tiled.queries import Key
from typer.testing import CliRunner

from nanobeam_bluesky import to_maps
from nanobeam_bluesky.tiled_adapters import derived_writer
from nanobeam_bluesky.tiled_adapters.server import print_config

POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path())


@contextmanager
def listening(command, port, **options):
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    ) as process:
        try:
            for _ in range(300):
                with socket.socket() as connection:
                    if connection.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def databases(free_port):
    """Addresses of a PostgreSQL with two databases, and of a Redis, of our own."""
    if not (POSTGRES / "initdb").exists() or not shutil.which("redis-server"):
        pytest.skip("postgresql and redis-server are not installed")
    options = {}
    with ExitStack() as stack:
        # not in pytest's folder, which is root's alone; PostgreSQL refuses to run as root
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            options = {"user": user.pw_uid, "group": user.pw_gid, "cwd": folder}
        data, port = f"{folder}/data", free_port()
        make = [POSTGRES / "initdb", "-D", data, "-U", "nanobeam", "-A", "trust", "-N"]
        subprocess.run(make, check=True, capture_output=True, **options)
        serve = [POSTGRES / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-F"]
        stack.enter_context(listening([*serve, "-k", folder], port, **options))
        address = ["-h", "127.0.0.1", "-p", str(port), "-U", "nanobeam"]
        for name in ("catalog", "tables"):
            for _ in range(50):
                done = subprocess.run([POSTGRES / "createdb", *address, name], capture_output=True)
                if done.returncode == 0:
                    break
                time.sleep(0.1)
            assert done.returncode == 0, done.stderr
        redis = free_port()
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(redis), "--save", ""]
        stack.enter_context(listening([*command, "--dir", folder], redis, **options))
        yield f"postgresql://nanobeam@127.0.0.1:{port}", f"redis://127.0.0.1:{redis}"


@pytest.mark.filterwarnings(
    # Tiled's client and today's websockets
    "ignore:connect.. must be used as a context manager:DeprecationWarning"
)
def test_maps_are_recorded_followed_and_viewed(databases, running, tmp_path, derived_documents):
    postgres, redis = databases
    # as the comments of the printed configuration say
    config = yaml.safe_load(print_config(tmp_path / "runs"))
    config["streaming_cache"] = {"uri": redis}
    for tree in config["trees"]:
        tree["args"]["uri"] = f"{postgres}/catalog"
        for storage in ("writable_storage", "readable_storage"):
            tree["args"][storage] = [
                f"{postgres}/tables" if place.startswith("sqlite") else place
                for place in tree["args"].get(storage, [])
            ]
        if tree["tree"] != "catalog":
            del tree["args"]["writable_storage"]
    file = tmp_path / "tiled.yml"
    file.write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(cli_app, ["catalog", "init", f"{postgres}/catalog"])
    assert done.exit_code == 0, done.output
    documents = derived_documents((4, 5), page=6)
    uid, seen = documents[0][1]["uid"], []
    command = ("-m", "nanobeam_bluesky.cli", "serve", "--config", file, "--port", "0")
    with running(*command) as served:
        client = from_uri(served.url)
        write = derived_writer(client["derived"])
        with subscribe_to_streams(
            client["derived"], lambda update: seen.append(update.data()), streams={"primary": None}
        ):
            for done, (name, doc) in enumerate(documents):
                write(name, doc)
                if done == 3:  # while it goes on
                    maps = client["maps"][uid].read(["strain", "flags", "sample_x", "sample_y"])
                    assert maps["strain"].notnull().sum() == 12
            end = time.monotonic() + 20
            while sum(map(len, seen)) < 20 and time.monotonic() < end:
                time.sleep(0.05)
        assert sum(map(len, seen)) == 20
        xr.testing.assert_identical(client["maps"][uid].read(), to_maps(documents))
        assert list(client["maps"].search(Key("start.sample") == "film")) == [uid]
        client.context.close()
