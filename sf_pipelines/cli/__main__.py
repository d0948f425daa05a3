"""``python -m sf_pipelines.cli``."""

from sf_pipelines.cli import app

app(prog_name="sf-pipelines")
