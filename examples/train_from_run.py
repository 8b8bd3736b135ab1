"""Train the network of a run's geometry, from its start document, and store it.

    python examples/train_from_run.py [start.json]

The same as ``nanobeam train --start start.json``.
"""

import json
import sys
from pathlib import Path

from nanobeam_bluesky import Geometry
from nanobeam_bluesky.training import train_and_store

if __name__ == "__main__":
    if len(sys.argv) > 1:
        start = json.loads(Path(sys.argv[1]).read_text())
    else:  # a film of another thickness than the shipped network knows
        block = Geometry.published().model_dump(mode="json", exclude_none=True)
        start = {"uid": "example", "nanobeam": block | {"thickness_nm": 20.0}}

    geometry = Geometry.from_start(start)
    card = train_and_store(geometry, seconds=60)
    for level in card.accuracy:
        print(f"{level.counts:8.0f} counts: RMSE {level.rmse}, bound {level.bound}")
    print(f"stored for geometry {card.fingerprint}: the next scan finds it")
