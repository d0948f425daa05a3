"""A configuration whose workers do to themselves what a test asks for, in the middle of real tasks.

It is an ordinary ``WriteConfig``; only unpickling one, as workers do, changes the process that does it: input ranges
are small there, and writes to the store look into ``folder``. A file there says what is to happen at the first write of
an object whose key contains the file's text:

``die``: the process is killed right after that write.
``hold``: the process waits before it, for as long as there is the file ``held``.
``linger``: it waits some seconds before every such write.
"""

import os
import signal
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import Field

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.store import Store

# The module that cuts the source, in the driver and in workers alike, and what makes a range of each row group.
CUTTER = import_module("sf_pipelines.snapshot.stages.sample")
RANGE_BYTES = 100 * 16 * 4
LINGER_SECONDS = 3.0
_HELD_SECONDS = 120.0

_folder: Path | None = None


class Misbehaving(WriteConfig):
    """A configuration that makes its workers look for orders.

    Attributes:
        folder: where the orders are.
        driver: id of the process that made it, which stays as it is.
    """

    folder: Path
    driver: int = Field(default_factory=os.getpid)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        # Dask's scheduler, which reads what it hands on, is in the driver's process.
        if os.getpid() != self.driver:
            _obey(self.folder)


def _obey(folder: Path) -> None:
    global _folder  # noqa: PLW0603 - a worker serves many tests, one at a time
    if _folder is None:
        setattr(CUTTER, "_RANGE_BYTES", RANGE_BYTES)  # noqa: B010
        for name in ("put", "create", "upload"):
            setattr(Store, name, _obedient(getattr(Store, name)))
    _folder = folder


def _obedient(write: Callable[..., Any]) -> Callable[..., Any]:
    def obedient_write(self: Store, *args: Any, **options: Any) -> Any:
        keys = [arg for arg in args if isinstance(arg, str)]
        if order := _order("linger", keys):
            order.with_name("lingered").touch()
            time.sleep(LINGER_SECONDS)
        if (order := _order("hold", keys)) and _take(order, "held"):
            _wait(order.with_name("held"))
        done = write(self, *args, **options)
        if (order := _order("die", keys)) and _take(order, "dead"):
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return obedient_write


def _order(name: str, keys: list[str]) -> Path | None:
    """The file of an order that is about one of these keys."""
    assert _folder is not None
    order = _folder / name
    try:
        needle = order.read_text()
    except FileNotFoundError:
        return None
    return order if any(needle in key for key in keys) else None


def _take(order: Path, name: str) -> bool:
    """Whether this process is the one that carries an order out."""
    try:
        order.rename(order.with_name(name))
    except FileNotFoundError:
        return False
    return True


def _wait(held: Path) -> None:
    deadline = time.monotonic() + _HELD_SECONDS
    while held.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
