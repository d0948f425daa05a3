"""Which object is what: the keys that this package and stock writers make. Anything else is somebody's own."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from sf_pipelines.snapshot.manifest.pointer import CURRENT, parse_manifest_key
from sf_pipelines.snapshot.store import ObjectInfo


class Kind(StrEnum):
    """What an object is.

    ``WORK`` is what stages hand to each other and nobody reads once the snapshot is published: routed rows, exact
    neighbours, rows to be found again, staged manifests. ``NOTE`` is of no build: that routing has failed
    its gate, and what asking the store for conditional writes left there. ``FRAME`` is what an engine's frame was
    written to: the source of one build.
    """

    MANIFEST = "manifest"
    RECORD = "record"
    SHARD = "shard"
    ROUTING = "routing"
    RECEIPT = "receipt"
    SAMPLE = "sample"
    VERDICT = "verdict"
    WORK = "work"
    DAGSTER = "dagster"
    NOTE = "note"
    FRAME = "frame"
    KEPT = "kept"


_RUN = r"run_id=(?P<run>[^/]+)"
_MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
_STAGING = rf"staging/{_RUN}"
_HEX = r"[0-9a-f]{8}"
_PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (Kind.RECORD, rf"runs/{_MOMENT}_{_RUN}_[0-9a-f]{{32}}/run\.yaml"),
        (
            Kind.SHARD,
            (
                rf"(?P<unit>shards/{_RUN}/db=\d+/attempt=\d+(-{_HEX})?)"
                r"/(shard\.db|shard\.sidecar|(vector/)?vector_index\.lance/.+)"
            ),
        ),
        (Kind.ROUTING, rf"vector_meta/{_RUN}/(centroids|hyperplanes)(-{_HEX})?\.npy"),
        (Kind.RECEIPT, rf"{_STAGING}/receipts/(?P<stage>[a-z]+)(/[^/]+)?/\d+\.json"),
        (Kind.SAMPLE, rf"{_STAGING}/(samples/[a-z]+-{_HEX}\.arrow|rejects-{_HEX}\.parquet)"),
        (Kind.VERDICT, rf"{_STAGING}/verdicts/(?P<digest>[0-9a-f]{{64}})/[a-z_]+/[^/]+\.json"),
        (Kind.WORK, rf"{_STAGING}/((routed|truth|witnesses)/[^/]+-{_HEX}\.arrow|manifest-[0-9a-f]{{32}})"),
        (Kind.NOTE, r"staging/(outworn/[0-9a-f]{64}\.json|probe/[0-9a-f]{32})"),
        (Kind.FRAME, r"(?P<unit>staging/frames/[0-9a-f]{32})/part-[0-9a-f]{32}\.parquet"),
        (Kind.DAGSTER, r"(?P<unit>staging/dagster/runs/[^/]+)/.+"),
        (Kind.KEPT, rf"staging/dagster/latest/.+|pins/[^/]+\.json|{CURRENT}|\.sf_pipelines\.lock"),
    )
)


@dataclass(frozen=True)
class Item:
    """One recognised object.

    Attributes:
        info: the object.
        kind: what it is.
        run_id: build that it is of; None for what is of no build.
        unit: what lives and dies together: a shard's attempt, a Dagster run; else the object's own key.
        detail: stage of a receipt, manifest's digest of a verdict.
    """

    info: ObjectInfo
    kind: Kind
    run_id: str | None
    unit: str
    detail: str = ""

    @property
    def key(self) -> str:
        """The object's key."""
        return self.info.key


@dataclass
class Inventory:
    """All objects of a root.

    Attributes:
        runs: recognised objects by build.
        dagster: references of Dagster runs, by their folder.
        notes: what is of no build.
        frames: what frames were written to, by their folder.
        unknown: objects that nobody here has written.
    """

    runs: dict[str, list[Item]] = field(default_factory=lambda: defaultdict(list))
    dagster: dict[str, list[Item]] = field(default_factory=lambda: defaultdict(list))
    notes: list[Item] = field(default_factory=list)
    frames: defaultdict[str, list[Item]] = field(default_factory=lambda: defaultdict(list))
    unknown: list[ObjectInfo] = field(default_factory=list)

    @classmethod
    def of(cls, objects: Iterable[ObjectInfo]) -> "Inventory":
        """Sorts the objects of a root."""
        made = cls()
        for info in objects:
            item = recognise(info)
            if item is None:
                made.unknown.append(info)
            elif item.kind is Kind.DAGSTER:
                made.dagster[item.unit].append(item)
            elif item.kind is Kind.FRAME:
                made.frames[item.unit].append(item)
            elif item.kind is Kind.NOTE:
                made.notes.append(item)
            elif item.run_id is not None:
                made.runs[item.run_id].append(item)
        return made


def recognise(info: ObjectInfo) -> Item | None:
    """What an object is; None where its key is not one that this package or a stock writer makes."""
    name = parse_manifest_key(info.key)
    if name is not None:
        return Item(info, Kind.MANIFEST, name.run_id, info.key)
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(info.key)
        if match is not None:
            found = match.groupdict()
            detail = found.get("stage") or found.get("digest") or ""
            return Item(info, kind, found.get("run"), found.get("unit") or info.key, detail)
    return None


def newest(items: Iterable[Item]) -> datetime | None:
    """When the last of these objects was written; None where the store does not say of one."""
    moments = [item.info.modified for item in items]
    known = [moment for moment in moments if moment is not None]
    return max(known) if known and len(known) == len(moments) else None
