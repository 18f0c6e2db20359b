"""Every configuration builds the settings that it is for, and the paper's numbers are in it."""

import dataclasses
import json
import pathlib

import pytest
from absl import flags
from ml_collections import config_flags

from experiments.common import baselines, control, entry, settings
from experiments.configs import antmaze, base, dataset, four_rooms, humanoid, locomotion, maze, quickstart, sparse_maze
from tt_jax import ensemble, iql, iql_training, learners, sequence_planner, training, trajectories, transformer, types

LOCOMOTION = [f"{body}-{data}" for body in locomotion.BODIES for data in locomotion.DATA]
ANTMAZE = [f"{name}{size}" for name in antmaze.MAZES for size in ("", "-cpu")]
CONFIGS = {
    **{module.__name__.split(".")[-1]: module.get_config() for module in (maze, quickstart, four_rooms, sparse_maze)},
    **{name: locomotion.get_config(name) for name in LOCOMOTION},
    **{f"antmaze-{name}": antmaze.get_config(name) for name in ANTMAZE},
}
STORED = json.loads((pathlib.Path(__file__).parent / "data" / "configs.json").read_text())
NEWER = {  # fields that not every configuration had when it was stored
    "model.attention": "auto",
    "model.goal_conditioned": False,
    "model.reference_goal_mask": False,
    "plan.share_ancestors": True,
}
RECORDS = {
    "data": trajectories.DataConfig,
    "model": transformer.TransformerConfig,
    "train": training.TrainConfig,
    "plan": sequence_planner.PlanConfig,
    "iql": iql.IQLConfig,
    "iql_train": iql_training.IQLTrainConfig,
    "ensemble": ensemble.EnsembleConfig,
    "ensemble_train": ensemble.EnsembleTrainConfig,
}
OTHER_FIELDS = {
    "data": {"eval_fraction", "num_bins", "num_shards", "method", "distinct_values"},
    "iql": {"actor_cosine"},
}
COMPUTED = {  # fields of records that the data or another field brings
    "model": {"spec": types.TransitionSpec(observation_dim=4, action_dim=2, num_bins=100)},
    "plan": {"discount": 0.9},
    "iql": {"observation_dim": 4, "action_dim": 2, "actor_cosine_steps": 10},
    "ensemble": {"observation_dim": 4, "action_dim": 2},
}
SIZES = {"observation_dim": 4, "action_dim": 2}
BASELINE_SIZES = {"dt": SIZES | {"max_timesteps": 10}}

FAST = {
    **{f"{name}-fast": locomotion.get_config(f"{name}-fast") for name in LOCOMOTION},
    **{f"antmaze-{name}-fast": antmaze.get_config(f"{name}-fast") for name in antmaze.MAZES},
}
CPU = {f"{name}-cpu": locomotion.get_config(f"{name}-cpu") for name in LOCOMOTION}
ANY_DATASET = {f"dataset-{size}": dataset.get_config(size) for size in dataset.SIZES}  # has no score to keep
ANY_DATASET["humanoid"] = humanoid.get_config()
EVERY = CONFIGS | FAST | CPU | ANY_DATASET


def flatten(config):
    """Return the fields by their dotted names, as JSON, which tells 1 from 1.0 but not tuples from lists."""
    flat = {}
    for part, value in config.to_dict().items():
        if part == "baselines":  # has a test of its own
            continue
        fields = {f"{part}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {part: value}
        flat |= {name: json.dumps(each) for name, each in fields.items()}
    return flat


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_every_configuration_passes_its_own_checks(config):
    assert settings.checked(config) is config


def test_a_flag_turns_the_termination_penalty_off():
    def config(*arguments):
        parsed = flags.FlagValues()
        argv = ["test", *arguments]
        default = locomotion.get_config("hopper-medium")
        config_flags.DEFINE_config_dict("config", default, flag_values=parsed, sys_argv=argv)
        parsed(argv)
        return settings.checked(parsed.config)

    assert config().data.termination_penalty == -100
    assert config("--config.data.termination_penalty=-7").data.termination_penalty == -7
    assert config("--config.data.termination_penalty=None").data.termination_penalty is None
    for wrong in ("nan", "much", "True"):
        with pytest.raises(ValueError, match=r"termination_penalty=.* must be of type float \| None"):
            config(f"--config.data.termination_penalty={wrong}")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_what_is_stored(name):
    expected = {field: json.dumps(value) for field, value in (NEWER | STORED["common"] | STORED[name]).items()}
    assert flatten(CONFIGS[name]) == flatten(base.get_config()) | expected
    assert set(STORED) == {"common", *CONFIGS}


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_every_field_belongs_to_a_record_and_makes_a_valid_one(config):
    assert set(config) == {"seed", "dataset", "eval", "baselines", "guided_plan", *RECORDS}
    for part, record in RECORDS.items():
        own = {name: value for name, value in config[part].items() if name not in OTHER_FIELDS.get(part, ())}
        computed = COMPUTED.get(part, {})
        assert set(own) == {field.name for field in dataclasses.fields(record)} - set(computed)
        entry.to_dataclass(record, own, **computed)
    assert set(config.guided_plan) == set(config.plan)
    assert config.plan.window[0] <= config.model.max_transitions
    for name, baseline in baselines.BASELINES.items():
        own = dict(config.baselines[name])
        entry.to_dataclass(learners.TrainConfig, own.pop("train"))
        settings = entry.to_dataclass(baseline.module.Config, own, **BASELINE_SIZES.get(name, SIZES))
        assert all(getattr(settings, field) == value for field, value in baseline.settings.items())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_unknown_fields_fail(config):
    with pytest.raises(AttributeError, match="leraning_rate"):
        config.train.leraning_rate = 1.0


def test_the_fast_ones_end_their_schedule_with_the_run_and_plan_as_the_paper():
    for name, config in FAST.items():
        tokens = {"hopper": 16, "halfcheetah": 25, "walker2d": 25, "ant": 37, "antmaze": 39}[name.split("-")[0]]
        window = config.model.max_transitions * tokens - 1
        assert config.train.final_tokens == config.train.num_steps * config.train.batch_size * window
        assert 0 < config.train.warmup_tokens < config.train.final_tokens / 10
        assert config.train.input_noise_steps < config.train.num_steps
        if not name.startswith("antmaze"):
            paper = CONFIGS[name.removesuffix("-fast")]
            assert config.plan == paper.plan
            assert config.dataset == paper.dataset and config.data == paper.data


def test_the_small_bodies_end_their_schedule_with_the_run_and_learn_from_the_papers_data():
    for name, config in CPU.items():
        tokens = {"hopper": 16, "halfcheetah": 25, "walker2d": 25, "ant": 37}[name.split("-")[0]]
        windows = config.train.num_steps * config.train.batch_size
        assert config.train.final_tokens == windows * (config.model.max_transitions * tokens - 1)
        assert config.data == CONFIGS[name.removesuffix("-cpu")].data
        assert config.plan.action_cdf == config.plan.action_top_k == 0 < config.plan.action_central < 1
        plan, guided = (dataclasses.asdict(control.plan_config(config, guided=guided)) for guided in (False, True))
        among_all = {"horizon": 1, "beam_width": 32, "num_elites": 16, "action_central": 1.0}
        assert plan == dict(config.plan) | {"discount": config.data.discount}
        assert guided == plan | (among_all if name.endswith("-medium-replay-cpu") else {})


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
    for module, name in ((locomotion, "hopper-medium-fast-cpu"), (antmaze, "umaze-cpu-fast")):  # one size, not two
        with pytest.raises(ValueError, match=f"no settings called '{name}'"):
            module.get_config(name)


def test_iql_is_that_of_the_paper():
    ant, hopper = antmaze.get_config("large-play").iql, locomotion.get_config("hopper-medium").iql
    assert (ant.expectile, ant.temperature, ant.reward_units) == (0.9, 10.0, "minus_one")
    assert (hopper.expectile, hopper.temperature, hopper.reward_units) == (0.7, 3.0, "return_range")
    for config in (ant, hopper):
        assert (config.hidden_dims, config.tau, config.discount, config.learning_rate) == (
            (256, 256),
            0.005,
            0.99,
            3e-4,
        )
    assert antmaze.get_config("large-play").dataset == "D4RL/antmaze/large-play-v1"


def test_baselines_are_those_of_the_papers():
    dt, cql = (locomotion.get_config("hopper-medium-replay").baselines[name] for name in ("dt", "cql"))
    assert (dt.window, dt.num_layers, dt.num_heads, dt.embed_dim, dt.targets) == (20, 3, 1, 128, (3600.0, 1800.0))
    assert (dt.return_scale, dt.learning_rate, dt.train.batch_size, dt.train.num_steps) == (1000.0, 1e-4, 64, 100_000)
    assert (cql.penalty_weight, cql.num_samples, cql.lagrange_gap) == (5.0, 10, 0.0)
    assert antmaze.get_config("large-play").baselines.cql.lagrange_gap == 5.0
    assert antmaze.get_config("large-play").baselines.bc10.best_share == 0.1
