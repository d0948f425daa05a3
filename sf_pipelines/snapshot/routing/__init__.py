"""Strategies that shard rows, by the vector or by other columns: one module each, behind one protocol."""

from dataclasses import dataclass

import numpy as np

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, pair_distances
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.cluster import ClusterRouting, train_centroids
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.routing.hyperplanes import train_hyperplanes
from sf_pipelines.snapshot.routing.lsh import LshRouting
from sf_pipelines.snapshot.routing.protocol import Routing, Trained, VectorRouting
from sf_pipelines.snapshot.sharding import (
    CelSharding,
    ClusterSharding,
    ExplicitSharding,
    HashSharding,
    LshSharding,
)

AnySharding = ClusterSharding | LshSharding | ExplicitSharding | CelSharding | HashSharding


@dataclass(frozen=True)
class Fit:
    """How well centroids or hyperplanes fit a sample.

    Attributes:
        balance: rows of the fullest shard over the mean of all shards; 1 is perfect.
        spread: mean distance of a vector to its centroid (l2: squared, else cosine); None for hyperplanes.
    """

    balance: float
    spread: float | None


def needs_training(sharding: AnySharding) -> bool:
    """Whether a strategy has centroids or hyperplanes."""
    return isinstance(sharding, ClusterSharding | LshSharding)


def train(sharding: AnySharding, sample: Float32, *, num_dbs: int, metric: DistanceMetric) -> Trained:
    """Learns centroids or hyperplanes from a sample of shape (n, dim).

    Raises:
        ConfigError: the sample is too small, or the strategy learns nothing.
    """
    if isinstance(sharding, ClusterSharding):
        return train_centroids(sample, num_dbs=num_dbs, metric=metric, seed=sharding.seed, max_iter=sharding.max_iter)
    if isinstance(sharding, LshSharding):
        return train_hyperplanes(sample, num_dbs=num_dbs, num_hash_bits=sharding.num_hash_bits, seed=sharding.seed)
    raise ConfigError(f"{sharding.strategy} sharding learns nothing from vectors")


def fit_of(sharding: AnySharding, matrix: Float32, sample: Float32, *, num_dbs: int, metric: DistanceMetric) -> Fit:
    """How well centroids or hyperplanes fit a sample of shape (n, dim), n > 0, whatever they were trained on."""
    shards = _by_vector(sharding, num_dbs, metric, matrix).assign(sample)
    balance = float(np.bincount(shards, minlength=num_dbs).max()) * num_dbs / len(sample)
    if not isinstance(sharding, ClusterSharding):
        return Fit(balance, None)
    # Centroids of cosine and dot_product are directions: their length says nothing about the fit.
    measure = DistanceMetric.L2 if metric is DistanceMetric.L2 else DistanceMetric.COSINE
    return Fit(balance, float(pair_distances(sample, matrix[shards], measure).mean()))


def routing_for(
    sharding: AnySharding, *, num_dbs: int, metric: DistanceMetric, matrix: Float32 | None = None
) -> Routing:
    """The routing of a snapshot; ``matrix`` is what cluster and lsh were trained to.

    Raises:
        ConfigError: the matrix is missing or has not one centroid per shard, or a CEL expression does not compile.
    """
    if isinstance(sharding, ExplicitSharding):
        return ExplicitRouting(num_dbs)
    if isinstance(sharding, HashSharding):
        return HashRouting(num_dbs)
    if isinstance(sharding, CelSharding):
        return CelRouting(sharding.cel_expr, sharding.cel_columns, num_dbs, sharding.routing_values)
    return _by_vector(sharding, num_dbs, metric, matrix)


def _by_vector(sharding: AnySharding, num_dbs: int, metric: DistanceMetric, matrix: Float32 | None) -> VectorRouting:
    if matrix is None or matrix.ndim != 2:
        shape = "missing" if matrix is None else f"of shape {matrix.shape}"
        raise ConfigError(f"{sharding.strategy} sharding needs a table of trained rows; it is {shape}")
    if isinstance(sharding, LshSharding):
        return LshRouting(matrix, num_dbs)
    if len(matrix) != num_dbs:
        raise ConfigError(f"{len(matrix)} centroids cannot route to num_dbs {num_dbs} shards: it takes one for each")
    return ClusterRouting(matrix, metric)
