"""What the build and the readers ask of an index library, and what all libraries do alike."""

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.errors import ConfigError, IndexBuildError, ReaderClosedError
from sf_pipelines.snapshot.index.ranking import IdArray, Ids, Int64, ShardHits, find_ids, id_values, take_ids
from sf_pipelines.snapshot.index.scan import MemoryScan
from sf_pipelines.snapshot.metric import DistanceMetric, Float32

# "mixed" (int and str in one shard) is what stock writers may leave in SQLite shards; ours never write it.
IdType = Literal["int64", "string", "mixed"]
VectorType = Literal["float32", "float16"]
# Columns of a shard's rows that are no filter columns.
STORED_COLUMNS = frozenset({"id", "vector", "payload"})
# `auto`: below this many rows in the largest shard an exact scan is as fast as any index.
FLAT_ROWS = 4_000
# `auto`: up to this many rows IVF_SQ is built 10 to 90 times faster than a graph, at similar latency.
IVF_ROWS = 200_000
# `auto`: the current snapshot's family is kept up to this factor beyond these: a change rebuilds every shard.
_LEEWAY = 1.5
# `auto`: a graph loses rows where more than this part of them are equal to others.
_REPEATED = 0.05


class IndexFamily(StrEnum):
    """How a shard's vectors are indexed. Distances of all are good enough for a reader to merge shards by them.

    ``FLAT`` is exact, ``IVF_FLAT`` searches some partitions exactly, ``IVF_SQ`` the same on 8-bit numbers,
    ``HNSW`` walks a graph over 8-bit numbers, ``HNSW_FLAT`` a graph over the full ones.
    """

    FLAT = "flat"
    IVF_FLAT = "ivf_flat"
    IVF_SQ = "ivf_sq"
    HNSW = "hnsw"
    HNSW_FLAT = "hnsw_flat"


def choose_family(
    index_type: str,
    largest_shard_rows: int,
    *,
    eight_bit: bool = False,
    served: str | None = None,
    repeated: float = 0.0,
) -> IndexFamily:
    """The one family of a snapshot.

    Args:
        index_type: ``auto`` or a family's name.
        largest_shard_rows: rows of the largest shard.
        eight_bit: ``auto`` must choose a family that indexes 8-bit numbers.
        served: family of the current snapshot, which ``auto`` keeps a little beyond the bounds.
        repeated: part of the rows whose vector another row has, too.

    Raises:
        ConfigError: no such family.
    """
    if index_type != "auto":
        if index_type not in list(IndexFamily):
            names = ", ".join(["auto", *IndexFamily])
            raise ConfigError(f"index_type {index_type!r} is unknown; use one of {names}")
        return IndexFamily(index_type)
    # The served family's bound is wider on its side; both are narrower where IVF_SQ, between them, is served.
    narrower = 1 / _LEEWAY if served == IndexFamily.IVF_SQ else 1.0
    flat = FLAT_ROWS * (_LEEWAY if served == IndexFamily.FLAT else narrower)
    ivf = IVF_ROWS / (_LEEWAY if served == IndexFamily.HNSW else narrower)
    if largest_shard_rows < flat and not eight_bit:
        return IndexFamily.FLAT
    return IndexFamily.IVF_SQ if largest_shard_rows <= ivf or repeated > _REPEATED else IndexFamily.HNSW


class ShardIndex(ABC):
    """A shard's index: built by ``build``, searched once opened by ``open``. Thread-safe.

    A library has one subclass, which says how its files are written and read.

    Attributes:
        name: as in ``VectorSpec.backend``.
        directory: what a shard's directory holds: a folder or file of this name.
        subfolder: where the index lies below the directory of a unified shard; empty where it shares the file with
            the keys and values.
        metrics: distances that the library knows.
        vector_types: how the library can store vectors.
        scan_bytes: a scan in memory answers sooner than the index where a shard has up to so many bytes of vectors.
        rows: rows of the shard.
        indexed_rows: rows that a trained index covers; 0 when there is none.
        id_type: type of the ids as stored.
    """

    name: ClassVar[str]
    directory: ClassVar[str]
    subfolder: ClassVar[str]
    metrics: ClassVar[frozenset[DistanceMetric]]
    vector_types: ClassVar[tuple[VectorType, ...]] = ("float32",)
    scan_bytes: ClassVar[int]

    rows: int
    indexed_rows: int
    id_type: IdType

    def __init__(self, where: Path, metric: DistanceMetric, dim: int, *, scans: bool) -> None:
        self._where = where
        self._metric = metric
        self._dim = dim
        # Whether searches are scans of vectors held in memory.
        self._scans = scans
        self._scan: MemoryScan | None = None
        # Bytes held beside the scan.
        self._held = 0
        # Held while vectors are read, so that threads on a cold shard read them once.
        self._lock = threading.RLock()

    @classmethod
    def build(
        cls,
        rows: pa.Table,
        folder: Path,
        *,
        family: IndexFamily,
        metric: DistanceMetric,
        params: IndexParams,
        vector_type: VectorType = "float32",
    ) -> None:
        """Writes a shard's index, which covers every row, into a folder.

        Args:
            rows: columns ``id`` (int64 or string), ``vector`` (fixed-size list of finite float32; none is zero under
                cosine), ``payload`` (string: JSON or null), and any filter columns; at least one row.
            folder: where; it may hold a ``shard.db`` with keys and values already.
            family: index to build.
            metric: declared metric.
            params: knobs of the family.
            vector_type: how vectors are stored; under ``float16`` those in ``rows`` are float16 numbers already.

        Raises:
            IndexBuildError: it cannot be built, or does not cover every row.
        """
        if rows.num_rows == 0:
            raise IndexBuildError(f"{folder}: a shard without rows has no index; leave it out of the manifest")
        if metric not in cls.metrics:
            names = ", ".join(sorted(cls.metrics))
            raise IndexBuildError(f"{folder}: {cls.name} has no metric {metric}; it has {names}")
        if vector_type not in cls.vector_types:
            raise IndexBuildError(f"{folder}: {cls.name} stores {', '.join(cls.vector_types)}, not {vector_type}")
        folder.mkdir(parents=True, exist_ok=True)
        indexed = cls._write(rows, folder, family, metric, params, vector_type)
        if indexed != rows.num_rows:
            raise IndexBuildError(f"{folder}: the {family} index covers {indexed} of {rows.num_rows} rows")

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, *, metric: DistanceMetric, dim: int, in_memory: bool = True) -> Self:
        """Opens a local shard's index for searching.

        Args:
            folder: where it was built.
            metric: declared metric.
            dim: numbers in a vector.
            in_memory: keep the vectors in memory and scan them exactly. Else the index is asked where it covers the
                shard and knows the metric; where it does not, a library without a way to scan its file keeps the
                vectors in memory all the same.

        Raises:
            IntegrityError: what is there is no readable shard of this dimension.
        """

    @property
    def memory_bytes(self) -> int:
        """About how much memory the shard holds at present."""
        scan = self._scan
        return self._held + (scan.nbytes if scan else 0)

    @property
    def in_memory(self) -> bool:
        """Whether a search is a scan of what is held already: too quick to be worth another thread."""
        return self._scans and self._scan is not None

    def warm(self) -> None:
        """Loads what searches will hold in memory anyway: of a scanned shard its vectors, and payloads if small."""
        self.scan()

    def scan(self) -> MemoryScan | None:
        """The scan of a shard that is searched in memory, loaded on first use; None where ``search`` does more.

        A reader that asks several shards for their rough candidates scores fewer rows than one that asks each for its
        answer.
        """
        return self._memory() if self._scans else None

    def search(self, queries: Float32, k: int) -> ShardHits:
        """The nearest rows in the declared metric, with exact distances. A row that is not finite is in no answer.

        Args:
            queries: finite float32, shape (n, dim).
            k: hits wanted; fewer come back only where the shard has fewer rows.
        """
        return self._memory().search(queries, k) if self._scans or not self.rows else self._search_file(queries, k)

    @abstractmethod
    def search_raw(self, queries: Float32, k: int) -> ShardHits:
        """What a reader gets that passes no options and takes the library's own distance for a score.

        Raises:
            QueryError: ``k`` is more than the library takes.
        """

    def payloads(self, rows: Int64) -> list[dict[str, Any] | None]:
        """Payload of each row reference, in their order; None for text that is no JSON object."""
        return [_parsed(text) for text in self._payload_texts(rows)]

    def vectors(self, rows: Int64) -> Float32:
        """Stored vector of each row reference, in their order, shape (n, dim)."""
        scan = self._scan
        if scan is not None and len(scan.rows) == self.rows:
            return scan.vectors[np.searchsorted(scan.rows, rows)]
        return self._read_vectors(rows)

    def find(self, ids: Sequence[int | str]) -> Int64:
        """Row reference of each id, shape (n,); -1 where the shard does not have it. Scans the column of ids."""
        return find_ids(ids, *self._read_ids())

    def sample(self, n: int) -> tuple[IdArray, Float32]:
        """Ids and vectors of up to ``n`` rows spread over the shard; always the same ones."""
        ids, rows = self._read_ids()
        at = np.unique(np.linspace(0, max(0, self.rows - 1), min(n, self.rows)).astype(np.int64))
        return id_values(take_ids(ids, at)), self.vectors(rows[at])

    def close(self) -> None:
        """Frees what is held. Later calls raise ``ReaderClosedError``."""
        with self._lock:
            self._scan, self._held = None, 0

    @classmethod
    @abstractmethod
    def _write(
        cls,
        rows: pa.Table,
        folder: Path,
        family: IndexFamily,
        metric: DistanceMetric,
        params: IndexParams,
        vector_type: VectorType,
    ) -> int:
        """``build``, of what was checked. Gives the number of rows that the index covers."""

    @abstractmethod
    def _search_file(self, queries: Float32, k: int) -> ShardHits:
        """``search`` of a shard with rows that is not scanned in memory."""

    @abstractmethod
    def _read_scan(self) -> MemoryScan:
        """All vectors; called under the lock. Refuses a closed shard, as all that follow do."""

    @abstractmethod
    def _read_ids(self) -> tuple[Ids, Int64]:
        """Id and row reference of each row; references ascend."""

    @abstractmethod
    def _read_vectors(self, rows: Int64) -> Float32:
        """``vectors``, from the file."""

    @abstractmethod
    def _payload_texts(self, rows: Int64) -> Sequence[Any]:
        """Payload of each row reference as it is stored; None where there is none."""

    def _memory(self) -> MemoryScan:
        scan = self._scan
        if scan is not None:
            return scan
        with self._lock:
            if self._scan is None:
                self._scan = self._read_scan()
            return self._scan

    def _closed(self) -> ReaderClosedError:
        return ReaderClosedError(f"the shard in {self._where} was closed")


def _parsed(text: Any) -> dict[str, Any] | None:
    """The object that a stored payload says; what is no JSON object is no payload."""
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
