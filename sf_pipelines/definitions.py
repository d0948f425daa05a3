"""What Dagster loads: every component below ``defs/``."""

from pathlib import Path

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """The definitions of this project."""
    found = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    # For assets that are launched outside of a job; snapshots choose theirs by the option ``executor``.
    return dg.Definitions.merge(found, dg.Definitions(executor=dg.in_process_executor))
