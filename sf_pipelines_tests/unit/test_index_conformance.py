"""Both index libraries do what every index must do."""

from sf_pipelines.snapshot.index.lancedb import LanceDBShard
from sf_pipelines.snapshot.index.protocol import IndexFamily
from sf_pipelines.snapshot.index.sqlite_vec import SqliteVecShard
from sf_pipelines.snapshot.testing.index import IndexConformance


class TestLanceDB(IndexConformance):
    backend = LanceDBShard
    families = (IndexFamily.FLAT, IndexFamily.IVF_SQ)


class TestSqliteVec(IndexConformance):
    backend = SqliteVecShard
