"""Local disk, S3 and memory are stores."""

import uuid
from pathlib import Path

import pytest

from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.store import Store, Versioned
from sf_pipelines.snapshot.testing.store import StoreConformance


class TestDisk(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return Store.open(tmp_path / "a root: 50% & more", create=True)


class TestS3(StoreConformance):
    @pytest.fixture
    def store(self, bucket: str, moto_options: S3Options) -> Store:
        return Store.open(f"s3://{bucket}/deep/prefix", moto_options)


class TestMemory(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return Store.open(f"memory://{uuid.uuid4().hex}")


class Forgetful(Store):
    """Loses the second of two creates, and takes any version for the expected one."""

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> bool:
        self.put(key, data, content_type=content_type)
        return True

    def swap(
        self, key: str, data: bytes, expected: Versioned | None, *, content_type: str = "application/json"
    ) -> bool:
        return expected is None or self.create(key, data, content_type=content_type)


@pytest.mark.parametrize("name", ["test_create_once", "test_compare_and_swap", "test_one_creates", "test_one_swaps"])
def test_a_store_that_overwrites_is_found(name: str, tmp_path: Path) -> None:
    store = Forgetful.open(tmp_path / "root", create=True)
    with pytest.raises(AssertionError, match=r"create|swap"):
        getattr(StoreConformance(), name)(store)
