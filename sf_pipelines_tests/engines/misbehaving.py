"""Workers that misbehave, and cut the source into small input ranges as the driver of these tests does."""

from importlib import import_module

from sf_pipelines.snapshot.testing import engine

# The module that cuts the source, in the driver and in workers alike, and what makes a range of each row group.
CUTTER = import_module("sf_pipelines.snapshot.stages.sample")
RANGE_BYTES = 100 * 16 * 4


class Misbehaving(engine.Misbehaving):
    """See the base class."""

    def _obey(self) -> None:
        setattr(CUTTER, "_RANGE_BYTES", RANGE_BYTES)  # noqa: B010
        super()._obey()
