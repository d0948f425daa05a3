"""The reader that fits whatever snapshot there is."""

from pathlib import Path
from typing import Unpack

from sf_pipelines.snapshot.errors import SnapshotKindError
from sf_pipelines.snapshot.reader.options import ReaderOptions
from sf_pipelines.snapshot.reader.sync import ShardedVectorReader, UnifiedShardedReader


def open_reader(root: str | Path, **options: Unpack[ReaderOptions]) -> ShardedVectorReader | UnifiedShardedReader:
    """A reader of the kind of the snapshot that is current; arguments and errors as of ``BlockingReader``."""
    try:
        return ShardedVectorReader(root, **options)
    except SnapshotKindError:
        pass
    try:
        return UnifiedShardedReader(root, **options)
    except SnapshotKindError:
        # It was replaced by one of the other kind in between.
        return ShardedVectorReader(root, **options)
