"""What the parts of one snapshot are called in Dagster."""

from collections.abc import Sequence
from dataclasses import dataclass

import dagster as dg

from sf_pipelines.orchestration.options import SnapshotOptions
from sf_pipelines.snapshot.config import WriteConfig

SNAPSHOT_TAG = "sf_pipelines/snapshot"
# Not the tag of builds: a queue that lets one build through at a time must not make a rollback wait.
OPERATED_TAG = "sf_pipelines/operates_on"
OPERATION_TAG = "sf_pipelines/operation"


@dataclass(frozen=True)
class SnapshotNames:
    """Names of one snapshot's assets, jobs, schedules, sensors and resources.

    Each holds the key prefix too: two snapshots of one name may share a code location.

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
        pool = chosen.pool or f"{_identifier((*prefix, config.name))}_shards"
        return cls(config.name, config.shard_count, prefix, pool)

    def asset(self, noun: str) -> dg.AssetKey:
        """Key of an asset: ``<prefix>/<name>/manifest``."""
        return dg.AssetKey([*self.key_prefix, self.name, noun])

    def asset_step(self, noun: str) -> str:
        """Step that materializes an asset."""
        return _identifier(self.asset(noun).path)

    @property
    def scope(self) -> str:
        """Prefix and name in letters, digits and underscores."""
        return _identifier((*self.key_prefix, self.name))

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
    def partitions(self) -> dg.StaticPartitionsDefinition | dg.DynamicPartitionsDefinition:
        """One partition a shard; known to the instance where builds choose their number."""
        if self.num_dbs is None:
            return dg.DynamicPartitionsDefinition(name=self.part("shards"))
        return dg.StaticPartitionsDefinition([shard_partition(db_id) for db_id in range(self.num_dbs)])

    def set_partitions(self, instance: dg.DagsterInstance, num_dbs: int) -> None:
        """Tells the instance how many shards a build has chosen; without effect where the configuration fixes it."""
        found = self.partitions
        if not isinstance(found, dg.DynamicPartitionsDefinition):
            return
        chosen = [shard_partition(db_id) for db_id in range(num_dbs)]
        known = found.get_partition_keys(dynamic_partitions_store=instance)
        for gone in set(known) - set(chosen):
            instance.delete_dynamic_partition(str(found.name), gone)
        instance.add_dynamic_partitions(str(found.name), [key for key in chosen if key not in known])

    @property
    def run_tags(self) -> dict[str, str]:
        """Tags of the runs that build this snapshot."""
        return {SNAPSHOT_TAG: self.name}


def _identifier(path: Sequence[str]) -> str:
    return "__".join(path).replace("-", "_")


def shard_partition(db_id: int) -> str:
    """Partition key of a shard: ``00003``, as in the directory ``db=00003``."""
    return f"{db_id:05d}"
