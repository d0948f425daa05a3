"""What the format checker found, by duty of a writer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sf_pipelines.snapshot.errors import IntegrityError


class Duty(StrEnum):
    """What a writer owes a stock reader; the value says it in a line."""

    POINTER = "_CURRENT has its four fields and a zoned date"
    MANIFEST_KEY = "the manifest is where history looks, and its run_id is used once"
    MANIFEST = "the manifest has both tables with every column, format_version 4 and a known key_encoding"
    SHARDING = "the sharding record is that of the kind"
    VECTOR = "custom.vector has the fields of the kind, and none of the other kind"
    SHARD_ROWS = "each shard that has rows is listed once, below the prefix, with fresh ids"
    ROUTING_ARRAYS = "centroids or hyperplanes load without pickle, float32, in the right shape"
    LANCE_TABLE = "each Lance table opens and has id, vector and payload"
    LANCE_INDEX = "each Lance shard has a trained index of the declared distance and of one family"
    LANCE_SEARCH = "a search without options finds the nearest rows with the declared scores"
    SQLITE_FILE = "each shard.db is a plain SQLite file with the tables of the kind"
    SQLITE_VECTORS = "each vec0 table holds one vector, one id and at most one payload per row"
    SQLITE_SEARCH = "the k-NN statement finds the nearest rows with the declared scores, none without one"
    KEY_VALUES = "kv holds one row per key in the declared encoding, and each is found"
    ROWS = "row_count is the number of rows, and ids are unique"
    DB_BYTES = "db_bytes is what the shard's files weigh"
    SIDECAR = "sidecars that the manifest mentions exist"
    ROUTING = "each row is in the shard where a reader looks for it"


# What the stock writer does not do itself: it leaves small Lance shards without a trained index (so that its own
# search answers in squared L2), weighs Lance shards before their last index, and claims sidecars that it did not write.
STOCK_DEFECTS = frozenset({Duty.LANCE_INDEX, Duty.LANCE_SEARCH, Duty.DB_BYTES, Duty.SIDECAR})


class CannotGoOnError(IntegrityError):
    """A stock reader stops here, and so does the check."""

    kind = "integrity.format"


@dataclass
class FormatReport:
    """Outcome of a check.

    Attributes:
        root: address of what was checked.
        faults: what is wrong: object, field, and what a stock reader makes of it.
        excused: faults of the kinds that the stock writer has itself; empty unless ``writer="stock"``.
        checked: duties that were looked at, in order.
    """

    root: str
    faults: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are no faults."""
        return not self.faults


class Findings:
    """Collects what a check finds, at most a few faults of one kind per object."""

    def __init__(self, root: str, excused: frozenset[Duty] = frozenset()) -> None:
        self.report = FormatReport(root)
        self._excused = excused

    def looked_at(self, duty: Duty) -> None:
        """Notes that a duty was examined."""
        if duty.value not in self.report.checked:
            self.report.checked.append(duty.value)

    def expect(self, duty: Duty, holds: bool, fault: str) -> bool:
        """Notes a fault unless the condition holds; returns the condition."""
        self.looked_at(duty)
        if not holds:
            (self.report.excused if duty in self._excused else self.report.faults).append(fault)
        return holds

    def require(self, duty: Duty, holds: bool, fault: str) -> None:
        """Like ``expect``, for what nothing can be read without.

        Raises:
            CannotGoOnError: the condition does not hold; the fault is noted already.
        """
        if not self.expect(duty, holds, fault):
            raise CannotGoOnError(fault)


def some(values: Sequence[object], limit: int = 3) -> str:
    """The first few of many values, for a message."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(f"{value!r:.80}" for value in values[:limit]) + more
