"""The recall gate as checks on ``manifest``."""

from collections.abc import Collection, Iterator
from functools import partial

import dagster as dg

from sf_pipelines.orchestration.graph import Graph
from sf_pipelines.orchestration.io_manager import Reference
from sf_pipelines.orchestration.metadata import verdict_metadata
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import GateFailedError
from sf_pipelines.snapshot.gate.verdicts import CHECKS, required_checks
from sf_pipelines.snapshot.run.build import Build

_DESCRIPTIONS = {
    "manifest_custom_fields": "The fields that readers need are there and agree with the configuration and the files.",
    "shard_coverage": "Every row is in exactly one shard: counts and digests add up, in the stored objects too.",
    "search_round_trip": "Rows of every shard are found again, through the real reader, on the staged manifest.",
    "recall": "Measured on queries that did not choose num_probes; the lower confidence bound must reach min_recall.",
    "shard_balance": "Largest shard over mean shard.",
    "drift": "How the new snapshot differs from the one that is served: answers, rows, routing.",
    "recall_spread": "Recall of the queries that lie in each shard: a good mean may hide a bad shard.",
    "rows_reachable": "Sampled rows of every shard are found by their own vector, through the index.",
    "stock_recall": "What a stock reader with its default settings would find.",
}


def build_checks(graph: Graph) -> dg.AssetChecksDefinition:
    """All checks as one definition; each can be executed alone. Those that the gate requires block the pointer."""
    manifest, required = graph.asset("manifest"), required_checks(Build(graph.config))
    specs = [
        dg.AssetCheckSpec(name, asset=manifest, blocking=name in required, description=_DESCRIPTIONS[name])
        for name in CHECKS
    ]

    @dg.multi_asset_check(
        name=graph.part("gate"),
        specs=specs,
        can_subset=True,
        ins={"manifest": manifest},
        required_resource_keys={graph.resource},
    )
    def gate(context: dg.AssetCheckExecutionContext, manifest: Reference) -> Iterator[dg.AssetCheckResult]:
        selected = {key.name for key in context.selected_asset_check_keys}
        with graph.build(context) as build:
            yield from run_checks(context, graph, build, manifest["run_id"], selected)

    return gate


def run_checks(
    context: dg.OpExecutionContext | dg.AssetCheckExecutionContext,
    graph: Graph,
    build: Build,
    run_id: str,
    selected: Collection[str] = CHECKS,
) -> Iterator[dg.AssetCheckResult]:
    """Runs checks on a run's staged manifest, in their order."""
    failed: list[str] = []
    for name in (name for name in CHECKS if name in selected):
        verdict = graph.execute(context, "check", partial(stages.check, build, run_id, name))
        log = context.log.info if verdict.passed else context.log.warning
        log("%s: %s", name, verdict.reason or verdict.message)
        if verdict.severity == "ERROR" and not verdict.passed:
            failed.append(f"{name}: {verdict.message}")
        yield dg.AssetCheckResult(
            passed=verdict.passed,
            asset_key=graph.asset("manifest"),
            check_name=name,
            severity=dg.AssetCheckSeverity[verdict.severity],
            metadata=verdict_metadata(verdict),
            description=verdict.message,
        )
    if failed:
        # The pointer waits for these checks: no later step could report this.
        error = GateFailedError(" ".join(failed))
        build.give_up(error)
        raise error
