"""How a reader is opened."""

from pathlib import Path
from typing import Annotated, Self, TypedDict

from opentelemetry.metrics import MeterProvider
from pydantic import ConfigDict, Field, model_validator

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.model import ConfigModel
from sf_pipelines.snapshot.reader.cache import DEFAULT_BYTES
from sf_pipelines.snapshot.reader.rate_limit import RateLimiter

_Size = Annotated[int, Field(ge=0)]
_Count = Annotated[int, Field(ge=1)]


class ReaderOptions(TypedDict, total=False):
    """The fields of ``ReaderSettings``, as editors and type checkers know them where a reader is opened."""

    s3: S3Options | None
    cache_dir: str | Path | None
    cache_bytes: int
    manifest_key: str | None
    fallback: int
    max_cached_shards: int | None
    memory_budget: int
    exact_scan: bool
    preload: bool
    refresh_interval: float | None
    max_concurrency: int
    rate_limiter: RateLimiter | None
    meter_provider: MeterProvider | None


class ReaderSettings(ConfigModel):
    """Options of all readers.

    Attributes:
        s3: credentials and endpoint; None takes the environment's.
        cache_dir: folder for verified local copies, shared by processes; None is ``$SF_PIPELINES_CACHE`` or a folder
            among the temporary files.
        cache_bytes: size that this folder is held to.
        manifest_key: serve exactly this manifest (a key below the root), whatever the pointer says.
        fallback: older manifests to try when the one that the pointer names is damaged or gone as the reader is opened;
            0 is none. What a rollback withdrew is never among them, and ``health`` is then degraded and says why.
        max_cached_shards: shards kept open while nobody uses them; None is all.
        memory_budget: bytes that open shards may hold. A shard whose vectors fit into what is left of it, and are few
            enough, is searched by an exact scan in memory; any other by its index. Above it, shards that nobody uses
            are closed, longest unused first. While a refresh warms a new snapshot, both count for themselves.
        exact_scan: False asks the index of every shard that has one, and keeps no vectors in memory.
        preload: open and load every shard now, and at each refresh before the new snapshot is served. Without it a
            refresh does so for the shards that are open.
        refresh_interval: seconds between refreshes in the background, give or take a tenth; None is never.
        max_concurrency: shards that one call works on at the same time, and threads that serve all calls.
        rate_limiter: asked for one token for each query or key; None lets everything through.
        meter_provider: where OpenTelemetry metrics go; None is the process's own.

    Raises:
        ConfigError: a value is wrong.
    """

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    s3: S3Options | None = None
    cache_dir: str | Path | None = None
    cache_bytes: _Size = DEFAULT_BYTES
    manifest_key: str | None = None
    fallback: _Size = 0
    max_cached_shards: _Count | None = None
    memory_budget: _Size = 2 * 1024**3
    exact_scan: bool = True
    preload: bool = False
    refresh_interval: Annotated[float, Field(gt=0)] | None = None
    max_concurrency: _Count = 8
    rate_limiter: RateLimiter | None = None
    meter_provider: MeterProvider | None = None

    @model_validator(mode="after")
    def _check_pinned(self) -> Self:
        if self.manifest_key is not None and (self.refresh_interval is not None or self.fallback):
            raise ValueError(
                "manifest_key serves one manifest for good: leave out refresh_interval and fallback, or manifest_key"
            )
        return self
