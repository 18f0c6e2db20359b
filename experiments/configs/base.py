"""Every field of a configuration with its default, which every family of experiments starts from.

Most parts are records of the library, where their fields have defaults and comments:

    data        tt_jax.trajectories.DataConfig, and how the data is split and tokenised
    model       tt_jax.transformer.TransformerConfig
    train       tt_jax.training.TrainConfig
    plan        tt_jax.sequence_planner.PlanConfig
    iql         tt_jax.iql.IQLConfig
    iql_train   tt_jax.iql_training.IQLTrainConfig
    baselines   Config of each module in experiments/common/baselines.py, and train: tt_jax.learners.TrainConfig

A new field of a record is a field here, too, and in every family. Defaults are those of the papers for locomotion, a
GPU's work for hours.
"""

import dataclasses
import typing

from ml_collections import config_dict

from experiments.common.baselines import BASELINES
from tt_jax import iql, iql_training, sequence_planner, training, trajectories, transformer


def get_config():
    """Return the defaults; the dataset is given by a flag."""
    config = config_dict.ConfigDict()
    config.seed = 0  # of initialisation, data order and dropout
    config.dataset = ""  # Minari id; --dataset sets it

    config.data = _fields_of(trajectories.DataConfig)
    config.data.eval_fraction = 0.02  # share of the episodes that is held out
    config.data.num_bins = 100  # per dimension
    config.data.method = "quantile"  # bins of equal counts; the paper's other variant is "uniform"
    config.data.distinct_values = False  # True: one bin per value in columns of few values

    config.model = _fields_of(transformer.TransformerConfig)
    config.train = _fields_of(training.TrainConfig)
    config.plan = _fields_of(sequence_planner.PlanConfig, without=("discount",))  # data.discount, or that of Q

    config.iql = _fields_of(iql.IQLConfig, without=("actor_cosine_steps",))
    config.iql.actor_cosine = True  # the policy's rate falls to 0 over iql_train.num_steps
    config.iql_train = _fields_of(iql_training.IQLTrainConfig)

    config.eval = config_dict.ConfigDict()  # of IQL's policy while it trains
    config.eval.num_episodes = 10  # of each learner; 0: none
    config.eval.goal = ()  # x, y where the goal of a maze stands in every episode; (): where the environment puts it

    config.baselines = config_dict.ConfigDict({name: _baseline(each) for name, each in BASELINES.items()})
    return config.lock()


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
    """Return a field's default; None, which would have no type, as a placeholder for the other type it may have."""
    if field.default is not None:
        return field.default
    (value_type,) = set(typing.get_args(field.type)) - {type(None)}
    return config_dict.placeholder(value_type)
