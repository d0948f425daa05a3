"""The command line: ``sf-pipelines``, also ``python -m sf_pipelines.cli``."""

from sf_pipelines.cli.app import app

__all__ = ["app"]
