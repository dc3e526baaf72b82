"""Cost of a plan: work that remains, known times, and rough times."""

import pytest

from ringrl.study.cells import Cell, attempt, cells, write
from ringrl.study.cost import Speed, cost, cost_table, estimates
from ringrl.training.budget import forward_flops
from ringrl.training.checkpoints import EarlyStopping
from tests.study.test_ablate_plan import finish, plan_of


def test_finished_training_costs_nothing(write_plan) -> None:
    (cell,) = cells(plan_of(write_plan, trajectories=[2], baselines=[], settings={"optimiser": {"steps": 30}}))
    whole = cost(cell)
    assert (whole.steps, whole.tokens) == (30, 30 * 2 * 250 * 4)
    assert whole.simulated == 2 * 2 * 250 * 2, "streams, episodes, steps, and the control"
    for name in ("10", "20", "25.orbax-checkpoint-tmp"):
        (cell.folder / "checkpoints" / name).mkdir(parents=True)
    rest = cost(cell)
    assert (rest.steps, rest.simulated) == (10, whole.simulated)


def test_only_the_time_of_whole_attempts_is_known(write_plan, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells(plan_of(write_plan, trajectories=[2], baselines=[]))
    monkeypatch.setattr(Cell, "run", lambda self, command: write(self.folder / "evaluation.jsonl", ""))
    assert attempt(cell, None) is None
    assert cell.seconds is not None
    assert attempt(cell, None) is None
    assert cell.seconds is None, "the seconds of the first attempt are missing"


def test_converged_training_costs_nothing(write_plan, monkeypatch) -> None:
    stopping = {"validation_fraction": 0.5, "validate_every": 2, "checkpoint_every": 2, "stop_after": 2}
    settings = {"optimiser": {"steps": 30}, **stopping}
    (cell,) = cells(plan_of(write_plan, trajectories=[2], baselines=[], settings=settings))
    (cell.folder / "checkpoints" / "10").mkdir(parents=True)
    assert cost(cell).steps == 20
    saved = {(cell.folder, 10): EarlyStopping(1.0, cell.config.patience)}
    monkeypatch.setattr(EarlyStopping, "saved", lambda run, step: saved[run, step])
    assert (cost(cell).steps, cost(cell).tokens) == (0, 0)


def test_the_time_of_a_kind_is_known_from_its_finished_cells(write_plan) -> None:
    found = cells(plan_of(write_plan, trajectories=[2], seeds=[0, 1, 2], settings={"optimiser": {"steps": 30}}))
    by_name = {cell.folder.name: cell for cell in found}
    rough = estimates(found, 1)
    assert rough.keys() == {cell.name for cell in found}
    assert all(1 < one.seconds < 100 for one in rough.values())
    for name, seconds in (("at_2_seed0", 40.0), ("at_2_seed1", 60.0)):
        finish(by_name[name], seconds)
    (by_name["at_2_seed2"].folder / "checkpoints" / "15").mkdir(parents=True)
    more = cells(plan_of(write_plan, trajectories=[2], episodes=8, settings={"optimiser": {"steps": 30}}))
    assert not {50.0, 25.0} & {one.seconds for one in estimates(more, 1).values()}, "these have more to do"
    now = {name.rpartition("/")[2]: one.seconds for name, one in estimates(found, 1).items()}
    assert now.keys() == {"at_2_seed2", "bc_seed0", "bc_seed1", "bc_seed2"}
    assert now["at_2_seed2"] == 25, "half of the steps are done"
    (by_name["at_2_seed2"].folder / "checkpoints" / "30").mkdir()
    now = estimates(found, 1)
    assert now["jaco_reach_top_left/at_2_seed2"].seconds == pytest.approx(5), "a tenth for the evaluation"
    waiting = [cell for cell in found if not cell.is_finished]
    finish(by_name["bc_seed0"], 7200.0)
    waiting.remove(by_name["bc_seed0"])
    caption = cost_table(waiting, estimates(found, 2), 3, 2).caption
    assert caption == "very roughly 2:00:02 with 2 at a time; 3 other cells are finished"


def test_a_rough_time_counts_the_cells_at_once_and_the_live_segment_of_every_step(write_plan, monkeypatch) -> None:
    flops = 1e6  # per second: slow, and nothing else takes time
    monkeypatch.setattr(Speed, "measure", lambda tasks: Speed(flops, dict.fromkeys(tasks, 0.0)))
    settings = {"model": {"layers": 2, "width": 16, "token_set": "ring4"}, "context": {"segment_steps": 20}}
    changes = {"trajectories": [2], "baselines": [], "seeds": [0, 1], "settings": settings}

    def rough(episodes: int, workers: int) -> float:
        found = cells(plan_of(write_plan, **changes, episodes=episodes))
        return estimates(found, workers)[found[0].name].seconds

    cell = cells(plan_of(write_plan, **changes))[0]
    again = 3 * forward_flops(cell.config.model, 20 * 4) / flops
    assert rough(8, 1) - rough(4, 1) == pytest.approx(4 * 250 * again)
    assert rough(4, 2) - rough(4, 1) == pytest.approx(3 * cost(cell).flops / flops + 4 * 250 * again)
