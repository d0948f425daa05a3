"""When a changed source is built: what the source sensor remembers between two looks, and what it decides.

What is remembered is one fingerprint of the whole set of files. So a file that is deleted, written again under its
name, or comes late with an old date is noticed like any other, and however many files change, one build is asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import ValidationError

from sf_pipelines.snapshot.config import digest_json
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.model import Model
from sf_pipelines.snapshot.source.files import SourceFile
from sf_pipelines.snapshot.store import ObjectInfo

Action = Literal["adopt", "build", "unchanged", "settle", "busy"]


class SourceCursor(Model):
    """What the sensor remembers.

    Attributes:
        version: of these fields.
        handled: fingerprint of the files that a build was last asked for, or that the first look found built.
        generation: how many builds were asked for; makes each run key new, also when old files come back.
        pending: fingerprint that is waiting to settle.
        pending_since: when it was first seen, seconds since 1970.
    """

    version: Literal[1] = 1
    handled: str | None = None
    generation: int = 0
    pending: str | None = None
    pending_since: float = 0.0

    @classmethod
    def read(cls, text: str | None) -> Self:
        """The cursor that Dagster kept.

        Raises:
            ConfigError: it is not one of ours.
        """
        if not text:
            return cls()
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(
                f"the cursor {text!r:.80} is none of this sensor's; clear it in the UI (the sensor then starts anew)"
            ) from error


@dataclass(frozen=True)
class Decision:
    """What to do, and what to remember.

    Attributes:
        action: ``adopt``: these files are built already; ``build``; ``unchanged``; ``settle``: wait until they have
            not changed for a while; ``busy``: wait until the build that is going on has ended.
        cursor: to be kept.
        wait: seconds that are left to settle.
    """

    action: Action
    cursor: SourceCursor
    wait: float = 0.0


def fingerprint(source: str, files: Iterable[ObjectInfo | SourceFile]) -> str:
    """Digest of a set of files: keys, sizes and version tags (S3: etag; local disk: inode, time of writing, size)."""
    return digest_json([source, sorted((file.key, file.size, file.etag or "") for file in files)])


def decide(
    cursor: SourceCursor, found: str, *, now: float, settle_seconds: float, built: str | None, busy: bool
) -> Decision:
    """What to do about the files that are there now.

    Args:
        cursor: what was remembered.
        found: fingerprint of the files that are there.
        now: seconds since 1970.
        settle_seconds: how long they must have been the same.
        built: fingerprint of the files that the current snapshot was built from; only asked as long as nothing was
            handled: later it may be about to be replaced by what was asked for.
        busy: whether a build is going on. It would be overtaken, or would overtake the new one, and one of the two
            fails then; so the new one waits.
    """
    if found == cursor.handled:
        return Decision("unchanged", _settled(cursor, found))
    if cursor.handled is None and found == built:
        return Decision("adopt", _settled(cursor, found))
    if found != cursor.pending:
        cursor = cursor.model_copy(update={"pending": found, "pending_since": now})
    # A clock that was set back must not make anybody wait for longer than asked.
    wait = min(settle_seconds, cursor.pending_since + settle_seconds - now)
    if wait > 0:
        return Decision("settle", cursor, wait)
    if busy:
        return Decision("busy", cursor)
    return Decision("build", _settled(cursor, found).model_copy(update={"generation": cursor.generation + 1}))


def _settled(cursor: SourceCursor, found: str) -> SourceCursor:
    return SourceCursor(handled=found, generation=cursor.generation)
