"""Verified local copies: damage at either end, sharing, eviction."""

import fcntl
import hashlib
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from sf_pipelines.snapshot.errors import DigestMismatchError, IntegrityError, ObjectMissingError, StoreDeniedError
from sf_pipelines.snapshot.manifest.models import ShardObject
from sf_pipelines.snapshot.reader import cache as cache_module
from sf_pipelines.snapshot.reader.cache import ShardCache, default_root, shard_digest
from sf_pipelines.snapshot.store import Store

FILES = {"t.lance/data/one": b"1" * 1000, "t.lance/two": b"2" * 500}


class CountingStore(Store):
    """Counts downloads."""

    downloads = 0

    def download(self, key: str, path: Path) -> tuple[int, str]:
        type(self).downloads += 1
        return super().download(key, path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    CountingStore.downloads = 0
    return CountingStore.open(tmp_path / "store", create=True)


def put_shard(store: Store, prefix: str, files: dict[str, bytes] | None = None) -> tuple[ShardObject, ...]:
    files = FILES if files is None else files
    for name, data in files.items():
        store.put(f"{prefix}/{name}", data)
    return tuple(
        ShardObject(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()
    )


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_copy_is_fetched_once_and_shared_by_equal_shards(store: Store, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    objects, again = put_shard(store, "a"), put_shard(store, "b")
    with cache.checkout(store, "a", objects) as folder:
        assert content(folder) == FILES
        with ShardCache(tmp_path / "cache").checkout(store, "b", again) as other:
            assert other == folder
    assert CountingStore.downloads == 2


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda s: s.put("a/t.lance/two", b"2" * 499 + b"3"), DigestMismatchError),
        (lambda s: s.put("a/t.lance/two", b"2" * 100), DigestMismatchError),
        (lambda s: s.delete("a/t.lance/two"), ObjectMissingError),
    ],
    ids=["changed", "truncated", "deleted"],
)
def test_a_damaged_object_is_named_and_nothing_is_kept(store: Store, tmp_path: Path, damage, error) -> None:
    cache = ShardCache(tmp_path / "cache")
    objects = put_shard(store, "a")
    damage(store)
    with pytest.raises(error, match=r"a/t\.lance/two"), cache.checkout(store, "a", objects):
        pytest.fail("a damaged shard was handed out")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    put_shard(store, "a")
    with cache.checkout(store, "a", objects) as folder:
        assert content(folder) == FILES


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("damage", ["changed", "removed", "added", "linked"])
def test_a_damaged_copy_is_noticed_and_fetched_again(store: Store, tmp_path: Path, damage: str, sealed: bool) -> None:
    cache = ShardCache(tmp_path / "cache")
    objects = put_shard(store, "a") if sealed else put_shard(store, "a") and None
    with cache.checkout(store, "a", objects) as folder:
        pass
    victim = folder / "t.lance/two"
    if damage == "changed":
        victim.write_bytes(b"2" * 499 + b"x")
    elif damage == "removed":
        victim.unlink()
    elif damage == "added":
        (folder / "t.lance/three").write_bytes(b"")
    else:
        (tmp_path / "elsewhere").write_bytes(FILES["t.lance/two"])
        victim.unlink()
        victim.symlink_to(tmp_path / "elsewhere")
    with cache.checkout(store, "a", objects) as folder:
        assert content(folder) == FILES
        assert not victim.is_symlink()
    assert CountingStore.downloads == 4


def test_without_recorded_digests_a_new_version_is_another_entry(store: Store, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    put_shard(store, "a")
    with cache.checkout(store, "a", None) as first:
        assert content(first) == FILES
    with cache.checkout(store, "a", None) as again:
        assert again == first
    store.put("a/t.lance/two", b"other")
    with cache.checkout(store, "a", None) as second:
        assert content(second)["t.lance/two"] == b"other"
    with pytest.raises(ObjectMissingError, match="nothing holds no objects"), cache.checkout(store, "nothing", None):
        pytest.fail("an empty shard was handed out")


def test_the_longest_unused_copies_go_and_those_in_use_stay(store: Store, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=2500)
    shards = {name: put_shard(store, name, {"f": name.encode() * 1000}) for name in "abcd"}
    folders: dict[str, Path] = {}
    with ExitStack() as held:
        folders["a"] = held.enter_context(cache.checkout(store, "a", shards["a"]))
        for age, name in enumerate("bc"):
            with cache.checkout(store, name, shards[name]) as folders[name]:
                pass
            os.utime(f"{folders[name]}.lock", (age, age))
        with cache.checkout(store, "d", shards["d"]) as folders["d"]:
            pass
        assert {name for name, folder in folders.items() if folder.exists()} == {"a", "d"}
    left = {path.name for path in cache.root.iterdir()}
    assert not any(path.startswith((folders["b"].name, folders["c"].name)) for path in left)


def test_no_more_is_dropped_than_needed_and_use_counts(store: Store, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=2500)
    shards = {name: put_shard(store, name, {"f": name.encode() * 1000}) for name in "abc"}
    folders: dict[str, Path] = {}
    for name in "ab":
        with cache.checkout(store, name, shards[name]) as folders[name]:
            pass
        os.utime(f"{folders[name]}.lock", (1, 1))
    with cache.checkout(store, "a", shards["a"]):
        pass
    with cache.checkout(store, "c", shards["c"]) as folders["c"]:
        pass
    assert {name for name, folder in folders.items() if folder.exists()} == {"a", "c"}


def test_a_large_cache_is_not_counted_for_each_copy(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting looks at every file there: copies would take longer the more of them there are."""
    counts: list[ShardCache] = []
    evict = ShardCache.evict
    monkeypatch.setattr(ShardCache, "evict", lambda cache: (counts.append(cache), evict(cache)))
    for number in range(40):
        objects = put_shard(store, f"s{number}", {"one": f"{number:01000}".encode()})
        # A cache for each: what is known of the folder is the process's, not the object's.
        with ShardCache(tmp_path / "cache", max_bytes=100_000).checkout(store, f"s{number}", objects):
            pass
    # Once at first, and after each sixteenth of the limit.
    assert 1 < len(counts) <= 1 + 40 // 6


def test_an_object_that_shrinks_after_it_was_listed_is_an_error(tmp_path: Path) -> None:
    class Shrinking(Store):
        def download(self, key: str, path: Path) -> tuple[int, str]:
            self.put(key, b"less")
            return super().download(key, path)

    store = Shrinking.open(tmp_path / "store", create=True)
    put_shard(store, "a", {"f": b"more than that"})
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(DigestMismatchError, match="a/f has 4 bytes, 14"), cache.checkout(store, "a", None):
        pytest.fail("a shrunken shard was handed out")


def test_a_lock_file_that_was_removed_while_waiting_is_no_lock(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, objects, flock = ShardCache(tmp_path / "cache"), put_shard(store, "a"), fcntl.flock
    lock = cache.root / f"{shard_digest(objects)}.lock"
    removed: list[int] = []

    def evicted_meanwhile(handle: int, how: int) -> None:
        flock(handle, how)
        if not removed:
            removed.append(handle)
            lock.unlink()

    monkeypatch.setattr(fcntl, "flock", evicted_meanwhile)
    with cache.checkout(store, "a", objects):
        assert removed
        assert lock.exists()
        other = os.open(lock, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)


def test_leftovers_of_a_killed_download_are_removed(store: Store, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    objects = put_shard(store, "a")
    left_over = cache.root / f"tmp-{shard_digest(objects)}-dead"
    left_over.mkdir()
    (left_over / "half").write_bytes(b"x")
    with cache.checkout(store, "a", objects):
        assert not left_over.exists()


def test_many_threads_fetch_one_shard_once(store: Store, tmp_path: Path) -> None:
    objects = put_shard(store, "a")
    start = threading.Barrier(8)

    def work(_: int) -> dict[str, bytes]:
        start.wait()
        with ShardCache(tmp_path / "cache").checkout(store, "a", objects) as folder:
            return content(folder)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [FILES] * 8
    assert CountingStore.downloads == 2


def _use_in_another_process(location: str, root: str, rounds: int) -> None:
    store = Store.open(location)
    files = {name: {"f": name.encode() * 1000} for name in "abc"}
    for turn in range(rounds):
        name = "abc"[(turn + os.getpid()) % 3]
        data = files[name]["f"]
        objects = (ShardObject(path="f", size=1000, sha256=hashlib.sha256(data).hexdigest()),)
        with ShardCache(Path(root), max_bytes=1500).checkout(store, name, objects) as folder:
            assert (folder / "f").read_bytes() == data


def test_processes_share_a_cache_that_is_too_small(store: Store, tmp_path: Path) -> None:
    for name in "abc":
        put_shard(store, name, {"f": name.encode() * 1000})
    spawn = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "store"), str(tmp_path / "cache"), 60)
    processes = [spawn.Process(target=_use_in_another_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_a_held_copy_is_locked_against_other_processes(store: Store, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    with cache.checkout(store, "a", put_shard(store, "a")) as folder:
        lock = os.open(f"{folder}.lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


def test_a_listed_name_cannot_leave_the_copy(store: Store, tmp_path: Path) -> None:
    data = b"x"
    bad = ShardObject.model_construct(path="../outside", size=1, sha256=hashlib.sha256(data).hexdigest())
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(IntegrityError, match="no plain relative path"), cache.checkout(store, "a", (bad,)):
        pytest.fail("a path left the cache")


def test_the_default_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SF_PIPELINES_CACHE", raising=False)
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path))
    assert ShardCache().root == default_root()
    assert default_root().stat().st_mode & 0o777 == 0o700
    default_root().parent.chmod(0o777)
    with pytest.raises(StoreDeniedError, match="no folder of this user alone"):
        ShardCache()
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "named"))
    assert ShardCache().root == tmp_path / "named"
