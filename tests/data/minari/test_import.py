"""Imports of Minari datasets that the Minari library wrote."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple

from ringrl.cli import main
from ringrl.config import TrainConfig
from ringrl.data import EpisodeStore
from ringrl.data.minari import export_minari, import_minari
from ringrl.data.sampling.normalisation import Normalisation
from ringrl.data.store.summary import describe
from ringrl.errors import UserError
from ringrl.evaluation import Protocol, evaluate_policy, load_policy
from ringrl.evaluation.records import data_records
from ringrl.evaluation.scores import summarise
from ringrl.report.results import tabulate
from ringrl.report.tables import returns_table
from ringrl.training import train

minari = pytest.importorskip("minari", reason="Minari is not installed (pip install 'ringrl[minari]')")

pytestmark = pytest.mark.filterwarnings("ignore")  # Minari asks for authors, addresses and the like


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for Minari's datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


@pytest.fixture
def pendulum() -> str:
    """A dataset of three Pendulum-v1 episodes (30, 30 and 12 steps), collected with Minari."""
    environment = minari.DataCollector(gymnasium.make("Pendulum-v1", max_episode_steps=30, render_mode="rgb_array"))
    environment.action_space.seed(0)
    for number, length in enumerate((30, 30, 12)):
        environment.reset(seed=number)
        for _ in range(length):
            environment.step(environment.action_space.sample())
    environment.create_dataset("pendulum/random-v0", ref_min_score=-400.0, ref_max_score=-50.0)
    environment.close()
    return "pendulum/random-v0"


SPACE = Dict(
    {"joints": Dict({"z": Box(-9, 9, (2, 3)), "a": Box(-9, 9, (2,), np.float64)}), "goal": Box(0, 99, (1,), np.int64)}
)
LENGTHS = (5, 3, 8)
WIDE = json.dumps({"type": "Box", "dtype": "float32", "shape": [2**20], "low": 0.0, "high": 1.0})
PENDULUM = "gymnasium:Pendulum-v1(max_episode_steps=30)"


def made(name: str = "lab/arm-v3", observation_space: gymnasium.Space = SPACE, **changes) -> list:
    """A function that writes a Minari dataset: episodes of 5, 3 and 8 steps. The second episode terminates."""
    observation_space.seed(0)
    action_space = changes.pop("action_space", Box(np.array([-2, 0]), np.array([2, 5]), dtype=np.float64))
    action_space.seed(0)
    random, buffers = np.random.default_rng(0), []
    for number, length in enumerate(LENGTHS):
        observations = [observation_space.sample() for _ in range(length + 1)]
        last = np.arange(length) == length - 1
        values = {
            "observations": stacked(observations),
            "actions": np.stack([action_space.sample() for _ in range(length)]),
            "rewards": random.normal(size=length) * 100,
            "terminations": last & (number == 1),
            "truncations": last & (number != 1),
        }
        values |= {key: change(values[key]) for key, change in changes.items() if number == 2}
        buffers.append(minari.data_collector.EpisodeBuffer(id=number, **values))
    minari.create_dataset_from_buffers(name, buffers, observation_space=observation_space, action_space=action_space)
    return buffers


def stacked(rows: list) -> object:
    if isinstance(rows[0], dict):
        return {key: stacked([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


def test_any_dataset_becomes_a_store(tmp_path: Path) -> None:
    made()
    dataset, store = minari.load_dataset("lab/arm-v3"), import_minari("lab/arm-v3", tmp_path / "arm.h5")
    assert (store.domain, store.tasks, store.recorded_task) == ("lab/arm-v3", ("lab_arm-v3",), "lab_arm-v3")
    assert store.lengths.tolist() == list(LENGTHS)
    for number, episode in enumerate(dataset):
        rows, steps = store.episode(number), len(episode)
        observation = [
            {
                "joints": {key: episode.observations["joints"][key][i] for key in "az"},
                "goal": episode.observations["goal"][i],
            }
            for i in range(steps + 1)
        ]
        flat = np.stack([gymnasium.spaces.flatten(dataset.observation_space, row) for row in observation])
        np.testing.assert_array_equal(rows["observation"], flat.astype(np.float32), strict=True)
        low, high = np.array([-2, 0]), np.array([2, 5])
        np.testing.assert_allclose(low + (rows["action"][1:] + 1) / 2 * (high - low), episode.actions, atol=1e-6)
        np.testing.assert_array_equal(rows["reward"][1:, 0], episode.rewards.astype(np.float32))
        np.testing.assert_array_equal(rows["reward"][:, 0], rows["reward/lab_arm-v3"])
        np.testing.assert_array_equal(rows["discount"][1:, 0], 1 - episode.terminations)
        assert not rows["action"][0].any()
        assert not rows["reward"][0].any()
        assert rows["discount"][0] == 1
    store.verify()
    reported = describe(store)
    assert "1 terminated" in reported
    assert "scaled to [-1, 1] from [-2, 2], [0, 5]" in reported
    assert "Minari (lab/arm-v3)" in reported


def test_parts_of_observations_are_sorted_by_key(tmp_path: Path) -> None:
    """As `ForeignEnv` flattens them, whatever the order in the metadata."""
    buffers = made(observation_space=Dict(z=Box(-9, 9, (2,)), a=Box(-9, 9, (3,))))
    rows = import_minari("lab/arm-v3", tmp_path / "arm.h5").episode(0)["observation"]
    given = buffers[0].observations
    np.testing.assert_array_equal(rows, np.concatenate([given["a"], given["z"]], axis=1))


def test_a_foreign_store_survives_export_and_import(tmp_path: Path) -> None:
    made()
    store = import_minari("lab/arm-v3", tmp_path / "arm.h5")
    export_minari(store, "again-v0")
    ends = [
        (bool(episode.terminations[-1]), bool(episode.truncations[-1])) for episode in minari.load_dataset("again-v0")
    ]
    assert ends == [(False, True), (True, False), (False, True)]
    back = import_minari("again-v0", tmp_path / "back.h5")
    for key in ("observation", "action", "reward", "discount"):
        np.testing.assert_array_equal(back.arrays[key], store.arrays[key])
    back.verify()
    assert back.facts == dataclasses.replace(store.facts, name="again-v0", tasks=("again-v0",))


class Arm(gymnasium.Env):
    """Observations in named parts of several types, actions of two rows, and episodes that terminate."""

    observation_space = Dict(
        joints=Tuple((Box(-9, 9, (2, 2), np.float64), Box(0, 1, (), np.float16))), goal=Box(0, 99, (3,), np.int64)
    )
    action_space = Box(np.array([[-1.0], [-2.0]]), np.array([[1.0], [2.0]]), dtype=np.float32)

    def __init__(self, speed: float = 1.0, render_mode: None = None) -> None:
        self.speed = speed

    def _observation(self) -> dict:
        joints = self.np_random.normal(size=(2, 2)).astype(np.float32).astype(np.float64)
        return {"joints": (joints, np.float16(0.3)), "goal": self.np_random.integers(99, size=3)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(2, 9))
        return self._observation(), {}

    def step(self, action):
        self.left -= 1
        return self._observation(), 0.5 * self.left * self.speed, self.left == 0, False, {}


def test_a_dataset_of_parts_is_exported_equal(tmp_path: Path) -> None:
    gymnasium.register("Arm-v0", f"{__name__}:Arm", max_episode_steps=6)
    environment = minari.DataCollector(gymnasium.make("Arm-v0", speed=2.0))
    environment.action_space.seed(0)
    for seed in range(4):
        environment.reset(seed=seed)
        ended = False
        while not ended:
            _, _, terminated, truncated, _ = environment.step(environment.action_space.sample())
            ended = terminated or truncated
    original = environment.create_dataset("lab/parts-v0", ref_min_score=0.0, ref_max_score=9.0)
    store = import_minari("lab/parts-v0", tmp_path / "parts.h5")
    assert store.domain == "gymnasium:Arm-v0(speed=2.0)"
    assert store.facts.observation == {"goal": 3, "joints/_index_0": 4, "joints/_index_1": 1}
    assert "goal 3, joints/_index_0 4, joints/_index_1 1" in describe(store)
    export_minari(store, "lab/again-v0")
    import_minari("lab/again-v0", tmp_path / "again.h5")
    export_minari(EpisodeStore(tmp_path / "again.h5"), "lab/thrice-v0")
    for name in ("lab/again-v0", "lab/thrice-v0"):
        copy = minari.load_dataset(name)
        assert copy.observation_space == original.observation_space
        assert copy.action_space == original.action_space
        assert copy.env_spec == original.env_spec
        assert copy.recover_environment().unwrapped.speed == 2
        for key in ("env_spec", "ref_min_score", "ref_max_score"):
            assert raw(copy)[key] == raw(original)[key]
        for one, other in zip(original, copy, strict=True):
            for key in ("actions", "rewards", "terminations", "truncations"):
                np.testing.assert_array_equal(getattr(one, key), getattr(other, key))
            pairs = zip(leaves(one.observations), leaves(other.observations), strict=True)
            for (path, array), (other_path, again) in pairs:
                assert path == other_path
                np.testing.assert_array_equal(array, again, strict=True)
    del gymnasium.registry["Arm-v0"]
    export_minari(store, "lab/far-v0")
    assert raw(minari.load_dataset("lab/far-v0"))["env_spec"] == raw(original)["env_spec"], "although not installed"


def raw(dataset: object) -> dict:
    return dataset.storage.read_raw_metadata(dataset.storage.data_path)


def leaves(observations: object, path: str = "") -> list:
    if isinstance(observations, dict):
        return [leaf for key in sorted(observations) for leaf in leaves(observations[key], f"{path}/{key}")]
    if isinstance(observations, tuple):
        return [leaf for index, part in enumerate(observations) for leaf in leaves(part, f"{path}/{index}")]
    return [(path, observations)]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"observation_space": "{"}, "its spaces cannot be read"),
        ({"observation_space": json.dumps({"type": "Box"}) }, "its spaces cannot be read"),
        ({"observation_space": WIDE}, "its spaces differ from its arrays: import the dataset again"),
        ({"action_space": json.dumps({"type": "Discrete", "n": 2, "start": 0})}, "its spaces differ from its arrays"),
    ],
)  # fmt: skip
def test_a_store_with_other_spaces_is_not_exported(texts: dict, message: str, tmp_path: Path) -> None:
    made()
    store = import_minari("lab/arm-v3", tmp_path / "arm.h5")
    store.facts = dataclasses.replace(store.facts, minari=store.facts.minari | texts)
    with pytest.raises(UserError, match=message) as error:
        export_minari(store, "again-v0")
    assert "\n" not in str(error.value)


def test_the_environment_of_a_dataset_has_its_own_arguments_but_no_files(
    pendulum: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"have 3 and 1 numbers, those of gymnasium:Hopper-v5 have 11 and 3: name"):
        import_minari(pendulum, tmp_path / "hopper.h5", environment="gymnasium:Hopper-v5")
    gymnasium.register("Moon-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=30, kwargs={"g": 1.6})
    path = root / pendulum / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = gymnasium.make("Moon-v0").spec.to_json()
    path.write_text(json.dumps(metadata | {"env_spec": spec}))
    assert import_minari(pendulum, tmp_path / "moon.h5").domain == "gymnasium:Moon-v0"
    del gymnasium.registry["Moon-v0"]
    assert import_minari(pendulum, tmp_path / "far.h5").domain == "gymnasium:Moon-v0(g=1.6)"
    for number, kwargs in enumerate([{"xml_file": ["/a.xml"]}, {"healthy_z_range": [0.7, float("inf")]}]):
        other = json.loads(spec) | {"kwargs": kwargs}
        path.write_text(json.dumps(metadata | {"env_spec": json.dumps(other)}))
        assert import_minari(pendulum, tmp_path / f"{number}.h5").domain == pendulum


@pytest.mark.slow
def test_a_foreign_dataset_can_be_trained_on(pendulum: str, tmp_path: Path) -> None:
    store = import_minari(pendulum, tmp_path / "pendulum.h5")
    assert store.lengths.tolist() == [30, 30, 12]
    assert np.abs(store.arrays["action"]).max() <= 1
    assert "physics" not in store.arrays
    scale = Normalisation.of(store)
    assert scale.return_to_go(store.returns(PENDULUM).min()) == -1
    tiny = {
        "data": store.path,
        "task": PENDULUM,
        "context": {"trajectories": 2},
        "model": {"layers": 1, "width": 16, "token_set": "fused1"},
        "optimiser": {"steps": 3, "batch_size": 2, "warmup_steps": 1},
    }
    run = train(TrainConfig.model_validate(tiny | {"run": tmp_path / "run"}), quiet=True)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for line in metrics for value in line.values() if isinstance(value, float))
    records = evaluate_policy(load_policy(run), Protocol(environments=2, episodes=2))
    assert [record.lengths for record in records] == [(30, 30)] * 2
    (summary,), mean = summarise(records), float(np.mean([record.returns for record in records]))
    assert summary.scores["mean"] == pytest.approx(100 * (mean + 400) / 350)
    table = returns_table(tabulate(records + data_records(PENDULUM, store.returns(PENDULUM))))
    best = table.set_index("method").loc["Dataset, best episode"]
    assert best["score"] == pytest.approx(100 * (float(store.returns(PENDULUM).max()) + 400) / 350)
    with pytest.raises(UserError, match="and cannot act in task walker_walk"):
        evaluate_policy(load_policy(run), Protocol(), task="walker_walk")


def test_reference_returns_are_the_datasets_or_given(pendulum: str, root: Path, tmp_path: Path, capsys) -> None:
    store = import_minari(pendulum, tmp_path / "pendulum.h5")
    assert store.reference_returns == (-400, -50)
    assert "0 at a return of -400, 100 at -50" in describe(store)
    export_minari(store, "again-v0")
    exported = minari.load_dataset("again-v0").storage.metadata
    assert [exported[name] for name in ("ref_min_score", "ref_max_score")] == [-400, -50]
    assert import_minari("again-v0", tmp_path / "again.h5").reference_returns == (-400, -50)
    command = ["data", "import", pendulum, "--format", "minari", "--output", str(tmp_path / "a.h5")]
    main([*command, "--reference-returns", "-500", "-1"])
    assert EpisodeStore(tmp_path / "a.h5").reference_returns == (-500, -1)
    for high, message in ((-401, "reference returns -400 and -401; give the lower one first"), ("a", "cannot be read")):
        change_metadata(ref_max_score=high)(root / pendulum / "data")
        with pytest.raises(UserError, match=message) as error:
            import_minari(pendulum, tmp_path / "b.h5")
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        main(["data", "import", str(tmp_path), "--domain", "walker", "--reference-returns", "0", "1"])
    assert "--reference-returns: ExoRL archives have a --domain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"action_space": MultiBinary(3)}, "has MultiBinary actions"),
        ({"action_space": Box(-np.inf, 1, (2,))}, "its actions have no bounds"),
        ({"observation_space": Box(0, 255, (32, 32, 3), np.uint8)}, r"has images as obs.* \(32x32"),
        ({"observation_space": Dict({"a": Box(0, 1), "b": Discrete(3)})}, "Discrete observations/b: only"),
        ({"actions": lambda array: array * 3}, "is outside the action space"),
        ({"terminations": np.logical_not}, "episode 2 terminates before its last step .step 0."),
        ({"rewards": lambda array: array * np.nan}, "episode 2 has a value in row 0 of rewards that is not finite"),
        ({"rewards": lambda array: array * 1e300}, "episode 2 has a value in row 0 of rewards that is not finite"),
        ({"rewards": lambda array: np.full(8, 3e38)}, "episode 2: the return is too large for float32"),
        ({"actions": lambda array: array[:-1]}, r"episode_2/actions of shape \(7, 2\), expected \(8, 2\)"),
        ({"rewards": lambda array: array[:, None]}, "episode 2 has no list of rewards"),
        ({"rewards": lambda array: ["a"] * 8}, "episode 2 has episode_2/rewards that are not numbers"),
    ],
)  # fmt: skip
def test_unsupported_datasets_are_rejected_by_name(spaces: dict, message: str, tmp_path: Path) -> None:
    made(**spaces)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        import_minari("lab/arm-v3", tmp_path / "arm.h5")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def change_file(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def apply(data: Path) -> None:
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            change(file)

    return apply


def change_metadata(**values: object) -> Callable[[Path], None]:
    def apply(data: Path) -> None:
        metadata = json.loads((data / "metadata.json").read_text()) | values
        (data / "metadata.json").write_text(json.dumps({key: value for key, value in metadata.items() if value != "-"}))

    return apply


def cut(data: Path) -> None:
    whole = (data / "main_data.hdf5").read_bytes()
    (data / "main_data.hdf5").write_bytes(whole[: len(whole) // 2])


def replaced(name: str, make: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = make(file)

    return change_file(change)


def bomb(file: h5py.File) -> None:
    del file["episode_1/rewards"]
    file.create_dataset("episode_1/rewards", (10**13,), "f8", chunks=(1024,))


def wide(file: h5py.File) -> None:
    del file["episode_1/observations"]
    file.create_dataset("episode_1/observations", (4, 2**18), "f4", chunks=(1, 1024), compression="gzip")


ENDLESS = json.dumps({"type": "Box", "dtype": "float32", "shape": [10**12], "low": 0.0, "high": 1.0})
SECRET = h5py.ExternalLink("secret.h5", "numbers")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "main_data.hdf5 cannot be read, it is missing, damaged or cut short"),
        (lambda data: (data / "main_data.hdf5").unlink(), "main_data.hdf5 cannot be read, it is missing"),
        (lambda data: (data / "metadata.json").write_text("{"), "metadata.json cannot be read"),
        (lambda data: (data / "metadata.json").write_text("[" * 100_000), "metadata.json cannot be read"),
        (change_metadata(total_episodes=4), "lacks episode_3/rewards"),
        (change_metadata(total_episodes=0), "names no dataset with episodes"),
        (change_metadata(total_episodes="3"), "names no dataset with episodes"),
        (change_metadata(data_format="arrow"), "data format 'arrow', only hdf5 can be read"),
        (change_metadata(dataset_id="../../arm-v0"), "'../../arm-v0' cannot name a dataset from another source"),
        (change_metadata(dataset_id="walker"), "'walker' cannot name a dataset from another source"),
        (change_metadata(observation_space="-"), "lacks the observation_space"),
        (change_metadata(observation_space="{}"), "metadata.json cannot be read"),
        (change_metadata(observation_space=ENDLESS), "has observations of shape .1000000000000"),
        (change_metadata(observation_space=WIDE.replace("float32", "object")), "observations that are not numbers"),
        (change_file(bomb), "claims 80,000,000,000,000 bytes|expected .10000000000000"),
        (replaced("episode_1/rewards", lambda file: SECRET), "has a link in place of episode_1/rewards"),
        (replaced("episode_1", lambda file: h5py.SoftLink("/episode_0")), "a link in place of episode_1"),
        (replaced("episode_1/rewards", lambda file: file["episode_1"]), "has no array episode_1/rewards"),
        (replaced("episode_0/observations/goal", lambda file: np.zeros((6, 2))), "goal of shape .6, 2., expec"),
        (replaced("episode_0/observations/goal", lambda file: np.full((6, 1), np.nan)), "row 0 of observations"),
    ],
)  # fmt: skip
def test_hostile_datasets_are_rejected(
    damage: Callable[[Path], object], message: str, tmp_path: Path, root: Path
) -> None:
    made()
    with h5py.File(root / "lab/arm-v3/data/secret.h5", "w") as file:
        file["numbers"] = np.zeros(3)
    damage(root / "lab/arm-v3/data")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        import_minari(str(root / "lab/arm-v3"), tmp_path / "arm.h5")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_an_array_much_larger_than_its_stored_bytes_is_rejected(tmp_path: Path, root: Path) -> None:
    made(observation_space=Box(-1, 1, (2**18,)))
    change_file(wide)(root / "lab/arm-v3/data")
    with pytest.raises(UserError, match="claims 4,194,304 bytes of episode_1/observations, far more than it stores"):
        import_minari("lab/arm-v3", tmp_path / "arm.h5")


def test_arrays_in_other_files_are_not_read(tmp_path: Path, root: Path) -> None:
    made()
    data = root / "lab/arm-v3/data"
    np.zeros(3).tofile(data / "numbers")
    with h5py.File(data / "other.h5", "w") as file:
        source = h5py.VirtualSource(file.create_dataset("numbers", data=np.zeros(3)))

    def external(file: h5py.File) -> None:
        file.create_dataset("episode_1/rewards", (3,), "f8", external=[(str(data / "numbers"), 0, 24)])

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = source
        file.create_virtual_dataset("episode_1/rewards", layout)

    for elsewhere in (external, virtual):
        change_file(lambda file: file.__delitem__("episode_1/rewards"))(data)
        change_file(elsewhere)(data)
        with pytest.raises(UserError, match="stores episode_1/rewards in other files"):
            import_minari("lab/arm-v3", tmp_path / "arm.h5")


def test_missing_datasets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no/such-v0: neither a folder nor a dataset in .*minari download no/such-v0"):
        import_minari("no/such-v0", tmp_path / "a.h5")
    with pytest.raises(UserError, match=r"is not a Minari dataset, metadata\.json is missing"):
        import_minari(str(tmp_path), tmp_path / "a.h5")
    with pytest.raises(UserError, match="is not a name of a Minari dataset"):
        import_minari("../../no/such-v0", tmp_path / "a.h5")
