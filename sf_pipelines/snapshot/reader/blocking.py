"""What the blocking readers have in common: they call the shared core and wait."""

from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Self

from numpy.typing import ArrayLike

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.index.protocol import SCAN_BYTES
from sf_pipelines.snapshot.reader import describing, searching
from sf_pipelines.snapshot.reader.cache import DEFAULT_BYTES
from sf_pipelines.snapshot.reader.core import DEFAULT_MEMORY, ReaderCore
from sf_pipelines.snapshot.reader.plan import Wanted
from sf_pipelines.snapshot.reader.state import SnapshotKind
from sf_pipelines.snapshot.reader.types import Health, RefreshOutcome, SearchArrays, ShardDetail, SnapshotInfo
from sf_pipelines.snapshot.routing.protocol import Int32


class BlockingReader:
    """Serves the snapshot that a root's current pointer names. Thread-safe.

    Shards are read from verified local copies. Opening a shard for the first time fetches it; a shard that is not
    what the manifest recorded is an error that names the object, never an answer.
    """

    _kind: ClassVar[SnapshotKind]

    def __init__(
        self,
        root: str | Path,
        *,
        s3: S3Options | None = None,
        cache_dir: Path | None = None,
        cache_bytes: int = DEFAULT_BYTES,
        manifest_key: str | None = None,
        max_cached_shards: int | None = None,
        max_memory: int = DEFAULT_MEMORY,
        scan_bytes: int = SCAN_BYTES,
        preload: bool = False,
    ) -> None:
        """Opens the current snapshot.

        Args:
            root: ``s3://bucket/prefix`` or a folder.
            s3: credentials and endpoint; None takes the environment's.
            cache_dir: folder for verified local copies, shared by processes; None is ``$SF_PIPELINES_CACHE`` or a
                folder among the temporary files.
            cache_bytes: size that this folder is held to.
            manifest_key: serve exactly this manifest (a key below the root), whatever the pointer says.
            max_cached_shards: shards kept open while nobody uses them; None is all.
            max_memory: bytes of vectors that open shards may keep in memory while nobody searches them.
            scan_bytes: a shard with at most so many bytes of vectors is searched by an exact scan in memory, a larger
                one by its index; 0 asks the index of every shard.
            preload: open every shard now, and at each refresh before the new snapshot is served.

        Raises:
            SnapshotNotFoundError: nothing is published under the root.
            SnapshotKindError: the snapshot is of another kind; names the reader for it.
            IntegrityError: manifest or routing artifacts are damaged.
            StoreError: the store cannot be read.
        """
        self._core = ReaderCore(
            root,
            s3=s3,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
            manifest_key=manifest_key,
            max_cached_shards=max_cached_shards,
            max_memory=max_memory,
            scan_bytes=scan_bytes,
            preload=preload,
            kind=self._kind,
        )

    # Measuring.

    def search_arrays(
        self, queries: ArrayLike, top_k: int, *, num_probes: int | None = None, homes: Int32 | None = None
    ) -> SearchArrays:
        """Ids and scores of many queries as arrays, without payloads.

        Args:
            queries: shape (n, dim).
            top_k: results wanted; fewer come back where the searched shards have fewer rows.
            num_probes: shards to ask, nearest first, where the vector decides; None is the snapshot's own number.
            homes: for each query the shard that it is about, shape (n,), where neither the vector nor all shards
                are asked (EXPLICIT and CEL).

        Raises:
            QueryError: an argument is wrong, or means nothing for this snapshot.
            ReaderClosedError: the reader was closed.
            StoreError: a shard cannot be fetched.
            IntegrityError: a shard is damaged.
        """
        return searching.search_arrays(self._core, queries, top_k, Wanted(num_probes=num_probes, homes=homes))

    def probe_curve(self, queries: ArrayLike, top_k: int, *, homes: Int32 | None = None) -> list[SearchArrays]:
        """Answers for 1, 2, … shards per query, asking each shard only once for all queries; see ``search_arrays``.

        Returns:
            Where the vector decides, item ``i`` is ``search_arrays(queries, top_k, num_probes=i + 1)``; else the one
            item ``search_arrays(queries, top_k, homes=homes)``.
        """
        return searching.probe_curve(self._core, queries, top_k, homes)

    def stock_style(
        self, queries: ArrayLike, top_k: int, num_probes: int, *, homes: Int32 | None = None
    ) -> SearchArrays:
        """What a stock reader would answer: its probe order, default index options, the library's own distances.

        Args:
            queries: shape (n, dim).
            top_k: results wanted.
            num_probes: shards to ask; means nothing where the vector does not decide.
            homes: see ``search_arrays``.
        """
        return searching.stock_style(self._core, queries, top_k, num_probes, homes)

    def route_batch(self, queries: ArrayLike, *, homes: Int32 | None = None) -> Int32:
        """All shards that queries may ask, in the order of their turn, shape (n, shards).

        Where the vector decides and where a search asks all, these are all shards; with ``homes`` it is that one.
        """
        return searching.route_batch(self._core, queries, homes)

    # The snapshot.

    def refresh(self) -> RefreshOutcome:
        """Serves what the pointer names now; see ``RefreshOutcome``. A failure leaves the old snapshot serving.

        Raises:
            ReaderClosedError: the reader was closed.
        """
        return self._core.refresh()

    def health(self, staleness_threshold: timedelta | float | None = None) -> Health:
        """State of the reader; answers after ``close`` too.

        Args:
            staleness_threshold: age (or seconds) of the snapshot from which it counts as degraded.
        """
        return describing.health(self._core, staleness_threshold)

    def snapshot_info(self) -> SnapshotInfo:
        """The snapshot that is served."""
        return describing.snapshot_info(self._core)

    def shard_details(self) -> list[ShardDetail]:
        """Every shard, empty ones included."""
        return describing.shard_details(self._core)

    def close(self) -> None:
        """Ends the reader. Calls that are under way finish."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
