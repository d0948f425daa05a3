"""Manifests and pointers that the stock writer made."""

import json
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines.snapshot.manifest.codec import decode_manifest, encode_manifest, timestamp
from sf_pipelines.snapshot.manifest.models import Manifest
from sf_pipelines.snapshot.manifest.pointer import Pointer, manifest_key

FOLDER = Path(__file__).parent.parent / "golden" / "data" / "manifests"
NAMES = sorted(path.name for path in FOLDER.iterdir())


def load(name: str) -> tuple[Manifest, dict[str, Any]]:
    folder = FOLDER / name
    manifest = decode_manifest((folder / "manifest").read_bytes(), where=name)
    return manifest, json.loads((folder / "expected.json").read_text())


def test_all_are_here() -> None:
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_build_meta(name: str) -> None:
    manifest, expected = load(name)
    found = manifest.model_dump(mode="json", exclude={"custom", "shards", "created_at"})
    assert found | {"created_at": timestamp(manifest.created_at)} == expected["build_meta"]
    assert manifest.custom == expected["custom"]


@pytest.mark.parametrize("name", NAMES)
def test_shards(name: str) -> None:
    manifest, expected = load(name)
    found = [row.model_dump(mode="json", exclude={"objects"}) for row in manifest.shards]
    assert found == expected["shards"]
    assert all(row.objects is None for row in manifest.shards)
    assert manifest.row_count == 300


@pytest.mark.parametrize("name", NAMES)
def test_typed_fields(name: str) -> None:
    manifest, expected = load(name)
    vector = expected["custom"]["vector"]
    assert manifest.extras is None
    assert manifest.vector.dim == 16
    assert manifest.vector.metric == vector["metric"]
    assert manifest.vector.num_probes == vector.get("num_probes", 1)
    assert manifest.vector.sharding_strategy == vector.get("sharding_strategy")
    assert manifest.vector.unified is vector.get("unified", False)
    for row in manifest.shards:
        assert row.db_url is not None
        assert manifest.key_of(row.db_url) == f"shards/run_id=golden-run/db={row.db_id:05d}/attempt=00"


@pytest.mark.parametrize("name", NAMES)
def test_written_again_they_say_the_same(name: str) -> None:
    manifest, _ = load(name)
    assert decode_manifest(encode_manifest(manifest), where="again") == manifest


@pytest.mark.parametrize("name", NAMES)
def test_pointer(name: str) -> None:
    data = (FOLDER / name / "_CURRENT").read_bytes()
    pointer = Pointer.decode(data, name)
    assert pointer.run_id == "golden-run"
    assert (pointer.seq, pointer.write_id, pointer.previous) == (None, None, None)
    assert pointer.manifest_ref == f"s3://golden/{name}/{manifest_key(pointer)}"
    # Nothing that we add when there is nothing to say: the bytes are the stock writer's.
    assert pointer.encode() == data
