"""A snapshot whose runs stop at a write, so that a test can kill them there. It is copied into the served project.

The test writes ``pause`` (what the object's name contains, and whether to stop before or after it is written). The
first process that gets there takes that file away, writes ``paused`` with its id, and waits for its end or until
``paused`` is gone.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sf_pipelines.components import VectorSnapshotComponent
from sf_pipelines.snapshot.store import Store

PAUSE, PAUSED = (Path(__file__).parent / name for name in ("pause", "paused"))


class PausingSnapshot(VectorSnapshotComponent):
    """The usual component; that YAML names it is what loads this module into every process."""


def _pausing(write: Callable[..., Any]) -> Callable[..., Any]:
    def paused_write(self: Store, *args: Any, **options: Any) -> Any:
        needle, when = PAUSE.read_text().split() if PAUSE.exists() else (None, None)
        hit = needle is not None and any(isinstance(arg, str) and needle in arg for arg in args)
        if hit and when == "before":
            _pause()
        done = write(self, *args, **options)
        if hit and when == "after":
            _pause()
        return done

    return paused_write


def _pause() -> None:
    PAUSE.unlink()
    fresh = PAUSED.with_suffix(".new")
    fresh.write_text(str(os.getpid()))
    fresh.rename(PAUSED)
    while PAUSED.exists():
        time.sleep(0.1)


for _name in ("put", "create", "swap", "upload"):
    setattr(Store, _name, _pausing(getattr(Store, _name)))
