"""What the source sensor decides, without Dagster."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sf_pipelines.orchestration.source_sensor import Decision, SourceCursor, decide, fingerprint
from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.store import ObjectInfo

FILES = [ObjectInfo("a.parquet", 10, "e1"), ObjectInfo("b.parquet", 20, "e2")]


def look(
    cursor: SourceCursor,
    found: str,
    now: float = 0.0,
    settle_seconds: float = 0.0,
    built: str | None = None,
    *,
    busy: bool = False,
) -> Decision:
    return decide(cursor, found, now=now, settle_seconds=settle_seconds, built=built, busy=busy)


def test_files_that_come_back_are_built_again() -> None:
    cursor, keys = SourceCursor(), []
    for found in "ABA":
        decision = look(cursor, found)
        assert decision.action == "build"
        cursor = decision.cursor
        keys.append((cursor.generation, cursor.handled))
        assert look(cursor, found).action == "unchanged"
    assert keys == [(1, "A"), (2, "B"), (3, "A")]


def test_what_the_current_snapshot_was_built_from_is_adopted() -> None:
    decision = look(SourceCursor(), "A", built="A", settle_seconds=60)
    assert (decision.action, decision.cursor.generation) == ("adopt", 0)
    assert look(decision.cursor, "A").action == "unchanged"
    assert look(decision.cursor, "B").action == "build"


def test_only_the_first_looks_ask_what_was_built() -> None:
    # B was asked for and is not published yet; A came back.
    waiting = look(look(SourceCursor(), "A").cursor, "B").cursor
    assert look(waiting, "A", built="A").action == "build"


def test_a_change_waits_until_it_has_settled() -> None:
    cursor = look(SourceCursor(), "A").cursor
    first = look(cursor, "B", now=100, settle_seconds=60)
    assert (first.action, first.wait) == ("settle", 60)
    second = look(first.cursor, "C", now=150, settle_seconds=60)
    assert (second.action, second.wait) == ("settle", 60)
    third = look(second.cursor, "C", now=209, settle_seconds=60)
    assert (third.action, third.wait) == ("settle", 1)
    assert look(third.cursor, "C", now=210, settle_seconds=60).action == "build"


def test_a_change_that_is_taken_back_builds_nothing() -> None:
    cursor = look(SourceCursor(), "A").cursor
    pending = look(cursor, "B", now=100, settle_seconds=60).cursor
    back = look(pending, "A", now=110, settle_seconds=60)
    assert back.action == "unchanged"
    assert look(back.cursor, "B", now=170, settle_seconds=60).action == "settle"


def test_a_clock_that_was_set_back_delays_by_no_more_than_the_settle_time() -> None:
    pending = look(SourceCursor(), "A", now=10_000, settle_seconds=60).cursor
    assert look(pending, "A", now=5_000, settle_seconds=60).wait == 60


def test_a_build_that_goes_on_is_waited_for() -> None:
    cursor = look(SourceCursor(), "A").cursor
    waiting = look(cursor, "B", busy=True)
    assert (waiting.action, waiting.cursor.handled) == ("busy", "A")
    assert look(waiting.cursor, "B").action == "build"


def test_the_fingerprint_sees_every_kind_of_change() -> None:
    base = fingerprint("s", FILES)
    assert fingerprint("s", FILES[::-1]) == base
    others = [
        FILES[:1],
        [*FILES, ObjectInfo("c.parquet", 1, "e3")],
        [FILES[0], ObjectInfo("b.parquet", 20, "e9")],
        [FILES[0], ObjectInfo("b.parquet", 21, "e2")],
        [FILES[0], ObjectInfo("c.parquet", 20, "e2")],
    ]
    found = {fingerprint("s", files) for files in others} | {fingerprint("elsewhere", FILES)}
    assert len(found) == 6
    assert base not in found


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"version": 2}', '{"handled": "x", "extra": 1}'])
def test_a_cursor_of_somebody_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="clear it"):
        SourceCursor.read(text)


@given(st.lists(st.tuples(st.sampled_from("ABC"), st.booleans()), max_size=30))
def test_the_last_state_is_always_built_and_nothing_twice_in_a_row(looks: list[tuple[str, bool]]) -> None:
    cursor, built = SourceCursor(), []
    for found, busy in [*looks, ("A", False)]:
        decision = look(SourceCursor.read(cursor.model_dump_json()), found, busy=busy)
        cursor = decision.cursor
        if decision.action == "build":
            built.append((cursor.generation, cursor.handled))
    assert built[-1][1] == "A"
    assert [generation for generation, _ in built] == list(range(1, len(built) + 1))
    assert all(one[1] != other[1] for one, other in pairwise(built))
