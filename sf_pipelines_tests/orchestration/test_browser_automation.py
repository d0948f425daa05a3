"""Automation in Dagster's UI, in a real browser: switched on by hand, a new file, and a file that the gate refuses."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.remote.webdriver import WebDriver

from sf_pipelines.defs.digits_source.rows import digits_table
from sf_pipelines_tests.orchestration import deployment as live
from sf_pipelines_tests.orchestration.browser import Served, browser, serve, wait_for
from sf_pipelines_tests.orchestration.test_browser import PAGES, show

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

ROWS = 400
AUTOMATIONS = ("tiny_schedule", "tiny_source_sensor", "tiny_pointer_sensor")
_STATES = """query ($where: RepositorySelector!) {repositoryOrError(repositorySelector: $where) {... on Repository {
  schedules {name scheduleState {status}} sensors {name sensorState {status}}}}}"""
# The last control in the row that names one automation and no other; the first one selects the row.
_SWITCH = """
const [name, others] = arguments;
let row = [...document.querySelectorAll("*")].find(one => one.childElementCount === 0 && one.textContent === name);
while (row && !others.some(other => row.parentElement.textContent.includes(other))) row = row.parentElement;
const controls = row ? [...row.querySelectorAll("label, [role=switch]")] : [];
return [controls.length > 1 ? controls.at(-1) : null, row ? row.outerHTML : ""];
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[WebDriver]:
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def served(chromium: WebDriver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    project = tmp_path_factory.mktemp("automation") / "project"
    tiny = live.snapshot_attributes(
        "tiny",
        max_shard_skew=1.8,
        schedule={"cron": "0 3 * * *"},
        source_sensor={"interval_seconds": 1, "settle_seconds": 1},
        pointer_sensor={"interval_seconds": 1},
    )
    # Another kind from the same source; what goes on beside it must not touch it.
    other = live.snapshot_attributes(
        "other",
        vector_spec={"dim": 64, "vector_col": "pixels", "backend": "sqlite-vec", "sharding": {"strategy": "lsh"}},
    )
    live.make_project(project, tiny, other)
    pq.write_table(digits_table().slice(0, ROWS), project / "source/one.parquet")
    with serve(project) as running:
        yield running


def running_automations(served: Served) -> set[str]:
    found = served.query(_STATES, where=live.REPOSITORY)["repositoryOrError"]
    states = {one["name"]: one["scheduleState"]["status"] for one in found["schedules"]}
    states |= {one["name"]: one["sensorState"]["status"] for one in found["sensors"]}
    return {name for name, state in states.items() if state == "RUNNING"}


def switch(driver: WebDriver, name: str) -> None:
    """Clicks the switch of an automation in the list."""

    others = [other for other in AUTOMATIONS if other != name]
    seen = ""

    def clicked() -> bool:
        nonlocal seen
        control, seen = driver.execute_script(_SWITCH, name, others)
        try:
            if control is not None:
                control.click()
        except StaleElementReferenceException:
            # The list was drawn again in between.
            return False
        return control is not None

    try:
        wait_for(clicked, seconds=60, what=f"the switch of {name}")
    except TimeoutError as error:
        raise TimeoutError(f"{error} in {seen}") from None


def wait_for_rows(served: Served, published: live.Published, rows: int) -> None:
    wait_for(lambda: published.read()[2] == rows, seconds=300, what=f"{rows} rows; see {served.project}/server.log")


def test_switched_on_a_new_file_becomes_current_and_a_bad_one_does_not(chromium: WebDriver, served: Served) -> None:
    project = served.project
    tiny, other = (live.Published(project / "snapshots" / name) for name in ("tiny", "other"))
    beside = live.launch_job(served, "other")
    show(chromium, served, "automation", *AUTOMATIONS)
    assert running_automations(served) == set()
    for name in AUTOMATIONS:
        switch(chromium, name)
        wait_for(lambda name=name: name in running_automations(served), seconds=60, what=f"{name} to be on")
    show(chromium, served, "automation", *AUTOMATIONS)
    assert running_automations(served) == set(AUTOMATIONS)

    wait_for_rows(served, tiny, ROWS)
    pq.write_table(digits_table().slice(ROWS, 100), project / "source/two.parquet")
    wait_for_rows(served, tiny, ROWS + 100)
    show(chromium, served, "assets/tiny/published_snapshot", "Row count", f"{ROWS + 100}")
    assert live.wait_for_end(served, beside) == "SUCCESS"
    before = tiny.read()

    # A writer that repeats one row: well-formed, and all of it falls into one shard.
    one = digits_table().slice(3, 1)
    repeated = pa.concat_tables([one] * 20_000).set_column(
        one.schema.get_field_index("id"), "id", pa.array(range(100_000, 120_000), one.schema.field("id").type)
    )
    pq.write_table(repeated, project / "source/zz_bad.parquet")

    wait_for(
        lambda: any(run["status"] == "FAILURE" for run in served.runs()),
        seconds=300,
        what=f"the failed run; see {project}/server.log",
    )
    assert tiny.read() == before
    show(chromium, served, "assets/tiny/manifest?view=checks", "shard_balance", "Failed")
    show(
        chromium,
        served,
        "assets/tiny/manifest?view=checks&checkDetail=shard_balance",
        "shard_balance",
        "(limit 1.8x)",
    )
    show(chromium, served, f"{PAGES}/asset-groups/tiny", "manifest")
    assert other.read()[:2] == (1, 1)
