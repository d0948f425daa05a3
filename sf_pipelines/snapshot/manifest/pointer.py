"""``_CURRENT``: the small object that says which manifest readers follow."""

import re
from datetime import datetime
from typing import Annotated, Any, NamedTuple, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from sf_pipelines.snapshot.errors import ManifestError
from sf_pipelines.snapshot.manifest.codec import Moment, dump_json, load_json, parse_moment, timestamp
from sf_pipelines.snapshot.manifest.models import MANIFEST_CONTENT_TYPE, WireModel, tail_of
from sf_pipelines.snapshot.model import describe_validation

CURRENT = "_CURRENT"
MANIFESTS = "manifests"
POINTER_CONTENT_TYPE = "application/json"
MAX_POINTER_BYTES = 64 * 1024
# Run ids that a pointer remembers of each kind; at their longest they take a third of its bytes.
MAX_REMEMBERED = 50

_MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
_MANIFEST_KEY = re.compile(rf"{MANIFESTS}/(?P<moment>{_MOMENT})_run_id=(?P<run_id>[^/]+)/manifest")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

# As many as there are: a pointer that somebody else made longer must stay readable.
RunIds = Annotated[tuple[str, ...], Field(strict=False)]


class PreviousPointer(WireModel):
    """The snapshot that was served before; no write id where the pointer that named it had none."""

    model_config = ConfigDict(extra="ignore")

    run_id: str
    manifest_ref: str
    write_id: str | None = None


class Hold(WireModel):
    """A build that a rollback keeps from being published again: under one gate, or whatever the gate.

    There is a gate where what is served instead is of the same build under another one.
    """

    model_config = ConfigDict(extra="ignore")

    build_key: str
    gate_key: str | None = None

    def covers(self, build_key: str | None, gate_key: str | None) -> bool:
        """Whether a build is one that is held."""
        return self.build_key == build_key and self.gate_key in {None, gate_key}


class Pointer(WireModel):
    """What ``_CURRENT`` says: five fields of the format, then this package's; others are ignored.

    Attributes:
        seq: number of this move, counting up; None when a writer that does not count moved it.
        write_id: unique to this move.
        manifest_digest: SHA-256 (hex) of the manifest's bytes.
        build_key: digest of source version and config.
        gate_key: digest of the gate that the snapshot passed.
        hold: build key that a rollback blocked last; written for those who read no ``holds``.
        holds: all builds that rollbacks block, the last one last, until a release or until another build is published.
        served: run ids that were served one after the other, the present one last; a rollback goes back along them.
        withdrawn: run ids that rollbacks have withdrawn, the last one last: nobody should fall back to them.
        moved_by: ``build``, ``rollback`` or ``release``.
    """

    model_config = ConfigDict(extra="ignore")

    manifest_ref: Annotated[str, Field(max_length=4096)]
    manifest_content_type: str = Field(default=MANIFEST_CONTENT_TYPE)
    run_id: str
    updated_at: Moment
    format_version: int = 1
    seq: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    write_id: str | None = None
    previous: PreviousPointer | None = None
    manifest_digest: str | None = None
    build_key: str | None = None
    gate_key: str | None = None
    hold: str | None = None
    holds: Annotated[tuple[Hold, ...], Field(strict=False)] = ()
    served: RunIds = ()
    withdrawn: RunIds = ()
    moved_by: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_hold_is_a_list_of_one(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("holds"):
            last = data["holds"][-1]
            return data | {"hold": last.build_key if isinstance(last, Hold) else last.get("build_key")}
        return data | {"holds": ({"build_key": data["hold"]},)} if data.get("hold") else data

    def is_held(self, build_key: str | None, gate_key: str | None) -> bool:
        """Whether a rollback keeps a build from being published."""
        return any(hold.covers(build_key, gate_key) for hold in self.holds)

    def encode(self) -> bytes:
        """Compact JSON with sorted keys; fields that say nothing are left out."""
        silent = {name for name in ("holds", "served", "withdrawn") if not getattr(self, name)}
        return dump_json(self.model_dump(mode="json", exclude_none=True, exclude=silent)).encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> Self:
        """Reads a pointer; ``where`` is its address. A ``ManifestError`` says what is wrong with it."""
        if len(data) > MAX_POINTER_BYTES:
            raise ManifestError(f"pointer {where} has {len(data)} bytes, more than {MAX_POINTER_BYTES}")
        try:
            found: Any = load_json(data)
        except ValueError as error:
            raise ManifestError(f"pointer {where} is no JSON that can be used: {error}") from error
        if not isinstance(found, dict):
            raise ManifestError(f"pointer {where} is no JSON object (got {found!r:.80})")
        if "manifest_content_type" not in found:
            raise ManifestError(f"pointer {where}: manifest_content_type is missing")
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            raise ManifestError(describe_validation(f"pointer {where}", error)) from error


class ManifestName(NamedTuple):
    """What a manifest's key says."""

    moment: datetime
    run_id: str


def manifest_name(run_id: str, created_at: datetime) -> str:
    """Key of a published manifest; a ``ManifestError`` where the run id cannot be part of a name."""
    return f"{MANIFESTS}/{timestamp(created_at)}_run_id={plain_run_id(run_id)}/manifest"


def plain_run_id(run_id: str) -> str:
    """The run id; a ``ManifestError`` where it cannot be part of a name."""
    if not _RUN_ID.fullmatch(run_id):
        raise ManifestError(f"run id {run_id!r:.80} must be letters, digits, '.', '_' and '-' to be part of a name")
    return run_id


def parse_manifest_key(key: str) -> ManifestName | None:
    """What the key of a published manifest says; None for any other key."""
    match = _MANIFEST_KEY.fullmatch(key)
    if match is None:
        return None
    try:
        return ManifestName(parse_moment(match["moment"]), match["run_id"])
    except ValueError:
        # Digits that are no date: not a name that any writer makes.
        return None


def manifest_key(pointer: Pointer) -> str:
    """Key below the root of the manifest that a pointer names, whatever root the pointer was written for."""
    ref = pointer.manifest_ref
    try:
        key = tail_of(ref, "/".join(ref.rsplit("/", 3)[1:]))
    except ValueError as error:
        raise ManifestError(f"pointer's manifest_ref {ref!r:.300}: {error}") from error
    if parse_manifest_key(key) is None:
        raise ManifestError(
            f"pointer's manifest_ref {ref!r:.300} does not end in {MANIFESTS}/<time>_run_id=<run id>/manifest"
        )
    return key
