"""Vector functions that misbehave, once they are told to: what ``EngineConformance`` has workers run.

Each is given the column ``folder``. While the file ``armed`` is not in that folder, all of them just give the column
``vector``: the stages before the routing call them in the driver's process.
"""

import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pyarrow as pa

# How long a changed source stays so: shorter than the waiting between all tries of a task.
_CHANGED_SECONDS = 1.0
_TICKS = 50
_TICK_SECONDS = 0.1


def steady(rows: pa.RecordBatch) -> pa.Array:
    """The vectors."""
    return rows.column("vector")


def fails(rows: pa.RecordBatch) -> pa.Array:
    """Always an error."""
    if folder := _armed(rows):
        _count(folder)
        raise ValueError("no model today")
    return steady(rows)


def source_changes(rows: pa.RecordBatch) -> pa.Array:
    """The first time, the file of the rows that come next is another one for a moment."""
    if folder := _armed(rows):
        _count(folder)
        if _first(folder):
            source = folder / "source" / "b.parquet"
            was = source.stat()
            os.utime(source, ns=(was.st_atime_ns, was.st_mtime_ns + 10**9))
            back = threading.Timer(_CHANGED_SECONDS, os.utime, (source,), {"ns": (was.st_atime_ns, was.st_mtime_ns)})
            back.start()
    return steady(rows)


def dies(rows: pa.RecordBatch) -> pa.Array:
    """The first time, the process is killed."""
    if folder := _armed(rows):
        _count(folder)
        if _first(folder):
            os.kill(os.getpid(), signal.SIGKILL)
    return steady(rows)


def ticks(rows: pa.RecordBatch) -> pa.Array:
    """Writes to the file ``ticks`` for some seconds."""
    if folder := _armed(rows):
        for _ in range(_TICKS):
            with (folder / "ticks").open("a") as file:
                file.write(".")
            time.sleep(_TICK_SECONDS)
    return steady(rows)


def _armed(rows: pa.RecordBatch) -> Path | None:
    folder = Path(rows.column("folder")[0].as_py())
    return folder if (folder / "armed").exists() else None


def _count(folder: Path) -> None:
    (folder / "calls" / uuid.uuid4().hex).touch()


def _first(folder: Path) -> bool:
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
