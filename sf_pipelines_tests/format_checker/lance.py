"""Format checker: a Lance table, opened and searched as a stock reader does it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sf_pipelines_tests.format_checker.distance import Scores, check_search
from sf_pipelines_tests.format_checker.lance_bases import check_own_files
from sf_pipelines_tests.format_checker.report import Duty, Findings, some

TABLE = "vector_index"
DATASET = f"{TABLE}.lance"
_DISTANCES = {"cosine": "cosine", "l2": "l2", "dot_product": "dot"}
_LIBRARY_ERRORS = (RuntimeError, ValueError, OSError)
# Without refinement, product and RaBit codes are too coarse for a reader that asks without options.
_FULL = frozenset({"IVF_FLAT", "IVF_HNSW_FLAT"})
_SCALAR = frozenset({"IVF_SQ", "IVF_HNSW_SQ"})


@dataclass(frozen=True)
class StoredVectors:
    """What a shard holds.

    Attributes:
        ids: of each row, numbers or text.
        vectors: float32, shape (rows, dim), in the order of ``ids``.
    """

    ids: list[Any]
    vectors: NDArray[np.float32]


@dataclass(frozen=True)
class LanceShard:
    """A Lance table that could be read.

    Attributes:
        stored: ids and vectors.
        family: type of its index; None without a trained one.
    """

    stored: StoredVectors
    family: str | None


def check_lance(
    findings: Findings, where: str, folder: Path, *, dim: int, metric: str, sample: int
) -> LanceShard | None:
    """Opens ``folder/vector_index.lance`` and checks table, index and search; None where it cannot be read."""
    import lancedb

    if not check_own_files(findings, where, folder / DATASET):
        return None
    try:
        table = lancedb.connect(str(folder)).open_table(TABLE)
        if not _check_schema(findings, where, table.schema, dim):
            return None
        everything: Any = table.search()
        rows = everything.limit(max(1, table.count_rows())).to_arrow()
        stored = _stored(findings, where, rows, dim, metric)
        if stored is None:
            return None
        family = _check_index(findings, where, table, metric, len(stored.ids))
        if len(set(stored.ids)) == len(stored.ids):
            _check_search(findings, where, table, stored, metric, family, sample)
    except _LIBRARY_ERRORS as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        findings.expect(
            Duty.LANCE_TABLE,
            False,
            f"{where}: {DATASET} cannot be read ({text}): stock prints FAILED TO OPEN TABLE and answers []",
        )
        return None
    return LanceShard(stored, family)


def check_one_family(findings: Findings, families: dict[str, str | None]) -> None:
    """All shards have the same kind of index, so that their scores are comparable."""
    found = sorted({str(family) for family in families.values()})
    findings.expect(
        Duty.LANCE_INDEX,
        len(found) <= 1,
        f"shards have different indexes ({', '.join(found)}): stock merges scores of different scales",
    )


def _check_schema(findings: Findings, where: str, schema: pa.Schema, dim: int) -> bool:
    expect = findings.expect
    missing = [name for name in ("id", "vector", "payload") if name not in schema.names]
    if not expect(Duty.LANCE_TABLE, not missing, f"{where}: the Lance table has no column {missing}: search raises"):
        return False
    kind = schema.field("id").type
    expect(
        Duty.LANCE_TABLE,
        pa.types.is_string(kind) or pa.types.is_int64(kind),
        f"{where}: column id is {kind}; stock knows string and int64",
    )
    payload = schema.field("payload").type
    expect(Duty.LANCE_TABLE, pa.types.is_string(payload), f"{where}: column payload is {payload}, must be string")
    alike = [field.name for field in schema if _is_vector(field.type)]
    expect(
        Duty.LANCE_TABLE,
        alike == ["vector"],
        f"{where}: the columns {alike} look like vectors, only 'vector' may: the library refuses the search",
    )
    vector: Any = schema.field("vector").type
    floats = _is_vector(vector) and str(vector.value_type) in {"float", "halffloat"}
    return expect(
        Duty.LANCE_TABLE,
        floats and vector.list_size == dim,
        f"{where}: column vector is {vector}, must be a fixed_size_list of {dim} float32 or float16",
    )


def _is_vector(kind: Any) -> bool:
    return bool(pa.types.is_fixed_size_list(kind)) and bool(
        pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
    )


def _stored(findings: Findings, where: str, rows: pa.Table, dim: int, metric: str) -> StoredVectors | None:
    expect = findings.expect
    for name in ("id", "vector"):
        empty = rows[name].null_count
        if not expect(Duty.LANCE_TABLE, not empty, f"{where}: {empty} rows have no {name}"):
            return None
    flat: Any = rows["vector"].combine_chunks()
    vectors = flat.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, dim)
    ids = rows["id"].to_pylist()
    check_numbers(findings, Duty.LANCE_TABLE, where, vectors, metric, "vanish from its answers")
    bad = [row_id for row_id, text in zip(ids, rows["payload"].to_pylist(), strict=True) if not is_payload(text)]
    expect(
        Duty.LANCE_TABLE,
        not bad,
        f"{where}: the payloads of {some(bad)} are no text of a JSON object: they come back as None",
    )
    return StoredVectors(ids, vectors)


def check_numbers(
    findings: Findings, duty: Duty, where: str, vectors: NDArray[np.float32], metric: str, makes: str
) -> None:
    """No NaN, no infinity, and no zero vector under cosine."""
    odd = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    findings.expect(duty, len(odd) == 0, f"{where}: {len(odd)} vectors have NaN or infinity: searches {makes}")
    zero = np.flatnonzero(~vectors.any(axis=1)) if metric == "cosine" else odd[:0]
    findings.expect(duty, len(zero) == 0, f"{where}: {len(zero)} vectors are zero, which cosine cannot: they {makes}")


def is_payload(text: str | None) -> bool:
    """Whether a payload is absent or text of a JSON object."""
    try:
        return text is None or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_index(findings: Findings, where: str, table: Any, metric: str, rows: int) -> str | None:
    expect = findings.expect
    found = [index for index in table.list_indices() if index.columns == ["vector"]]
    stats = table.index_stats(found[0].name) if len(found) == 1 else None
    if stats is None:
        expect(
            Duty.LANCE_INDEX, False, f"{where}: vector has {len(found)} indexes, not one: stock answers in squared L2"
        )
        return None
    covered = expect(
        Duty.LANCE_INDEX,
        stats.num_indexed_rows == rows and stats.num_unindexed_rows == 0,
        f"{where}: the index covers {stats.num_indexed_rows} of {rows} rows; with none stock answers in squared L2",
    )
    expect(
        Duty.LANCE_INDEX,
        stats.distance_type == _DISTANCES[metric],
        f"{where}: the index has the distance {stats.distance_type}, declared is {metric}: stock takes the index's",
    )
    expect(
        Duty.LANCE_INDEX,
        not covered or stats.index_type in _FULL | _SCALAR,
        f"{where}: the index is {stats.index_type}, too coarse for a reader that does not refine",
    )
    return stats.index_type if covered else None


def _check_search(
    findings: Findings, where: str, table: Any, stored: StoredVectors, metric: str, family: str | None, sample: int
) -> None:
    rows = {row_id: row for row, row_id in enumerate(stored.ids)}
    half = str(table.schema.field("vector").type.value_type) == "halffloat"
    if family in _SCALAR and metric == "cosine":
        scores = Scores(lambda exact: 2.0 * exact, 0.03, False, "2(1 - cos)")
    elif family in _SCALAR:
        scores = Scores(
            lambda exact: exact, 0.05, False, "squared L2" if metric == "l2" else "1 - x·y", any_length=False
        )
    else:
        name = {"cosine": "1 - cos", "l2": "squared L2", "dot_product": "1 - x·y"}[metric]
        scores = Scores(lambda exact: exact, 2e-3 if half else 1e-4, family == "IVF_FLAT", name)

    def search(query: NDArray[np.float32], k: int) -> tuple[list[int], NDArray[np.float64]]:
        found = table.search(query).limit(k).to_arrow()
        distances = found["_distance"].to_numpy().astype(np.float64)
        return [rows[row_id] for row_id in found["id"].to_pylist()], distances

    check_search(findings, Duty.LANCE_SEARCH, where, stored.vectors, metric, scores, sample, search)
