import pyarrow as pa
import pytest

from sf_pipelines.snapshot.errors import QueryError
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.testing.routing import RowRoutingConformance


class TestExplicitConforms(RowRoutingConformance):
    def routing(self) -> ExplicitRouting:
        return ExplicitRouting(4)

    def good_rows(self) -> pa.RecordBatch:
        return pa.record_batch({"shard_id": pa.array([0, 3, 1]), "other": ["x"] * 3})

    def bad_rows(self) -> pa.RecordBatch:
        return pa.record_batch({"shard_id": pa.array([None, 4, -1, 2**62, -(2**63)], pa.int64())})

    def bad_schema(self) -> pa.Schema:
        return pa.schema({"shard_id": pa.string()})

    def locates(self) -> bool:
        return False


INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_any_width(kind: pa.DataType) -> None:
    placed = ExplicitRouting(100).place(pa.record_batch({"shard_id": pa.array([0, 99, None, 100, 127], kind)}))
    assert placed.shards.tolist() == [0, 99, -1, -1, -1]
    assert placed.faults == {
        2: "shard_id is null",
        3: "shard_id 100 is not one of the shards 0 to 99",
        4: "shard_id 127 is not one of the shards 0 to 99",
    }


def test_a_number_that_would_wrap_around_is_no_shard() -> None:
    placed = ExplicitRouting(4).place(pa.record_batch({"shard_id": pa.array([2**32, 2**64 - 1], pa.uint64())}))
    assert placed.shards.tolist() == [-1, -1]
    assert "4294967296" in placed.faults[0]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_floats_must_be_whole(kind: pa.DataType) -> None:
    values = pa.array([0.0, 2.5, float("nan"), float("inf"), -0.5, 3.0, None], kind)
    placed = ExplicitRouting(4).place(pa.record_batch({"shard_id": values}))
    assert placed.shards.tolist() == [0, -1, -1, -1, -1, 3, -1]
    assert placed.faults[1] == "shard_id 2.5 is not a whole number"
    assert placed.faults[2] == "shard_id nan is not a whole number"
    assert placed.faults[6] == "shard_id is null"


def test_queries_must_name_shards() -> None:
    with pytest.raises(QueryError, match="pass shard_ids"):
        ExplicitRouting(4).locate({"shard_id": 1})
