"""Commands and code of README and docs/ work.

Python and diffs run. The real command line parses every command, with its presets, tasks and machines.
The pages of EXECUTED run as a whole on small data, those of SLOW among the slow tests. PARSED gives the reason why the
other pages do not.
"""

import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ringrl import cli
from ringrl.collect import collect
from ringrl.data.exorl.download import ALGORITHMS
from ringrl.envs import domain_named, domain_of
from ringrl.errors import UserError
from ringrl.methods import check_method
from ringrl.planning.machines import find_machine
from ringrl.planning.workload import find_model, read_tokens
from ringrl.study.plan import AblationPlan, read_plan

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
    if not path.name.startswith(".")
)
SOURCES = ("ringrl", "envs", "data", "configs", "benchmarks")  # folders that commands need

# Pages that run from beginning to end, each in its own clone.
EXECUTED = (
    "README.md",
    "docs/adding_a_task.md",
    "docs/attention.md",
    "docs/exorl.md",
    "docs/own_data.md",
    "docs/own_model.md",
    "docs/quickstart.md",
)
SLOW = ("docs/adding_a_task.md", "docs/exorl.md", "docs/own_data.md", "docs/own_model.md", "docs/quickstart.md")
# Pages that change the code, the number of devices or the datasets' folder run in processes of their own.
ALONE = ("docs/adding_a_task.md", "docs/own_data.md", "docs/own_model.md")
# Pages whose Python runs as one program, in this order.
REFERENCE = tuple(f"docs/reference/{name}.md" for name in ("attention", "envs", "data", "training", "evaluation"))
TABLES = "docs/results_tables.md"  # its Python: tests/report/test_published.py
# Flags of commands, so that they take seconds.
SMALLER = {
    "data collect": ["--episodes", "8", "--workers", "1"],
    "ablate": ["--workers", "1"],
    "train": ["--optimiser.steps", "2", "--optimiser.batch-size", "1"],
    "evaluate": ["--environments", "1", "--episodes", "1"],
    "random_returns.py": ["--episodes", "1", "--seeds", "2"],
}
TINY_TRANSFORMER = [
    "--context.trajectories=2", "--model.token-set=fused1", "--model.layers=1", "--model.width=16",
    "--model.heads=1", "--model.kv-heads=1",
]  # fmt: skip
TINY_METHOD = ["--model.layers=1", "--model.width=16"]
SMALL = {
    "context": {"trajectories": 2}, "optimiser": {"steps": 2, "batch_size": 1},
    "model": {"layers": 1, "width": 16, "heads": 1, "kv_heads": 1, "token_set": "fused1"},
}  # fmt: skip
SHORTER = {
    "README.md": {
        "import ringrl\n": f"import ringrl\nSMALL = {SMALL}\n",
        "ringrl.train(config)": "ringrl.train(ringrl.config.TrainConfig.model_validate(config.model_dump() | SMALL))",
        "Protocol()": "Protocol(environments=1)",
        "4096": "256",
    },
    "docs/reference/training.md": {'"steps": 20': '"steps": 2'},
    "docs/own_data.md": {
        "range(200)": "range(8)",
        "steps: 2000": "steps: 2",
        "[0, 1, 2, 3, 4]": "[0]",
        "[1, 4]": "[2]",
        "[bc, bc-10%, td3+bc]": "[]",
        "settings: {": "episodes: 2\nsettings: {model: {layers: 1, width: 16}, ",
    },
    "docs/quickstart.md": {
        '"demo/runs"': repr(str(ROOT / "docs/results/demo.jsonl.gz")),
        "range(3)": "range(1)",
    },
    "docs/own_model.md": {"STEPS = 100": "STEPS = 2", "= 2048, 64, 4, 2": "= 256, 64, 4, 1"},
}
# Commands that do not run.
NOT_RUN = {
    "data download": "gigabytes from a public server; the test starts from a small archive",
    "pytest": "the other tests",
    "make": "installs everything",
    "git": "clones this repository",
}
# Pages whose commands are parsed only, and why.
PARSED = {
    "CHANGELOG.md": "names commands only",
    "CONTRIBUTING.md": "installs everything anew, and runs all tests",
    "docs/collect.md": "ten million transitions; small collections: tests/collect/test_collection.py",
    "docs/data.md": "archives of gigabytes; small ones: tests/data, and docs/exorl.md",
    "docs/evaluation.md": "needs what an hour of training makes; a tiny run: tests/test_cli.py",
    "docs/faults.md": "an hour",
    "docs/plan.md": "minutes of compilation, for TPUs: tests/planning",
    "docs/results_tables.md": "hours",
    "docs/scaling.md": "several devices, hosts and clusters: tests/training",
    "docs/study.md": "hours; a tiny study: tests/study/test_ablate.py",
    "docs/training.md": "no command but benchmarks of minutes",
    "docs/adding_a_domain.md": "names files only",
    "docs/adding_a_kernel.md": "GPUs and TPUs: tests/attention",
    "docs/adding_a_method.md": "names files only",
}
# Files and names that only the reader has, and replacements for them.
YOURS = {
    "runs/run/config.yaml": "run.yaml",
    "runs/walk/config.yaml": "run.yaml",
    "runs/reach/config.yaml": "run.yaml",
    "/shared/walk.yaml": "run.yaml",
    "plan.yaml": "configs/results.yaml",
    "cheetah_trot": "cheetah_run",  # which docs/adding_a_task.md adds
}
ANY_RUN = ["--data", "walker.h5", "--task", "walker_walk", "--run", "runs/walk"]  # for "..." after `ringrl train`


class Block(NamedTuple):
    """A fenced block of a page, with its first line."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page by CommonMark's rule for fences at the margin."""
    found, text = [], (ROOT / page).read_text()
    for match in re.finditer(r"^(`{3,})([^\n`]*)\n(.*?)^\1$\n?", text, re.MULTILINE | re.DOTALL):
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[2].strip(), match[3]))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block, without comments and environment variables.

    Commands in `for NAME in VALUES; do ... done` are yielded once per value.
    """
    if block.language not in ("", "sh", "bash") or block.text.startswith("#!"):  # a script, not commands to type
        return
    variable, values = "", [""]
    for line in block.text.replace("\\\n", " ").splitlines():
        if loop := re.fullmatch(r"for (\w+) in (.+); do", line):
            variable, values = f"${loop[1]}", loop[2].split()
            continue
        if line == "done":
            variable, values = "", [""]
            continue
        for value in values:
            words = shlex.split(line.replace(variable, value), comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield [Path(words[0]).name, *words[1:]]


def without(words: list[str], flags: list[str]) -> list[str]:
    """Return the words of a command without the flags, of one value each, that others will set."""
    kept, names = list[str](), {flag.partition("=")[0] for flag in flags if flag.startswith("--")}
    for before, word in zip(["", *words], words, strict=False):
        if before not in names and word.partition("=")[0] not in names:
            kept.append(word)
    return kept


def spans(page: str) -> list[str]:
    """Return the text between backticks outside of blocks."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


NAMED = re.compile(r"# (\w+\.yaml)\n")  # the first line of a block that is a file
BLOCKS = [block for page in PAGES for block in blocks(page)]
# A command in the text is complete if it has no words in capitals, no choices and no ellipsis.
INLINE = [
    (page, shlex.split(span))
    for page in PAGES
    for span in spans(page)
    if re.match(r"(ringrl|python|make|pip|pytest) \S", span) and not re.search(r"\b[A-Z]{4,}\b|\||\.\.\.|…", span)
]
INLINE = [(page, words) for page, words in INLINE if " ".join(words[1:]) not in cli.COMMANDS]  # their names alone
COMMANDS = [(block.page, words) for block in BLOCKS for words in commands(block)] + INLINE


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], dict[str, Any]]:
    """Return a function that parses a command of `ringrl` without running it, and returns the values of its flags."""
    for name in SOURCES:
        (tmp_path / name).symlink_to(ROOT / name)
    for block in BLOCKS:
        if named := NAMED.match(block.text):
            (tmp_path / named[1]).write_text(block.text)
    (tmp_path / "run.yaml").write_text("data: walker.h5\ntask: walker_walk\nrun: runs/walk\n")
    (tmp_path / "runs/at").mkdir(parents=True)  # to resume
    (tmp_path / "runs/at/config.yaml").write_text("data: walker.h5\ntask: walker_walk\nrun: runs/at\n")
    (tmp_path / "runs/at/metrics.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> dict[str, Any]:
        full = [
            part for word in words for part in (without(ANY_RUN, words) if word == "..." else [YOURS.get(word, word)])
        ]
        return dict(cli.parse(full)[1].arguments)

    return run


def check_ringrl(words: list[str], parse: Callable[[list[str]], dict[str, Any]]) -> None:
    """Check that the flags parse, and that tasks, domains, models and machines exist."""
    name = next((name for name in cli.COMMANDS if words[: len(name.split())] == name.split()), "")
    given = parse(words)
    if "--help" in words:
        return
    if name == "train":
        domain_of(given["settings"].task)
        if given.get("method"):
            check_method(given["settings"], given["method"])
    elif name == "evaluate":
        for task in set(given.get("tasks", ())) - {"all-of-domain"}:
            domain_of(task)
    elif name == "plan":
        if not given["model"].startswith("runs/"):
            find_model(given["model"])
        if not given["machine"].endswith(".yaml"):
            find_machine(given["machine"])
        read_tokens(given.get("tokens") or "8M")
    elif name == "ablate":
        read_plan(given["plan"])
    elif name == "data download":
        domain_named(given["domain"])
        assert given["algorithm"] in ALGORITHMS
    elif given.get("domain"):
        domain_named(given["domain"])
    elif given.get("task"):
        domain_of(given["task"])


def check_script(words: list[str]) -> None:
    """Check that the script exists and has the flags."""
    if words[0] in ("-c", "-m"):
        return
    text = (ROOT / words[0]).read_text()
    for flag in (word.split("=")[0] for word in words[1:] if word.startswith("--")):
        assert re.search(rf"{flag}(?![\w-])", text), f"{words[0]} has no {flag}"


def check_pip(words: list[str]) -> None:
    """Check that the named extras of RingRL exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for named in re.findall(r"^(?:ringrl|\.)\[(.+)\]$", word):
            assert set(named.split(",")) <= set(extras), word


def check(words: list[str], parse: Callable[[list[str]], dict[str, Any]]) -> None:
    program, *rest = words
    if program == "ringrl":
        check_ringrl(rest, parse)
    elif program.startswith("python"):
        check_script(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "pip":
        check_pip(rest)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests"))
    elif program == "gcloud":  # whose own flags are not ours
        check(shlex.split(rest[rest.index("--command") + 1]), parse)
    else:
        assert program in ("cd", "git", "apt-get"), f"{program}: an unknown program"


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str, parse: Callable[[list[str]], dict[str, Any]]) -> None:
    for of, words in COMMANDS:
        if of == page:
            try:
                check(words, parse)
            except (AssertionError, UserError) as error:
                pytest.fail(f"{shlex.join(words)}: {error}")


def test_every_page_with_a_command_is_executed_or_parsed() -> None:
    with_commands = {block.page for block in BLOCKS} | {page for page, _ in INLINE}
    assert with_commands <= {*EXECUTED, *REFERENCE, *PARSED}, "add the page to EXECUTED, or to PARSED with the reason"
    assert {*EXECUTED, *PARSED} <= set(PAGES)
    with_code = {block.page for block in BLOCKS if block.language in ("python", "diff")}
    assert with_code <= {*EXECUTED, *REFERENCE, TABLES}


def test_blocks_have_known_languages() -> None:
    for block in BLOCKS:
        assert block.language in ("", "sh", "bash", "python", "diff", "yaml", "text"), f"{block.page}:{block.line}"
        if block.language == "yaml":
            values = yaml.safe_load(block.text.replace("\n...\n", "\n"))  # where something is left out
            if "output" in values:
                AblationPlan.model_validate(values)


def flags_of(name: str) -> set[str]:
    """Return the flags of a command of `ringrl`."""
    app = cli.build_app([])
    for part in name.split():
        app = app[part]
    arguments = app.assemble_argument_collection()
    flags = [argument for argument in arguments if not argument.children]
    return {name for argument in flags for name in (*argument.names, *argument.negatives)}


def test_flags_named_in_the_text_exist() -> None:
    known = {flag for name in cli.COMMANDS for flag in flags_of(name)} | {"--help", "--version"}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r"--[\w-]+", script.read_text()))
    for page in PAGES:
        for span in spans(page):
            if span.startswith("--"):
                flag = re.split(r"[ =]", span)[0]
                assert flag in known, f"{page}: no command has {flag}"


def test_links_exist() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def shorter(block: Block) -> str:
    text = block.text
    for long, short in SHORTER.get(block.page, {}).items():
        assert long in (ROOT / block.page).read_text()
        text = text.replace(long, short)
    return text


def is_repeated(page: str, words: list[str]) -> bool:
    """Return whether an earlier page runs the same evaluation or report, on which no later step depends."""
    earlier = EXECUTED[: EXECUTED.index(page)] if page in EXECUTED else ()
    return words[1] in ("evaluate", "report") and any((before, words) in COMMANDS for before in earlier)


def steps(block: Block) -> Iterator[tuple[str, Any]]:
    """Yield the steps of a block to run, made small."""
    if block.language == "python":
        yield "python", shorter(block)
    for program, *rest in commands(block):
        name = next((name for name in cli.COMMANDS if rest[: len(name.split())] == name.split()), "")
        if name in NOT_RUN or program in NOT_RUN or is_repeated(block.page, [program, *rest]):
            continue
        if program == "ringrl":
            small = (TINY_METHOD if "--method" in rest else TINY_TRANSFORMER) if name == "train" else []
            small = [*without([] if "--format" in rest else SMALLER.get(name, []), small), *small]
            yield "ringrl", [*without(rest, small), *small]
        else:
            assert program == "python", f"{block.page}:{block.line}: cannot run {program}"
            yield "script", [*rest, *SMALLER.get(Path(rest[0]).name, [])]


@pytest.fixture(scope="module")
def walker_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive that a download of walker/rnd leaves, with four episodes."""
    folder = tmp_path_factory.mktemp("walker")
    collect("walker_walk", folder / "rnd", episodes=4, seed=0, workers=1)
    return Path(shutil.make_archive(str(folder / "rnd"), "zip", folder / "rnd"))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in EXECUTED]
)
def test_whole_pages_run(page: str, tmp_path: Path, walker_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SOURCES:
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "datasets" / "walker").mkdir(parents=True)
    shutil.copy(walker_archive, tmp_path / "datasets" / "walker")
    for block in blocks(page):
        if named := NAMED.match(block.text):
            (tmp_path / named[1]).write_text(shorter(block))
        if block.language == "diff":
            apply = ["git", "apply", "-"]
            subprocess.run(apply, input=block.text, text=True, cwd=tmp_path, check=True)
    program = [step for block in blocks(page) for step in steps(block)]
    monkeypatch.chdir(tmp_path)
    if page in ALONE:
        run_alone(program, tmp_path)
    else:
        run(program)


@pytest.mark.slow
def test_examples_of_the_reference_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run([step for page in REFERENCE for block in blocks(page) for step in steps(block)])


def run(program: list[tuple[str, Any]]) -> None:
    """Run the steps of a page in the working directory. The Python blocks share their names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for kind, what in program:
        print("#", kind, what if kind != "python" else "")
        if kind == "ringrl":
            cli.main(what)
        elif kind == "python":
            exec(compile(what, "block", "exec"), names)
        else:
            sys.argv = what
            sys.path.insert(0, str(Path(what[0]).parent))  # as Python does for a script
            runpy.run_path(what[0], run_name="__main__")


DRIVER = f"""
import json, runpy, sys
from pathlib import Path
from typing import Any

from ringrl import cli

{inspect.getsource(run)}
if __name__ == "__main__":  # processes of a study import this file again
    run(json.loads(Path("steps.json").read_text()))
"""


def run_alone(program: list[tuple[str, Any]], tmp_path: Path) -> None:
    """Run the steps of a page in a process of its own, with the code in the folder."""
    (tmp_path / "steps.json").write_text(json.dumps(program))
    (tmp_path / "driver.py").write_text(DRIVER)
    own = {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu", "MINARI_DATASETS_PATH": str(tmp_path / "minari")}
    done = subprocess.run(
        [sys.executable, "driver.py"], env=os.environ | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
