"""Calls of readers: written once as steps, run by threads or by asyncio.

A call is a generator. It does what needs no waiting itself and yields what does: tokens of the rate limiter, or work on
shards that are not in memory. Whoever runs it waits in its own way and sends the answer back, so that planning, merging
and the treatment of failures exist once for the sync and the async readers.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sf_pipelines.snapshot.errors import DeadlineError, IntegrityError, QueryError, SfPipelinesError, StoreError
from sf_pipelines.snapshot.reader.events import SILENT, EventField, EventName, ReaderEvents, Value
from sf_pipelines.snapshot.reader.handles import OpenShard, ShardHandles

# A shard's own failures. Others are of the call or of the reader, and every shard would have them.
_OF_A_SHARD = (StoreError, IntegrityError, DeadlineError)

AnswerT = TypeVar("AnswerT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Job(Generic[AnswerT]):
    """Work on one shard.

    Attributes:
        shard: its number.
        run: the work; on any thread.
    """

    shard: int
    run: Callable[[OpenShard], AnswerT]


@dataclass(frozen=True)
class Tokens:
    """Wait for the rate limiter.

    Attributes:
        count: tokens wanted.
    """

    count: int


@dataclass(frozen=True)
class FanOut:
    """Work on shards, side by side. The reply is the answer or the error of each shard.

    Attributes:
        handles: of the shards.
        jobs: one for each shard.
    """

    handles: ShardHandles
    jobs: Sequence[Job[Any]]


Outcomes = dict[int, Any]
Request = Tokens | FanOut
Steps = Generator[Request, Any, ResultT]


@dataclass
class Terms:
    """What a caller asks of a call, and what became of it.

    Attributes:
        timeout: seconds until the answer must be there; None waits as long as it takes.
        partial: leave out shards that fail in place of failing.
        missing: why, by shard, for those that were left out.
        facts: fields of the event that reports the call.
    """

    timeout: float | None = None
    partial: bool = False
    missing: dict[int, SfPipelinesError] = field(default_factory=dict)
    facts: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timeout is not None:
            self.timeout = _seconds(self.timeout)
        self.started = time.perf_counter()

    @property
    def left(self) -> float | None:
        """Seconds that are left, at least 0; None where there is no end."""
        if self.timeout is None:
            return None
        return max(0.0, self.timeout - (time.perf_counter() - self.started))

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the call began."""
        return (time.perf_counter() - self.started) * 1000

    def does_without(self, error: SfPipelinesError) -> bool:
        """Whether the call goes on without a shard that failed so."""
        return self.partial and isinstance(error, _OF_A_SHARD)

    def late(self, shard: int) -> DeadlineError:
        """The error of a shard that did not answer in time."""
        return DeadlineError(
            f"shard {shard} had not answered after {self.timeout} s; allow more time, take partial answers, or open "
            "shards before they are asked (preload)"
        )

    @contextmanager
    def reported(self, events: ReaderEvents, name: EventName | None, kind: str) -> Iterator[None]:
        """Tells a listener how the call ended; nothing where it has no name."""
        if events is SILENT or name is None:
            yield
            return
        status, error = "ok", None
        try:
            yield
            status = "partial" if self.missing else "ok"
        except SfPipelinesError as failed:
            status, error = "error", failed.kind
            raise
        except BaseException as failed:
            # Cancelled, interrupted, or a fault of ours: counted, and passed on.
            status, error = "error", type(failed).__name__
            raise
        finally:
            told: dict[str, Value] = {EventField.KIND: kind, EventField.STATUS: status, **self.facts}
            told[EventField.LATENCY_MS] = self.elapsed_ms
            if error is not None:
                told[EventField.ERROR] = error
            events.emit(name, told)


@dataclass(frozen=True)
class Call(Generic[ResultT]):
    """A call that can be run, once.

    Attributes:
        event: that reports it; None for none.
        terms: of the caller.
        steps: what is to be done.
    """

    event: EventName | None
    terms: Terms
    steps: Steps[ResultT]


def each_shard(
    handles: ShardHandles,
    jobs: Sequence[Job[AnswerT]],
    terms: Terms,
    is_quick: Callable[[OpenShard], bool],
    *,
    answered: bool = False,
) -> Steps[dict[int, AnswerT]]:
    """Runs jobs of different shards; those of shards that are quick right here, the others side by side.

    What takes microseconds, as a look-up in an open file or a payload that is held, costs more to hand to a thread.

    Args:
        handles: of the shards.
        jobs: one for each shard.
        terms: of the call; shards that failed join ``missing`` where partial answers are wanted.
        is_quick: whether the job of an opened shard is.
        answered: whether this fetches the rest of answers that came in time. In a partial answer they are not thrown
            away when the time is over: of shards that are open it is fetched right here, however late it is.

    Returns:
        The answers by shard.

    Raises:
        SfPipelinesError: a shard failed or was late, and the caller wants all; or no shard can answer this call.
    """
    found: dict[int, AnswerT] = {}
    slow: list[Job[AnswerT]] = []
    at_any_time = answered and terms.partial

    def settle(shard: int, outcome: Any) -> None:
        if not isinstance(outcome, SfPipelinesError):
            found[shard] = outcome
        elif terms.does_without(outcome):
            terms.missing[shard] = outcome
        else:
            raise outcome

    for job in jobs:
        late = terms.left == 0
        if late and not at_any_time:
            settle(job.shard, terms.late(job.shard))
            continue
        handle = handles.take_open(job.shard, _is_open if late else is_quick)
        if handle is None:
            slow.append(job)
            continue
        settle(job.shard, attempt(handles.using, handle, job.run))
    if slow:
        outcomes: Outcomes = yield FanOut(handles, slow)
        runs = {job.shard: job.run for job in slow}
        for shard, in_time in outcomes.items():
            is_late = at_any_time and isinstance(in_time, DeadlineError)
            handle = handles.take_open(shard, _is_open) if is_late else None
            settle(shard, in_time if handle is None else attempt(handles.using, handle, runs[shard]))
    return found


def attempt(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or the typed error: others go through."""
    try:
        return work(*arguments)
    except SfPipelinesError as error:
        return error


def _is_open(opened: OpenShard) -> bool:
    del opened
    return True


def _seconds(timeout: float) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise QueryError(f"timeout must be a number of seconds above 0, or None (got {timeout!r})")
    # Locks can wait 292 years; nobody will ask for the rest.
    return min(float(timeout), threading.TIMEOUT_MAX)
