"""What the parts of one snapshot are called in Dagster."""

from dataclasses import dataclass

import dagster as dg

from sf_pipelines.snapshot.config import WriteConfig


@dataclass(frozen=True)
class SnapshotNames:
    """Keys of one snapshot's assets, resources and job; all begin with the snapshot's name.

    Attributes:
        name: of the snapshot; also the name of its asset group.
        num_dbs: number of shards.
    """

    name: str
    num_dbs: int

    @classmethod
    def of(cls, config: WriteConfig) -> "SnapshotNames":
        """Names for a configuration."""
        return cls(config.name, config.num_dbs)

    def asset(self, noun: str) -> dg.AssetKey:
        """Key of one of the snapshot's assets."""
        return dg.AssetKey([self.name, noun])

    @property
    def job(self) -> str:
        """The job that does everything in one run."""
        return f"build_{self.name}"

    @property
    def resource(self) -> str:
        """Resource key of the snapshot's access object."""
        return f"{self.name}_snapshot"

    @property
    def io_manager(self) -> str:
        """Resource key of the IO manager that keeps references."""
        return f"{self.name}_references"

    @property
    def pool(self) -> str:
        """Concurrency pool of the steps that build shards."""
        return f"{self.name}_shards"

    @property
    def partitions(self) -> dg.StaticPartitionsDefinition:
        """One partition a shard, padded like the shard's directory."""
        return dg.StaticPartitionsDefinition([shard_partition(db_id) for db_id in range(self.num_dbs)])

    @property
    def range_tags(self) -> dict[str, str]:
        """Run tags that select every shard partition in a single run."""
        keys = self.partitions.get_partition_keys()
        return {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}


def shard_partition(db_id: int) -> str:
    """Partition key of a shard: ``00003``, as in the directory ``db=00003``."""
    return f"{db_id:05d}"
