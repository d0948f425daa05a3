"""Manifests of every kind with fields that are missing, wrong, hostile or of another version."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import DigestMismatchError, ManifestError, ObjectMissingError, SnapshotKindError
from sf_pipelines.snapshot.manifest.pointer import manifest_name
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.reader.reader import open_reader
from sf_pipelines.snapshot.reader.state import SnapshotState, load_current
from sf_pipelines.snapshot.routing.lsh import MOST_BITS
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.snapshots import point_at
from sf_pipelines_tests.unit.manifest_samples import sabotaged, sample_manifest

DIM, SHARDS = 4, 3
REF = "file:///elsewhere/store"
EXTRAS = {"version": 1, "build_key": "b", "gate_key": "g", "index_family": "flat", "id_type": "int64", "row_count": 0}
CLUSTER = {"dim": DIM, "sharding_strategy": "cluster", "centroids_ref": f"{REF}/vector_meta/m.npy"}
LSH = {"dim": DIM, "sharding_strategy": "lsh", "hyperplanes_ref": f"{REF}/vector_meta/m.npy"}
CEL = {"dim": DIM, "sharding_strategy": "cel", "cel_expr": "region", "cel_columns": {"region": "string"}}
EXPLICIT = {"dim": DIM, "sharding_strategy": "explicit"}
UNIFIED = {"dim": DIM, "unified": True, "metric": "l2", "backend": "sqlite-vec", "kv_backend": "sqlite-vec"}
UNIFIED_CEL = {"strategy": "cel", "cel_expr": "key % 3", "cel_columns": {"key": "int"}}


class WatchedStore(Store):
    """Notes every key that is touched."""

    touched: list[str]

    @contextmanager
    def _translated(self, action: str, key: str) -> Iterator[None]:
        self.touched.append(key)
        with super()._translated(action, key):
            yield


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    found = WatchedStore.open(tmp_path / "store", create=True)
    found.touched = []
    return found


def saved(rows: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, rows, **options)
    return file.getvalue()


def offer(
    store: Store,
    vector: dict[str, Any],
    *,
    matrix: Any = None,
    extras: dict[str, Any] | None = None,
    sharding: dict[str, Any] | None = None,
    shard_url: str | None = None,
    **meta: Any,
) -> None:
    """Publishes an (empty) snapshot whatever it says; an honest writer would refuse."""
    rows = np.eye(SHARDS, DIM, dtype=np.float32) if matrix is None else matrix
    store.put("vector_meta/m.npy", rows if isinstance(rows, bytes) else saved(rows))
    custom = {"vector": vector} | ({} if extras is None else {"sf_pipelines": extras})
    values = {"num_dbs": SHARDS, "custom": json.dumps(custom)} | meta
    if vector.get("unified") is True:
        values["key_encoding"] = "u64be"
    if sharding is not None:
        values["sharding"] = json.dumps({"hash_algorithm": "xxh3_64", **sharding})
    honest = sample_manifest(prefix=REF, custom={}, shards=())
    statements: list[tuple[str, tuple[Any, ...]]] = [
        # Names are those of this module's tests.
        (f"UPDATE build_meta SET {name} = ?", (value,))  # noqa: S608
        for name, value in values.items()
    ]
    if shard_url is not None:
        shard = "INSERT INTO shards (db_id, db_url, attempt, row_count, db_bytes) VALUES (0, ?, 0, 1, 1)"
        statements.append((shard, (shard_url,)))
    name = manifest_name(honest.run_id, honest.created_at)
    store.put(name, sabotaged(*statements, manifest=honest))
    point_at(store, name, honest.run_id)


def load(store: Store) -> SnapshotState:
    return load_current(store)


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


# What is left out.


@pytest.mark.parametrize(
    ("vector", "kind", "strategy"),
    [
        (CLUSTER, "vector", "cluster"),
        (LSH, "vector", "lsh"),
        (CEL, "vector", "cel"),
        (EXPLICIT, "vector", "explicit"),
        ({"dim": DIM}, "vector", "explicit"),
        (UNIFIED, "unified", "hash"),
    ],
)
def test_what_readers_of_the_format_do_without_may_be_missing(
    store: WatchedStore, vector: dict[str, Any], kind: str, strategy: str
) -> None:
    offer(store, vector)
    state = load(store)
    assert (state.kind, state.routing.strategy, state.vector_type) == (kind, strategy, "float32")
    assert state.backend == ("sqlite-vec" if vector is UNIFIED else None)
    assert state.metric == ("l2" if vector is UNIFIED else "cosine")
    assert state.vector.num_probes == 1


def test_extras_say_how_vectors_are_stored(store: WatchedStore) -> None:
    offer(store, LSH, extras=EXTRAS | {"backend": "sqlite-vec", "vector_type": "float16"})
    state = load(store)
    assert (state.backend, state.vector_type, state.is_ours) == ("sqlite-vec", "float16", True)


@pytest.mark.parametrize(
    ("vector", "missing"),
    [
        (CLUSTER, "centroids_ref"),
        (LSH, "hyperplanes_ref"),
        (CEL, "cel_expr"),
        (CEL, "cel_columns"),
        *((fields, "dim") for fields in (CLUSTER, LSH, CEL, EXPLICIT, UNIFIED)),
        (UNIFIED, "metric"),
    ],
)
def test_a_missing_field_is_named(store: WatchedStore, vector: dict[str, Any], missing: str) -> None:
    offer(store, without(vector, missing))
    with pytest.raises(ManifestError, match=rf"custom\.vector\.{missing}"):
        load(store)


@pytest.mark.parametrize("missing", ["cel_expr", "cel_columns"])
def test_a_missing_field_of_unified_cel_is_named(store: WatchedStore, missing: str) -> None:
    offer(store, UNIFIED, sharding=without(UNIFIED_CEL, missing))
    with pytest.raises(ManifestError, match=rf"build_meta\.sharding.*{missing}"):
        load(store)


@pytest.mark.parametrize("missing", ["build_key", "id_type", "row_count", "index_family"])
def test_a_missing_extra_is_named(store: WatchedStore, missing: str) -> None:
    offer(store, CLUSTER, extras=without(EXTRAS, missing))
    with pytest.raises(ManifestError, match=rf"custom\.sf_pipelines\.{missing}"):
        load(store)


# What is wrong.


@pytest.mark.parametrize(
    ("vector", "field"),
    [
        *(
            (fields | {name: value}, f"custom.vector.{name}")
            for fields in (CLUSTER, LSH, CEL, EXPLICIT, UNIFIED)
            for name, value in (
                ("dim", "4"),
                ("dim", 0),
                ("dim", 10**9),
                ("metric", "hamming"),
                ("metric", None),
                ("num_probes", 0),
                ("num_probes", 1.5),
                ("sharding_strategy", "random"),
                ("unified", "yes"),
                ("backend", "faiss"),
            )
        ),
        (CLUSTER | {"centroids_ref": 7}, "custom.vector.centroids_ref"),
        (LSH | {"hyperplanes_ref": ["x"]}, "custom.vector.hyperplanes_ref"),
        (LSH | {"num_hash_bits": 0}, "custom.vector.num_hash_bits"),
        (LSH | {"num_hash_bits": 10**12}, "custom.vector.num_hash_bits"),
        (LSH | {"num_hash_bits": 4000}, "custom.vector.num_hash_bits"),
        (LSH | {"num_hash_bits": "3"}, "custom.vector.num_hash_bits"),
        (CEL | {"cel_expr": 3}, "custom.vector.cel_expr"),
        (CEL | {"cel_expr": "region +"}, "custom.vector.cel_expr"),
        (CEL | {"cel_expr": "nowhere"}, "custom.vector.cel_expr"),
        (CEL | {"cel_expr": "true"}, "custom.vector.cel_expr"),
        (CEL | {"cel_expr": "[1, 2].all(x, x > 0) ? 1 : 2"}, "custom.vector.cel_expr"),
        (CEL | {"cel_expr": "'" + "x" * 5000 + "'"}, "custom.vector.cel_expr"),
        (CEL | {"cel_expr": "(" * 2000 + "1" + ")" * 2000}, "custom.vector.cel_expr"),
        (CEL | {"cel_columns": ["region"]}, "custom.vector.cel_columns"),
        (CEL | {"cel_columns": {"region": "text"}}, "custom.vector.cel_columns"),
        (CEL | {"cel_columns": {f"c{n}": "int" for n in range(100)}}, "custom.vector.cel_columns"),
        (CEL | {"routing_values": "abc"}, "custom.vector.routing_values"),
        (CEL | {"routing_values": ["a", "b"]}, "custom.vector.routing_values"),
        (CEL | {"routing_values": ["a", "b", "a"]}, "custom.vector.routing_values"),
        (CEL | {"routing_values": ["a", "b", 3]}, "custom.vector.routing_values"),
        (CEL | {"routing_values": [1, 2, 3]}, "custom.vector.cel_expr"),
        (CEL | {"routing_values": [{"__bytes_hex__": "xx"}] * 3}, "custom.vector.routing_values"),
        (CEL | {"routing_values": [{"hex": "00"}] * 3}, "custom.vector.routing_values"),
    ],
)
def test_a_wrong_vector_field_is_named(store: WatchedStore, vector: dict[str, Any], field: str) -> None:
    offer(store, vector, key_encoding="u64be" if vector.get("kv_backend") else "raw")
    with pytest.raises(ManifestError, match=field.replace(".", r"\.")):
        load(store)


@pytest.mark.parametrize(
    ("sharding", "field"),
    [
        ({"strategy": "cluster"}, "strategy"),
        ({"strategy": "hash", "hash_algorithm": "md5"}, "hash_algorithm"),
        (UNIFIED_CEL | {"cel_expr": "key %"}, "cel_expr"),
        (UNIFIED_CEL | {"cel_columns": {"key": "text"}}, "cel_columns"),
        (UNIFIED_CEL | {"routing_values": [1, 2]}, "routing_values"),
        (UNIFIED_CEL | {"routing_values": [1, 2, 1]}, "names a value twice"),
        (UNIFIED_CEL | {"routing_values": ["a", "b", "c"]}, "cel_expr"),
    ],
)
def test_a_wrong_sharding_field_is_named(store: WatchedStore, sharding: dict[str, Any], field: str) -> None:
    offer(store, UNIFIED, sharding=sharding)
    with pytest.raises(ManifestError, match=rf"build_meta\.sharding.*{field}"):
        load(store)


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"version": 2}, "version is 2, must be 1"),
        ({"version": "1"}, "version is '1', must be 1"),
        ({"backend": "faiss"}, "backend"),
        ({"vector_type": "float8"}, "vector_type"),
        ({"row_count": 7}, "row_count is 7, but the shards have 0"),
        ({"routing_sha256": "x"}, "routing_sha256"),
        ({"id_type": 1}, "id_type"),
        ({"filter_columns": ["a"]}, "filter_columns"),
    ],
)
@pytest.mark.parametrize("vector", [CLUSTER, LSH, CEL, EXPLICIT, UNIFIED], ids=str)
def test_a_wrong_extra_is_named(store: WatchedStore, vector: dict[str, Any], extra: dict[str, Any], field: str) -> None:
    offer(store, vector, extras=EXTRAS | extra)
    with pytest.raises(ManifestError, match=rf"custom\.sf_pipelines\.{field}"):
        load(store)


@pytest.mark.parametrize("version", [1, 3, 5])
@pytest.mark.parametrize("vector", [CLUSTER, LSH, CEL, EXPLICIT, UNIFIED], ids=str)
def test_another_version_of_the_format_is_refused(store: WatchedStore, vector: dict[str, Any], version: int) -> None:
    offer(store, vector, format_version=version)
    with pytest.raises(ManifestError, match=f"format_version is {version}, must be 4"):
        load(store)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_backend": "slatedb"}, "kv_backend is 'slatedb'"),
        ({"kv_backend": None}, "kv_backend is absent, which means 'slatedb'"),
        ({"backend": "lancedb"}, r"kv_backend is 'sqlite-vec' \(backend 'lancedb'\)"),
        ({"backend": None, "kv_backend": None}, r"kv_backend is absent, which means 'slatedb' \(backend 'lancedb'\)"),
    ],
)
def test_keys_in_slatedb_are_not_served(store: WatchedStore, fields: dict[str, Any], said: str) -> None:
    offer(store, UNIFIED | fields)
    with pytest.raises(SnapshotKindError, match=f"custom.vector.{said}.*write the snapshot with kv_backend"):
        load(store)


# Hostile.


@pytest.mark.parametrize("vector", [CLUSTER, LSH])
@pytest.mark.parametrize(
    "ref",
    [
        f"{REF}/../secret.npy",
        f"{REF}/a/%2e%2e/secret.npy",
        f"{REF}//secret.npy",
        f"{REF}-other/secret.npy",
        "s3://other/secret.npy",
        "/etc/passwd",
        "vector_meta/m.npy",
        f"{REF}/",
        "",
    ],
)
def test_a_ref_cannot_leave_the_root(store: WatchedStore, vector: dict[str, Any], ref: str) -> None:
    name = "centroids_ref" if vector is CLUSTER else "hyperplanes_ref"
    offer(store, vector | {name: ref})
    assert store.local_root is not None
    (store.local_root.parent / "secret.npy").write_bytes(saved(np.eye(SHARDS, DIM)))
    store.touched.clear()
    with pytest.raises(ManifestError, match=rf"custom\.vector\.{name}"):
        load(store)
    assert all(key == "_CURRENT" or key.startswith("manifests/") for key in store.touched)
    assert store.touched


@pytest.mark.parametrize("vector", [CLUSTER, LSH, EXPLICIT, UNIFIED], ids=str)
@pytest.mark.parametrize("url", [f"{REF}/../shards/db=0", "s3://other/shards/db=0", f"{REF}/shards/%2e%2e/x"])
def test_a_shard_cannot_leave_the_root(store: WatchedStore, vector: dict[str, Any], url: str) -> None:
    offer(store, vector, shard_url=url)
    store.touched.clear()
    with pytest.raises(ManifestError, match=r"shards row db_id=0 db_url"):
        load(store)
    assert all(key == "_CURRENT" or key.startswith("manifests/") for key in store.touched)


def header(shape: str, descr: str = "'<f4'", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("vector", [CLUSTER, LSH, LSH | {"num_hash_bits": 3}], ids=["cluster", "lsh", "lsh with bits"])
@pytest.mark.parametrize(
    "matrix",
    [
        saved(np.empty((SHARDS, DIM), dtype=object), allow_pickle=True),
        saved(np.eye(SHARDS, DIM + 1)),
        saved(np.eye(SHARDS, DIM).ravel()),
        saved(np.float64(3)),
        saved(np.eye(SHARDS, DIM, dtype=np.int64)),
        saved(np.full((SHARDS, DIM), np.nan)),
        saved(np.full((SHARDS, DIM), 1e300)),
        saved(np.empty((0, DIM))),
        saved(np.eye(SHARDS, DIM))[:-1],
        header("(1000000000000, 4)"),
        header("(3, 4)"),
        header("(-3, 4)"),
        header("(3, 4, 10**9)"),
        header("(3, 4)", descr="[('a', '<f4')]"),
        header("(3, 4)", descr="'|O'"),
        header("(3, 4)", version=b"\x03\x00"),
        header("(" * 400),
        header("-" * 9000 + "1"),
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f",
        b"",
    ],
)
def test_a_hostile_matrix_is_refused(store: WatchedStore, vector: dict[str, Any], matrix: bytes) -> None:
    offer(store, vector, matrix=matrix)
    with pytest.raises(ManifestError, match=r"custom\.vector\.(centroids|hyperplanes)_ref file:"):
        load(store)


def test_bits_and_hyperplanes_must_agree(store: WatchedStore) -> None:
    offer(store, LSH | {"num_hash_bits": 5})
    with pytest.raises(ManifestError, match=r"hyperplanes_ref .* has shape \(3, 4\), must be \(5, 4\)"):
        load(store)
    offer(store, LSH, matrix=np.ones((MOST_BITS + 1, DIM)))
    with pytest.raises(ManifestError, match=f"has {MOST_BITS + 1} rows, must have 1 to {MOST_BITS}"):
        load(store)
    offer(store, LSH, matrix=np.ones((MOST_BITS, DIM)))
    assert load(store).routing.num_dbs == SHARDS


@pytest.mark.parametrize("vector", [CLUSTER, LSH])
def test_sealed_matrices_are_compared(store: WatchedStore, vector: dict[str, Any]) -> None:
    offer(store, vector, extras=EXTRAS | {"routing_sha256": "0" * 64})
    with pytest.raises(DigestMismatchError, match=r"custom\.vector\.\w+_ref .* the manifest says 0000"):
        load(store)
    offer(store, vector)
    store.delete("vector_meta/m.npy")
    with pytest.raises(ObjectMissingError, match=r"m\.npy"):
        load(store)


@pytest.mark.parametrize("num_dbs", [0, -1, 10**6, 2**62, 1.5])
@pytest.mark.parametrize("vector", [CLUSTER, LSH, CEL, EXPLICIT, UNIFIED], ids=str)
def test_impossible_numbers_of_shards_are_refused(store: WatchedStore, vector: dict[str, Any], num_dbs: Any) -> None:
    offer(store, vector, num_dbs=num_dbs)
    with pytest.raises(ManifestError, match=r"build_meta\.num_dbs"):
        load(store)


def test_many_routing_values_are_read_in_linear_time(store: WatchedStore) -> None:
    values = [f"v{at}" for at in range(60_000)]
    offer(store, CEL | {"routing_values": values}, num_dbs=len(values))
    started = time.process_time()
    assert load(store).routing.num_dbs == len(values)
    assert time.process_time() - started < 10


def test_a_manifest_without_vectors_is_of_another_kind(store: WatchedStore) -> None:
    offer(store, CLUSTER, custom="{}")
    with pytest.raises(SnapshotKindError, match="key-value snapshot, which has nothing to search"):
        load(store)


def test_bytes_are_routing_values(store: WatchedStore, tmp_path: Path) -> None:
    values = [{"__bytes_hex__": text} for text in ("ff", "fe", "")]
    offer(store, CEL | {"cel_columns": {"region": "bytes"}, "routing_values": values})
    assert store.local_root is not None
    with open_reader(store.local_root, cache_dir=tmp_path / "cache") as reader:
        answer = reader.search(np.ones(DIM), routing_context={"region": b"\xfe"})
        assert (answer.shard_ids, answer.results) == ([1], [])
        assert reader.snapshot_info().metric is DistanceMetric.COSINE
