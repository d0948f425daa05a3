import posixpath
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sf_pipelines.snapshot.errors import ManifestError
from sf_pipelines.snapshot.manifest.models import unsafe_key
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.unit.manifest_samples import sample_manifest

FILE_PREFIX = "file:///srv/my%20data/products"


def with_prefix(prefix: str) -> Any:
    return sample_manifest(prefix=prefix)


@pytest.mark.parametrize("prefix", ["s3://serving/products", FILE_PREFIX, "memory://x"])
def test_refs_below_the_prefix(prefix: str) -> None:
    key = "shards/run_id=r1/db=00003/attempt=00-0badcafe"
    assert with_prefix(prefix).key_of(f"{prefix}/{key}") == key
    assert with_prefix(prefix + "/").key_of(f"{prefix}/{key}") == key


def test_a_file_ref_is_unquoted_once() -> None:
    manifest = with_prefix(FILE_PREFIX)
    assert manifest.key_of(f"{FILE_PREFIX}/a%20b/%C3%A9") == "a b/é"


def test_a_local_store_reads_back_its_own_addresses(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "my data" / "50%", create=True)
    manifest = with_prefix(store.url)
    for key in ("a b/é", "shards/run_id=r1/db=00000/x", "a#b/c?d"):
        assert manifest.key_of(store.url_of(key)) == key


@pytest.mark.parametrize(
    "tail",
    [
        "",
        "/",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "./a",
        "a/./b",
        "a//b",
        "/etc/passwd",
        "a/",
        "a\\..\\b",
        "a/%2e%2e/b",
        "%2e%2e/b",
        "%2E%2E%2Fb",
        "%252e%252e/b",
        "..%2fb",
        "%5c",
        "a\x00b",
        "a%00b",
        "a\nb",
        "%ff",
        "a\u202eb",
        "\ud800",
    ],
)
@pytest.mark.parametrize("prefix", ["s3://serving/products", FILE_PREFIX])
def test_tricks(prefix: str, tail: str) -> None:
    ref = f"{prefix}/{tail}"
    with pytest.raises(ManifestError, match="ref '"):
        with_prefix(prefix).key_of(ref)


@pytest.mark.parametrize(
    "ref",
    [
        "s3://serving/products",
        "s3://serving/products-old/x",
        "s3://serving/product/x",
        "s3://Serving/products/x",
        "s3://serving//products/x",
        "s3://other/products/x",
        "file:///etc/passwd",
        "https://serving/products/x",
        "/etc/passwd",
        "shards/x",
        "",
    ],
)
def test_foreign_refs(ref: str) -> None:
    with pytest.raises(ManifestError, match=r"ref '.*' is not below the manifest's own 's3://serving/products'"):
        sample_manifest().key_of(ref)


fragments = st.lists(
    st.one_of(
        st.sampled_from(
            ["/", "..", ".", "\\", "%2e", "%2E", "%2f", "%5c", "%25", "%", "%00", "~", ":", "a", "etc", " ", "//"]
        ),
        st.text(max_size=3),
    ),
    max_size=12,
).map("".join)


@given(st.sampled_from(["s3://serving/products", FILE_PREFIX, "memory://x"]), fragments, st.booleans())
def test_nothing_resolves_outside_of_the_root(prefix: str, tail: str, whole: bool) -> None:
    ref = tail if whole else f"{prefix}/{tail}"
    try:
        key = with_prefix(prefix).key_of(ref)
    except ManifestError:
        return
    root = "/srv/root"
    # Neither as it is, nor after any client's unquoting.
    for form in (key, unquote(key), unquote(unquote(key))):
        resolved = posixpath.normpath(posixpath.join(root, form))
        assert resolved.startswith(root + "/")
        assert resolved == f"{root}/{form}"
    assert "\\" not in key


plain_segments = st.text(
    st.characters(categories=("L", "N"), include_characters="=-_. "), min_size=1, max_size=8
).filter(lambda text: text not in {".", ".."})


@given(st.lists(plain_segments, min_size=1, max_size=5).map("/".join))
def test_plain_keys_survive(key: str) -> None:
    assert unsafe_key(key) is None
    assert sample_manifest().key_of(f"s3://serving/products/{key}") == key
    assert with_prefix(FILE_PREFIX).key_of(f"{FILE_PREFIX}/{quote(key)}") == key


# The vector fields and ours.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", "16"),
        ("dim", 16.0),
        ("dim", True),
        ("dim", 0),
        ("metric", "euclid"),
        ("metric", 3),
        ("num_probes", 0),
        ("num_probes", "auto"),
        ("centroids_ref", 7),
        ("sharding_strategy", "random"),
        ("unified", "yes"),
        ("index_params", []),
        ("total_vectors", -1),
        ("num_hash_bits", 0),
    ],
)
def test_a_wrong_vector_field_is_named(field: str, value: object) -> None:
    custom = sample_manifest().custom
    manifest = sample_manifest(custom={"vector": custom["vector"] | {field: value}})
    with pytest.raises(ManifestError, match=rf"custom\.vector\.{field}"):
        _ = manifest.vector


@pytest.mark.parametrize(("field", "unified"), [("dim", False), ("dim", True), ("metric", True)])
def test_a_missing_vector_field_is_named(field: str, unified: bool) -> None:
    custom = sample_manifest().custom
    custom["vector"]["unified"] = unified
    del custom["vector"][field]
    with pytest.raises(ManifestError, match=rf"custom\.vector\.{field}"):
        _ = sample_manifest(custom=custom).vector


def test_vector_only_snapshots_have_the_defaults_of_the_format() -> None:
    found = sample_manifest(custom={"vector": {"dim": 4}}).vector
    assert (found.metric, found.sharding_strategy, found.num_probes) == ("cosine", "explicit", 1)


def test_no_vector_fields() -> None:
    with pytest.raises(ManifestError, match=r"custom\.vector is missing"):
        _ = sample_manifest(custom={}).vector


def test_extras_are_optional() -> None:
    assert sample_manifest(custom={}).extras is None
    extras = sample_manifest().extras
    assert extras is not None
    assert extras.recall is not None
    assert (extras.build_key, extras.row_count, extras.recall.k) == ("bk", 30, 10)


@pytest.mark.parametrize(("extras", "found"), [({"version": 2, "new": 1}, "2"), ({"build_key": "x"}, "'missing'")])
def test_extras_of_another_version_are_an_error(extras: dict[str, Any], found: str) -> None:
    with pytest.raises(ManifestError, match=rf"custom\.sf_pipelines\.version is {found}, must be 1"):
        _ = sample_manifest(custom={"sf_pipelines": extras}).extras


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id_type", "float"),
        ("backend", "faiss"),
        ("vector_type", "int8"),
        ("recall.k", "x"),
        ("recall.k", [1]),
        ("recall.k", 0),
        ("recall.k", 2_000_000),
        ("recall.min_recall", "0.9"),
        ("recall.curve", 3),
    ],
)
def test_wrong_extras_are_named(field: str, value: Any) -> None:
    custom = sample_manifest().custom
    part, _, name = field.rpartition(".")
    (custom["sf_pipelines"][part] if part else custom["sf_pipelines"])[name] = value
    with pytest.raises(ManifestError, match=rf"custom\.sf_pipelines\.{field}"):
        _ = sample_manifest(custom=custom).extras


@pytest.mark.parametrize(
    ("values", "match"),
    [(["a"], "1 values for 4 shards"), (["a", "b", "c", "d", "e"], "5 values for 4 shards")],
)
def test_routing_values_for_every_shard(values: list[str], match: str) -> None:
    sharding = {
        "strategy": "cel",
        "hash_algorithm": "xxh3_64",
        "cel_expr": "r",
        "cel_columns": {"r": "string"},
        "routing_values": values,
    }
    with pytest.raises(ManifestError, match=match):
        sample_manifest(sharding=sharding, custom={}).validated()


def test_unified_snapshots_have_real_sharding() -> None:
    custom = {"vector": {"dim": 4, "metric": "l2", "unified": True, "backend": "lancedb", "kv_backend": "sqlite"}}
    assert sample_manifest(key_encoding="u64be", custom=custom).validated().vector.unified
