"""Ways to shard rows, by their vector or by other columns: one module each behind one protocol."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, pair_distances
from sf_pipelines.snapshot.routing.protocol import Routing, VectorRouting
from sf_pipelines.snapshot.sharding import (
    CelSharding,
    ClusterSharding,
    ExplicitSharding,
    HashSharding,
    LshSharding,
)

AnySharding = ClusterSharding | LshSharding | ExplicitSharding | CelSharding | HashSharding


@dataclass(frozen=True)
class Trained:
    """What a strategy learnt from the training sample.

    Attributes:
        matrix: float32, one row per centroid or hyperplane.
        figures: how well it fits the sample.
        kind: what the rows are.
    """

    matrix: Float32
    figures: dict[str, float | int]
    kind: Literal["centroids", "hyperplanes"]


@dataclass(frozen=True)
class Fit:
    """How well centroids or hyperplanes fit a sample.

    Attributes:
        balance: rows of the fullest shard over the mean of all: 1 is perfect.
        spread: mean distance of a vector to its centroid (l2: squared, else cosine); None for hyperplanes.
    """

    balance: float
    spread: float | None


def needs_training(sharding: AnySharding) -> bool:
    """Whether a strategy has centroids or hyperplanes."""
    return isinstance(sharding, ClusterSharding | LshSharding)


def train(sharding: AnySharding, sample: Float32, *, num_dbs: int, metric: DistanceMetric) -> Trained:
    """Learns centroids or hyperplanes.

    Args:
        sharding: strategy and its options.
        sample: float32, shape (n, dim).
        num_dbs: number of shards.
        metric: declared metric.

    Raises:
        ConfigError: the sample is too small, or the strategy learns nothing.
    """
    if isinstance(sharding, ClusterSharding):
        from sf_pipelines.snapshot.routing.cluster import train_centroids

        found = train_centroids(sample, num_dbs=num_dbs, metric=metric, seed=sharding.seed, max_iter=sharding.max_iter)
        figures = {"inertia": found.inertia, "distinct": found.distinct, "rounds": found.rounds}
        return Trained(found.centroids, figures, "centroids")
    if isinstance(sharding, LshSharding):
        from sf_pipelines.snapshot.routing.hyperplanes import train_hyperplanes

        planes = train_hyperplanes(sample, num_dbs=num_dbs, num_hash_bits=sharding.num_hash_bits, seed=sharding.seed)
        figures = {"balance": planes.balance, "empty": planes.empty, "num_hash_bits": len(planes.hyperplanes)}
        return Trained(planes.hyperplanes, figures, "hyperplanes")
    raise ConfigError(f"{sharding.strategy} sharding learns nothing from vectors")


def fit_of(sharding: AnySharding, matrix: Float32, sample: Float32, *, num_dbs: int, metric: DistanceMetric) -> Fit:
    """How well centroids or hyperplanes fit a sample, whatever they were trained on.

    Args:
        sharding: strategy and its options.
        matrix: what was trained, float32.
        sample: float32, shape (n, dim), n > 0.
        num_dbs: number of shards.
        metric: declared metric.
    """
    routing = _by_vector(sharding, num_dbs, metric, matrix)
    homes = routing.assign(sample)
    balance = float(np.bincount(homes, minlength=num_dbs).max()) * num_dbs / len(sample)
    if not isinstance(sharding, ClusterSharding):
        return Fit(balance, None)
    # Centroids of cosine and dot_product are directions; lengths say nothing of how well they fit.
    measure = DistanceMetric.L2 if metric is DistanceMetric.L2 else DistanceMetric.COSINE
    return Fit(balance, float(pair_distances(sample, matrix[homes], measure).mean()))


def routing_for(
    sharding: AnySharding, *, num_dbs: int, metric: DistanceMetric, matrix: Float32 | None = None
) -> Routing:
    """The routing of a snapshot.

    Args:
        sharding: strategy and its options.
        num_dbs: number of shards.
        metric: declared metric.
        matrix: what was trained, float32; only for cluster and lsh.

    Raises:
        ConfigError: the matrix is missing, or is not one centroid per shard; or a CEL expression does not compile.
    """
    if isinstance(sharding, ClusterSharding | LshSharding):
        return _by_vector(sharding, num_dbs, metric, matrix)
    if isinstance(sharding, ExplicitSharding):
        from sf_pipelines.snapshot.routing.explicit import ExplicitRouting

        return ExplicitRouting(num_dbs)
    if isinstance(sharding, HashSharding):
        from sf_pipelines.snapshot.routing.hash import HashRouting

        return HashRouting(num_dbs)
    from sf_pipelines.snapshot.routing.cel import CelRouting

    return CelRouting(sharding.cel_expr, sharding.cel_columns, num_dbs, sharding.routing_values)


def _by_vector(sharding: AnySharding, num_dbs: int, metric: DistanceMetric, matrix: Float32 | None) -> VectorRouting:
    if matrix is None or matrix.ndim != 2:
        shape = "missing" if matrix is None else f"of shape {matrix.shape}"
        raise ConfigError(f"{sharding.strategy} sharding needs a table of trained rows; it is {shape}")
    if isinstance(sharding, LshSharding):
        from sf_pipelines.snapshot.routing.lsh import LshRouting

        return LshRouting(matrix, num_dbs)
    from sf_pipelines.snapshot.routing.cluster import ClusterRouting

    if len(matrix) != num_dbs:
        raise ConfigError(f"{len(matrix)} centroids cannot route to num_dbs {num_dbs} shards: it takes one for each")
    return ClusterRouting(matrix, metric)
