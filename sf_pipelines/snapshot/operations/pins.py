"""Pins: published snapshots that no cleanup removes, whatever their age."""

import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_serializer

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import IntegrityError, ObjectMissingError, OperationError, RunNotFoundError
from sf_pipelines.snapshot.manifest.codec import dump_json, load_json, parse_moment, timestamp
from sf_pipelines.snapshot.manifest.models import WireModel
from sf_pipelines.snapshot.manifest.pointer import plain_run_id
from sf_pipelines.snapshot.manifest.publish import read_pointer
from sf_pipelines.snapshot.model import describe_validation
from sf_pipelines.snapshot.operations.rollback import ServedHistory, open_published
from sf_pipelines.snapshot.store import Store

PINS = "pins"
_SUFFIX = ".json"
_MAX_REASON = 1000
_MAX_BYTES = 64 * 1024


class Pin(WireModel):
    """What says that a snapshot must be kept.

    Attributes:
        run_id: the snapshot.
        reason: why it must.
        pinned_at: since when, UTC.
        write_id: unique to this pin.
    """

    model_config = ConfigDict(extra="ignore")

    run_id: str
    reason: Annotated[str, Field(max_length=_MAX_REASON)]
    pinned_at: Annotated[datetime, BeforeValidator(parse_moment)]
    write_id: str

    @field_serializer("pinned_at")
    def _write_moment(self, value: datetime) -> str:
        return timestamp(value)


def pin(root: str | Path | Store, run_id: str, reason: str, *, s3: S3Options | None = None) -> Pin:
    """Keeps a published snapshot from being cleaned up. Pinning it again replaces the reason.

    Raises:
        SnapshotNotFoundError: nothing was published.
        RunNotFoundError: no such snapshot is published, or a cleanup removed it at the same time.
        OperationError: the reason is empty or too long.
    """
    if not reason.strip() or len(reason) > _MAX_REASON:
        raise OperationError(f"reason must be 1 to {_MAX_REASON} characters (got {len(reason.strip())}): say why")
    store = open_published(root, s3)
    entry = ServedHistory.of(store, read_pointer(store).pointer).find(run_id)
    made = Pin(run_id=run_id, reason=reason.strip(), pinned_at=datetime.now(UTC), write_id=uuid.uuid4().hex)
    key = _key(run_id)
    store.put(key, dump_json(made.model_dump(mode="json")).encode(), content_type="application/json")
    # A cleanup that took the manifest away looks at the pins once more before it goes on.
    if not store.exists(entry.manifest_key):
        store.delete(key)
        raise RunNotFoundError(f"run {run_id!r} was removed by a cleanup at the same time; it is not pinned")
    return made


def unpin(root: str | Path | Store, run_id: str, *, s3: S3Options | None = None) -> Pin:
    """Lets cleanups remove a snapshot again; the pin that kept it.

    Raises:
        SnapshotNotFoundError: nothing was published.
        RunNotFoundError: it is not pinned.
    """
    store = open_published(root, s3)
    key = _key(run_id)
    found = store.find(key, limit=_MAX_BYTES)
    if found is None:
        raise RunNotFoundError(f"run {run_id!r} is not pinned under {store.url}; see the list of pins")
    store.delete(key)
    return _decode(found.data, store.url_of(key))


def pins(root: str | Path | Store, *, s3: S3Options | None = None) -> list[Pin]:
    """All pins, oldest first.

    Raises:
        SnapshotNotFoundError: nothing was published.
        IntegrityError: one cannot be understood.
    """
    store = open_published(root, s3)
    found: list[Pin] = []
    for run_id in pinned_runs(store):
        try:
            found.append(_decode(store.get(_key(run_id), limit=_MAX_BYTES), store.url_of(_key(run_id))))
        except ObjectMissingError:
            # Unpinned since it was listed.
            continue
    return sorted(found, key=lambda one: one.pinned_at)


def pinned_runs(store: Store) -> frozenset[str]:
    """Runs that are pinned: the names alone say it, so that a pin that cannot be read keeps its snapshot too."""
    names = [info.key.removeprefix(f"{PINS}/") for info in store.objects(PINS)]
    return frozenset(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX) and "/" not in name)


def _key(run_id: str) -> str:
    return f"{PINS}/{plain_run_id(run_id)}{_SUFFIX}"


def _decode(data: bytes, where: str) -> Pin:
    try:
        return Pin.model_validate(load_json(data))
    except ValidationError as error:
        raise IntegrityError(describe_validation(f"pin {where}", error)) from error
    except ValueError as error:
        raise IntegrityError(f"pin {where} is no JSON that can be used: {error}") from error
