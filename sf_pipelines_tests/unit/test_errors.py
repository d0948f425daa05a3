"""Typed errors come back from other processes as what they were."""

import copy
from collections.abc import Iterator

import pytest

from sf_pipelines.snapshot.errors import (
    IntegrityError,
    SfPipelinesError,
    SourceNotFoundError,
    StoreUnavailableError,
    TasksFailedError,
    error_of_kind,
)


def every_class(root: type[SfPipelinesError] = SfPipelinesError) -> Iterator[type[SfPipelinesError]]:
    yield root
    for found in root.__subclasses__():
        yield from every_class(found)


def says_more(found: type[SfPipelinesError]) -> bool:
    """Whether it is made of more than a message."""
    try:
        found("what was wrong")
    except TypeError:
        return True
    return False


OURS = {found for found in every_class() if found.__module__ == "sf_pipelines.snapshot.errors"}
PLAIN = sorted((found for found in OURS if not says_more(found)), key=lambda found: found.__name__)


@pytest.mark.parametrize("wanted", PLAIN, ids=lambda wanted: wanted.__name__)
def test_an_error_is_found_by_its_kind(wanted: type[SfPipelinesError]) -> None:
    error = error_of_kind(wanted.kind, "what was wrong")

    assert type(error) is wanted
    assert str(error) == "what was wrong"
    assert error.retryable == wanted.retryable


def test_builtin_bases_are_kept() -> None:
    """They have initialisers of their own, which take anything."""
    assert isinstance(error_of_kind(SourceNotFoundError.kind, "no file"), FileNotFoundError)
    assert isinstance(error_of_kind(StoreUnavailableError.kind, "no answer"), OSError)
    assert error_of_kind(StoreUnavailableError.kind, "no answer").retryable
    assert not error_of_kind(IntegrityError.kind, "other bytes").retryable


def test_what_cannot_be_made_of_a_message_is_the_root() -> None:
    for kind in (TasksFailedError.kind, "from.a.newer.version"):
        error = error_of_kind(kind, "what was wrong")
        assert type(error) is SfPipelinesError
        assert str(error) == "what was wrong"


def test_kinds_are_unique() -> None:
    kinds = [found.kind for found in OURS]
    assert len(set(kinds)) == len(kinds)


def test_failed_tasks_keep_their_causes_when_copied() -> None:
    failed = TasksFailedError("1 of 3 tasks failed", {"shard 1": IntegrityError("other bytes")})
    again = copy.copy(failed)

    assert str(again) == str(failed)
    assert {label: (type(error), str(error)) for label, error in again.causes.items()} == {
        "shard 1": (IntegrityError, "other bytes")
    }
