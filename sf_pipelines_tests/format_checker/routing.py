"""Format checker: where stock's formulas send a vector or a key. Sections 4.1 to 4.5 of the format, once more."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sf_pipelines_tests.format_checker.report import Duty, Findings, some

# Rows between two centroids may fall to either: sums of other order differ by a few float32 steps.
_TIE = 1e-5
# A projection this near to a hyperplane has no certain sign in float32.
_ON_PLANE = 1e-6
# Types of results that can name a shard, and the type of routing values that they are compared with.
_RESULTS = {"INT": int, "UINT": int, "STRING": str, "BYTES": dict}
_INT_ENCODINGS = {"u64be": 8, "u32be": 4}


@dataclass(frozen=True)
class CelFormula:
    """A CEL expression that names a shard.

    Attributes:
        text: the expression.
        columns: its columns and their types.
        values: its value for each shard; None when it is the number of the shard.
        num_dbs: shards.
    """

    text: str
    columns: dict[str, str]
    values: list[Any] | None
    num_dbs: int

    def problem(self) -> str | None:
        """Why the expression cannot name a shard; None when it can.

        It must compile, and its type must be known to be int, uint, string or bytes, and that of the routing values.
        """
        try:
            result = self._compiled().return_type().name()
        except (RuntimeError, ValueError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            return f"does not compile ({reason})"
        if result not in _RESULTS:
            return f"gives {result.lower()}, must give int, uint, string or bytes"
        others = [value for value in self.values or [] if not isinstance(value, _RESULTS[result])]
        if others:
            return f"gives {result.lower()}, but routing_values has {some(others)}"
        return None

    def shards(self, column: str, values: list[Any]) -> list[int | None]:
        """Shard for each value of the only column; None where stock would refuse it."""
        compiled = self._compiled()
        return [self._shard(compiled.eval(data={column: value})) for value in values]

    def _shard(self, result: Any) -> int | None:
        plain = result.plain_value()
        plain = bytes(plain) if isinstance(plain, bytearray) else plain
        # An evaluation error comes back as a value, its text.
        if result.type().name() == "ERROR" or isinstance(plain, bool) or not isinstance(plain, (int, str, bytes)):
            return None
        if self.values is not None:
            found = {"__bytes_hex__": plain.hex()} if isinstance(plain, bytes) else plain
            return self.values.index(found) if found in self.values else None
        try:
            shard = int(plain)
        except ValueError:
            return None
        return shard if 0 <= shard < self.num_dbs else None

    def _compiled(self) -> Any:
        from cel_expr_python import cel

        types = {
            "int": cel.Type.INT,
            "string": cel.Type.STRING,
            "bytes": cel.Type.BYTES,
            "double": cel.Type.DOUBLE,
            "bool": cel.Type.BOOL,
            "uint": cel.Type.UINT,
        }
        overloads = [
            cel.Overload(f"shard_hash_{name}", types["uint"], [types[name]], impl=hash_of)
            for name in ("int", "uint", "string", "bytes")
        ]
        variables = {name: types[kind] for name, kind in self.columns.items()}
        return cel.NewEnv(variables=variables, functions=[cel.FunctionDecl("shard_hash", overloads)]).compile(self.text)


def hash_of(key: int | str | bytes) -> int:
    """xxh3_64 of a key: numbers as 8 little-endian bytes, text as UTF-8."""
    if isinstance(key, int):
        data = key.to_bytes(8, "little", signed=True)
    else:
        data = key.encode() if isinstance(key, str) else key
    return xxhash.xxh3_64_intdigest(data)


def check_hash(findings: Findings, where: str, keys: list[Any], db_id: int, num_dbs: int) -> None:
    """Decoded keys are in the shard of their digest."""
    elsewhere = [key for key in keys if hash_of(key) % num_dbs != db_id]
    findings.expect(
        Duty.ROUTING,
        not elsewhere,
        f"{where}: the keys {some(elsewhere)} hash to other shards: get answers None",
    )


def check_cel_key(findings: Findings, where: str, keys: list[Any], db_id: int, formula: CelFormula) -> None:
    """Keys of an expression over the key alone; other columns are not stored, so nothing can be said of them."""
    if set(formula.columns) != {"key"}:
        return
    wanted = {"int": int, "uint": int, "string": str, "bytes": bytes}.get(formula.columns["key"])
    values = [key.encode() if wanted is bytes and isinstance(key, str) else key for key in keys]
    typed = wanted is not None and all(isinstance(value, wanted) for value in values)
    findings.expect(
        Duty.ROUTING, typed, f"{where}: keys are not of the type {formula.columns['key']} that cel_columns declares"
    )
    if typed:
        found = formula.shards("key", values)
        elsewhere = [key for key, shard in zip(values, found, strict=True) if shard != db_id]
        findings.expect(
            Duty.ROUTING,
            not elsewhere,
            f"{where}: the keys {some(elsewhere)} go to other shards by {formula.text!r}: get answers None",
        )


def decode_keys(findings: Findings, where: str, keys: list[bytes], encoding: str) -> list[Any]:
    """Keys as a caller of ``get`` gives them: numbers, text, or bytes."""
    width = _INT_ENCODINGS.get(encoding)
    bad: list[bytes] = []
    found: list[Any] = []
    for key in keys:
        try:
            found.append(_decode(key, encoding, width))
        except ValueError:
            bad.append(key)
    findings.expect(
        Duty.KEY_VALUES,
        not bad,
        f"{where}: kv.k {some(bad)} is no key of the encoding {encoding}: no lookup finds it",
    )
    return found


def check_ids(findings: Findings, where: str, keys: list[bytes], ids: list[Any], encoding: str) -> None:
    """The vectors' ids are the keys of the same shard: numbers, text, and of bytes the hex digits."""
    wanted: dict[tuple[type, Any], int] = {}
    for at, key in enumerate(keys):
        wanted |= dict.fromkeys(((type(name), name) for name in _names(key, encoding)), at)
    foreign = [row_id for row_id in ids if (type(row_id), row_id) not in wanted]
    findings.expect(
        Duty.KEY_VALUES,
        not foreign,
        f"{where}: the vectors' ids {some(foreign)} are no keys of the shard: hits cannot be looked up",
    )
    found = {wanted.get((type(row_id), row_id)) for row_id in ids}
    bare = [key for at, key in enumerate(keys) if at not in found]
    findings.expect(Duty.KEY_VALUES, not bare, f"{where}: the keys {some(bare)} have no vector of that id")


def _names(key: bytes, encoding: str) -> list[Any]:
    """Ids that the vector of a key may have; raw keys are text or bytes, which the manifest does not say."""
    width = _INT_ENCODINGS.get(encoding)
    names = [key.hex()] if encoding == "raw" else []
    try:
        return [*names, _decode(key, "utf8" if encoding == "raw" else encoding, width)]
    except ValueError:
        return names


def _decode(key: bytes, encoding: str, width: int | None) -> Any:
    if width is None:
        return key.decode() if encoding == "utf8" else key
    number = int.from_bytes(key, "big")
    if len(key) != width or number >= 2**63:
        raise ValueError
    return number


def check_cluster(
    findings: Findings, where: str, vectors: NDArray[np.float32], db_id: int, centroids: NDArray[Any], metric: str
) -> None:
    """Vectors are in the shard of their nearest centroid, or at a tie of float32."""
    distances = _centroid_distances(vectors, centroids, metric)
    best, found = distances.min(axis=1), distances[:, db_id]
    lengths = np.linalg.norm(vectors, axis=1)
    scale = {
        "cosine": np.ones(len(vectors)),
        "l2": np.maximum(np.abs(best), np.abs(found)),
        "dot_product": lengths * np.linalg.norm(centroids, axis=1).max(),
    }[metric]
    elsewhere = np.flatnonzero(~(found - best <= _TIE * scale) & (distances.argmin(axis=1) != db_id))
    findings.expect(
        Duty.ROUTING,
        len(elsewhere) == 0,
        f"{where}: {len(elsewhere)} of {len(vectors)} rows are nearer to another centroid, such as row "
        f"{elsewhere[:1].tolist()} to {distances[elsewhere[:1]].argmin(axis=1).tolist()}: readers look there",
    )


def check_lsh(
    findings: Findings, where: str, vectors: NDArray[np.float32], db_id: int, hyperplanes: NDArray[Any], num_dbs: int
) -> None:
    """Vectors are in the shard of their code; a bit whose vector lies on its hyperplane counts either way."""
    projections = vectors @ hyperplanes.T
    limits = _ON_PLANE * np.outer(np.linalg.norm(vectors, axis=1), np.linalg.norm(hyperplanes, axis=1))
    codes = [int(sum(1 << bit for bit in np.flatnonzero(row > 0))) for row in projections]
    unsure = np.abs(projections) <= limits
    elsewhere = [
        row
        for row, code in enumerate(codes)
        if code % num_dbs != db_id and not _reaches(code, np.flatnonzero(unsure[row]).tolist(), db_id, num_dbs)
    ]
    findings.expect(
        Duty.ROUTING,
        not elsewhere,
        f"{where}: {len(elsewhere)} of {len(vectors)} rows have the code of another shard, such as row "
        f"{elsewhere[:1]}: a search for them looks there",
    )


def _reaches(code: int, unsure: list[int], db_id: int, num_dbs: int) -> bool:
    # A zero vector lies on every hyperplane: stock takes zero bits, with certainty.
    reachable = {code}
    for bit in unsure[:8] if code else []:
        reachable |= {other ^ (1 << bit) for other in reachable}
    return db_id in {other % num_dbs for other in reachable}


def _centroid_distances(vectors: NDArray[np.float32], centroids: NDArray[Any], metric: str) -> NDArray[np.float32]:
    """Section 4.2: shape (vectors, centroids)."""
    if metric == "l2":
        columns = [np.square(centroid - vectors).sum(axis=1) for centroid in centroids]
        return np.stack(columns, axis=1)
    products = vectors @ centroids.T
    if metric == "dot_product":
        return -products
    lengths = np.linalg.norm(vectors, axis=1)
    distances = np.float32(1) - products / (np.outer(lengths, np.linalg.norm(centroids, axis=1)) + np.float32(1e-10))
    distances[lengths == 0] = 1
    return distances
