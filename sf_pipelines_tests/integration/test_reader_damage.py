"""Real snapshots whose objects were changed after they were published: never an answer, always the object's name."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from sf_pipelines import WriteConfig, build_snapshot
from sf_pipelines.snapshot.errors import (
    DigestMismatchError,
    IntegrityError,
    ObjectMissingError,
    SfPipelinesError,
    StoreError,
)
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader import cache as cache_module
from sf_pipelines.snapshot.reader.cache import shard_digest
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.faces import Face, unified_reader, vector_reader
from sf_pipelines_tests.snapshots import clustered, publish_by_hand
from sf_pipelines_tests.tables import vector_table

ROWS, DIM, SHARDS = 60, 8, 2
VECTORS = clustered(ROWS, DIM)
FLIPS, FLIPS_OF_COPIES = 200, 12


class Built(NamedTuple):
    """A published snapshot on local disk."""

    root: Path
    unified: bool

    def open(self, cache: Path, face: Face = "sync", **options: Any) -> Any:
        opener = unified_reader if self.unified else vector_reader
        return opener(face, self.root, cache_dir=cache, **options)

    @property
    def objects(self) -> list[Path]:
        """Manifest, centroids, and every file of every shard."""
        with self.open(self.root.parent / "look") as reader:
            state = reader._core.state
        found = [self.root / state.manifest_key]
        if not self.unified:
            found.append(next(self.root.rglob("centroids.npy")))
        for shard in state.shards:
            found += [self.root / shard.key / item.path for item in shard.objects]
        return found


@pytest.fixture(scope="module", params=["lancedb", "sqlite-vec", "unified-lancedb", "unified-sqlite-vec"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    pq.write_table(vector_table(VECTORS, value=[f"value {n}" for n in range(ROWS)]), folder / "source.parquet")
    unified = name.startswith("unified-")
    fields: dict[str, Any] = {
        "vector_spec": {"dim": DIM, "metric": "l2", "backend": name.removeprefix("unified-")},
        "recall_gate": {"k": 3, "min_recall": 0.5},
    }
    if unified:
        fields["key_value"] = {"key_col": "id", "value_cols": ["value"]}
    config = WriteConfig(
        name="damage",
        source=str(folder / "source.parquet"),
        store=str(folder / "store"),
        num_dbs=SHARDS,
        **fields,
    )
    build_snapshot(config, cache_dir=folder / "built")
    return Built(folder / "store", unified)


def ask_all(reader: Any, shards: list[int] | None = None) -> list[list[tuple[Any, float]]]:
    """Everything that the shards hold, and with keys their values, too."""
    found = reader.batch_search(VECTORS[:3], ROWS, shard_ids=list(range(SHARDS)) if shards is None else shards)
    if hasattr(reader, "multi_get") and shards is None:
        assert None not in reader.multi_get(range(ROWS)).values()
    return [[(hit.id, hit.score) for hit in answer.results] for answer in found]


def flipped(rng: np.random.Generator, path: Path) -> bytes:
    """The file's bytes with one bit changed."""
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(data)


@contextmanager
def holding(path: Path, data: bytes | None) -> Iterator[None]:
    """An object with other bytes, or none, for as long as the block lasts."""
    before = path.read_bytes()
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def shard_of(path: Path) -> list[int] | None:
    """The shard that a file belongs to."""
    part = next((part for part in path.parts if part.startswith("db=")), None)
    return None if part is None else [int(part.removeprefix("db="))]


@pytest.mark.slow
def test_no_flipped_bit_is_served(built: Built, tmp_path: Path) -> None:
    rng, objects = np.random.default_rng(4), built.objects
    assert {path.name for path in objects} >= {"manifest"}
    for turn in range(FLIPS):
        path = objects[turn % len(objects)]
        with holding(path, flipped(rng, path)):
            with pytest.raises(IntegrityError) as caught, built.open(tmp_path / f"{turn}") as reader:
                ask_all(reader, shard_of(path))
            assert path.name in str(caught.value), caught.value
    with built.open(tmp_path / "last") as reader:
        assert len(ask_all(reader)[0]) == ROWS


@pytest.mark.parametrize("damage", ["deleted", "shorter", "longer", "replaced"])
def test_every_damaged_object_is_named(built: Built, tmp_path: Path, face: Face, damage: str) -> None:
    # One of each sort: those of a sort are treated alike.
    for turn, path in enumerate({item.suffix or item.name: item for item in built.objects}.values()):
        data = path.read_bytes()
        changed = {
            "deleted": None,
            "shorter": data[:-1],
            "longer": data + b"\0",
            "replaced": data[::-1],
        }[damage]
        with holding(path, changed):
            kind: type[SfPipelinesError] = ObjectMissingError if damage == "deleted" else DigestMismatchError
            with pytest.raises(kind, match=path.name), built.open(tmp_path / f"{turn}", face) as reader:
                ask_all(reader, shard_of(path))


def test_a_shard_of_another_snapshot_is_not_served(built: Built, tmp_path: Path) -> None:
    by_name: dict[str, list[Path]] = {}
    for path in built.objects:
        if shard_of(path) is not None:
            by_name.setdefault(path.suffix, []).append(path)
    mine, theirs = max(by_name.values(), key=len)[0], max(by_name.values(), key=len)[-1]
    assert shard_of(mine) != shard_of(theirs)
    with (
        holding(mine, theirs.read_bytes()),
        built.open(tmp_path) as reader,
        pytest.raises(DigestMismatchError, match=mine.name),
    ):
        ask_all(reader, shard_of(mine))


@pytest.mark.parametrize("known", [True, False], ids=["hashed-before", "new-process"])
def test_flipped_copies_are_healed(built: Built, tmp_path: Path, known: bool) -> None:
    with built.open(tmp_path) as reader:
        good = ask_all(reader)
    copies = sorted(
        path for path in tmp_path.rglob("*") if path.is_file() and len(path.relative_to(tmp_path).parts) > 1
    )
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in copies}
    rng = np.random.default_rng(5)
    for turn in range(FLIPS_OF_COPIES):
        path = copies[turn % len(copies)]
        data, stamp = flipped(rng, path), path.stat().st_ctime_ns
        while path.stat().st_ctime_ns == stamp:
            # The kernel's clock for files is coarse.
            path.write_bytes(data)
        if not known:
            cache_module._hashed.clear()
        with built.open(tmp_path) as reader:
            assert ask_all(reader) == good
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digests[path]


def test_a_flipped_copy_is_refused_when_it_cannot_be_fetched(built: Built, tmp_path: Path) -> None:
    with built.open(tmp_path) as reader:
        ask_all(reader)
    stored = next(path for path in built.objects if shard_of(path) is not None)
    copy = next(path for path in tmp_path.rglob(stored.name) if path.read_bytes() == stored.read_bytes())
    copy.write_bytes(flipped(np.random.default_rng(6), copy))
    with (
        holding(stored, None),
        built.open(tmp_path) as reader,
        pytest.raises(ObjectMissingError, match=stored.name),
    ):
        ask_all(reader, shard_of(stored))


# A copy that goes bad, or vanishes, under an open reader.


@pytest.fixture(params=[True, False], ids=["sealed", "unsealed"])
def sealed(request: pytest.FixtureRequest) -> bool:
    return request.param


def by_hand(root: Path, **options: Any) -> Store:
    store = Store.open(root, create=True)
    options = {"centroids": clustered(1, DIM), "metric": DistanceMetric.L2, "backend": "sqlite-vec"} | options
    publish_by_hand(store, list(range(ROWS)), VECTORS, **options)
    return store


def test_a_damaged_copy_is_fetched_again_by_the_reader_that_has_it_open(
    tmp_path: Path, face: Face, sealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand(tmp_path / "store", sealed=sealed)
    search = SqliteVecShard.payloads
    cache_module._hashed.clear()
    with vector_reader(face, tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        good = [hit.id for hit in reader.search(VECTORS[0], 5).results]
        copy = next((tmp_path / "cache").rglob("shard.db"))
        inode = copy.stat().st_ino

        def fails(self: SqliteVecShard, rows: Any) -> Any:
            if copy.stat().st_ino == inode:
                raise IntegrityError("the copy is damaged")
            return search(self, rows)

        monkeypatch.setattr(SqliteVecShard, "payloads", fails)
        if sealed:
            copy.write_bytes(copy.read_bytes()[:-1])
        with pytest.raises(IntegrityError, match="the copy is damaged"):
            reader.search(VECTORS[0], 5)
        assert [hit.id for hit in reader.search(VECTORS[0], 5).results] == good


def test_a_damaged_shard_is_given_to_nobody_else_while_others_use_it(tmp_path: Path) -> None:
    by_hand(tmp_path / "store")
    with vector_reader("sync", tmp_path / "store", cache_dir=tmp_path / "cache") as reader:
        handles = reader._core.served.shards
        with handles.borrow(0) as held:
            with suppress(IntegrityError), handles.borrow(0) as opened:
                assert opened is held
                raise IntegrityError("told")
            with handles.borrow(0) as another:
                assert another is not held
                assert another.index.rows == ROWS
            assert held.index.rows == ROWS
        assert held._closed
        assert not another._closed


def test_a_cache_that_was_tidied_away_is_made_again(tmp_path: Path, face: Face) -> None:
    by_hand(tmp_path / "store", centroids=clustered(3, DIM))
    cache = tmp_path / "cache"
    with vector_reader(face, tmp_path / "store", cache_dir=cache) as reader:
        reader.search(VECTORS[0], 5, shard_ids=[0])
        cache.rename(tmp_path / "gone")
        assert reader.search(VECTORS[0], ROWS, shard_ids=[1, 2]).results


def test_a_cache_that_cannot_be_used_is_a_typed_error(tmp_path: Path, face: Face) -> None:
    by_hand(tmp_path / "store")
    cache = tmp_path / "cache"
    with vector_reader(face, tmp_path / "store", cache_dir=cache) as reader:
        cache.rmdir()
        cache.write_text("no folder")
        with pytest.raises(StoreError, match=str(cache)):
            reader.search(VECTORS[0], 5)
        cache.unlink()
        cache.mkdir(mode=0o700)
        blocked = shard_digest(reader._core.state.shards[0].objects)
        (cache / f"{blocked}.lock").mkdir()
        with pytest.raises(StoreError, match=str(cache)):
            reader.search(VECTORS[0], 5)
