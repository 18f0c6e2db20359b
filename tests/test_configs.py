"""Every configuration builds the settings that it is for, and the paper's numbers are in it."""

import pytest

from experiments import entry
from experiments.configs import locomotion, maze, quickstart
from tt_jax import sequence_planner, training, trajectories, transformer, types

LOCOMOTION = [f"{body}-{data}" for body in locomotion.BODIES for data in locomotion.DATA]
CONFIGS = [maze.get_config(), quickstart.get_config(), *(locomotion.get_config(name) for name in LOCOMOTION)]
TOKENIZER_FIELDS = ("eval_fraction", "num_bins", "method", "distinct_values")


@pytest.mark.parametrize("config", CONFIGS, ids=["maze", "quickstart", *LOCOMOTION])
def test_every_field_belongs_to_a_record(config):
    data = {name: value for name, value in config.data.items() if name not in TOKENIZER_FIELDS}
    assert set(config) == {"seed", "dataset", "data", "model", "train", "plan"}
    assert len(config.data) == len(data) + len(TOKENIZER_FIELDS)
    entry.to_dataclass(trajectories.DataConfig, data)
    spec = types.TransitionSpec(observation_dim=4, action_dim=2, num_bins=config.data.num_bins)
    entry.to_dataclass(transformer.TransformerConfig, config.model, spec=spec)
    entry.to_dataclass(training.TrainConfig, config.train)
    entry.to_dataclass(sequence_planner.PlanConfig, config.plan, discount=config.data.discount)


@pytest.mark.parametrize("config", CONFIGS, ids=["maze", "quickstart", *LOCOMOTION])
def test_unknown_fields_fail(config):
    with pytest.raises(AttributeError, match="leraning_rate"):
        config.train.leraning_rate = 1.0


def test_lengths_of_training_are_those_of_the_paper():
    steps = {name: locomotion.get_config(name).train.num_steps for name in LOCOMOTION}
    assert steps["halfcheetah-medium"] == int(1e6 / 1e6 * 50) * 1_000_000 // 256
    assert steps["hopper-medium-replay"] == 80 * 1_000_000 // 256
    assert steps["ant-medium"] == 50 * 1_000_000 // 128


@pytest.mark.parametrize(
    "name, horizon, beam_width, action_cdf, action_top_k",
    [
        ("hopper-medium", 15, 128, 0.6, 0),
        ("halfcheetah-medium", 5, 32, 0.6, 0),
        ("halfcheetah-medium-expert", 15, 32, 0.6, 0),
        ("walker2d-medium-expert", 5, 128, 0.6, 0),
        ("walker2d-medium-replay", 20, 32, 0.0, 40),
        ("ant-medium-replay", 5, 128, 0.6, 0),
    ],
)
def test_planning_is_that_of_the_paper(name, horizon, beam_width, action_cdf, action_top_k):
    plan = locomotion.get_config(name).plan
    found = (plan.horizon, plan.beam_width, plan.action_cdf, plan.action_top_k)
    assert found == (horizon, beam_width, action_cdf, action_top_k)


def test_an_unknown_selection_lists_the_known_ones():
    with pytest.raises(ValueError, match="hoper-medium.*hopper-medium"):
        locomotion.get_config("hoper-medium")
