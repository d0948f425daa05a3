"""Format checker: exact distances in the declared metric, and what a search must answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sf_pipelines_tests.format_checker.report import Duty, Findings

# Rows that a reader asks each shard for by default.
TOP_K = 10
# Part of the true nearest rows that an approximate index must find for the rows that it holds.
_MIN_RECALL = 0.8


@dataclass(frozen=True)
class Scores:
    """How a kind of index scores.

    Attributes:
        of: turns exact distances (cosine 1 - cos, squared L2, 1 - x·y) into its scale.
        tolerance: that its scores keep to, relative to the distances and to the length of the vectors.
        finds_itself: whether each stored vector must be among its own nearest rows.
        name: of the scale, for messages.
        any_length: whether queries may be longer than the stored vectors; 8-bit codes cut off what is out of range.
    """

    of: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    tolerance: float
    finds_itself: bool
    name: str
    any_length: bool = True


def exact_distances(query: NDArray[Any], vectors: NDArray[Any], metric: str) -> NDArray[np.float64]:
    """Distances of one query to rows in float64; shape (rows,)."""
    q, rows = query.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return np.square(rows - q).sum(axis=1)
    products = rows @ q
    if metric == "cosine":
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(q)
        products = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return 1.0 - products


def sampled(rows: int, sample: int) -> list[int]:
    """Evenly spaced rows, first and last among them."""
    return np.unique(np.linspace(0, rows - 1, min(sample, rows)).astype(int)).tolist()


def check_search(
    findings: Findings,
    duty: Duty,
    where: str,
    vectors: NDArray[Any],
    metric: str,
    scores: Scores,
    sample: int,
    search: Callable[[NDArray[np.float32], int], tuple[list[int], NDArray[np.float64]]],
) -> None:
    """Asks for stored vectors and for others twice as long, as a stock reader does, and judges the answers.

    Args:
        findings: collects faults.
        duty: that is looked at.
        where: the shard.
        vectors: all rows of the shard, shape (rows, dim).
        metric: declared.
        scores: what the index should answer in.
        sample: queries.
        search: gives row numbers and scores for a query and k.
    """
    k = min(TOP_K, len(vectors))
    recalls, lost = [], []
    for row in sampled(len(vectors), sample):
        # The longer one tells cosine from L2 where all rows have length 1.
        for factor in (1.0, 2.0) if scores.any_length else (1.0,):
            query = (vectors[row] * factor).astype(np.float32)
            rows, got = search(query, k)
            if not _answered(findings, duty, where, row, rows, got, k):
                return
            exact = exact_distances(query, vectors, metric)
            base = 1.0 if metric == "cosine" else float(np.square(vectors.astype(np.float64)).sum(axis=1).mean())
            if not _in_scale(findings, duty, where, metric, scores, got, exact[rows], base * factor):
                return
            near = 1e-6 * base * factor + 1e-6
            recalls.append(float((exact[rows] <= np.sort(exact)[k - 1] + near).mean()))
            # In dot_product longer rows may be nearer to a vector than it is itself.
            if factor == 1.0 and metric != "dot_product" and row not in rows and exact[rows].max() > exact[row] + near:
                lost.append(row)
    allowed = 0 if scores.finds_itself else len(recalls) // 10
    findings.expect(duty, len(lost) <= allowed, f"{where}: a search for the stored vectors of rows {lost} misses them")
    recall = float(np.mean(recalls))
    findings.expect(
        duty, recall >= _MIN_RECALL, f"{where}: a search without options finds {recall:.2f} of the nearest rows"
    )


def _answered(
    findings: Findings, duty: Duty, where: str, row: int, rows: list[int], got: NDArray[np.float64], k: int
) -> bool:
    counted = findings.expect(
        duty, len(rows) == k, f"{where}: a search for the vector of row {row} finds {len(rows)} rows instead of {k}"
    )
    return counted and findings.expect(
        duty,
        bool(np.isfinite(got).all()),
        f"{where}: a search for the vector of row {row} gives distances that are no numbers: TypeError for all of it",
    )


def _in_scale(
    findings: Findings,
    duty: Duty,
    where: str,
    metric: str,
    scores: Scores,
    got: NDArray[np.float64],
    exact: NDArray[np.float64],
    base: float,
) -> bool:
    wanted = scores.of(exact)
    worst = float(np.max(np.abs(got - wanted) - scores.tolerance * (np.abs(wanted) + base)))
    return findings.expect(
        duty,
        worst <= 0,
        f"{where}: distances {np.round(got[:4], 4).tolist()} are not those of {metric} in the scale {scores.name}, "
        f"{np.round(wanted[:4], 4).tolist()}: the merge with other shards is wrong",
    )
