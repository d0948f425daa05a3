"""Refreshing in the background."""

import random
import threading
import weakref
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from sf_pipelines.snapshot.errors import ReaderClosedError

if TYPE_CHECKING:
    from sf_pipelines.snapshot.reader.core import ReaderCore

# Readers that were started together must not ask the store together for ever.
_JITTER = 0.1
_random = random.SystemRandom()


class BackgroundRefresh:
    """A thread that refreshes a reader until it is closed, or forgotten.

    It is a thread for async readers, too: it outlives the event loop that the reader was opened in.

    Args:
        core: of the reader.
        interval: seconds between refreshes, give or take a tenth.
    """

    def __init__(self, core: "ReaderCore", interval: float) -> None:
        # Not an event: the callback may come from the garbage collector, in the thread that is just waiting on it.
        self._stopped: SimpleQueue[None] = SimpleQueue()
        # The thread must not keep alive a reader that nobody else holds.
        known = weakref.ref(core, lambda _: self.stop())
        self._thread = threading.Thread(
            target=_keep_refreshing,
            args=(known, self._stopped, interval),
            name="sf-pipelines-refresh",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the refresh that it may be at."""
        self._stopped.put(None)


def _keep_refreshing(known: "weakref.ref[ReaderCore]", stopped: "SimpleQueue[None]", interval: float) -> None:
    while not _told(stopped, interval * _random.uniform(1 - _JITTER, 1 + _JITTER)):
        core = known()
        if core is None:
            return
        try:
            core.refresh()
        except ReaderClosedError:
            return
        except BaseException as error:  # noqa: BLE001 - whatever it is: the old snapshot serves, and health tells
            core.note_failure(error)
        del core


def _told(stopped: "SimpleQueue[None]", seconds: float) -> bool:
    """Whether the thread is to end; waits so long for it."""
    try:
        stopped.get(timeout=min(seconds, threading.TIMEOUT_MAX))
    except Empty:
        return False
    return True
