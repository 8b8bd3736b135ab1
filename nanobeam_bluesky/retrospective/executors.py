"""Where stored runs are analysed: in threads of this process, in others, or on a Dask cluster."""

from __future__ import annotations

import ctypes
import os
import queue
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, Protocol

from nanobeam_bluesky.callbacks.worker_client import WorkerClient
from nanobeam_bluesky.documents import (
    AnalyzerChoice,
    Executor,
    Processed,
    Processor,
    RunPipeline,
    Task,
)
from nanobeam_bluesky.documents.pipeline import TASK_POINTS
from nanobeam_bluesky.documents.processing import THREADS
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.retrospective.cluster import connected

__all__ = ["Cluster", "Pool", "Threads", "Workers"]

_WAITING = 2048
"""Points for each core: some wait, as reading and writing Tiled keep their giver for 0.5 s."""
_CLUSTER_POINTS = 2048
"""Points of a task of a cluster, where each takes 9 ms of all processes, whatever its size."""
_COUNT_SECONDS = 5.0
"""How often a cluster is asked for its workers."""
_RESULT_SECONDS = 60.0
_RUNS_KEPT = 16
"""Runs whose analyzer and open files a process of a cluster keeps."""


class Pool(Executor, Protocol):
    """An executor whose answers are waited for."""

    @property
    def cores(self) -> int:
        """How many cores work."""

    @property
    def at_once(self) -> int:
        """How many runs it takes side by side."""

    @property
    def task_points(self) -> int:
        """Points of one task."""

    def wait(self, timeout: float) -> None:
        """Hand over the answers that there are; without any, those that come in `timeout` s."""

    def shutdown(self) -> None:
        """Release everything; what is in work is lost."""


class _Answers:
    """What threads of other parts have to say, said in the thread that waits for it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.put = self._queue.put

    def wait(self, timeout: float) -> None:
        with suppress(queue.Empty):
            self._queue.get(timeout=timeout)()
            while True:
                self._queue.get_nowait()()


class Threads:
    """Works in threads of this process."""

    task_points = TASK_POINTS
    in_flight = THREADS * _WAITING // TASK_POINTS
    at_once = 2
    cores = THREADS

    def __init__(self) -> None:
        import torch

        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # each of ours has its own batch
        _keep_memory()
        self._processor = Processor()
        self._answers = _Answers()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="nanobeam-analyze")

    def open(self, pipeline: RunPipeline, geometry: Geometry, choice: AnalyzerChoice) -> None:
        """Load the analyzer."""
        try:
            settings = self._processor.open(pipeline.key, geometry, choice)
        except Exception as error:
            pipeline.fail(f"no analyzer: {type(error).__name__}: {error}")
        else:
            pipeline.opened(settings)

    def submit(self, pipeline: RunPipeline, task: Task) -> None:
        """Work on a task."""

        def work() -> None:
            done = self._processor.process(task)
            self._answers.put(lambda: pipeline.processed(done))

        self._pool.submit(work)

    def close(self, pipeline: RunPipeline) -> None:
        """Close the run's files."""
        self._processor.close(pipeline.key)

    def wait(self, timeout: float) -> None:
        """Hand over answers."""
        self._answers.wait(timeout)

    def shutdown(self) -> None:
        """End the threads."""
        import torch

        self._pool.shutdown(cancel_futures=True)
        self._processor.shutdown()
        torch.set_num_threads(self._torch_threads)


class Workers:
    """Works in processes of this machine, which are started again when they die.

    Parameters
    ----------
    count
        How many; each works on up to `THREADS` tasks at once.
    """

    task_points = TASK_POINTS

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"workers = {count}: expected 1 or more")
        self._answers = _Answers()
        self._workers = [self._worker() for _ in range(count)]
        # few: one that has not answered a task for long is taken for hung
        self.in_flight = WorkerClient.in_flight * count
        self.at_once = count + 1
        self.cores = min(THREADS * count, os.cpu_count() or 1)

    def _worker(self) -> WorkerClient:
        def notify(item: Any) -> None:
            self._answers.put(lambda: worker.answer(item))

        worker = WorkerClient(notify)
        return worker

    def open(self, pipeline: RunPipeline, geometry: Geometry, choice: AnalyzerChoice) -> None:
        """Have every process prepare for a run."""
        for worker in self._workers:
            worker.open(pipeline, geometry, choice)

    def submit(self, pipeline: RunPipeline, task: Task) -> None:
        """Give a task to the process that has fewest."""
        min(self._workers, key=lambda w: w.waiting).submit(pipeline, task)

    def close(self, pipeline: RunPipeline) -> None:
        """Have the processes close the run's files."""
        for worker in self._workers:
            worker.close(pipeline)

    def wait(self, timeout: float) -> None:
        """Hand over answers."""
        self._answers.wait(timeout)

    def shutdown(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.shutdown()


class Cluster:
    """Works on a Dask cluster, which sends a task to another worker when one dies.

    Its workers need this package, the networks in their NANOBEAM_HOME, and the detector files
    under the same paths.

    Parameters
    ----------
    scheduler
        Its address, such as "tcp://127.0.0.1:8786", or a `distributed.Client`.

    Raises
    ------
    ConnectionError
        If there is none.
    """

    task_points = _CLUSTER_POINTS

    def __init__(self, scheduler: Any) -> None:
        self._stack = ExitStack()
        self._client = self._stack.enter_context(connected(scheduler))
        self._answers = _Answers()
        self._settings: dict[str, tuple[Geometry, AnalyzerChoice, Mapping[str, Any]]] = {}
        self._futures: dict[str, set[Any]] = {}
        self._cores, self._counted = 1, float("-inf")

    @property
    def cores(self) -> int:
        """Threads of all workers."""
        now = time.monotonic()
        if now > self._counted + _COUNT_SECONDS:  # the scheduler's answer takes 2 ms
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
            self._cores = max(1, sum(int(worker["nthreads"]) for worker in workers.values()))
            self._counted = now
        return self._cores

    @property
    def in_flight(self) -> int:
        """One waits for each that is worked on, so that no worker does."""
        return 2 * self.cores

    @property
    def at_once(self) -> int:
        """As many runs as can be worked on."""
        return 2 + self.cores

    def open(self, pipeline: RunPipeline, geometry: Geometry, choice: AnalyzerChoice) -> None:
        """Ask a worker which analyzer it has."""

        def opened(settings: Mapping[str, Any]) -> None:
            self._settings[pipeline.key] = geometry, choice, settings
            pipeline.opened(settings)

        self._futures.setdefault(pipeline.key, set())
        future = self._client.submit(_prepare, pipeline.key, geometry, choice, pure=False)
        self._follow(pipeline, future, opened)

    def submit(self, pipeline: RunPipeline, task: Task) -> None:
        """Send a task."""
        future = self._client.submit(
            _work, task, *self._settings[pipeline.key], pure=False, key=_name(pipeline, task)
        )
        self._follow(pipeline, future, pipeline.processed, task)

    def _follow(
        self,
        pipeline: RunPipeline,
        future: Any,
        take: Callable[[Any], None],
        task: Task | None = None,
    ) -> None:
        """Have the result taken; what no worker survives costs its task, all else the run."""
        from distributed import KilledWorker

        def answer() -> None:
            if pipeline.key not in self._futures:
                return
            self._futures[pipeline.key].discard(future)
            try:
                result = future.result(timeout=_RESULT_SECONDS)
            except (Exception, CancelledError) as error:
                reason = f"{type(error).__name__}: {error}"
                if task is None or not isinstance(error, KilledWorker):
                    pipeline.fail(reason)
                    return
                result = Processed.failed(task, reason)
            take(result)

        self._futures[pipeline.key].add(future)
        future.add_done_callback(lambda _: self._answers.put(answer))

    def close(self, pipeline: RunPipeline) -> None:
        """Forget what is not done."""
        for future in self._futures.pop(pipeline.key, ()):
            future.cancel()
        self._settings.pop(pipeline.key, None)

    def wait(self, timeout: float) -> None:
        """Hand over answers."""
        self._answers.wait(timeout)

    def shutdown(self) -> None:
        """Leave the cluster."""
        self._stack.close()


def _name(pipeline: RunPipeline, task: Task) -> str:
    """What Dask's dashboard shows."""
    return f"nanobeam-{pipeline.start['uid'][:8]}-{task.number}-{pipeline.key}"


# ------------------------------------------------------------------ in a worker of Dask

_processor: Processor | None = None
_opened: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
_lock = threading.Lock()


def _prepare(run: str, geometry: Geometry, choice: AnalyzerChoice) -> Mapping[str, Any]:
    """Return the settings of the analyzer, which is kept for the tasks of the run."""
    global _processor
    with _lock:
        if _processor is None:
            import numba
            import torch

            torch.set_num_threads(1)  # Dask counts on one for each of its own
            numba.config.NUMBA_NUM_THREADS = 1
            _keep_memory()
            _processor = Processor()
        if run not in _opened:
            _opened[run] = _processor.open(run, geometry, choice)
            while len(_opened) > _RUNS_KEPT:
                _processor.close(_opened.popitem(last=False)[0])
        _opened.move_to_end(run)
        return _opened[run]


def _keep_memory() -> None:
    """Have the arrays of a batch use the memory of the last one again.

    In threads glibc returns it to the system, which costs 3 % of an analysis; in a worker of Dask,
    whose nanny has it return all, 15 %.
    """
    with suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        for parameter, mebibytes in ((-1, 128), (-3, 32)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, mebibytes << 20)


def _work(
    task: Task, geometry: Geometry, choice: AnalyzerChoice, settings: Mapping[str, Any]
) -> Processed:
    """Read and analyse."""
    found = _prepare(task.run, geometry, choice)
    if found != settings:
        raise RuntimeError(
            f"{socket.gethostname()} has another network ({found}) than the first worker "
            f"({settings}): let their NANOBEAM_HOME be the same"
        )
    assert _processor is not None
    return _processor.process(task)
