"""The reader that fits whatever snapshot there is."""

from pathlib import Path
from typing import Any

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import SnapshotKindError
from sf_pipelines.snapshot.reader.sync import ShardedVectorReader
from sf_pipelines.snapshot.reader.unified import UnifiedShardedReader


def open_reader(
    root: str | Path, *, s3: S3Options | None = None, manifest_key: str | None = None, **options: Any
) -> ShardedVectorReader | UnifiedShardedReader:
    """A reader of the kind of the snapshot that is current; arguments and errors as of ``BlockingReader``."""
    try:
        return ShardedVectorReader(root, s3=s3, manifest_key=manifest_key, **options)
    except SnapshotKindError:
        return UnifiedShardedReader(root, s3=s3, manifest_key=manifest_key, **options)
