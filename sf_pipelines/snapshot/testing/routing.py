"""What every way to shard must do: classes to subclass in your tests.

Example:
    class TestMine(VectorRoutingConformance):
        def routings(self) -> Iterable[VectorRouting]:
            yield MyRouting(...)
"""

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.errors import QueryError, SourceSchemaError
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.routing.protocol import Int32, RowRouting, VectorRouting
from sf_pipelines.snapshot.testing.expect import expect, refused, same


class VectorRoutingConformance(ABC):
    """A routing by vectors: assignment, the order of probes, and that neither depends on the batch."""

    @abstractmethod
    def routings(self) -> Iterable[VectorRouting]:
        """Routings to try, of different sizes."""

    def vectors(self, routing: VectorRouting) -> Float32:
        """Vectors to route: random ones of several lengths, zero, the trained rows, and sums of two of these."""
        rng = np.random.default_rng(0)
        matrix = routing.matrix
        pairs = matrix[rng.integers(0, len(matrix), 40)] + matrix[rng.integers(0, len(matrix), 40)]
        random = rng.standard_normal((200, routing.dim)) * 10.0 ** rng.integers(-3, 4, (200, 1))
        parts = [random, matrix, pairs / 2, pairs / 4, np.zeros((1, routing.dim))]
        return np.concatenate(parts).astype(np.float32)

    def test_every_vector_has_a_shard(self) -> None:
        """Shard ids are int32 within range, for none and for many vectors."""
        for routing in self.routings():
            for rows in (self.vectors(routing), self.vectors(routing)[:0]):
                _expect_shards(routing.assign(rows), len(rows), routing.num_dbs)

    def test_the_batch_plays_no_part(self) -> None:
        """One vector alone, a slice, another order and another memory layout route as the whole batch does."""
        for routing in self.routings():
            rows = self.vectors(routing)
            whole, (order, distances) = routing.assign(rows), routing.probe(rows)
            turned = np.random.default_rng(1).permutation(len(rows))
            same(routing.assign(rows[turned]), whole[turned], "assignment in another order")
            same(routing.assign(np.asfortranarray(rows)), whole, "assignment of columns in a row")
            same(routing.assign(rows[3:]), whole[3:], "assignment of a slice")
            for at in range(0, len(rows), 7):
                one = rows[at : at + 1]
                same(routing.assign(one), whole[at : at + 1], f"assignment of vector {at} alone")
                alone, far = routing.probe(one)
                same(alone[0], order[at], f"probes of vector {at} alone")
                np.testing.assert_allclose(far[0], distances[at], rtol=1e-9, atol=1e-12)

    def test_probes_are_all_shards_from_home_outward(self) -> None:
        """Each shard once, home first, distances growing; shapes as promised."""
        for routing in self.routings():
            rows = self.vectors(routing)
            order, distances = routing.probe(rows)
            same(order.dtype, np.dtype(np.int32), "type of probes")
            same((order.shape, distances.shape), ((len(rows), routing.num_dbs),) * 2, "shapes")
            same(np.sort(order, axis=1), np.tile(np.arange(routing.num_dbs), (len(rows), 1)), "shards probed")
            same(order[:, 0], routing.assign(rows), "first probes")
            expect(bool((distances[:, 1:] >= distances[:, :-1]).all()), "distances do not grow, or are NaN")

    def test_stock_probes_begin_at_home(self) -> None:
        """Different shards, home first, then -1 only."""
        for routing in self.routings():
            rows = self.vectors(routing)
            for count in (1, 2, routing.num_dbs + 3):
                probes = routing.stock_probe(rows, count)
                same((probes.dtype, probes.shape), (np.dtype(np.int32), (len(rows), count)), "type and shape")
                same(probes[:, 0], routing.assign(rows), "first stock probes")
                ended = probes < 0
                expect(bool((ended[:, 1:] >= ended[:, :-1]).all()), "a shard after the last")
                for row in probes:
                    known = row[row >= 0]
                    _expect_shards(known, len(known), routing.num_dbs)
                    same(len(set(known.tolist())), len(known), "different shards")

    def test_it_says_what_it_is_and_cannot_be_changed(self) -> None:
        """The manifest's fields are JSON; the trained rows are read-only; a pickled copy routes alike."""
        for routing in self.routings():
            same(json.loads(json.dumps(routing.describe()))["sharding_strategy"], routing.strategy, "strategy")
            expect(not routing.matrix.flags.writeable, "the trained rows can be written to")
            same(routing.matrix.dtype, np.dtype(np.float32), "type of the trained rows")
            rows = self.vectors(routing)
            same(_copied(routing).assign(rows), routing.assign(rows), "assignment of a pickled copy")


class RowRoutingConformance(ABC):
    """A routing by columns: every row has a shard or a reason, and rows and queries agree."""

    @abstractmethod
    def routing(self) -> RowRouting:
        """The routing to try."""

    @abstractmethod
    def good_rows(self) -> pa.RecordBatch:
        """Rows that all have a shard; at least three, with columns beside the deciding ones."""

    @abstractmethod
    def bad_rows(self) -> pa.RecordBatch:
        """Rows of which none has a shard; the first is null."""

    @abstractmethod
    def bad_schema(self) -> pa.Schema:
        """The deciding columns with a type that cannot be used."""

    def bad_contexts(self) -> Iterable[Mapping[str, Any]]:
        """Contexts that name no shard."""
        return ({}, {"no such name": 1})

    def locates(self) -> bool:
        """Whether queries can be routed."""
        return True

    def test_good_rows_have_shards(self) -> None:
        """Shard ids are int32 within range, without a fault; rows alone, sliced and none at all."""
        routing, rows = self.routing(), self.good_rows()
        placed = routing.place(rows)
        _expect_shards(placed.shards, rows.num_rows, routing.num_dbs)
        same(placed.faults, {}, "faults of good rows")
        for at in range(rows.num_rows):
            same(routing.place(rows.slice(at, 1)).shards, placed.shards[at : at + 1], f"row {at} alone")
        same(routing.place(rows.slice(1)).shards, placed.shards[1:], "a slice")
        same(routing.place(rows.slice(0, 0)).shards.tolist(), [], "no rows")

    def test_bad_rows_have_reasons(self) -> None:
        """Each has shard -1 and a text that is not empty; good rows beside them keep theirs."""
        routing, good, bad = self.routing(), self.good_rows(), self.bad_rows()
        placed = routing.place(bad)
        same(placed.shards.tolist(), [-1] * bad.num_rows, "shards of bad rows")
        same(sorted(placed.faults), list(range(bad.num_rows)), "rows with faults")
        expect("null" in placed.faults[0], f"the fault of a null is {placed.faults[0]!r}")
        expect(all(placed.faults.values()), "a fault is empty")
        good, bad = good.select(routing.columns), bad.select(routing.columns)
        if good.schema.equals(bad.schema):
            both = pa.Table.from_batches([good, bad]).combine_chunks().to_batches()[0]
            mixed = routing.place(both)
            same(mixed.shards.tolist(), [*routing.place(good).shards.tolist(), *placed.shards.tolist()], "both")
            same(min(mixed.faults), good.num_rows, "first row with a fault")

    def test_rows_and_queries_agree(self) -> None:
        """``locate`` finds the shard in which ``place`` put the row, from several threads at once."""
        routing, rows = self.routing(), self.good_rows()
        contexts = pa.Table.from_batches([rows.select(routing.columns)]).to_pylist()
        if not self.locates():
            refused(QueryError, lambda: routing.locate(contexts[0]), "a query")
            return
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(routing.locate, contexts * 20))
        same(found, routing.place(rows).shards.tolist() * 20, "shards located")

    def test_bad_contexts_are_refused(self) -> None:
        """A query that names no shard is a typed error."""
        for context in self.bad_contexts():
            refused(QueryError, lambda context=context: self.routing().locate(context), f"the context {context!r}")

    def test_types_are_looked_at_first(self) -> None:
        """A column that is missing, twice there, or of a type that cannot be used is found without rows."""
        routing, schema = self.routing(), self.good_rows().schema
        routing.check_schema(schema)
        first = routing.columns[0]
        twice = schema.append(schema.field(first))
        without = schema.remove(schema.get_field_index(first))
        for wrong in (without, twice, self.bad_schema()):
            text = refused(SourceSchemaError, lambda wrong=wrong: routing.check_schema(wrong), f"the schema {wrong}")
            expect(first in text, f"{text!r} does not name {first}")

    def test_it_says_what_it_is(self) -> None:
        """The manifest's fields are JSON; a pickled copy routes alike."""
        routing, rows = self.routing(), self.good_rows()
        same(json.loads(json.dumps(routing.describe()))["sharding_strategy"], routing.strategy, "strategy")
        same(_copied(routing).place(rows).shards, routing.place(rows).shards, "shards by a pickled copy")


def _copied(routing: Any) -> Any:
    return pickle.loads(pickle.dumps(routing))  # noqa: S301 - its own bytes


def _expect_shards(shards: Int32, count: int, num_dbs: int) -> None:
    same((shards.dtype, shards.shape), (np.dtype(np.int32), (count,)), "type and shape of shards")
    expect(bool(((shards >= 0) & (shards < num_dbs)).all()), f"a shard is not one of 0 to {num_dbs - 1}")
