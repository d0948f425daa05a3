"""Text that is no UTF-8 never gets into a snapshot, wherever in a row it stands."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sf_pipelines.snapshot.arrow import plain_rows
from sf_pipelines.snapshot.source.rejects import Faults, without_invalid_text


def broken(*values: bytes | None) -> pa.Array:
    """A string column over bytes that nobody has checked."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)


BAD = broken(b"fine", b"\xff\xfe", None)
COLUMNS: dict[str, tuple[Any, list[Any]]] = {
    "string": (BAD, ["fine", None, None]),
    "large_string": (BAD.cast(pa.large_binary()).view(pa.large_string()), ["fine", None, None]),
    "large_list": (pa.LargeListArray.from_arrays([0, 1, 2, 3], BAD), [["fine"], None, [None]]),
    "dictionary": (pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), BAD), ["fine", None, None]),
    "list": (pa.ListArray.from_arrays([0, 1, 2, 3], BAD), [["fine"], None, [None]]),
    "struct": (pa.StructArray.from_arrays([BAD], ["s"]), [{"s": "fine"}, None, {"s": None}]),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_value_that_cannot_be_decoded_is_a_fault_of_its_row(name: str) -> None:
    column, cleaned = COLUMNS[name]
    faults = Faults(3)
    batch = plain_rows(pa.record_batch([column, pa.array([1, 2, 3])], names=["text", "n"]))
    rows = without_invalid_text(batch, faults)

    assert np.flatnonzero(~faults.passed).tolist() == [1]
    assert faults.reasons[1] == "invalid_text"
    assert faults.details[1] == "text: text that is no UTF-8"
    assert rows.column("text").to_pylist() == cleaned
    assert rows.column("n").to_pylist() == [1, 2, 3]


def test_good_text_is_left_as_it_is() -> None:
    rows = pa.record_batch([pa.array(["é", None]), pa.array(["a", "b"]).dictionary_encode()], names=["a", "b"])
    faults = Faults(2)
    assert without_invalid_text(rows, faults) is rows
    assert faults.passed.all()
