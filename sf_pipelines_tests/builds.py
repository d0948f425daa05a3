"""Builds that stop half-way."""

from pathlib import Path

from sf_pipelines import WriteConfig
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.run.build import Build


def routed(build: Build, *, force: bool = False) -> str:
    """Runs a build up to its routed rows; run id."""
    run_id = stages.scan(build, force=force).run_id
    for stage in (stages.sample, stages.train, stages.route):
        stage(build, run_id)
    return run_id


def assembled(config: WriteConfig, cache: Path, *, force: bool = False) -> tuple[Build, str]:
    """A build that only lacks its gate; close it."""
    build = Build(config, cache_dir=cache)
    run_id = routed(build, force=force)
    for db_id in range(config.shards):
        stages.build_shard(build, run_id, db_id)
    stages.assemble(build, run_id)
    return build, run_id
