"""What a worker of an engine does: the work of one task."""

from contextlib import closing

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import SfPipelinesError
from sf_pipelines.snapshot.run.build import Build, Stopwatch
from sf_pipelines.snapshot.run.tasks import Fault, Outcome, Task, peak_bytes, worker_name
from sf_pipelines.snapshot.stages.route import route_range
from sf_pipelines.snapshot.stages.shard import build_shard


def run_task(config: WriteConfig, task: Task) -> Outcome:
    """Does the work of a task; a typed error becomes part of the outcome."""
    watch = Stopwatch()
    receipt, fault = None, None
    try:
        # The driver decides what an error means for the build: the task may be tried again.
        with closing(Build(config)) as build:
            if task.stage == "route_range":
                receipt = route_range(build, task.run_id, task.number)
            else:
                receipt = build_shard(build, task.run_id, task.number, rebuild=task.rebuild)
    except SfPipelinesError as error:
        fault = Fault(kind=error.kind, message=str(error))
    return Outcome(receipt=receipt, fault=fault, seconds=watch.seconds, peak_bytes=peak_bytes(), worker=worker_name())
