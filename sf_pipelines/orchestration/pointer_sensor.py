"""The published snapshot as an asset that Dagster observes: an event whenever the current pointer moves.

Who moved it does not matter: a build of ours, a rollback, or another tool. The event log itself is what says which
moves were told already, so none is told twice, whatever becomes of the sensor's cursor.
"""

from typing import Any

import dagster as dg

from sf_pipelines.orchestration.conditions import freshness_of
from sf_pipelines.orchestration.graph import Graph
from sf_pipelines.orchestration.metadata import readable, served_metadata
from sf_pipelines.orchestration.options import PointerSensorOptions, sensor_status
from sf_pipelines.orchestration.resources import SnapshotAccess
from sf_pipelines.snapshot.errors import SnapshotNotFoundError
from sf_pipelines.snapshot.manifest.pointer import CURRENT, Pointer
from sf_pipelines.snapshot.manifest.publish import PointerView, read_pointer
from sf_pipelines.snapshot.reader.state import load_pointed
from sf_pipelines.snapshot.run.build import Build

_MOVE = "pointer_sha256"


def build_published_snapshot(graph: Graph) -> dg.AssetSpec:
    """The observed asset."""
    return dg.AssetSpec(
        **graph.described_settings("published_snapshot", {"json"}),
        deps=[graph.names.asset("current_pointer")],
        freshness_policy=freshness_of(graph.options.freshness),
        description="What readers are served. Nothing materializes it: an event is written whenever the current "
        "pointer moves, by whomever; hang on it what must follow a new snapshot.",
    )


def build_pointer_sensor(graph: Graph, options: PointerSensorOptions) -> dg.SensorDefinition:
    """The sensor that writes the asset's events."""
    names = graph.names

    @dg.sensor(
        name=names.pointer_sensor,
        minimum_interval_seconds=options.interval_seconds,
        default_status=sensor_status(options.default_status),
        required_resource_keys={names.resource},
        description=f"Writes an event on {names.published.to_user_string()} whenever the pointer moves.",
    )
    def pointer_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        access: SnapshotAccess = getattr(context.resources, names.resource)
        store = access.find_store()
        view = read_pointer(store) if store else PointerView(None, None)
        told = _last_event(context.instance, names.published)
        if store is None or view.pointer is None:
            if told is not None:
                raise SnapshotNotFoundError(
                    f"{access.config.store}/{CURRENT} is gone, but run {_value(told, 'run_id')!r} was published; "
                    "readers find nothing: publish again or roll back"
                )
            return dg.SensorResult(skip_reason=f"Nothing has been published under {access.config.store} yet.")
        if told is not None and _value(told, _MOVE) == view.fingerprint:
            return dg.SensorResult(
                skip_reason=f"The pointer has not moved: it still names {view.pointer.run_id}.", cursor=view.fingerprint
            )
        with access.build(context.log) as build:
            event = describe_move(names.published, build, view, view.pointer, told)
        return dg.SensorResult(asset_events=[event], cursor=view.fingerprint)

    return pointer_sensor


def tell_move(context: dg.OpExecutionContext | dg.AssetExecutionContext, graph: Graph, build: Build) -> None:
    """Writes the event of the pointer's move from the run that made it, unless it has been written.

    So the asset has its events while the sensor is off, too. Both ask the event log first.
    """
    if graph.options.pointer_sensor is None:
        return
    view, told = read_pointer(build.store), _last_event(context.instance, graph.names.published)
    if view.pointer is not None and (told is None or _value(told, _MOVE) != view.fingerprint):
        context.log_event(describe_move(graph.names.published, build, view, view.pointer, told))


def describe_move(
    key: dg.AssetKey, build: Build, view: PointerView, pointer: Pointer, told: dg.AssetMaterialization | None
) -> dg.AssetMaterialization:
    """The event of a move.

    Args:
        key: of the asset.
        build: the snapshot; nothing is built.
        view: the pointer as it was found.
        pointer: what it says.
        told: the event before.

    Raises:
        IntegrityError: the manifest that the pointer names is damaged; no reader can open it.
        ObjectMissingError: it is gone.
    """
    state, before = load_pointed(build.store, pointer), pointer.previous
    metadata: dict[str, Any] = {
        **served_metadata(build),
        "num_dbs": state.manifest.num_dbs,
        "kind": state.kind,
        "dagster/uri": pointer.manifest_ref,
        "run_id": pointer.run_id,
        "previous_run_id": before.run_id if before else _told_before(pointer, told),
        _MOVE: view.fingerprint,
    }
    if pointer.seq is not None:
        metadata["seq"] = pointer.seq
        last = _value(told, "seq") if told else None
        # Of moves that follow each other faster than the sensor looks, only the last can be described.
        metadata["moves"] = max(1, pointer.seq - last) if isinstance(last, int) else 1
    return dg.AssetMaterialization(
        key,
        description=f"The pointer names {pointer.run_id}.",
        metadata=readable(metadata),
        tags={"dagster/data_version": state.manifest_digest},
    )


def _last_event(instance: dg.DagsterInstance, key: dg.AssetKey) -> dg.AssetMaterialization | None:
    found = instance.get_latest_materialization_event(key)
    return found.asset_materialization if found else None


def _value(event: dg.AssetMaterialization, name: str) -> Any:
    found = event.metadata.get(name)
    return None if found is None else found.value


def _told_before(pointer: Pointer, told: dg.AssetMaterialization | None) -> str:
    """What was served before, where the pointer does not say."""
    if told is not None:
        return str(_value(told, "run_id"))
    return "(none)" if pointer.seq == 1 else "(unknown)"
