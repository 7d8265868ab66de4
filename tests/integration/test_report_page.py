"""The page of a report in a real browser: what its user does, and what it must not do."""

import json
import re

import browser as chromium
import made_up
import pytest

from zi_experiments.report import command

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

HOSTILE = '<script>document.title="taken"</script><img src=x onerror=\'document.title="taken"\'> {{ 7 * 7 }} </table>'


ASKED = {
    "question": {"text": f"How fast? {HOSTILE}", "figures": ["decode_tok_per_s", "ttft_s"]},
    "published": {
        "title": HOSTILE, "machine": "a machine", "source": "https://example.org", "about": "", "figure": "decode_tok_per_s",
        "run": ["model=opt-125m", "offload=cpu", "quant=fp16"], "systems": {HOSTILE: "engine=fsdp"},
        "rows": [{"system": HOSTILE, "value": 5.5, "batch": 3, "run": ""}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of 13 runs: 3 engines, 2 offload targets and 2 batch sizes, and one that has failed, with a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    number = 0
    for engine in ("stream", "deepspeed", "fsdp"):
        for offload in ("cpu", "nvme"):
            for batch_size in (2, 8):
                number += 1
                record = made_up.record(
                    engine=engine, offload=offload, batch_size=batch_size, step_s=0.01 * number, passes=3, steps=9,
                    noise=0.1, seed=number, **(ASKED if engine == "fsdp" and offload == "cpu" else {}),
                )  # fmt: skip
                record["run"]["overrides"] = [f"workload.batch_size={batch_size}"]
                made_up.write(folder / f"{number}", record)
    failed = made_up.record(status="oom")
    failed["run"]["name"] = HOSTILE
    failed["error"] |= {"type": "<b>bold</b>", "message": HOSTILE}
    failed["environment"]["driver"] = HOSTILE
    failed["config"]["weights"]["path"] = HOSTILE
    made_up.write(folder / "0", failed)  # first in its folder
    assert command.main([str(folder), "--output", str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def started():
    browser = chromium.start()
    yield browser
    browser.quit()


@pytest.fixture
def browser(started, page):
    """The page on a desktop; after the test, that it has neither complained nor asked for anything but itself."""
    chromium.show(started, page)
    yield started
    assert started.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in started.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert "taken" not in started.title


def column(browser, name):
    """The texts of a column of the table, from the top."""
    numbers = {
        each.get_attribute("data-name"): i
        for i, each in enumerate(browser.find_elements(By.CSS_SELECTOR, "#table thead th"))
    }
    return [
        row.find_elements(By.CSS_SELECTOR, "th, td")[numbers[name]].text
        for row in browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")
    ]


def wait(browser, condition):
    return WebDriverWait(browser, 60).until(lambda _: condition())


def count(browser):
    return browser.find_element(By.ID, "count").text


def drawn(browser, chart):
    """The data of a chart, after it has been scrolled to."""
    browser.execute_script(f"document.getElementById({chart!r}).scrollIntoView()")
    script = "const figure = document.getElementById(arguments[0]);"
    script += "return figures.get(figure).isDrawn && (figure.querySelector('.plot').data ?? [])"
    return wait(browser, lambda: browser.execute_script(script, chart))


def test_sorting_has_the_largest_first_then_the_smallest_and_what_is_absent_last(browser):
    header = browser.find_element(By.CSS_SELECTOR, "th[data-name=decode_tok_per_s] button")
    header.click()
    first = column(browser, "decode_tok_per_s")
    browser.find_element(By.CSS_SELECTOR, "th[data-name=decode_tok_per_s] button").send_keys(Keys.ENTER)
    second = column(browser, "decode_tok_per_s")

    values = [float(text) for text in first[:-1]]
    assert values == sorted(values, reverse=True)
    assert second[:-1] == first[-2::-1]
    assert first[-1] == second[-1] == "–"
    sorted_by = browser.find_element(By.CSS_SELECTOR, "th[data-name=decode_tok_per_s]").get_attribute("aria-sort")
    assert sorted_by == "ascending"
    assert browser.switch_to.active_element.text.startswith("decode tok/s")  # the keyboard stays where it was


def test_filters_choose_rows_and_charts(browser):
    Select(browser.find_element(By.NAME, "engine")).select_by_visible_text("fsdp")
    wait(browser, lambda: count(browser) == "4 of 13 runs")
    assert set(column(browser, "engine")) == {"fsdp"}
    assert [trace["name"] for trace in drawn(browser, "pareto") if trace["mode"] == "markers"] == ["fsdp fp16"]
    browser.find_element(By.NAME, "text").send_keys("nvme")
    wait(browser, lambda: count(browser) == "2 of 13 runs")

    assert set(column(browser, "offload")) == {"nvme"}


def test_charts_show_the_values_of_the_runs(browser):
    shown = {
        chart: drawn(browser, chart)
        for chart in ("decode", "bound", "batch", "pareto", "steps", "memory", "load", "failures-chart")
    }

    (bars,) = shown["decode"]
    fastest = browser.execute_script(
        "return ['cpu', 'nvme'].map((place) => Math.max(...runs.filter((run) => value('engine', run) === 'deepspeed'"
        " && value('offload', run) === place).map((run) => value('decode_tok_per_s', run))))"
    )
    assert bars["x"][:2] == fastest
    assert len([trace for trace in shown["batch"] if trace["mode"] == "lines"]) == 6
    assert sum(len(trace["x"]) for trace in shown["batch"] if trace["mode"] == "markers") == 12
    assert len(shown["steps"]) == 12
    assert all(len(trace["x"]) == 9 for trace in shown["steps"])
    assert [trace["name"] for trace in shown["memory"]] == ["host peak"]  # others are zero in all runs
    assert len(shown["load"][0]["x"]) == 12
    assert shown["failures-chart"][0]["x"] == [1]
    assert all(caption.text for caption in browser.find_elements(By.CSS_SELECTOR, "figcaption"))


def test_an_answer_has_published_figures_between_those_of_its_runs(browser):
    text = browser.find_element(By.CSS_SELECTOR, "#answers table").text
    measured, published = drawn(browser, "answer-0-decode_tok_per_s")

    rates = browser.execute_script(
        "return runs.filter((run) => value('engine', run) === 'fsdp' && value('offload', run) === 'cpu')"
        ".map((run) => value('decode_tok_per_s', run))"
    )
    assert (measured["name"], measured["y"], measured["x"]) == ("measured", [0, 2], rates)
    assert (published["name"], published["y"], published["x"]) == ("published", [1], [5.5])
    assert [trace["name"] for trace in drawn(browser, "answer-0-ttft_s")] == ["measured"]
    assert re.search(rf"^2 ok {rates[0]:.2f} 1.00 .* 5.5 ", text, re.MULTILINE), text
    Select(browser.find_element(By.NAME, "offload")).select_by_visible_text("nvme")
    wait(browser, lambda: count(browser) == "6 of 13 runs")
    assert not browser.find_element(By.CSS_SELECTOR, "#answer-0-decode_tok_per_s .plot").is_displayed()


def test_two_runs_are_compared(browser):
    labels = column(browser, "label")
    for name, label in (("a", labels[1]), ("b", labels[7])):
        Select(browser.find_element(By.NAME, name)).select_by_visible_text(label)
    text = browser.find_element(By.ID, "differences").text

    decode = [float(column(browser, "decode_tok_per_s")[row]) for row in (1, 7)]
    (line,) = [
        line
        for line in text.splitlines()
        if line.startswith("decode tok/s ") and "user" not in line and "pass" not in line
    ]
    assert float(line.split()[-1]) == pytest.approx(decode[1] / decode[0], rel=1e-2)
    assert "engine stream deepspeed" in text
    assert "offload cpu nvme" in text
    assert text.endswith("Environment that differs\nnothing")


def test_a_run_opens_with_its_plan_and_its_measurement(browser):
    browser.find_elements(By.CSS_SELECTOR, "#table tbody a")[1].click()
    section = browser.find_element(By.ID, "run-1")
    wait(browser, lambda: section.get_attribute("open"))

    lines = wait(browser, lambda: "decode step" in section.text and section.text.splitlines())
    (decode,) = [line for line in lines if line.startswith("decode step ") and "ms" in line]
    assert "gemm" in decode
    assert wait(browser, lambda: section.find_elements(By.CSS_SELECTOR, ".plot .trace"))


def test_what_records_say_is_text(browser):
    assert HOSTILE in column(browser, "label")[0]
    assert browser.find_element(By.CSS_SELECTOR, "#answers h3").text == f"How fast? {HOSTILE}"
    assert HOSTILE in browser.find_element(By.ID, "failed").text
    assert HOSTILE in browser.execute_script("return document.getElementById('machines').textContent")
    assert HOSTILE in browser.find_element(By.ID, "differences").text
    browser.execute_script("runs.forEach((run) => document.getElementById(`run-${run}`).open = true)")
    assert wait(browser, lambda: HOSTILE in browser.find_element(By.ID, "run-0").text)
    drawn(browser, "failures-chart")
    label = browser.find_element(By.CSS_SELECTOR, "#failures-chart .ytick text")
    assert label.get_attribute("textContent") == "oom: <b>bold</b>"
    assert browser.execute_script("return document.querySelectorAll('main img, main script').length") == 0


def test_all_can_be_reached_with_the_keyboard_and_has_a_name(browser):
    nameless = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select, a, [tabindex]')]"
        ".filter((each) => !(each.textContent.trim() || each.labels?.length || each.ariaLabel)).map((each) => each.outerHTML)"
    )
    assert nameless == []
    unlabelled = browser.execute_script(
        "return [...document.querySelectorAll('input, select')].filter((each) => !each.labels.length).length"
    )
    assert unlabelled == 0
    reached = set()
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        reached.add(active.get_attribute("name") or active.find_element(By.XPATH, "..").get_attribute("data-name"))
    assert {"text", "engine", "offload", "decode_tok_per_s"} <= reached


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("is_dark", [False, True])
def test_nothing_is_wider_than_the_window(browser, page, width, is_dark):
    chromium.show(browser, page, width=width, is_dark=is_dark)
    for chart in ("decode", "pareto", "steps", "memory"):
        drawn(browser, chart)
    browser.execute_script(
        "document.getElementById('run-1').open = true; document.querySelector('#machines details').open = true"
    )

    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_dark_page_is_dark_and_its_charts_are_readable(browser, page):
    chromium.show(browser, page, is_dark=True)
    drawn(browser, "decode")
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    ground, ink = (
        browser.execute_script(script, *each) for each in (("body", "backgroundColor"), ("#decode .xtick text", "fill"))
    )
    assert luminance(ground) < 0.2
    assert luminance(ink) > 0.7


def luminance(color):
    """How bright a color such as rgb(1, 2, 3) is, from 0 to 1."""
    return sum(float(each) for each in color.partition("(")[2].rstrip(")").split(",")[:3]) / 765
