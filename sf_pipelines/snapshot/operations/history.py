"""The history as an operator wants to see it: what is current, withdrawn, held, pinned."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import IntegrityError, ManifestError, ObjectMissingError
from sf_pipelines.snapshot.gate.verdicts import RecallFigures, judged_recall
from sf_pipelines.snapshot.manifest.codec import decode_manifest
from sf_pipelines.snapshot.manifest.publish import history, read_pointer
from sf_pipelines.snapshot.operations.pins import pins
from sf_pipelines.snapshot.operations.rollback import keys_in, open_published
from sf_pipelines.snapshot.store import Store


@dataclass(frozen=True)
class SnapshotFigures:
    """What a manifest tells of its snapshot; None where its writer recorded nothing."""

    rows: int
    shards: int
    bytes: int | None
    index_type: str
    recall: RecallFigures | None


@dataclass(frozen=True)
class SnapshotStatus:
    """One published snapshot.

    Attributes:
        published_at: time in its manifest's name, UTC.
        is_withdrawn: whether a rollback withdrew it.
        is_held: whether a rollback keeps its source and config from being published again.
        pinned: why no cleanup removes it; None where it is not pinned.
        figures: what its manifest tells; None where it cannot be read, or was not asked for.
    """

    run_id: str
    published_at: datetime
    manifest_key: str
    is_current: bool
    is_withdrawn: bool
    is_held: bool
    pinned: str | None
    figures: SnapshotFigures | None = None


def snapshots(
    root: str | Path | Store, *, limit: int | None = 10, s3: S3Options | None = None, figures: bool = False
) -> list[SnapshotStatus]:
    """Published snapshots, newest first. A pointer that cannot be understood says nothing about any of them.

    Raises:
        SnapshotNotFoundError: nothing was published.
        StoreError: the store cannot be read.
        IntegrityError: a pin cannot be understood.
    """
    store = open_published(root, s3)
    try:
        pointer = read_pointer(store).pointer
    except ManifestError:
        pointer = None
    pinned = {pin.run_id: pin.reason for pin in pins(store)}
    withdrawn = set(pointer.withdrawn) if pointer is not None else set[str]()
    return [
        SnapshotStatus(
            run_id=entry.run_id,
            published_at=entry.published_at,
            manifest_key=entry.manifest_key,
            is_current=entry.is_current,
            is_withdrawn=entry.run_id in withdrawn,
            is_held=pointer is not None
            and entry.run_id in withdrawn
            and pointer.is_held(*keys_in(store, entry.manifest_key)),
            pinned=pinned.get(entry.run_id),
            figures=_figures(store, entry.manifest_key) if figures else None,
        )
        for entry in history(store, limit)
    ]


def _figures(store: Store, key: str) -> SnapshotFigures | None:
    """A list is there to find a way out of trouble: a manifest that cannot be read is listed without figures."""
    try:
        data = store.get(key)
        manifest = decode_manifest(data, where=store.url_of(key))
        recall = judged_recall(store, manifest, hashlib.sha256(data).hexdigest())
        index_type = manifest.vector.index_type
    except (IntegrityError, ObjectMissingError):
        return None
    sizes = [None if shard.objects is None else sum(item.size for item in shard.objects) for shard in manifest.shards]
    return SnapshotFigures(
        rows=manifest.row_count,
        shards=sum(shard.db_url is not None for shard in manifest.shards),
        bytes=None if None in sizes else sum(size or 0 for size in sizes),
        index_type=index_type,
        recall=recall,
    )
