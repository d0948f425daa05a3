"""What Dagster loads: every component below ``defs/``."""

from pathlib import Path

import dagster as dg

# Step processes are forked from one that has imported this: a step then starts in a fraction of a second. What must
# not be forked (LanceDB's and scikit-learn's threads) is imported only by the steps themselves.
_PRELOADED = ["sf_pipelines.components"]


@dg.definitions
def defs() -> dg.Definitions:
    """The definitions of this project."""
    executor = dg.multiprocess_executor.configured({"start_method": {"forkserver": {"preload_modules": _PRELOADED}}})
    found = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    return dg.Definitions.merge(found, dg.Definitions(executor=executor))
