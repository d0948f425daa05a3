"""What rows hold: values by key (unified snapshots), and stored vectors by id, for all readers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa

from sf_pipelines.snapshot.config import KeyEncoding
from sf_pipelines.snapshot.errors import NoShardError, QueryError
from sf_pipelines.snapshot.index.key_value import Key, encode_key, encode_keys, key_array
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.reader.calls import Call, Steps, each_shard
from sf_pipelines.snapshot.reader.core import ReaderCore
from sf_pipelines.snapshot.reader.plan import Context, named_shards
from sf_pipelines.snapshot.reader.shards import OpenShard
from sf_pipelines.snapshot.reader.state import SnapshotState
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.hash import HashRouting, hash_keys
from sf_pipelines.snapshot.routing.protocol import Int32

_KEY = "key"
# From so many keys on, a column of one type is made of them.
_MANY = 32
_BEYOND = 2**63
_ALIKE: tuple[set[type], ...] = ({int}, {str}, {bytes})


def get_one(core: ReaderCore, call: Call, key: Key, routing_context: Context | None) -> Steps[bytes | None]:
    """The value of a key, None where it is not there."""
    found = (yield from _values(core, call, [key], routing_context))[key]
    core.metrics.get_results.add(found is not None, {"kind": core.kind})
    return found


def get_many(
    core: ReaderCore, call: Call, keys: Iterable[Key], routing_context: Context | None
) -> Steps[dict[Key, bytes | None]]:
    """The value of each key, None for a key that is not there; each shard is asked once."""
    found = yield from _values(core, call, keys, routing_context)
    core.metrics.multi_get_keys.add(len(found), {"kind": core.kind})
    core.metrics.multi_get_results.add(sum(value is not None for value in found.values()), {"kind": core.kind})
    return found


def _values(
    core: ReaderCore, call: Call, keys: Iterable[Key], routing_context: Context | None
) -> Steps[dict[Key, bytes | None]]:
    if isinstance(keys, str | bytes | bytearray | memoryview) or not isinstance(keys, Iterable):
        raise QueryError(f"keys must be several keys, not one {type(keys).__name__}; use get for one")
    if routing_context is not None and not isinstance(routing_context, Mapping):
        raise QueryError(f"routing_context must be a mapping, not {type(routing_context).__name__}")
    given, known = list(keys), core.state
    # A wrong key costs no tokens, and while the call waits for them it holds no snapshot.
    stored = _encoded(given, known.key_encoding)
    shards = _shards_of(known, given, stored, routing_context)
    yield from core.admitted(len(given))
    with core.serving() as serving:
        state = serving.state
        if state is not known:
            stored = _encoded(given, state.key_encoding)
            shards = _shards_of(state, given, stored, routing_context)
        values: list[bytes | None] = [None] * len(given)

        def fetch_of(shard: int) -> Callable[[OpenShard], None]:
            at = np.flatnonzero(shards == shard).tolist()

            def fetch(opened: OpenShard) -> None:
                found = opened.keys.get_many([stored[place] for place in at])
                for place, value in zip(at, found, strict=True):
                    values[place] = value

            return fetch

        # A key for which the expression gives no shard cannot have been stored.
        filled = [shard for shard in np.unique(shards).tolist() if shard >= 0 and state.shards[shard].key is not None]
        jobs = {shard: fetch_of(shard) for shard in filled}
        # A look-up takes microseconds.
        yield from each_shard(serving.shards, jobs, call, attrgetter("has_keys"))
    return dict(zip(given, values, strict=True))


def route_key(core: ReaderCore, key: Key, routing_context: Context | None) -> int:
    """Shard that holds a key if any does; a ``NoShardError`` where the expression gives none."""
    with core.serving() as serving:
        state = serving.state
        shard = int(_shards_of(state, [key], [encode_key(key, state.key_encoding)], routing_context)[0])
    if shard < 0:
        raise NoShardError(f"the expression that this snapshot is sharded by gives no shard for key {key!r}")
    return shard


def get_vectors(
    core: ReaderCore, call: Call, ids: Iterable[int | str], shard_ids: Sequence[int] | None
) -> Steps[dict[int | str, Float32 | None]]:
    """The stored vector of each id, None for an id that is not there; each shard is asked once."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise QueryError(f"ids must be several ids, such as [17], not one {type(ids).__name__}")
    given = list(ids)
    _check_ids(core.state, given)
    yield from core.admitted(len(given))
    found: dict[int | str, Float32 | None] = dict.fromkeys(given)
    with core.serving() as serving:
        state = serving.state
        if shard_ids is not None:
            shards = named_shards(shard_ids, state.manifest.num_dbs, 1)[0].tolist()
            ids_by_shard = dict.fromkeys(shards, given)
        else:
            ids_by_shard = _where_ids_may_be(state, given)

        def fetch_of(asked: list[int | str]) -> Callable[[OpenShard], list[tuple[int | str, Float32]]]:
            def fetch(opened: OpenShard) -> list[tuple[int | str, Float32]]:
                rows = opened.index.find(asked)
                there = np.flatnonzero(rows >= 0)
                if not len(there):
                    return []
                return list(zip([asked[at] for at in there], opened.index.vectors(rows[there]), strict=True))

            return fetch

        jobs = {shard: fetch_of(asked) for shard, asked in ids_by_shard.items() if state.shards[shard].key is not None}
        answers = yield from each_shard(serving.shards, jobs, call)
        for _, answer in sorted(answers.items(), reverse=True):
            found.update((row_id, vector.copy()) for row_id, vector in answer)
    return found


def _check_ids(state: SnapshotState, ids: list[Any]) -> None:
    """Refuses what cannot be an id, where the manifest says what ids are."""
    extras = state.manifest.extras
    kinds: Any = (int, str) if extras is None else {"int64": int, "string": str}[extras.id_type]
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, kinds) or not _can_be_stored(value):
            names = "int or str" if extras is None else kinds.__name__
            raise QueryError(
                f"id {value!r} cannot be one of this snapshot's: they are {names}, as searches return them"
            )


def _can_be_stored(value: int | str) -> bool:
    if isinstance(value, int):
        return -_BEYOND <= value < _BEYOND
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _where_ids_may_be(state: SnapshotState, ids: list[int | str]) -> dict[int, list[int | str]]:
    """The ids to look for in each shard: where a row's key says its shard, there; else everywhere."""
    routing, everywhere = state.routing, dict.fromkeys(range(state.manifest.num_dbs), ids)
    by_key = isinstance(routing, HashRouting) or (isinstance(routing, CelRouting) and set(routing.columns) == {_KEY})
    if state.kind != "unified" or not state.is_ours or not by_key or not ids:
        return everywhere
    keys: list[Any] = ids
    if state.manifest.extras is not None and state.manifest.extras.key_type == "bytes":
        try:
            keys = [bytes.fromhex(str(row_id)) for row_id in ids]
        except ValueError:
            # No hexadecimal digits: no row can have it, and the others are found all the same.
            return everywhere
    shards = _shards_of(state, keys, _encoded(keys, state.key_encoding), None).tolist()
    ids_by_shard: dict[int, list[int | str]] = {}
    for row_id, shard in zip(ids, shards, strict=True):
        if shard >= 0:
            ids_by_shard.setdefault(shard, []).append(row_id)
    return ids_by_shard


def _encoded(keys: list[Key], encoding: KeyEncoding) -> list[bytes]:
    """The bytes under which keys are stored."""
    if len(keys) >= _MANY and set(map(type, keys)) in _ALIKE and not _has_huge(keys):
        return encode_keys(key_array(keys), encoding).to_pylist()
    return [encode_key(key, encoding) for key in keys]


def _shards_of(state: SnapshotState, keys: list[Key], stored: list[bytes], context: Context | None) -> Int32:
    """Shard of each key, shape (n,); -1 for a key that can be in none."""
    routing = state.routing
    if isinstance(routing, HashRouting):
        if context is not None:
            raise QueryError(
                "routing_context is for snapshots sharded by an expression; this one is sharded by its keys"
            )
        # A text is hashed as its UTF-8, which is also how it is stored.
        hashed = pa.array(stored, pa.binary()) if state.key_encoding in {"utf8", "raw"} else pa.array(keys, pa.int64())
        return (hash_keys(hashed) % np.uint64(routing.num_dbs)).astype(np.int32)
    if not isinstance(routing, CelRouting):
        raise QueryError(f"keys of a snapshot sharded by {routing.strategy!r} cannot be looked up")
    names = set(routing.columns)
    if context is None and names != {_KEY}:
        raise QueryError(
            f"this snapshot is sharded by an expression over {', '.join(routing.columns)}: give routing_context with a "
            "value for each"
        )
    if _KEY not in names:
        return np.full(len(keys), routing.locate(context or {}), dtype=np.int32)
    given = (_locate(routing, _with_key(routing, context or {}, key)) for key in keys)
    return np.fromiter(given, dtype=np.int32, count=len(keys))


def _locate(routing: CelRouting, values: Mapping[str, Any]) -> int:
    """Shard of a key; -1 where the key alone decides and leads nowhere: no row can have it."""
    try:
        return routing.locate(values)
    except NoShardError:
        if set(routing.columns) == {_KEY}:
            return -1
        raise


def _with_key(routing: CelRouting, context: Mapping[str, Any], key: Key) -> dict[str, Any]:
    said = context.get(_KEY, key)
    if type(said) is not type(key) or said != key:
        raise QueryError(f"routing_context says key {said!r}, asked is {key!r}; leave it out")
    kind = routing.cel_columns[_KEY]
    if kind == "bytes" and isinstance(key, str):
        return {**context, _KEY: key.encode()}
    if kind == "string" and isinstance(key, bytes):
        try:
            return {**context, _KEY: key.decode()}
        except UnicodeDecodeError as error:
            raise QueryError(f"key {key!r} is no text, and the keys of this snapshot are: {error.reason}") from error
    return {**context, _KEY: key}


def _has_huge(keys: list[Any]) -> bool:
    """Whether there are numbers that no column can hold; one by one, each is named in the error."""
    return isinstance(keys[0], int) and (max(keys) >= _BEYOND or min(keys) < -_BEYOND)
