import json
from datetime import UTC, datetime
from typing import Any

import pytest

from sf_pipelines.snapshot.errors import ManifestError
from sf_pipelines.snapshot.manifest.pointer import (
    Pointer,
    PreviousPointer,
    manifest_key,
    manifest_name,
    parse_manifest_key,
)

NAME = "manifests/2026-11-22T12:00:00.000000Z_run_id=r1/manifest"
STOCK: dict[str, Any] = {
    "manifest_ref": f"s3://b/p/{NAME}",
    "manifest_content_type": "application/x-sqlite3",
    "run_id": "r1",
    "updated_at": "2026-11-22T12:00:00.5Z",
    "format_version": 1,
}


def decoded(**changes: Any) -> Pointer:
    fields = {name: value for name, value in (STOCK | changes).items() if value is not None}
    return Pointer.decode(json.dumps(fields).encode(), "s3://b/p/_CURRENT")


def test_what_is_written_is_read_back() -> None:
    pointer = Pointer(
        manifest_ref=f"s3://b/p/{NAME}",
        run_id="r1",
        updated_at=datetime(2026, 11, 22, 12, tzinfo=UTC),
        seq=3,
        write_id="w",
        previous=PreviousPointer(run_id="r0", manifest_ref="s3://b/p/x"),
        manifest_digest="d",
        build_key="b",
        gate_key="g",
    )
    data = pointer.encode()
    assert Pointer.decode(data, "here") == pointer
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    assert b"null" not in data
    assert b'"updated_at":"2026-11-22T12:00:00.000000Z"' in data


def test_extra_keys_and_versions_of_others() -> None:
    pointer = decoded(format_version=9, something={"new": [1]}, previous={"run_id": "a", "manifest_ref": "b", "x": 1})
    assert pointer.format_version == 9
    assert pointer.previous == PreviousPointer(run_id="a", manifest_ref="b")


def test_format_version_defaults_to_one() -> None:
    assert decoded(format_version=None).format_version == 1


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        (1_764_000_000, datetime(2025, 11, 24, 16, 0, tzinfo=UTC)),
        (1_764_000_000.5, datetime(2025, 11, 24, 16, 0, 0, 500_000, tzinfo=UTC)),
        (1_764_000_000_000, datetime(2025, 11, 24, 16, 0, tzinfo=UTC)),
        ("2026-11-22T12:00:00", datetime(2026, 11, 22, 12, tzinfo=UTC)),
        ("2026-11-22T12:00:00Z", datetime(2026, 11, 22, 12, tzinfo=UTC)),
        ("2026-11-22T13:00:00+01:00", datetime(2026, 11, 22, 12, tzinfo=UTC)),
    ],
)
def test_dates(written: object, moment: datetime) -> None:
    found = decoded(updated_at=written).updated_at
    assert found == moment
    assert found.tzinfo is not None


@pytest.mark.parametrize("field", ["manifest_ref", "manifest_content_type", "run_id", "updated_at"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ManifestError, match=rf"pointer s3://b/p/_CURRENT.*{field}"):
        decoded(**{field: None})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("manifest_ref", 5),
        ("run_id", ["r1"]),
        ("updated_at", "soon"),
        ("updated_at", True),
        ("updated_at", 1e300),
        ("updated_at", []),
        ("format_version", "1"),
        ("seq", "1"),
        ("seq", -1),
        ("seq", 1.0),
        ("write_id", 5),
        ("previous", "r0"),
        ("previous", {"run_id": "r0"}),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ManifestError, match=rf"pointer s3://b/p/_CURRENT.*{field}"):
        decoded(**{field: value})


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":NaN}', b'{"a":1,"a":1}', b"[" * 100_000, b" " * 70_000]
)
def test_no_json_object(data: bytes) -> None:
    with pytest.raises(ManifestError, match="pointer s3://b/p/_CURRENT"):
        Pointer.decode(data, "s3://b/p/_CURRENT")


@pytest.mark.parametrize(
    "ref",
    [
        f"s3://b/p/{NAME}",
        f"s3://other/place/{NAME}",
        f"file:///srv/x/{NAME}",
        f"file:///srv/x/{NAME.replace(':', '%3A')}",
        f"memory://{NAME}",
    ],
)
def test_manifest_key_is_the_tail(ref: str) -> None:
    assert manifest_key(decoded(manifest_ref=ref)) == NAME


@pytest.mark.parametrize(
    "ref",
    [
        "s3://b/p/manifests/latest/manifest",
        "s3://b/p/manifests/2026-11-22T12:00:00Z_run_id=r1/manifest",
        f"s3://b/p/{NAME}/",
        f"s3://b/p/{NAME}.bak",
        f"s3://b/p/x{NAME}",
        f"s3://b/p/{NAME.replace('manifests', 'old')}",
        "s3://b/p/manifests/2026-99-22T12:00:00.000000Z_run_id=r1/manifest",
        "s3://b/p/manifests/2026-11-22T12:00:00.000000Z_run_id=/manifest",
        "s3://b/p/manifests/2026-11-22T12:00:00.000000Z_run_id=a%2f..%2f../manifest",
        "file:///p/manifests/2026-11-22T12:00:00.000000Z_run_id=a%2f..%2f../manifest",
        "s3://b/p/manifests/2026-11-22T12:00:00.000000Z_run_id=a\\..\\b/manifest",
        "s3://b/p/manifests/2026-11-22T12:00:00.000000Z_run_id=r1/manifest\n",
        "file:///p/manifests/2026-11-22T12:00:00.000000Z_run_id=%ff/manifest",
        "manifest",
        "",
    ],
)
def test_other_refs_are_refused(ref: str) -> None:
    with pytest.raises(ManifestError, match="manifest_ref"):
        manifest_key(decoded(manifest_ref=ref))


def test_names_go_both_ways() -> None:
    moment = datetime(2026, 11, 22, 12, 0, 0, 7, tzinfo=UTC)
    key = manifest_name("abc-1.2_3", moment)
    assert key == "manifests/2026-11-22T12:00:00.000007Z_run_id=abc-1.2_3/manifest"
    assert parse_manifest_key(key) == (moment, "abc-1.2_3")


@pytest.mark.parametrize("run_id", ["", "a/b", "..", ".", "a b", "a\n", "%2e", "é", "x" * 201])
def test_run_ids_that_cannot_be_part_of_a_name(run_id: str) -> None:
    with pytest.raises(ManifestError, match="run id"):
        manifest_name(run_id, datetime.now(UTC))
