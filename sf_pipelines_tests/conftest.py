"""Fixtures that every kind of test shares."""

import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines_tests.faces import FACES, Face
from sf_pipelines_tests.flaky import FlakyServer


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def moto_options() -> Iterator[S3Options]:
    """Credentials of an S3 server of this test session."""
    _make_puts_atomic()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Options(
        endpoint_url=f"http://{host}:{port}",
        region="us-east-1",
        access_key_id="test",
        secret_access_key=SecretStr("test"),
    )
    server.stop()


def _make_puts_atomic() -> None:
    """S3 compares a condition and writes in one step; moto's threads can get in between."""
    put_object, one_at_a_time = S3Response.put_object, threading.Lock()

    def atomic(self: S3Response) -> Any:
        with one_at_a_time:
            return put_object(self)

    S3Response.put_object = atomic


def make_bucket(options: S3Options, name: str) -> None:
    """Creates a bucket on the test server."""
    assert options.secret_access_key is not None
    client = boto3.client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=options.region,
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key.get_secret_value(),
    )
    client.create_bucket(Bucket=name)
    client.close()


@pytest.fixture
def bucket(moto_options: S3Options) -> str:
    """Name of a fresh, empty bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    make_bucket(moto_options, name)
    return name


@pytest.fixture(scope="session")
def flaky(moto_options: S3Options) -> Iterator[FlakyServer]:
    """A way to the test server that fails when it is told to."""
    server = FlakyServer(moto_options)
    yield server
    server.stop()


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> Face:
    """The blocking readers, or those for asyncio."""
    return request.param
