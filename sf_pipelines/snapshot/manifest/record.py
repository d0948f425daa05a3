"""The build record: says that a build is running, by a lease that its stages renew, and how it ended."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Literal, Self

import yaml
from pydantic import ConfigDict, ValidationError

from sf_pipelines.snapshot.errors import IntegrityError, WriteUncertainError, without_secrets
from sf_pipelines.snapshot.manifest.codec import Moment, timestamp
from sf_pipelines.snapshot.manifest.models import DB_PATH_TEMPLATE, SHARD_PREFIX, WireModel
from sf_pipelines.snapshot.manifest.pointer import plain_run_id
from sf_pipelines.snapshot.model import describe_validation
from sf_pipelines.snapshot.store import Store

RUNS = "runs"
RECORD_CONTENT_TYPE = "application/x-yaml"
LEASE = timedelta(minutes=10)
RENEW_AFTER = timedelta(minutes=1)
MAX_RECORD_BYTES = 64 * 1024

_MAX_MESSAGE = 2000
_SWAP_TRIES = 8

Status = Literal["running", "succeeded", "failed"]


class BuildRecord(WireModel):
    """What is known about one build, until when it counts as alive, and how it ended. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    format_version: Literal[1] = 1
    run_id: str
    writer_type: str = "vector-python"
    status: Status
    started_at: Moment
    updated_at: Moment
    lease_expires_at: Moment
    s3_prefix: str
    shard_prefix: str = SHARD_PREFIX
    db_path_template: str = DB_PATH_TEMPLATE
    manifest_ref: str | None = None
    error_type: str | None = None
    error_message: str | None = None

    def alive(self, now: datetime) -> bool:
        """Whether the build is running and has renewed its lease in time."""
        return self.status == "running" and now < self.lease_expires_at

    def encode(self) -> bytes:
        """YAML with sorted keys."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=True, allow_unicode=True).encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> Self:
        """Reads a record; an ``IntegrityError`` where it cannot be understood."""
        if len(data) > MAX_RECORD_BYTES:
            raise IntegrityError(f"build record {where} has {len(data)} bytes, more than {MAX_RECORD_BYTES}")
        try:
            return cls.model_validate(yaml.safe_load(data))
        except ValidationError as error:
            raise IntegrityError(describe_validation(f"build record {where}", error)) from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise IntegrityError(f"build record {where} is no YAML that can be used: {error}") from error


def start_record(store: Store, run_id: str, *, now: datetime | None = None) -> str:
    """Writes the record of a build that begins, and returns its key."""
    moment = now or datetime.now(UTC)
    record = BuildRecord(
        run_id=run_id,
        status="running",
        started_at=moment,
        updated_at=moment,
        lease_expires_at=moment + LEASE,
        s3_prefix=store.url,
    )
    key = f"{RUNS}/{timestamp(moment)}_run_id={plain_run_id(run_id)}_{uuid.uuid4().hex}/run.yaml"
    store.put(key, record.encode(), content_type=RECORD_CONTENT_TYPE)
    return key


def read_record(store: Store, record_key: str) -> BuildRecord:
    """One build's record; an ``IntegrityError`` where it cannot be understood."""
    return BuildRecord.decode(store.get(record_key, limit=MAX_RECORD_BYTES), store.url_of(record_key))


def renew(store: Store, record_key: str, *, force: bool = False, now: datetime | None = None) -> BuildRecord:
    """Says that a build goes on: extends its lease, unless forced at most once a minute; returns the record then.

    A failed build that goes on is running again; one that succeeded stays so.
    """
    moment = now or datetime.now(UTC)
    found = store.get_versioned(record_key, limit=MAX_RECORD_BYTES)
    record = BuildRecord.decode(found.data, store.url_of(record_key))
    recent = record.status == "running" and moment - record.updated_at < RENEW_AFTER
    if record.status == "succeeded" or (recent and not force):
        return record
    renewed = record.model_copy(
        update={
            "status": "running",
            "updated_at": moment,
            "lease_expires_at": moment + LEASE,
            "error_type": None,
            "error_message": None,
        }
    )
    if store.swap(record_key, renewed.encode(), found, content_type=RECORD_CONTENT_TYPE):
        return renewed
    # Another step of this build renewed or finished it at the same time; either says what is to be said.
    return read_record(store, record_key)


def finish(
    store: Store,
    record_key: str,
    status: Literal["succeeded", "failed"],
    manifest_ref: str | None = None,
    error: BaseException | None = None,
    *,
    now: datetime | None = None,
) -> BuildRecord:
    """Says how a build ended, and gives up its lease. What has succeeded stays so. Returns the record as it is now."""
    for _ in range(_SWAP_TRIES):
        moment = now or datetime.now(UTC)
        found = store.get_versioned(record_key, limit=MAX_RECORD_BYTES)
        record = BuildRecord.decode(found.data, store.url_of(record_key))
        if status == "failed" and record.status == "succeeded":
            return record
        ended = record.model_copy(
            update={
                "status": status,
                "updated_at": moment,
                "lease_expires_at": moment,
                "manifest_ref": manifest_ref,
                "error_type": None if error is None else type(error).__name__,
                "error_message": None if error is None else without_secrets(str(error))[:_MAX_MESSAGE],
            }
        )
        if store.swap(record_key, ended.encode(), found, content_type=RECORD_CONTENT_TYPE):
            return ended
    raise WriteUncertainError(f"{store.url_of(record_key)} was rewritten by others {_SWAP_TRIES} times; try again")
