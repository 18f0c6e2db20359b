"""Models of the PyTorch reference become workdirs; state_dicts are made here, with the reference's names and shapes."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from entry_points import MAZE

from tt_jax import checkpoints, torch_import, transformer, types

pytest_plugins = ["entry_fixtures"]

# The maze has 6 observations and 2 actions, so 10 tokens per transition.
LAYERS, EMBED, BINS, TRANSITION, WINDOW = 2, 8, 20, 10, 4
CONFIG = [MAZE[0], "--dataset=test/maze-v0", "--config.data.distinct_values=False", "--config.plan.window=(4, 3)"]


def make_state_dict(*, layers=LAYERS, embed=EMBED, bins=BINS, transition=TRANSITION, window=WINDOW):
    rng = np.random.default_rng(0)
    block = window * transition - 1
    shapes = {"tok_emb.weight": [bins * transition + 1, embed], "pos_emb": [1, block, embed]}
    for i in range(layers):
        linear = {f"attn.{name}": [embed, embed] for name in ("query", "key", "value", "proj")}
        linear |= {"mlp.0": [4 * embed, embed], "mlp.2": [embed, 4 * embed]}
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("ln1", "ln2"):
            shapes |= {f"blocks.{i}.{name}.weight": [embed], f"blocks.{i}.{name}.bias": [embed]}
        shapes |= {f"blocks.{i}.attn.mask": [1, 1, block, block]}  # a buffer
    shapes |= {"ln_f.weight": [embed], "ln_f.bias": [embed], "head.weight": [transition, bins + 1, embed]}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def convert(entry_point):
    return entry_point("import_torch")


@pytest.fixture
def write(tmp_path):
    """A function that writes a state_dict of arrays as PyTorch does."""
    torch = pytest.importorskip("torch")

    def write(state_dict):
        torch.save({name: torch.from_numpy(value) for name, value in state_dict.items()}, tmp_path / "state.pt")
        return f"--state_dict={tmp_path / 'state.pt'}"

    return write


def test_sizes_are_read_off_the_shapes():
    sizes = {"num_layers": 3, "embed_dim": 12, "num_bins": 7, "transition_dim": 5, "max_transitions": 6}
    assert torch_import.read_sizes(make_state_dict(layers=3, embed=12, bins=7, transition=5, window=6)) == sizes


def test_what_is_no_model_of_the_reference_is_refused():
    state = make_state_dict()
    with pytest.raises(ValueError, match="not a state_dict of the reference's GPT.*'head.weight'"):
        torch_import.read_sizes({"weight": np.zeros(3)})
    with pytest.raises(ValueError, match="not a state_dict of the reference's GPT"):
        torch_import.read_sizes(state | {"head.weight": state["head.weight"][0]})
    with pytest.raises(ValueError, match="'pos_emb' has 38 positions, one less than a multiple of 10 expected"):
        torch_import.read_sizes(state | {"pos_emb": state["pos_emb"][:, 1:]})
    with pytest.raises(ValueError, match="ConditionalGPT"):
        torch_import.read_sizes(state | {"goal_emb.weight": np.zeros((6 * 20, 8))})


def test_a_converted_model_can_be_restored_planned_with_and_trained_further(
    convert, write, train, entry_point, tmp_path
):
    state, workdir = make_state_dict(), tmp_path / "run"
    done = convert(write(state), *CONFIG, f"--workdir={workdir}", "--num_heads=2")
    assert done.code == 0, done.stderr
    assert "num_layers 2, embed_dim 8, num_bins 20, transition_dim 10, max_transitions 4" in done.stdout

    checkpoint = checkpoints.restore(workdir)
    spec = types.TransitionSpec(observation_dim=6, action_dim=2, num_bins=20)
    config = transformer.TransformerConfig(spec=spec, num_layers=2, num_heads=2, embed_dim=8, max_transitions=4)
    assert (checkpoint.step, checkpoint.config) == (0, config)
    np.testing.assert_array_equal(checkpoint.params["token_embedding"]["embedding"], state["tok_emb.weight"])
    np.testing.assert_array_equal(checkpoint.params["blocks_1"]["mlp_in"]["kernel"], state["blocks.1.mlp.0.weight"].T)
    np.testing.assert_array_equal(checkpoint.params["head"]["kernel"], np.swapaxes(state["head.weight"], 1, 2))
    assert checkpoint.tokenizer.thresholds.shape == (10, 21)
    saved = json.loads((workdir / "config.json").read_text())
    assert (saved["dataset"], saved["data"]["num_bins"]) == ("test/maze-v0", 20)
    found = {name: saved["model"][name] for name in ("num_layers", "num_heads", "embed_dim", "max_transitions")}
    assert found == {"num_layers": 2, "num_heads": 2, "embed_dim": 8, "max_transitions": 4}

    plan = entry_point("plan")
    small = ["--num_episodes=1", "--num_envs=1", "--plan.horizon=2", "--plan.beam_width=2"]
    done = plan(f"--workdir={workdir}", *small)
    assert done.code == 0, done.stderr
    assert json.loads((plan.folder / "results.json").read_text())["checkpoint_step"] == 0

    same = ["--config.data.num_bins=20", "--config.model.num_heads=2", "--config.model.embed_dim=8"]
    same += ["--config.model.max_transitions=4", "--config.train.num_steps=3", "--config.train.batch_size=4"]
    done = train(*CONFIG, *same, f"--workdir={workdir}")
    assert done.code == 0, done.stderr
    assert checkpoints.latest_step(workdir) == 3

    done = convert(write(state), *CONFIG, f"--workdir={workdir}", "--num_heads=2")
    assert (done.code, done.error) == (2, f"import_torch: {workdir} holds checkpoints already; use another --workdir.")


def test_other_files_and_other_data_are_refused_in_one_line(convert, write, tmp_path):
    torch = pytest.importorskip("torch")
    workdir = tmp_path / "run"

    def refuse(*arguments):
        done = convert(*CONFIG, f"--workdir={workdir}", *arguments)
        assert done.code == 2, done.stderr
        assert checkpoints.latest_step(workdir) is None
        return done.error

    path = pathlib.Path(tmp_path / "other.pt")
    assert f"--state_dict={path} cannot be read" in refuse(f"--state_dict={path}")
    path.write_text("no archive")
    assert f"--state_dict={path} cannot be read" in refuse(f"--state_dict={path}")
    torch.save(pathlib.PurePosixPath("code"), path)
    assert f"--state_dict={path} cannot be read: Weights only load failed" in refuse(f"--state_dict={path}")
    torch.save({"epoch": 3}, path)
    assert f"--state_dict={path} must hold a state_dict" in refuse(f"--state_dict={path}")
    assert "embed_dim=8 must be a multiple of num_heads=3" in refuse(write(make_state_dict()), "--num_heads=3")
    message = refuse(write(make_state_dict(transition=9)), "--num_heads=2")
    assert "the model has 9 tokens per transition, test/maze-v0 has 10" in message
    broken = make_state_dict() | {"blocks.1.mlp.0.bias": np.zeros(5, np.float32)}
    assert "'blocks.1.mlp.0.bias' has shape (5,)" in refuse(write(broken), "--num_heads=2")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="needs an environment without torch")
def test_a_missing_torch_is_told_in_one_line(convert, tmp_path):
    done = convert("--state_dict=state.pt", *CONFIG, f"--workdir={tmp_path}")
    assert done.code == 2
    assert done.error == "import_torch: --state_dict=state.pt can only be read with PyTorch: pip install torch."


@pytest.mark.parametrize("missing", ["state_dict", "config", "workdir"])
def test_missing_flags_are_told_in_one_line(convert, tmp_path, missing):
    arguments = ["--state_dict=state.pt", *CONFIG, f"--workdir={tmp_path / 'run'}"]
    done = convert(*(argument for argument in arguments if not argument.startswith(f"--{missing}")))
    assert done.code == 2
    assert f"--{missing}" in done.error
