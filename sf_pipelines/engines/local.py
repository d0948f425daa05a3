"""Processes of this machine: as many as asked for, each with one task at a time."""

import os
import threading
from concurrent.futures import Future
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue

from sf_pipelines.engines.base import run_task
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import EngineError, TaskCrashedError, WorkerLostError
from sf_pipelines.snapshot.run.tasks import Engine, Outcome, Task

_Work = tuple[WriteConfig, Task, "Future[Outcome]"]
# What libraries look at that would have a thread for each core in each process.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "LANCE_CPU_THREADS")


class LocalEngine(Engine):
    """Processes that are started when there is work for them, and kept for the next task.

    They are spawned, not forked: the libraries that read stores and indexes have threads, which a fork would lose. So a
    script that uses this engine needs the usual ``if __name__ == "__main__":``. They share the cores: their libraries
    have as many threads as there are cores for each process, unless variables such as ``OMP_NUM_THREADS`` say another
    number.

    Args:
        workers: processes; None is one for each core that this process may use.
    """

    name = "local"
    remote = True

    def __init__(self, workers: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        self.slots = workers or cores
        self._cores_each = max(1, cores // self.slots)
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._processes: set[BaseProcess] = set()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._attend, name=f"sf-pipelines-worker-{number}", daemon=True)
            for number in range(self.slots)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, config: WriteConfig, task: Task) -> "Future[Outcome]":
        if self._stopped:
            raise EngineError("the local engine was stopped; open another one")
        future: Future[Outcome] = Future()
        self._work.put((config, task, future))
        return future

    def stop(self) -> None:
        """Ends all processes; tasks that are not done are cancelled."""
        with self._lock:
            self._stopped = True
            running = list(self._processes)
        for process in running:
            process.kill()
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """The same: a process that has nothing to do has nothing to lose."""
        self.stop()

    def _attend(self) -> None:
        """What the thread of one process does: hands it tasks, and starts another one where it was lost."""
        worker: _Worker | None = None
        while (work := self._work.get()) is not None:
            config, task, future = work
            if self._stopped or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            worker = worker or self._start()
            if worker is None:
                future.set_exception(WorkerLostError(f"the local engine was stopped before {task.label}"))
                continue
            outcome = worker.run(config, task)
            if isinstance(outcome, WorkerLostError):
                self._forget(worker)
                worker = None
            if isinstance(outcome, Outcome):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
        if worker is not None:
            worker.end()
            self._forget(worker)

    def _start(self) -> "_Worker | None":
        with self._lock:
            # Whoever stops the engine ends the processes that it finds here.
            if self._stopped:
                return None
            worker = _Worker(self._cores_each)
            self._processes.add(worker.process)
            return worker

    def _forget(self, worker: "_Worker") -> None:
        with self._lock:
            self._processes.discard(worker.process)


class _Worker:
    """One process, and the pipe to it.

    Args:
        cores: that it is to use.
    """

    def __init__(self, cores: int) -> None:
        context = get_context("spawn")
        self._ours, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, cores), name="sf-pipelines-worker", daemon=True)
        self.process.start()
        theirs.close()

    def run(self, config: WriteConfig, task: Task) -> "Outcome | EngineError":
        """What became of a task; an error where the process was lost or the task crashed."""
        try:
            self._ours.send((config, task))
            answer: Outcome | str = self._ours.recv()
        except (EOFError, OSError):
            # The other end of the pipe is gone, and so is the process, or will be at once.
            self.process.join()
            return WorkerLostError(
                f"the process of {task.label} ended with exit code {self.process.exitcode} in the middle of it "
                "(-9 may mean that memory ran out)"
            )
        return answer if isinstance(answer, Outcome) else TaskCrashedError(f"{task.label} crashed:\n{answer}")

    def end(self) -> None:
        """Ends the process."""
        self._ours.close()
        self.process.join()


def _serve(pipe: "Connection", cores: int) -> None:
    """What a process does: one task after the other, until nobody wants any more."""
    import traceback

    _share_cores(cores)
    while True:
        try:
            config, task = pipe.recv()
        except EOFError:
            return
        try:
            answer: Outcome | str = run_task(config, task)
        except Exception:  # noqa: BLE001 - without an answer the driver would take the worker for lost, and try again
            answer = traceback.format_exc()
        pipe.send(answer)


def _share_cores(cores: int) -> None:
    """Limits the threads of libraries, also of those that are loaded already and have looked at their variables."""
    from threadpoolctl import threadpool_limits

    for name in THREAD_VARIABLES:
        os.environ.setdefault(name, str(cores))
    threadpool_limits(int(os.environ["OMP_NUM_THREADS"]))
