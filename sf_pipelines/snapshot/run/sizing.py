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
_KEPT_WITHIN = 2.0


def shards_for(rows: int, dim: int, source_bytes: int, *, current: int | None = None, limit: int | None = None) -> int:
    """Number of shards for a source: a power of two, the current snapshot's number, or the limit.

    At most one shard a row.

    Example:
        >>> shards_for(1_000_000, 384, 2 << 30)
        32
        >>> shards_for(1_000_000, 384, 2 << 30, current=16)
        16
    """
    limit = min(MOST, max(1, rows), limit or MOST)
    load = max(rows / ROWS, 4 * dim * rows / VECTOR_BYTES, source_bytes / SOURCE_BYTES, 1.0)
    if current is not None and current <= limit and current / _KEPT_WITHIN <= load <= current * _KEPT_WITHIN:
        return current
    return min(limit, 2 ** round(math.log2(load)))


def choose_shards(build: Build, listing: SourceListing, pointer: Pointer | None) -> str:
    """Gives a build the number of shards that ``auto`` comes to, and says in one line what was chosen and why.

    The number of the current snapshot (``pointer``) is kept if it is near enough.
    """
    config, current = build.config, None
    if pointer is not None:
        # An unreadable snapshot is reported by the stages that need it.
        with suppress(IntegrityError, ObjectMissingError):
            current = load_pointed(build.store, pointer).manifest.num_dbs
    rows, dim, size = listing.rows, config.vector_spec.dim, sum(file.size for file in listing.files)
    rule = shards_for(rows, dim, size, limit=config.most_shards)
    chosen = shards_for(rows, dim, size, current=current, limit=config.most_shards)
    build.config = config.sized(chosen)
    files = f"{size / 2**20:,.1f} MiB of files"
    reason = f"num_dbs auto: {chosen} for {rows:,} rows x {dim} and {files}"
    return reason if chosen == rule else f"{reason}, as in the current snapshot (the rule alone says {rule})"
