"""Every field of a configuration with its default, which every family of experiments starts from.

Most parts are records of the library, where their fields have defaults and comments:

    data        tt_jax.trajectories.DataConfig, and how the data is split and tokenised
    model       tt_jax.transformer.TransformerConfig
    train       tt_jax.training.TrainConfig
    plan        tt_jax.sequence_planner.PlanConfig
    guided_plan the same, for plans with IQL's Q; a field without a value is that of plan
    iql         tt_jax.iql.IQLConfig
    iql_train   tt_jax.iql_training.IQLTrainConfig
    ensemble    tt_jax.ensemble.EnsembleConfig, single-step models of the dynamics
    ensemble_train  tt_jax.ensemble.EnsembleTrainConfig
    baselines   Config of each module in experiments/common/baselines.py, and train: tt_jax.learners.TrainConfig

A new field of a record is a field here, too, and in every family. Defaults are those of the papers for locomotion, a
GPU's work for hours.
"""

import dataclasses

from ml_collections import config_dict

from experiments.common.baselines import BASELINES
from tt_jax import ensemble, iql, iql_training, sequence_planner, training, trajectories, transformer


def get_config():
    """Return the defaults; the dataset is given by a flag."""
    config = config_dict.ConfigDict()
    config.seed = 0  # of initialisation, data order and dropout
    config.dataset = ""  # Minari id; --dataset sets it

    config.data = _fields_of(trajectories.DataConfig)
    config.data.eval_fraction = 0.02  # share of the episodes that is held out
    config.data.num_bins = 100  # per dimension
    config.data.method = "quantile"  # bins of equal counts; the paper's other variant is "uniform"
    config.data.num_shards = 1  # parts of the data that take turns on the devices, each of which holds one
    config.data.distinct_values = False  # True: one bin per value in columns of few values

    config.model = _fields_of(transformer.TransformerConfig)
    config.train = _fields_of(training.TrainConfig)
    config.plan = _fields_of(sequence_planner.PlanConfig, without=("discount",))  # data.discount, or that of Q
    unset = {name: config_dict.placeholder(type(value)) for name, value in config.plan.items()}
    config.guided_plan = config_dict.ConfigDict(unset)

    config.iql = _fields_of(iql.IQLConfig, without=("actor_cosine_steps",))
    config.iql.actor_cosine = True  # the policy's rate falls to 0 over iql_train.num_steps
    config.iql_train = _fields_of(iql_training.IQLTrainConfig)

    config.ensemble = _fields_of(ensemble.EnsembleConfig)
    config.ensemble_train = _fields_of(ensemble.EnsembleTrainConfig)

    config.eval = config_dict.ConfigDict()  # of IQL's policy while it trains
    config.eval.num_episodes = 10  # of each learner; 0: none
    config.eval.goal = ()  # x, y where the goal of a maze stands in every episode; (): where the environment puts it

    config.baselines = config_dict.ConfigDict({name: _baseline(each) for name, each in BASELINES.items()})
    return config.lock()


def split_size(name):
    """Split "hopper-medium-cpu" into "hopper-medium" and the size, "cpu" or "fast"; a name without one has ""."""
    rest, _, size = name.rpartition("-")
    return (rest, size) if size in ("cpu", "fast") else (name, "")


def fast(config, *, transition_dim):
    """Change `config`, of data with `transition_dim` tokens per transition, for minutes on a GPU.

    bfloat16 and no dropout, so that attention is one kernel; Muon and smooth embeddings, which need fewer updates;
    noise on the inputs against overfitting. Meant for `--minutes`, which fits the schedule to the machine.
    """
    config.model.dtype = "bfloat16"
    config.model.smooth_embedding = True
    no_dropout(config)

    config.train.optimizer = "muon"
    config.train.batch_size = 512
    config.train.num_steps = 40_000
    config.train.learning_rate = 3e-3
    end_schedule_with_run(config, transition_dim=transition_dim)
    config.train.warmup_tokens = config.train.final_tokens // 50
    config.train.input_noise = 5.0
    config.train.input_noise_steps = config.train.num_steps * 17 // 20
    config.train.steps_per_call = config.train.log_every = 500  # a call ends where something is logged


def no_dropout(config):
    """Switch all dropout of the transformer off."""
    config.model.embedding_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.model.residual_dropout = 0.0


def end_schedule_with_run(config, *, transition_dim):
    """Let the learning rate reach its floor with the last update; sizes and `train.num_steps` come first."""
    config.train.clamp_cosine = True
    windows = config.train.num_steps * config.train.batch_size
    config.train.final_tokens = windows * (config.model.max_transitions * transition_dim - 1)


def small_baselines(config):
    """Change the baselines of `config` for a CPU core, about half an hour for each training."""
    dt, cql = config.baselines.dt, config.baselines.cql
    dt.num_layers = 2
    dt.embed_dim = 64
    dt.learning_rate = 1e-3
    dt.warmup_steps = 1_000
    dt.train.batch_size = 32
    dt.train.num_steps = 20_000
    cql.num_samples = 4
    cql.train.batch_size = 128
    cql.train.num_steps = 75_000


def _baseline(baseline):
    """Return the settings of a baseline and of its training."""
    fields = _fields_of(baseline.module.Config)
    fields.update(baseline.settings)
    fields.train = config_dict.ConfigDict(dataclasses.asdict(baseline.module.TRAIN))
    return fields


def _fields_of(record, *, without=()):
    """Return the fields of a dataclass with their defaults; those without one are sizes, which come with the data."""
    has_default = [field for field in dataclasses.fields(record) if field.default is not dataclasses.MISSING]
    return config_dict.ConfigDict({field.name: _default(field) for field in has_default if field.name not in without})


def _default(field):
    """Return a field's default, or a placeholder of no type for None, so that a flag can say None again."""
    return config_dict.placeholder(object) if field.default is None else field.default
