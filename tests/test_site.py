"""The documentation site in a real browser (chromium, headless), opened as files and without a network."""

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringrl import cli
from ringrl.config import ModelConfig
from ringrl.envs import DOMAINS
from tests.report.test_browser import BROWSER, DARK, FLAGS, LIGHT

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="no mkdocs (pip install -e '.[docs]')"),
    pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="no mkdocstrings ('.[docs]')"),
]

HOME = """async () => {
  const ways = [...document.querySelectorAll('.grid.cards a')].map(link => link.getAttribute('href'));
  const widths = [...document.querySelectorAll('.md-content img')].map(image => image.naturalWidth);
  const field = document.querySelector('.md-search__input');
  field.focus();
  field.value = 'log-sum-exp';
  field.dispatchEvent(new Event('keyup', {bubbles: true}));
  let found = [];
  for (let waited = 0; waited < 200 && !found.length; waited++) {
    await new Promise(resolve => setTimeout(resolve, 50));
    found = [...document.querySelectorAll('.md-search-result__link')].map(link => link.href);
  }
  return [ways, widths, found];
}"""
COLOURS = """async () => {
  const seen = [];
  for (let click = 0; click < 4; click++) {
    seen.push([document.body.dataset.mdColorScheme, getComputedStyle(document.body).backgroundColor]);
    document.querySelector('label[for^=__palette]:not([hidden])').click();
    await new Promise(resolve => setTimeout(resolve, 50));
  }
  return seen;
}"""
CODE = """() => [...document.querySelectorAll('.md-content pre > code')].map(code => [
  code.scrollWidth - code.clientWidth, code.scrollHeight - code.clientHeight,
  code.closest('pre').parentElement.querySelectorAll('button').length,
  code.getBoundingClientRect().right <= innerWidth])"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def ask(page: Path, folder: Path, function: str, scheme: int = LIGHT) -> Any:
    """Return what a JavaScript function returns in a page. The page must print nothing and load files only."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    asked = page.with_name("asked.html")
    script = (
        f"addEventListener('load', async () => {{ const answer = await ({function})(); "
        "const loaded = performance.getEntriesByType('resource').map(one => one.name); "
        "document.body.dataset.answer = JSON.stringify([answer, loaded]); });"
    )
    asked.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    done = subprocess.run(
        [
            BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1280,1000",
            f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", asked.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    asked.unlink()
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    answer, loaded = json.loads(html.unescape(re.findall(r'data-answer="([^"]*)"', done.stdout)[0]))
    assert loaded == [], "requests over the network"  # files are not listed
    return answer


def test_the_home_page_has_a_picture_three_ways_in_and_a_search_that_works_from_files(site, tmp_path):
    ways, widths, found = ask(site / "index.html", tmp_path, HOME)
    assert ways == ["quickstart.html", "own_data.html", "own_model.html"]
    assert min(widths) > 100
    assert any("glossary.html" in link for link in found)
    for link in found:
        assert Path(re.sub(r"^file://|[?#].*", "", link)).is_file()


def test_colours_follow_the_system_until_the_button_is_clicked(site, tmp_path):
    light, dark = (ask(site / "glossary.html", tmp_path / str(scheme), COLOURS, scheme) for scheme in (LIGHT, DARK))
    assert [name for name, _ in light] == ["default", "default", "slate", "default"]
    assert [name for name, _ in dark] == ["slate", "default", "slate", "slate"]
    assert light[0] == light[1] == dark[1]
    assert dark[0][1] == light[2][1] != light[0][1]


@pytest.mark.parametrize("page", ["own_model", "tasks/walker_walk"])
def test_code_has_a_copy_button_and_is_not_cut(page, site, tmp_path):
    blocks = ask(site / f"{page}.html", tmp_path, CODE)
    assert blocks
    for wider, higher, buttons, is_inside in blocks:
        assert (wider, higher, is_inside) == (0, 0, True)
        assert buttons == 1


def words(page: Path) -> str:
    """Return the text of a page, without its menus."""
    _, _, content = page.read_text().partition("<article")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", content)).split())


def test_every_task_has_a_page(site):
    for domain in DOMAINS.values():
        for task in domain.tasks:
            page, text = site / "tasks" / f"{task}.html", words(site / "tasks" / f"{task}.html")
            assert domain.rewards[task] in text
            assert f"(score 0) {domain.random_returns[task]} " in text
            assert f"(score 100) {domain.reference_return:.0f}" in text
            assert all(quantity in text for quantity in domain.observation)
            assert f"../images/tasks/{task}.jpg" in page.read_text()
            assert (site / "images" / "tasks" / f"{task}.jpg").is_file()
            assert f'href="{task}.html"' in (site / "tasks" / "index.html").read_text()


def test_the_page_of_the_command_line_has_every_command_and_flag(site):
    page = (site / "reference" / "cli.html").read_text()
    assert "--empty-" not in page
    for name in cli.COMMANDS:
        app = cli.build_app([])
        for part in name.split():
            app = app[part]
        flags = [argument for argument in app.assemble_argument_collection() if not argument.children and argument.show]
        (section,) = re.findall(rf'<h[23] id="ringrl-{name.replace(" ", "-")}">(.*?)(?=<h[23] |$)', page, re.DOTALL)
        cells = set(re.findall(r"<td><code>(.+?)</code>", section))
        assert {argument.names[0] for argument in flags} <= cells, name


def test_settings_have_their_default_and_meaning(site):
    text = words(site / "reference" / "config.html")
    for name, field in ModelConfig.model_fields.items():
        assert f" {name} {name} : " in text
        meaning = " ".join(str(field.description).replace("`", " ").split())
        assert meaning[:30] in text
    assert f" layers : int = {ModelConfig().layers} Transformer blocks" in text
    assert "Field(" not in text


def test_the_reference_has_no_internals(site):
    for page in (site / "reference").glob("*.html"):
        assert re.findall(r'<h\d id="(ringrl[\w.]*\._\w*)"', page.read_text()) == []
