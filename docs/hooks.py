"""mkdocs hooks: copy the repository files that pages link to, and the report of the demo's results, into the site.

Links to folders and to pages outside docs/ become plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?<!!)\[([^]]+)\]\(([^)#:]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add every file outside docs/ that a page links to, under its path in the repository."""
    root = Path(config.config_file_path).parent
    for page in files.documentation_pages():
        for _, link in _LINK.findall(page.content_string):
            path = _outside(page, link)
            if path and _is_carried(root / path) and path not in files.src_uris:
                files.append(File.generated(config, path, abs_src_path=str(root / path)))


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point these links into the site."""
    root = Path(config.config_file_path).parent

    def inside(link: re.Match[str]) -> str:
        path = _outside(page.file, link[2])
        if path is None:
            return link[0]
        if not _is_carried(root / path) and (root / path).exists():
            return link[1]
        return f"[{link[1]}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')})"

    return _LINK.sub(inside, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Write the report of the demo's results into the site, as example/index.html."""
    from ringrl.report import write_report

    results = Path(config.docs_dir) / "results" / "demo.jsonl.gz"
    write_report(results, Path(config.site_dir) / "example")


def _is_carried(path: Path) -> bool:
    return path.is_file() and path.suffix != ".md"


def _outside(page: File, link: str) -> str | None:
    """Return the repository path that a page links to; None for a path inside docs/."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page.src_uri), link))
    return path.removeprefix("../") if path.startswith("../") else None
