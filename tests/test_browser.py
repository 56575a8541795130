"""A report as a browser shows it, offline: nothing is asked for, nothing complains, every chart is drawn."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command import Command, write
from conftest import STORY, TINY
from firstwords import api, watching

pytest.importorskip("selenium", reason="NOT RUN: needs selenium, which `make browser` installs")
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="NOT RUN: needs chromium and chromedriver"),
    pytest.mark.filterwarnings("ignore"),  # selenium's own
]
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
DRAWN = """return [...document.querySelectorAll('.chart')].map(chart =>
  [...chart.querySelectorAll('.scatterlayer .js-line')].map(line => line.getTotalLength()))"""


class Browser:
    """A headless browser without a network, and what it was asked for and complained of."""

    def __init__(self, *, dark: bool = False) -> None:
        options = Options()
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400"):
            options.add_argument(argument)
        options.binary_location = str(BROWSER)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)

    def open(self, path: Path) -> None:
        self.driver.get(path.absolute().as_uri())

    def js(self, program: str) -> Any:
        return self.driver.execute_script(program)

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def figures(self) -> dict[str, float]:
        """The numbers of the chain that is shown."""
        found = self.driver.find_elements(By.CSS_SELECTOR, "#chain output")
        return {str(one.get_attribute("data-figure")): float(str(one.get_attribute("data-value"))) for one in found}


@pytest.fixture(params=["light", "dark"])
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    found = Browser(dark=request.param == "dark")
    yield found
    found.driver.quit()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(watching, "SAMPLE_TOKENS", 60)  # what is shorter has no pairs of words, whose variety is drawn
    write(tmp_path / "text.txt", STORY + HOSTILE * 9)
    api.train(tmp_path / "text.txt", out=tmp_path / "run", **{**TINY, "report": True, "steps": 6, "eval_every": 2})
    return tmp_path / "run"


def test_a_report_opens_without_a_request_or_a_complaint_and_draws_every_chart(browser: Browser, run: Path) -> None:
    browser.open(run / "report.html")
    charts = browser.js("return JSON.parse(document.getElementById('data').textContent).charts")
    for axis in ("step", "epochs", "tokens", "elapsed_s"):
        browser.driver.find_element(By.CSS_SELECTOR, f"input[value={axis}]").click()
        drawn = browser.js(DRAWN)
        assert [len(lines) for lines in drawn] == [len(chart["lines"]) for chart in charts]
        assert all(length > 0 for lines in drawn for length in lines)
    assert browser.requests() == [(run / "report.html").absolute().as_uri()]
    assert browser.complaints() == []
    assert browser.driver.title == "run · firstwords"  # the hostile text in it did nothing
    browser.js("const image = new Image(); image.src = 'http://127.0.0.1:9/'; document.body.append(image)")
    assert any("Content Security Policy" in line for line in browser.complaints())  # the negative control


def test_a_token_that_is_clicked_shows_what_explain_says_of_it(browser: Browser, run: Path, command: Command) -> None:
    browser.open(run / "report.html")
    tokens = browser.driver.find_elements(By.CSS_SELECTOR, ".token")
    data = browser.js("return JSON.parse(document.getElementById('data').textContent).explanation")
    passage = "".join(token["text"] for token in data["tokens"])
    said = command("explain", run, passage, "--json").json
    tokens[7].click()
    check(browser, said, 7)
    tokens[7].send_keys(Keys.ARROW_RIGHT)
    check(browser, said, 8)
    browser.driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    check(browser, said, 7)
    assert browser.complaints() == []


def check(browser: Browser, said: dict[str, Any], i: int) -> None:
    """The chain holds the very numbers of token `i`, each follows from the one before, and the five are the five."""
    token, shown = said["tokens"][i], browser.figures()
    for name in ("logit", "probability", "log_probability"):
        assert shown[name] == token[name]
    for name in ("nats_per_token", "perplexity", "bits_per_byte"):
        assert shown[name] == said[name]
    # float32 has seven digits; each figure is rounded once
    assert shown["probability"] == pytest.approx(math.exp(shown["logit"] - shown["log_sum_exp"]), rel=1e-5)
    assert shown["log_probability"] == pytest.approx(math.log(shown["probability"]), abs=1e-5)
    logs = [one["log_probability"] for one in said["tokens"][1:]]
    assert shown["mean"] == pytest.approx(sum(logs) / len(logs))
    assert shown["perplexity"] == pytest.approx(math.exp(-shown["mean"]))
    guesses = browser.driver.find_elements(By.CSS_SELECTOR, "#expected .guess output")
    values = [float(str(guess.get_attribute("data-value"))) for guess in guesses]
    own = [] if token["id"] in [one["id"] for one in token["top"]] else [token["probability"]]
    assert values == [one["probability"] for one in token["top"]] + own


def test_several_runs_are_drawn_on_shared_axes(browser: Browser, run: Path, command: Command) -> None:
    command("report", run, run, "--out", "both.html")
    browser.open(Path("both.html"))
    assert all(len(lines) % 2 == 0 and min(lines) > 0 for lines in browser.js(DRAWN))
    assert (len(browser.requests()), browser.complaints()) == (1, [])


def test_a_page_of_one_hostile_text_does_what_ours_does(browser: Browser, run: Path, command: Command) -> None:
    command("explain", run, HOSTILE, "--html", "text.html")
    browser.open(Path("text.html"))
    shown = browser.driver.find_element(By.CSS_SELECTOR, ".passage").text
    assert shown == HOSTILE
    assert browser.figures()["perplexity"] > 1
    assert (len(browser.requests()), browser.complaints()) == (1, [])
    assert "owned" not in browser.driver.title
