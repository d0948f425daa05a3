"""What a run's log says of long stages."""

import logging

import pytest

from sf_pipelines.orchestration import resources
from sf_pipelines.orchestration.resources import log_progress


def test_few_lines_with_share_and_rate(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    monkeypatch.setattr(resources.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    progress = log_progress(logging.getLogger("run"))
    # Eight batches a second for 25 seconds, after 40,000 rows that an earlier try had routed.
    for batch in range(201):
        progress("route", 40_000 + 1_000 * batch, 240_000, "rows")
        now += 0.125
    progress("gate", 7, 7, "checks")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "route: 80,000 of 240,000 rows (33 %), 8,000 rows/s",
        "route: 120,000 of 240,000 rows (50 %), 8,000 rows/s",
        "route: 160,000 of 240,000 rows (66 %), 8,000 rows/s",
        "route: 200,000 of 240,000 rows (83 %), 8,000 rows/s",
        "route: 240,000 of 240,000 rows (100 %), 8,000 rows/s",
        "gate: 7 of 7 checks (100 %)",
    ]


def test_a_whole_of_unknown_size(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(resources, "_LOG_EVERY", 0.0)
    caplog.set_level(logging.INFO)
    log_progress(logging.getLogger("run"))("copy", 3, None, "objects")
    assert [record.getMessage() for record in caplog.records] == ["copy: 3 objects"]
