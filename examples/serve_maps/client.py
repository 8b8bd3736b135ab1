"""Look at the latest maps from any machine that reaches the server: needs Tiled alone.

nanobeam demo && nanobeam serve    # or: nanobeam serve --config examples/serve_maps/tiled.yml
python examples/serve_maps/client.py "http://127.0.0.1:8000?api_key=…"
"""

import sys

import numpy as np
from tiled.client import from_uri

if __name__ == "__main__":
    client = from_uri(sys.argv[1])
    run = client["maps"].values().last()
    maps = run.read()  # an xarray.Dataset; maps.strain.plot() draws one
    print(maps)

    at = np.nanargmax(np.abs(maps.strain.to_numpy()))
    row, col = np.unravel_index(at, maps.strain.shape)
    print(f"most strained at row {row}, column {col}: ε = {maps.strain.values[row, col]:.2e}")

    scan = client["scans"][maps.attrs["original_run_uid"]]
    print(f"its pattern has {scan['patterns'][int(row), int(col)].sum():.0f} counts")
    run["strain"].export("strain.png")
