"""How a snapshot sits in Dagster: the options of the component's YAML and of ``build_snapshot_defs``, in one model."""

import os
import zoneinfo
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

import dagster as dg
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    InstanceOf,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from sf_pipelines.engines import EngineSpec, engine_spec
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.model import ConfigModel
from sf_pipelines.snapshot.store.addresses import setting_fault

BackfillMode = Literal["single_run", "run_per_shard"]
Status = Literal["running", "stopped"]

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
_Interval = Annotated[int, Field(ge=1, le=86_400)]


class FromEnvironment(ConfigModel):
    """A value that is read from an environment variable where it is used, and is in no definition.

    Attributes:
        env: name of the variable.
    """

    # What is given in place of a name is as likely the secret itself.
    secretive: ClassVar[bool] = True

    env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

    def read(self) -> str:
        """The value."""
        found = os.environ.get(self.env)
        if not found:
            raise ConfigError(f"environment variable {self.env} is not set, but the snapshot's options name it")
        return found


def _if_dict(model: Callable[..., Any]) -> BeforeValidator:
    """Makes a model of a dict before pydantic tries all that a field takes: an error then names the wrong field."""
    return BeforeValidator(lambda value: model(**value) if isinstance(value, dict) else value)


def _env_var(value: Any) -> Any:
    return FromEnvironment(env=value.env_var_name) if isinstance(value, dg.EnvVar) else value


_Text = Annotated[
    Annotated[str, Field(min_length=1)] | FromEnvironment, _if_dict(FromEnvironment), BeforeValidator(_env_var)
]
_Secret = Annotated[_Text | None, Field(repr=False)]

# Names of dagster-aws for the fields of S3Options.
_S3_FIELDS = {
    "endpoint_url": "endpoint_url",
    "region_name": "region",
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}


class S3ResourceOptions(ConfigModel):
    """Fields of a dagster-aws ``S3Resource``; each is a text or ``{env: NAME}``, read when a run or a tick starts.

    Attributes:
        endpoint_url: for servers other than AWS.
        region_name: bucket's region.
        aws_access_key_id: key id.
        aws_secret_access_key: secret.
        aws_session_token: for temporary credentials.
    """

    secretive: ClassVar[bool] = True

    endpoint_url: _Text | None = None
    region_name: _Text | None = None
    aws_access_key_id: _Secret = None
    aws_secret_access_key: _Secret = None
    aws_session_token: _Secret = None

    @field_validator("*")
    @classmethod
    def _a_client_can_send_it(cls, value: Any, info: ValidationInfo) -> Any:
        # Values of the environment are checked where they are read.
        if isinstance(value, str) and (fault := setting_fault(str(info.field_name), value)):
            raise ValueError(fault)
        return value

    @classmethod
    def of(cls, resource: Any) -> Self:
        """The fields of a dagster-aws ``S3Resource``; refuses what other S3 clients cannot take over."""
        for field in ("profile_name", "use_unsigned_session"):
            if getattr(resource, field):
                raise ConfigError(
                    f"S3Resource.{field} is not supported: set endpoint, region and keys on the resource, or use AWS_*"
                )
        return cls(**{name: getattr(resource, name) for name in _S3_FIELDS})

    def read(self) -> S3Options:
        """The credentials; reads the environment."""
        given: dict[str, Any] = {}
        for name, field in _S3_FIELDS.items():
            value = getattr(self, name)
            given[field] = value.read() if isinstance(value, FromEnvironment) else value
        return S3Options(**given)


def _key_text(value: Any) -> Any:
    if isinstance(value, dg.AssetKey):
        return value.to_user_string()
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else value


_AssetKey = Annotated[str, Field(pattern=r"^[^/]+(/[^/]+)*$"), BeforeValidator(_key_text)]


class SensorOptions(ConfigModel):
    """A sensor.

    Attributes:
        interval_seconds: least time between two looks.
        default_status: whether the sensor is on before anybody touches its switch in the UI.
    """

    interval_seconds: _Interval = 30
    default_status: Status = "stopped"

    @property
    def dagster_status(self) -> dg.DefaultSensorStatus:
        """Dagster's word for ``default_status``."""
        return dg.DefaultSensorStatus[self.default_status.upper()]


class SourceSensorOptions(SensorOptions):
    """A rebuild when the source's files change.

    Attributes:
        interval_seconds: least time between two looks at the source.
        settle_seconds: time that the files must have been the same before they are built, so that a writer of many
            files is not cut in two; 0 builds at the first look.
        default_status: whether the sensor is on before anybody touches its switch in the UI.
    """

    interval_seconds: _Interval = 60
    settle_seconds: Annotated[float, Field(ge=0, le=86_400)] = 60


def _cron_is_valid(value: str) -> str:
    try:
        dg.ScheduleDefinition(name="probe", job_name="probe", cron_schedule=value)
    except dg.DagsterInvalidDefinitionError as error:
        raise ValueError("is no cron expression of five fields, as in '0 3 * * *'") from error
    return value


def _timezone_is_known(value: str) -> str:
    try:
        zoneinfo.ZoneInfo(value)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError) as error:
        raise ValueError("is no time zone of the IANA database, as in 'Europe/Berlin'") from error
    return value


_Cron = Annotated[str, AfterValidator(_cron_is_valid)]
_TimeZone = Annotated[str, AfterValidator(_timezone_is_known)]


class ScheduleOptions(ConfigModel):
    """Rebuilds by the clock, through the job ``build_<name>``.

    Attributes:
        cron: five fields, as in ``0 3 * * *``.
        timezone: name of the IANA database that the fields are read in.
        force: build and publish although nothing is new.
        default_status: whether the schedule is on before anybody touches its switch in the UI.
    """

    cron: _Cron
    timezone: _TimeZone = "UTC"
    force: bool = False
    default_status: Status = "stopped"


class CleanupScheduleOptions(ConfigModel):
    """Cleanups by the clock, through the job ``cleanup_<name>``.

    Attributes:
        cron: five fields, as in ``0 5 * * 0``.
        timezone: name of the IANA database that the fields are read in.
        keep: published snapshots to keep, the current one included.
        older_than_days: keep all that were built in so many days, too.
        stale_after_days: age of failed builds, routed rows and left-over files that may go.
        dry_run: only show what would go; ``false`` removes it.
        default_status: whether the schedule is on before anybody touches its switch in the UI.
    """

    cron: _Cron
    timezone: _TimeZone = "UTC"
    keep: Annotated[int, Field(ge=1)]
    older_than_days: Annotated[float, Field(ge=0, le=36_525)] | None = None
    stale_after_days: Annotated[float, Field(ge=0, le=36_525)] = 7.0
    dry_run: bool = True
    default_status: Status = "stopped"


class FreshnessOptions(ConfigModel):
    """How old the published snapshot may get.

    Attributes:
        fail_hours: hours after which it counts as stale.
        warn_hours: hours after which Dagster warns that it will be stale soon.
    """

    fail_hours: Annotated[float, Field(gt=0, le=24 * 366)]
    warn_hours: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _warns_before_it_fails(self) -> "FreshnessOptions":
        if self.warn_hours is not None and self.warn_hours >= self.fail_hours:
            raise ValueError(f"warn_hours {self.warn_hours:g} must be less than fail_hours {self.fail_hours:g}")
        # Dagster looks once a minute and refuses shorter windows.
        if min(self.fail_hours, self.warn_hours or self.fail_hours) * 60 < 1:
            raise ValueError("fail_hours and warn_hours must be a minute or more")
        return self


class MultiprocessExecutor(ConfigModel):
    """Each step in a process of its own on the machine of the run, several at a time.

    Attributes:
        type: names the kind.
        max_concurrent: processes at a time; None is one a core.
    """

    type: Literal["multiprocess"]
    max_concurrent: Annotated[int, Field(ge=1)] | None = None


class SnapshotOptions(ConfigModel):
    """How a snapshot sits in Dagster.

    Attributes:
        source_assets: keys of the assets that write the source, as in ``lake/products``.
        refresh_source: whether the job ``build_<name>`` materializes them too.
        backfill: whether a backfill of several shards is one run or one run a shard.
        key_prefix: put before the snapshot's name in all its asset keys, as in ``search/prod``; and before ``<name>``
            in the names of its jobs, schedules, sensors and resources: ``build_search__prod__<name>``.
        group: asset group; None is the snapshot's name.
        owners: e-mail addresses, or teams as in ``team:search``.
        tags: of all assets.
        kinds: shown beside each asset's own.
        pool: concurrency pool of the steps that build shards; None is ``<name>_shards``.
        s3_resource: S3 credentials of source and store: the key of an ``S3Resource`` that the deployment defines, or
            the fields of one. None takes ``s3`` or the environment's.
        engine: where rows are routed and shards are built, as in ``{type: dask, address: "tcp://scheduler:8786"}``, or
            the key of an ``EngineResource`` that the deployment defines. All shards of a run are then one step; each
            has its own line in the log and its own partition. None builds them in Dagster's steps, one a shard.
        executor: how the steps of ``build_<name>`` and of the operations' jobs are executed: ``in_process``, all in the
            run's process; ``multiprocess``, or ``{type: multiprocess, max_concurrent: 2}``; ``inherit``, as the
            deployment's ``Definitions(executor=...)`` says, for steps on Kubernetes or Celery. In Python also an
            ``ExecutorDefinition``.
        automation: declarative conditions: each asset is requested when what it builds on is new; the pointer only
            after the blocking checks have passed.
        schedule: rebuilds by the clock.
        source_sensor: a rebuild when the source changes.
        pointer_sensor: an event when the published snapshot changes.
        freshness: how old the published snapshot may get. It counts from the events of ``published_snapshot`` where
            there is a pointer sensor, else from the last run that looked at the source and found it published.
        operations: whether there are the jobs ``rollback_<name>``, ``release_<name>``, ``pin_<name>``,
            ``unpin_<name>``, ``cleanup_<name>``, ``diff_<name>`` and ``verify_<name>``.
        cleanup: cleanups by the clock.
    """

    source_assets: tuple[_AssetKey, ...] = ()
    refresh_source: bool = False
    backfill: BackfillMode = "single_run"
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$")] | None = None
    group: _Name | None = None
    owners: tuple[str, ...] = ()
    tags: dict[str, str] = Field(default_factory=dict)
    kinds: tuple[_Name, ...] = ()
    pool: _Name | None = None
    s3_resource: Annotated[_Name | S3ResourceOptions | None, _if_dict(S3ResourceOptions)] = None
    engine: Annotated[_Name | EngineSpec | None, _if_dict(lambda **fields: engine_spec(fields))] = None
    executor: Annotated[
        Literal["in_process", "multiprocess", "inherit"]
        | MultiprocessExecutor
        | SkipJsonSchema[InstanceOf[dg.ExecutorDefinition]],
        _if_dict(MultiprocessExecutor),
    ] = "in_process"
    automation: SensorOptions | None = None
    schedule: ScheduleOptions | None = None
    source_sensor: SourceSensorOptions | None = None
    pointer_sensor: SensorOptions | None = None
    freshness: FreshnessOptions | None = None
    operations: bool = True
    cleanup: CleanupScheduleOptions | None = None

    @field_validator("cleanup")
    @classmethod
    def _cleanup_has_its_job(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("operations") is False:
            raise ValueError("needs the job cleanup_<name>: leave operations: false out")
        return value

    @field_validator("owners", "tags")
    @classmethod
    def _dagster_takes_it(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            dg.AssetSpec("probe", **{str(info.field_name): value})
        except (dg.DagsterInvalidDefinitionError, ValueError) as error:
            raise ValueError(str(error).splitlines()[0]) from error
        return value
