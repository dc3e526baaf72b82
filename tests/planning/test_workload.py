import jax
import pytest

from ringrl.errors import UserError
from ringrl.model.tokens import TokenEmbedding
from ringrl.planning.ahead_of_time import abstract_step, bytes_per_device
from ringrl.planning.workload import Workload, context_tokens, find_model, format_tokens, read_tokens

pytestmark = pytest.mark.usefixtures("eight_devices")

MODELS = (
    {},
    {"token_set": "ring4", "heads": 4, "kv_heads": 2, "layers": 3, "feed_forward": 2, "action_head": "gaussian"},
    {"token_set": "at5", "timestep_embedding": True, "heads": 2, "kv_heads": 2, "action_head": "bins"},
)
MESHES = ({"seq": 8}, {"fsdp": 2, "seq": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_equal_the_model(make, model, mesh):
    if mesh.get("tensor") and not model.get("heads"):
        model = model | {"heads": 2, "kv_heads": 2}
    workload = make(640, mesh, contexts=8, **model)
    workload.check()
    step = abstract_step(workload, jax.devices())
    total = sum(x.size for x in jax.tree.leaves(step.state.params))
    assert workload.parameters.total == total
    assert 4 * workload.parameters.device == pytest.approx(bytes_per_device(step.state.params), rel=1e-9)
    assert bytes_per_device(step.state.optimiser) == pytest.approx(8 * workload.parameters.device, abs=16)


def test_position_embeddings_are_counted(make, monkeypatch):
    monkeypatch.setattr(TokenEmbedding, "MAX_TIMESTEPS", 64)
    monkeypatch.setattr(TokenEmbedding, "MAX_TRAJECTORIES", 32)
    workload = make(640, {"seq": 8}, contexts=8, timestep_embedding=True, trajectory_embedding=True)
    total = sum(x.size for x in jax.tree.leaves(abstract_step(workload, jax.devices()).state.params))
    assert workload.parameters.total == total


def test_abstract_step_allocates_nothing(make):
    step = abstract_step(make(2**30, {"seq": 8}, width=8192, heads=64, kv_heads=64, layers=100), jax.devices())
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((step.state, step.batch)))


@pytest.mark.parametrize(("text", "tokens"), [("32768", 32768), ("512k", 2**19), ("8M", 2**23), ("1.5m", 3 * 2**19)])
def test_read_tokens(text, tokens):
    assert read_tokens(text) == tokens
    assert read_tokens(format_tokens(tokens)) == tokens


@pytest.mark.parametrize("text", ["", "0", "-8", "8G", "1.0001k", "4096M", "nan", "k"])
def test_invalid_tokens_raise(text):
    with pytest.raises(UserError, match="--tokens"):
        read_tokens(text)


def test_lengths_that_do_not_divide_raise_with_the_nearest(make):
    with pytest.raises(UserError, match=r"not a multiple of 16 .*nearest is 1008"):
        make(1001, {"seq": 8}).check()
    make(1008, {"seq": 8}).check()
    make(1000, {"seq": 8, "layout": "striped"}).check()
    make(1001, {}).check()


def test_mesh_that_does_not_divide_raises(make):
    with pytest.raises(UserError, match=r"mesh\.data x mesh\.fsdp"):
        make(1024, {"fsdp": 8}).check()


def test_find_model(tmp_path):
    assert find_model("7B").model.width == 4096
    assert find_model("350m") == find_model("paper_350m")
    for name, billions in (("3b", 2.95), ("7b", 6.44), ("13b", 12.6), ("30b", 31.9)):
        workload = Workload(find_model(name), 2**14)
        assert workload.parameters.total / 1e9 == pytest.approx(billions, rel=0.01)
        assert workload.model.width // workload.model.heads == 128
    path = tmp_path / "config.yaml"
    path.write_text("model: {width: 256, heads: 4}")
    assert find_model(str(path)).model.width == find_model(str(tmp_path)).model.width == 256


def test_tokens_of_a_context_follow_from_the_task(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{task: jaco_reach_top_left, context: {trajectories: 3}, model: {token_set: dt3}}")
    assert context_tokens("x", find_model(str(path))) == 3 * 250 * 3
    path.write_text("{task: walker_walk, context: {trajectories: 5, segment_steps: 32}, model: {token_set: fused1}}")
    assert context_tokens("x", find_model(str(path))) == 5 * 32
    with pytest.raises(UserError, match="--tokens: is required, since 7b has no dataset"):
        context_tokens("7b", find_model("7b"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("7c", "no preset .*paper_350m"),
        ("demo", "there is no setting"),  # an ablation plan
        ("none.yaml", "cannot be read"),
    ],
)
def test_unknown_models_raise(name, message):
    with pytest.raises(UserError, match=message):
        find_model(name)


def test_invalid_setting_names_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {width: no}")
    with pytest.raises(UserError, match=r"config.yaml: model.width"):
        find_model(str(path))
    path.write_text("model: {kind: td3_bc}")
    with pytest.raises(UserError, match="td3_bc has no context"):
        find_model(str(path))
