"""What the build and the readers ask of an index library, and what all libraries do alike."""

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines.snapshot.config import IndexParams
from sf_pipelines.snapshot.errors import ConfigError, ReaderClosedError
from sf_pipelines.snapshot.metric import DistanceMetric, Float32, Float64

if TYPE_CHECKING:
    from sf_pipelines.snapshot.index.scan import MemoryScan

# "mixed" (int and str in one shard) is what stock writers may leave in SQLite shards; ours never write it.
IdType = Literal["int64", "string", "mixed"]
VectorType = Literal["float32", "float16"]
# int64 ids, or str (of mixed ones: int and str) objects with None where there is no hit.
IdArray = NDArray[Any]

# `auto`: below this many rows in the largest shard an exact scan is as fast as any index.
FLAT_ROWS = 4_000
# `auto`: up to this many rows IVF_SQ is built 10 to 90 times faster than a graph, at similar latency.
IVF_ROWS = 200_000
# `auto`: the current snapshot's family is kept up to so far beyond these, for with another every shard is built anew.
_LEEWAY = 1.5
# `auto`: a graph loses rows where more than this part of them are equal to others.
_REPEATED = 0.05


class IndexFamily(StrEnum):
    """How a shard's vectors are indexed. All rank rightly unrefined, so that a plain reader can merge.

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
        served: family of the current snapshot, which ``auto`` keeps where the rows are near enough to its own.
        repeated: part of the rows whose vector another row has, too.

    Raises:
        ConfigError: no such family.
    """
    if index_type != "auto":
        try:
            return IndexFamily(index_type)
        except ValueError as error:
            names = ", ".join(["auto", *IndexFamily])
            raise ConfigError(f"index_type {index_type!r} is unknown; use one of {names}") from error
    flat = FLAT_ROWS * _leeway(served, IndexFamily.FLAT)
    if largest_shard_rows < flat and not eight_bit:
        return IndexFamily.FLAT
    ivf = IVF_ROWS / _leeway(served, IndexFamily.HNSW)
    return IndexFamily.IVF_SQ if largest_shard_rows <= ivf or repeated > _REPEATED else IndexFamily.HNSW


def _leeway(served: str | None, favoured: IndexFamily) -> float:
    """What stretches a bound for the family on its one side; it shrinks where IVF_SQ, on its other side, is served."""
    if served == favoured:
        return _LEEWAY
    return 1 / _LEEWAY if served == IndexFamily.IVF_SQ else 1.0


@dataclass(frozen=True)
class ShardHits:
    """Nearest rows of one shard for a batch of queries, nearest first, equal distances by id.

    Attributes:
        rows: row references within the shard, int64, shape (n, k), -1 where there is no hit.
        ids: int64 or objects (str; of mixed ids int and str), shape (n, k); 0 or None where there is no hit.
        distances: as ``pair_distances`` gives them, float64, shape (n, k), NaN where there is no hit.
        counts: hits of each query, shape (n,).
    """

    rows: NDArray[np.int64]
    ids: IdArray
    distances: Float64
    counts: NDArray[np.int64]


class ShardIndex(ABC):
    """A shard's index: built by ``build``, searched once opened by ``open``. Thread-safe.

    A library has one subclass, which says how its files are written and read.

    Attributes:
        name: as in ``VectorSpec.backend``.
        directory: what a shard's directory holds: a folder or file of this name.
        subfolder: where the index lies below the directory of a unified shard; empty where it shares the file with
            the keys and values.
        metrics: distances that the library knows.
        scan_bytes: a scan in memory answers sooner than the index where a shard has up to so many bytes of vectors.
        rows: rows of the shard.
        indexed_rows: rows that a trained index covers; 0 when there is none.
        id_type: type of the ids as stored.
    """

    name: ClassVar[str]
    directory: ClassVar[str]
    subfolder: ClassVar[str]
    metrics: ClassVar[frozenset[DistanceMetric]]
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
    @abstractmethod
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
            rows: columns ``id`` (int64 or string), ``vector`` (fixed-size list of float32), ``payload``
                (string: JSON or null), and any filter columns; at least one row.
            folder: where; it may hold a ``shard.db`` with keys and values already.
            family: index to build.
            metric: declared metric.
            params: knobs of the family.
            vector_type: how vectors are stored; under ``float16`` those in ``rows`` are float16 numbers already.

        Raises:
            IndexBuildError: it cannot be built, or does not cover every row.
        """

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

    def scan(self) -> "MemoryScan | None":
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

    @abstractmethod
    def payloads(self, rows: NDArray[np.int64]) -> list[dict[str, Any] | None]:
        """Payload of each row reference, in their order; None for text that is no JSON object."""

    @abstractmethod
    def vectors(self, rows: NDArray[np.int64]) -> Float32:
        """Stored vector of each row reference, in their order, shape (n, dim)."""

    @abstractmethod
    def find(self, ids: Sequence[int | str]) -> NDArray[np.int64]:
        """Row reference of each id, shape (n,); -1 where the shard does not have it. Scans the column of ids."""

    def sample(self, n: int) -> tuple[IdArray, Float32]:
        """Ids and vectors of up to ``n`` rows spread over the shard; always the same ones."""
        count = min(n, self.rows)
        return self._at(np.unique(np.linspace(0, max(0, self.rows - 1), count).astype(np.int64)))

    def close(self) -> None:
        """Frees what is held. Later calls raise ``ReaderClosedError``."""
        with self._lock:
            self._scan, self._held = None, 0

    @abstractmethod
    def _search_file(self, queries: Float32, k: int) -> ShardHits:
        """``search`` of a shard with rows that is not scanned in memory."""

    @abstractmethod
    def _read_scan(self) -> "MemoryScan":
        """All vectors; called under the lock. Refuses a closed shard."""

    @abstractmethod
    def _at(self, positions: NDArray[np.int64]) -> tuple[IdArray, Float32]:
        """Ids and vectors at these positions in the shard, which ascend."""

    def _memory(self) -> "MemoryScan":
        scan = self._scan
        if scan is not None:
            return scan
        with self._lock:
            if self._scan is None:
                self._scan = self._read_scan()
            return self._scan

    def _closed(self) -> ReaderClosedError:
        return ReaderClosedError(f"the shard in {self._where} was closed")


def parse_payload(text: Any) -> dict[str, Any] | None:
    """The object that a stored payload says; what is no JSON object is no payload."""
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
