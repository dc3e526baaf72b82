"""The page in a real browser (chromium, headless), without a network.

A copy of the page is asked through a small script, which writes its answer into the document.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ringrl.evaluation.records import append_records
from ringrl.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000",
)  # fmt: skip
LIGHT, DARK = 1, 0  # as --blink-settings=preferredColorScheme counts them
LONG_NAME = "a_task_of_a_name_that_is_much_longer_than_any_phone_is_wide_so_that_it_has_to_be_broken_somewhere"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def page(make_study, make_ablation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    make_study(folder / "runs")
    append_records(folder / "runs" / "more.jsonl", make_ablation(task="walker_walk"))
    append_records(folder / "runs" / "long.jsonl", make_ablation(task=LONG_NAME))
    return write_report([folder / "runs"], folder / "report")


def ask(page: Path, folder: Path, function: str, *, width: int = 1280, scheme: int = LIGHT) -> Any:
    """What a JavaScript function of the window returns once all charts are drawn; the console must stay empty.

    The page is loaded in a frame, for a window cannot be narrower than 500 pixels.
    """
    asked = page.with_name("asked.html")
    asked.write_text(
        f'<!doctype html><body><iframe id="page" width="{width}" height="900" style="border:0" src="{page.name}">'
        "</iframe>"
        f"<script>const frame = document.getElementById('page'); const timer = setInterval(() => {{"
        f"const page = frame.contentWindow; if (!page.document.body?.dataset.drawn) return; clearInterval(timer);"
        f"Promise.resolve(({function})(page)).then((answer) => {{"
        f"document.body.dataset.answer = JSON.stringify(answer); }}); }}, 50);</script></body>"
    )
    done = subprocess.run(
        [
            str(BROWSER), *FLAGS, "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000", f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", asked.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return json.loads(html.unescape(re.findall(r'data-answer="([^"]*)"', done.stdout)[0]))


def test_every_chart_is_drawn(page, tmp_path):
    question = """w => [...w.document.querySelectorAll('section:has(.chart)')].map(s => [s.id,
        [...s.querySelectorAll('figure svg')].map(g => g.querySelectorAll('path, text').length)])"""
    charts = ask(page, tmp_path, question)
    assert [name for name, _ in charts] == [
        "return_by_context", "return_by_episode", "learning_curves"
    ]  # fmt: skip
    assert all(counts and min(counts) > 10 for _, counts in charts)


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_its_width(page, tmp_path, width):
    question = """w => [w.innerWidth, w.document.documentElement.scrollWidth,
        [...w.document.querySelectorAll('.chart svg')].map(svg => svg.getBoundingClientRect().width),
        [...w.document.querySelectorAll('.chart text')].map(t => t.getBoundingClientRect().height).filter(h => h)]"""
    inner, scroll, widths, heights = ask(page, tmp_path, question, width=width)
    assert inner == width
    assert scroll <= width
    assert all(width * 0.2 < drawn < width for drawn in widths)
    assert min(heights) > 9  # CSS pixels from ascent to descent


def test_tables_scroll_within_their_boxes_and_the_first_chart_is_as_wide_as_they_are(page, tmp_path):
    question = """w => [...w.document.querySelectorAll('#comparisons .scroll, #returns .scroll')].map(box => [
        w.getComputedStyle(box).overflowX, box.scrollWidth, box.clientWidth, box.getBoundingClientRect().right]).concat(
        [[w.document.querySelector('.chart').clientWidth]])"""
    *boxes, (chart,) = ask(page, tmp_path, question)
    assert chart == boxes[0][2]
    *phone, _ = ask(page, tmp_path, question, width=390)
    assert all(scrolls == "auto" and right <= 390 for scrolls, _, _, right in phone)
    assert all(inner > seen for _, inner, seen, _ in phone)


def test_light_and_dark(page, tmp_path):
    question = """w => ['body', 'h1', '.chart text'].map(selector => {
        const style = w.getComputedStyle(w.document.querySelector(selector));
        return [style.backgroundColor, style.color, style.fill]; })"""
    light, dark = (ask(page, tmp_path, question, scheme=scheme) for scheme in (LIGHT, DARK))
    assert (light[0][0], dark[0][0]) == ("rgb(253, 253, 252)", "rgb(20, 22, 26)")
    assert light[1][1] != dark[1][1]
    assert light[2][2] != dark[2][2], "the text of a chart"
