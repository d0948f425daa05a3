"""How the conformance classes say what is wrong; pytest rewrites the asserts of tests alone."""

from collections.abc import Callable

import numpy as np


def expect(condition: bool, fault: str) -> None:
    """Fails with this text unless the condition holds."""
    if not condition:
        raise AssertionError(fault)


def same(found: object, expected: object, what: str) -> None:
    """Fails unless both are equal; arrays by value."""
    alike = np.array_equal(found, expected) if isinstance(expected, np.ndarray) else found == expected  # pyright: ignore[reportArgumentType]
    expect(bool(alike), f"{what}: is {found!r:.500}, must be {expected!r:.500}")


def refused(kind: type[Exception], call: Callable[[], object], what: str) -> str:
    """Fails unless the call raises such an error; its message."""
    try:
        result = call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{what} gives {result!r:.300}, must raise {kind.__name__}")
