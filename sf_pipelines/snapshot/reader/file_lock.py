"""Locks on files, between threads and processes. The kernel frees them when their holder dies."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sf_pipelines.snapshot.errors import StoreError


class _Handle:
    """An open lock file, of this process alone.

    A fork shares the lock with its parent: neither could give it up while the other lives. So a fork lets go of what
    it got, and what its parent does with the same object is none of its business.
    """

    def __init__(self, path: Path) -> None:
        with _opening:
            try:
                self.number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise StoreError(f"cannot keep copies of shards in {path.parent}: {error}") from error
            _held.add(self)

    def close(self) -> None:
        """Gives up the lock; does nothing where it is another process's."""
        with _opening:
            if self in _held:
                _held.remove(self)
                os.close(self.number)


# A fork comes before a file is opened or after it is known.
_opening = threading.RLock()
_held: set[_Handle] = set()


def _forget() -> None:
    """In a fork: closes what belongs to the parent, which keeps its locks."""
    while _held:
        os.close(_held.pop().number)
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_forget)


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """Holds a lock on a file, which is created where it is not there.

    The file may be removed by whoever had it before: then a new one is taken.

    Args:
        path: the file.
        how: as of ``fcntl.flock``.

    Raises:
        StoreError: the file cannot be made.
        BlockingIOError: somebody else has it, and ``how`` says not to wait.
    """
    while True:
        handle = _Handle(path)
        try:
            fcntl.flock(handle.number, how)
            if _is_still(handle.number, path):
                yield
                return
        finally:
            handle.close()


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
