"""The report says what a run is worth, and takes nothing from the metadata but text."""

import re

import numpy as np
import pytest

from nanobeam_bluesky.export import Report

EVIL = "<script>alert(1)</script> | <img src=x onerror=alert(1)> [a](javascript:b) $x$"


def test_report_says_what_was_measured_and_how_good_it_is(run):
    maps, start, stop = run()
    maps["strain"] = maps["strain"].copy(data=np.linspace(-1e-3, 1.2e-3, 24).reshape(4, 6))
    text = Report(maps, start, stop).markdown()
    for words in (
        "# Strain and tilts: film, scan 12 fly",
        "Complete: 22 of 24 points are good (91.7 %).",
        "| Photon energy | 11.3 keV |",
        "| Optics | zone plate, diameter 149 µm, focal length 21.874 mm",
        "| Points | 4 rows × 6 columns |",
        "sample\\_x: 0 to 0.5 um, step 0.1 um",
        "| few counts | 1 | 4.17 % |",
        "| frame missing | 1 | 4.17 % |",
        "| Strain ε | 0.1 × 10⁻³ | -0.89 × 10⁻³ to 1.09 × 10⁻³ |",
        "| Counts | 5012 counts |",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (None, "Still being analysed: so far 22 of 24"),
        ({"exit_status": "fail", "reason": "beam dump."}, "Not complete (fail): beam dump. 22 of"),
    ],
)
def test_report_says_how_the_run_ended(run, stop, words):
    maps, start, _ = run()
    assert words in Report(maps, start, stop).status


def test_metadata_stay_text_and_the_page_loads_and_runs_nothing(run):
    maps, start, _ = run(sample={EVIL: EVIL}, purpose=[EVIL, {"a": EVIL}], proposal=EVIL)
    start["nanobeam"]["analyzer"] = {EVIL: EVIL}
    start["nanobeam"]["geometry"] = {"optics": {EVIL: EVIL}, "roi_shape": EVIL, "energy_keV": [1]}
    start["original_run_uid"] = EVIL
    maps = maps.rename({"sample_x": EVIL})
    maps["strain"].attrs["units"] = maps["sample_y"].attrs["units"] = EVIL
    report = Report(maps, start, {"exit_status": EVIL, "reason": EVIL})
    page = report.html()
    tags = set(re.findall(r"<\s*([a-z0-9!]+)", page))
    known = "!doctype html head meta title style body h1 h2 p img table tr th td"
    assert tags <= set(known.split())
    assert page.count("<img") == 1
    assert "default-src 'none'" in page
    assert set(re.findall(r'(?:src|href)="(\w+):', page)) == {"data"}
    for line in report.markdown().splitlines():
        assert not re.search(r"(?<!\\)[<\[$]", line), line
        if EVIL[1:7] in line and line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 5), line


def test_run_without_metadata_or_any_good_point_has_a_report(run):
    maps = run()[0]
    maps["flags"] = maps["flags"] | 32
    for name in ("strain", "omega", "chi", "strain_sigma"):
        maps[name] = maps[name] * np.nan
    report = Report(maps, {"uid": "u", "nanobeam": None, "time": "?"})
    assert "0 of 24 points are good" in report.status
    assert "Strain ε" not in report.markdown()
