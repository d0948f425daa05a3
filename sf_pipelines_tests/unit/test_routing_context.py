from typing import Any

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import ConfigError, ManifestError
from sf_pipelines.snapshot.routing.context import decode_context, decode_routing_values, encode_context


def test_a_context_comes_back_as_it_was() -> None:
    context: dict[str, Any] = {"s": "é", "n": -3, "d": 1.5, "b": b"\x00\xff", "t": True, "empty": b""}
    text = encode_context(context)
    assert decode_context(text) == context
    assert decode_context(encode_context({"t": True}))["t"] is True
    assert encode_context({"n": np.int64(3), "a": b"\xff"}) == '{"a":{"__bytes_hex__":"ff"},"n":3}'


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, object()])
def test_values_that_no_context_holds(value: object) -> None:
    with pytest.raises(ConfigError, match="x is"):
        encode_context({"x": value})


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"b": {"__bytes_hex__": "zz"}}', '{"b": {"other": 1}}', '{"b": {}}']
)
def test_text_that_is_no_context(text: str) -> None:
    with pytest.raises(ConfigError, match="routing context"):
        decode_context(text)


def test_routing_values_of_a_manifest() -> None:
    assert decode_routing_values(None) is None
    assert decode_routing_values(["eu", "us"]) == ("eu", "us")
    assert decode_routing_values([{"__bytes_hex__": "00ff"}, {"__bytes_hex__": ""}]) == (b"\x00\xff", b"")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, True], r"routing_values\[1\] is True"),
        ([1.5], "is 1.5"),
        ([None], "is None"),
        ([1, "1"], "different types"),
        (["a", "a"], "twice"),
        ([{"__bytes_hex__": 3}], r"routing_values\[0\]"),
        ([[1]], "must be"),
    ],
)
def test_routing_values_that_are_refused(values: list[Any], reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        decode_routing_values(values)
