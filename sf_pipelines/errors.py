"""Everything that this package raises on purpose: see ``sf_pipelines.snapshot.errors``."""

from sf_pipelines.snapshot.errors import *  # noqa: F403 - the whole tree, under the name that users import
