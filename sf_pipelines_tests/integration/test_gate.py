"""What the gate measures, records and says."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sf_pipelines import ShardedVectorReader, build_snapshot
from sf_pipelines.snapshot.gate.recall import merge_truth, recall_by_id, row_numbers
from sf_pipelines.snapshot.gate.verdicts import judged_recall
from sf_pipelines.snapshot.manifest.codec import encode_manifest
from sf_pipelines.snapshot.operations.diff import diff
from sf_pipelines.snapshot.reader.state import load_current
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import ManifestReceipt, SampleReceipt
from sf_pipelines.snapshot.stages.assemble import shard_receipts
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import assembled
from sf_pipelines_tests.snapshots import point_at
from sf_pipelines_tests.tables import clustered, exact_distances, small_config, vector_table, write_source

# The recall of a snapshot.


def test_the_judged_recall_is_the_recall_everywhere(tmp_path: Path) -> None:
    vectors = write_source(tmp_path / "source.parquet")
    spec = {"dim": 16, "sharding": {"strategy": "cluster", "num_probes": 1}}
    config = small_config(tmp_path, vector_spec=spec, recall_gate={"min_recall": 0.5})
    result = build_snapshot(config, cache_dir=tmp_path / "cache")
    verdict = next(verdict for verdict in result.verdicts if verdict.name == "recall")
    store = Store.open(config.store)
    state = load_current(store)
    found = judged_recall(store, state.manifest, state.manifest_digest)
    assert found is not None
    figures = (found.recall, found.lower, found.k, found.min_recall, found.num_probes, found.queries)
    assert figures == tuple(
        verdict.figures[name] for name in ("recall", "lower_bound", "k", "min_recall", "num_probes", "queries")
    )
    assert (result.recall, result.recall_lower) == figures[:2]
    assert found.percentile_5 == verdict.figures["percentile_5"]
    # The queries that chose the number of probes are others: theirs is another figure.
    assert [point.recall for point in result.curve if point.num_probes == result.num_probes] != [found.recall]
    side = diff(config.store, result.run_id, result.run_id, ids=False, answers=False).after
    assert side.recall == found
    with ShardedVectorReader(config.store, cache_dir=tmp_path / "cache") as reader:
        info, plan = reader.snapshot_info(), reader.explain(vectors[0])
        assert (info.recall, info.recall_lower, info.recall_k) == figures[:3]
        assert (plan.recall, plan.recall_lower, plan.recall_k) == figures[:3]
        other = next(point for point in result.curve if point.num_probes != result.num_probes)
        assert reader.explain(vectors[0], num_probes=other.num_probes).recall == other.recall
    # The manifest tells it: a copy without what the build left beside it does, too.
    shutil.copytree(tmp_path / "store", tmp_path / "copy", ignore=shutil.ignore_patterns("staging"))
    copied = load_current(Store.open(tmp_path / "copy"))
    assert judged_recall(Store.open(tmp_path / "copy"), copied.manifest, copied.manifest_digest) == found


def test_the_recall_of_a_snapshot_from_before_its_manifest_told_it(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path)
    result = build_snapshot(config, cache_dir=tmp_path / "cache")
    store = Store.open(config.store)
    state = load_current(store)
    custom = {name: dict(value) for name, value in state.manifest.custom.items()}
    custom["sf_pipelines"]["recall"] = dict(custom["sf_pipelines"]["recall"])
    del custom["sf_pipelines"]["recall"]["judged"]
    data = encode_manifest(state.manifest.model_copy(update={"custom": custom}))
    digest = hashlib.sha256(data).hexdigest()
    store.put(state.manifest_key, data)
    point_at(store, state.manifest_key, result.run_id, digest)
    verdicts = tmp_path / "store" / "staging" / f"run_id={result.run_id}" / "verdicts"
    (verdicts / state.manifest_digest).rename(verdicts / digest)
    old = load_current(store)
    found = judged_recall(store, old.manifest, old.manifest_digest)
    assert found is not None
    assert (found.recall, found.lower, found.percentile_5) == (result.recall, result.recall_lower, None)
    # Without the verdict nobody knows, and the figure of the tuning queries does not stand in for it.
    shutil.rmtree(verdicts)
    assert judged_recall(store, old.manifest, old.manifest_digest) is None
    assert diff(config.store, result.run_id, result.run_id, ids=False, answers=False).after.recall is None
    with ShardedVectorReader(config.store, cache_dir=tmp_path / "cache") as reader:
        assert reader.snapshot_info().recall is None


@pytest.mark.slow
@pytest.mark.parametrize("index_type", ["ivf_sq", "hnsw"])
def test_the_manifest_tells_what_its_index_gives(tmp_path: Path, index_type: str) -> None:
    write_source(tmp_path / "source.parquet", rows=3000)
    spec = {"dim": 16, "index_type": index_type}
    config = small_config(tmp_path, vector_spec=spec, recall_gate={"min_recall": 0.8})
    result = build_snapshot(config, cache_dir=tmp_path / "cache")
    with ShardedVectorReader(config.store, cache_dir=tmp_path / "cache") as reader:
        assert reader.snapshot_info().recall == pytest.approx(result.recall, abs=1e-12)


# Truth.


def test_long_ids_cost_the_truth_nothing(tmp_path: Path) -> None:
    """Named by their ids, the neighbours of 500 queries in three shards were 66 MB of tables."""
    vectors = clustered(1500, 16)
    ids = [f"{n:04d}" + "x" * 3996 for n in range(1500)]
    pq.write_table(vector_table(vectors, ids=ids, title=["t"] * 1500), tmp_path / "source.parquet")
    config = small_config(tmp_path)
    result = build_snapshot(config, cache_dir=tmp_path / "cache")
    store = Store.open(config.store)
    assembled = Ledger(store, result.run_id).need(ManifestReceipt)
    tables = [assembled.truth, *(shard.truth for shard in result.shards if shard.truth)]
    assert len(tables) == 4
    assert sum(table.size for table in tables) < 1_000_000
    # It is the same truth: the k nearest of each query, its own row left out.
    ledger = Ledger(store, result.run_id)
    queries = ledger.get_table(ledger.need(SampleReceipt).queries)
    truth = ledger.get_table(assembled.truth)
    own = np.array([int(row_id[:4]) for row_id in queries.column("id").to_pylist()])
    table = exact_distances(vectors[own], vectors, config.vector_spec.metric)
    table[np.arange(len(own)), own] = np.inf
    nearest = np.argsort(table, axis=1, kind="stable")[:, :10]
    numbers = row_numbers(pa.array(ids))
    assert truth.column("row").to_numpy().reshape(-1, 10).tolist() == numbers[nearest].tolist()


def test_truth_of_a_build_that_was_begun_when_rows_were_named_by_their_ids(tmp_path: Path) -> None:
    """It goes on with what it has."""
    write_source(tmp_path / "source.parquet")
    config = small_config(tmp_path)
    build, run_id = assembled(config, tmp_path / "cache")
    with build:
        ledger = run = build.run(run_id)
        shards = shard_receipts(run, run.routed)
        ids = pa.array(range(600))
        names = dict(zip(row_numbers(ids).tolist(), range(600), strict=True))
        parts: list[pa.Table] = []
        for shard in shards:
            assert shard.truth is not None
            table = ledger.get_table(shard.truth)
            rows = [names[row] for row in table.column("row").to_pylist()]
            parts.append(pa.table({"query": table["query"], "id": rows, "distance": table["distance"]}))
        own = row_numbers(ledger.get_table(run.sampled.queries).column("id"))
        now = ledger.get_table(ledger.need(ManifestReceipt).truth)
        assert merge_truth(parts, own, 10).equals(now)
        old = pa.table(
            {"query": now["query"], "id": [names[row] for row in now["row"].to_pylist()], "distance": now["distance"]}
        )
        answers, asked = np.arange(20).reshape(2, 10), np.array([0, 1])
        assert recall_by_id(answers, asked, old).tolist() == recall_by_id(answers, asked, now).tolist()
