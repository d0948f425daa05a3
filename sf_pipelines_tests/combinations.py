"""Every strategy, backend, metric, id type and quantisation, and a small set of combinations that covers all pairs."""

from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any, NamedTuple


class Combination(NamedTuple):
    """One kind of snapshot."""

    strategy: str
    backend: str
    metric: str
    id_type: str
    quantization: str | None

    @property
    def unified(self) -> bool:
        """Whether it has keys and values."""
        return self.strategy in {"hash", "unified-cel"}

    @property
    def name(self) -> str:
        """For test ids."""
        return "-".join(str(part) for part in self)

    @property
    def why_illegal(self) -> str | None:
        """What a refusal must name; None for what can be built."""
        if self.backend == "sqlite-vec" and self.metric == "dot_product":
            return "dot_product"
        if self.backend == "sqlite-vec" and self.quantization is not None:
            return "quantization"
        if self.id_type == "bytes" and not self.unified:
            return "id_col"
        return None


LEVELS: dict[str, tuple[Any, ...]] = {
    "strategy": ("cluster", "lsh", "explicit", "cel", "hash", "unified-cel"),
    "backend": ("lancedb", "sqlite-vec"),
    "metric": ("cosine", "l2", "dot_product"),
    "id_type": ("int64", "string", "bytes"),
    "quantization": (None, "fp16", "i8"),
}


def every_combination() -> Iterator[Combination]:
    """All of them, legal or not."""
    return (Combination(*values) for values in product(*LEVELS.values()))


def _pairs(one: Combination) -> set[tuple[Any, ...]]:
    named = list(zip(LEVELS, one, strict=True))
    return set(combinations(named, 2))


def covering(candidates: Iterable[Combination]) -> list[Combination]:
    """A few of the candidates that hold every pair of levels that any candidate holds: greedily, always the same."""
    left = list(candidates)
    wanted = set[tuple[Any, ...]]().union(*(_pairs(one) for one in left))
    chosen: list[Combination] = []
    while wanted:
        best = max(left, key=lambda one: len(_pairs(one) & wanted))
        chosen.append(best)
        wanted -= _pairs(best)
    return chosen


LEGAL = [one for one in every_combination() if one.why_illegal is None]
ILLEGAL = [one for one in every_combination() if one.why_illegal is not None]
CHOSEN = covering(LEGAL)
