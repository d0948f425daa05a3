"""The build as plain functions, in order: scan, sample, train, route, build_shard, assemble, gate, promote.

Each reads the receipts of the stages before it from the store and writes its own there; none hands over data. A stage
that finds its receipt for the same inputs does nothing and says so in ``reason``. So a build that was killed goes on
where it was, and the command line, Dagster and the engines run the very same code.
"""

from sf_pipelines.snapshot.gate.verdicts import CHECKS, check, gate
from sf_pipelines.snapshot.stages.assemble import assemble
from sf_pipelines.snapshot.stages.promote import promote
from sf_pipelines.snapshot.stages.route import route, route_range
from sf_pipelines.snapshot.stages.sample import sample
from sf_pipelines.snapshot.stages.scan import scan
from sf_pipelines.snapshot.stages.shard import build_shard, build_shards
from sf_pipelines.snapshot.stages.train import train

__all__ = [
    "CHECKS",
    "assemble",
    "build_shard",
    "build_shards",
    "check",
    "gate",
    "promote",
    "route",
    "route_range",
    "sample",
    "scan",
    "train",
]
