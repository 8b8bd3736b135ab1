"""Presets find what a geometry needs, convert its unit, and say where they looked."""

import pytest

from nanobeam_bluesky.geometry import ROI, Geometry, GeometryError
from nanobeam_bluesky.presets import MissingMetadataError, Preset


def start(*without, **changes):
    block = Geometry.published().model_dump(mode="json", exclude_none=True)
    for derived in ("wavelength_angstrom", "d_spacing_angstrom", *without):
        block.pop(derived)
    scan = {"shape": [3, 4], "snaking": [False, True], "motors": ["sy", "sx"]}
    return {"uid": "3f2a91c0-1", "nanobeam": block | changes, **scan}


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


def test_a_unit_of_another_dimension_is_refused():
    with pytest.raises(GeometryError, match="energy_keV: cannot turn 5 'm'"):
        Geometry.from_start(start(energy_keV={"value": 5, "units": "m"}))


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


def test_fast_slow_order_is_turned(tmp_path):
    text = '[match]\n[scan]\nshape = "start:shape"\norder = "fast-slow"\n[geometry]\n'
    (tmp_path / "mine.toml").write_text(text)
    assert Preset.load(tmp_path / "mine.toml").scan_metadata(start()).shape == (4, 3)


def test_a_preset_may_name_constants_and_other_places(tmp_path):
    (tmp_path / "mine.toml").write_text(
        '[match]\nplan_name = ["fly2d"]\n[scan]\nshape = "start:scan.shape"\n'
        '[geometry]\nenergy_keV = { from = "start:scan.energy", units = "eV" }\n'
        "thickness_nm = 12.5\n"
    )
    preset = Preset.load(str(tmp_path / "mine.toml"))
    document = {"uid": "1", "plan_name": "fly2d", "scan": {"energy": 9000, "shape": [2, 2]}}
    assert preset.geometry_values(document) == {"energy_keV": 9.0, "thickness_nm": 12.5}
    assert preset.matches(document)
    assert not preset.matches(document | {"plan_name": "count"})
    assert not preset.matches(document | {"original_run_uid": "raw"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[match", "TOML|Expected"),
        ("[match]\n[scan]\nshape=1\n[geometry]\nenergy = 1", "unknown field.*energy"),
    ],
)
def test_a_wrong_preset_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(GeometryError, match=f"(?s)mine.toml.*({words})"):
        Preset.load(tmp_path / "mine.toml")


def test_an_unknown_preset_lists_the_shipped_ones():
    with pytest.raises(GeometryError, match="shipped are default"):
        Preset.load("nowhere")
