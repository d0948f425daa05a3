"""What a user clicks: both ways to build the demo in Dagster's UI, in a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from sf_pipelines import ShardedVectorReader
from sf_pipelines_tests.orchestration.browser import Served, browser, copy_project, serve, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

PAGES = "locations/__repository__@sf_pipelines"
ASSETS = {
    "table",
    "source_vectors",
    "training_data",
    "centroids",
    "routed_vectors",
    "shard_indexes",
    "manifest",
    "current_pointer",
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[WebDriver]:
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def served(chromium: WebDriver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    project = tmp_path_factory.mktemp("project")
    copy_project(project)
    with serve(project) as running:
        yield running


def click(driver: WebDriver, label: str) -> None:
    """Clicks the button with a label as soon as it is there and enabled."""

    def clicked() -> bool:
        for button in driver.find_elements(By.TAG_NAME, "button"):
            if button.text.strip().rstrip("…") == label and button.is_displayed() and button.is_enabled():
                button.click()
                return True
        return False

    wait_for(clicked, seconds=60, what=f"the button {label!r} on {driver.current_url}")


def show(driver: WebDriver, served: Served, page: str, *texts: str) -> None:
    """Opens a page and waits until it shows all texts; a picture of it is kept beside the project."""
    driver.get(f"{served.url}/{page}")
    try:
        wait_for(
            lambda: all(text in driver.find_element(By.TAG_NAME, "body").text for text in texts),
            seconds=60,
            what=f"{texts} on {page}; see {served.project}/*.png",
        )
    finally:
        driver.save_screenshot(str(served.project / f"{page.partition('?')[0].replace('/', '_')}.png"))


@pytest.mark.parametrize(
    ("page", "texts", "button"),
    # A job's page is narrower; it draws only the assets that fit. In the group there is one that is only observed.
    [
        ("asset-groups/digits", {*ASSETS, "published_snapshot"}, "Materialize all (8)"),
        ("jobs/build_digits", {"View 8 assets", "source_vectors"}, "Materialize all"),
    ],
)
def test_materialize_all_builds_the_snapshot_and_moves_the_pointer(
    chromium: WebDriver, served: Served, page: str, texts: set[str], button: str
) -> None:
    data: Path = served.project / "data"
    if data.exists():
        shutil.rmtree(data)
    before = len(served.runs())
    show(chromium, served, f"{PAGES}/{page}", *texts)

    click(chromium, button)
    click(chromium, "All")
    click(chromium, "Launch backfill")

    wait_for(served.published, seconds=400, what=f"the pointer; see {served.project}/server.log")
    wait_for(lambda: all(run["status"] == "SUCCESS" for run in served.runs()), seconds=60, what="all runs to end well")
    runs = served.runs()[: len(served.runs()) - before]
    if page.startswith("jobs"):
        assert [run["jobName"] for run in runs] == ["build_digits"]
    with ShardedVectorReader(str(data / "digits/snapshot")) as reader:
        assert reader.snapshot_info().run_id == served.published()


def test_one_button_builds_now_with_nothing_red(chromium: WebDriver, served: Served) -> None:
    """Jobs, the job, its Launchpad, *Launch Run*: as a person would click."""
    if served.published() is None:
        pytest.fail("nothing was built by the tests before, so there is no source")
    before = len(served.runs())
    show(chromium, served, "jobs", "build_now_digits")
    follow(chromium, "build_now_digits")
    follow(chromium, "Launchpad")
    picture = str(served.project / "launchpad.png")
    try:
        wait_for(lambda: any(map(WebElement.is_enabled, launch_buttons(chromium))), seconds=60, what=picture)
    finally:
        chromium.save_screenshot(picture)
    text = chromium.find_element(By.TAG_NAME, "body").text
    assert "artition" not in text
    assert "Are you sure" not in text
    assert "Errors Only" not in text or "No errors" in text
    launch_buttons(chromium)[0].click()
    wait_for(lambda: len(served.runs()) == before + 1, seconds=60, what="the run")
    wait_for(lambda: served.runs()[0]["status"] == "SUCCESS", seconds=200, what="the run to end well")
    assert [run["jobName"] for run in served.runs()[: len(served.runs()) - before]] == ["build_now_digits"]
    assert served.published() is not None
    show(chromium, served, "assets/digits/shard_indexes?view=partitions", "Materialized (4)")
    chromium.get(f"{served.url}/asset-groups/digits")
    show(chromium, served, f"{PAGES}/asset-groups/digits", *ASSETS)


def follow(driver: WebDriver, label: str) -> None:
    """Clicks the link with a text as soon as it is there."""

    def followed() -> bool:
        links = [link for link in driver.find_elements(By.TAG_NAME, "a") if link.text.strip() == label]
        if links:
            links[0].click()
        return bool(links)

    wait_for(followed, seconds=60, what=f"the link {label!r} on {driver.current_url}")


def launch_buttons(driver: WebDriver) -> list[WebElement]:
    return [button for button in driver.find_elements(By.TAG_NAME, "button") if button.text.lower() == "launch run"]


def test_partitions_and_checks_are_shown(chromium: WebDriver, served: Served) -> None:
    if served.published() is None:
        pytest.fail("nothing was built by the tests before")
    show(chromium, served, "assets/digits/shard_indexes?view=partitions", "00000", "00003", "Materialized (4)")
    checks = ("manifest_custom_fields", "shard_coverage", "search_round_trip", "recall", "shard_balance", "Succeeded")
    show(chromium, served, "assets/digits/manifest?view=checks", *checks, "Execute all")
    show(chromium, served, "assets/digits/manifest", "num_probes", "recall_curve", "recall_and_latency_by_probes")
    show(chromium, served, "assets/digits/routed_vectors", "shard_sizes")
    show(chromium, served, "assets/digits/centroids", "training_data_on_a_plane")
