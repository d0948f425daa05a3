"""What the parts of one snapshot share in Dagster: configuration, options, names, and how stages are executed."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import dagster as dg

from sf_pipelines.orchestration.options import FreshnessOptions, MultiprocessExecutor, SnapshotOptions
from sf_pipelines.orchestration.resources import SnapshotAccess, surfaced
from sf_pipelines.snapshot.config import BUILD_VERSION, WriteConfig
from sf_pipelines.snapshot.run.build import Build

SNAPSHOT_TAG = "sf_pipelines/snapshot"
# Not the tag of builds: a queue that lets one build through at a time must not make a rollback wait.
OPERATED_TAG = "sf_pipelines/operates_on"
OPERATION_TAG = "sf_pipelines/operation"

CODE_VERSION = str(BUILD_VERSION)
# Only errors that may pass are retried (see resources.surfaced).
RETRY = dg.RetryPolicy(max_retries=2, delay=2, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)

StageContext = dg.OpExecutionContext | dg.AssetExecutionContext | dg.AssetCheckExecutionContext

Done = TypeVar("Done")

# Called for each stage of a run, in the step's process: does the work and returns what it returns.
Execute = Callable[[StageContext, str, Callable[[], Any]], Any]


def execute_stage(context: StageContext, stage: str, work: Callable[[], Done]) -> Done:
    """The usual way: the work and nothing else."""
    del context, stage
    return work()


@dataclass(frozen=True)
class Graph:
    """One snapshot in Dagster.

    All names hold the key prefix too: two snapshots of one name may share a code location.

    Attributes:
        config: the snapshot.
        options: how it sits in Dagster.
        execute: does the work of a stage.
    """

    config: WriteConfig
    options: SnapshotOptions = field(default_factory=SnapshotOptions)
    execute: Execute = execute_stage

    @property
    def path(self) -> list[str]:
        """Key prefix and name."""
        prefix = self.options.key_prefix
        return [*(prefix.split("/") if prefix else []), self.config.name]

    @property
    def scope(self) -> str:
        """Key prefix and name in letters, digits and underscores."""
        return dg.AssetKey(self.path).to_python_identifier()

    def asset(self, noun: str) -> dg.AssetKey:
        """Key of an asset: ``<prefix>/<name>/manifest``."""
        return dg.AssetKey([*self.path, noun])

    def job(self, verb: str) -> str:
        """Job that builds or operates: ``build_<name>``, ``rollback_<name>``."""
        return f"{verb}_{self.scope}"

    def part(self, noun: str) -> str:
        """Op, schedule, sensor or resource: ``<name>_source_sensor``."""
        return f"{self.scope}_{noun}"

    @property
    def resource(self) -> str:
        """Key of the resource that gives access to the snapshot."""
        return self.part("snapshot")

    @property
    def io_manager(self) -> str:
        """Key of the IO manager that keeps references."""
        return self.part("references")

    @property
    def pool(self) -> str:
        """Concurrency pool of the steps that build shards."""
        return self.options.pool or self.part("shards")

    @property
    def run_tags(self) -> dict[str, str]:
        """Tags of the runs that build this snapshot."""
        return {SNAPSHOT_TAG: self.config.name}

    @property
    def partitions(self) -> dg.StaticPartitionsDefinition | dg.DynamicPartitionsDefinition:
        """One partition a shard; known to the instance where builds choose their number."""
        count = self.config.shard_count
        if count is None:
            return dg.DynamicPartitionsDefinition(name=self.part("shards"))
        return dg.StaticPartitionsDefinition([shard_partition(db_id) for db_id in range(count)])

    def set_partitions(self, instance: dg.DagsterInstance, num_dbs: int) -> None:
        """Tells the instance how many shards a build has chosen; without effect where the configuration fixes it."""
        if self.config.shard_count is not None:
            return
        name, chosen = self.part("shards"), [shard_partition(db_id) for db_id in range(num_dbs)]
        known = instance.get_dynamic_partitions(name)
        for gone in set(known) - set(chosen):
            instance.delete_dynamic_partition(name, gone)
        instance.add_dynamic_partitions(name, [key for key in chosen if key not in known])

    def access(self, context: Any) -> SnapshotAccess:
        """The snapshot's resource in the context of a step or a tick."""
        return getattr(context.resources, self.resource)

    @contextmanager
    def build(self, context: StageContext) -> Iterator[Build]:
        """The build that a step works on; a typed error in the block fails the step."""
        with surfaced(), self.access(context).build(context.log) as build:
            yield build

    def is_built_by(self, run: dg.DagsterRun) -> bool:
        """Whether a run is of a build job of the snapshot, or selects any of its assets."""
        own, jobs = self.path, {self.job("build"), self.job("build_now")}
        return run.job_name in jobs or any(key.path[: len(own)] == own for key in run.asset_selection or ())

    @property
    def executor(self) -> dg.ExecutorDefinition | None:
        """Executor of this snapshot's jobs; None takes the deployment's."""
        chosen = self.options.executor
        if isinstance(chosen, dg.ExecutorDefinition):
            return chosen
        if chosen == "inherit":
            return None
        if chosen == "in_process":
            return dg.in_process_executor
        # A fork of a process that has imported this starts in a fraction of a second. Libraries that must not be
        # forked (the threads of LanceDB and scikit-learn) are imported by the steps alone.
        config: dict[str, Any] = {"start_method": {"forkserver": {"preload_modules": ["sf_pipelines.components"]}}}
        if isinstance(chosen, MultiprocessExecutor) and chosen.max_concurrent is not None:
            config["max_concurrent"] = chosen.max_concurrent
        return dg.multiprocess_executor.configured(config, name="multiprocess")

    def asset_settings(self, noun: str, kinds: set[str], stage: Callable[..., Any]) -> dict[str, Any]:
        """Settings of every asset that is built."""
        code = inspect.unwrap(stage).__code__
        with beta_accepted():
            # Where the UI finds the function that does the work; dg adds the place in a component's YAML by itself.
            place = dg.LocalFileCodeReference(
                file_path=code.co_filename, line_number=code.co_firstlineno, label=f"stages.{stage.__name__}"
            )
            references = dg.CodeReferencesMetadataValue(code_references=[place])
        return {
            **self.described_settings(noun, kinds),
            "metadata": {"dagster/code_references": references},
            "code_version": CODE_VERSION,
            # A single run can take the whole graph.
            "backfill_policy": dg.BackfillPolicy.single_run(),
            "automation_condition": condition_of(noun) if self.options.automation else None,
        }

    def described_settings(self, noun: str, kinds: set[str]) -> dict[str, Any]:
        """Settings of any asset, also one that Dagster only observes."""
        return {
            "key": self.asset(noun),
            "group_name": self.options.group or self.config.name,
            "owners": list(self.options.owners),
            "tags": self.options.tags,
            "kinds": kinds | set(self.options.kinds),
        }


def shard_partition(db_id: int) -> str:
    """Partition key of a shard: ``00003``, as in the directory ``db=00003``."""
    return f"{db_id:05d}"


@contextmanager
def beta_accepted() -> Iterator[None]:
    """Hides Dagster's warnings of beta features that this package uses; its users could change nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        yield


def condition_of(noun: str) -> dg.AutomationCondition:
    """When declarative automation requests an asset.

    ``eager`` alone requests the manifest as soon as one shard is new, and the pointer before the checks have run. So
    an asset with several parents waits until none of these waits for something itself, and the pointer for the checks.
    Builds read the whole source, so a missing partition of a source asset does not block them.
    """
    eager = dg.AutomationCondition.eager()
    if noun == "source_vectors":
        there = ~dg.AutomationCondition.missing() | dg.AutomationCondition.will_be_requested()
        whole = eager.without(~dg.AutomationCondition.any_deps_missing())
        return whole & dg.AutomationCondition.all_deps_match(there.with_label("any_partition_there"))
    if noun not in {"manifest", "current_pointer"}:
        return eager
    stale = dg.AutomationCondition.any_deps_updated().since(dg.AutomationCondition.newly_updated())
    settled = eager & ~dg.AutomationCondition.any_deps_match(stale)
    return settled & dg.AutomationCondition.all_deps_blocking_checks_passed() if noun == "current_pointer" else settled


def freshness_of(options: FreshnessOptions | None) -> dg.FreshnessPolicy | None:
    """How old an asset's last materialization may get."""
    if options is None:
        return None
    warn = None if options.warn_hours is None else timedelta(hours=options.warn_hours)
    return dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=options.fail_hours), warn_window=warn)
