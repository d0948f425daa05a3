"""Index libraries of a shard, by name."""

from pathlib import Path

from sf_pipelines.snapshot.errors import ConfigError, IntegrityError
from sf_pipelines.snapshot.index.lancedb import LanceDBBackend
from sf_pipelines.snapshot.index.protocol import IndexBackend
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecBackend

_BACKENDS: dict[str, type[LanceDBBackend] | type[SqliteVecBackend]] = {
    LanceDBBackend.name: LanceDBBackend,
    SqliteVecBackend.name: SqliteVecBackend,
}


def backend_named(name: str) -> IndexBackend:
    """The index library of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _BACKENDS:
        raise ConfigError(f"index backend {name!r} is unknown; use one of {', '.join(_BACKENDS)}")
    return _BACKENDS[name]()


def backend_in(folder: Path) -> IndexBackend:
    """The index library that a local shard directory was written by.

    A directory with both ``shard.db`` and ``vector/vector_index.lance`` is a unified one of LanceDB: the file then
    holds keys and values only.

    Raises:
        IntegrityError: it holds the index of none, or of two.
    """
    lance = LanceDBBackend()
    own = (folder / lance.directory).is_dir()
    beside = (folder / lance.subfolder / lance.directory).is_dir()
    file = (folder / SqliteVecBackend.directory).is_file()
    if own + beside > 1 or (own and file):
        raise IntegrityError(f"{folder} holds more than one index; a shard has one")
    if own or beside:
        return lance
    if file:
        return SqliteVecBackend()
    raise IntegrityError(f"{folder} holds no index: neither {lance.directory} nor {SqliteVecBackend.directory}")
