"""Access to an object store: local disk, S3 or memory, by one set of verbs.

A store is opened on a root; keys are relative to it and use ``/``. Conditional writes settle lost answers: when a
connection dies after the server applied a write, the client sees an error although the object is ours, so every
conditional write is read back and decided as *mine*, *theirs* or (a typed error) *unknown*. The bytes of such
objects must therefore be unique to the writer: put a write id in them.
"""

import fcntl
import hashlib
import io
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, unquote

import stamina
from obstore import exceptions as obstore_errors
from obstore import open_writer
from obstore.store import LocalStore, MemoryStore, S3Store

from sf_pipelines.snapshot.errors import (
    ConfigError,
    DigestMismatchError,
    IntegrityError,
    ObjectMissingError,
    ReaderForkedError,
    SfPipelinesError,
    SourceChangedError,
    StoreDeniedError,
    StoreError,
    StoreUnavailableError,
    WriteUncertainError,
    cause_of,
    is_panic,
    without_secrets,
)
from sf_pipelines.snapshot.model import Model
from sf_pipelines.snapshot.store.addresses import location_fault
from sf_pipelines.snapshot.store.client import S3Options, first_line, is_plain_key, listed, s3_client, store_error

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult

# Of objects that are read whole; those that are small by nature have a limit of their own.
MAX_WHOLE_BYTES = 256 * 1024 * 1024

_CHUNK = 4 * 1024 * 1024
_PART = 32 * 1024 * 1024
# What S3 copies in one request; 10,000 parts of an upload, each of _PART bytes, are 312 GiB.
_COPIED_AT_ONCE = 5 * 1024**3
_DELETED_TOGETHER = 1000  # as many as S3 takes in one request
_LOCK_NAME = ".sf_pipelines.lock"
_QUOTE_SAFE = "/:=@+,~"

_memory_stores: dict[str, MemoryStore] = {}
# The process that first read or wrote by obstore, if one did: its threads are not in processes forked from it.
_first_users: list[int] = []


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object; its key is relative to the store's root."""

    key: str
    size: int
    # The store's version tag; on S3 it repeats when the same bytes are written again.
    etag: str | None
    modified: datetime | None = None


class Ref(Model):
    """An object and what its bytes must be.

    Attributes:
        key: relative to the store's root.
        size: bytes.
        sha256: hex.
        rows: of a table, else None.
    """

    key: str
    size: int
    sha256: str
    rows: int | None = None

    @classmethod
    def of(cls, key: str, data: bytes, *, rows: int | None = None) -> Self:
        """Of these bytes."""
        return cls(key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)


@dataclass(frozen=True)
class Versioned:
    """An object's bytes with the version that a compare-and-swap must find."""

    data: bytes
    etag: str | None


class Store:
    """One root in an object store."""

    def __init__(self, url: str, backend: S3Store | LocalStore | MemoryStore, local_root: Path | None = None) -> None:
        self.url = url
        self.local_root = local_root
        self._backend = backend

    @classmethod
    def open(cls, location: str | Path, s3: S3Options | None = None, *, create: bool = False) -> Self:
        """Opens a root: ``s3://bucket/prefix``, ``file:///path``, a path, or ``memory://name`` (this process only).

        Without ``s3``, credentials and endpoint are the environment's. ``create`` makes a local folder that does not
        exist; S3 needs no folders.
        """
        text = str(location)
        shown = repr(without_secrets(text))
        if fault := location_fault(text):
            raise ConfigError(f"store {shown} {fault}")
        scheme, rest = text.split("://", 1) if "://" in text else ("file", text)
        if scheme == "s3":
            bucket, _, prefix = rest.partition("/")
            prefix = prefix.strip("/")
            url = f"s3://{bucket}/{prefix}".rstrip("/")
            return cls(url, s3_client(bucket, prefix, s3))
        if scheme == "memory":
            return cls(text.rstrip("/"), _memory_stores.setdefault(rest.rstrip("/"), MemoryStore()))
        if scheme != "file":
            raise ConfigError(f"store {shown}: unknown scheme {scheme}://; use s3://bucket/prefix or a local path")
        root = Path(unquote(rest) if "://" in text else rest).expanduser().absolute()
        return cls(
            f"file://{quote(str(root), safe=_QUOTE_SAFE)}", LocalStore(prefix=_folder(root, create=create)), root
        )

    # Naming.

    def url_of(self, key: str) -> str:
        """Absolute address of a key."""
        return f"{self.url}/{quote(key, safe=_QUOTE_SAFE) if self.local_root else key}"

    # Reading.

    def get(self, key: str, *, limit: int = MAX_WHOLE_BYTES) -> bytes:
        """The whole object; an ``IntegrityError``, before any byte is read, where it is larger than the limit."""
        return self.get_versioned(key, limit=limit).data

    def get_versioned(self, key: str, *, limit: int = MAX_WHOLE_BYTES) -> Versioned:
        """The whole object and its version; errors as of ``get``."""
        with self._translated("read", key):
            result = self._open(key)
            size = result.meta["size"]
            if size > limit:
                raise IntegrityError(f"{self.url_of(key)} has {size:,} bytes, more than the {limit:,} that are read")
            return Versioned(bytes(result.bytes()), result.meta["e_tag"])

    def find(self, key: str, *, limit: int = MAX_WHOLE_BYTES) -> Versioned | None:
        """The object and its version, or None when it is not there."""
        try:
            return self.get_versioned(key, limit=limit)
        except ObjectMissingError:
            return None

    def exists(self, key: str) -> bool:
        """Whether there is an object."""
        try:
            self.head(key)
        except ObjectMissingError:
            return False
        return True

    def head(self, key: str) -> ObjectInfo:
        """Size and version without the bytes."""
        with self._translated("look at", key):
            self._require_file(key)
            meta = self._backend.head(key)
            return ObjectInfo(meta["path"], meta["size"], meta["e_tag"], meta["last_modified"])

    def objects(self, prefix: str = "", *, odd: list[str] | None = None) -> Iterator[ObjectInfo]:
        """Everything below a folder (whole path segments: ``a/b`` does not match ``a/bc``), in key order on S3.

        Keys that no client can ask for are left out; ``odd`` takes them, and then others may lack a version.
        """
        with self._translated("list", prefix):
            for key, size, etag, modified in listed(self._backend, prefix):
                if modified or (odd is not None and is_plain_key(key)):
                    yield ObjectInfo(key, size, etag, modified)
                elif odd is not None:
                    odd.append(key)
                elif is_plain_key(key) and self.exists(key):
                    yield self.head(key)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a folder, sorted."""
        with self._translated("list", prefix):
            found = self._backend.list_with_delimiter(prefix)["common_prefixes"]
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def open_file(self, key: str, *, pinned: ObjectInfo | None = None) -> "PinnedFile":
        """A seekable file over one version of an object, by default the present one; reads only what is asked for."""
        return PinnedFile(self, pinned or self.head(key))

    def get_range(self, info: ObjectInfo, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` of exactly the version that ``info`` names, else a ``SourceChangedError``."""
        with self._translated("read", info.key):
            try:
                options: GetOptions = {"range": (start, end)}
                if info.etag:
                    options["if_match"] = info.etag
                return bytes(self._open(info.key, options).bytes())
            except (obstore_errors.PreconditionError, FileNotFoundError) as error:
                raise SourceChangedError(
                    f"{self.url_of(info.key)} changed while it was read (pinned etag {info.etag}); build again"
                ) from error

    def download(self, key: str, path: Path) -> tuple[int, str]:
        """Copies an object to a local file; returns size and SHA-256 (hex) of what was written."""
        digest, size = hashlib.sha256(), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file, self._translated("read", key):
            for data in self._chunks(key):
                file.write(data)
                digest.update(data)
                size += len(data)
        return size, digest.hexdigest()

    def sha256(self, key: str) -> str:
        """SHA-256 (hex) of the bytes that are stored now."""
        digest = hashlib.sha256()
        with self._translated("read", key):
            for data in self._chunks(key):
                digest.update(data)
        return digest.hexdigest()

    def get_sealed(self, ref: Ref) -> bytes:
        """An object's bytes; a ``DigestMismatchError`` where they are not those that were recorded."""
        try:
            data = self.get(ref.key, limit=ref.size)
        except IntegrityError as error:
            raise DigestMismatchError(f"{error}; {ref.size:,} were recorded") from error
        self._require_sealed(ref, Ref.of(ref.key, data))
        return data

    def download_sealed(self, ref: Ref, path: Path) -> None:
        """Copies an object to a local file; errors as of ``get_sealed``."""
        size, found = self.download(ref.key, path)
        self._require_sealed(ref, Ref(key=ref.key, size=size, sha256=found))

    def is_whole(self, ref: Ref) -> bool:
        """Whether an object is there with the bytes that were recorded."""
        try:
            return self.head(ref.key).size == ref.size and self.sha256(ref.key) == ref.sha256
        except ObjectMissingError:
            return False

    def _require_sealed(self, ref: Ref, found: Ref) -> None:
        if (found.size, found.sha256) != (ref.size, ref.sha256):
            where = self.url_of(ref.key)
            raise DigestMismatchError(f"{where} has SHA-256 {found.sha256}, but {ref.sha256} was recorded")

    def _chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of one version of an object. A request has a time limit: large objects take several requests."""
        result = self._open(key)
        size, etag = result.meta["size"], result.meta["e_tag"]
        if size <= _PART:
            yield from map(bytes, result.stream(min_chunk_size=_CHUNK))
            return
        for start in range(0, size, _PART):
            options: GetOptions = {"range": (start, min(start + _PART, size))}
            if etag:
                options["if_match"] = etag
            yield from map(bytes, self._open(key, options).stream(min_chunk_size=_CHUNK))

    def _open(self, key: str, options: "GetOptions | None" = None) -> "GetResult":
        self._require_file(key)
        return self._backend.get(key, options=options)

    def _require_file(self, key: str) -> None:
        """Refuses what is no regular file on local disk: a read of a pipe or a device may wait, or go on, for ever."""
        if self.local_root is None:
            return
        try:
            mode = (self.local_root / key).stat().st_mode
        except FileNotFoundError:
            # The library knows what else the key may mean.
            return
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise IntegrityError(f"{self.url_of(key)} is no regular file; remove it")

    # Writing.

    def put(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Writes an object, replacing what was there."""
        with self._translated("write", key):
            self._backend.put(key, data, attributes=self._attributes(content_type))

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> bool:
        """Writes an object only if there is none; returns and raises as ``swap``."""
        return self._settle(key, data, None, {"mode": "create", "attributes": self._attributes(content_type)})

    def swap(
        self, key: str, data: bytes, expected: Versioned | None, *, content_type: str = "application/json"
    ) -> bool:
        """Compare-and-swap: replaces an object only if it is still the ``expected`` version (None: still absent)."""
        if expected is None:
            return self.create(key, data, content_type=content_type)
        if self.local_root is not None:
            return self._swap_local(self.local_root, key, data, expected)
        mode = {"e_tag": expected.etag}
        return self._settle(key, data, expected, {"mode": mode, "attributes": self._attributes(content_type)})

    def upload(self, path: Path, key: str, *, content_type: str = "application/octet-stream") -> str | None:
        """Copies a local file into the store, in parts where it is large; returns the version that was written."""
        with self._translated("write", key), path.open("rb") as file:
            return self._backend.put(key, file, attributes=self._attributes(content_type))["e_tag"]

    def copy(self, source: str, target: str) -> None:
        """Copies an object inside the store; on S3, what is too large for one request goes through this process."""
        with self._translated("copy", source):
            if self.local_root is None and self._backend.head(source)["size"] > _COPIED_AT_ONCE:
                writer = open_writer(self._backend, target, buffer_size=_PART)
                for data in self._chunks(source):
                    writer.write(data)
                # Not closed after an error: closing would give half of the object its name.
                writer.close()
            else:
                self._require_file(source)
                self._backend.copy(source, target)

    def delete(self, key: str) -> None:
        """Removes an object; one that is gone already is fine."""
        try:
            with self._translated("delete", key):
                self._backend.delete(key)
        except ObjectMissingError:
            return
        except TypeError as error:
            # What obstore makes of a key that it cannot parse, here alone.
            raise StoreError(f"cannot delete {self.url_of(key)}: the key is not plain") from error

    def delete_many(self, keys: Sequence[str]) -> None:
        """Removes objects, in no particular order; such that are gone already are fine."""
        if self.local_root is not None:
            for key in keys:
                self.delete(key)
            return
        for at in range(0, len(keys), _DELETED_TOGETHER):
            with self._translated("delete", keys[at]):
                self._backend.delete(keys[at : at + _DELETED_TOGETHER])

    # How conditional writes are settled.

    def _settle(self, key: str, data: bytes, expected: Versioned | None, how: dict[str, Any]) -> bool:
        for attempt in stamina.retry_context(on=WriteUncertainError, attempts=5, timeout=60, wait_initial=0.05):
            with attempt:
                try:
                    with self._translated("write", key):
                        self._backend.put(key, data, **how)
                        return True
                except StoreUnavailableError as error:
                    return self._decide(key, data, expected, error)
        raise AssertionError("unreachable: the retry context returns or raises")

    def _decide(self, key: str, data: bytes, expected: Versioned | None, cause: StoreError) -> bool:
        """After a refusal or a lost answer: whose bytes are there now?

        A refusal, too, may be due to our own write: the client tries again when an answer is lost. And S3 refuses
        with 409 while another write is under way, which may fail yet.
        """
        try:
            found = self.find(key)
        except StoreError as error:
            raise WriteUncertainError(
                f"writing {self.url_of(key)} failed ({cause}) and so did reading it back ({error})"
            ) from error
        if found is not None and found.data == data:
            return True
        if found is None and expected is None:
            raise WriteUncertainError(f"{cause}; there is no object yet") from cause
        if found is not None and expected is not None and found.data == expected.data:
            raise WriteUncertainError(f"{cause}; the old object is still there") from cause
        return False

    def _swap_local(self, root: Path, key: str, data: bytes, expected: Versioned) -> bool:
        # The kernel frees the lock when its holder dies; the rename is atomic, so a reader sees old or new.
        path = root / key
        with self._translated("write", key), (root / _LOCK_NAME).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file() or path.stat().st_size != len(expected.data) or path.read_bytes() != expected.data:
                return False
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
            try:
                # The mode is that of any new file: what the user's umask leaves of it.
                with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            return True

    def _attributes(self, content_type: str) -> Any:
        # Local disk has no place for attributes and refuses them.
        return None if self.local_root is not None else {"Content-Type": content_type}

    @contextmanager
    def _translated(self, action: str, key: str) -> Iterator[None]:
        where = f"cannot {action} {self.url_of(key)}"
        _check_process(where)
        try:
            yield
        except SfPipelinesError:
            raise
        except (obstore_errors.BaseError, OSError, ValueError) as error:
            raise store_error(where, error) from cause_of(error)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise StoreError(f"{where}: the client library panicked: {first_line(error)}") from cause_of(error)


def _check_process(where: str) -> None:
    """Refuses what would wait for ever: the library starts its threads once, and a fork has none of them."""
    process = os.getpid()
    if not _first_users:
        _first_users.append(process)
    if _first_users[0] != process:
        raise ReaderForkedError(
            f"{where}: process {process} was forked from process {_first_users[0]} after that had used an object "
            "store, whose threads are not here. Start processes by spawn or forkserver, or fork before anything is "
            "read or written"
        )


class PinnedFile(io.RawIOBase):
    """One version of an object as a read-only, seekable file; a read is short only at the end."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store = store
        self.info = info
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        return self.info.size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.info.size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        end = self.info.size if size is None or size < 0 else min(self.info.size, self._position + size)
        if end <= self._position:
            return b""
        data = self._store.get_range(self.info, self._position, end)
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()


def _folder(root: Path, *, create: bool) -> Path:
    """A local store needs its folder: made here, so that a store that cannot be written fails before any work."""
    if create:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            kind = StoreDeniedError if isinstance(error, PermissionError) else StoreError
            raise kind(f"cannot use {root} as a store: {error.strerror}") from error
    elif not root.is_dir():
        raise ObjectMissingError(f"{root} does not exist or is no folder")
    return root
