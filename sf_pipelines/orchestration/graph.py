"""What the parts of one snapshot's graph share: configuration, options, names, and how stages are executed."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import dagster as dg

from sf_pipelines.orchestration.conditions import condition_of
from sf_pipelines.orchestration.names import SnapshotNames
from sf_pipelines.orchestration.options import MultiprocessExecutor, SnapshotOptions
from sf_pipelines.snapshot.config import BUILD_VERSION, WriteConfig

CODE_VERSION = str(BUILD_VERSION)

StageContext = dg.OpExecutionContext | dg.AssetExecutionContext | dg.AssetCheckExecutionContext

Done = TypeVar("Done")


class Execute(Protocol):
    """Called for each stage of a run, in the step's process."""

    def __call__(self, context: StageContext, stage: str, work: Callable[[], Done]) -> Done:
        """Does the work of a stage.

        Args:
            context: of the step.
            stage: ``scan``, ``sample``, ``train``, ``route``, ``build_shard``, ``assemble``, ``check`` or ``promote``.
            work: does it and returns the receipt (of ``build_shard`` those of its shards: one, or on an engine all of
                the run; of ``check`` the verdict).
        """
        ...


def execute_stage(context: StageContext, stage: str, work: Callable[[], Done]) -> Done:
    """The usual way: the work and nothing else."""
    del context, stage
    return work()


@dataclass(frozen=True)
class Graph:
    """One snapshot in Dagster.

    Attributes:
        config: the snapshot.
        options: how it sits in Dagster.
        names: of its parts.
        execute: does the work of a stage.
    """

    config: WriteConfig
    options: SnapshotOptions
    names: SnapshotNames
    execute: Execute

    @property
    def group(self) -> str:
        """Asset group."""
        return self.options.group or self.config.name

    def is_built_by(self, run: dg.DagsterRun) -> bool:
        """Whether a run is of one of the snapshot's build jobs, or has assets of the snapshot in any other way."""
        own = [*self.names.key_prefix, self.config.name]
        jobs = {self.names.job, self.names.operation("build_now")}
        return run.job_name in jobs or any(key.path[: len(own)] == own for key in run.asset_selection or ())

    @property
    def executor(self) -> dg.ExecutorDefinition | None:
        """How the steps of this snapshot's jobs are executed; None where the deployment says it."""
        chosen = self.options.executor
        if isinstance(chosen, dg.ExecutorDefinition):
            return chosen
        if chosen == "inherit":
            return None
        if chosen == "in_process":
            return dg.in_process_executor
        # Step processes are forked from one that has imported this, and start in a fraction of a second. What must not
        # be forked (LanceDB's and scikit-learn's threads) is imported only by the steps themselves.
        config: dict[str, Any] = {"start_method": {"forkserver": {"preload_modules": ["sf_pipelines.components"]}}}
        if isinstance(chosen, MultiprocessExecutor) and chosen.max_concurrent is not None:
            config["max_concurrent"] = chosen.max_concurrent
        return dg.multiprocess_executor.configured(config, name="multiprocess")

    def asset_settings(self, noun: str, kinds: set[str], stage: Callable[..., Any]) -> dict[str, Any]:
        """What all assets share, unpartitioned ones too: a single run can take the whole graph."""
        return {
            **self.described_settings(noun, kinds),
            "metadata": {"dagster/code_references": _code_reference(stage)},
            "code_version": CODE_VERSION,
            "backfill_policy": dg.BackfillPolicy.single_run(),
            "automation_condition": condition_of(noun) if self.options.automation else None,
        }

    def described_settings(self, noun: str, kinds: set[str]) -> dict[str, Any]:
        """What describes any asset, also one that Dagster only observes."""
        return {
            "key": self.names.asset(noun),
            "group_name": self.group,
            "owners": list(self.options.owners),
            "tags": self.options.tags,
            "kinds": kinds | set(self.options.kinds),
        }


@contextmanager
def beta_accepted() -> Iterator[None]:
    """What this package uses of Dagster's beta is for it to keep up with, and nothing that its users could change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        yield


def _code_reference(stage: Callable[..., Any]) -> dg.CodeReferencesMetadataValue:
    """Where the UI finds the function that does the work; dg adds the place in a component's YAML by itself."""
    code = inspect.unwrap(stage).__code__
    with beta_accepted():
        place = dg.LocalFileCodeReference(
            file_path=code.co_filename, line_number=code.co_firstlineno, label=f"stages.{stage.__name__}"
        )
        return dg.CodeReferencesMetadataValue(code_references=[place])
