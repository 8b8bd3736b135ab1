"""``nanobeam check`` on start documents, recorded streams, catalogues and broken files."""

import json

import matplotlib.image
import numpy as np
import pytest
from bluesky import RunEngine
from typer.testing import CliRunner

from nanobeam_bluesky.check import _recorded
from nanobeam_bluesky.cli import app
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Card, ModelStore
from nanobeam_bluesky.models.universal import universal_network
from nanobeam_bluesky.sim import EmbeddedSXDM, SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import open_catalog, raw_writer


@pytest.fixture(scope="module")
def flown(tmp_path_factory):
    """Documents of two small scans, frames in a file and embedded, and a catalogue of them."""
    folder = tmp_path_factory.mktemp("check")
    geometry = Geometry.published().model_copy(
        update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
    )
    client = open_catalog(folder / "catalog")
    engine = RunEngine(context_managers=[])
    runs = {}
    for kind in (SimulatedSXDM, EmbeddedSXDM):
        documents = runs[kind] = []
        sxdm = kind(phantom("film", (3, 4)), geometry, folder / "catalog" / "frames", counts=20_000)
        sinks = [lambda name, doc, to=documents: to.append((name, doc))]
        if kind is SimulatedSXDM:
            sinks.append(raw_writer(client["raw"]))
        engine(sxdm_fly(sxdm), sinks)
    client.context.close()
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join()
    engine.loop.close()
    return runs[SimulatedSXDM], runs[EmbeddedSXDM], folder / "catalog"


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def lines(documents, path):
    text = (json.dumps({"name": n, "doc": d}, default=plain) for n, d in documents)
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Run the command in this process; return its exit code and what it printed."""
    monkeypatch.setenv("NANOBEAM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("nanobeam_bluesky.cli.console.width", 400)

    def run(*arguments):
        done = CliRunner().invoke(app, ["check", *map(str, arguments)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    return run


def row(text, first):
    """Cells of the table's row that begins with a word."""
    found = [line for line in text.splitlines() if line.startswith(f"│ {first} ")]
    assert len(found) == 1, text
    return [cell.strip() for cell in found[0].strip("│").split("│")]


def test_a_recorded_run_is_shown_field_by_field(flown, check, tmp_path):
    documents = flown[0]
    code, text = check("--run", lines(documents, tmp_path / "run.jsonl"), "--preset", "default")
    assert code == 0, text
    assert row(text, "energy_keV") == ["energy_keV", "11.3", "keV", "baseline 'energy'"]
    assert row(text, "pixel_size_um")[1:3] == ["55", "um"]
    assert row(text, "d_spacing_angstrom")[1::2] == ["2.0065", "derived"]
    assert row(text, "saturation_value")[1] == "not given"
    assert row(text, "shape")[1:] == ["3 rows × 4 columns", "start['shape']"]
    assert row(text, "snaking")[1] == "every second row backwards"
    assert row(text, "motors")[1] == "slow sample_y, fast sample_x"
    assert row(text, "positions of sample_x")[1:] == ["recorded, um", "data key 'sample_x'"]
    assert "stream 'primary'" in row(text, "frames")[2]
    assert row(text, "2θB")[1].startswith("31.7349°")
    assert row(text, "pupil's half-widths")[1].startswith("26.3 × 26.3")
    assert "rows 16 to 144, columns 6 to 134: patterns of 64 × 64" in text
    assert "shipped network: covers this geometry" in text
    assert "own network: none" in text
    assert "frames: 12 points of 12" in text
    assert "would be analysed" in text


@pytest.mark.parametrize("dialect", [0, 1])
def test_the_picture_has_the_simulated_beside_the_measured_pattern(dialect, flown, check, tmp_path):
    path = lines(flown[dialect], tmp_path / "run.jsonl")
    code, text = check("--run", path, "--plot", tmp_path / "out.png")
    assert code == 0, text
    assert "beside the measured" in text
    image = matplotlib.image.imread(tmp_path / "out.png")
    assert image.shape[1] > 1.9 * image.shape[0]
    left, right = np.array_split(image[..., :3], 2, axis=1)
    assert min(left.std(), right.std()) > 0.1


def test_a_run_of_a_catalogue_is_found_by_the_beginning_of_its_uid(flown, check, tmp_path):
    documents, _, catalog = flown
    uid = documents[0][1]["uid"]
    plot = tmp_path / "out.png"
    code, text = check("--run", uid[:8], "--catalog", catalog, "--plot", plot)
    assert code == 0, text
    assert row(text, "energy_keV")[3] == "baseline 'energy'"
    assert "beside the measured" in text


def test_a_start_document_alone_lacks_the_baseline(flown, check, tmp_path):
    start = flown[0][0][1]
    (tmp_path / "start.json").write_text(json.dumps(start))
    code, text = check("--run", tmp_path / "start.json")
    assert code == 1
    assert row(text, "energy_keV")[1] == "missing"
    assert "energy_keV or wavelength_angstrom missing: looked at start['nanobeam']" in text
    assert "e.g. energy_keV = 11.3 (a start document alone has neither baseline" in text
    assert "1 problem to solve" in text
    start = start | {"nanobeam": start["nanobeam"] | {"energy_keV": 11.3}}
    (tmp_path / "start.json").write_text(json.dumps(["start", start]))
    code, text = check("--run", tmp_path / "start.json", "--plot", tmp_path / "out.png")
    assert code == 0, text
    assert f"simulated pattern in {tmp_path / 'out.png'}" in text
    assert matplotlib.image.imread(tmp_path / "out.png").std() > 0.1


def test_everything_that_is_missing_or_impossible_is_told_at_once(flown, check, tmp_path):
    start = dict(flown[0][0][1])
    block = start["nanobeam"]
    start["nanobeam"] = {k: v for k, v in block.items() if k not in ("thickness_nm", "optics")}
    start["nanobeam"]["detector_distance_m"] = {"value": 850, "units": "keV"}
    start["shape"] = [3]
    (tmp_path / "start.json").write_text(json.dumps(start))
    code, text = check("--run", tmp_path / "start.json", "--preset", "default")
    assert code == 1
    for words in (
        "scan shape = [3] at start['shape']: expected two",
        "thickness_nm missing: looked at start['nanobeam']['thickness_nm']; set start['nanobeam']",
        "give it in a copy of the preset, e.g. thickness_nm = 11.7",
        "detector_distance_m: cannot turn 850 'keV'",
        "as a table [geometry.optics]",
        "5 problems",
    ):
        assert words in text
    assert row(text, "detector_distance_m")[1] == "unusable"


def test_a_run_that_the_preset_would_ignore_is_told(flown, check, tmp_path):
    path = lines(flown[0], tmp_path / "run.jsonl")
    code, text = check("--run", path, "--preset", "hxn")
    assert code == 1
    assert "would be ignored: hxn: start['scan']['type'] = None, expected '2D_FLY_PANDA'" in text
    documents = [("start", {**flown[0][0][1], "nanobeam": None}), *flown[0][1:]]
    code, text = check("--run", lines(documents, path))
    assert code == 1
    assert "srx: start['scan']['type'] = None" in text
    assert "default: start['nanobeam'] is missing" in text


def test_a_broken_stream_names_its_bad_lines_and_checks_the_rest(flown, check, tmp_path):
    path = lines(flown[0], tmp_path / "run.jsonl")
    good = path.read_text().splitlines()
    path.write_text("\n".join([*good[:3], '{"name": "descr', "[1, 2]", *good[3:]]))
    code, text = check("--run", path)
    assert code == 1
    assert "run.jsonl line 4: " in text
    assert "run.jsonl line 5: expected a document, found '[1, 2]'" in text
    assert row(text, "energy_keV")[1] == "11.3"
    assert "2 problems" in text
    path.write_text("\n".join(good[:2] + good[4:]))  # no descriptor of the frames
    code, text = check("--run", path)
    assert code == 1
    assert "expected 'sxdm_image' in its data_keys" in text


def test_missing_frames_are_told_and_the_simulated_pattern_is_drawn(flown, check, tmp_path):
    path = lines(flown[0], tmp_path / "run.jsonl")
    path.write_text(path.read_text().replace("/frames/", "/nowhere/"))
    code, text = check("--run", path, "--plot", tmp_path / "out.png")
    assert code == 1
    assert "no frame could be read: " in text
    assert "nowhere" in text
    assert matplotlib.image.imread(tmp_path / "out.png").std() > 0.1
    code, text = check("--run", path, "--plot", tmp_path / "none" / "out.png")
    assert (code, "--plot" in text) == (1, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"name": "sto', "no start document in it (run.json line 1: "),
        ("[1, 2]", "expected a document, found '1'"),
        ("", "no start document"),
        ('{"name": "stop", "doc": {"uid": "1"}}', "no start document"),
        (b"\xff\xfe\x00", "can't decode"),
        (None, "no such file; for a UID say with --catalog"),
    ],
)
def test_what_is_no_run_is_wrong_usage(content, words, check, tmp_path):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, text = check("--run", path)
    assert code == 2
    assert words in text


def test_a_wrong_preset_or_catalogue_is_wrong_usage(flown, check, tmp_path):
    path = lines(flown[0], tmp_path / "run.jsonl")
    for options, words in (
        (("--run", path, "--preset", "mars"), "shipped are default"),
        (("--run", "3f2a", "--catalog", tmp_path), "no catalogue in this folder"),
        (("--run", "3f2a", "--catalog", "no-profile-of-this-name"), "no-profile"),
    ):
        code, text = check(*options)
        assert (code, words in text) == (2, True), text


def test_documents_are_read_however_they_are_written(tmp_path):
    start, stop = {"uid": "1"}, {"uid": "2"}
    path = tmp_path / "run.json"
    for content in (
        [["start", start], ["stop", stop]],
        [{"name": "start", "doc": start}, {"name": "stop", "doc": stop}],
    ):
        path.write_text(json.dumps(content))
        assert _recorded(path) == ([("start", start), ("stop", stop)], [])
        path.write_text("\n".join(f"\x1e{json.dumps(item)}" for item in content))
        assert _recorded(path) == ([("start", start), ("stop", stop)], [])


def test_a_network_of_ones_own_is_found_or_refused(flown, check, tmp_path):
    document = flown[0][0][1]
    geometry = Geometry.from_start(document, baseline={"energy": 11.3})
    store = ModelStore(tmp_path / "home" / "models")
    card = Card(
        fingerprint=geometry.fingerprint(),
        geometry=geometry,
        architecture="ReducedNet",
        ranges={"strain": 0.005, "omega": 0.05, "chi": 0.1},
        training={},
        accuracy=(),
        version="0",
        created="2026-11-22T00:00:00",
    )
    store.save(universal_network(geometry)[0], card)
    path = lines(flown[0], tmp_path / "run.jsonl")
    code, text = check("--run", path)
    assert code == 0, text
    assert "own network: ReducedNet, trained 2026-11-22" in text
    weights = store.root / f"{geometry.fingerprint()}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, text = check("--run", path)
    assert (code, "altered or truncated" in text) == (1, True)
