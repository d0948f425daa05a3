"""Hyperplanes that spread the training sample evenly over the shards.

The format knows no offset: every hyperplane goes through the origin. Where the data is not centred, random ones have
it all on one side and leave shards empty. So their normals are taken orthogonal to the sample's mean and then tilted
towards or away from it until each halves the sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import Float32, Float64
from sf_pipelines.snapshot.routing.lsh import LshRouting

# Cells of so many bits are far more than anyone has shards.
_MOST_BITS = 24
# Candidates per number of bits; each costs one projection of the sample.
# Up to so many numbers in a vector, all directions are found at once: 0.2 s.
_ALL_DIRECTIONS = 512
_CANDIDATES = 24
# Cells differ in number between shards by at most this; more bits spread them better.
_FAIREST_SHARE = 1.5
# Imbalance of a bit, as a part of the sample, that is given up for less tilt.
_LEEWAY = 0.01
# A mean or a direction shorter than this part of the sample's spread is noise.
_NOISE = 1e-6


@dataclass(frozen=True)
class TrainedHyperplanes:
    """Hyperplanes and how evenly they spread the sample.

    Attributes:
        hyperplanes: float32, shape (num_hash_bits, dim), unit length.
        balance: rows of the fullest shard over the mean of all shards: 1 is perfect, ``num_dbs`` is all in one.
        empty: shards that no row of the sample falls into.
    """

    hyperplanes: Float32
    balance: float
    empty: int


def fewest_bits(num_dbs: int) -> int:
    """The smallest number of bits that reaches every shard, none with more than 1.5 times its fair share of cells.

    Raises:
        ConfigError: more shards than 24 bits reach.
    """
    for bits in range(1, _MOST_BITS + 1):
        cells = 1 << bits
        if cells >= num_dbs and -(-cells // num_dbs) * num_dbs <= _FAIREST_SHARE * cells:
            return bits
    raise ConfigError(f"num_dbs {num_dbs} is more than lsh can reach with {_MOST_BITS} bits; use fewer shards")


def train_hyperplanes(
    sample: Float32, *, num_dbs: int, num_hash_bits: int | None = None, seed: int = 42
) -> TrainedHyperplanes:
    """Hyperplanes for a sample, the best of several candidates by the balance of the *shards*.

    Each candidate is a random rotation of the sample's principal directions orthogonal to its mean (PCA with random
    rotation: Jégou et al., Aggregating local descriptors into a compact image representation, CVPR 2010; Gong and
    Lazebnik, Iterative quantization, CVPR 2011), tilted along the mean until each hyperplane halves the sample.

    Args:
        sample: float32, shape (n, dim), n >= 1.
        num_dbs: number of shards.
        num_hash_bits: number of hyperplanes; None takes ``fewest_bits``.
        seed: of the rotations.

    Raises:
        ConfigError: no vectors to train on, or bits that are none, too many, or too few to reach every shard.
    """
    from threadpoolctl import threadpool_limits

    if len(sample) < 1:
        raise ConfigError("there are no vectors to train hyperplanes on")
    bits = fewest_bits(num_dbs) if num_hash_bits is None else num_hash_bits
    if not 1 <= bits <= _MOST_BITS or 1 << bits < num_dbs:
        raise ConfigError(f"num_hash_bits {bits} must be 1 to {_MOST_BITS} and reach all of num_dbs {num_dbs} shards")
    # One thread: with several, the order of additions and with it the hyperplanes would vary from run to run.
    with threadpool_limits(1):
        found = (_judged(planes, sample, num_dbs) for planes in _candidates(sample, bits, seed))
        return min(found, key=lambda one: (one.empty, one.balance))


def _judged(hyperplanes: Float32, sample: Float32, num_dbs: int) -> TrainedHyperplanes:
    counts = np.bincount(LshRouting(hyperplanes, num_dbs).assign(sample), minlength=num_dbs)
    return TrainedHyperplanes(
        hyperplanes=hyperplanes,
        balance=float(counts.max()) * num_dbs / len(sample),
        empty=int((counts == 0).sum()),
    )


def _candidates(sample: Float32, bits: int, seed: int) -> Iterator[Float32]:
    rows = sample.astype(np.float64)
    mean = rows.mean(axis=0)
    spread = float(np.sqrt(np.square(rows).sum(axis=1).mean()))
    length = float(np.sqrt(np.square(mean).sum()))
    # A mean of nearly nothing has no direction: such data is centred.
    axis = mean / length if length > _NOISE * spread else np.zeros_like(mean)
    along = rows @ axis
    rows -= np.outer(along, axis)
    directions = _principal(rows - rows.mean(axis=0), axis, bits)
    across = rows @ directions.T
    rng = np.random.default_rng(seed)
    for _ in range(_CANDIDATES):
        turn = _rotation(rng, bits, len(directions))
        tilts = np.array([_tilt(side, along) for side in (across @ turn.T).T])
        normals = turn @ directions + np.outer(tilts, axis)
        yield (normals / np.sqrt(np.square(normals).sum(axis=1, keepdims=True))).astype(np.float32)


def _principal(rows: Float64, axis: Float64, bits: int) -> Float64:
    """Orthonormal directions of the largest variance, at most ``bits``, none along the mean.

    Where there is nothing but the mean (one dimension), the mean itself, or the first axis.
    """
    found = _leading(rows, bits)
    # Rows lie orthogonal to the mean already; among directions without variance it may still turn up.
    found = found - np.outer(found @ axis, axis)
    lengths = np.sqrt(np.square(found).sum(axis=1))
    found = (found / np.where(lengths > 0, lengths, 1.0)[:, None])[lengths > 0.5][:bits]
    if len(found):
        return found
    return axis[None, :] if axis.any() else np.eye(1, rows.shape[1])


def _leading(rows: Float64, bits: int) -> Float64:
    """Directions by falling variance: all, or of long vectors only as many as are needed (Halko and others, 2011)."""
    if rows.shape[1] <= _ALL_DIRECTIONS:
        return np.linalg.eigh(rows.T @ rows)[1].T[::-1]
    from sklearn.utils.extmath import randomized_svd

    return randomized_svd(rows, min(bits + 1, *rows.shape), random_state=0)[2]


def _rotation(rng: np.random.Generator, rows: int, size: int) -> Float64:
    """Rows of random rotations of ``size`` dimensions: as many as it takes."""
    turns = []
    for _ in range(-(-rows // size)):
        q, r = np.linalg.qr(rng.standard_normal((size, size)))
        # The sign makes the rotation uniformly distributed, and the same whatever the library's convention.
        turns.append(q * np.where(np.diag(r) < 0, -1.0, 1.0))
    return np.vstack(turns)[:rows]


def _tilt(across: Float64, along: Float64) -> float:
    """The smallest number ``a`` with which ``across + a * along > 0`` for about half of the rows.

    Each row changes sides once, at ``a = -across / along``: sorted, these give the number of rows above for every
    ``a``. Between two of them any ``a`` does the same, so the middle is taken.
    """
    moves = np.abs(along) > _NOISE * max(float(np.abs(along).max(initial=0.0)), float(np.abs(across).max(initial=0.0)))
    if not moves.any():
        return 0.0
    turning = -across[moves] / along[moves]
    order = np.argsort(turning, kind="stable")
    turning = turning[order]
    # Below all turning points, rows with a negative part along the mean are above.
    start = int((along[moves] < 0).sum()) + int((across[~moves] > 0).sum())
    above = start + np.concatenate([[0], np.cumsum(np.sign(along[moves][order]))])
    room = max(1.0, float(turning[-1] - turning[0]))
    ends = np.concatenate([[turning[0] - room], turning, [turning[-1] + room]])
    middles = (ends[:-1] + ends[1:]) / 2
    # Without any tilt, where zero lies between two turning points, is best of all that are as good.
    middles[(ends[:-1] < 0) & (ends[1:] > 0)] = 0.0
    # Between equal turning points there is no room.
    real = ends[1:] > ends[:-1]
    off = np.abs(above - len(across) / 2)[real]
    good = off <= off.min() + _LEEWAY * len(across)
    return float(min(middles[real][good], key=abs))
