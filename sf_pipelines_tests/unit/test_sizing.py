"""The rule behind ``num_dbs: auto``, and what an index family's bounds keep."""

import pytest

from sf_pipelines.snapshot.config import WriteConfig
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.index.protocol import IndexFamily, choose_family
from sf_pipelines.snapshot.run.sizing import shards_for


def size(rows: int, dim: int = 384) -> tuple[int, int, int]:
    """Rows with 2 KiB of source each."""
    return rows, dim, 2048 * rows


@pytest.mark.parametrize(
    ("rows", "dim", "shards"),
    [
        (1, 384, 1),
        (1_000, 384, 1),
        (10_000, 384, 1),
        (60_000, 384, 1),
        (100_000, 384, 2),
        (500_000, 384, 16),
        (1_000_000, 384, 32),
        (1_000_000, 96, 16),
        (1_000_000, 1536, 128),
        (10_000_000, 384, 256),
        (100_000_000, 384, 2048),
        (100_000_000, 1536, 4096),
        (10_000_000_000, 384, 4096),
    ],
)
def test_the_number_by_rows(rows: int, dim: int, shards: int) -> None:
    assert shards_for(*size(rows, dim)) == shards


def test_large_payloads_count() -> None:
    assert shards_for(100_000, 384, 0) == 2
    assert shards_for(100_000, 384, 4 << 30) == 16


def test_the_number_is_kept_within_a_factor_of_two() -> None:
    served, seen = 16, [16]
    for rows in range(500_000, 8_000_000, 50_000):
        served = shards_for(*size(rows), current=served)
        if served != seen[-1]:
            seen.append(served)
    assert seen == [16, 32, 64, 128]
    for rows in range(8_000_000, 300_000, -50_000):
        served = shards_for(*size(rows), current=served)
        if served != seen[-1]:
            seen.append(served)
    assert seen == [16, 32, 64, 128, 64, 32, 16]
    # One that somebody chose is kept too.
    assert shards_for(*size(1_000_000), current=20) == 20
    assert shards_for(*size(1_000_000), current=3) == 32
    assert shards_for(*size(1_000), current=2) == 2
    assert shards_for(*size(1_000), current=3) == 1


def test_limits() -> None:
    assert shards_for(3, 384, 1 << 40) == 3
    assert shards_for(*size(1_000_000), limit=10) == 10
    assert shards_for(*size(1_000_000), limit=10, current=16) == 10


def config(**fields: object) -> WriteConfig:
    defaults: dict[str, object] = {
        "name": "tiny",
        "source": "rows.parquet",
        "store": "store",
        "vector_spec": {"dim": 4},
    }
    return WriteConfig(**defaults | fields)  # pyright: ignore[reportArgumentType]


def test_auto_is_the_default_and_has_no_number_yet() -> None:
    asked = config()
    assert (asked.num_dbs, asked.shard_count) == ("auto", None)
    with pytest.raises(ConfigError, match="before the source was scanned"):
        _ = asked.shards
    sized = asked.sized(8)
    assert (sized.num_dbs, sized.shards) == (8, 8)
    # The number is no part of what makes a build another one, so that a hold covers it whatever it is.
    assert sized.build_fields() == asked.build_fields() == asked.sized(4).build_fields()
    assert config(num_dbs=8).build_fields() != sized.build_fields()
    assert sized.sized(4).shards == 4
    assert config(num_dbs=8).sized(4).shards == 8


@pytest.mark.parametrize(
    ("sharding", "most"),
    [({"strategy": "lsh", "num_hash_bits": 3}, 8), ({"strategy": "cluster", "training_rows": 20}, 20)],
)
def test_a_limit_of_the_sharding_limits_auto(sharding: dict[str, object], most: int) -> None:
    assert config(vector_spec={"dim": 4, "sharding": sharding}).most_shards == most


def test_what_auto_means_nothing_for() -> None:
    for sharding in (
        {"strategy": "explicit"},
        {"strategy": "cel", "cel_expr": "shard", "cel_columns": {"shard": "int"}},
    ):
        with pytest.raises(
            ConfigError, match=f"num_dbs: auto means nothing for .*'{sharding['strategy']}'.* say how many"
        ):
            config(vector_spec={"dim": 4, "sharding": sharding})


def test_routing_values_say_the_number() -> None:
    sharding = {"strategy": "cel", "cel_expr": "lang", "cel_columns": {"lang": "string"}, "routing_values": ["a", "b"]}
    assert config(vector_spec={"dim": 4, "sharding": sharding}).shards == 2


def test_more_probes_than_auto_has_come_to() -> None:
    asked = config(vector_spec={"dim": 4, "sharding": {"num_probes": 4}})
    assert asked.sized(4).shards == 4
    with pytest.raises(ConfigError, match=r"num_probes 4 is more than num_dbs 1, which auto has chosen; say num_dbs"):
        asked.sized(1)


def test_a_family_is_kept_near_its_bounds() -> None:
    def seen(start: str, rows: list[int]) -> list[str]:
        served, found = start, [start]
        for count in rows:
            served = choose_family("auto", count, served=served).value
            if served != found[-1]:
                found.append(served)
        return found

    grows = [int(2_000 * 1.05**step) for step in range(110)]
    assert seen("flat", grows) == ["flat", "ivf_sq", "hnsw"]
    assert seen("hnsw", grows[::-1]) == ["hnsw", "ivf_sq", "flat"]
    # Five per cent more and less again change nothing, on whatever side of a bound they began.
    for start, rows in [("flat", 4_200), ("ivf_sq", 3_800), ("ivf_sq", 210_000), ("hnsw", 190_000)]:
        assert seen(start, [rows, int(0.95 * rows), rows, int(1.05 * rows)]) == [start]
    assert choose_family("auto", 4_200) is IndexFamily.IVF_SQ
    assert choose_family("ivf_flat", 4_200, served="flat") is IndexFamily.IVF_FLAT
    assert choose_family("auto", 100, served="flat", eight_bit=True) is IndexFamily.IVF_SQ


def test_no_graph_where_many_rows_are_equal() -> None:
    assert choose_family("auto", 1_000_000, repeated=0.04) is IndexFamily.HNSW
    assert choose_family("auto", 1_000_000, repeated=0.3) is IndexFamily.IVF_SQ
    assert choose_family("auto", 1_000_000, repeated=0.3, served="hnsw") is IndexFamily.IVF_SQ
    assert choose_family("hnsw", 1_000_000, repeated=0.3) is IndexFamily.HNSW
