"""``build_snapshot``: the whole build without Dagster, here or on an engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sf_pipelines.engines.config import DeferredEngine, Spec, engine_spec
from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.run.build import Progress
from sf_pipelines.snapshot.run.tasks import Engine
from sf_pipelines.snapshot.stages.pipeline import BuildResult, run_build


def build_snapshot(
    config: WriteConfig,
    *,
    engine: Engine | Spec | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    force: bool = False,
    cache_dir: Path | None = None,
) -> BuildResult:
    """Builds, gates and publishes one snapshot; goes on with an unfinished build of the same source and config.

    Args:
        config: what to build.
        engine: where rows are routed and shards are built: None is this process; a mapping as in ``{"type": "dask",
            "address": "tcp://scheduler:8786"}`` opens an engine for this build; one that is open is used as it is.
        progress: told how far each stage is.
        force: build and publish again although nothing is new, taking nothing over from the current snapshot. What a
            rollback holds stays held until ``release``.
        cache_dir: folder for verified copies of shards in this process; None is the readers' default.

    Returns:
        What is published now, and whether this call published it.

    Raises:
        ConfigError: a field of the engine is wrong.
        MissingExtraError: the engine's library is not installed.
        TasksFailedError: ranges or shards failed on the engine; names each with its cause.
        SfPipelinesError: see its other subclasses; the previous snapshot keeps serving.
    """
    spec = engine_spec(engine) if isinstance(engine, Mapping) else engine
    if spec is None or not isinstance(spec, Spec):
        return run_build(config, engine=spec, progress=progress, force=force, cache_dir=cache_dir)
    with DeferredEngine(spec) as opened:
        return run_build(config, engine=opened, progress=progress, force=force, cache_dir=cache_dir)
