"""What the parts of one snapshot are called in Dagster."""

from collections.abc import Sequence
from dataclasses import dataclass

import dagster as dg

from sf_pipelines.orchestration.options import SnapshotOptions
from sf_pipelines.snapshot.config import WriteConfig

SNAPSHOT_TAG = "sf_pipelines/snapshot"
# Other than the tag of builds: a queue that lets one build at a time through must not make a rollback wait for it.
OPERATED_TAG = "sf_pipelines/operates_on"
OPERATION_TAG = "sf_pipelines/operation"


@dataclass(frozen=True)
class SnapshotNames:
    """Keys of one snapshot's assets, resources, job, schedule and sensors; all hold the snapshot's name.

    Two snapshots of one name may share a code location under two prefixes, so all of these hold the prefix, too.

    Attributes:
        name: of the snapshot.
        num_dbs: number of shards; None where each build chooses it.
        key_prefix: before the name in asset keys.
        pool: concurrency pool of the steps that build shards.
    """

    name: str
    num_dbs: int | None
    key_prefix: tuple[str, ...]
    pool: str

    @classmethod
    def of(cls, config: WriteConfig, options: SnapshotOptions | None = None) -> "SnapshotNames":
        """Names for a configuration."""
        chosen = options or SnapshotOptions()
        prefix = tuple(chosen.key_prefix.split("/")) if chosen.key_prefix else ()
        scope = _identifier((*prefix, config.name))
        return cls(config.name, config.shard_count, prefix, chosen.pool or f"{scope}_shards")

    def asset(self, noun: str) -> dg.AssetKey:
        """Key of one of the snapshot's assets."""
        return dg.AssetKey([*self.key_prefix, self.name, noun])

    def step(self, noun: str) -> str:
        """Name of the step that materializes an asset."""
        return _identifier(self.asset(noun).path)

    @property
    def scope(self) -> str:
        """The name with its prefix, for what Dagster names by letters, digits and underscores."""
        return _identifier((*self.key_prefix, self.name))

    @property
    def published(self) -> dg.AssetKey:
        """Key of the observed asset that stands for what readers are served."""
        return self.asset("published_snapshot")

    @property
    def job(self) -> str:
        """The job that does everything in one run."""
        return f"build_{self.scope}"

    def operation(self, noun: str) -> str:
        """The job of an operation: ``rollback_<name>``."""
        return f"{noun}_{self.scope}"

    def operation_step(self, noun: str) -> str:
        """The one step of that job."""
        return f"{self.scope}_{noun}"

    @property
    def cleanup_schedule(self) -> str:
        """Cleanups by the clock."""
        return f"{self.scope}_cleanup_schedule"

    @property
    def schedule(self) -> str:
        """Rebuilds by the clock."""
        return f"{self.scope}_schedule"

    @property
    def source_sensor(self) -> str:
        """Rebuilds when the source changes."""
        return f"{self.scope}_source_sensor"

    @property
    def pointer_sensor(self) -> str:
        """Tells when the current pointer moves."""
        return f"{self.scope}_pointer_sensor"

    @property
    def automation_sensor(self) -> str:
        """Looks at the declarative conditions."""
        return f"{self.scope}_automation_sensor"

    @property
    def resource(self) -> str:
        """Resource key of the snapshot's access object."""
        return f"{self.scope}_snapshot"

    @property
    def io_manager(self) -> str:
        """Resource key of the IO manager that keeps references."""
        return f"{self.scope}_references"

    @property
    def partitions(self) -> dg.StaticPartitionsDefinition | dg.DynamicPartitionsDefinition:
        """One partition a shard, padded like the shard's directory; known to the instance where builds choose them."""
        if self.num_dbs is None:
            return dg.DynamicPartitionsDefinition(name=f"{self.scope}_shards")
        return dg.StaticPartitionsDefinition([shard_partition(db_id) for db_id in range(self.num_dbs)])

    def tell_shards(self, instance: dg.DagsterInstance, num_dbs: int) -> None:
        """Tells the instance which shards a build has chosen; without effect where the configuration says them."""
        found = self.partitions
        if not isinstance(found, dg.DynamicPartitionsDefinition):
            return
        wanted = [shard_partition(db_id) for db_id in range(num_dbs)]
        known = found.get_partition_keys(dynamic_partitions_store=instance)
        for gone in set(known) - set(wanted):
            instance.delete_dynamic_partition(str(found.name), gone)
        instance.add_dynamic_partitions(str(found.name), [key for key in wanted if key not in known])

    @property
    def run_tags(self) -> dict[str, str]:
        """Run tags that say which snapshot it is. A run that names no partitions builds all shards."""
        return {SNAPSHOT_TAG: self.name}


def _identifier(path: Sequence[str]) -> str:
    return "__".join(path).replace("-", "_")


def shard_partition(db_id: int) -> str:
    """Partition key of a shard: ``00003``, as in the directory ``db=00003``."""
    return f"{db_id:05d}"
