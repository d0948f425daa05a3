"""Format checker: ``build_meta.sharding`` and ``custom.vector`` by kind of snapshot."""

from dataclasses import dataclass
from typing import Any

from sf_pipelines_tests.format_checker.manifest import ManifestContent, Place, is_int, is_plain
from sf_pipelines_tests.format_checker.report import Duty, Findings
from sf_pipelines_tests.format_checker.routing import CelFormula

_METRICS = ("cosine", "l2", "dot_product")
_STRATEGIES = ("cluster", "lsh", "explicit", "cel")
_CEL_TYPES = ("int", "string", "bytes", "double", "bool", "uint")
_CEL_FIELDS = ("cel_expr", "cel_columns", "routing_values")
_KV_BACKENDS = {"sqlite-vec": "sqlite-vec", "lancedb": "sqlite"}
# Fields of the other kinds: in vector-only snapshots, and in unified ones.
_UNIFIED_ONLY = ("unified", "backend", "kv_backend", "index_params")
_VECTOR_ONLY = (
    *("sharding_strategy", "num_probes", "centroids_ref", "hyperplanes_ref", "num_hash_bits"),
    *_CEL_FIELDS,
)


@dataclass(frozen=True)
class VectorFields:
    """What ``custom.vector`` and the sharding record say.

    Attributes:
        unified: whether shards hold keys and values as well.
        dim: numbers in a vector.
        metric: declared distance.
        strategy: cluster, lsh, explicit or cel; hash or cel when unified.
        backend: index library, in unified snapshots only.
        key_encoding: of the keys.
        num_dbs: shards, empty ones included.
        array_key: object with the centroids or hyperplanes.
        num_hash_bits: number of hyperplanes.
        formula: the CEL expression.
    """

    unified: bool
    dim: int
    metric: str
    strategy: str
    backend: str | None
    key_encoding: str
    num_dbs: int
    array_key: str | None = None
    num_hash_bits: int | None = None
    formula: CelFormula | None = None


def check_vector_fields(findings: Findings, place: Place, manifest: ManifestContent) -> VectorFields:
    """Checks the sharding record and ``custom.vector``.

    Raises:
        CannotGoOnError: a reader could not go on.
    """
    vector = manifest.custom.get("vector")
    findings.require(
        Duty.VECTOR, isinstance(vector, dict), f"custom.vector is {vector!r:.100}: the vector reader raises"
    )
    fields: dict[str, Any] = vector if isinstance(vector, dict) else {}
    unified = bool(fields.get("unified"))
    _check_common(findings, fields, manifest)
    _check_sharding(findings, manifest)
    return (_unified if unified else _vector_only)(findings, place, manifest, fields)


def _check_common(findings: Findings, vector: dict[str, Any], manifest: ManifestContent) -> None:
    expect = findings.expect
    dim, metric = vector.get("dim"), vector.get("metric")
    findings.require(Duty.VECTOR, is_int(dim) and dim > 0, f"custom.vector.dim is {dim!r}, must be above 0: KeyError")
    findings.require(
        Duty.VECTOR, metric in _METRICS, f"custom.vector.metric is {metric!r}, not one of {', '.join(_METRICS)}"
    )
    for name in ("index_type", "quantization"):
        value = vector.get(name, "hnsw")
        good = isinstance(value, str) or (name == "quantization" and value is None)
        expect(Duty.VECTOR, good, f"custom.vector.{name} is {value!r}, not a text")
    total, rows = (
        vector.get("total_vectors"),
        sum(row["row_count"] for row in manifest.rows if is_int(row["row_count"])),
    )
    expect(
        Duty.VECTOR,
        "total_vectors" not in vector or (is_int(total) and total == rows),
        f"custom.vector.total_vectors is {total!r}, the shards have {rows} rows",
    )


def _check_sharding(findings: Findings, manifest: ManifestContent) -> None:
    record = manifest.sharding
    expect = findings.expect
    unknown = sorted(set(record) - {"strategy", "hash_algorithm", *_CEL_FIELDS})
    expect(Duty.SHARDING, not unknown, f"build_meta.sharding has the unknown keys {unknown}: ManifestParseError")
    algorithm, strategy = record.get("hash_algorithm"), record.get("strategy", "hash")
    expect(
        Duty.SHARDING,
        algorithm == "xxh3_64",
        f"build_meta.sharding.hash_algorithm is {algorithm!r}, must be xxh3_64: ManifestParseError",
    )
    findings.require(
        Duty.SHARDING,
        isinstance(strategy, str) and strategy in {"hash", "cel"},
        f"build_meta.sharding.strategy is {strategy!r}, legal are hash and cel: ManifestParseError",
    )
    given = [name for name in _CEL_FIELDS if record.get(name) is not None]
    expect(
        Duty.SHARDING,
        strategy == "cel" or not given,
        f"build_meta.sharding of strategy hash has {given}: ManifestParseError",
    )


def _unified(findings: Findings, _place: Place, manifest: ManifestContent, vector: dict[str, Any]) -> VectorFields:
    expect = findings.expect
    expect(Duty.VECTOR, vector["unified"] is True, f"custom.vector.unified is {vector['unified']!r}, must be true")
    _none_of(findings, vector, _VECTOR_ONLY, "unified")
    backend, keys = vector.get("backend"), vector.get("kv_backend")
    findings.require(
        Duty.VECTOR,
        isinstance(backend, str) and backend in _KV_BACKENDS,
        f"custom.vector.backend is {backend!r}, not sqlite-vec or lancedb: ConfigValidationError",
    )
    expect(
        Duty.VECTOR,
        keys == _KV_BACKENDS[str(backend)],
        f"custom.vector.kv_backend is {keys!r}, must be {_KV_BACKENDS[str(backend)]!r} beside {backend}: "
        "stock opens another library (SlateDB where it is missing)",
    )
    if "index_params" in vector:
        params = vector["index_params"]
        good = isinstance(params, dict) and bool(params)
        expect(Duty.VECTOR, good, f"custom.vector.index_params is {params!r}, must be an object that is not empty")
    _check_metric(findings, vector["metric"], backend)
    strategy = manifest.sharding.get("strategy", "hash")
    formula = (
        _formula(findings, Duty.SHARDING, "build_meta.sharding", manifest.sharding, manifest.num_dbs)
        if strategy == "cel"
        else None
    )
    return VectorFields(
        unified=True,
        dim=vector["dim"],
        metric=vector["metric"],
        strategy=strategy,
        backend=backend,
        key_encoding=manifest.key_encoding,
        num_dbs=manifest.num_dbs,
        formula=formula,
    )


def _vector_only(findings: Findings, place: Place, manifest: ManifestContent, vector: dict[str, Any]) -> VectorFields:
    expect, require = findings.expect, findings.require
    _none_of(findings, vector, _UNIFIED_ONLY, "vector-only")
    record = {name: value for name, value in manifest.sharding.items() if value is not None}
    expect(
        Duty.SHARDING,
        record == {"strategy": "hash", "hash_algorithm": "xxh3_64"} and manifest.key_encoding == "raw",
        f"build_meta.sharding {record} with key_encoding {manifest.key_encoding!r}: a vector-only snapshot has the "
        "placeholder hash, xxh3_64 and raw",
    )
    expect(
        Duty.MANIFEST,
        manifest.key_col == "_vector_id",
        f"build_meta.key_col is {manifest.key_col!r}, is _vector_id in vector-only snapshots",
    )
    strategy, probes = vector.get("sharding_strategy"), vector.get("num_probes")
    require(
        Duty.VECTOR,
        strategy in _STRATEGIES,
        f"custom.vector.sharding_strategy is {strategy!r}, not one of {', '.join(_STRATEGIES)}: "
        "absent means explicit, anything else ValueError",
    )
    expect(
        Duty.VECTOR,
        is_int(probes) and 1 <= probes <= manifest.num_dbs,
        f"custom.vector.num_probes is {probes!r}, must be 1 to num_dbs {manifest.num_dbs}: 0 gives empty results",
    )
    own = {"cluster": ("centroids_ref",), "lsh": ("hyperplanes_ref", "num_hash_bits"), "cel": _CEL_FIELDS}
    others = [name for kind, names in own.items() if kind != strategy for name in names]
    _none_of(findings, vector, others, str(strategy))
    bits, formula, key = vector.get("num_hash_bits"), None, None
    if strategy in {"cluster", "lsh"}:
        key = _array_key(findings, place, own[str(strategy)][0], vector)
    if strategy == "lsh":
        expect(Duty.VECTOR, is_int(bits) and bits > 0, f"custom.vector.num_hash_bits is {bits!r}, must be above 0")
    if strategy == "cel":
        formula = _formula(findings, Duty.VECTOR, "custom.vector", vector, manifest.num_dbs)
    return VectorFields(
        unified=False,
        dim=vector["dim"],
        metric=vector["metric"],
        strategy=str(strategy),
        backend=None,
        key_encoding=manifest.key_encoding,
        num_dbs=manifest.num_dbs,
        array_key=key,
        num_hash_bits=bits if is_int(bits) else None,
        formula=formula,
    )


def _array_key(findings: Findings, place: Place, name: str, vector: dict[str, Any]) -> str:
    ref = vector.get(name)
    key = place.key_of(ref) if isinstance(ref, str) else None
    findings.require(
        Duty.VECTOR,
        key is not None and is_plain(key),
        f"custom.vector.{name} is {ref!r}, not an address below {place.store.url}: "
        "a search raises ConfigValidationError, or ReaderStateError at open",
    )
    return key or ""


def _none_of(findings: Findings, vector: dict[str, Any], names: tuple[str, ...] | list[str], kind: str) -> None:
    for name in names:
        findings.expect(
            Duty.VECTOR, name not in vector, f"custom.vector.{name} is there, but a {kind} snapshot has no such field"
        )


def _check_metric(findings: Findings, metric: str, backend: str | None) -> None:
    findings.expect(
        Duty.VECTOR,
        backend != "sqlite-vec" or metric != "dot_product",
        "custom.vector.metric is dot_product, which sqlite-vec does not have: ConfigValidationError",
    )


def _formula(findings: Findings, duty: Duty, where: str, record: dict[str, Any], num_dbs: int) -> CelFormula | None:
    expect = findings.expect
    text, columns, values = (record.get(name) for name in _CEL_FIELDS)
    good = expect(duty, isinstance(text, str) and bool(text), f"{where}.cel_expr is {text!r}, must not be empty")
    typed = isinstance(columns, dict) and bool(columns) and all(kind in _CEL_TYPES for kind in columns.values())
    good &= expect(
        duty, typed, f"{where}.cel_columns is {columns!r}, must name columns of the types {', '.join(_CEL_TYPES)}"
    )
    if values is not None:
        good &= _check_routing_values(findings, duty, where, values, num_dbs)
    if not good:
        return None
    formula = CelFormula(str(text), dict(columns or {}), values, num_dbs)
    problem = formula.problem()
    expect(duty, problem is None, f"{where}.cel_expr {text!r} {problem}: no row can be routed")
    return formula if problem is None else None


def _check_routing_values(findings: Findings, duty: Duty, where: str, values: Any, num_dbs: int) -> bool:
    raw = [str(value) for value in values] if isinstance(values, list) else []
    kinds = {_kind(value, hexed=duty is Duty.VECTOR) for value in values} if isinstance(values, list) else {None}
    return findings.expect(
        duty,
        len(kinds) == 1 and None not in kinds and len(set(raw)) == len(raw) == num_dbs,
        f"{where}.routing_values is {values!r:.200}, must be {num_dbs} different values of one type",
    )


def _kind(value: object, *, hexed: bool) -> str | None:
    """Type of a routing value; vector-only snapshots write bytes as ``{"__bytes_hex__": hex}``."""
    if isinstance(value, str):
        return "text"
    if hexed and isinstance(value, dict) and set(value) == {"__bytes_hex__"}:
        return "bytes"
    return "int" if is_int(value) else None
