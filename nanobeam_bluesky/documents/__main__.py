"""Analyse the run in one file of documents: ``python -m nanobeam_bluesky.documents RUN DERIVED``.

The first line of standard input holds `derive`'s preset, root_map and roots (JSON). Where
standard input ends, whoever wanted the derived run has ended, and so does this process.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from nanobeam_bluesky.documents.replay import derive, read_documents, write_documents
from nanobeam_bluesky.documents.roots import Roots


def _end_with_input() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock the interpreter wants at its end
    os._exit(1)


def main() -> None:
    """Read one file, write the other; what goes wrong is the last line of standard error."""
    os.nice(10)
    raw, out = sys.argv[1:]
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    derived = list(
        derive(
            read_documents(raw),
            preset=settings["preset"],
            root_map=settings["root_map"],
            roots=Roots(settings["roots"]),
        )
    )
    if not derived:
        sys.exit(f"preset {settings['preset']!r} does not match the run")
    (_, start), (_, stop) = derived[0], derived[-1]
    if "shape" not in start:
        sys.exit(str(stop.get("reason")))
    write_documents(out, derived)


if __name__ == "__main__":
    main()
