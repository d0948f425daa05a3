"""Declarative automation of one snapshot's assets, and how fresh they must be.

``eager`` alone asks for the manifest as soon as one shard is new, and for the pointer before the checks have run. So
an asset that is fed by others waits until none of these waits for something itself, and the pointer for the checks.
The source is read whole, whatever partitions its writers have: a partition that is missing keeps nothing waiting.
"""

from datetime import timedelta

import dagster as dg

from sf_pipelines.orchestration.options import FreshnessOptions


def condition_of(noun: str) -> dg.AutomationCondition:
    """When an asset is requested.

    Args:
        noun: of the asset.
    """
    eager = dg.AutomationCondition.eager()
    if noun == "source_vectors":
        there = ~dg.AutomationCondition.missing() | dg.AutomationCondition.will_be_requested()
        whole = eager.without(~dg.AutomationCondition.any_deps_missing())
        return whole & dg.AutomationCondition.all_deps_match(there.with_label("any_partition_there"))
    if noun not in {"manifest", "current_pointer"}:
        return eager
    stale = dg.AutomationCondition.any_deps_updated().since(dg.AutomationCondition.newly_updated())
    settled = eager & ~dg.AutomationCondition.any_deps_match(stale)
    return settled & dg.AutomationCondition.all_deps_blocking_checks_passed() if noun == "current_pointer" else settled


def freshness_of(options: FreshnessOptions | None) -> dg.FreshnessPolicy | None:
    """How old an asset's last materialization may get."""
    if options is None:
        return None
    warn = None if options.warn_hours is None else timedelta(hours=options.warn_hours)
    return dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=options.fail_hours), warn_window=warn)
