"""How far what routes has moved between two snapshots."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sf_pipelines.snapshot.metric import DistanceMetric, Float32, Float64, pair_distances
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.routing.protocol import VectorRouting

# Matching takes time by the cube of the number of centroids: about 10 s for so many.
_MOST_MATCHED = 4096


@dataclass(frozen=True)
class RoutingShift:
    """How far what routes has moved.

    Attributes:
        artifact: ``centroids``, matched one to one so that the sum of distances is smallest (the assignment problem;
            Kuhn, The Hungarian method, 1955), or ``hyperplanes``, bit by bit.
        measure: ``cosine`` (1 - cos) or ``euclidean``.
        mean: of the matched distances.
        largest: of them.
        pairs: earlier number, later number, distance; by the later number.
        unmatched: how many the larger side has left over.
    """

    artifact: str
    measure: str
    mean: float
    largest: float
    pairs: tuple[tuple[int, int, float], ...]
    unmatched: int


def routing_shift(old: SnapshotState, new: SnapshotState, notes: list[str]) -> RoutingShift | None:
    """How far centroids or hyperplanes have moved; None where nothing is trained or nothing can be matched.

    Args:
        old: one snapshot.
        new: the other.
        notes: where it is said why nothing was matched.
    """
    if not (isinstance(old.routing, VectorRouting) and isinstance(new.routing, VectorRouting)):
        return None
    one, other = old.routing.matrix, new.routing.matrix
    kinds = (old.routing.strategy, new.routing.strategy)
    if kinds[0] != kinds[1] or one.shape[1] != other.shape[1]:
        notes.append("routing: the strategies or the dimensions differ, so nothing can be matched")
        return None
    if kinds[0] == "lsh":
        bits = min(len(one), len(other))
        distances = pair_distances(one[:bits], other[:bits], DistanceMetric.COSINE)
        return _shift("hyperplanes", "cosine", np.arange(bits), np.arange(bits), distances, abs(len(one) - len(other)))
    if max(len(one), len(other)) > _MOST_MATCHED:
        notes.append(f"routing: more than {_MOST_MATCHED} centroids are not matched")
        return None
    from scipy.optimize import linear_sum_assignment

    cosine = new.metric is DistanceMetric.COSINE
    table = _distances(one, other, cosine=cosine)
    rows, columns = linear_sum_assignment(table)
    measure = "cosine" if cosine else "euclidean"
    return _shift("centroids", measure, rows, columns, table[rows, columns], abs(len(one) - len(other)))


def _shift(artifact: str, measure: str, old: Any, new: Any, distances: Float64, unmatched: int) -> RoutingShift:
    order = np.argsort(new, kind="stable")
    return RoutingShift(
        artifact=artifact,
        measure=measure,
        mean=float(distances.mean()),
        largest=float(distances.max()),
        pairs=tuple(zip(old[order].tolist(), new[order].tolist(), distances[order].tolist(), strict=True)),
        unmatched=unmatched,
    )


def _distances(one: Float32, other: Float32, *, cosine: bool) -> Float64:
    """Distance of every centroid of one side to every one of the other, shape (n, m)."""
    out = np.empty((len(one), len(other)))
    for row, centroid in enumerate(one):
        repeated = np.broadcast_to(centroid, other.shape)
        out[row] = pair_distances(repeated, other, DistanceMetric.COSINE if cosine else DistanceMetric.L2)
    return out if cosine else np.sqrt(out)
