"""Combinations of options that mean nothing, or cannot be built, are refused with the field's name."""

from typing import Any

import pytest

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError

BASE: dict[str, Any] = {"name": "n", "source": "s", "store": "/t", "num_dbs": 2}
CEL = {"strategy": "cel", "cel_expr": "a", "cel_columns": {"a": "int"}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"sharding": {"strategy": "cluster", "training_rows": 1}}, r"training_rows 1 is less than num_dbs 2"),
        ({"sharding": {"num_probes": 3}}, r"sharding\.num_probes 3 is more than num_dbs 2"),
        ({"sharding": {"strategy": "hash"}}, "'hash', which needs key_value"),
        ({"sharding": CEL | {"routing_values": [1]}}, "routing_values has 1 values for num_dbs 2"),
        ({"sharding": CEL | {"routing_values": [True, False]}}, r"routing_values\.0"),
        ({"sharding": CEL | {"routing_values": [1.0, 2.0]}}, r"routing_values\.0"),
        ({"sharding": CEL | {"routing_values": [2**70, 1]}}, "no number that an expression can give"),
        ({"sharding": CEL | {"routing_values": ["\ud800", "b"]}}, "cannot be written as UTF-8"),
        ({"sharding": CEL | {"routing_values": ["a", "a"]}}, "more than once"),
        ({"sharding": CEL | {"cel_expr": "a" * 5000}}, r"sharding\.cel_expr"),
        ({"sharding": CEL | {"cel_columns": {}}}, r"sharding\.cel_columns"),
        ({"backend": "sqlite-vec", "index_params": {"m": 64}}, r"index_params\.m means nothing"),
        ({"backend": "sqlite-vec", "dim": 8193, "metric": "l2"}, "up to 8192 numbers, and dim is 8193"),
        ({"index_type": "flat", "index_params": {"num_partitions": 4}}, r"index_params\.num_partitions means nothing"),
        ({"index_type": "ivf_sq", "index_params": {"ef_construction": 40}}, r"index_params\.ef_construction"),
        ({"vector_fn_version": "2"}, "vector_fn_version means nothing without vector_fn"),
        ({"vector_fn": "m:f", "vector_fn_cols": ["a"], "vector_col": "v"}, "vector_col and vector_fn exclude"),
        ({"vector_fn": "m:f", "vector_fn_cols": ["a", "a"]}, "names a column twice"),
        ({"vector_fn": "no function", "vector_fn_cols": ["a"]}, "vector_fn"),
    ],
)
def test_a_vector_spec_that_makes_no_sense_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WriteConfig(**BASE, vector_spec={"dim": 4, **spec})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["a.b", "a`b", "a\0b"])
def test_a_filter_column_that_looks_nested_or_would_be_cut_off_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a dot or a backtick"):
        WriteConfig(**BASE, filter_cols=(name,), vector_spec={"dim": 4})  # pyright: ignore[reportArgumentType]


def test_options_that_the_index_has_are_taken() -> None:
    spec: Any = {"dim": 4, "index_type": "hnsw", "index_params": {"m": 8, "num_partitions": 2}}
    assert WriteConfig(**BASE, vector_spec=spec).vector_spec.index_params.m == 8
