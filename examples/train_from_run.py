"""Specialise the shipped network to a run's geometry, from its start document, and store it.

    python examples/train_from_run.py [--start start.json] [--seconds 30]

What ``nanobeam train --start start.json`` does, in Python.
"""

import argparse
import json
from pathlib import Path

from nanobeam_bluesky import Geometry
from nanobeam_bluesky.models import ModelStore
from nanobeam_bluesky.training import train

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--start", type=Path)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    if options.start is not None:
        start = json.loads(options.start.read_text())
    else:  # a film of another thickness than the published one
        block = Geometry.published().model_dump(mode="json", exclude_none=True)
        start = {"uid": "example", "nanobeam": block | {"thickness_nm": 20.0}}

    geometry = Geometry.from_start(start)
    network, card = train(geometry, seconds=options.seconds)
    ModelStore().save(network, card)
    for level in card.accuracy:
        print(f"{level.counts:8.0f} counts: RMSE {level.rmse}, bound {level.bound}")
    print(f"stored for geometry {card.fingerprint}: the next scan finds it")
