"""mkdocs hook: write a page per task and their overview, from the facts in ringrl.envs."""

import importlib
import re
from itertools import accumulate

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ringrl.envs import DOMAINS, Domain

OVERVIEW = """\
# Tasks

The {count} tasks of ExoRL. The reward of a step is between 0 and 1. Returns are sums over an episode.
A [normalised score](../evaluation.md) is 0 at the random return and 100 at the reference return.
[How to add a task](../adding_a_task.md).

| Task | Reward of a step | Random | Reference |
|---|---|---|---|
"""

PAGE = """\
# {task}

{picture}

{about}

| Property | Value |
|---|---|
| Reward of a step, 0 to 1 | {reward} |
| Return of random actions (score 0) | {random} |
| Reference return (score 100) | {reference:.0f}, reward 1 at every step |
| Episode | {domain.episode_length} steps of {domain.control_timestep} s |
| Action | {domain.action_size} float32 numbers in [-1, 1] |
| Gymnasium | `ringrl/{task}-v0` |

## Observation

{domain.observation_size} float32 numbers.

| Numbers | Quantity |
|---|---|
{observation}

## In Python

```python
from ringrl.envs import make

environment = make("{task}", seed=0, render_mode="rgb_array")
observation, info = environment.reset()
action = environment.action_space.sample()
observation, reward, terminated, truncated, info = environment.step(action)
image = environment.render()
```
"""


def on_config(config: MkDocsConfig) -> None:
    """Put the pages into the menu, one section per domain."""
    (tasks,) = (entry for entry in config.nav if "Tasks" in entry)
    sections = [{name: [{task: f"tasks/{task}.md"} for task in domain.tasks]} for name, domain in DOMAINS.items()]
    tasks["Tasks"] = [tasks["Tasks"], *sections]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages."""
    overview = OVERVIEW.format(count=sum(len(domain.tasks) for domain in DOMAINS.values()))
    for domain in DOMAINS.values():
        for task in domain.tasks:
            path = f"images/tasks/{task}.jpg"  # drawn by draw_tasks.py
            picture = f"![{task}](../{path})" if path in files.src_uris else ""
            files.append(File.generated(config, f"tasks/{task}.md", content=_page(domain, task, picture)))
            returns = f"{_random(domain, task)} | {domain.reference_return:.0f}"
            overview += f"| {picture}<br>[{task}]({task}.md) | {domain.rewards.get(task, '')} | {returns} |\n"
    files.append(File.generated(config, "tasks/index.md", content=overview))


def _page(domain: Domain, task: str, picture: str) -> str:
    ends = list(accumulate(domain.observation.values()))
    parts = zip(domain.observation.items(), ends, strict=True)
    first = re.search(r": (.*?\.)\s", f"{importlib.import_module(f'ringrl.envs.{domain.name}').__doc__} ", re.DOTALL)
    about = " ".join(first[1].split())
    return PAGE.format(
        task=task,
        picture=picture,
        domain=domain,
        about=about[0].upper() + about[1:],
        reward=domain.rewards.get(task, ""),
        random=_random(domain, task),
        reference=domain.reference_return,
        observation="\n".join(
            f"| {end - width}{f' to {end - 1}' if width > 1 else ''} | {_escaped(name)} |"
            for (name, width), end in parts
        ),
    )


def _random(domain: Domain, task: str) -> str:
    return str(domain.random_returns.get(task, ""))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
