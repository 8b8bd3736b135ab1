"""The server: a real scan recorded, followed and read over HTTP; its options; what it refuses."""

import base64
import fcntl
import re
import runpy
import shutil
import socket
import subprocess
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import matplotlib.image
import numpy as np
import pytest
import yaml
from bluesky import RunEngine
from bluesky_tiled_plugins import subscribe_to_streams
from hypothesis import Phase, given, settings, strategies
from tiled.client import from_uri
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from nanobeam_bluesky import to_maps
from nanobeam_bluesky.callbacks import BackgroundSink, NanobeamCallback
from nanobeam_bluesky.cli import app
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.sim import SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import (
    derived_writer,
    open_catalog,
    raw_writer,
    serve,
    serve_config,
)
from nanobeam_bluesky.tiled_adapters.server import is_private, print_config

pytestmark = pytest.mark.filterwarnings(
    # Tiled's client and today's websockets
    "ignore:connect.. must be used as a context manager:DeprecationWarning"
)
SAMPLE = phantom("unique", (4, 5))
GEOMETRY = Geometry.published().model_copy(
    update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
)
TREES = ["raw", "derived", "scans", "maps"]


class Watched(SimulatedSXDM):
    """Notes when each frame was written."""

    def _open(self):
        self.written = []
        super()._open()

    def _take(self, index, row, col):
        super()._take(index, row, col)
        self.written.append(time.monotonic())


@contextmanager
def engine():
    RE = RunEngine(context_managers=[])
    yield RE
    RE.loop.call_soon_threadsafe(RE.loop.stop)
    RE._th.join()
    RE.loop.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that records a scan and its maps, and what a subscriber saw of it meanwhile."""
    folder = tmp_path_factory.mktemp("served")
    sxdm = Watched(SAMPLE, GEOMETRY, folder / "frames", counts=20_000)
    seen, uids = {}, {}
    with serve(folder) as url, engine() as RE:
        client = from_uri(url)
        callback = NanobeamCallback()
        callback.subscribe(derived_writer(client["derived"]))
        callback.subscribe(lambda name, doc: uids.update(derived=doc["uid"]), "start")
        record = BackgroundSink(raw_writer(client["raw"]))
        RE.subscribe(record)
        RE.subscribe(callback)
        while not callback.health.worker_ready:
            time.sleep(0.05)

        def see(update):
            for number, strain in update.data()[["seq_num", "strain"]].itertuples(index=False):
                seen[int(number)] = strain, time.monotonic(), update.run_uid

        with subscribe_to_streams(
            client["derived"], see, streams={"primary": ["seq_num", "strain"]}
        ):
            (uids["raw"],) = RE(sxdm_fly(sxdm, dwell_s=0.1))
            assert callback.wait(60)
            assert record.close(60)
            end = time.monotonic() + 10
            while len(seen) < SAMPLE.size and time.monotonic() < end:
                time.sleep(0.05)
        callback.close()
        assert record.health.errors == 0, record.health.last_error
        yield SimpleNamespace(
            folder=folder, url=url, client=client, sxdm=sxdm, seen=seen, uids=uids
        )
        client.context.close()


def test_subscribers_see_values_at_most_2_s_after_the_frame(server):
    assert sorted(server.seen) == list(range(1, SAMPLE.size + 1))
    maps = to_maps(server.client["derived"][server.uids["derived"]])
    for number, (strain, when, uid) in server.seen.items():
        assert when - server.sxdm.written[number - 1] < 2
        assert uid == server.uids["derived"]
        row, col = divmod(number - 1, SAMPLE.shape[1])
        col = SAMPLE.shape[1] - 1 - col if row % 2 else col
        assert strain == maps["strain"].to_numpy()[row, col]


def test_views_and_strangers_cannot_subscribe(server):
    base, key = server.url.removeprefix("http").split("?api_key=")
    headers = {"Authorization": f"Apikey {key}"}
    for path in ("maps", f"maps/{server.uids['derived']}", f"scans/{server.uids['raw']}/frames"):
        with (
            pytest.raises(InvalidStatus, match="403"),
            connect(f"ws{base}/api/v1/stream/single/{path}", additional_headers=headers),
        ):
            pass
    wrong = {"Authorization": f"Apikey {'0' * 64}"}
    with (
        pytest.raises(InvalidStatus, match=r"40[13]"),
        connect(f"ws{base}/api/v1/stream/single/derived", additional_headers=wrong),
    ):
        pass
    with connect(f"ws{base}/api/v1/stream/single/derived") as socket:
        socket.send('{"type": "auth", "api_key": "0000"}')
        with pytest.raises(ConnectionClosedError, match="Authentication failed"):
            socket.recv(timeout=10)


# ---------------------------------------------------------------------- nanobeam serve


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with one raw run whose file nobody in this process has opened to read."""
    folder = tmp_path_factory.mktemp("recorded")
    client = open_catalog(folder)
    record = BackgroundSink(raw_writer(client["raw"]))
    with engine() as RE:
        RE.subscribe(record)
        (uid,) = RE(sxdm_fly(SimulatedSXDM(SAMPLE, GEOMETRY, folder / "frames")))
    assert record.close(60)
    client.context.close()
    (file,) = (folder / "frames").iterdir()
    return SimpleNamespace(folder=folder, uid=uid, file=file)


def test_serve_reads_without_locks_and_ends_by_ctrl_c(recorded, running):
    command = ("-m", "nanobeam_bluesky.cli", "serve", recorded.folder, "--port", "0")
    key = "0123456789abcdefABCDEF"
    stack = ExitStack()
    with running(*command, TILED_SINGLE_USER_API_KEY=key) as served:
        assert served.url.endswith(f"?api_key={key}")
        client = from_uri(served.url)
        assert list(client) == TREES
        frames = client["scans"][recorded.uid]["frames"].read()
        assert frames.sum() > 0
        np.testing.assert_array_equal(
            client["raw"][recorded.uid]["primary"]["sxdm_image"].read()[0].squeeze(), frames[0, 0]
        )
        with open(recorded.file, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as HDF5 does for a writer
        with pytest.raises(OSError, match="in use"):
            port = int(served.url.partition("?")[0].rpartition(":")[2])
            with serve(recorded.folder, port=port):
                pass
        stream = served.url.replace("http", "ws", 1).replace("?", "/api/v1/stream/single/derived?")
        subscription = stack.enter_context(
            connect(stream, additional_headers={"Authorization": f"Apikey {key}"})
        )
        assert subscription.recv(timeout=10)
    assert served.process.returncode == 0
    assert served.text.count(key) == 1
    assert served.text.endswith("ended\n")
    assert "Traceback" not in served.text
    with pytest.raises(ConnectionClosed):
        subscription.recv(timeout=10)
    client.context.close()
    stack.close()


def test_printed_configuration_is_served_by_tiled_and_by_ours(
    recorded, running, free_port, tmp_path
):
    done = CliRunner().invoke(
        app,
        ["serve", str(recorded.folder), "--print-config", "--readable-storage", str(tmp_path)],
        env={"HDF5_USE_FILE_LOCKING": "FALSE"},
    )
    assert done.exit_code == 0
    assert done.output == print_config(recorded.folder, [tmp_path])
    file = tmp_path / "tiled.yml"
    file.write_text(done.output)
    command = ("-m", "tiled", "serve", "config", file, "--port", str(free_port()))
    with running(*command) as theirs, serve_config(file, port=0) as ours:
        time.sleep(0.1)
        for url in (theirs.url, ours):
            client = from_uri(url) if url is ours else patiently(url)
            assert list(client) == TREES
            assert client["scans"][recorded.uid]["intensity"].read().shape == SAMPLE.shape
            client["derived"].subscribe().start_in_thread().disconnect()
            answer = httpx.get(f"{url.partition('?')[0]}/api/v1/metadata/maps")
            assert answer.status_code == 401
            client.context.close()


def patiently(url):
    """Connect to a server that tells its address before it listens."""
    for _ in range(100):
        try:
            httpx.get(url)
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    return from_uri(url)


def facility(folder, **changes):
    """A configuration as a facility has one, with catalogues below its name."""
    config = yaml.safe_load(print_config(folder))
    trees = [tree | {"path": f"/hxn{tree['path']}"} for tree in config["trees"][:2]]
    return {"trees": trees, "create_mount_nodes_if_not_exist": True} | changes


def test_views_are_added_to_the_catalogues_of_a_configuration(
    recorded, free_port, tmp_path, monkeypatch
):
    monkeypatch.setenv("TILED_ALLOW_ANONYMOUS_ACCESS", "1")
    file = tmp_path / "facility.yml"
    file.write_text(yaml.safe_dump(facility(recorded.folder, uvicorn={"port": free_port()})))
    with serve_config(file) as url:
        client = from_uri(url)
        assert list(client["hxn"]) == TREES
        scan = client["hxn"]["scans"][recorded.uid]
        assert scan["frames"].shape == (*SAMPLE.shape, 160, 144)
        asset = httpx.get(
            url.replace("?", f"/api/v1/asset/bytes/hxn/raw/{recorded.uid}/primary/sxdm_image?id=1&")
        )
        assert asset.status_code == 403
        assert httpx.get(f"{url.partition('?')[0]}/api/v1/metadata/hxn").status_code == 401
        client.context.close()


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 1, "No such file"),
        ("a: [", 2, "is no YAML"),
        ("- 1", 2, "expected a Tiled configuration (YAML), found list"),
        ({"catalog": {"uri": "sqlite://"}}, 2, "no catalogue at …/raw or …/derived"),
        ({"trees": [{"path": "/x", "tree": "catalog"}]}, 2, "found ['/x']"),
        ({"colour": "red"}, 2, "colour: Extra inputs are not permitted"),
        ({"authentication": {"allow_anonymous_access": True}}, 2, "expected false, or nothing"),
        ({"authentication": {"single_user_api_key": "a&b"}}, 2, "of letters and digits"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(
    content, code, words, tmp_path, monkeypatch
):
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "FALSE")  # so that it is as it was afterwards
    file = tmp_path / "tiled.yml"
    if isinstance(content, dict):
        whole = "catalog" in content or "trees" in content
        content = yaml.safe_dump(content if whole else facility(tmp_path / "runs", **content))
    if content is not None:
        file.write_text(content)
    done = CliRunner().invoke(app, ["serve", "--config", str(file), "--port", "0"])
    assert (done.exit_code, words in done.output) == (code, True), done.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{file}"], 1, "Not a directory"),
        (["{folder}", "--config", "{file}"], 2, "give it alone"),
        (["{folder}", "--root-map", "/ioc"], 2, "expected OLD=NEW"),
        (["{folder}", "--port", "70000"], 2, "65535"),
        (["{folder}", "--host", "192.0.2.1"], 1, "Others can reach 192.0.2.1"),
        (["{folder}", "--host", "192.0.2.1"], 1, "Cannot assign requested address"),
        (["{broken}"], 1, "Tiled did not start"),
    ],
)
def test_what_cannot_be_served_is_said(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "FALSE")
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "catalog.db").write_text("this is no database" * 100)
    places = {name: str(tmp_path / name) for name in ("file", "folder", "broken")}
    arguments = [argument.format(**places) for argument in arguments]
    done = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert (done.exit_code, words in done.output) == (code, True), done.output


def test_addresses_of_this_machine_alone_are_known():
    assert [is_private(h) for h in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_private(h) for h in ("0.0.0.0", "::", "192.0.2.1", "host.org", "")] == [False] * 5


def test_the_example_is_served_and_its_client_runs(server, tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "serve_maps"
    # under another name, as two engines of one process do not share a database
    (tmp_path / "runs").symlink_to(server.folder)
    monkeypatch.setenv("NANOBEAM_FOLDER", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    with serve_config(example / "tiled.yml", port=0) as url:
        monkeypatch.setattr("sys.argv", ["client.py", url])
        client = runpy.run_path(str(example / "client.py"), run_name="__main__")["client"]
        client.context.close()
    printed = capsys.readouterr().out
    row, col = map(int, re.search(r"row (\d+), column (\d+)", printed).groups())
    maps = to_maps(server.client["derived"][server.uids["derived"]])
    assert f"its pattern has {maps['counts'].to_numpy()[row, col]:.0f} counts" in printed
    assert (tmp_path / "strain.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------- a browser


@pytest.fixture
def browser():
    """A headless Chromium: ``until(script)`` waits for what JavaScript returns on a page."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
    wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
    command = ["chromedriver", "--port=0"]
    with ExitStack() as stack:
        driver = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(driver.terminate)
        port = next(
            filter(None, (re.search(r"successfully on port (\d+)", line) for line in driver.stdout))
        )
        base = f"http://127.0.0.1:{port[1]}"
        client = stack.enter_context(httpx.Client(base_url=base, timeout=60))
        session = "session/" + client.post("session", json=wanted).json()["value"]["sessionId"]
        stack.callback(client.delete, session)

        def run(script):
            body = {"script": f"return {script}", "args": []}
            return client.post(f"{session}/execute/sync", json=body).json()["value"]

        def until(script):
            for _ in range(300):
                found = run(script)
                if found:
                    return found
                time.sleep(0.05)
            raise AssertionError(f"{script} in {run('document.body.innerText')}")

        yield SimpleNamespace(
            visit=lambda url: client.post(f"{session}/url", json={"url": url}),
            until=until,
            picture=lambda: base64.b64decode(client.get(f"{session}/screenshot").json()["value"]),
        )


def test_the_web_page_lists_runs_and_draws_maps(server, browser, derived_documents, tmp_path):
    shape = 6, 7
    flags, strain = np.zeros(shape, int), np.arange(42.0).reshape(shape) ** 2 * 1e-5
    flags[2], strain[2] = 32, np.nan  # of fewer, the page would take the logarithm
    documents = derived_documents(shape, change={"flags": flags, "strain": strain})
    write = derived_writer(server.client["derived"])
    for name, doc in documents:
        write(name, doc)
    uid = documents[0][1]["uid"]
    base, key = server.url.split("?")
    browser.visit(f"{base}/ui/browse/maps?{key}")
    text = "document.body.innerText"
    browser.until(f"{text}.includes('{uid}')")
    assert server.uids["derived"] in browser.until(text)
    browser.visit(f"{base}/ui/browse/maps/{uid}")  # the key is a cookie by now
    browser.until(f"{text}.includes('strain_sigma')")
    pixels = (
        "(canvas => canvas && [...canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height).data]"
        ".filter((value, at) => at % 4 == 0))(document.querySelector('canvas'))"
    )
    for name, values in (("strain", strain), ("flags", flags)):
        browser.visit(f"{base}/ui/browse/maps/{uid}/{name}")
        drawn = np.reshape(browser.until(f"{pixels}?.some(x => x) && {pixels}"), shape)
        low, high = np.nanmin(values), np.nanmax(values)
        np.testing.assert_allclose(
            drawn, np.nan_to_num(255 * (values - low) / (high - low)), atol=1
        )
    picture = tmp_path / "map.png"
    picture.write_bytes(browser.picture())
    assert matplotlib.image.imread(picture).std() > 0.1


# ---------------------------------------------------------------------- what is refused

PUBLIC = {"/", "/healthz", "/tiled-ui-settings", "/ui/{path}", "/api/v1/"}
"""What says nothing of the runs."""


def nodes(server):
    maps, scan = f"maps/{server.uids['derived']}", f"scans/{server.uids['raw']}"
    return [
        *("maps", maps, f"{maps}/strain", f"{maps}/flags", f"{maps}/sample_x", f"{maps}/nothing"),
        *("scans", scan, f"{scan}/frames", f"{scan}/patterns", f"{scan}/intensity"),
        *("raw", "derived", "nothing"),  # of what is in them Tiled's own adapters fail in places
    ]


@pytest.fixture(scope="module")
def api(server):
    """Tiled's own description of its routes; we add none."""
    return httpx.get(f"{server.url.partition('?')[0]}/openapi.json").json()


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({}, {}),
        ({}, {"api_key": "0" * 64}),
        ({"Authorization": f"Apikey {'0' * 64}"}, {}),
        ({"Authorization": "Bearer x"}, {}),
        ({"Authorization": b"Apikey \xc3\xa9"}, {}),
        ({}, {"api_key": "\U000ad54c"}),
        ({"Cookie": "tiled_api_key=0000"}, {}),
        ({"Cookie": 'tiled_api_key="\\303"'}, {}),
    ],
)
def test_nobody_gets_anything_without_the_key(server, api, headers, query):
    base = server.url.partition("?")[0]
    node = f"maps/{server.uids['derived']}/strain"
    needed = {"block": "0,0", "partition": 0, "id": 1} | query
    found = {}
    with httpx.Client(base_url=base, headers=headers, params=needed) as client:
        for path, operations in api["paths"].items():
            for method in operations:
                body = {} if method in ("post", "put", "patch") else None
                url = re.sub("{.*?}", lambda m: node if m[0] == "{path}" else "1", path)
                answer = client.request(method, url, json=body)
                found[method, path] = answer.status_code
                assert "original_run_uid" not in answer.text
    public = {("get", path) for path in PUBLIC}
    assert all(found[key] in (200, 401) for key in public)
    opened = {key: code for key, code in found.items() if code not in (401, 403, 404, 405, 422)}
    assert not set(opened) - public, opened
    assert all(found["get", f"/api/v1/{r}/{{path}}"] == 401 for r in ("metadata", "array/full"))


def test_paths_that_climb_or_end_early_are_refused(server):
    base, key = server.url.split("?")
    address = base.removeprefix("http://").split(":")
    secret = server.folder.parent / "secret.txt"
    secret.write_text("a secret")
    scan = f"scans/{server.uids['raw']}"
    for route in ("api/v1/metadata", "api/v1/array/full", "api/v1/search", "zarr/v2", "zarr/v3"):
        for up in ("..", "%2e%2e", ".%2e", "%252e%252e"):
            for slash in ("/", "%2f", "\\", "%5c", "//"):
                tail = slash.join([scan, *[up] * 9, *str(secret).split("/")[1:]])
                check_refused(address, f"/{route}/{tail}?{key}")
        for tail in (f"{scan}%00", f"{scan}/%00/frames", f"//{secret}", f"%2f{secret}"):
            check_refused(address, f"/{route}/{tail}?{key}")


def check_refused(address, path):
    with socket.create_connection(address) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: {address[0]}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.match(rb"HTTP/1.1 4\d\d ", answer), (path, answer[:100])
    assert b"a secret" not in answer


ROUTES = [
    *(f"/api/v1/{name}/{{path}}" for name in ("metadata", "search", "distinct", "revisions")),
    *(f"/api/v1/{name}/{{path}}" for name in ("array/full", "array/block", "container/full")),
    *(f"/api/v1/{name}/{{path}}" for name in ("table/full", "table/partition", "asset/bytes")),
    *("/zarr/v2/{path}/.zattrs", "/zarr/v2/{path}/.zarray", "/zarr/v3/{path}/zarr.json"),
]


@pytest.mark.parametrize(
    ("route", "query"),
    [
        ("search/maps", {"page[offset]": 10**30}),
        ("search/maps", {"filter[eq][condition][key]": "a", "filter[eq][condition][value]": "x"}),
        ("array/full/maps/{derived}/strain", {"slice": "::0"}),
        ("array/full/maps/{derived}/strain", {"slice": ":,:,:"}),
        ("array/full/scans/{raw}/frames", {"slice": "9"}),
        ("array/block/scans/{raw}/frames", {"block": "9,9,9,9"}),
        ("array/block/scans/{raw}/frames", {"block": "0,0,0,0", "slice": "0,0,::0"}),
        ("array/block/scans/{raw}/frames", {"block": "0,0,0,0", "slice": "99"}),
        ("array/full/maps/{derived}/strain", {"filename": "a\nb"}),
        ("container/full/maps/{derived}", {"field": "nothing"}),
    ],
)
def test_requests_that_make_no_sense_are_refused(server, route, query):
    base, key = server.url.split("?api_key=")
    url = f"{base}/api/v1/{route.format(**server.uids)}"
    answer = httpx.get(url, params=query, headers={"Authorization": f"Apikey {key}"})
    assert 400 <= answer.status_code < 500, answer.text


def test_no_request_makes_the_server_fail(server, api):
    """Schemathesis asks what Tiled's routes allow, of our nodes."""
    schemathesis = pytest.importorskip("schemathesis")
    left_out = re.compile(
        r"filter\[.*"  # so many that they take long to draw
        "|expected_shape"  # Tiled answers 500 on purpose where it is another
    )
    for get in filter(None, [operations.get("get") for operations in api["paths"].values()]):
        names = get.get("parameters", [])
        get["parameters"] = [p for p in names if not left_out.fullmatch(p["name"])]
    schema = schemathesis.openapi.from_dict(api)
    base, key = server.url.split("?api_key=")
    codes = Counter()
    with httpx.Client(base_url=base, headers={"Authorization": f"Apikey {key}"}) as client:

        def ask(route):
            @settings(
                deadline=None,
                derandomize=True,
                max_examples=6,
                database=None,
                phases=[Phase.generate],
            )
            @given(schema[route]["GET"].as_strategy(), strategies.sampled_from(nodes(server)))
            def test(case, node):
                query = {k: v for k, v in (case.query or {}).items() if k != "api_key"}
                answer = client.get(route.replace("{path}", node), params=query)
                codes[answer.status_code // 100] += 1
                assert answer.status_code < 500, (route, node, query)

            test()

        for route in ROUTES:
            ask(route)
    assert codes[2] > 10
    assert codes[4] > 10
