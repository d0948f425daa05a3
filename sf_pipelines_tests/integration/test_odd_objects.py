"""Objects that are not what they should be: far too large, pipes, devices, on a full disk, gone from the cache."""

import os
import resource
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines import ShardedVectorReader, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.errors import ConfigError, DiskFullError, IntegrityError, SfPipelinesError
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.manifest.record import read_record
from sf_pipelines.snapshot.operations.cleanup import cleanup
from sf_pipelines.snapshot.operations.pins import pin, pins
from sf_pipelines.snapshot.operations.rollback import rollback
from sf_pipelines.snapshot.run import build as builds
from sf_pipelines.snapshot.run.ledger import Ledger
from sf_pipelines.snapshot.run.receipts import ScanReceipt
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.tables import small_config, write_source

GIBIBYTE = 1024**3


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    write_source(root / "source.parquet", seed=0)
    result = build_snapshot(small_config(root), cache_dir=root / "cache")
    pin(str(root / "store"), result.run_id, "for the test")
    return root


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    shutil.copytree(published / "store", tmp_path / "store")
    return tmp_path


def search(root: Path) -> Any:
    with ShardedVectorReader(root / "store", cache_dir=root / "readers") as reader:
        return reader.search([1.0] * 16, top_k=3)


def scanned(root: Path) -> ScanReceipt:
    store = Store.open(root / "store")
    pointer = read_pointer(store).pointer
    assert pointer is not None
    return Ledger(store, pointer.run_id).need(ScanReceipt)


LOOKS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "pointer": ("_CURRENT", search),
    "pointer of a rollback": ("_CURRENT", lambda root: rollback(root / "store")),
    "manifest": ("manifests/*/manifest", search),
    "centroids": ("**/centroids*.npy", search),
    "pin": ("pins/*.json", lambda root: pins(root / "store")),
    "record": ("runs/*/run.yaml", lambda root: read_record(Store.open(root / "store"), record_key(root))),
    "receipt": ("staging/*/receipts/scan/*.json", scanned),
}


def record_key(root: Path) -> str:
    return next((root / "store").glob("runs/*/run.yaml")).relative_to(root / "store").as_posix()


@pytest.mark.parametrize("what", LOOKS)
def test_a_small_object_that_became_a_large_one_is_not_read(root: Path, what: str) -> None:
    pattern, look = LOOKS[what]
    (path,) = (root / "store").glob(pattern)
    with path.open("r+b") as file:
        file.truncate(GIBIBYTE)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(IntegrityError, match="1,073,741,824 bytes"):
        look(root)
    assert time.monotonic() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("what", ["pipe", "device", "socket"])
@pytest.mark.parametrize("which", ["pointer", "manifest", "centroids", "pin", "record", "receipt"])
def test_what_is_no_regular_file_is_not_read(root: Path, which: str, what: str) -> None:
    pattern, look = LOOKS[which]
    (path,) = (root / "store").glob(pattern)
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            look(root)
        except BaseException as error:  # noqa: BLE001 - looked at below
            caught.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "it waits for ever"
    assert caught == [] if which == "pin" and not caught else isinstance(caught[0], SfPipelinesError)


@pytest.mark.parametrize(
    "location",
    ["s3://bucket/../x", "s3://bucket/a/./x", "s3://bucket/a//x", "s3://bucket/a\0b", "folder/a\0b", "s3://b b/x"],
)
def test_a_location_that_cannot_be_is_a_config_error(location: str) -> None:
    with pytest.raises(ConfigError):
        Store.open(location)
    with pytest.raises(ConfigError, match=r"WriteConfig\.store"):
        small_config(Path("anywhere"), store=location)


def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    write_source(tmp_path / "source.parquet", seed=0)
    before = os.umask(0o027)
    try:
        for seed in (0, 1):
            write_source(tmp_path / "source.parquet", seed=seed)
            build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.name != ".sf_pipelines.lock"]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_scratch_disk(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "source.parquet", rows=3000)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with pytest.raises(DiskFullError, match="scratch"):
        build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    key = record_key(tmp_path)
    record = read_record(Store.open(tmp_path / "store"), key)
    assert (record.status, record.error_type) == ("failed", "DiskFullError")


def test_a_full_disk_of_copies(small_disk: Path, root: Path) -> None:
    with ShardedVectorReader(root / "store", cache_dir=small_disk) as reader, pytest.raises(DiskFullError):
        reader.search([1.0] * 16, top_k=3)


def _remove_copies(cache: Path) -> None:
    for folder in cache.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)


@pytest.mark.parametrize("remove", [shutil.rmtree, _remove_copies])
def test_a_cache_that_was_emptied_is_filled_again(root: Path, remove: Callable[[Path], Any]) -> None:
    cache = root / "readers"
    wanted = [hit.id for hit in search(root).results]
    with ShardedVectorReader(root / "store", cache_dir=cache, exact_scan=False) as reader:
        remove(cache)
        assert [hit.id for hit in reader.search([1.0] * 16, top_k=3).results] == wanted
        remove(cache)
        found = reader.search([1.0] * 16, top_k=3)
        assert [hit.id for hit in found.results] == wanted
        assert all(hit.payload for hit in found.results)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), SystemExit(3), OSError(5, "I/O error")])
def test_a_build_that_ends_gives_its_lease_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_source(tmp_path / "source.parquet", seed=0)
    first = build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    write_source(tmp_path / "source.parquet", seed=1)

    def ends(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(stages, "assemble", ends)
    with pytest.raises(type(error)):
        build_snapshot(small_config(tmp_path), cache_dir=tmp_path / "cache")
    store = Store.open(tmp_path / "store")
    records = [read_record(store, info.key) for info in store.objects("runs")]
    (ended,) = [record for record in records if record.run_id != first.run_id]
    assert (ended.status, ended.error_type) == ("failed", type(error).__name__)
    cleanup(tmp_path / "store", keep=1, stale_after=timedelta(0), dry_run=False)
    assert ended.run_id not in "".join(info.key for info in store.objects())


def test_scratch_leaves_other_errors_alone() -> None:
    with pytest.raises(OSError, match="elsewhere") as caught, builds.scratch():
        raise OSError(5, "elsewhere")
    assert not isinstance(caught.value, SfPipelinesError)
