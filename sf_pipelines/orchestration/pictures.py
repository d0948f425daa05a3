"""Figures of a build as pictures that Dagster's UI shows beside the materialization."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np

from sf_pipelines.snapshot.projection import Projection
from sf_pipelines.snapshot.receipts import CurvePoint, RoutedShard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches at 90 dots: what fits into the UI's panel, at 10 to 40 KB a picture.
_SIZE = (6.4, 3.2)
_DPI = 90
# Bars and legends of more shards cannot be told apart.
_MOST_BARS = 200
_MOST_NAMES = 16


def shard_sizes(shards: Sequence[RoutedShard]) -> dg.MarkdownMetadataValue:
    """Rows of each shard beside their mean."""
    figure, axes = _figure("Rows of each shard")
    rows = np.array([shard.rows for shard in shards])
    if len(rows) > _MOST_BARS:
        rows = np.sort(rows)[::-1]
        axes.fill_between(np.arange(len(rows)), rows, step="mid", alpha=0.6)
        axes.set_xlabel("shards, largest first")
    else:
        axes.bar(np.arange(len(rows)), rows)
        axes.set_xlabel("shard")
    axes.axhline(rows.mean(), color="black", linewidth=1, linestyle="--", label=f"mean {rows.mean():,.0f}")
    axes.set_ylabel("rows")
    axes.legend()
    return _markdown(figure, f"rows of {len(rows)} shards, largest {rows.max():,}, mean {rows.mean():,.0f}")


def recall_by_probes(
    curve: Sequence[CurvePoint], latencies: Mapping[int, float], chosen: int, min_recall: float, k: int
) -> dg.MarkdownMetadataValue:
    """Recall with its lower bound, and latency, by the number of shards asked."""
    figure, axes = _figure(f"Recall@{k} and latency by number of probes")
    probes = [point.num_probes for point in curve]
    axes.plot(probes, [point.recall for point in curve], marker="o", label="recall")
    axes.fill_between(probes, [point.lower for point in curve], [point.recall for point in curve], alpha=0.25)
    axes.axhline(min_recall, color="black", linewidth=1, linestyle="--", label=f"min_recall {min_recall:g}")
    axes.axvline(chosen, color="grey", linewidth=1, linestyle=":", label=f"chosen: {chosen}")
    axes.set_xlabel("shards asked")
    axes.set_ylabel("recall (shaded: to its lower bound)")
    axes.legend(loc="lower right")
    if latencies:
        beside = axes.twinx()
        beside.plot(list(latencies), list(latencies.values()), color="tab:orange", marker="x", linewidth=1)
        beside.set_ylabel("ms a search, by the index", color="tab:orange")
        beside.set_ylim(bottom=0)
    found = next((point.recall for point in curve if point.num_probes == chosen), float("nan"))
    return _markdown(figure, f"recall@{k} by number of probes; {found:.4f} at the chosen {chosen}")


def projection(found: Projection) -> dg.MarkdownMetadataValue:
    """Training vectors on a plane, coloured by shard, with the centroids."""
    figure, axes = _figure(f"Training data on its two principal axes ({100 * found.kept:.0f} % of the variance)")
    shards = np.unique(found.shards)
    axes.scatter(found.points[:, 0], found.points[:, 1], c=found.shards, s=5, cmap="tab20", alpha=0.6, linewidths=0)
    if found.centroids is not None:
        axes.scatter(
            found.centroids[:, 0], found.centroids[:, 1], c="black", marker="X", s=50, edgecolors="white", zorder=3
        )
        for shard, (x, y) in enumerate(found.centroids[:_MOST_NAMES]):
            axes.annotate(str(shard), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    return _markdown(figure, f"{len(found.points)} training vectors in {len(shards)} shards on a plane")


def _figure(title: str) -> "tuple[Figure, Axes]":
    # Not through pyplot, which keeps figures and picks a window system: runs have many threads and no screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    return figure, axes


def _markdown(figure: "Figure", text: str) -> dg.MarkdownMetadataValue:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return dg.MetadataValue.md(f"![{text}](data:image/png;base64,{base64.b64encode(file.getvalue()).decode()})")
