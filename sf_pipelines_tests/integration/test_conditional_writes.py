"""A store that ignores conditions on writes is found out before anything is built or published."""

import json
from pathlib import Path
from typing import Any

import pytest

from sf_pipelines import WriteConfig, build_snapshot
from sf_pipelines.snapshot import stages
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import ConditionalWritesError
from sf_pipelines.snapshot.manifest import publish
from sf_pipelines.snapshot.run.build import Build
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.builds import assembled
from sf_pipelines_tests.proxy import losing_headers
from sf_pipelines_tests.tables import small_config, write_source

LOST = [("If-None-Match",), ("If-Match",), ("If-None-Match", "If-Match")]


@pytest.fixture
def config(tmp_path: Path, bucket: str, moto_options: S3Options) -> WriteConfig:
    write_source(tmp_path / "source.parquet")
    return small_config(tmp_path, store=f"s3://{bucket}/small", s3=moto_options)


def behind(config: WriteConfig, endpoint: str) -> WriteConfig:
    assert config.s3 is not None
    return config.model_copy(update={"s3": config.s3.model_copy(update={"endpoint_url": endpoint})})


def stored(config: WriteConfig) -> list[str]:
    return sorted(info.key for info in Store.open(config.store, config.s3).objects())


@pytest.mark.parametrize("lost", LOST, ids="+".join)
def test_nothing_is_built_where_conditions_are_ignored(config: WriteConfig, lost: tuple[str, ...]) -> None:
    with (
        losing_headers(str(config.s3 and config.s3.endpoint_url), *lost) as endpoint,
        pytest.raises(ConditionalWritesError, match=lost[0]) as caught,
    ):
        build_snapshot(behind(config, endpoint))
    assert config.store in str(caught.value)
    assert not caught.value.retryable
    assert stored(config) == []


@pytest.mark.slow
def test_conditions_that_are_not_implemented_are_named(config: WriteConfig) -> None:
    endpoint = str(config.s3 and config.s3.endpoint_url)
    with (
        losing_headers(endpoint, "If-None-Match", refuse=True) as refusing,
        pytest.raises(ConditionalWritesError, match="NotImplemented"),
    ):
        publish.require_conditional_writes(Store.open(config.store, behind(config, refusing).s3))
    assert stored(config) == []


@pytest.mark.slow
def test_a_proxy_that_loses_nothing_is_fine(config: WriteConfig, tmp_path: Path) -> None:
    with losing_headers(str(config.s3 and config.s3.endpoint_url)) as endpoint:
        result = build_snapshot(behind(config, endpoint), cache_dir=tmp_path / "cache")
    assert result.published
    assert not [key for key in stored(config) if "probe" in key]


@pytest.mark.slow
def test_promote_asks_again_when_the_provider_changed_meanwhile(config: WriteConfig, tmp_path: Path) -> None:
    build, run_id = assembled(config, tmp_path / "cache")
    stages.gate(build, run_id)
    build.close()
    with losing_headers(str(config.s3 and config.s3.endpoint_url), "If-None-Match") as endpoint:
        later = behind(config, endpoint)
        with Build(later, cache_dir=tmp_path / "cache") as other, pytest.raises(ConditionalWritesError):
            stages.promote(other, run_id)
    assert not [key for key in stored(config) if key.startswith(("manifests", "_CURRENT"))]


@pytest.mark.slow
def test_it_is_asked_until_the_first_publish_here_and_not_after(
    config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(publish, "require_conditional_writes", lambda store: asked.append(store.url))
    build_snapshot(config, cache_dir=tmp_path / "cache")
    build_snapshot(config, cache_dir=tmp_path / "cache")
    assert asked == [config.store] * 2, "once at the scan and once before the pointer is moved"

    store = Store.open(config.store, config.s3)
    pointer: dict[str, Any] = json.loads(store.get("_CURRENT"))
    for changes in ({"seq": None}, {"manifest_ref": pointer["manifest_ref"].replace("small", "elsewhere")}):
        fields = {name: value for name, value in (pointer | changes).items() if value is not None}
        store.put("_CURRENT", json.dumps(fields).encode())
        before = len(asked)
        build_snapshot(config, cache_dir=tmp_path / "cache", force=True)
        assert len(asked) == before + 2, changes
