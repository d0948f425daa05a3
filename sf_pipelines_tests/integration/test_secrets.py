"""No output shows a secret: a marker in every place where a secret is, or is put by mistake, is found nowhere."""

import pickle
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr
from typer.testing import CliRunner

from sf_pipelines import ShardedVectorReader, build_snapshot
from sf_pipelines.cli import app
from sf_pipelines.engines.config import engine_spec, open_engine
from sf_pipelines.orchestration.options import SnapshotOptions
from sf_pipelines.orchestration.resources import SnapshotAccess
from sf_pipelines.snapshot.config import S3Options, WriteConfig
from sf_pipelines.snapshot.errors import ConfigError, GateFailedError, SfPipelinesError, StoreError, without_secrets
from sf_pipelines.snapshot.model import ConfigModel
from sf_pipelines.snapshot.store import ObjectInfo, Store
from sf_pipelines_tests.tables import small_config, write_source

# As AWS makes them: with slashes.
MARK = "hush/hush+Marker0123456789"
FIELDS: dict[str, Any] = {
    "name": "tiny",
    "source": "source.parquet",
    "store": "s3://bucket/tiny",
    "num_dbs": 2,
    "vector_spec": {"dim": 4},
}
WRONG: list[tuple[type[ConfigModel], dict[str, Any], str]] = [
    (WriteConfig, {"s3": {"aws_secret_acces_key": MARK}}, r"s3\.aws_secret_acces_key: unknown field"),
    (WriteConfig, {"s3": {"secret_access_key": [MARK]}}, r"s3\.secret_access_key: "),
    (WriteConfig, {"s3": {"secret_access_key": {"value": MARK}}}, r"s3\.secret_access_key: "),
    (WriteConfig, {"s3": {"secret_access_key": f"{MARK}\n"}}, r"s3\.secret_access_key: .*line break"),
    (WriteConfig, {"s3": {"session_token": f"{MARK}ü"}}, r"s3\.session_token: .*character"),
    (WriteConfig, {"s3": {"timeout": MARK}}, r"s3\.timeout: "),
    (WriteConfig, {"s3": {"region": MARK}}, r"s3\.region: is no region"),
    (WriteConfig, {"s3": {"access_key_id": f"{MARK} "}}, r"s3\.access_key_id: "),
    (WriteConfig, {"s3": {"endpoint_url": f"http://user:{MARK}@127.0.0.1"}}, r"s3\.endpoint_url: .*password in it"),
    (WriteConfig, {"s3": {"endpoint_url": MARK}}, r"s3\.endpoint_url: has no scheme"),
    (WriteConfig, {"s3": MARK}, r"WriteConfig\.s3: "),
    (WriteConfig, {"s3": [MARK]}, r"WriteConfig\.s3: "),
    (WriteConfig, {"secret_access_key": MARK}, r"WriteConfig\.secret_access_key: unknown field"),
    (WriteConfig, {"source": f"s3://key:{MARK}@bucket/lake"}, r"source: has credentials"),
    (WriteConfig, {"store": f"s3://key:{MARK}@bucket/tiny"}, r"store: has "),
    (WriteConfig, {"source": {"password": MARK}}, r"source: "),
    (WriteConfig, {"num_dbs": {"password": MARK}}, r"num_dbs: "),
    (SnapshotOptions, {"s3_resource": {"aws_secret_access_key": [MARK]}}, r"s3_resource\.aws_secret_access_key: "),
    (SnapshotOptions, {"s3_resource": {"secret_access_key": MARK}}, r"s3_resource\.secret_access_key: unknown field"),
    (SnapshotOptions, {"s3_resource": {"aws_session_token": {"env": MARK}}}, r"aws_session_token\.env: "),
    (SnapshotOptions, {"s3_resource": {"endpoint_url": f"https://a:{MARK}@b"}}, r"endpoint_url: .*password in it"),
    (SnapshotOptions, {"s3_resource": MARK}, r"s3_resource: "),
    (SnapshotOptions, {"engine": {"type": "spark", "address": [f"sc://h/;token={MARK}"]}}, r"engine\.spark\.address: "),
    (SnapshotOptions, {"engine": {"type": "spark", "token": MARK}}, r"engine\.spark\.token: unknown field"),
    (SnapshotOptions, {"engine": {"type": "sparc", "address": MARK}}, r"engine.*sparc"),
    (
        SnapshotOptions,
        {"engine": {"type": "ray", "address": f"ray://a:{MARK}@h", "workers": 2}},
        r"address: .*password in it",
    ),
]


def told(error: BaseException) -> str:
    """Everything that a traceback, a log and a report of an error may show."""
    whole = "".join(traceback.format_exception(error))
    return whole + repr(error) + repr(error.args) + str(pickle.loads(pickle.dumps(error)))  # noqa: S301 - our own


@pytest.mark.parametrize(("model", "fields", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_field_is_named_and_its_value_is_not(
    model: type[ConfigModel], fields: dict[str, Any], message: str
) -> None:
    base = FIELDS if model is WriteConfig else {}
    with pytest.raises(ConfigError, match=message) as caught:
        model(**{**base, **fields})
    assert "ush+Marker" not in told(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_dbs": 0}, r"num_dbs: should be greater than 0 \(got 0\)"),
        ({"vector_spec": {"dim": 4, "backend": "faiss"}}, r"vector_spec\.backend: .*\(got 'faiss'\)"),
        ({"payload_cols": ["title", 7]}, r"payload_cols.*\(got 7\)"),
    ],
)
def test_other_values_are_shown(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WriteConfig(**{**FIELDS, **fields})


def test_reprs() -> None:
    s3 = S3Options(access_key_id=MARK, secret_access_key=SecretStr(MARK), session_token=SecretStr(MARK))
    config = WriteConfig(**FIELDS, s3=s3)
    secrets = dict.fromkeys(("aws_access_key_id", "aws_secret_access_key", "aws_session_token"), MARK)
    options = SnapshotOptions(
        s3_resource=secrets,  # pyright: ignore[reportArgumentType]
        engine={"type": "spark", "address": f"sc://host/;token={MARK}"},  # pyright: ignore[reportArgumentType]
    )
    store = Store.open("s3://bucket/x", s3)
    for thing in (s3, config, options, store, vars(store), SnapshotAccess(config)):
        assert "ush+Marker" not in f"{thing!r} {thing}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET http://u:p/w@h:9/b", "GET http://***@h:9/b"),
        ("sc://h:1/;token=abc;user_id=me", "sc://h:1/;token=***;user_id=me"),
        ("https://h/x?X-Amz-Signature=abc&X-Amz-Security-Token=d&part=1", None),
        ("<Code>ExpiredToken</Code><Token-0>abc</Token-0>", "<Code>ExpiredToken</Code><Token-0>***</Token-0>"),
        ("s3://bucket/a@b/c=1", "s3://bucket/a@b/c=1"),
        ("file:///home/me:you@here/x", "file:///home/me:you@here/x"),
    ],
)
def test_what_is_left_out_of_messages(text: str, shown: str | None) -> None:
    assert without_secrets(text) == (shown or "https://h/x?X-Amz-Signature=***&X-Amz-Security-Token=***&part=1")
    assert str(StoreError(text)) == without_secrets(text)


@contextmanager
def quoting_server() -> Iterator[str]:
    """Refuses every request, and quotes what it was sent, as S3 does."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (
                f"<Error><Code>ExpiredToken</Code><Message>expired</Message><Token-0>{MARK}</Token-0>"
                f"<StringToSign>{MARK}</StringToSign></Error>"
            ).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            del format, args

    for verb in ("PUT", "POST", "HEAD", "DELETE"):
        setattr(Refusing, f"do_{verb}", Refusing.do_GET)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_errors_of_the_store_leave_out_what_the_server_quotes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with quoting_server() as endpoint:
        s3 = S3Options(
            endpoint_url=endpoint,
            access_key_id="key",
            secret_access_key=SecretStr(MARK),
            session_token=SecretStr(MARK),
            timeout=2,
            retries=0,
        )
        store = Store.open("s3://bucket/x", s3)
        calls: list[Callable[[], Any]] = [
            lambda: store.get("a"),
            lambda: store.head("a"),
            lambda: list(store.objects("a")),
            lambda: store.folders("a"),
            lambda: store.open_file("a", pinned=ObjectInfo("a", 9, '"tag"')).read(),
            lambda: store.download("a", tmp_path / "copy"),
            lambda: store.sha256("a"),
            lambda: store.put("a", b"x"),
            lambda: store.create("a", b"x"),
            lambda: store.upload(tmp_path / "file", "a"),
            lambda: store.copy("a", "b"),
            lambda: store.delete("a"),
            lambda: store.delete_many(["a", "b"]),
            lambda: ShardedVectorReader("s3://bucket/x", s3=s3),
        ]
        for call in calls:
            with pytest.raises(StoreError) as caught:
                call()
            assert "ush+Marker" not in told(caught.value)


def test_an_endpoint_of_the_environment_is_checked_like_one_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        with monkeypatch.context() as patched:
            patched.setenv(name, f"http://user:{MARK}@127.0.0.1:9")
            with pytest.raises(ConfigError, match=rf"{name} has a user name or a password") as caught:
                Store.open("s3://bucket/x")
            assert "ush+Marker" not in told(caught.value)


def test_engines_do_not_tell_the_tokens_of_their_addresses() -> None:
    with pytest.raises(ConfigError, match=r"engine\.dask\.address: has a user name or a password in it") as caught:
        engine_spec({"type": "dask", "address": f"tcp://user:{MARK}@127.0.0.1:1"})
    assert "ush+Marker" not in told(caught.value)
    spec = engine_spec({"type": "dask", "address": "tcp://no port"})
    with pytest.raises(SfPipelinesError, match="no Dask scheduler"):
        open_engine(spec)


@pytest.mark.slow
def test_nothing_that_a_build_stores_has_the_secret_in_it(moto_options: S3Options, bucket: str, tmp_path: Path) -> None:
    s3 = moto_options.model_copy(update={"secret_access_key": SecretStr(MARK), "session_token": SecretStr(MARK)})
    write_source(tmp_path / "source.parquet")
    store = Store.open(f"s3://{bucket}/lake", s3)
    store.upload(tmp_path / "source.parquet", "source.parquet")
    config = small_config(tmp_path).model_copy(
        update={"source": f"s3://{bucket}/lake/*.parquet", "store": f"s3://{bucket}/serving/tiny", "s3": s3}
    )
    heard: list[str] = []

    def hear(stage: str, done: int, total: int | None, unit: str) -> None:
        heard.append(f"{stage} {done} {total} {unit}")

    result = build_snapshot(config, progress=hear)
    with pytest.raises(GateFailedError) as caught:
        build_snapshot(config.model_copy(update={"max_shard_skew": 1.0}), force=True)
    root = Store.open(f"s3://{bucket}", s3)
    stored = [root.get(info.key) for info in root.objects()]
    assert len(stored) > 20
    for text in (repr(result), told(caught.value), *heard, *(data.decode("latin-1") for data in stored)):
        assert "ush+Marker" not in text


BROKEN = {
    "misspelt": ("s3: {aws_secret_acces_key: MARK}", "s3.aws_secret_acces_key: unknown field"),
    "list": ("s3: [MARK]", "WriteConfig.s3: "),
    "quotes": ('s3: {secret_access_key: "MARK}', "is no YAML, line"),
    "alias": ("s3: {secret_access_key: *MARK }", "is no YAML, line"),
    "tag": ("s3: {secret_access_key: !MARK x}", "is no YAML, line"),
    "indentation": ("s3:\n  secret_access_key: MARK\n region: x", "is no YAML, line"),
    "endpoint": ('s3: {endpoint_url: "http://a:MARK@h"}', "s3.endpoint_url: has a user name or a password in it"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_command_line(tmp_path: Path, case: str) -> None:
    lines, message = BROKEN[case]
    file = tmp_path / "snapshot.yaml"
    # No slashes: an alias or a tag of YAML has none.
    file.write_text(f"{yaml.safe_dump(FIELDS)}{lines.replace('MARK', 'hushMarker')}\n")
    result = CliRunner().invoke(app, ["build", str(file)], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert message in result.output
    assert "Marker" not in result.output
    assert result.exception is not None
    with suppress(AttributeError):
        assert "Marker" not in "".join(traceback.format_exception(result.exception))
