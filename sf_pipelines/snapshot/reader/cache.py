"""Verified local copies of shards, shared by the processes of one user.

A shard is never searched where it is stored: its objects are copied, their digests checked, and the copy is
checked again each time it is taken out. Layout below the cache's root, for an entry ``d``:

* ``d/``: the objects, exactly those that were recorded;
* ``d.sealed``: for shards whose writer recorded no digests: those of the bytes that were downloaded;
* ``d.lock``: its holders have it locked shared, eviction takes it exclusively; its time is that of the last
  use;
* ``d.fill``: locked exclusively by whoever downloads or replaces the entry.

The kernel frees locks when their holder dies.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from cachetools import LRUCache

from sf_pipelines.snapshot.errors import (
    DigestMismatchError,
    DiskFullError,
    IntegrityError,
    ObjectMissingError,
    StoreDeniedError,
    StoreError,
)
from sf_pipelines.snapshot.manifest.models import ShardObject
from sf_pipelines.snapshot.store import Store
from sf_pipelines.snapshot.store.client import is_disk_full

DEFAULT_BYTES = 20 * 1024**3
_ENVIRONMENT = "SF_PIPELINES_CACHE"
_DOWNLOADS = 8
# Counting looks at every file: it is done again when this process has added such a part of the limit. What other
# processes add is seen at the next count, so each may exceed the limit by a sixteenth.
_RECOUNTS = 16

_Stamps = dict[str, tuple[int, int, int]]

# What this process knows, under one lock. Nobody is in the middle of it when the process forks.
_lock = threading.RLock()
# Lock files that are open.
_open_locks: set[int] = set()
# Digests of copies that were hashed, and the stamps that their files had then.
_hashed: LRUCache[Path, tuple[dict[str, str], _Stamps]] = LRUCache(4096)
# Bytes that may be added to a cache before it is counted again.
_room: dict[Path, int] = {}


def _after_fork() -> None:
    """In a fork: closes lock files, which are the parent's; while the fork has one open, nobody can give it up."""
    while _open_locks:
        os.close(_open_locks.pop())
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)


def default_root() -> Path:
    """``$SF_PIPELINES_CACHE``, or a folder of this user among the temporary files."""
    named = os.environ.get(_ENVIRONMENT)
    return Path(named) if named else Path(tempfile.gettempdir(), f"sf_pipelines-{os.getuid()}", "cache")


def shard_digest(objects: Iterable[ShardObject]) -> str:
    """Digest (hex) of a recorded list of objects; equal shards share one copy."""
    return _digest("sealed", sorted([item.path, item.size, item.sha256] for item in objects))


class ShardCache:
    """A folder of verified copies.

    Args:
        root: the folder, made where it is missing; None is ``default_root()``.
        max_bytes: entries that nobody uses are dropped, longest unused first, until the rest fits. Entries in
            use stay, so more can be on disk for a while.

    Raises:
        StoreDeniedError: the folder belongs to somebody else or cannot be made.
    """

    def __init__(self, root: str | Path | None = None, max_bytes: int = DEFAULT_BYTES) -> None:
        self.root = Path(root or default_root()).expanduser().absolute()
        self.max_bytes = max_bytes
        _private_folder(self.root)

    @contextmanager
    def checkout(self, store: Store, prefix: str, objects: Sequence[ShardObject] | None) -> Iterator[Path]:
        """A verified local copy of a shard's directory, held for as long as the block lasts.

        Args:
            store: where the shard is.
            prefix: its directory.
            objects: what was recorded of it; None takes what is there.
        """
        copy = _Copy(self.root, store, prefix, objects)
        # A clean-up of temporary files may have removed it.
        _private_folder(self.root)
        with locked(copy.lock, fcntl.LOCK_SH):
            if not copy.is_right():
                with locked(copy.fill_lock, fcntl.LOCK_EX):
                    # Somebody else may have filled it while this one waited.
                    if not copy.is_right():
                        try:
                            copy.fill()
                        except StoreError:
                            raise
                        except FileNotFoundError:
                            # Somebody emptied the cache at the same time.
                            _private_folder(self.root)
                            copy.fill()
                with _lock:
                    room = _room[self.root] = _room.get(self.root, -1) - copy.size
                if room < 0:
                    self.evict()
            with suppress(FileNotFoundError):
                copy.lock.touch()
            yield copy.folder

    def distrust(self, folder: Path) -> None:
        """Has a copy that was checked out, and whose writer recorded no digests, be fetched again for the next one."""
        _sealed_file(folder).unlink(missing_ok=True)

    def evict(self) -> None:
        """Drops entries that nobody uses, longest unused first, until the rest fits into ``max_bytes``."""
        sizes = {path.name: _size_of(path) for path in self.root.glob("*") if path.is_dir()}
        total = sum(sizes.values())
        by_age = sorted(self.root.glob("*.lock"), key=_last_use) if total > self.max_bytes else []
        for lock in by_age:
            if total <= self.max_bytes:
                break
            folder = lock.with_suffix("")
            with suppress(BlockingIOError), locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(folder, ignore_errors=True)
                _remove_left_overs(folder)
                _sealed_file(folder).unlink(missing_ok=True)
                lock.with_suffix(".fill").unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
                total -= sizes.get(folder.name, 0)
        part = self.max_bytes // _RECOUNTS
        with _lock:
            _room[self.root] = min(self.max_bytes - total, part) if total < self.max_bytes else part


class _Copy:
    """One shard's copy: where it is, and what it must hold."""

    def __init__(self, root: Path, store: Store, prefix: str, objects: Sequence[ShardObject] | None) -> None:
        if objects is None:
            listed = _listed(store, prefix)
            name = _digest(store.url_of(prefix), [[item.path, item.size, item.sha256] for item in listed])
        else:
            listed, name = objects, shard_digest(objects)
        if not listed:
            raise ObjectMissingError(f"{store.url_of(prefix)} holds no objects; the shard is gone")
        self.folder = root / name
        self.lock = root / f"{name}.lock"
        self.fill_lock = root / f"{name}.fill"
        self._store = store
        self._prefix = prefix
        self._sizes = {_safe(item.path, store, prefix): item.size for item in listed}
        self._recorded = None if objects is None else {item.path: item.sha256 for item in objects}

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(self._sizes.values())

    def is_right(self) -> bool:
        """Whether the copy holds exactly the recorded bytes and nothing else.

        What this process has hashed before is not hashed again as long as the kernel says that nobody has written to
        the files since: their change time cannot be set.
        """
        digests = self._recorded or self._read_sealed()
        if digests is None:
            return False
        try:
            stamps = _stamps(self.folder)
            with _lock:
                if _hashed.get(self.folder) == (digests, stamps):
                    return True
            if stamps.keys() != digests.keys():
                return False
            if any(_sha256(self.folder / name) != digest for name, digest in digests.items()):
                return False
        except OSError:
            # Unreadable or vanished: not a copy to rely on; it is fetched again.
            return False
        with _lock:
            _hashed[self.folder] = digests, stamps
        return True

    def fill(self) -> None:
        """Downloads into a folder of its own, checks, and puts that in place of whatever was there."""
        _remove_left_overs(self.folder)
        root = self.folder.parent
        temporary = root / f"tmp-{self.folder.name}-{uuid.uuid4().hex}"
        try:
            temporary.mkdir()
            with ThreadPoolExecutor(min(_DOWNLOADS, len(self._sizes))) as pool:
                digests = dict(pool.map(lambda name: self._fetch(name, temporary / "new"), self._sizes))
            self._put_in_place(temporary, digests)
        except (StoreError, FileNotFoundError):
            raise
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(f"the disk of copies of shards, at {root}, is full") from error
            raise StoreError(f"cannot keep a copy of {self._store.url_of(self._prefix)} in {root}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _put_in_place(self, temporary: Path, digests: dict[str, str]) -> None:
        if self._recorded is None:
            (temporary / "sealed").write_text(json.dumps(digests))
            (temporary / "sealed").replace(_sealed_file(self.folder))
        # Others may hold a copy that went bad: they have its files open, and find the right ones by name.
        if self.folder.exists():
            self.folder.rename(temporary / "old")
        stamps = _stamps(temporary / "new")
        (temporary / "new").rename(self.folder)
        # Hashed while they were written; nobody else knew the temporary folder.
        with _lock:
            _hashed[self.folder] = digests, stamps

    def _fetch(self, name: str, folder: Path) -> tuple[str, str]:
        key = f"{self._prefix}/{name}"
        size, digest = self._store.download(key, folder / name)
        if size != self._sizes[name]:
            wrong = f"{size} bytes, {self._sizes[name]} were recorded"
        elif self._recorded is not None and digest != self._recorded[name]:
            wrong = f"SHA-256 {digest}, {self._recorded[name]} was recorded"
        else:
            return name, digest
        raise DigestMismatchError(
            f"{self._store.url_of(key)} has {wrong}; the snapshot is damaged: publish it again or roll back"
        )

    def _read_sealed(self) -> dict[str, str] | None:
        try:
            found = json.loads(_sealed_file(self.folder).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.keys() == self._sizes.keys() else None


def _listed(store: Store, prefix: str) -> list[ShardObject]:
    """What lies in a shard's directory. Without recorded digests the version tag stands for the bytes."""
    found = [
        ShardObject(
            path=_safe(info.key.removeprefix(f"{prefix}/"), store, prefix),
            size=info.size,
            sha256=hashlib.sha256(f"{info.etag}".encode()).hexdigest(),
        )
        for info in store.objects(prefix)
    ]
    return sorted(found, key=lambda item: item.path)


def _safe(path: str, store: Store, prefix: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "/".join(parts) != path or "\\" in path:
        raise IntegrityError(f"{store.url_of(prefix)} names an object {path!r} that is no plain relative path")
    return path


def _private_folder(root: Path) -> None:
    """Makes a folder. One among the temporary files must be ours: anybody could have put it there."""
    ours = [root.parent, root] if root == default_root() and not os.environ.get(_ENVIRONMENT) else []
    try:
        for folder in ours:
            folder.mkdir(mode=0o700, exist_ok=True)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = {folder: folder.lstat() for folder in ours}
    except OSError as error:
        raise StoreDeniedError(f"cannot use {root} for copies of shards: {error}") from error
    for folder, info in found.items():
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
            raise StoreDeniedError(f"{folder} is no folder of this user alone; name a private one in {_ENVIRONMENT}")


def _sealed_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sealed")


def _remove_left_overs(folder: Path) -> None:
    """Of downloads of a copy that were killed."""
    for left_over in folder.parent.glob(f"tmp-{folder.name}-*"):
        shutil.rmtree(left_over, ignore_errors=True)


def _files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Everything in a folder that is no folder; links count as what they are."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            else:
                yield entry


def _size_of(folder: Path) -> int:
    with suppress(FileNotFoundError):
        return sum(entry.stat(follow_symlinks=False).st_size for entry in _files(folder))
    return 0


def _last_use(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _stamps(folder: Path) -> _Stamps:
    """Inode, size and change time of each file of a copy."""
    out: _Stamps = {}
    for entry in _files(folder):
        found = entry.stat(follow_symlinks=False)
        out[os.path.relpath(entry.path, folder)] = (found.st_ino, found.st_size, found.st_ctime_ns)
    return out


def _sha256(path: Path) -> str:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(kind: str, value: object) -> str:
    return hashlib.sha256(json.dumps([kind, value], separators=(",", ":")).encode()).hexdigest()


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """Holds a lock on a file, which is created where it is not there.

    Whoever had it before may have removed the file: then a new one is taken. In a fork it ends without effect.
    """
    process = os.getpid()
    while True:
        with _lock:
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise StoreError(f"cannot keep copies of shards in {path.parent}: {error}") from error
            _open_locks.add(handle)
        try:
            fcntl.flock(handle, how)
            if _is_still(handle, path):
                yield
                return
        finally:
            if os.getpid() == process:
                with _lock:
                    _open_locks.remove(handle)
                    os.close(handle)


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
