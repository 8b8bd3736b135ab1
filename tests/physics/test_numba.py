import numpy as np
import pytest

from nanobeam_bluesky.physics._numba import in_threads, kernel


def test_kernel_compiles_where_nothing_can_be_cached(monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    namespace = {}
    exec("def double(x):\n    return 2 * x", namespace)  # no file, so no place for a cache
    assert kernel(namespace["double"])(21) == 42


def test_threads_cover_every_index_once():
    for n in (0, 1, 63, 64, 129, 1000, 4097):
        seen = np.zeros(n, int)

        def count(part, seen=seen):
            seen[part] += 1

        in_threads(count, n)
        assert (seen == 1).all()


def test_an_error_in_a_thread_is_raised():
    def fail(part):
        raise RuntimeError(f"{part.start}")

    for n in (10, 1000):
        with pytest.raises(RuntimeError, match=r"^0$"):
            in_threads(fail, n)
