"""Whether a Lance dataset that another tool may have made stays within its own directory.

A manifest may name other files and buckets to read from, as that of a shallow clone does. A shard holds all of its
files itself, so such a dataset is refused before it is opened. The layout is that of Lance's ``table.proto``.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sf_pipelines.snapshot.errors import IntegrityError

_MAGIC = b"LANC"
_FOOTER = 16
# Bytes of all manifests of a dataset: a shard has three of 1 kB.
_MAX_BYTES = 16 * 1024 * 1024
_INDEX_SECTION = 6
# Indices of which the details name files: of compactions not finished and of logs not yet written, never of a shard.
_FOREIGN_INDICES = (b"fragmentreuseindexdetails", b"memwalindexdetails")


def check_within(dataset: Path) -> None:
    """Checks that no manifest of a dataset names a place outside of it."""
    room = _MAX_BYTES
    for path in sorted(dataset.rglob("*.manifest")):
        try:
            room -= path.stat().st_size
            if room < 0:
                raise IntegrityError(f"{dataset}: the manifests are larger than {_MAX_BYTES} bytes; a shard's are not")
            data = path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            _check_manifest(data)
        except IntegrityError as error:
            raise IntegrityError(f"{path}: {error}") from error


def _check_manifest(data: bytes) -> None:
    # The end: position of the message (8 bytes), two numbers of a version (2 each), LANC.
    if len(data) < _FOOTER or data[-4:] != _MAGIC:
        raise IntegrityError("is no manifest of Lance")
    at = int.from_bytes(data[-16:-8], "little")
    message = _section(data, at)
    if len(message) != len(data) - _FOOTER - 4 - at:
        raise IntegrityError("the manifest's message does not end where the file does")
    for number, value in _fields(message):
        if number == _INDEX_SECTION:
            if not isinstance(value, int):
                raise IntegrityError("the manifest does not say where its indices are")
            _check_fields(_section(data, value), _INDICES)
    _check_fields(message, _MANIFEST)


def _check_name(name: bytes) -> None:
    if b"\\" in name or b":" in name or {b"", b".", b".."} & set(name.split(b"/")):
        raise IntegrityError(f"the dataset names the file {name[:200]!r}, which is not within its directory")


def _check_kind(kind: bytes) -> None:
    if kind.lower().endswith(_FOREIGN_INDICES):
        raise IntegrityError(f"the dataset has an index {kind[:80]!r}, which may read from other places")


def _refuse_base_paths(_: bytes) -> None:
    raise IntegrityError("the dataset reads from other places (base_paths); a shard holds all of its files")


def _refuse_branch(_: bytes) -> None:
    raise IntegrityError("the dataset is a branch of another; a shard holds all of its files")


# How fields of messages are checked, by their numbers: a function, or the fields of the message in it.
_Checks = Mapping[int, "_Checks | Callable[[bytes], None]"]
_FILE: _Checks = {1: _check_name}
_FRAGMENT: _Checks = {2: _FILE, 11: {1: _FILE}, 6: _FILE, 8: _FILE, 10: _FILE}
_MANIFEST: _Checks = {2: _FRAGMENT, 12: _check_name, 18: _refuse_base_paths, 20: _refuse_branch}
_INDICES: _Checks = {1: {10: _FILE, 6: {1: _check_kind}}}


def _check_fields(message: bytes, checks: _Checks) -> None:
    for number, value in _fields(message):
        check = checks.get(number)
        if check is None:
            continue
        if isinstance(value, int):
            raise IntegrityError(f"field {number} of the manifest is a number")
        if callable(check):
            check(value)
        else:
            _check_fields(value, check)


def _section(data: bytes, at: int) -> bytes:
    """What is stored at a position: its length (4 bytes), then so many bytes."""
    start = at + 4
    length = int.from_bytes(data[at:start], "little")
    if start + length > len(data) - _FOOTER:
        raise IntegrityError(f"the manifest has no room for {length} bytes at {at}")
    return data[start : start + length]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message; values of fixed width are given as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            width, at = _varint(message, at)
        elif kind in {1, 5}:
            width = 8 if kind == 1 else 4
        else:
            raise IntegrityError(f"the manifest has a field of the unknown kind {kind}")
        if width > len(message) - at:
            raise IntegrityError(f"the manifest has no room for the {width} bytes of field {number}")
        yield number, message[at : at + width]
        at += width


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, 7 in each byte, and where it ends."""
    value = 0
    for place in range(10):
        if at + place >= len(message):
            break
        byte = message[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value & (2**64 - 1), at + place + 1
    raise IntegrityError("the manifest has a number that does not end")
