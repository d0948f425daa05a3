"""References between steps, kept as small JSON objects in the snapshot's own store.

What moves between assets is never data but a *reference*: a dictionary that names a build and a receipt. A reference
is written twice: below the Dagster run that made it, so that later steps of that run and its re-executions see their
own and nobody else's, and as the asset's latest, for runs that start in the middle of the graph.
"""

import json
import re
from typing import Any

import dagster as dg

from sf_pipelines.orchestration.resources import SnapshotAccess, surfaced
from sf_pipelines.snapshot.errors import ReceiptMissingError
from sf_pipelines.snapshot.store import Store

FOLDER = "staging/dagster"
_LATEST = f"{FOLDER}/latest"

Reference = dict[str, Any]


def reference_io_manager(resource: str) -> dg.IOManagerDefinition:
    """The IO manager of one snapshot; ``resource`` is the key of its ``SnapshotAccess``."""

    # Required by key and not nested: the access itself may require a resource of the deployment.
    @dg.io_manager(required_resource_keys={resource}, description="Keeps references in the snapshot's own store.")
    def references(context: dg.InitResourceContext) -> ReferenceIOManager:
        return ReferenceIOManager(getattr(context.resources, resource))

    return references


class ReferenceIOManager(dg.IOManager):
    """Stores and loads references; a partitioned asset is a dictionary from partition key to reference.

    Attributes:
        snapshot: the snapshot whose store is used.
    """

    def __init__(self, snapshot: SnapshotAccess) -> None:
        self.snapshot = snapshot

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Writes a reference; for a partitioned asset one object a partition."""
        with surfaced():
            store, run = self.snapshot.open_store(), _run_folder(context.step_context.dagster_run)
            if not context.has_asset_key:
                _write(store, f"{run}/{_step_path(context)}", obj)
                return
            key = context.asset_key
            is_partitioned = context.step_context.job_def.asset_layer.get(key).partitions_def is not None
            for partition, value in obj.items() if is_partitioned else [(None, obj)]:
                _write(store, f"{run}/{_asset_path(key, partition)}", value)
                keep_latest(store, key, value, partition)

    def load_input(self, context: dg.InputContext) -> dict[str, Any]:
        """Reads a reference, or for a partitioned asset a dictionary of references, also where it is only one."""
        with surfaced():
            store, run = self.snapshot.open_store(), _run_folder(context.step_context.dagster_run)
            if not context.has_asset_key:
                if context.upstream_output is None:
                    raise ReceiptMissingError(f"input {context.name!r} has no upstream step to take a reference from")
                return _read(store, run, _step_path(context.upstream_output), what=f"input {context.name!r}")
            key, shown = context.asset_key, context.asset_key.to_user_string()
            if not context.has_asset_partitions:
                return _read(store, run, _asset_path(key), what=shown)
            return {
                partition: _read(store, run, _asset_path(key, partition), what=f"{shown}, partition {partition},")
                for partition in sorted(context.asset_partition_keys)
            }


def keep_latest(store: Store, key: dg.AssetKey, value: Reference, partition: str | None = None) -> None:
    """Makes a reference the latest of an asset, for runs that start in the middle of the graph."""
    _write(store, f"{_LATEST}/{_asset_path(key, partition)}", value)


def _run_folder(run: dg.DagsterRun) -> str:
    # A re-execution belongs to the first run: it goes on from the references that are there.
    return f"{FOLDER}/runs/{run.root_run_id or run.run_id}"


def _asset_path(key: dg.AssetKey, partition: str | None = None) -> str:
    return "/".join(["asset", *key.path, *([] if partition is None else [partition])])


def _step_path(context: dg.OutputContext) -> str:
    parts = [context.step_key, context.name, *([context.mapping_key] if context.mapping_key else [])]
    return "step/" + "/".join(re.sub(r"[^A-Za-z0-9_.=-]+", "_", part) for part in parts)


def _read(store: Store, run: str, path: str, *, what: str) -> Reference:
    """The run's own reference; of an asset also the latest."""
    found = store.find(f"{run}/{path}")
    if found is None and path.startswith("asset/"):
        found = store.find(f"{_LATEST}/{path}")
    if found is None:
        raise ReceiptMissingError(f"{what} was never materialized into {store.url}; materialize it first")
    return json.loads(found.data)


def _write(store: Store, path: str, value: Reference) -> None:
    store.put(path, json.dumps(value, sort_keys=True).encode(), content_type="application/json")
