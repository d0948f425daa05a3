"""The golden snapshots: what the stock implementation wrote, and what it answers."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sf_pipelines.snapshot.store import Store

DATA = Path(__file__).parent / "data"
CLUSTER = ("vector-lancedb-cluster-cosine", "vector-lancedb-cluster-cosine-fp16")
LSH, CEL, EXPLICIT = "vector-lancedb-lsh-l2", "vector-lancedb-cel", "vector-sqlitevec-explicit-l2"
VECTOR = (*CLUSTER, LSH, CEL, EXPLICIT)
UNIFIED_HASH = ("unified-sqlitevec-hash", "unified-sqlite-lancedb")
UNIFIED_CEL = "unified-sqlitevec-cel"
UNIFIED = (*UNIFIED_HASH, UNIFIED_CEL)


@cache
def expected(name: str) -> dict[str, Any]:
    """What is in a snapshot and what stock answers on it."""
    return json.loads((DATA / name / "expected.json").read_text())


@cache
def rows(name: str) -> dict[str, NDArray[Any]]:
    """``vectors``, ``queries``, ``ids`` and ``id_is_int``."""
    with np.load(DATA / name / "data.npz") as data:
        return dict(data)


def keys(name: str) -> list[Any]:
    """The ids with the types that they were written with."""
    data = rows(name)
    return [int(text) if whole else text for text, whole in zip(data["ids"].tolist(), data["id_is_int"], strict=True)]


def fill(store: Store, name: str) -> None:
    """Puts a snapshot's objects into a store opened on its root."""
    for item in expected(name)["objects"]:
        key = item["key"].removeprefix(f"{name}/")
        store.put(key, (DATA / item["key"]).read_bytes(), content_type=item["content_type"])
