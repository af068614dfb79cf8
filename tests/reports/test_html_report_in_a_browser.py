"""The report in a real browser, without a window: Chromium, driven by selenium. Skipped where they are missing."""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffusers_mixgrpo.reports.html_report import write_report


webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402


PROMPT = "</script><script>console.error('run')</script> " + "averylongword" * 20


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(first_run, tmp_path_factory) -> Path:
    """The report of a run, one of whose prompts is hostile and long."""
    folder = shutil.copytree(first_run, tmp_path_factory.mktemp("browser") / "run")
    for path in (folder / "images").glob("*.json"):
        record = json.loads(path.read_text())
        record["samples"][0]["prompt"] = PROMPT
        for sample in record["samples"]:
            sample["reward"] = 1
        path.write_text(json.dumps(record))
    # The miniature pipeline hardly changes in a few steps: here is a "before" that is seen to differ.
    before = folder / "images" / "step_000000" / "sample_01.webp"
    ImageOps.invert(Image.open(before).convert("RGB")).save(before, lossless=True)
    return write_report(folder)


@pytest.fixture(scope="module")
def comparison(first_run, second_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    return write_report(shutil.copytree(first_run, folder / "a"), shutil.copytree(second_run, folder / "b"))


def show(browser, page: Path, width: int = 1280, scheme: str = "light", media: str = "screen") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # those of an earlier page
    browser.get(page.as_uri())


def pixels(element) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"), dtype=int)


def test_no_errors_and_no_requests(browser, report, comparison):
    for page in (report, comparison):
        show(browser, page)
        assert [entry["message"] for entry in browser.get_log("browser")] == []
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert page.as_uri() in requests  # so requests are seen
        assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_its_width(browser, report, comparison, width):
    for page in (report, comparison):
        show(browser, page, width)
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        outside = """
            const inScroller = e => e.closest('.scroll, .strip, .hidden, .skip');
            const isOutside = e => !inScroller(e) && e.getBoundingClientRect().right > innerWidth + 1;
            const all = [...document.querySelectorAll('main *, header *, footer *')];
            return all.filter(isOutside).map(e => e.outerHTML.slice(0, 99));
        """
        assert browser.execute_script(outside) == []


def test_dark_mode(browser, report):
    lightness = {}
    for scheme in ("light", "dark"):
        show(browser, report, scheme=scheme)
        image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L")
        lightness[scheme] = np.asarray(image).mean()
    assert lightness["light"] > 200 and lightness["dark"] < 70


CONTRAST = """
    const luminance = text => {
        const parts = text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255);
        const [r, g, b] = parts.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = element => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (!color.startsWith('rgba(0, 0, 0')) return color;
        }
    };
    const found = [];
    for (const element of document.querySelectorAll('body *')) {
        const hasText = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!hasText || element.closest('.slider, script, style, .hidden') || !element.offsetParent) continue;
        const values = [luminance(getComputedStyle(element).color), luminance(background(element))];
        const ratio = (Math.max(...values) + 0.05) / (Math.min(...values) + 0.05);
        found.push([ratio, element.outerHTML.slice(0, 120)]);
    }
    return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_contrast_of_texts(browser, report, comparison, scheme):
    """At least 4.5, as level AA of the Web Content Accessibility Guidelines demands."""
    for page in (report, comparison):
        show(browser, page, scheme=scheme)
        found = browser.execute_script(CONTRAST)
        assert len(found) > 100
        assert [(ratio, text) for ratio, text in found if ratio < 4.5] == []


def test_headings_and_names(browser, report):
    show(browser, report)
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    unnamed = """
        return [...document.querySelectorAll('input, [role=group], [role=img]')].filter(
            e => !e.ariaLabel && !(e.labels && e.labels.length)).map(e => e.outerHTML.slice(0, 99))
    """
    assert browser.execute_script(unnamed) == []
    anchors = browser.execute_script("return [...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert all(browser.find_elements(By.CSS_SELECTOR, anchor) for anchor in anchors)


def test_the_slider_by_keyboard(browser, report):
    show(browser, report)
    slider = browser.find_elements(By.CSS_SELECTOR, ".slider")[1]
    handle = slider.find_element(By.TAG_NAME, "input")
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'}); arguments[0].focus()", handle
    )
    shown = {}
    for key in (Keys.HOME, Keys.END):
        handle.send_keys(key)
        shown[key] = pixels(slider)
    assert handle.get_attribute("value") == "100"
    handle.send_keys(Keys.ARROW_LEFT * 3)
    assert handle.get_attribute("value") == "97"
    assert browser.execute_script("return arguments[0].style.getPropertyValue('--position')", slider) == "97%"
    # At one end the image of after training is seen, at the other that of before.
    sources = [image.get_attribute("src") for image in slider.find_elements(By.TAG_NAME, "img")]
    right, left = (_decoded(source) for source in sources)
    height, width = shown[Keys.HOME].shape[:2]
    size = len(left)
    for row, column in ((10, 4), (20, 7), (25, 12)):  # the middles of squares that show one pixel of the image each
        y, x = int((row + 0.5) * height / size), int((column + 0.5) * width / size)
        np.testing.assert_allclose(shown[Keys.HOME][y, x], right[row, column], atol=2)
        np.testing.assert_allclose(shown[Keys.END][y, x], left[row, column], atol=2)
    assert np.abs(right - left).max() > 100


def _decoded(source: str) -> np.ndarray:
    data = base64.b64decode(source.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)


def test_the_slider_by_pointer(browser, report):
    show(browser, report, 360)
    slider = browser.find_elements(By.CSS_SELECTOR, ".slider")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", slider)
    width = slider.size["width"]
    actions = ActionChains(browser).move_to_element(slider).click_and_hold()
    actions.move_by_offset(int(0.3 * width), 0).release().perform()
    value = int(slider.find_element(By.TAG_NAME, "input").get_attribute("value"))
    assert 77 <= value <= 83
    handle = slider.find_element(By.CSS_SELECTOR, ".handle").rect
    assert abs(handle["x"] + handle["width"] / 2 - slider.rect["x"] - value / 100 * width) < 2


def test_the_values_of_a_chart(browser, report):
    show(browser, report)
    chart = browser.find_element(By.CSS_SELECTOR, "#rewards .chart")
    area = chart.find_element(By.CSS_SELECTOR, ".area")
    tooltip = chart.find_element(By.CSS_SELECTOR, ".tooltip")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", area)
    rows = [row.text for row in _rows(browser, chart)]
    assert not tooltip.is_displayed()
    ActionChains(browser).move_to_element_with_offset(area, area.size["width"] // 2 - 2, 0).perform()
    assert tooltip.is_displayed() and tooltip.text.startswith("optimizer step 8")
    assert tooltip.text.splitlines()[-1].split(": ")[1] in rows[-1]
    box, frame = tooltip.rect, area.rect
    assert box["x"] >= frame["x"] - 1 and box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
    area.send_keys(Keys.HOME)
    assert tooltip.text.startswith("optimizer step 0")
    area.send_keys(Keys.ARROW_RIGHT)
    assert tooltip.text.startswith("optimizer step 1")
    area.send_keys(Keys.ESCAPE)
    assert not tooltip.is_displayed()


def _rows(browser, chart):
    browser.execute_script("arguments[0].querySelector('details').open = true", chart)
    return chart.find_elements(By.CSS_SELECTOR, "tbody tr")


def test_the_search_in_the_settings(browser, report):
    show(browser, report)
    search = browser.find_element(By.ID, "search")
    search.send_keys("window_in")
    visible = [row.text.split()[0] for row in browser.find_elements(By.CSS_SELECTOR, ".settings tbody tr") if row.text]
    assert visible == ["window_interval"]
    search.clear()
    search.send_keys("eta")
    assert "eta" in [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".settings tbody code")]
    search.send_keys(Keys.BACKSPACE * 3)
    open_groups = [group.get_attribute("open") for group in browser.find_elements(By.CSS_SELECTOR, ".settings")]
    assert open_groups == ["true", None]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_printing(browser, report, scheme):
    show(browser, report, media="print", scheme=scheme)
    color, paper = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    assert (color, paper) == ("rgb(26, 31, 41)", "rgb(255, 255, 255)")
    first = browser.find_element(By.CSS_SELECTOR, ".slider")
    left, right = sorted((image.rect for image in first.find_elements(By.TAG_NAME, "img")), key=lambda r: r["x"])
    assert left["width"] > 20 and left["x"] + left["width"] <= right["x"] + 1  # side by side
    assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()
    assert len(browser.print_page()) > 10_000
