"""How many shards: the rule behind ``num_dbs: auto``.

A shard is what one step builds in memory, what a reader fetches as a whole, and what a small change rebuilds. So it has
at most about 50,000 rows, 64 MiB of vectors and 256 MiB of source files; the number is the nearest power of two. By
rows of 384 numbers and 2 KiB of source: 1 shard up to 60,000 rows, 16 for half a million, 32 for a million, 256 for ten
million, 2,048 for a hundred million.

The number stays what it is while the rule's own is within a factor of two of it: with another number every shard is
built anew.
"""

import math
from contextlib import suppress
from dataclasses import dataclass

from sf_pipelines.snapshot.errors import IntegrityError, ObjectMissingError
from sf_pipelines.snapshot.manifest.pointer import Pointer
from sf_pipelines.snapshot.reader.state import load_pointed
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.source.files import SourceListing

ROWS = 50_000
VECTOR_BYTES = 64 << 20
SOURCE_BYTES = 256 << 20
MOST = 4096
# As long as the rule's number is within this factor, that of the current snapshot is kept.
_LEEWAY = 2.0


@dataclass(frozen=True)
class Size:
    """Of a source, as its footers tell it.

    Attributes:
        rows: number of rows.
        dim: numbers in a vector.
        source_bytes: of all its files.
    """

    rows: int
    dim: int
    source_bytes: int

    @property
    def load(self) -> float:
        """How many shards it fills, not rounded."""
        vectors = 4 * self.dim * self.rows
        return max(self.rows / ROWS, vectors / VECTOR_BYTES, self.source_bytes / SOURCE_BYTES)


def shards_for(size: Size, *, served: int | None = None, most: int | None = None) -> int:
    """Number of shards.

    Args:
        size: of the source.
        served: number of the current snapshot's; None where there is none.
        most: what else limits it.

    Returns:
        A power of two, ``served``, or the limit: at most one shard a row.

    Example:
        >>> shards_for(Size(rows=1_000_000, dim=384, source_bytes=2 << 30))
        32
        >>> shards_for(Size(rows=1_000_000, dim=384, source_bytes=2 << 30), served=16)
        16
    """
    limit = min(MOST, max(1, size.rows), most or MOST)
    if served is not None and served <= limit and served / _LEEWAY <= max(size.load, 1.0) <= served * _LEEWAY:
        return served
    return min(limit, 2 ** round(math.log2(max(size.load, 1.0))))


def choose_shards(build: Build, listing: SourceListing, pointer: Pointer | None) -> str:
    """Gives a build the number of shards that ``auto`` comes to.

    Args:
        build: whose configuration says ``auto``.
        listing: of its source.
        pointer: to the current snapshot, whose number is kept where that is near enough; None looks at no other.

    Returns:
        What was chosen and why, in one line.

    Raises:
        ConfigError: ``num_probes`` is more than that.
    """
    config, served = build.config, None
    if pointer is not None:
        # What cannot be read says nothing here; the stages that need it say what is wrong.
        with suppress(IntegrityError, ObjectMissingError):
            served = load_pointed(build.store, pointer).manifest.num_dbs
    size = Size(listing.rows, config.vector_spec.dim, sum(file.size for file in listing.files))
    rule = shards_for(size, most=config.most_shards)
    chosen = shards_for(size, served=served, most=config.most_shards)
    build.config = config.sized(chosen)
    files = f"{size.source_bytes / 2**20:,.1f} MiB of files"
    told = f"num_dbs auto: {chosen} for {size.rows:,} rows x {size.dim} and {files}"
    return told if chosen == rule else f"{told}, as in the current snapshot (the rule alone says {rule})"
