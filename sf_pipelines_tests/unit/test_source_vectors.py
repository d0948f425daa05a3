"""Vectors from a function, and vectors stored as float16."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, VectorFunctionError
from sf_pipelines.snapshot.source.contract import RowContract
from sf_pipelines.snapshot.source.files import SourceBatch

ROWS = pa.record_batch({"id": [1, 2, 3], "x": [1.0, 2.0, 3.0], "y": [0.5, 0.25, 0.0]})


def make_config(function: str, **more: Any) -> WriteConfig:
    spec: Any = {
        "dim": 2,
        "vector_fn": f"sf_pipelines_tests.vector_functions:{function}",
        "vector_fn_cols": ["x", "y"],
        "metric": "l2",
    }
    return WriteConfig(name="n", source="s", store="/t", num_dbs=1, vector_spec=spec | more)


@pytest.mark.parametrize("function", ["doubled", "as_matrix"])
def test_a_function_makes_the_vectors_of_other_columns(function: str) -> None:
    config = make_config(function)
    contract = RowContract(config, ROWS.schema)
    assert config.row_columns == ("id", "x", "y")

    checked = contract.check(SourceBatch(ROWS, 0, "f", 0))

    assert checked.vectors.tolist() == [[2, 0.5], [4, 0.25], [6, 0]]
    assert checked.stored.column("vector").to_pylist() == [[2, 0.5], [4, 0.25], [6, 0]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", "failed with ValueError: no model for 3 rows"),
        ("too_few", "gave 2 vectors for 3 rows"),
        ("no_lists", "gave double; it must give lists of 2 numbers"),
    ],
)
def test_a_function_that_gives_no_vectors_is_an_error(function: str, message: str) -> None:
    contract = RowContract(make_config(function), ROWS.schema)
    with pytest.raises(VectorFunctionError, match=message):
        contract.check(SourceBatch(ROWS, 0, "f", 0))


def test_a_function_of_another_dimension_is_an_error() -> None:
    contract = RowContract(make_config("doubled", dim=3), ROWS.schema)
    with pytest.raises(VectorFunctionError, match=r"gave 2 numbers a vector, vector_spec\.dim is 3"):
        contract.check(SourceBatch(ROWS, 0, "f", 0))


@pytest.mark.parametrize(("function", "message"), [("missing", "cannot be imported"), ("NOT_CALLABLE", "no function")])
def test_a_function_that_is_none_is_refused_with_the_configuration(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"vector_fn.*{message}"):
        RowContract(make_config(function), ROWS.schema)


def test_function_and_its_columns_go_together() -> None:
    with pytest.raises(ConfigError, match="vector_fn and vector_fn_cols go together"):
        make_config("doubled", vector_fn_cols=[])


def test_another_version_of_the_function_is_another_build() -> None:
    assert make_config("doubled").build_fields() != make_config("doubled", vector_fn_version="2").build_fields()


def half_contract(metric: str) -> RowContract:
    spec: Any = {"dim": 2, "metric": metric, "quantization": "fp16"}
    config = WriteConfig(name="n", source="s", store="/t", num_dbs=1, vector_spec=spec)
    return RowContract(config, pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), 2))]))


def batch(*vectors: list[float]) -> pa.RecordBatch:
    column = pa.array(vectors, pa.list_(pa.float32(), 2))
    return pa.record_batch([pa.array(np.arange(len(vectors))), column], names=["id", "vector"])


def test_float16_vectors_are_rounded_before_they_are_routed_and_stored() -> None:
    rows = batch([0.1, 1 / 3], [1.0, 2.0])
    expected = np.array([[0.1, 1 / 3], [1, 2]], dtype=np.float16).astype(np.float32)

    checked = half_contract("l2").check(SourceBatch(rows, 0, "f", 0))

    np.testing.assert_array_equal(checked.vectors, expected)
    assert checked.stored.column("vector").to_pylist() == expected.tolist()


def test_what_float16_cannot_hold_is_rejected() -> None:
    rows = batch([70_000.0, 0.0], [1e-9, 0.0], [1e-7, 2.5e-7], [1.0, 0.0])
    reasons = half_contract("cosine").check(SourceBatch(rows, 0, "f", 0)).rejects
    assert reasons.column("reason").to_pylist() == ["not_finite", "zero_norm", "norm_out_of_range"]
    kept = half_contract("l2").check(SourceBatch(rows, 0, "f", 0)).rejects
    assert kept.column("reason").to_pylist() == ["not_finite"]
    assert reasons.column("detail")[0].as_py() == "NaN or infinity (as float16)"
