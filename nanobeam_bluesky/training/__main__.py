"""Train and store the network of one geometry: ``python -m nanobeam_bluesky.training``.

The first line of standard input is the geometry (JSON). Where standard input ends, whoever
wanted the network has ended, and so does this process.
"""

from __future__ import annotations

import os
import sys
import threading

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import ModelStore
from nanobeam_bluesky.training import train


def _end_with_input() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock the interpreter wants at its end
    os._exit(1)


def main() -> None:
    """Train, and store in the user's folder."""
    geometry = Geometry.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        ModelStore().save(*train(geometry))
    except Exception as error:
        sys.exit(
            f"nanobeam: no network was trained for geometry {geometry.fingerprint()}: "
            f"{type(error).__name__}: {error}"
        )


if __name__ == "__main__":
    main()
