"""How rows find their shard: the strategies as a user configures them."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    StrictBytes,
    StrictInt,
    StrictStr,
    Tag,
    field_serializer,
    field_validator,
)

from sf_pipelines.snapshot.model import ConfigModel

_LONGEST_EXPRESSION = 4096
_MOST_CEL_COLUMNS = 32

CelType = Literal["int", "uint", "double", "bool", "string", "bytes"]

ColumnName = Annotated[str, Field(min_length=1)]


class Strategy(ConfigModel):
    """What every strategy says of itself; the defaults are those of one that leaves everything open."""

    @property
    def most_shards(self) -> int | None:
        """The most shards that its own fields allow; None where they say nothing."""
        return None

    def check_number(self, where: str, num_dbs: int) -> None:
        """A ``ValueError`` where there cannot be so many shards."""

    def columns(self, id_col: str, *, keyed: bool) -> dict[str, str]:
        """Source column of each value that decides a row's shard, by the name that the strategy knows it by."""
        del id_col, keyed
        return {}


class ClusterSharding(Strategy):
    """Shards are k-means clusters; a query asks the ``num_probes`` shards with the nearest centroids.

    Attributes:
        num_probes: shards that a reader asks by default; ``"auto"`` takes the smallest number that meets the gate.
        training_rows: size of the training sample; None is 256 rows a shard, at least 10,000.
        seed: of k-means.
        max_iter: most rounds of k-means.
    """

    strategy: Literal["cluster"] = "cluster"
    num_probes: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    training_rows: Annotated[int, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    max_iter: Annotated[int, Field(gt=0)] = 50

    @property
    def most_shards(self) -> int | None:
        return self.training_rows

    def check_number(self, where: str, num_dbs: int) -> None:
        _check_probes(self.num_probes, where, num_dbs)
        if self.training_rows is not None and self.training_rows < num_dbs:
            raise ValueError(
                f"{where}.training_rows {self.training_rows} is less than num_dbs {num_dbs}: one row a shard at least"
            )


class LshSharding(Strategy):
    """Shards are the cells between random hyperplanes; a query asks the cells that lie nearest behind them.

    Attributes:
        num_probes: shards that a reader asks by default; ``"auto"`` takes the smallest number that meets the gate.
        num_hash_bits: hyperplanes; None takes as many as every shard needs to be reached and fairly filled.
        training_rows: size of the training sample; None is 256 rows a shard, at least 10,000.
        seed: of the random directions.
    """

    strategy: Literal["lsh"] = "lsh"
    num_probes: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    num_hash_bits: Annotated[int, Field(gt=0, le=24)] | None = None
    training_rows: Annotated[int, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    @property
    def most_shards(self) -> int | None:
        return None if self.num_hash_bits is None else 2**self.num_hash_bits

    def check_number(self, where: str, num_dbs: int) -> None:
        _check_probes(self.num_probes, where, num_dbs)
        if self.most_shards is not None and self.most_shards < num_dbs:
            raise ValueError(
                f"{where}.num_hash_bits {self.num_hash_bits} gives {self.most_shards} cells, too few for num_dbs "
                f"{num_dbs} shards"
            )


class ExplicitSharding(Strategy):
    """Each row names its shard; a query must name the shards that it asks.

    Attributes:
        shard_id_col: source column of whole numbers from 0 to ``num_dbs - 1``.
    """

    strategy: Literal["explicit"] = "explicit"
    shard_id_col: ColumnName = "shard_id"

    def columns(self, id_col: str, *, keyed: bool) -> dict[str, str]:
        del id_col, keyed
        return {"shard_id": self.shard_id_col}


class CelSharding(Strategy):
    """An expression over columns of the row names its shard; a query gives the same columns as its context.

    Attributes:
        cel_expr: expression in Google's Common Expression Language (https://cel.dev). It gives the shard's number, or,
            with ``routing_values``, one of these. ``shard_hash(x)`` is the stable hash of a number, string or bytes
            (unsigned: ``shard_hash(region) % 8u``).
        cel_columns: source columns that it uses, with their CEL types. In a snapshot with keys, ``key`` is the key.
        routing_values: value of each shard, in the order of the shards; None takes the value as the shard's number.
    """

    strategy: Literal["cel"] = "cel"
    cel_expr: Annotated[str, Field(min_length=1, max_length=_LONGEST_EXPRESSION)]
    cel_columns: Annotated[dict[ColumnName, CelType], Field(min_length=1, max_length=_MOST_CEL_COLUMNS)]
    routing_values: tuple[StrictInt | StrictStr | StrictBytes, ...] | None = None

    def columns(self, id_col: str, *, keyed: bool) -> dict[str, str]:
        return {name: id_col if keyed and name == "key" else name for name in self.cel_columns}

    @field_validator("routing_values")
    @classmethod
    def _one_type_no_repeats(cls, values: tuple[int | str | bytes, ...] | None) -> tuple[int | str | bytes, ...] | None:
        if values is None:
            return None
        if len({type(value) for value in values}) > 1:
            raise ValueError("the values must be all whole numbers, all text or all bytes")
        for value in values:
            if isinstance(value, int) and not -(2**63) <= value < 2**64:
                raise ValueError(f"{value} is no number that an expression can give")
            if isinstance(value, str) and not _is_text(value):
                raise ValueError(f"{value!r} cannot be written as UTF-8")
        repeated = sorted(repr(value) for value, times in Counter(values).items() if times > 1)
        if repeated:
            raise ValueError(f"names {', '.join(repeated)} more than once")
        return values

    @field_serializer("routing_values", when_used="json")
    def _bytes_as_hex(self, values: tuple[int | str | bytes, ...] | None) -> list[Any] | None:
        if values is None:
            return None
        return [{"__bytes_hex__": value.hex()} if isinstance(value, bytes) else value for value in values]


class HashSharding(Strategy):
    """The key's hash (xxh3, 64 bits) modulo ``num_dbs`` names the shard; a vector search asks all shards."""

    strategy: Literal["hash"] = "hash"

    def columns(self, id_col: str, *, keyed: bool) -> dict[str, str]:
        del keyed
        return {"key": id_col}


def _check_probes(num_probes: int | Literal["auto"], where: str, num_dbs: int) -> None:
    if num_probes != "auto" and num_probes > num_dbs:
        raise ValueError(f"{where}.num_probes {num_probes} is more than num_dbs {num_dbs}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tag(value: Any) -> str:
    """CLUSTER where no strategy is named. Tags are no identifiers, so that errors name the user's fields alone."""
    named = value.get("strategy", "cluster") if isinstance(value, dict) else getattr(value, "strategy", "")
    return f"{named}-sharding"


Sharding = Annotated[
    Annotated[ClusterSharding, Tag("cluster-sharding")]
    | Annotated[LshSharding, Tag("lsh-sharding")]
    | Annotated[ExplicitSharding, Tag("explicit-sharding")]
    | Annotated[CelSharding, Tag("cel-sharding")]
    | Annotated[HashSharding, Tag("hash-sharding")],
    Discriminator(
        _tag,
        custom_error_type="unknown_strategy",
        custom_error_message="strategy must be one of cluster, lsh, explicit, cel, hash",
    ),
]
