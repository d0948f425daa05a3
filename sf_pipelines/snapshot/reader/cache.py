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
# Counting looks at every file: it is done again when this process has added such a part of the limit.
_RECOUNTS = 16


def default_root() -> Path:
    """``$SF_PIPELINES_CACHE``, or a folder of this user among the temporary files."""
    named = os.environ.get(_ENVIRONMENT)
    return Path(named) if named else Path(tempfile.gettempdir(), f"sf_pipelines-{os.getuid()}", "cache")


def shard_digest(objects: Iterable[ShardObject]) -> str:
    """Digest (hex) of a sealed list of objects; equal shards share one copy."""
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
    def checkout(
        self, store: Store, prefix: str, objects: Sequence[ShardObject] | None, digest: str | None = None
    ) -> Iterator[Path]:
        """A verified local copy of a shard's directory, held for as long as the block lasts."""
        if objects is None:
            listed = _listed(store, prefix)
            sizes = {item.path: item.size for item in listed}
            name = digest or _digest(store.url_of(prefix), [[i.path, i.size, i.sha256] for i in listed])
            entry = _Entry(self.root, name, store, prefix, sizes, None)
        else:
            sizes = {_safe(item.path, store, prefix): item.size for item in objects}
            sealed = {item.path: item.sha256 for item in objects}
            entry = _Entry(self.root, digest or shard_digest(objects), store, prefix, sizes, sealed)
        if not sizes:
            raise ObjectMissingError(f"{store.url_of(prefix)} holds no objects; the shard is gone")
        # Whoever tidies up temporary files may have removed it.
        _private_folder(self.root)
        with locked(entry.lock, fcntl.LOCK_SH):
            if not entry.is_right():
                with locked(entry.fill_lock, fcntl.LOCK_EX):
                    # Somebody else may have filled it while this one waited.
                    if not entry.is_right():
                        try:
                            entry.fill()
                        except StoreError:
                            raise
                        except FileNotFoundError:
                            # Somebody emptied the cache at the same time.
                            _private_folder(self.root)
                            entry.fill()
                if _growth.is_due(self.root, sum(sizes.values())):
                    self.evict()
            with suppress(FileNotFoundError):
                entry.lock.touch()
            yield entry.folder

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
            name = lock.name.removesuffix(".lock")
            with suppress(BlockingIOError), locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(self.root / name, ignore_errors=True)
                for left_over in self.root.glob(f"tmp-{name}-*"):
                    shutil.rmtree(left_over, ignore_errors=True)
                _sealed_file(self.root / name).unlink(missing_ok=True)
                (self.root / f"{name}.fill").unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
                total -= sizes.get(name, 0)
        _growth.counted(self.root, total, self.max_bytes)


class _Growth:
    """How much this process has added to a cache since it counted what is there. Thread-safe.

    What other processes add is seen at the next count, so each may exceed the limit by a sixteenth.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._room: dict[Path, int] = {}

    def counted(self, root: Path, total: int, limit: int) -> None:
        """Notes what a count has found, and what may be added until the next one."""
        part = limit // _RECOUNTS
        with self._lock:
            self._room[root] = min(limit - total, part) if total < limit else part

    def is_due(self, root: Path, added: int) -> bool:
        """Whether it is time to count again, after so many bytes more."""
        with self._lock:
            if root not in self._room:
                return True
            self._room[root] -= added
            return self._room[root] < 0

    def pause(self) -> None:
        """Keeps everybody out until ``go_on``."""
        self._lock.acquire()

    def go_on(self) -> None:
        """Ends ``pause``."""
        self._lock.release()


_Stamps = dict[str, tuple[int, int, int]]


class _HashedCopies:
    """Copies that this process has hashed: their digests, and the stamps that their files had then. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: LRUCache[Path, tuple[dict[str, str], _Stamps]] = LRUCache(4096)

    def remember(self, folder: Path, digests: dict[str, str], stamps: _Stamps) -> None:
        """Notes that a copy's files had these digests while they had these stamps."""
        with self._lock:
            self._known[folder] = (digests, stamps)

    def knows(self, folder: Path, digests: dict[str, str]) -> bool:
        """Whether a copy was hashed to these digests and is untouched since."""
        with self._lock:
            known = self._known.get(folder)
        return known is not None and known[0] == digests and known[1] == _stamps(folder)

    def pause(self) -> None:
        """Keeps everybody out until ``go_on``."""
        self._lock.acquire()

    def go_on(self) -> None:
        """Ends ``pause``."""
        self._lock.release()


_hashed, _growth = _HashedCopies(), _Growth()
# Nobody is in the middle of it when this process forks: the child's copy would be locked for ever.
for _shared in (_hashed, _growth):
    os.register_at_fork(before=_shared.pause, after_in_parent=_shared.go_on, after_in_child=_shared.go_on)


class _Entry:
    """One shard's copy."""

    def __init__(
        self,
        root: Path,
        name: str,
        store: Store,
        prefix: str,
        sizes: dict[str, int],
        sealed: dict[str, str] | None,
    ) -> None:
        self.folder = root / name
        self.lock = root / f"{name}.lock"
        self.fill_lock = root / f"{name}.fill"
        self._sealed_file = _sealed_file(self.folder)
        self._store = store
        self._prefix = prefix
        self._sizes = sizes
        self._sealed = sealed

    def is_right(self) -> bool:
        """Whether the copy holds exactly the recorded bytes and nothing else.

        What this process has hashed before is not hashed again as long as the kernel says that nobody has written to
        the files since: their change time cannot be set.
        """
        sealed = self._sealed if self._sealed is not None else self._read_sealed()
        if sealed is None or not self.folder.is_dir():
            return False
        try:
            return _hashed.knows(self.folder, sealed) or self._rehash(sealed)
        except OSError:
            # Unreadable or vanished: not a copy to rely on; it is fetched again.
            return False

    def _rehash(self, sealed: dict[str, str]) -> bool:
        before = _stamps(self.folder)
        if before.keys() != sealed.keys():
            return False
        if any(_sha256(self.folder / name) != digest for name, digest in sealed.items()):
            return False
        _hashed.remember(self.folder, sealed, before)
        return True

    def fill(self) -> None:
        """Downloads into a folder of its own, checks, and puts that in place of whatever was there."""
        for left_over in self.folder.parent.glob(f"tmp-{self.folder.name}-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary = self.folder.parent / f"tmp-{self.folder.name}-{uuid.uuid4().hex}"
        try:
            temporary.mkdir()
            with ThreadPoolExecutor(min(_DOWNLOADS, max(1, len(self._sizes)))) as pool:
                fetched = dict(pool.map(lambda name: self._fetch(name, temporary / "new"), self._sizes))
            self._put_in_place(temporary, fetched)
        except (StoreError, FileNotFoundError):
            raise
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(f"the disk of copies of shards, at {self.folder.parent}, is full") from error
            where = self._store.url_of(self._prefix)
            raise StoreError(f"cannot keep a copy of {where} in {self.folder.parent}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _put_in_place(self, temporary: Path, digests: dict[str, str]) -> None:
        if self._sealed is None:
            (temporary / "sealed").write_text(json.dumps(digests))
            (temporary / "sealed").replace(self._sealed_file)
        # Others may hold a copy that went bad: they have its files open, and find the right ones by name.
        if self.folder.exists():
            self.folder.rename(temporary / "old")
        stamps = _stamps(temporary / "new")
        (temporary / "new").rename(self.folder)
        # Hashed while they were written; nobody else knew the temporary folder.
        _hashed.remember(self.folder, digests, stamps)

    def _fetch(self, name: str, folder: Path) -> tuple[str, str]:
        key = f"{self._prefix}/{name}"
        size, digest = self._store.download(key, folder / name)
        if size != self._sizes[name]:
            raise DigestMismatchError(
                f"{self._store.url_of(key)} has {size} bytes, {self._sizes[name]} were recorded; "
                "the snapshot is damaged: publish it again or roll back"
            )
        if self._sealed is not None and digest != self._sealed[name]:
            raise DigestMismatchError(
                f"{self._store.url_of(key)} has SHA-256 {digest}, {self._sealed[name]} was recorded; "
                "the snapshot is damaged: publish it again or roll back"
            )
        return name, digest

    def _read_sealed(self) -> dict[str, str] | None:
        try:
            found = json.loads(self._sealed_file.read_text())
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


# Locks.


class _LockFile:
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
_held: set[_LockFile] = set()


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
    """
    while True:
        handle = _LockFile(path)
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
