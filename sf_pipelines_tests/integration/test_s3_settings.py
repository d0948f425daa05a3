"""Settings of S3 that no client can use are told before anything; what is missing is told for what it is."""

from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from sf_pipelines import ShardedVectorReader
from sf_pipelines.cli import app
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import (
    BucketMissingError,
    ConfigError,
    SnapshotNotFoundError,
    StoreDeniedError,
    StoreError,
)
from sf_pipelines.snapshot.store import Store
from sf_pipelines.snapshot.store.addresses import endpoint_fault

GOOD: dict[str, Any] = {
    "endpoint_url": "http://127.0.0.1:9",
    "region": "us-east-1",
    "access_key_id": "key",
    "secret_access_key": SecretStr("secret"),
    "session_token": SecretStr("token"),
    "timeout": 1,
    "retries": 0,
}
WRONG: dict[str, list[str]] = {
    "endpoint_url": [
        *("127.0.0.1:9000", "localhost", "//host:9000", "http://", "http:///", "http://:9000", "http://host:", ""),
        *("http://host:99999", "http://host:0", "http://host:port", "http://ho st", "http://host\n", "http://hööst"),
        *("ftp://host", "http://[::1", "http://a:b@host", "http://host?x=1", "http://host/#x", "http://host/a b"),
    ],
    "region": ["", "us east 1", "us-east-1\n", "ü", "us/east", "us\0east"],
    "access_key_id": ["", "key\n", "k ey", "kéy", "key\0"],
    "secret_access_key": ["", "secret\n", "sécret"],
    "session_token": ["", "token\n", "token\r\nx: y", "tökén"],
}
VARIABLES = {
    "endpoint_url": "AWS_ENDPOINT_URL",
    "region": "AWS_REGION",
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}
CASES = [(field, value) for field, values in WRONG.items() for value in values]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_DEFAULT_REGION", "AWS_TOKEN", *VARIABLES.values()):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(("field", "value"), CASES, ids=repr)
def test_an_option_is_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"S3Options\.{field}: "):
        S3Options(**{**GOOD, field: value})


@pytest.mark.parametrize(("field", "value"), [case for case in CASES if case[1] and "\0" not in case[1]], ids=repr)
def test_a_variable_is_refused(environment: pytest.MonkeyPatch, field: str, value: str) -> None:
    environment.setenv(VARIABLES[field], value)
    with pytest.raises(ConfigError, match=VARIABLES[field]):
        Store.open("s3://bucket/x")


def test_half_of_a_pair_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(ConfigError, match="access_key_id is given without secret_access_key"):
        Store.open("s3://bucket/x")


# Odd, but such that an address may have them: whatever the client makes of them is a typed error.
ODD = ["http://.", "http://-", "http://a..b:1", "http://[::]:1", "http://[:]:1", "http://999.1.1.1:1", "http://_:1"]
ODD += ["http://127.0.0.1:1/%zz", "http://127.0.0.1:1//a//", "HTTP://127.0.0.1:1", "http://[::ffff:1.2.3.4.5]:1"]
ODD += ["http://127.0.0.1:1/<>|\\^`{}", "http://1:00001", "http://[1]:1", f"http://{'a' * 300}:1"]


@pytest.mark.parametrize("endpoint", ODD)
def test_an_odd_endpoint_is_a_typed_error(endpoint: str) -> None:
    if endpoint_fault(endpoint):
        return
    with pytest.raises(StoreError):
        Store.open("s3://bucket/x", S3Options(**{**GOOD, "endpoint_url": endpoint})).get("key")


def test_the_command_line_has_one_line(environment: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["info", "s3://bucket/x", "--endpoint-url", "127.0.0.1:9000"])
    assert result.exit_code != 0
    assert "has no scheme" in " ".join(result.output.split())
    assert "panic" not in result.output
    assert len(result.output.splitlines()) < 5


def test_a_missing_bucket_is_no_missing_snapshot(moto_options: S3Options, bucket: str) -> None:
    store = Store.open("s3://never-made/x", moto_options)
    for call in (lambda: store.find("_CURRENT"), lambda: store.put("a", b"x"), lambda: list(store.objects())):
        with pytest.raises(BucketMissingError, match="no such bucket") as caught:
            call()
        assert not caught.value.retryable
    with pytest.raises(BucketMissingError):
        ShardedVectorReader("s3://never-made/x", s3=moto_options)
    with pytest.raises(SnapshotNotFoundError, match="_CURRENT"):
        ShardedVectorReader(f"s3://{bucket}/x", s3=moto_options)


def test_missing_credentials_are_told_as_such(environment: pytest.MonkeyPatch) -> None:
    # The cloud's own address, on a machine where nobody answers there.
    options = S3Options(endpoint_url="http://127.0.0.1:9", timeout=2, retries=0)
    with pytest.raises(StoreDeniedError, match="no S3 credentials were given") as caught:
        Store.open("s3://bucket/x", options).get("key")
    assert "169.254" not in str(caught.value)
