"""Index libraries of a shard, by name."""

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.index.lancedb import LanceDBBackend
from sf_pipelines.snapshot.index.protocol import IndexBackend

_BACKENDS: dict[str, type[LanceDBBackend]] = {LanceDBBackend.name: LanceDBBackend}


def backend_named(name: str) -> IndexBackend:
    """The index library of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _BACKENDS:
        raise ConfigError(f"index backend {name!r} is unknown; use one of {', '.join(_BACKENDS)}")
    return _BACKENDS[name]()
