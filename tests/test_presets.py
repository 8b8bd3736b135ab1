"""Presets find what a geometry needs, convert its unit, and say where they looked."""

import re
from pathlib import Path

import bluesky.plan_stubs as bps
import bluesky.plans as bp
import bluesky.preprocessors as bpp
import numpy as np
import pytest
from bluesky import RunEngine
from ophyd.sim import SynAxis
from ophyd_async.core import StaticPathProvider, UUIDFilenameProvider, soft_signal_rw
from ophyd_async.sim import SimBlobDetector

from nanobeam_bluesky.documents import RunReferences, ScanGrid
from nanobeam_bluesky.geometry import ROI, Geometry, GeometryError
from nanobeam_bluesky.presets import MissingMetadataError, PositionKey, Preset
from nanobeam_bluesky.sim.devices import Quantity

FILM = {  # what no facility records
    "bragg_center_px": [256.0, 256.0],
    "lattice_c_angstrom": 4.013,
    "reflection_l": 2,
    "thickness_nm": 11.7,
    "detector_shape": [512, 512],
    "optics": Geometry.published().optics.model_dump(),
}


def start(*without, **changes):
    block = Geometry.published().model_dump(mode="json", exclude_none=True)
    for derived in ("wavelength_angstrom", "d_spacing_angstrom", *without):
        block.pop(derived)
    scan = {"shape": [3, 4], "snaking": [False, True], "motors": ["sy", "sx"]}
    return {"uid": "3f2a91c0-1", "nanobeam": block | changes, **scan}


@pytest.fixture(scope="module")
def engine():
    """One RunEngine for all recordings of this module."""
    made = RunEngine(context_managers=[])
    yield made
    made.loop.call_soon_threadsafe(made.loop.stop)
    made._th.join()
    made.loop.close()


@pytest.fixture
def record(engine):
    """Run a plan; return its start document and what the references keep of the others."""

    def run(plan, preset):
        documents = []
        engine(plan, lambda name, doc: documents.append((name, doc)))
        references = RunReferences(("slow", "fast"), preset.detector_key(documents[0][1]))
        for name, doc in documents:
            list(references.document(name, doc, None))
        return documents[0][1], {
            "baseline": references.baseline,
            "configuration": references.configuration,
        }

    return run


def an_empty_run(md, baseline=()):
    @bpp.baseline_decorator(list(baseline))
    @bpp.run_decorator(md=md)
    def plan():
        yield from bps.null()

    return plan()


# ------------------------------------------------------------------ shipped presets


def hxn_metadata(**changes):
    """As ``fly2dpd`` writes them: 40 columns of x, 30 rows of y."""
    scan = {
        "type": "2D_FLY_PANDA",
        "scan_input": [-2.0, 2.0, 40.0, -1.5, 1.5, 30.0],
        "sample_name": "",
        "detectors": ["fs", "xspress3", "eiger2", "merlin1", "panda1", "sclr1"],
        "detector_distance": 0.5,
        "dwell": 0.01,
        "fast_axis": {"motor_name": "zpssx", "units": "um"},
        "slow_axis": {"motor_name": "zpssy", "units": "um"},
        "shape": (40, 30),
    }
    motors = {"motors": ["zpssx", "zpssy"], "motor1": "zpssx", "motor2": "zpssy"}
    return (
        {"shape": [40, 30], "fly_type": "grid", "scan": scan, "nanobeam": FILM} | motors | changes
    )


def test_hxn_reads_shape_energy_distance_and_detector_of_a_fly_scan(record):
    hxn = Preset.load("hxn")
    energy = Quantity(name="energy", value=11.3, units="")  # pseudo motors have none
    document, rest = record(an_empty_run(hxn_metadata(), [energy]), hxn)
    assert hxn.matches(document)
    scan = hxn.scan_metadata(document)
    assert (scan.shape, scan.snaking, scan.motors) == ((30, 40), False, ("zpssy", "zpssx"))
    rows, columns = ScanGrid(scan).axes()
    np.testing.assert_allclose(np.diff(rows), 0.1)  # the range over the number of rows
    np.testing.assert_allclose(np.diff(columns), 0.1)
    assert (rows[0], columns[0]) == (-1.5, -2.0)
    assert scan.positions["zpssx"] == PositionKey(key="inenc2_val", scale=-9.7e-5, units="um")
    assert hxn.detector_key(document) == "merlin1"  # the first in the file, not in the run
    geometry = hxn.read_geometry(document, **rest)
    expected = Geometry.published().model_copy(update={"detector_distance_m": 0.5})
    for name in ("energy_keV", "detector_distance_m", "pixel_size_um", "optics", "thickness_nm"):
        assert getattr(geometry, name) == getattr(expected, name), name


def test_the_nanobeam_block_decides_between_several_detectors():
    hxn = Preset.load("hxn")
    document = {"uid": "1", **hxn_metadata(nanobeam=FILM | {"detector": "eiger2"})}
    assert hxn.detector_key(document) == "eiger2_image"
    assert hxn.geometry_values(document)["pixel_size_um"] == 75
    document["nanobeam"] = FILM | {"detector": "new_image", "pixel_size_um": 20}
    assert hxn.detector_key(document) == "new_image"
    assert hxn.geometry_values(document)["pixel_size_um"] == 20


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["xs", "merlin1"], "merlin1"),
        (("merlin1",), "merlin1"),
        ({"merlin1": {"dwell": 0.1}}, "merlin1"),
        (np.array(["xs", "merlin1"]), "merlin1"),
        ("merlin1", "merlin1"),
        (5, None),
        ([["merlin1"]], None),
    ],
)
def test_detectors_may_be_named_in_many_ways(names, key):
    document = hxn_metadata()
    document["scan"] |= {"detectors": names}
    assert Preset.load("hxn").detector_key(document) == key


@pytest.mark.parametrize("junk", [None, 5, "text", [1], {"type": ["x"]}, {"type": np.arange(3)}])
def test_start_documents_that_make_no_sense_match_nothing(junk):
    document = {"scan": junk, "plan_name": junk, "nanobeam": junk, "versions": junk}
    matching = [p.name for p in Preset.choices("auto") if p.matches(document)]
    assert set(matching) <= {"default"}


def test_a_detector_that_the_start_document_does_not_name_is_known_by_its_frames():
    hxn, document = Preset.load("hxn"), {"uid": "1", **hxn_metadata()}
    document["scan"] = {k: v for k, v in document["scan"].items() if k != "detectors"}
    assert hxn.detector_key(document) is None
    assert "pixel_size_um" not in hxn.geometry_values(document)
    assert hxn.geometry_values(document, frames="eiger2_image")["pixel_size_um"] == 75
    with pytest.raises(
        MissingMetadataError, match=r"detectors \(merlin1, .*none of which is named"
    ):
        hxn.read_geometry(document, baseline={"energy": 11.3})


@pytest.mark.parametrize("snake", [True, False, 1, 0])
def test_srx_reads_shape_snaking_and_energy_of_a_fly_scan(snake, record):
    srx = Preset.load("srx")
    scan = {
        "energy": 11.3,
        "type": "XRF_FLY",
        "scan_input": [-2.0, 1.9, 40, -1.5, 1.4, 30, 0.1],
        "detectors": ["nano_zebra", "sclr1", "xs", "dexela"],
        "dwell": 0.1,
        "fast_axis": {"motor_name": "nano_stage_sx", "units": "um"},
        "slow_axis": {"motor_name": "nano_stage_sy", "units": "um"},
        "theta": {"val": 15200.0, "units": "mdeg"},
        "snake": snake,
        "shape": (40, 30),
    }
    block = FILM | {"detector_distance_m": 0.85}
    document, rest = record(an_empty_run({"scan": scan, "nanobeam": block}), srx)
    assert srx.matches(document)
    found = srx.scan_metadata(document)
    assert (found.shape, found.snaking) == ((30, 40), bool(snake))
    assert found.motors == ("nano_stage_sy", "nano_stage_sx")
    assert found.extents == ((-1.5, 1.4), (-2.0, 1.9))
    assert found.positions["nano_stage_sy"].key == "enc2"
    assert srx.detector_key(document) == "dexela_image"
    geometry = srx.read_geometry(document, **rest)
    assert (geometry.energy_keV, geometry.pixel_size_um) == (11.3, 74.8)


@pytest.mark.parametrize("snake", [True, False])
@pytest.mark.parametrize("kind", ["grid_scan", "rel_grid_scan", "list_grid_scan"])
def test_grid_scan_reads_what_blueskys_plans_write(kind, snake, record):
    preset = Preset.load("grid-scan")
    image, sy, sx = (SynAxis(name=name) for name in ("image", "sy", "sx"))
    axes = (sy, 0, 0.2, 3, sx, 0, 0.3, 4)
    if kind == "list_grid_scan":
        axes = (sy, [0, 0.1, 0.2], sx, [0, 0.1, 0.2, 0.3])
    md = {"nanobeam": start()["nanobeam"]}
    document, rest = record(
        getattr(bp, kind)([image], *axes, snake_axes=snake, md=md), Preset.load("default")
    )
    assert next(p for p in Preset.choices("auto") if p.matches(document)) == preset
    scan = preset.scan_metadata(document)
    assert (scan.shape, scan.snaking, scan.motors) == ((3, 4), snake, ("sy", "sx"))
    assert scan.extents == ((0, 0.2), (0, 0.3))
    assert preset.read_geometry(document, **rest) == Geometry.published()


def test_ophyd_async_reads_distance_and_pixels_from_the_detectors_configuration(record, tmp_path):
    preset = Preset.load("ophyd-async")
    folder = StaticPathProvider(UUIDFilenameProvider(), tmp_path)
    distance = soft_signal_rw(float, 850.0, units="mm", name="det-distance")
    pixel = soft_signal_rw(float, 5.5e-5, units="m", name="det-x_pixel_size")
    detector = SimBlobDetector(folder, config_sigs=[distance, pixel], name="det")
    energy = soft_signal_rw(float, 11.3, units="keV", name="dcm-energy_in_kev")

    def plan():
        yield from connect([detector, distance, pixel, energy])
        md = {"shape": [1, 1], "snaking": [False, True], "nanobeam": FILM}
        yield from bpp.baseline_wrapper(bp.count([detector], md=md), [energy])

    def connect(devices):
        yield from bps.wait_for([device.connect for device in devices])

    document, rest = record(plan(), preset)
    assert preset.matches(document)
    scan = preset.scan_metadata(document)
    assert (scan.shape, scan.snaking) == ((1, 1), True)
    geometry = preset.read_geometry(document, **rest)
    assert geometry.fingerprint() == Geometry.published().fingerprint()


def test_auto_takes_the_most_particular_preset_and_none_without_a_nanobeam_block():
    def chosen(document):
        return next((p.name for p in Preset.choices("auto") if p.matches(document)), None)

    film = {"nanobeam": FILM}
    assert chosen(hxn_metadata()) == "hxn"
    assert chosen({"scan": {"type": "XRF_FLY"}, **film}) == "srx"
    assert chosen({"plan_name": "grid_scan", "versions": {"ophyd_async": "0.21"}, **film}) == (
        "grid-scan"
    )
    assert chosen({"plan_name": "fly", "versions": {"ophyd_async": "0.21"}, **film}) == (
        "ophyd-async"
    )
    assert chosen({"plan_name": "fly", **film}) == "default"
    assert chosen(hxn_metadata(nanobeam=None)) is None
    assert chosen(hxn_metadata(original_run_uid="raw")) is None
    assert [p.name for p in Preset.choices("srx")] == ["srx"]


# ------------------------------------------------------------------------ a preset


def test_the_default_preset_reads_what_it_documents():
    assert Geometry.from_start(start()) == Geometry.published()


def test_binning_and_roi_need_not_be_given():
    assert Geometry.from_start(start("binning", "roi_shape")) == Geometry.published()


def test_another_roi_takes_the_place_of_the_runs_own():
    other = ROI(row=190, col=200, height=129, width=99)  # not a multiple of the fitting binning
    off = {"detector_distance_m": 5.0}  # no ROI could be chosen
    document = start("binning", "roi_shape", **off)
    geometry = Preset.load("default").read_geometry(document, roi=other)
    assert (geometry.roi, geometry.binning) == (other, 3)
    with pytest.raises(GeometryError, match=r"^run 3f2a91c0 with roi = ROI\(.*off the detector"):
        Preset.load("default").read_geometry(
            start("binning"), roi=other.model_copy(update={"row": 500})
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("energy_keV", {"value": 11300.0, "units": "eV"}),
        ("detector_distance_m", {"value": 850.0, "units": "mm"}),
        ("pixel_size_um", {"value": 5.5e-5, "units": "m"}),
    ],
)
def test_a_value_with_a_unit_is_converted(name, value):
    geometry = Geometry.from_start(start(**{name: value}))
    assert geometry.fingerprint() == Geometry.published().fingerprint()


def test_the_energy_may_come_from_the_baseline_in_its_own_unit():
    baseline = {"energy": {"value": 11300.0, "units": "eV"}}
    geometry = Geometry.from_start(start("energy_keV"), baseline=baseline)
    assert geometry.fingerprint() == Geometry.published().fingerprint()


def test_a_missing_field_is_named_with_every_place_that_was_looked_at():
    with pytest.raises(MissingMetadataError) as caught:
        Geometry.from_start(start("energy_keV", "optics"))
    for words in ("run 3f2a91c0", "start['nanobeam']['energy_keV']", "baseline 'energy'", "optics"):
        assert words in str(caught.value)


@pytest.mark.parametrize("units", ["m", "(", "1/", "'", "9**9**9", 5, ["keV"], "no such unit"])
def test_a_unit_that_is_none_or_of_another_dimension_is_refused(units):
    with pytest.raises(GeometryError, match="energy_keV: cannot turn 5 "):
        Geometry.from_start(start(energy_keV={"value": 5, "units": units}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [3]}, "expected two, slow-fast"),
        ({"shape": [3, 0]}, "whole numbers of 1 or more"),
        ({"shape": "34"}, "whole numbers"),
        ({"extents": [[0, 1]]}, "scan extents"),
        ({"extents": [[0, 1], [0, "a"]]}, "expected .*first, last"),
    ],
)
def test_a_scan_of_impossible_shape_is_refused(changes, words):
    with pytest.raises(GeometryError, match=words):
        Preset.load("default").scan_metadata(start() | changes)


def written(folder, text, match="[match]", scan='[scan]\nshape = "start:shape"', geometry=""):
    """Write a preset of these parts; `text` comes first."""
    path = folder / "mine.toml"
    path.write_text(f"{text}\n{match}\n{scan}\n[geometry]\n{geometry}\n")
    return path


def test_fast_slow_order_is_turned(tmp_path):
    scan = '[scan]\nshape = "start:shape"\nsnaking = "start:snaking"\norder = "fast-slow"'
    document = start() | {"snaking": [True, False]}  # the fast axis is the first here
    found = Preset.load(written(tmp_path, "", scan=scan)).scan_metadata(document)
    assert (found.shape, found.snaking) == ((4, 3), True)


def test_axes_that_are_named_apart_are_not_turned(tmp_path):
    scan = (
        '[scan]\norder = "fast-slow"\n'
        'shape = { slow = "start:rows", fast = "start:input[2]" }\n'
        'extents = { slow = "start:y", fast = "start:input[:2]" }'
    )
    preset = Preset.load(written(tmp_path, "", scan=scan))
    found = preset.scan_metadata({"rows": 3, "input": [0.0, 1.5, 4], "y": [5, 7]})
    assert found.shape == (3, 4)
    assert found.extents == ((5, 7), (0, 1.5))
    for short in ({"rows": 3}, {"rows": 3, "input": [0.0]}, {"rows": 3, "input": "text"}):
        with pytest.raises(
            MissingMetadataError, match=r"start\['rows'\] and start\['input'\]\[2\]"
        ):
            preset.scan_metadata(short)


def test_a_preset_may_name_constants_and_other_places(tmp_path):
    path = written(
        tmp_path,
        "",
        match='[match]\nplan_name = ["fly2d"]',
        scan='[scan]\nshape = "start:scan.shape"',
        geometry='energy_keV = { from = "start:scan.energy", units = "eV" }\nthickness_nm = 12.5',
    )
    preset = Preset.load(str(path))
    document = {"uid": "1", "plan_name": "fly2d", "scan": {"energy": 9000, "shape": [2, 2]}}
    assert preset.geometry_values(document) == {"energy_keV": 9.0, "thickness_nm": 12.5}
    assert preset.matches(document)
    assert not preset.matches(document | {"plan_name": "count"})
    assert not preset.matches(document | {"original_run_uid": "raw"})


def test_an_angle_becomes_an_offset_from_the_bragg_condition(tmp_path):
    source = '{ from = "baseline:th*", units = "mdeg", offset = -15.2 }'
    preset = Preset.load(written(tmp_path, "", geometry=f"delta_theta_deg = {source}"))
    assert preset.geometry_values({}, baseline={"theta": 15300.0, "z": 1}) == {
        "delta_theta_deg": pytest.approx(0.1)
    }
    units = {"theta": {"value": 15.3, "units": "deg"}}  # the document's own unit comes first
    assert preset.geometry_values({}, baseline=units)["delta_theta_deg"] == pytest.approx(0.1)


def test_a_preset_says_why_it_does_not_match(tmp_path):
    match = '[match]\nstart = ["film"]\nequal = { detectors = ["eiger", "merlin"], "scan.n" = 2 }'
    preset = Preset.load(written(tmp_path, "", match=match))
    document = {"film": "SRO", "detectors": ["xs", "merlin"], "scan": {"n": 2}}
    assert preset.mismatch(document) == ""
    for change, words in (
        ({"film": None}, "start['film'] is missing"),
        ({"detectors": ["xs"]}, "start['detectors'] = ['xs'], expected 'eiger' or 'merlin'"),
        ({"scan": {}}, "start['scan']['n'] = None, expected 2"),
        ({"original_run_uid": "raw"}, "a derived run"),
    ):
        assert words in preset.mismatch(document | change)


def test_the_presets_of_the_documentation_work(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "reference" / "presets.md").read_text("utf-8")
    layout, example = re.findall(r"```toml\n(.+?)```", page, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(layout)
    document = {
        "plan_name": "fly2d",
        "sample": {"film": "SRO"},
        "scan": {"type": "STEP", "shape": [4, 3], "detectors": ["xs", "eiger4"], "energy": 9.0},
    }
    preset = Preset.load(path)
    assert preset.matches(document)
    assert preset.scan_metadata(document).shape == (3, 4)
    values = preset.geometry_values(document, baseline={"theta": 15300.0, "det_z": 0.5})
    angle = pytest.approx(0.1)
    assert values == {
        "energy_keV": 9.0,
        "detector_distance_m": 0.5,
        "delta_theta_deg": angle,
        "thickness_nm": 11.7,
        "pixel_size_um": 75,
    }

    path.write_text(example)
    grid = {"n": [40, 30], "x": [-2.0, 2.0], "y": [-1.5, 1.5]}
    document = {"plan_name": "raster", "grid": grid, "beam": {"energy": 11300}}
    preset = Preset.load(path)
    assert preset.matches(document)
    scan = preset.scan_metadata(document)
    assert (scan.shape, scan.snaking, scan.motors) == ((30, 40), True, ("sample_y", "sample_x"))
    assert scan.extents == ((-1.5, 1.5), (-2.0, 2.0))
    geometry = preset.read_geometry(document, baseline={"det_z": {"value": 850.0, "units": "mm"}})
    expected = Geometry.published()
    assert geometry.bragg_angle_deg == expected.bragg_angle_deg
    assert geometry.pupil_px == pytest.approx(expected.pupil_px, rel=1e-3)
    assert geometry.roi == expected.roi


def test_a_file_is_read_anew_each_time(tmp_path):
    path = written(tmp_path, 'description = "old"')
    assert Preset.load(path).description == "old"
    written(tmp_path, 'description = "new"')
    assert Preset.load(path).description == "new"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[match", "TOML|Expected"),
        ("[match]\n[scan]\nshape=1\n[geometry]\nenergy = 1", "unknown field.*energy"),
        ("[match]\n[scan]\nshape='starts:x'\n[geometry]", "starts:x.*begins with start:, baseline"),
        ("[match]\n[scan]\nshape='start:x[a]'\n[geometry]", "items of a list as"),
        ("[match]\n[scan]\nshape=1\n[geometry]\nthickness_nm={from='start:t', unit='m'}", "unit b"),
        ("[match]\n[scan]\nshape=1\n[geometry]\nthickness_nm={from=3}", "from = 3: expected a sou"),
        ("[match]\n[scan]\nshape=1\n[geometry]\n[detectors.a]\npixel = 1", "unknown field.*pixel"),
    ],
)
def test_a_wrong_preset_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(GeometryError, match=f"(?s)mine.toml.*({words})"):
        Preset.load(tmp_path / "mine.toml")


def test_an_unknown_preset_lists_the_shipped_ones(tmp_path):
    shipped = "default, grid-scan, hxn, ophyd-async, srx"
    with pytest.raises(GeometryError, match=f"shipped are {shipped}"):
        Preset.load("nowhere")
    with pytest.raises(GeometryError, match="directory"):
        Preset.load(tmp_path)
