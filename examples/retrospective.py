"""Find stored scans, analyse those that nobody has analysed yet, and plot their maps.

nanobeam demo && python examples/retrospective.py nanobeam-demo
"""

import sys

from databroker.queries import Key

from nanobeam_bluesky import analyze
from nanobeam_bluesky.plots import plot_maps
from nanobeam_bluesky.retrospective import find_catalog

catalog = find_catalog(sys.argv[1])  # a folder, the address of a Tiled server, or a profile
scans = catalog["raw"].search(Key("plan_name") == "sxdm_fly")
for analysis in analyze(scans):
    print(*analysis, analysis.reason)
    if not analysis.failed:
        plot_maps(analysis.maps()).savefig(f"{analysis.raw_uid[:8]}.png")
