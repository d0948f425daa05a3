"""What ``dg scaffold defs sf_pipelines.components.VectorSnapshotComponent <name>`` writes."""

import dagster as dg


class VectorSnapshotScaffolder(dg.Scaffolder):
    """Writes a ``defs.yaml`` to fill in."""

    def scaffold(self, request: dg.ScaffoldRequest) -> None:
        """Writes the file; the folder's name becomes the snapshot's."""
        name = request.target_path.name
        dg.scaffold_component(
            request,
            {
                "name": name,
                "source": f"data/{name}/*.parquet",
                "store": f"data/{name}/snapshot",
                "num_dbs": 4,
                "id_col": "id",
                "payload_cols": [],
                "vector_spec": {"dim": 384, "vector_col": "vector", "metric": "cosine"},
                "recall_gate": {"k": 10, "min_recall": 0.95},
                "source_assets": [],
            },
        )
