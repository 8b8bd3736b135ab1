"""The parent's side of the worker process: an executor that survives its worker."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from nanobeam_bluesky.documents.pipeline import RunPipeline
from nanobeam_bluesky.documents.processing import (
    THREADS,
    AnalyzerChoice,
    Processed,
    Task,
)
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.worker import Arrays, Message, decode_processed, encode_task, receive, send

__all__ = ["WorkerClient"]

logger = logging.getLogger("nanobeam_bluesky")

TASK_ATTEMPTS = 3
"""A task that was in hand at so many deaths of the worker is given up."""
START_ATTEMPTS = 4
"""Deaths in a row without one answer, after which the worker is left alone."""
HUNG_SECONDS = 60.0
"""Without an answer for so long, a worker is taken for hung and ended."""
START_SECONDS = 300.0
"""How long it may take to import and compile."""
_TICKS = 20
"""In so many steps the time is counted, so that a suspended process does not count."""

NO_LOCKS = {"HDF5_USE_FILE_LOCKING": "FALSE"}
"""A file that HDF5 has locked to read cannot be opened by its writer again. All of a process must
agree on it, handlers included: hence not an argument."""


@dataclass
class _Run:
    pipeline: RunPipeline
    geometry: Geometry
    choice: AnalyzerChoice
    opened: bool = False
    hangs: int = 0
    """How often the worker has hung while it was to prepare for the run."""


class WorkerClient:
    """Executor that runs tasks in a worker process, and starts it again when it dies.

    Parameters
    ----------
    notify
        Called from a reader thread with whatever the worker says; the owner hands it
        to `answer` in the thread that drives the pipelines. All other methods are for
        that thread as well.
    """

    def __init__(self, notify: Callable[[Any], None]) -> None:
        self.restarts = 0
        self.ready = False
        """Whether the worker has imported and compiled what it needs."""
        self._notify = notify
        self._runs: dict[str, _Run] = {}
        self._tasks: dict[tuple[str, int], tuple[RunPipeline, Task]] = {}
        self._deaths: dict[tuple[str, int], int] = {}
        # in hand when the worker died: one of them may be why, so they go one at a time
        self._suspects: deque[tuple[str, int]] = deque()
        self._fruitless = 0
        # what the worker has and has not answered → tick; number 0 is the run's opening
        self._asked: dict[tuple[str, int], int] = {}
        self._tick = 0
        self._hung: set[tuple[str, int]] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._start()

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def waiting(self) -> int:
        """How many tasks it has not answered."""
        return len(self._tasks)

    # ----------------------------------------------------------------- Executor

    in_flight = THREADS + 1

    def open(self, pipeline: RunPipeline, geometry: Geometry, choice: AnalyzerChoice) -> None:
        """Have the worker prepare for a run."""
        self._runs[pipeline.key] = run = _Run(pipeline, geometry, choice)
        if self._process is None:
            self._fruitless = 0
            self._start()
        self._send_open(pipeline.key, run)

    def submit(self, pipeline: RunPipeline, task: Task) -> None:
        """Send a task."""
        self._tasks[pipeline.key, task.number] = (pipeline, task)
        if not self._suspects:
            self._send_task(task)

    def close(self, pipeline: RunPipeline) -> None:
        """Have the worker close the run's files."""
        self._runs.pop(pipeline.key, None)
        self._asked.pop((pipeline.key, 0), None)
        for key in [k for k in self._tasks if k[0] == pipeline.key]:
            del self._tasks[key]
            self._asked.pop(key, None)
        self._send({"kind": "close", "run": pipeline.key})
        self._go_on()

    # ------------------------------------------------------------------ answers

    def answer(self, item: tuple[subprocess.Popen[bytes], Message | None, Arrays]) -> None:
        """Take what the reader thread has notified."""
        process, message, arrays = item
        if process is not self._process:
            return  # the last words of a worker that was replaced
        if message is None:
            self._died()
            return
        if message["kind"] == "ready":  # no answer yet: what comes first may still end it
            self.ready = True
            self._asked = dict.fromkeys(self._asked, self._tick)
            return
        self._fruitless = 0
        self._asked.pop((message["run"], message.get("number", 0)), None)
        run = self._runs.get(message["run"])
        if run is None:
            return
        try:
            self._hand_over(run, message, arrays)
        except Exception as error:
            logger.exception("run %s: the analysis stopped", run.pipeline.start["uid"][:8])
            run.pipeline.fail(f"internal error: {type(error).__name__}: {error}")

    def _hand_over(self, run: _Run, message: Message, arrays: Arrays) -> None:
        if message["kind"] == "processed":
            key = (message["run"], message["number"])
            self._deaths.pop(key, None)
            _, task = self._tasks.pop(key, (None, None))
            if task is not None:
                self._go_on()
                run.pipeline.processed(decode_processed(message, arrays, task))
        elif message["kind"] == "refused":
            run.pipeline.fail(f"no analyzer: {message['reason']}")
        elif not run.opened:
            run.opened = True
            run.pipeline.opened(message["settings"])

    def shutdown(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        self.ready = False
        self._ended.set()
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # ---------------------------------------------------------------- internals

    def _start(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "nanobeam_bluesky.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | threads | NO_LOCKS,
                start_new_session=True,
            )
        except OSError as error:
            logger.error("the worker process could not be started: %s", error)
            self._process = None
            return
        self._process = process
        self._ended = ended = threading.Event()
        for name, target in (("reader", self._read), ("watch", self._watch)):
            threading.Thread(
                target=target, args=(process, ended), name=f"nanobeam-worker-{name}", daemon=True
            ).start()

    def _watch(self, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
        """End a worker that is hung; a thread of its own, as the others may wait for its pipes."""
        while not ended.wait(HUNG_SECONDS / _TICKS):
            self._tick += 1
            limit = _TICKS * (1 if self.ready else START_SECONDS / HUNG_SECONDS)
            hung = {key for key, tick in list(self._asked.items()) if self._tick - tick > limit}
            if hung:
                self._hung = hung
                process.kill()
                if not ended.wait(HUNG_SECONDS / _TICKS):  # not even that ends it: leave it
                    self._notify((process, None, []))
                return

    def _read(self, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
        assert process.stdout is not None
        with process.stdout as pipe:
            try:
                while (received := receive(pipe)) is not None:
                    self._notify((process, *received))
            except (OSError, ValueError):
                process.kill()
        self._notify((process, None, []))

    def _died(self) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._ended.set()
        self.ready = False
        code: int | str | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1)
        hung, self._hung = self._hung, set()
        if hung:
            code = f"no answer for {HUNG_SECONDS:g} s"
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process = None
        self._fruitless += 1
        alone = bool(self._suspects)
        self._suspects.clear()
        self._asked.clear()
        waiting = next(iter(self._tasks), None)
        self.restarts += 1
        logger.warning("the worker process ended with %s; starting it again", code)
        for overdue in hung:
            self._blame(overdue, alone)
        if waiting is not None and not hung:
            self._deaths[waiting] = self._deaths.get(waiting, 0) + 1
            if self._deaths[waiting] >= TASK_ATTEMPTS:
                self._give_up(waiting, f"the worker process ended {TASK_ATTEMPTS} times here")
        if self._fruitless >= START_ATTEMPTS:
            logger.error("the worker process ended %d times without an answer", self._fruitless)
        else:
            self._start()
        if self._process is None:
            self._fail_all()
            return
        for key, run in list(self._runs.items()):  # opening may end a run
            self._send_open(key, run)
        self._suspects = deque(self._tasks)
        for suspect in list(self._suspects)[:1]:
            self._send_task(self._tasks[suspect][1])

    def _blame(self, key: tuple[str, int], alone: bool) -> None:
        """Give up what the worker has hung on for the second time; a task is alone then."""
        reason = f"the worker process did not answer for {HUNG_SECONDS:g} s"
        run = self._runs.get(key[0])
        if key in self._tasks and alone:
            self._give_up(key, reason)
        elif run is not None and key[1] == 0:
            run.hangs += 1
            if run.hangs > 1:
                run.pipeline.fail(f"no analyzer: {reason}")

    def _go_on(self) -> None:
        """Send the next suspect if the one in hand is done with; after the last, all tasks."""
        if not self._suspects or self._suspects[0] in self._tasks:
            return
        while self._suspects and self._suspects[0] not in self._tasks:
            self._suspects.popleft()
        waiting = list(self._suspects)[:1] or list(self._tasks)
        for key in waiting:
            self._send_task(self._tasks[key][1])

    def _fail_all(self) -> None:
        for key in list(self._tasks):
            self._give_up(key, "there is no worker process")
        for run in list(self._runs.values()):
            if not run.opened:
                run.pipeline.fail("the worker process cannot be started; its log says why")

    def _give_up(self, key: tuple[str, int], reason: str) -> None:
        self._deaths.pop(key, None)
        self._asked.pop(key, None)
        pipeline, task = self._tasks.pop(key)
        self._go_on()
        pipeline.processed(Processed.failed(task, reason))

    def _send_open(self, key: str, run: _Run) -> None:
        self._asked[key, 0] = self._tick
        self._send(
            {
                "kind": "open",
                "run": key,
                "geometry": run.geometry.model_dump(mode="json", exclude_none=True),
                "choice": asdict(run.choice),
            }
        )
        if self._process is None:
            run.pipeline.fail("the worker process cannot be started; its log says why")

    def _send_task(self, task: Task) -> None:
        self._asked[task.run, task.number] = self._tick
        message, arrays = encode_task(task)
        self._send({"kind": "task"} | message, arrays)
        if self._process is None:
            self._give_up((task.run, task.number), "there is no worker process")

    def _send(self, message: Message, arrays: Arrays | None = None) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a dead worker: its reader notices
            send(self._process.stdin, message, arrays)
