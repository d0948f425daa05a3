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
from sf_pipelines.snapshot.errors import IntegrityError, ReceiptMissingError
from sf_pipelines.snapshot.store import Store

FOLDER = "staging/dagster"

Reference = dict[str, Any]


def reference_io_manager(resource: str) -> dg.IOManagerDefinition:
    """The IO manager of one snapshot.

    Args:
        resource: key of the snapshot's access object. Required by key and not nested, so that the object may itself
            require a resource of the deployment.
    """

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
        """Writes a reference; for several partitions one object each."""
        with surfaced():
            self._save(context, obj)

    def load_input(self, context: dg.InputContext) -> dict[str, Any]:
        """Reads a reference, or for a partitioned asset a dictionary of references, also where it is only one."""
        with surfaced():
            return self._load(context)

    def _save(self, context: dg.OutputContext, obj: Any) -> None:
        store, run = self.snapshot.open_store(), _run_folder(context.step_context.dagster_run)
        if not context.has_asset_key:
            _write(store, f"{run}/{_step_path(context)}", obj)
            return
        asset = _asset_path(context.asset_key)
        for part, value in _by_partition(context, obj).items():
            _write(store, f"{run}/{asset}{part}", value)
            _write(store, f"{FOLDER}/latest/{asset}{part}", value)

    def _load(self, context: dg.InputContext) -> dict[str, Any]:
        store, run = self.snapshot.open_store(), _run_folder(context.step_context.dagster_run)
        if not context.has_asset_key:
            if context.upstream_output is None:
                raise ReceiptMissingError(f"input {context.name!r} has no upstream step to take a reference from")
            return _read(store, f"{run}/{_step_path(context.upstream_output)}", what=f"input {context.name!r}")
        asset, shown = _asset_path(context.asset_key), context.asset_key.to_user_string()
        if not context.has_asset_partitions:
            return _first(store, run, asset, what=shown)
        return {
            key: _first(store, run, f"{asset}/{key}", what=f"{shown}, partition {key},")
            for key in sorted(context.asset_partition_keys)
        }


def keep_latest(store: Store, key: dg.AssetKey, value: Reference, partition: str | None = None) -> None:
    """Makes a reference the latest of an asset, for runs that start in the middle of the graph."""
    part = "" if partition is None else f"/{partition}"
    _write(store, f"{FOLDER}/latest/{_asset_path(key)}{part}", value)


def _by_partition(context: dg.OutputContext, obj: Any) -> dict[str, Any]:
    known = context.step_context.job_def.asset_layer.get(context.asset_key)
    if known.partitions_def is None:
        return {"": obj}
    if not context.has_asset_partitions:
        # A run that names no partitions makes all of them.
        return {f"/{key}": value for key, value in obj.items()}
    wanted = sorted(context.asset_partition_keys)
    if not isinstance(obj, dict) or sorted(obj) != wanted:
        found = ", ".join(sorted(obj)) if isinstance(obj, dict) else type(obj).__name__
        raise IntegrityError(
            f"{context.asset_key.to_user_string()} must give one reference for each partition of the run "
            f"({', '.join(wanted)}), but gave {found}"
        )
    return {f"/{key}": value for key, value in obj.items()}


def _run_folder(run: dg.DagsterRun) -> str:
    # A re-execution belongs to the first run: it goes on from the references that are there.
    return f"{FOLDER}/runs/{run.root_run_id or run.run_id}"


def _asset_path(key: dg.AssetKey) -> str:
    return "asset/" + "/".join(key.path)


def _step_path(context: dg.OutputContext) -> str:
    parts = [context.step_key, context.name, *([context.mapping_key] if context.mapping_key else [])]
    return "step/" + "/".join(re.sub(r"[^A-Za-z0-9_.=-]+", "_", part) for part in parts)


def _first(store: Store, run: str, path: str, *, what: str) -> Reference:
    own = store.find(f"{run}/{path}")
    return json.loads(own.data) if own is not None else _read(store, f"{FOLDER}/latest/{path}", what=what)


def _read(store: Store, path: str, *, what: str) -> Reference:
    found = store.find(path)
    if found is None:
        raise ReceiptMissingError(f"{what} was never materialized into {store.url}; materialize it first")
    return json.loads(found.data)


def _write(store: Store, path: str, value: Reference) -> None:
    store.put(path, json.dumps(value, sort_keys=True).encode(), content_type="application/json")
