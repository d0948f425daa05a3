"""Format checker: whether a Lance dataset keeps its files in its own folder.

A dataset may name other folders ("base paths") in its manifest and take data files from them; shallow clones do. A
shard is copied, hashed and cached as the files below its directory, so nothing outside of it may be needed.
"""

from collections.abc import Iterator
from pathlib import Path

from sf_pipelines_tests.format_checker.report import Duty, Findings, some

# Field of Lance's protobuf message Manifest, and the path within a BasePath.
_BASE_PATHS = 18
_PATH = 4
_MAGIC = b"LANC"
# At the end of a manifest file: position of the message (8 bytes), version (4), magic (4). The message has its length
# before it (4).
_FOOTER = 16
_VARINT, _FIXED = 0, {1: 8, 5: 4}
_LENGTH_DELIMITED = 2


def check_own_files(findings: Findings, where: str, dataset: Path) -> bool:
    """Data files are there, and no manifest names another folder.

    Args:
        findings: collects faults.
        where: the shard.
        dataset: local copy of ``vector_index.lance``.

    Returns:
        Whether the dataset can be opened without reading outside of it.
    """
    expect = findings.expect
    bases: list[str] = []
    for path in sorted(dataset.glob("_versions/*.manifest")):
        try:
            bases += _base_paths(path.read_bytes())
        except ValueError as error:
            expect(Duty.LANCE_TABLE, False, f"{where}: {dataset.name}/_versions/{path.name} cannot be read ({error})")
            return False
    own = expect(
        Duty.LANCE_TABLE,
        not bases,
        f"{where}: {dataset.name} takes files from other folders, {some(bases)}, as shallow clones do: "
        "they are not copied, hashed or cached with the shard",
    )
    return own and expect(
        Duty.LANCE_TABLE,
        any(dataset.glob("data/*.lance")),
        f"{where}: {dataset.name} cannot be read: it has no data files of its own",
    )


def _base_paths(data: bytes) -> list[str]:
    """Other folders that a manifest file names.

    Raises:
        ValueError: it is no manifest file.
    """
    start = int.from_bytes(data[-_FOOTER : 8 - _FOOTER], "little")
    size = int.from_bytes(data[start : start + 4], "little")
    message = data[start + 4 : start + 4 + size]
    if len(data) < _FOOTER or not data.endswith(_MAGIC) or len(message) < size:
        raise ValueError("it does not end as a manifest does")
    found = [base for number, base in _fields(message) if number == _BASE_PATHS]
    return [path.decode(errors="replace") for base in found for number, path in _fields(base) if number == _PATH] or [
        "(no path)" for _ in found
    ]


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of a protobuf message's fields; of numbers no bytes.

    Raises:
        ValueError: it is no such message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind, value = tag & 7, b""
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in _FIXED:
            at += _FIXED[kind]
        elif kind == _LENGTH_DELIMITED:
            size, at = _varint(message, at)
            value = message[at : at + size]
            at += size
        else:
            raise ValueError(f"a field has the unknown kind {kind}")
        if at > len(message):
            raise ValueError("a field is cut off")
        yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    number = 0
    for place, byte in enumerate(message[at : at + 10]):
        number |= (byte & 127) << (7 * place)
        if byte < 128:
            return number, at + place + 1
    raise ValueError("a number is cut off")
