"""The page of a plan in a real browser: it shows its numbers, asks no network for anything, and says nothing wrong.

Without a Chromium these tests are skipped, unless NEEDS_BROWSER is set, as in CI.
"""

import os
from pathlib import Path

import pytest
from PIL import Image

from terratorch_simpler.report import report_page, save_page
from tests.browser import Chromium, find_chromium, pdf_texts
from tests.test_report import BLOCKS, HOSTILE, KINDS, PLAN, SIMILARITY, sweep_rows
from tests.test_tables import LARGE, NAMES

LIGHT, DARK = "rgb(255, 255, 255)", "rgb(18, 23, 28)"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
TIP = "document.getElementById('tip').textContent"
ORANGE = (194, 55, 31)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = find_chromium()
    if path is None:
        reason = "found no Chromium (on Debian: apt-get install chromium)"
        (pytest.fail if os.environ.get("NEEDS_BROWSER") else pytest.skip)(reason)
    chromium = Chromium(path, tmp_path_factory.mktemp("browser") / "profile")
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    files = {kind: save_page(report_page(plan), folder / f"{kind}.html") for kind, plan in KINDS.items()}
    sweep = {f"{kind}, sweep": save_page(report_page(KINDS[kind], sweep_rows(KINDS[kind])), folder / f"{kind}-sweep.html")
             for kind in ("whole", "hostile")}  # fmt: skip
    return files | sweep


@pytest.mark.parametrize("kind", [*KINDS, "whole, sweep", "hostile, sweep"])
def test_page_opens_without_a_word_and_without_a_network(browser, pages, kind):
    browser.open(pages[kind])
    assert browser.said == []
    assert browser.requested == [pages[kind].resolve().as_uri()]
    assert browser.ask("typeof window.hacked") == "undefined"
    plan = KINDS[kind.removesuffix(", sweep")]
    text = browser.ask("document.body.innerText")
    assert f"{len(plan.kept_blocks)} of {plan.full_num_blocks}" in text
    assert browser.ask("document.compatMode") == "CSS1Compat"  # no quirks: the page is HTML as it should be
    assert not browser.ask("[...document.images].length")


def test_key_numbers_are_shown(browser, pages):
    browser.open(pages["whole, sweep"])
    text = browser.ask("document.body.innerText")
    numbers = [
        "3 of 6",
        "-50.0 %",
        "-49.8 %",
        "75.0 %",
        "3.0 M (-50.0 %)",
        "388.5 M (-50.0 %)",
        "0.949",
        "0.453",
        "384",
        "6,144",
    ]
    numbers += ["2 unreadable, 14 nodata", "0.650 (0.620 to 0.690)"]
    assert [number for number in numbers if number not in text] == []
    assert browser.ask("document.querySelectorAll('svg .cell.tip').length") == BLOCKS**2
    assert browser.ask("document.title") == "prithvi_eo_v2_tiny_tl: first 3 of 6 blocks kept"


def colours(path: Path) -> dict[tuple, int]:
    with Image.open(path) as image:
        return {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}


def test_light_dark_and_print(browser, pages, tmp_path):
    found = {}
    for name, dark, kind in (("light", False, ""), ("dark", True, ""), ("print", True, "print")):
        browser.open(pages["whole, sweep"], dark=dark)
        browser.media(dark=dark, kind=kind)
        assert browser.ask(BACKGROUND) == {"light": LIGHT, "dark": DARK, "print": LIGHT}[name]
        found[name] = colours(browser.picture(tmp_path / f"{name}.png"))
        assert found[name].get((253, 231, 37), 0) > 3000  # the diagonal of the heat map
        assert browser.said == []
    assert found["light"][ORANGE] > 500
    assert found["dark"][(255, 138, 101)] > 500
    assert found["dark"].get((255, 255, 255), 0) < found["dark"][(18, 23, 28)] / 20
    pdf = browser.pdf(tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    texts = pdf_texts(pdf)
    assert 2 <= len(texts) <= 12
    assert min(texts) > 3  # no page is empty, the last one neither
    browser.call("Emulation.setDeviceMetricsOverride", width=720, height=1000, deviceScaleFactor=1, mobile=False)
    assert browser.ask("document.documentElement.scrollWidth") == 720  # paper does not scroll: no column is cut off
    assert browser.ask("getComputedStyle(document.getElementById('tip')).display") == "none"


@pytest.mark.parametrize("kind", ["whole, sweep", "inner cut", "hostile"])
def test_nothing_sticks_out_on_a_phone(browser, pages, kind):
    browser.open(pages[kind], width=360, height=740)
    assert browser.ask("document.documentElement.scrollWidth") == 360
    smallest = browser.ask(
        "Math.min(...[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 9  # pixels: small, but to be read


def test_values_are_told_when_pointed_at(browser, pages):
    browser.open(pages["whole"])
    assert browser.ask("document.querySelectorAll('svg title').length") == 0  # or the browser would show them as well
    browser.point("svg .cell.tip")
    assert browser.ask(TIP) == f"blocks 0 and 0: {SIMILARITY[0][0]:.3f}"
    browser.point("svg .votes.tip")
    assert browser.ask(TIP) == "2 blocks kept: 12.5 % of resamples"
    inside = (
        "(() => { const r = document.getElementById('tip').getBoundingClientRect(); return [r.width, r.left, r.top]; })()"
    )
    width, left, top = browser.ask(inside)
    assert width > 50
    assert left >= 0
    assert top >= 0
    browser.point("h2")
    assert browser.ask(TIP) == ""
    assert browser.said == []


def test_values_are_told_with_the_arrow_keys(browser, pages):
    browser.open(pages["whole"])
    browser.ask("document.querySelector('svg.chart').focus()")
    told = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"):
        browser.press(key)
        told.append(browser.ask(TIP))
    places = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 0)]  # at the edge it stays
    assert told == [f"blocks {i} and {j}: {SIMILARITY[i][j]:.3f}" for i, j in places]
    browser.press("Escape")
    assert browser.ask(TIP) == ""
    assert browser.ask("document.querySelectorAll('svg.chart:not([aria-label])').length") == 0


def slider(browser) -> tuple[str, dict[str, str]]:
    """Words and facts that the slider shows."""
    told = "c => c.innerText.replace('\\n', ' ')"
    facts = browser.ask(f"[...document.querySelectorAll('#depth-facts > div')].map(d => [...d.children].map({told}))")
    return browser.ask("document.getElementById('depth-words').textContent"), dict(facts)


def test_slider_tells_what_every_depth_costs_and_gives(browser, pages):
    browser.open(pages["whole, sweep"])
    words, facts = slider(browser)
    assert words == "The plan keeps this depth."
    assert (facts["parameters"], facts["votes"]) == ("3.0 M (-50.0 %)", "75.0 %")
    browser.ask("document.getElementById('depth').focus()")
    for depth in (4, 5, 6, 6):  # at the end it stays
        browser.press("ArrowRight")
        words, facts = slider(browser)
        assert browser.ask("document.getElementById('depth-shown').value") == str(depth)
        assert words == "The plan keeps another one: first 3 of 6 blocks kept."
        assert facts["parameters"].startswith(f"{depth}.0 M (")
        assert facts["CKA to the last block"] == f"{SIMILARITY[depth - 1][-1]:.3f}"
        accuracy = 0.5 + 0.05 * depth
        assert facts["linear probe"] == f"{accuracy:.3f} ({accuracy - 0.03:.3f} to {accuracy + 0.04:.3f})"
    assert browser.said == []
    assert browser.requested == [pages["whole, sweep"].resolve().as_uri()]


def test_slider_tells_which_label_sets_a_depth_is_enough_for(browser, tmp_path):
    browser.open(save_page(report_page(LARGE), tmp_path / "sets.html"))
    words, facts = slider(browser)
    assert words.startswith("The plan keeps this depth. Its verdict: weak. Deep enough for land cover (20), surface")
    assert {f"{name}: mean IoU": facts.get(f"{name}: mean IoU") for name in NAMES} == {
        f"{name}: mean IoU": "0.600 ± 0.031" for name in NAMES
    }
    browser.ask("const s = document.getElementById('depth'); s.value = 18; s.dispatchEvent(new Event('input'))")
    words, facts = slider(browser)
    assert words.endswith(
        f"Its verdict: weak. Deep enough for cloud and shadow (18). Not for land cover (20), {NAMES[1]} (19)."
    )
    assert facts["land cover: mean IoU"] == "0.580 ± 0.031"
    assert facts["MACs per tile"] == "9.3 G (-25.0 %)"


def test_without_scripts_there_is_no_slider(browser, pages):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(pages["whole"])
        assert browser.ask("getComputedStyle(document.getElementById('slider')).display") == "none"
        assert browser.ask("document.querySelectorAll('svg title').length") > 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_script_from_elsewhere_does_not_run_even_if_it_gets_in(browser, tmp_path):
    page = report_page(PLAN).replace("</main>", "<script>window.hacked = 1</script></main>")
    browser.open(save_page(page, tmp_path / "changed.html"))
    assert browser.ask("typeof window.hacked") == "undefined"
    assert "Content Security Policy" in " ".join(browser.said)


def test_hostile_text_is_shown_as_it_is(browser, pages):
    browser.open(pages["hostile, sweep"])
    assert browser.ask("document.querySelector('h1').innerText").startswith(HOSTILE[:70])
    browser.point("svg .votes.tip")
    assert browser.ask("document.querySelectorAll('script').length") == 1
