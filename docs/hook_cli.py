"""mkdocs hook: write the page of the command line from the parser."""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ringrl.cli import build_app

_FLAG = re.compile(
    r"\* `(?P<names>[^`]+)`:? ?(?P<meaning>.*?)(?: \*\[choices: (?P<choices>.*?)\]\*)?"
    r"(?: \*\[default: (?P<default>.*?)\]\*)?(?P<required> ?\*\*\[required\]\*\*)?"
)
_HEADER = "\n| Name | Value | Default | Meaning |\n|---|---|---|---|"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add reference/cli.md."""
    text = build_app(["ringrl"]).generate_docs()
    text = re.sub(r"## Table of Contents.*?(?=\*\*Commands\*\*)", "", text, flags=re.DOTALL)
    text = re.sub(r"(?<=\S)\n {4,}(?=\S)", " ", text)  # one line per flag
    lines: list[str] = ["# Command line", *text.splitlines()[1:]]
    rows = [_row(line) for line in lines]
    for number, row in enumerate(rows):
        if row:
            lines[number] = row if number and rows[number - 1] else f"{_HEADER}\n{row}"
    files.append(File.generated(config, "reference/cli.md", content="\n".join(lines)))


def _row(line: str) -> str | None:
    """Return the row of a table for a flag of a list; None for other lines."""
    flag = _FLAG.fullmatch(line)
    if flag is None:
        return None
    *names, last = [name for name in flag["names"].split(", ") if "--empty-" not in name and ".empty-" not in name]
    last, _, kind = last.partition(" ")
    value = (flag["choices"] or kind).replace(", ", " · ").replace("CHOICE", "").lower()
    default = "required" if flag["required"] else flag["default"] or ""
    default = "" if default in ("()", "none") else default
    cells = (" ".join(f"`{name}`" for name in (*names, last)), value, default, flag["meaning"].replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"
