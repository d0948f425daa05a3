"""What ``dg scaffold defs sf_pipelines.components.VectorSnapshotComponent <name>`` writes."""

import re

import dagster as dg

_YAML = """\
# A recall-gated vector snapshot. All fields: dg utils inspect-component sf_pipelines.components.VectorSnapshotComponent
# A value may be a template: "{{{{ env('NAME') }}}}" is filled in when definitions are loaded; where {{env: NAME}}
# is allowed, it is read when a run or a tick starts and is in no definition.
type: {type}
attributes:
  name: {name}
  source: data/{name}/*.parquet       # Parquet or Arrow files: a path, a folder, a glob, s3://bucket/prefix/*.parquet
  store: data/{name}/snapshot         # a folder, or s3://bucket/prefix
  # num_dbs: 8                        # shards; without it by rows and bytes of the source
  id_col: id
  payload_cols: []                    # returned with each hit
  vector_spec:
    dim: 384
    vector_col: vector
    metric: cosine                    # or l2, dot_product
  recall_gate:
    k: 10
    min_recall: 0.95                  # nothing below this is published

  # How it sits in Dagster. Schedule and sensors are off until switched on in the UI, or by `default_status: running`.
  source_assets: []                   # keys of the assets that write the source, as in lake/products
  # key_prefix: search/prod           # before the name in all asset keys
  # group: search
  # owners: ["team:search"]
  # tags: {{tier: gold}}
  # pool: search_shards               # concurrency pool of the steps that build shards
  schedule:
    cron: "0 3 * * *"
    timezone: UTC
  source_sensor:
    settle_seconds: 60                # a build starts when the files have not changed for so long
  pointer_sensor: {{}}                  # events on {name}/published_snapshot whenever readers get another snapshot
  # freshness: {{fail_hours: 36, warn_hours: 26}}
  # automation: {{}}                    # declarative conditions in place of schedule and sensor
  # executor: multiprocess            # a process for each step; default: all in the run's process
  # s3_resource:                      # or the key of an S3Resource of this deployment; without it, AWS_* variables
  #   endpoint_url: {{env: S3_ENDPOINT_URL}}
  #   aws_access_key_id: {{env: S3_ACCESS_KEY_ID}}
  #   aws_secret_access_key: {{env: S3_SECRET_ACCESS_KEY}}
"""


class VectorSnapshotScaffolder(dg.Scaffolder):
    """Writes a ``defs.yaml`` to fill in."""

    def scaffold(self, request: dg.ScaffoldRequest) -> None:
        """Writes the file, or adds to it; the folder's name becomes the snapshot's, with ``_`` for odd characters."""
        if request.scaffold_format != "yaml":
            dg.scaffold_component(request)
            return
        path = request.target_path if request.append else request.target_path / "defs.yaml"
        name = re.sub(r"\W", "_", path.parent.name, flags=re.ASCII)
        text = _YAML.format(type=request.type_name, name=f"_{name}" if name[0].isdigit() else name)
        with path.open("a" if request.append else "w", encoding="utf-8") as file:
            file.write(f"---\n{text}" if request.append else text)
