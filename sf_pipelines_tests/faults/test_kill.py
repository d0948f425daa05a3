"""SIGKILL in every stage, then the same build again: it goes on from the receipts; nothing half-made was reachable."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sf_pipelines import ShardedVectorReader, build_snapshot
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.operations.verify import verify_snapshot
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import PromoteReceipt, ScanReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.tables import small_config, write_source

# Runs a build that kills itself at a write: before it, or right after it was applied.
VICTIM = """
import os, signal, sys
from pathlib import Path
from sf_pipelines import build_snapshot
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.tables import small_config

root, needle, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def deadly(name):
    plain = getattr(Store, name)
    def write(self, *args, **options):
        hit = any(isinstance(arg, str) and needle in arg for arg in args)
        if hit and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = plain(self, *args, **options)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    setattr(Store, name, write)

for name in ("put", "create", "swap", "upload"):
    deadly(name)
build_snapshot(small_config(root), cache_dir=root / "cache")
"""

MOMENTS = [
    ("receipts/scan/", "before"),
    ("receipts/scan/", "after"),
    ("/rejects-", "after"),
    ("receipts/sample/", "before"),
    ("centroids.npy", "after"),
    ("receipts/train/", "before"),
    ("routed/range-", "after"),
    ("receipts/route/", "before"),
    ("/db=00001/attempt", "after"),
    ("receipts/shard/db=00001", "before"),
    ("receipts/shard/db=00001", "after"),
    ("/manifest-", "after"),
    ("receipts/manifest/", "before"),
    ("/verdicts/", "after"),
    ("manifests/", "before"),
    ("manifests/", "after"),
    ("_CURRENT", "before"),
    ("_CURRENT", "after"),
    ("receipts/promote/", "before"),
]
QUICK = {("_CURRENT", "after")}


@pytest.mark.parametrize(
    ("needle", "when"),
    [pytest.param(*moment, marks=[] if moment in QUICK else [pytest.mark.slow]) for moment in MOMENTS],
)
def test_a_killed_build_goes_on(tmp_path: Path, needle: str, when: str) -> None:
    old_vectors = write_source(tmp_path / "source.parquet")
    old = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    write_source(tmp_path / "source.parquet", seed=1)
    # The first build's pointer and manifest names must not trigger: the victim starts after them.
    child = subprocess.run(
        [sys.executable, "-c", VICTIM, str(tmp_path), needle, when], capture_output=True, text=True, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]

    store = Store.open(tmp_path / "store")
    pointer = read_pointer(store).pointer
    assert pointer is not None
    moved = pointer.run_id != old.run_id
    assert moved == ((needle, when) in {("_CURRENT", "after"), ("receipts/promote/", "before")})
    # Whatever the history lists has passed its gate: either the old one, or the new one after its checks.
    listed = moved or (needle, when) in {("manifests/", "after"), ("_CURRENT", "before")}
    fresh = {entry.run_id for entry in history(store)} - {old.run_id}
    assert fresh == ({_newest_run(store, old.run_id)} if listed else set())
    if not moved:
        with ShardedVectorReader(tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
            assert reader.search(old_vectors[7], top_k=1).results[0].id == 7

    result = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    pointer = read_pointer(store).pointer
    assert pointer is not None
    assert pointer.run_id == result.run_id != old.run_id
    assert pointer.seq == old.seq + 1
    if (needle, when) != ("receipts/scan/", "before"):
        # No second run was begun: the one that was killed has been finished.
        assert len(store.folders("staging")) == 2
    assert verify_snapshot(tmp_path / "store").passed
    assert len(history(store)) == 2
    assert Ledger(store, result.run_id).find(PromoteReceipt) is not None
    again = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    assert (again.published, again.run_id) == (False, result.run_id)


def _newest_run(store: Store, old: str) -> str | None:
    runs = {name.removeprefix("run_id=") for name in store.folders("staging")} - {old}
    found = [Ledger(store, run).find(ScanReceipt) for run in runs]
    return max((receipt for receipt in found if receipt), key=lambda receipt: receipt.created_at).run_id
