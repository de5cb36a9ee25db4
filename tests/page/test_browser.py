"""The page in a real browser: nothing is fetched, nothing fails, the charts are drawn and respond."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import powerplan
from powerplan.accounting import Accounting
from powerplan.answers.recommend import RecommendAnswer
from powerplan.report.parts import show_ratio
from powerplan.search import Candidate
from powerplan.webpage.page import Page

screenshot = pytest.importorskip("screenshot")
pytest.importorskip("selenium")

pytestmark = pytest.mark.skipif(screenshot.chromium() is None, reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with screenshot.browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def file(whole: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    whole.save(path)
    return path


@pytest.fixture
def shown(driver: Any, file: Path) -> Any:
    screenshot.show(driver, file, 1440)
    return driver


def requests(driver: Any) -> list[str]:
    """Return the addresses that pages have asked for since the last call.

    A browser begins with a page of its own, whose requests may be logged late: chrome:// is not ours.
    """
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [request["request"]["url"] for request in sent if not request["documentURL"].startswith("chrome://")]


def curves(driver: Any, chart: str) -> int:
    """Return how many curves a chart draws."""
    return int(driver.execute_script(f"return document.querySelectorAll('#{chart} .mark-line path').length"))


def candidates(page: Page) -> tuple[Candidate, ...]:
    answer = page.asked.recommend
    assert isinstance(answer, RecommendAnswer)
    return answer.candidates


def eventually(value: Callable[[], object], wanted: object) -> None:
    """Wait until a value is the one that is wanted: a chart is drawn a moment after it is told to."""
    for _ in range(200):
        if value() == wanted:
            return
        time.sleep(0.05)
    assert value() == wanted


def colour(driver: Any, selector: str, what: str) -> str:
    script = f"return getComputedStyle(document.querySelector(arguments[0])).{what}"
    return str(driver.execute_script(script, selector))


def test_the_page_asks_for_nothing_and_nothing_fails(driver: Any, file: Path) -> None:
    requests(driver)
    driver.get_log("browser")
    screenshot.show(driver, file, 1440)
    assert requests(driver) == [file.resolve().as_uri()]
    assert driver.get_log("browser") == []


def test_a_request_would_be_refused(shown: Any) -> None:
    """The policy of the page holds: a request that a script tries fails before it is sent."""
    requests(shown)
    script = "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('sent'), () => done('refused'))"
    assert shown.execute_async_script(script) == "refused"
    assert "http://127.0.0.1:9/" not in requests(shown)
    assert "Content Security Policy" in " ".join(entry["message"] for entry in shown.get_log("browser"))


def test_every_chart_is_drawn(shown: Any, whole: Page) -> None:
    specs = json.loads(shown.execute_script("return document.getElementById('specs').textContent"))
    assert len(specs) == 8
    for name in specs:
        box = shown.execute_script(f"return document.querySelector('#{name} svg').getBoundingClientRect().toJSON()")
        assert box["width"] > 300
        assert box["height"] > 100
        assert shown.execute_script(f"return document.querySelectorAll('#{name} svg path').length") > 3
    drawn = [place for place, candidate in enumerate(candidates(whole)) if place < 3 or candidate.plan.unchanged]
    assert curves(shown, "chart-wsfr") == len(drawn)  # The first three candidates and the model as it is.
    assert curves(shown, "chart-memory") == 2
    labels = shown.execute_script("return document.querySelector('#chart-wsfr svg').textContent")
    for words in ("1:1, as many state as weight FLOPs", "asked 128k", "asked 8k", "balanced 57,255"):
        assert words in labels
    assert "memory of 64 h100-sxm" in shown.execute_script("return document.querySelector('#chart-memory').textContent")


def test_charts_describe_themselves_to_screen_readers(shown: Any) -> None:
    role, label = shown.execute_script(
        "const svg = document.querySelector('#chart-wsfr svg'), node = svg.closest('[aria-label]') || "
        "svg.querySelector('[aria-label]'); return [svg.querySelector('[role]').getAttribute('role'), "
        "node.getAttribute('aria-label')]"
    )
    assert role.startswith("graphics-")
    assert "Weight-state FLOP ratio of llama-3-8b" in label


def test_hovering_shows_the_values(shown: Any, whole: Page) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    chart = shown.find_element("css selector", "#chart-wsfr svg")
    shown.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    ActionChains(shown).move_to_element(chart).move_by_offset(20, 10).perform()
    tip = shown.find_element("id", "vg-tooltip-element")
    words = tip.text
    assert "visible" in tip.get_attribute("class").split()
    assert "tokens" in words.splitlines()[0]
    context = int(words.split(" tokens")[0].replace(",", ""))
    for place, candidate in enumerate(candidates(whole)):
        text = f"{place + 1}. {candidate.label} {show_ratio(Accounting(candidate.spec).wsfr(context))}"
        drawn = place < 3 or candidate.plan.unchanged  # What is not drawn is not shown.
        assert (text in words) == drawn
    ActionChains(shown).move_to_element(shown.find_element("css selector", "h1")).perform()
    assert "visible" not in shown.find_element("id", "vg-tooltip-element").get_attribute("class").split()


def test_names_from_files_are_text(driver: Any, hostile_profile: Path, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    powerplan.page("gpt2-small", "4k", measured=hostile_profile).save(tmp_path / "plan.html")
    screenshot.show(driver, tmp_path / "plan.html", 1440)
    chart = driver.find_element("css selector", "#chart-measured-0 svg")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    ActionChains(driver).move_to_element(chart).perform()
    assert "<img src=x onerror=alert(1)>" in driver.find_element("id", "vg-tooltip-element").text
    assert driver.find_elements("css selector", "img") == []
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("by_key", [False, True])
def test_the_legend_draws_and_hides_candidates(shown: Any, by_key: bool) -> None:
    boxes = shown.find_elements("css selector", "input[data-curve]")
    hidden = next(box for box in boxes if not box.is_selected())
    before = curves(shown, "chart-wsfr")
    assert before == sum(box.is_selected() for box in boxes)
    for box, count in ((boxes[0], before - 1), (hidden, before), (boxes[0], before + 1)):
        if by_key:
            box.send_keys(" ")
        else:
            box.find_element("xpath", "..").click()
        eventually(lambda: [curves(shown, name) for name in ("chart-wsfr", "chart-state")], [count, count])


def test_dark_and_light(driver: Any, file: Path) -> None:
    def colours() -> tuple[str, ...]:
        line = "#chart-wsfr .mark-line path"
        return (
            colour(driver, "body", "backgroundColor"),
            colour(driver, "body", "color"),
            colour(driver, line, "stroke"),
        )

    screenshot.show(driver, file, 1440)
    light = colours()
    screenshot.show(driver, file, 1440, dark=True)
    dark = colours()
    assert not set(light) & set(dark)
    driver.find_element("id", "theme").click()
    assert colours() == light
    driver.find_element("id", "theme").click()
    assert colours() == dark


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_it_fits_phones_tablets_and_desks(driver: Any, file: Path, width: int) -> None:
    screenshot.show(driver, file, width)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    wide = driver.execute_script(
        "return [...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert wide == 0


def test_paper_has_what_is_folded(driver: Any, file: Path) -> None:
    screenshot.show(driver, file, 1440)
    count = "return document.querySelectorAll('details[open]').length"
    before = driver.execute_script(count)
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    everything = "return document.querySelectorAll('details:not(.formulas):not(.data)').length"
    assert driver.execute_script(count) == driver.execute_script(everything) > before
    driver.execute_script("dispatchEvent(new Event('afterprint'))")
    assert driver.execute_script(count) == before


def test_without_scripts_the_figures_are_there(driver: Any, file: Path) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(file.resolve().as_uri())
        text = driver.find_element("css selector", "body").text
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "1:2.29" in text
    assert "The figures of this chart are in the table below it." in text
    assert driver.find_element("id", "theme").is_displayed() is False
