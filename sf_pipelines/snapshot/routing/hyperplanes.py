"""Hyperplanes that spread the training sample evenly over the shards.

In the format every hyperplane goes through the origin. Data that is not centred lies on one side of random ones, and
shards stay empty. So normals are taken orthogonal to the sample's mean, then tilted along it until each hyperplane
halves the sample.
"""

from collections.abc import Iterator

import numpy as np

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import Float32, Float64
from sf_pipelines.snapshot.routing.lsh import LshRouting
from sf_pipelines.snapshot.routing.protocol import Trained

# Far more cells than anyone has shards.
_MOST_BITS = 24
# Each candidate costs one projection of the sample.
_CANDIDATES = 24
# Up to this dimension all directions are found at once: 0.2 s.
_ALL_DIRECTIONS = 512
# Most cells of a shard over the mean; more bits spread cells more evenly.
_FAIREST_SHARE = 1.5
# Imbalance of a bit, as a part of the sample, that less tilt is worth.
_IMBALANCE = 0.01
# A mean or a direction shorter than this part of the sample's spread is noise.
_NOISE = 1e-6


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


def train_hyperplanes(sample: Float32, *, num_dbs: int, num_hash_bits: int | None = None, seed: int = 42) -> Trained:
    """Hyperplanes for a sample, the best of several candidates by the balance of the *shards*.

    Each candidate is a random rotation of the sample's principal directions orthogonal to its mean (PCA with random
    rotation: Jégou et al., Aggregating local descriptors into a compact image representation, CVPR 2010; Gong and
    Lazebnik, Iterative quantization, CVPR 2011), tilted along the mean until each hyperplane halves the sample.

    Args:
        sample: float32, shape (n, dim), n >= 1.
        num_dbs: number of shards.
        num_hash_bits: number of hyperplanes; None takes ``fewest_bits``.
        seed: of the rotations.

    Returns:
        Hyperplanes, shape (num_hash_bits, dim), of unit length. Figures: ``balance``, rows of the fullest shard over
        the mean (1 is perfect, ``num_dbs`` is all in one); ``empty``, shards without a row of the sample;
        ``num_hash_bits``.

    Raises:
        ConfigError: no vectors to train on, or bits that are none, too many, or too few to reach every shard.
    """
    from threadpoolctl import threadpool_limits

    if len(sample) < 1:
        raise ConfigError("there are no vectors to train hyperplanes on")
    bits = fewest_bits(num_dbs) if num_hash_bits is None else num_hash_bits
    if not 1 <= bits <= _MOST_BITS or 1 << bits < num_dbs:
        raise ConfigError(f"num_hash_bits {bits} must be 1 to {_MOST_BITS} and reach all of num_dbs {num_dbs} shards")
    # One thread: with several, the order of additions, and so the hyperplanes, would vary from run to run.
    with threadpool_limits(1):
        found = (_measured(planes, sample, num_dbs) for planes in _candidates(sample, bits, seed))
        return min(found, key=lambda one: (one.figures["empty"], one.figures["balance"]))


def _measured(hyperplanes: Float32, sample: Float32, num_dbs: int) -> Trained:
    counts = np.bincount(LshRouting(hyperplanes, num_dbs).assign(sample), minlength=num_dbs)
    balance = float(counts.max()) * num_dbs / len(sample)
    figures = {"balance": balance, "empty": int((counts == 0).sum()), "num_hash_bits": len(hyperplanes)}
    return Trained("hyperplanes", hyperplanes, figures)


def _candidates(sample: Float32, bits: int, seed: int) -> Iterator[Float32]:
    rows = sample.astype(np.float64)
    mean = rows.mean(axis=0)
    spread = float(np.sqrt(np.square(rows).sum(axis=1).mean()))
    length = float(np.sqrt(np.square(mean).sum()))
    # A mean of almost zero has no direction: such data is centred.
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
    # Rows are orthogonal to the mean already, but it may turn up among directions without variance.
    found = found - np.outer(found @ axis, axis)
    lengths = np.sqrt(np.square(found).sum(axis=1))
    found = (found / np.where(lengths > 0, lengths, 1.0)[:, None])[lengths > 0.5][:bits]
    if len(found):
        return found
    return axis[None, :] if axis.any() else np.eye(1, rows.shape[1])


def _leading(rows: Float64, bits: int) -> Float64:
    """Directions by falling variance: all, or for long vectors only as many as needed (Halko et al., 2011)."""
    if rows.shape[1] <= _ALL_DIRECTIONS:
        return np.linalg.eigh(rows.T @ rows)[1].T[::-1]
    from sklearn.utils.extmath import randomized_svd

    return randomized_svd(rows, min(bits + 1, *rows.shape), random_state=0)[2]


def _rotation(rng: np.random.Generator, rows: int, size: int) -> Float64:
    """The first ``rows`` rows of as many random rotations of ``size`` dimensions as it takes."""
    turns = []
    for _ in range(-(-rows // size)):
        q, r = np.linalg.qr(rng.standard_normal((size, size)))
        # This sign makes rotations uniformly distributed, whatever the library's convention.
        turns.append(q * np.where(np.diag(r) < 0, -1.0, 1.0))
    return np.vstack(turns)[:rows]


def _tilt(across: Float64, along: Float64) -> float:
    """The ``a`` nearest to 0 with ``across + a * along > 0`` for about half of the rows.

    Each row changes sides once, at ``a = -across / along``. These turning points, sorted, give the number of rows above
    for every ``a``; between two of them any ``a`` does the same, so the middle is taken.
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
    # No tilt is best, where zero lies between two turning points.
    middles[(ends[:-1] < 0) & (ends[1:] > 0)] = 0.0
    # Between equal turning points lies no number.
    real = ends[1:] > ends[:-1]
    off = np.abs(above - len(across) / 2)[real]
    good = off <= off.min() + _IMBALANCE * len(across)
    return float(min(middles[real][good], key=abs))
