"""Presets are valid and have the size that they name; settings are validated."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from ringrl.config import Section, TrainConfig
from ringrl.config_files import merged, read_yaml, to_yaml
from ringrl.configs import preset
from ringrl.errors import UserError
from ringrl.study.cells import cells
from ringrl.study.plan import read_plan

REQUIRED = {"data": "unused", "task": "unused", "run": "unused"}
PLANS = {"demo", "results"}
BILLIONS = {
    "small": 0.009,
    "paper_350m": 0.302,
}


@pytest.mark.parametrize(("name", "count"), [("results", 530)])
def test_plans_have_cells_with_valid_settings(name: str, count: int) -> None:
    assert len(cells(read_plan(preset(name)))) == count


def train_presets() -> list[str]:
    return sorted(file.stem for file in preset("demo").parent.glob("*.yaml") if file.stem not in PLANS)


@pytest.mark.parametrize("name", train_presets())
def test_training_presets_are_valid(name: str) -> None:
    config = TrainConfig.model_validate(REQUIRED | read_yaml(preset(name)))
    if name in BILLIONS:
        model = config.model
        key_value = 2 * model.width * model.kv_heads // model.heads
        matrices = model.width * (2 * model.width + key_value + 2 * model.feed_forward * model.width)
        assert model.layers * matrices / 1e9 == pytest.approx(BILLIONS[name], rel=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimiser": {"batch_size": 4, "accumulation": 3}}, "3 parts do not divide a batch of 4"),
        (
            {"optimiser": {"schedule": "constant", "final_learning_rate": 0.1}},
            "final_learning_rate: has no effect with schedule constant; use cosine, linear or wsd",
        ),
        ({"optimiser": {"accumulation": 2}, "model": {"kind": "td3_bc"}}, "td3_bc computes a batch in one part"),
        ({"context": {"sampling": "history_window", "max_transitions": 5000}}, "needs consecutive episodes"),
        ({"context": {"sampling": "history_window", "best_fraction": 0.5}}, "needs consecutive episodes"),
        ({"context": {"segment_start_share": 1.1}}, "less than or equal to 1"),
        ({"context": {"segment_start_share": -0.1}}, "greater than or equal to 0"),
        ({"context": {"segment_steps": 0}}, "greater than or equal to 1"),
        ({"context": {"history_stride": 0}}, "greater than or equal to 1"),
        ({"context": {"segment_start_share": 0.2}}, "segment_start_share: has no effect without segments"),
        ({"context": {"first_steps": 5}}, "first_steps: has no effect with first_steps_weight 1"),
        ({"model": {"past_rewards": "off", "token_set": "dt3"}}, "past_rewards: has no effect with token_set dt3"),
        ({"model": {"strategy": "auto", "attention": "blockwise"}}, "strategy: has no effect with attention blockwise"),
        (
            {"model": {"strategy": "ulysses", "bidirectional": True}},
            "bidirectional: has no effect with strategy ulysses",
        ),
        ({"mesh": {"seq": 3, "ulysses": 2}}, "ulysses: 2 must divide the 3 devices of seq"),
        ({"model": {"action_choice": "mean"}}, "action_choice: has no effect with action_head mse; use bins"),
        ({"validate_every": 5}, "validate_every: has no effect without held-out episodes; set validation_fraction"),
        ({"context": {"first_steps": 0}}, "greater than or equal to 1"),
        ({"context": {"first_steps_weight": 0}}, "greater than 0"),
        ({"optimiser": {"stepz": 3}}, "there is no setting stepz; did you mean steps\\?"),
        ({"actor_critic": {"xyz": 3}}, "no setting xyz; choose from discount, n_step"),
        ({"seed": 2**32}, "less than 4294967296"),  # its key would equal that of seed 0
    ],
)
def test_incompatible_settings_are_errors(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig.model_validate(REQUIRED | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"context": {"segment_start_share": 0.2, "segment_steps": 9, "first_steps": 5, "first_steps_weight": 50}},
        {"context": {"segment_start_share": 0.5, "first_steps": 20}, "validate_every": 100},  # defaults
        {"model": {"past_rewards": "off"}, "validate_every": 5, "validation_fraction": 0.1},
        {"model": {"past_rewards": "off", "token_set": "dt3", "kind": "behaviour_cloning"}},  # uses neither
        {"model": {"action_choice": "mean", "kind": "td3_bc"}},
        {"optimiser": {"schedule": "constant", "final_learning_rate": 1.0}},  # with --method td3
        {"optimiser": {"schedule": "wsd", "final_learning_rate": 0.1}},
        {"model": {"action_choice": "mean", "action_head": "bins", "kind": "behaviour_cloning"}},
    ],
)
def test_settings_with_an_effect_are_accepted(settings: dict) -> None:
    TrainConfig.model_validate(REQUIRED | settings)


def test_settings_are_merged() -> None:
    below = {"model": {"layers": 2, "width": 8}, "context": None, "seed": 1}
    above = {"model": {"layers": 3}, "context": {"trajectories": 4}, "seed": 2}
    assert merged(below, above) == {"model": {"layers": 3, "width": 8}, "context": {"trajectories": 4}, "seed": 2}
    assert below["model"] == {"layers": 2, "width": 8}


@pytest.mark.parametrize("value", [3, 0, "transformer", [1]])
def test_a_section_that_is_no_mapping_is_reported(value: object) -> None:
    with pytest.raises(UserError, match=r"^model: expected settings by name"):
        merged({"model": value}, {"model": {"layers": 3}})
    with pytest.raises(UserError, match=r"^parts\.model: expected settings by name"):
        merged({"parts": {"model": value}}, {"parts": {"model": {"layers": 3}}})


def test_duplicate_keys_are_errors(tmp_path: Path) -> None:
    """PyYAML alone would keep the last one."""
    file = tmp_path / "twice.yaml"
    for text in ("model: {layers: 1}\ntask: x\nmodel: {width: 16}\n", "model:\n  layers: 1\n  layers: 2\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"twice\.yaml: is not YAML \(duplicate key (model|layers)") as caught:
            read_yaml(file)
        assert "\n" not in str(caught.value)


def test_an_empty_file_is_reported_as_empty(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match=r"empty\.yaml: is empty; give settings by name"):
        read_yaml(file)


def integers(section: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the names of all settings that are integers."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from integers(field.annotation, (*prefix, name))
        elif int in (field.annotation, *typing.get_args(field.annotation)):
            yield (*prefix, name)


@pytest.mark.parametrize("names", list(integers(TrainConfig)), ids=".".join)
@pytest.mark.parametrize("value", [10**20, 2**32, True])
def test_an_integer_too_large_for_the_arrays_of_a_run_is_an_error(names: tuple[str, ...], value: int) -> None:
    values: Any = value
    for name in reversed(names):
        values = {name: values}
    with pytest.raises(pydantic.ValidationError, match=names[-1]):
        TrainConfig.model_validate(REQUIRED | values)


YAML = {
    "1e6": 1e6, "010": 10, "-3": -3, "0x1F": 31, ".5": 0.5, "1.": 1.0, "1:30": "1:30", "yes": "yes", "true": True,
    "2026-13-45": "2026-13-45", "2026-01-01": "2026-01-01", "~": None, "": None, "1_000": "1_000", "0x_": "0x_",
}  # fmt: skip


@pytest.mark.parametrize("text", YAML)
def test_numbers_and_words_in_yaml_mean_what_they_look_like(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(f"a: {text}")
    assert read_yaml(tmp_path / "c.yaml") == {"a": YAML[text]}


def test_yaml_merges_anchors(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, c: 3}")
    assert read_yaml(tmp_path / "c.yaml")["d"] == {"b": 1, "c": 3}


@pytest.mark.parametrize("name", [*YAML, "08", "<<", "1e-5", "0b1", "on", "null", "é", "a: b", "#"])
def test_text_in_saved_settings_stays_text(tmp_path: Path, name: str) -> None:
    config = TrainConfig.model_validate(REQUIRED | {"task": name, "run": Path(name or "x")})
    (tmp_path / "c.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert TrainConfig.model_validate(read_yaml(tmp_path / "c.yaml") | {"run": config.run}) == config


@pytest.mark.parametrize(
    "text",
    [
        "!!int abc",
        "!!int ''",
        "!!bool maybe",
        "!!timestamp foo",
        "!!float x",
        "!!map [1]",
        "[" * 3000 + "]" * 3000,
        "&x [*x",
        "\x00",
    ],
)
def test_values_that_are_not_yaml_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(f"a: {text}")
    with pytest.raises(UserError, match=r"c\.yaml: is not YAML") as caught:
        read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
