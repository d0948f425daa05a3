"""The published snapshot as an asset that Dagster observes: an event whenever the current pointer moves.

It does not matter what moved it: a build, a rollback, another tool. The event log says which moves were reported
already, so none is reported twice, even when the sensor's cursor is lost.
"""

from typing import Any

import dagster as dg

from sf_pipelines.orchestration.graph import Graph, freshness_of
from sf_pipelines.orchestration.metadata import readable, served_metadata
from sf_pipelines.orchestration.options import SensorOptions
from sf_pipelines.snapshot.errors import SnapshotNotFoundError
from sf_pipelines.snapshot.manifest.pointer import CURRENT
from sf_pipelines.snapshot.manifest.publish import PointerView, read_pointer
from sf_pipelines.snapshot.reader.state import load_pointed
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.store import Store

_MOVE = "pointer_sha256"


def build_published_snapshot(graph: Graph) -> dg.AssetSpec:
    """The observed asset."""
    return dg.AssetSpec(
        **graph.described_settings("published_snapshot", {"json"}),
        deps=[graph.asset("current_pointer")],
        freshness_policy=freshness_of(graph.options.freshness),
        description="What readers are served. Nothing materializes it: an event is written whenever the current "
        "pointer moves; make assets that must follow a new snapshot depend on it.",
    )


def build_pointer_sensor(graph: Graph, options: SensorOptions) -> dg.SensorDefinition:
    """The sensor that writes the asset's events."""
    published = graph.asset("published_snapshot")

    @dg.sensor(
        name=graph.part("pointer_sensor"),
        minimum_interval_seconds=options.interval_seconds,
        default_status=options.dagster_status,
        required_resource_keys={graph.resource},
        description=f"Writes an event on {published.to_user_string()} whenever the pointer moves.",
    )
    def pointer_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        access = graph.access(context)
        store = access.find_store()
        view = read_pointer(store) if store else PointerView(None, None)
        if store is None or view.pointer is None:
            last = _last_event(context.instance, published)
            if last is not None:
                raise SnapshotNotFoundError(
                    f"{access.config.store}/{CURRENT} is gone, but run {_value(last, 'run_id')!r} was published; "
                    "readers find nothing: publish again or roll back"
                )
            return dg.SensorResult(skip_reason=f"Nothing has been published under {access.config.store} yet.")
        event = _new_move(context.instance, published, store, view)
        if event is None:
            reason = f"The pointer has not moved: it still names {view.pointer.run_id}."
            return dg.SensorResult(skip_reason=reason, cursor=view.fingerprint)
        return dg.SensorResult(asset_events=[event], cursor=view.fingerprint)

    return pointer_sensor


def report_move(context: dg.OpExecutionContext | dg.AssetExecutionContext, graph: Graph, build: Build) -> None:
    """Writes the event from the run that moved the pointer, unless it is there: the sensor may be off."""
    if graph.options.pointer_sensor is None:
        return
    published = graph.asset("published_snapshot")
    event = _new_move(context.instance, published, build.store, read_pointer(build.store))
    if event is not None:
        context.log_event(event)


def _new_move(
    instance: dg.DagsterInstance, key: dg.AssetKey, store: Store, view: PointerView
) -> dg.AssetMaterialization | None:
    """The event of a move that no event reports yet; raises where the pointer's manifest is damaged or gone."""
    pointer, last = view.pointer, _last_event(instance, key)
    if pointer is None or (last is not None and _value(last, _MOVE) == view.fingerprint):
        return None
    state, before = load_pointed(store, pointer), pointer.previous
    if before is not None:
        previous = before.run_id
    elif last is not None:
        previous = str(_value(last, "run_id"))
    else:
        previous = "(none)" if pointer.seq == 1 else "(unknown)"
    metadata: dict[str, Any] = {
        **served_metadata(store, pointer, state),
        "num_dbs": state.manifest.num_dbs,
        "kind": state.kind,
        "dagster/uri": pointer.manifest_ref,
        "run_id": pointer.run_id,
        "previous_run_id": previous,
        _MOVE: view.fingerprint,
    }
    if pointer.seq is not None:
        seen = _value(last, "seq") if last else None
        # Of several moves between two looks, only the last can be described.
        moves = max(1, pointer.seq - seen) if isinstance(seen, int) else 1
        metadata |= {"seq": pointer.seq, "moves": moves}
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
