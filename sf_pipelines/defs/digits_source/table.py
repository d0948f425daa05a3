"""The demo's source as an asset."""

import dagster as dg

from sf_pipelines.defs.digits_source.rows import TABLE, digits_table, project_root, write_table


@dg.asset(
    key=["digits", "table"],
    group_name="digits",
    kinds={"parquet"},
    code_version="1",
    backfill_policy=dg.BackfillPolicy.single_run(),
)
def table() -> dg.MaterializeResult:
    """The digits of scikit-learn as Parquet."""
    rows, path = digits_table(), project_root() / TABLE
    written = write_table(rows, path)
    return dg.MaterializeResult(metadata={"dagster/row_count": rows.num_rows, "path": str(path), "written": written})
