"""Figures of a build as pictures that Dagster's UI shows beside the materialization."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np

from sf_pipelines.snapshot.manifest.models import CurvePoint
from sf_pipelines.snapshot.routing.projection import Projection
from sf_pipelines.snapshot.run.receipts import RoutedShard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches at 90 dots: what fits into the UI's panel, at 10 to 40 KB a picture.
_WIDTH = 6.4
_HEIGHT = 3.2
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
    """Recall of the tuning queries with its lower bound, and time of a search, by the number of shards asked."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(f"Tuning recall@{k} and time of an index search, by shards asked", height=3.8)
    probes, lower = [point.num_probes for point in curve], [point.lower for point in curve]
    axes.plot(probes, [point.recall for point in curve], marker="o", label="recall (left)")
    axes.fill_between(probes, lower, [point.recall for point in curve], alpha=0.25, label="down to its lower bound")
    axes.axhline(min_recall, color="tab:red", linewidth=1.5, linestyle="--", label=f"min_recall {min_recall:g}")
    axes.axvline(chosen, color="grey", linewidth=1, linestyle=":", label=f"num_probes {chosen}")
    span = max(1.0, *lower) - min(min_recall, *lower)
    axes.set_ylim(min(min_recall, *lower) - 0.08 * span - 0.002, 1 + 0.05 * span + 0.001)
    axes.set_xlim(probes[0] - 0.5, probes[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("shards asked")
    axes.set_ylabel("recall")
    lines, names = axes.get_legend_handles_labels()
    if latencies:
        beside = axes.twinx()
        beside.plot(
            *zip(*sorted(latencies.items()), strict=True),
            color="tab:orange",
            marker="x",
            linewidth=1,
            label="index search, ms (right)",
        )
        beside.set_ylabel("index search, ms", color="tab:orange")
        beside.set_ylim(bottom=0)
        more = beside.get_legend_handles_labels()
        lines, names = lines + more[0], names + more[1]
    figure.legend(lines, names, loc="outside lower center", ncols=3, fontsize=8)
    found = next((point.recall for point in curve if point.num_probes == chosen), float("nan"))
    return _markdown(figure, f"tuning recall@{k} by shards asked; {found:.4f} at num_probes {chosen}")


def projection(found: Projection) -> dg.MarkdownMetadataValue:
    """Training vectors on a plane; each shard's mean is its number, in its colour."""
    figure, axes = _figure(f"Training data on its two principal axes ({100 * found.kept:.0f} % of the variance)")
    colours, legend = _colours(len(found.means)), len(found.means) <= _MOST_NAMES
    for (shard, (x, y)), colour in zip(sorted(found.means.items()), colours, strict=True):
        points = found.points[found.shards == shard]
        axes.scatter(points[:, 0], points[:, 1], color=colour, s=5, alpha=0.5, linewidths=0)
        label = f"shard {shard}: {len(points):,}" if legend else None
        axes.scatter(x, y, color=colour, s=150, edgecolors="black", zorder=3, label=label)
        ink = "black" if np.dot(colour[:3], (0.3, 0.59, 0.11)) > 0.5 else "white"
        axes.annotate(str(shard), (x, y), ha="center", va="center", color=ink, fontsize=7, fontweight="bold", zorder=4)
    axes.set_xticks([])
    axes.set_yticks([])
    if legend:
        # The circles are smaller here than in the picture, so that sixteen of them fit.
        figure.legend(loc="outside right upper", fontsize=7, markerscale=0.5, title="vectors shown", title_fontsize=7)
    else:
        axes.set_xlabel("circles: means of the shards' vectors; colours repeat", fontsize=8)
    return _markdown(figure, f"{len(found.points)} training vectors in {len(found.means)} shards on a plane")


def _colours(count: int) -> list[tuple[float, ...]]:
    """One for each shard; those of more than twenty repeat."""
    from matplotlib import colormaps

    named = colormaps["tab10"] if count <= 10 else colormaps["tab20"]
    return [named(shard % named.N) for shard in range(count)]


def _figure(title: str, *, height: float = _HEIGHT) -> "tuple[Figure, Axes]":
    # Not through pyplot, which keeps figures and picks a window system: runs have many threads and no screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    return figure, axes


def _markdown(figure: "Figure", text: str) -> dg.MarkdownMetadataValue:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return dg.MetadataValue.md(f"![{text}](data:image/png;base64,{base64.b64encode(file.getvalue()).decode()})")
