"""``make snapshot``: builds the demo snapshot through Dagster, then searches it with the public reader."""

import sys
import warnings
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sf_pipelines import ShardedVectorReader
from sf_pipelines.defs.digits_source.rows import TABLE, project_root

_SEARCHES = 5
_TOP_K = 5
_RECALL_QUERIES = 300


def main() -> int:
    """Builds and searches; 1 when the build failed."""
    console = Console(soft_wrap=True, highlight=False)
    # Dagster warns of beta features, which are used here on purpose.
    warnings.simplefilter("ignore", dg.BetaWarning)
    settings = yaml.safe_load(Path(__file__).with_name("defs.yaml").read_text(encoding="utf-8"))["attributes"]
    store = project_root() / settings["store"]
    before = _current_run(store)
    console.print("[bold]Building the demo snapshot through Dagster[/bold] (job build_digits)")
    if not build(console):
        console.print("[red]The build failed; an earlier snapshot, if there is one, is still served.[/red]")
        return 1
    with ShardedVectorReader(str(store)) as reader:
        run_id = reader.snapshot_info().run_id
        up_to_date = f"Up to date: snapshot {run_id} was built from this source and config."
        console.print(up_to_date if before == run_id else f"Published snapshot {run_id}.")
        search(console, reader, project_root() / TABLE)
    shown = escape(settings["store"])
    console.print(f"\nThe snapshot is at [bold]{shown}[/bold]; look at it with")
    console.print(f"  .venv/bin/sf-pipelines info {shown}")
    console.print("  make ui     (assets, checks and runs in the browser)")
    return 0


def build(console: Console) -> bool:
    """Runs the job on the instance of DAGSTER_HOME, so that the UI shows the run afterwards."""
    from sf_pipelines.definitions import defs

    job = defs().resolve_job_def("build_digits")
    with dg.DagsterInstance.get() as instance:
        result = job.execute_in_process(
            instance=instance,
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "ERROR"}}}},
        )
        for event in result.get_asset_check_evaluations():
            verdict = "[green]passed[/green]" if event.passed else f"[red]failed[/red] ({event.severity.value})"
            console.print(f"  check {event.check_name}: {verdict}  {escape(event.description or '')}")
        for event in result.get_step_failure_events():
            failure = event.step_failure_data.user_failure_data
            reason = failure.description if failure else event.message
            console.print(f"  [red]{event.step_key}: {escape(reason or '')}[/red]")
    return result.success


def search(console: Console, reader: ShardedVectorReader, path: Path) -> None:
    """Prints a few searches with the labels of what they found, and the recall over more of them."""
    rows = pq.read_table(path)
    pixels = np.stack(rows["pixels"].to_numpy()).astype(np.float32)
    labels = rows["label"].to_numpy()
    picks = np.random.default_rng(7).choice(len(pixels), _RECALL_QUERIES, replace=False)
    table = Table("digit", "row", "labels found", "their distances", "shards", title="Five searches")
    for pick in picks[:_SEARCHES]:
        # The nearest row is the query itself.
        answer = reader.search(pixels[pick], top_k=_TOP_K + 1)
        hits = [hit for hit in answer.results if hit.id != pick][:_TOP_K]
        table.add_row(
            str(labels[pick]),
            str(pick),
            "  ".join(str((hit.payload or {}).get("label")) for hit in hits),
            "  ".join(f"{hit.score:.3f}" for hit in hits),
            str(answer.num_shards_queried),
        )
    console.print(table)
    info = reader.snapshot_info()
    console.print(
        f"Measured recall@{_TOP_K} over {_RECALL_QUERIES} searches, against all rows: "
        f"[bold]{measured_recall(reader, pixels, picks):.4f}[/bold] "
        f"({info.num_probes} of {info.num_dbs} shards asked a search)",
        highlight=False,
    )


def measured_recall(reader: ShardedVectorReader, pixels: np.ndarray, picks: np.ndarray) -> float:
    """Share of the true nearest rows (cosine, float64) that the reader finds."""
    unit = pixels.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    distances = 1.0 - unit[picks] @ unit.T
    # The nearest row is the query itself and does not count. A tie at the last place has several true answers:
    # whatever is as near as the last one counts.
    last = np.sort(distances, axis=1)[:, _TOP_K] + 1e-9
    answers = reader.batch_search(pixels[picks], top_k=_TOP_K + 1)
    found = [
        sum(hit.score <= limit for hit in answer.results if hit.id != pick)
        for pick, answer, limit in zip(picks, answers, last, strict=True)
    ]
    return float(np.minimum(found, _TOP_K).mean()) / _TOP_K


def _current_run(store: Path) -> str | None:
    if not (store / "_CURRENT").exists():
        return None
    with ShardedVectorReader(str(store)) as reader:
        return reader.snapshot_info().run_id


if __name__ == "__main__":
    sys.exit(main())
