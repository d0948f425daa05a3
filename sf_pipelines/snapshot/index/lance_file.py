"""Whether a Lance dataset made by somebody else stays within its own directory.

A manifest may name other places that data are read from: those of a dataset that was cloned without its data, or of
files that were imported. A local, verified copy of a shard would then read any file or bucket that its reader may. A
shard holds all of its files itself, so a dataset that names another place is refused before it is opened.

The layout is that of Lance's ``table.proto``: a manifest ends with the position of its message (8 bytes), two numbers
of a version (2 bytes each) and ``LANC``; at the position are the length of the message (4 bytes) and the message,
which goes up to that end. The message may say where in the file the list of indices is, stored likewise.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from sf_pipelines.snapshot.errors import IntegrityError

_MAGIC = b"LANC"
_FOOTER = 16
# Bytes of all manifests of a dataset: a shard has three of 1 kB.
_MAX_BYTES = 16 * 1024 * 1024
# Fields of Manifest.
_BRANCH, _BASE_PATHS, _INDEX_SECTION = 20, 18, 6
# Where messages hold names of files: number of a field, and what is in it. An empty mapping is a name.
_Places = Mapping[int, "_Places"]
_NAME: _Places = {}
_DATA_FILE: _Places = {1: _NAME}
_EXTERNAL: _Places = {1: _NAME}
_FRAGMENT: _Places = {2: _DATA_FILE, 11: {1: _DATA_FILE}, 6: _EXTERNAL, 8: _EXTERNAL, 10: _EXTERNAL}
_MANIFEST: _Places = {2: _FRAGMENT, 12: _NAME}
_INDICES: _Places = {1: {10: {1: _NAME}}}
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
    if len(data) < _FOOTER or data[-4:] != _MAGIC:
        raise IntegrityError("is no manifest of Lance")
    message = _section(data, int.from_bytes(data[-16:-8], "little"))
    if len(message) != len(data) - _FOOTER - 4 - int.from_bytes(data[-16:-8], "little"):
        raise IntegrityError("the manifest's message does not end where the file does")
    for number, value in _fields(message):
        if number == _BASE_PATHS:
            raise IntegrityError("the dataset reads from other places (base_paths); a shard holds all of its files")
        if number == _BRANCH:
            raise IntegrityError("the dataset is a branch of another; a shard holds all of its files")
        if number == _INDEX_SECTION:
            if not isinstance(value, int):
                raise IntegrityError("the manifest does not say where its indices are")
            _check_indices(_section(data, value))
    _check_names(message, _MANIFEST)


def _check_indices(section: bytes) -> None:
    _check_names(section, _INDICES)
    for index in _messages(section, 1):
        for details in _messages(index, 6):
            for kind in _messages(details, 1):
                if kind.lower().endswith(_FOREIGN_INDICES):
                    raise IntegrityError(f"the dataset has an index {kind[:80]!r}, which may read from other places")


def _check_names(message: bytes, places: _Places) -> None:
    for number, inner in places.items():
        for value in _messages(message, number):
            if inner:
                _check_names(value, inner)
            elif not _is_within(value):
                raise IntegrityError(f"the dataset names the file {value[:200]!r}, which is not within its directory")


def _is_within(name: bytes) -> bool:
    return b"\\" not in name and b":" not in name and not {b"", b".", b".."} & set(name.split(b"/"))


def _section(data: bytes, at: int) -> bytes:
    """What is stored at a position: its length, then so many bytes."""
    start = at + 4
    length = int.from_bytes(data[at:start], "little")
    if start + length > len(data) - _FOOTER:
        raise IntegrityError(f"the manifest has no room for {length} bytes at {at}")
    return data[start : start + length]


def _messages(message: bytes, wanted: int) -> Iterator[bytes]:
    """Each occurrence of a field of bytes."""
    for number, value in _fields(message):
        if number == wanted:
            if isinstance(value, int):
                raise IntegrityError(f"field {number} of the manifest is a number")
            yield value


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
