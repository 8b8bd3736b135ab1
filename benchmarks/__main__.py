"""Run every benchmark, one after the other: ``python -m benchmarks [NAME ...]``."""

import sys
from importlib import import_module

NAMES = [
    "physics",
    "models",
    "accuracy",
    "envelope",
    "fly_scan",
    "raw_scan",
    "pipeline",
    "serving",
    "load",
    "ingestion",
    "stored",
    "combining",
    "soak",
]


def main() -> None:
    chosen = sys.argv[1:] or NAMES
    unknown = set(chosen) - set(NAMES)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    del sys.argv[1:]
    for name in chosen:
        print(f"\n=== {name}", flush=True)
        import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
