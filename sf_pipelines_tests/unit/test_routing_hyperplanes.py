import numpy as np
import pytest

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import Float32
from sf_pipelines.snapshot.routing.hyperplanes import fewest_bits, train_hyperplanes
from sf_pipelines.snapshot.routing.lsh import LshRouting

DIM = 32


def clustered(shift: float, rows: int = 6000, seed: int = 0) -> Float32:
    """Overlapping clusters around a point that lies ``shift`` from the origin."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((30, DIM))
    away = rng.standard_normal(DIM)
    vectors = centres[rng.integers(0, 30, rows)] + 0.6 * rng.standard_normal((rows, DIM))
    return (vectors + shift * away / np.linalg.norm(away)).astype(np.float32)


def shares(hyperplanes: Float32, vectors: Float32, num_dbs: int) -> np.ndarray:
    """Rows of each shard over the mean."""
    return np.bincount(LshRouting(hyperplanes, num_dbs).assign(vectors), minlength=num_dbs) * num_dbs / len(vectors)


@pytest.mark.parametrize("shift", [0.0, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("num_dbs", [2, 3, 8, 16])
def test_every_shard_is_filled_wherever_the_data_lies(num_dbs: int, shift: float) -> None:
    data = clustered(shift)
    trained = train_hyperplanes(data[:3000], num_dbs=num_dbs, seed=1)
    found = shares(trained.matrix, data[3000:], num_dbs)
    assert trained.figures["empty"] == 0
    assert found.min() > 0.2
    assert found.max() < 2
    assert found.max() == pytest.approx(trained.figures["balance"], abs=0.35)


def test_random_hyperplanes_leave_shards_empty() -> None:
    data = clustered(30.0)
    random = np.random.default_rng(42).standard_normal((8, DIM)).astype(np.float32)
    trained = train_hyperplanes(data, num_dbs=16)
    assert (shares(random, data, 16) == 0).sum() >= 8
    assert (shares(trained.matrix, data, 16) == 0).sum() == 0


def test_training_is_deterministic_of_unit_length_and_of_the_asked_size() -> None:
    data = clustered(3.0)
    first = train_hyperplanes(data, num_dbs=4, num_hash_bits=10, seed=3)
    again = train_hyperplanes(data, num_dbs=4, num_hash_bits=10, seed=3)
    other = train_hyperplanes(data, num_dbs=4, num_hash_bits=10, seed=4)
    assert first.matrix.shape == (10, DIM)
    assert first.matrix.dtype == np.float32
    assert np.array_equal(first.matrix, again.matrix)
    assert not np.array_equal(first.matrix, other.matrix)
    assert np.allclose(np.linalg.norm(first.matrix, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "sample",
    [
        np.ones((50, 4)),
        np.zeros((50, 4)),
        np.ones((1, 4)),
        np.eye(4)[:2],
        np.concatenate([np.eye(4), -np.eye(4)]),
        np.linspace(-1, 1, 20)[:, None],
        np.linspace(1, 2, 20)[:, None],
        np.full((5, 4), 1e30),
        np.full((5, 4), 1e-30),
        np.ones((40, 1)),
    ],
    ids=[
        "equal",
        "zero",
        "one row",
        "two rows",
        "zero mean",
        "dim 1",
        "dim 1, one side",
        "huge",
        "tiny",
        "dim 1 equal",
    ],
)
@pytest.mark.parametrize(("num_dbs", "bits"), [(1, None), (2, None), (5, None), (3, 9)])
def test_poor_samples(sample: np.ndarray, num_dbs: int, bits: int | None) -> None:
    rows = sample.astype(np.float32)
    trained = train_hyperplanes(rows, num_dbs=num_dbs, num_hash_bits=bits)
    assert np.isfinite(trained.matrix).all()
    assert np.allclose(np.linalg.norm(trained.matrix, axis=1), 1, atol=1e-6)
    assert len(trained.matrix) == (bits or fewest_bits(num_dbs))
    found = shares(trained.matrix, rows, num_dbs)
    assert trained.figures["balance"] == pytest.approx(found.max())
    assert trained.figures["empty"] == (found == 0).sum()


def test_fewest_bits() -> None:
    assert [fewest_bits(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 100)] == [1, 1, 2, 2, 3, 3, 4, 3, 4, 6, 8]
    for num_dbs in range(1, 300):
        cells = 1 << fewest_bits(num_dbs)
        counts = np.bincount(np.arange(cells) % num_dbs, minlength=num_dbs)
        assert counts.min() > 0
        assert counts.max() <= 1.5 * cells / num_dbs


@pytest.mark.parametrize(("num_dbs", "bits"), [(8, 2), (2, 25), (2, 0)])
def test_bits_that_cannot_be(num_dbs: int, bits: int) -> None:
    with pytest.raises(ConfigError, match=f"num_hash_bits {bits}"):
        train_hyperplanes(np.ones((3, 2), dtype=np.float32), num_dbs=num_dbs, num_hash_bits=bits)


def test_nothing_to_train_on() -> None:
    with pytest.raises(ConfigError, match="no vectors"):
        train_hyperplanes(np.ones((0, 2), dtype=np.float32), num_dbs=2)
