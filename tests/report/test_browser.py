"""The page in a real browser (Debian's chromium, headless); skipped where there is none.

The browser is asked through a small script beside the page, and answers in its document: no driver has to be installed.
"""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringrl.evaluation.records import append_records
from ringrl.study.report import write_report
from ringrl.study.report_compare import write_comparison

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
)  # fmt: skip
LIGHT, DARK = 1, 0  # as --blink-settings=preferredColorScheme counts them

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (apt-get install chromium)")

Ask = Callable[..., Any]


def load(page: Path, folder: Path, scheme: int = LIGHT) -> tuple[str, list[str]]:
    """The document after the page has loaded, and what it wrote to the console."""
    done = subprocess.run(
        [
            str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900",
            f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(make_ablation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    long_name = "a_task_of_a_name_that_is_much_longer_than_any_phone_is_wide_so_that_it_has_to_be_broken_somewhere"
    records = [*make_ablation(seeds=1), *make_ablation(task="walker_walk"), *make_ablation(task=long_name)]
    append_records(folder / "results.jsonl", records)
    return write_report([folder / "results.jsonl"], folder / "report")


@pytest.fixture
def ask(page, tmp_path) -> Ask:
    """Loads the page into a frame of the given width and returns what a JavaScript function of its window gives."""

    def run(function: str, width: int = 1280, scheme: int = LIGHT, page: Path = page) -> Any:
        frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page.read_text())}">'
        script = (
            f"const frame = document.querySelector('iframe'); frame.onload = () => {{"
            f"document.body.dataset.answer = JSON.stringify(({function})(frame.contentWindow)); }};"
        )
        (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}</iframe><script>{script}</script></body>")
        document, console = load(tmp_path / "frame.html", tmp_path, scheme)
        assert console == []
        return json.loads(html.unescape(re.findall(r'data-answer="([^"]*)"', document)[0]))

    return run


def test_it_loads_from_a_file_without_a_word_on_the_console(page, tmp_path):
    document, console = load(page, tmp_path)
    assert console == []
    assert "How this was measured" in document


@pytest.mark.parametrize("width", [320, 400, 768, 1280])
def test_no_sideways_scrolling_of_the_page(ask, width):
    inner, scroll, figures = ask(
        "w => [w.innerWidth, w.document.documentElement.scrollWidth,"
        "[...w.document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().width)]",
        width,
    )
    assert inner == width
    assert scroll <= width
    assert len(figures) == 9
    assert all(width * 0.2 < drawn < width for drawn in figures)


def test_text_of_figures_can_be_read_on_a_phone(ask):
    sizes = ask(
        "w => [...w.document.querySelectorAll('figure svg text')]"
        ".map(text => text.getBoundingClientRect().height).filter(height => height > 0)",
        400,
    )
    assert min(sizes) > 9  # CSS pixels from ascent to descent


def test_light_and_dark(ask):
    question = (
        "w => ['body', 'h1', '.panels text', '.panels path[style*=\"stroke: var(--series-1)\"]'].map(selector => {"
        "const style = w.getComputedStyle(w.document.querySelector(selector));"
        "return [style.backgroundColor, style.color, style.fill, style.stroke]; })"
    )
    light, dark = ask(question), ask(question, scheme=DARK)
    assert (light[0][0], dark[0][0]) == ("rgb(253, 253, 252)", "rgb(20, 22, 26)")
    assert light[1][1] != dark[1][1]  # heading
    assert light[2][2] != dark[2][2]  # text of a figure
    assert (light[3][3], dark[3][3]) == ("rgb(36, 88, 197)", "rgb(126, 168, 255)")  # the first curve


def test_a_click_sorts(ask):
    """Twice on a number, then on the interval, where some cells are absent, then on the names."""
    orders = ask(
        """w => {
          const table = w.document.querySelectorAll('table.sortable')[3];  // 5 seeds: intervals, but not for the data
          const click = (name) => {
            const heading = [...table.tHead.rows[0].cells].find(cell => cell.textContent === name);
            heading.querySelector('button').click();
            const cells = [...table.tBodies[0].rows].map(row => row.cells[heading.cellIndex]);
            return [heading.ariaSort, cells.map(cell => cell.textContent.trim())];
          };
          return [click('IQM'), click('IQM'), click('95 % interval'), click('Method')];
        }"""
    )
    (down, falling), (up, rising), (_, intervals), (_, names) = orders
    assert (down, up) == ("descending", "ascending")
    assert [float(value) for value in falling] == sorted((float(value) for value in falling), reverse=True)
    assert rising == falling[::-1]
    absent = [value == "\N{EN DASH}" for value in intervals]
    assert absent == sorted(absent)
    assert absent.count(True) == 2
    assert names == sorted(names)


def answer(page: Path, folder: Path, function: str) -> Any:
    """What a function of the document gives once everything has loaded: asked of a copy beside the page."""
    asked = page.with_name("asked.html")
    script = f"onload = () => {{ document.body.dataset.answer = JSON.stringify(({function})(document)); }};"
    asked.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    document, console = load(asked, folder)
    assert console == []
    return json.loads(html.unescape(re.findall(r'data-answer="([^"]*)"', document)[0]))


def test_videos_load_from_files(make_study, film, tmp_path):
    page = write_report([make_study(tmp_path / "runs", video=film)], tmp_path / "report")
    question = "d => [...d.querySelectorAll('video')].map(v => [v.readyState, v.duration, v.videoWidth, v.error])"
    states = answer(page, tmp_path, question)
    assert len(states) == 6
    for ready, duration, width, error in states:
        assert ready >= 1, "its metadata are there"
        assert (duration, width, error) == (1, 64, None)


def test_every_chart_is_drawn(make_study, tmp_path):
    page = write_report([make_study(tmp_path / "runs")], tmp_path / "report")
    charts = answer(
        page,
        tmp_path,
        "d => [...d.querySelectorAll('section')].filter(s => s.querySelector('figure')).map(s => [s.id,"
        "[...s.querySelectorAll('figure svg')].map(g => [...g.querySelectorAll('path, use, text')].filter("
        "p => { const b = p.getBoundingClientRect(); return b.width + b.height > 0; }).length)])",
    )
    assert [name for name, _ in charts] == [
        "return_by_context", "return_by_tokens", "return_by_flops", "return_by_seconds", "return_within_context",
        "performance_profiles", "probability_of_improvement", "learning_curves", "throughput",
    ]  # fmt: skip
    assert all(count > 10 for _, counts in charts for count in counts)


def test_headings_are_reached_and_pressed_by_keyboard(ask):
    """They are buttons: the browser itself makes a click of Enter and of the space bar."""
    reached = ask(
        """w => [...w.document.querySelectorAll('table.sortable thead th')].map(heading => {
          const button = heading.querySelector('button');
          button.focus();
          return [w.document.activeElement === button, button.type, button.tabIndex, button.disabled];
        })"""
    )
    assert len(reached) > 20
    assert all(state == [True, "button", 0, False] for state in reached)


def test_a_comparison_in_the_browser(make_study, ask, tmp_path):
    a, b = make_study(tmp_path / "a"), make_study(tmp_path / "b", level=450.0, layers=2)
    page, _ = write_comparison([a], [b], tmp_path / "report")
    question = (
        "d => { const table = d.querySelector('table.sortable'); const row = () => table.tBodies[0].rows[0].cells;"
        "const before = row()[1].textContent; table.tHead.querySelectorAll('button')[2].click();"
        "return [before, row()[1].textContent, d.querySelectorAll('figure svg').length]; }"
    )
    before, after, charts = answer(page, tmp_path, question)
    assert before == "Agentic Transformer (1 trajectory)"
    assert after == "Agentic Transformer (2 trajectories)"
    assert charts == 1
    assert ask("w => w.document.documentElement.scrollWidth", 400, page=page) <= 400


def test_it_prints(page, tmp_path):
    target = tmp_path / "report.pdf"
    subprocess.run(
        [
            str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={target}",
            "--no-pdf-header-footer", page.as_uri(),
        ],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert target.read_bytes().startswith(b"%PDF")
