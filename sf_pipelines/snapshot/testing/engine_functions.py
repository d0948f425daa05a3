"""A configuration whose workers misbehave, once they are told to: what ``EngineConformance`` builds with."""

import os
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import IntegrityError, StoreUnavailableError
from sf_pipelines.snapshot.store import Store

_TICKS = 50
_TICK_SECONDS = 0.1

_upload = Store.upload
_orders: "Misbehaving | None" = None


class Misbehaving(WriteConfig):
    """Whoever unpickles it in another process than the driver's does as it says when a task stores its routed rows.

    Attributes:
        folder: for the file ``armed``, without which workers behave, and for what they leave.
        act: name of what they do.
        driver: id of the process that made it.
    """

    folder: Path
    act: str
    driver: int = Field(default_factory=os.getpid)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        global _orders  # noqa: PLW0603 - a worker serves many tests, one at a time
        super().__setstate__(state)
        # Dask's scheduler, which reads what it hands on, may be in the driver's process.
        if os.getpid() != self.driver:
            _orders = self
            Store.upload = _upload_as_told  # pyright: ignore[reportAttributeAccessIssue]


def _upload_as_told(store: Store, path: Path, key: str, **options: Any) -> Any:
    if _orders is not None and "/routed/" in key and (_orders.folder / "armed").exists():
        (_orders.folder / "calls" / uuid.uuid4().hex).touch()
        _ACTS[_orders.act](_orders.folder)
    return _upload(store, path, key, **options)


def _behave(folder: Path) -> None:
    del folder


def _fail(folder: Path) -> None:
    """Always an error."""
    del folder
    raise IntegrityError("not today")


def _stumble(folder: Path) -> None:
    """The first time, an error that may pass."""
    if _first(folder):
        raise StoreUnavailableError("the store does not answer")


def _die(folder: Path) -> None:
    """The first time, the process is killed."""
    if _first(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def _tick(folder: Path) -> None:
    """Writes to the file ``ticks`` for some seconds."""
    for _ in range(_TICKS):
        with (folder / "ticks").open("a") as file:
            file.write(".")
        time.sleep(_TICK_SECONDS)


def _first(folder: Path) -> bool:
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


_ACTS: dict[str, Callable[[Path], None]] = {
    "behave": _behave,
    "fail": _fail,
    "stumble": _stumble,
    "die": _die,
    "tick": _tick,
}
