"""A small source and snapshots over it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines.orchestration import build_snapshot_defs
from sf_pipelines.snapshot.config import WriteConfig

ROWS = 400


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Parquet file of a few digits."""
    path = tmp_path / "source" / "digits.parquet"
    path.parent.mkdir()
    pq.write_table(digits_table().slice(0, ROWS), path)
    return path


def make_config(root: Path, **changes: Any) -> WriteConfig:
    """A snapshot ``tiny`` of three shards over the Parquet files below ``root/source``."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "source": str(root / "source" / "*.parquet"),
        "store": str(root / "snapshot"),
        "num_dbs": 3,
        "payload_cols": ["label"],
        "vector_spec": {"dim": 64, "vector_col": "pixels", "metric": "cosine"},
        "recall_gate": {"k": 5, "min_recall": 0.8, "query_rows": 200},
    }
    return WriteConfig(**{**fields, **changes})


@pytest.fixture
def config(source: Path, tmp_path: Path) -> WriteConfig:
    """The usual snapshot."""
    return make_config(tmp_path)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """A Dagster instance."""
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def run_job(config: WriteConfig, instance: dg.DagsterInstance, **options: Any) -> dg.ExecuteInProcessResult:
    """Everything in one run, as the job's launch button does."""
    job = build_snapshot_defs(config).resolve_job_def(f"build_{config.name}")
    return job.execute_in_process(instance=instance, raise_on_error=False, **options)


def launch(
    config: WriteConfig, instance: dg.DagsterInstance, *nouns: str, partition: str | None = None
) -> dg.ExecuteInProcessResult:
    """A run of some assets alone, as *Materialize selected* does."""
    defs = build_snapshot_defs(config)
    return dg.materialize(
        [*(defs.assets or ()), *(defs.asset_checks or ())],  # pyright: ignore[reportArgumentType]
        selection=[dg.AssetKey([config.name, noun]) for noun in nouns],
        resources=defs.resources,
        instance=instance,
        partition_key=partition,
        raise_on_error=False,
    )


def failures(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """Why each failed step failed."""
    found: dict[str, str] = {}
    for event in result.get_step_failure_events():
        data = event.step_failure_data
        found[event.step_key or ""] = (data.user_failure_data.description if data.user_failure_data else "") or str(
            data.error
        )
    return found
