"""How a reader is opened."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from opentelemetry.metrics import MeterProvider

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.reader.cache import DEFAULT_BYTES
from sf_pipelines.snapshot.reader.rate_limit import RateLimiter


class ReaderOptions(TypedDict, total=False):
    """Options of all readers; ``ReaderSettings`` says what each means and what it is when it is left out."""

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


@dataclass(frozen=True, kw_only=True)
class ReaderSettings:
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

    s3: S3Options | None = None
    cache_dir: str | Path | None = None
    cache_bytes: int = DEFAULT_BYTES
    manifest_key: str | None = None
    fallback: int = 0
    max_cached_shards: int | None = None
    memory_budget: int = 2 * 1024**3
    exact_scan: bool = True
    preload: bool = False
    refresh_interval: float | None = None
    max_concurrency: int = 8
    rate_limiter: RateLimiter | None = None
    meter_provider: MeterProvider | None = None

    def __post_init__(self) -> None:
        at_least = {"cache_bytes": 0, "fallback": 0, "memory_budget": 0, "max_concurrency": 1, "max_cached_shards": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is None and name == "max_cached_shards":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least} (got {value!r})")
        for name in ("exact_scan", "preload"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False (got {getattr(self, name)!r})")
        if self.rate_limiter is not None and not isinstance(self.rate_limiter, RateLimiter):
            raise ConfigError(f"rate_limiter must be a RateLimiter, or None (got {self.rate_limiter!r})")
        if self.meter_provider is not None and not isinstance(self.meter_provider, MeterProvider):
            raise ConfigError(f"meter_provider must be an OpenTelemetry MeterProvider (got {self.meter_provider!r})")
        every = self.refresh_interval
        if every is not None and (isinstance(every, bool) or not isinstance(every, int | float) or not every > 0):
            raise ConfigError(f"refresh_interval must be a number of seconds above 0, or None (got {every!r})")
        if self.manifest_key is not None and (every is not None or self.fallback):
            raise ConfigError(
                "manifest_key serves one manifest for good: leave out refresh_interval and fallback, or manifest_key"
            )
