"""Libraries and networks made on a Dask cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.physics import simulate_library
from nanobeam_bluesky.training import train

if TYPE_CHECKING:
    from torch import nn

    from nanobeam_bluesky.models import Card

__all__ = ["connected", "library_on_cluster", "train_ensemble"]


@contextmanager
def connected(scheduler: Any) -> Iterator[Any]:
    """Give the client of a Dask cluster: `scheduler` itself, or one made for its address.

    Raises
    ------
    ConnectionError
        If there is no scheduler.
    """
    from distributed import Client

    if isinstance(scheduler, Client):
        yield scheduler
        return
    make: Any = Client
    try:
        client = make(scheduler, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Dask scheduler at {scheduler}: {error}") from error
    try:
        yield client
    finally:
        client.close()


def library_on_cluster(
    scheduler: Any,
    geometry: Geometry,
    strain: ArrayLike,
    omega: ArrayLike,
    chi: ArrayLike,
    **options: Any,
) -> NDArray[np.float32]:
    """Return what `physics.simulate_library` does; each worker simulates some of the strains.

    Parameters
    ----------
    scheduler
        Address of a Dask cluster, or its client.
    geometry, strain, omega, chi, options
        As for `simulate_library`, which uses all cores of this machine: a cluster pays from some
        10⁶ patterns on.

    Returns
    -------
    ndarray
        Patterns (n_strain, n_omega, n_chi, ny, nx), float32.
    """
    with connected(scheduler) as client:
        parts = [
            client.submit(simulate_library, geometry, [value], omega, chi, pure=False, **options)
            for value in np.atleast_1d(np.asarray(strain, float))
        ]
        return np.concatenate([part.result() for part in parts])


def train_ensemble(
    geometry: Geometry, seeds: Sequence[int], *, scheduler: Any = None, **options: Any
) -> list[tuple[nn.Module, Card]]:
    """Train networks that differ by their seed alone; the most accurate one first.

    Parameters
    ----------
    geometry
        Of all.
    seeds
        Of noise and initial weights.
    scheduler
        Address of a Dask cluster, or its client: a network a worker. Without, one after the
        other, each on all cores of this machine.
    options
        As for `training.train`.

    Returns
    -------
    list
        Networks and their cards; by the mean logarithm of error over Cramér–Rao bound, over
        parameters and counts, on patterns that they were not trained on.
    """
    if scheduler is None:
        trained = [train(geometry, seed=seed, **options) for seed in seeds]
    else:
        with connected(scheduler) as client:
            futures = [
                client.submit(train, geometry, seed=seed, pure=False, **options) for seed in seeds
            ]
            trained = client.gather(futures)
    return sorted(trained, key=lambda pair: _error(pair[1]))


def _error(card: Card) -> float:
    ratios = [level.rmse[k] / level.bound[k] for level in card.accuracy for k in level.rmse]
    return float(np.mean(np.log(ratios)))
