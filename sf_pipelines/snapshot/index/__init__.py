"""Index libraries of a shard, by name."""

from pathlib import Path

from sf_pipelines.snapshot.errors import ConfigError, IntegrityError
from sf_pipelines.snapshot.index.lancedb import LanceDBShard
from sf_pipelines.snapshot.index.protocol import ShardIndex
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard

_BACKENDS: dict[str, type[ShardIndex]] = {backend.name: backend for backend in (LanceDBShard, SqliteVecShard)}


def backend_named(name: str) -> type[ShardIndex]:
    """The index library of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _BACKENDS:
        raise ConfigError(f"index backend {name!r} is unknown; use one of {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


def backend_in(folder: Path) -> type[ShardIndex]:
    """The index library that wrote a local shard directory.

    A directory with both ``shard.db`` and ``vector/vector_index.lance`` is a unified one of LanceDB: the file then
    holds keys and values only.

    Raises:
        IntegrityError: it holds the index of none, or of two.
    """
    alone = (folder / LanceDBShard.directory).is_dir()
    unified = (folder / LanceDBShard.subfolder / LanceDBShard.directory).is_dir()
    file = (folder / SqliteVecShard.directory).is_file()
    if alone + unified > 1 or (alone and file):
        raise IntegrityError(f"{folder} holds more than one index; a shard has one")
    if alone or unified:
        return LanceDBShard
    if file:
        return SqliteVecShard
    raise IntegrityError(f"{folder} holds no index: neither {LanceDBShard.directory} nor {SqliteVecShard.directory}")
