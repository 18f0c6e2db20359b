"""The page docs/configuration.md: every field of a configuration with its default and the comment beside it.

python -m experiments.common.config_fields > docs/configuration.md
"""

from flax import traverse_util

from experiments.common import run_flags
from experiments.common.baselines import BASELINES
from experiments.configs import base
from tt_jax import ensemble, iql, iql_training, learners, sequence_planner, training, trajectories, transformer

PARTS = {  # what each part of a configuration is about, and the record whose fields it takes over
    "": ("The run", None),
    "data": ("What is read of a dataset, and its tokens", trajectories.DataConfig),
    "model": ("The transformer", transformer.TransformerConfig),
    "train": ("Training of the transformer", training.TrainConfig),
    "plan": ("Planning; flags `--plan.FIELD`, and `guided_plan` where Q guides", sequence_planner.PlanConfig),
    "iql": ("Implicit Q-Learning", iql.IQLConfig),
    "iql_train": ("Training of IQL", iql_training.IQLTrainConfig),
    "eval": ("Episodes of a policy while it trains", None),
    **{
        f"baselines.{name}": (each.title[0].upper() + each.title[1:], each.module.Config)
        for name, each in BASELINES.items()
    },
    **{
        f"baselines.{name}.train": (f"Training of {each.title}", learners.TrainConfig)
        for name, each in BASELINES.items()
    },
    "ensemble": ("Single-step models that long horizons are compared with", ensemble.EnsembleConfig),
    "ensemble_train": ("Training of these", ensemble.EnsembleTrainConfig),
}
HEAD = """# Fields of the configuration

`--config.PART.FIELD=VALUE` sets a field of the commands that train; the values below are those of
`experiments/configs/base.py`, from which every family starts. A field that is not here is refused. This page is made by
`python -m experiments.common.config_fields`.
"""


def page() -> str:
    """Return the page as Markdown; raises KeyError if a part is not in `PARTS` or a field has no comment."""
    tables = {part: [] for part in PARTS}
    own = run_flags.comments(base)
    told = {part: run_flags.comments(record) for part, (_, record) in PARTS.items() if record}
    fields = {part: value for part, value in base.get_config().to_dict().items() if part != "guided_plan"}
    for name, value in sorted(traverse_util.flatten_dict(fields, sep=".").items()):
        part, _, field = name.rpartition(".")
        comment = own.get(name) or told[part][field]
        value = "" if value is None else value
        tables[part].append(f"| `{name}` | `{value!r}` | {comment.replace('|', chr(92) + '|')} |")
    sections = [
        "\n".join([f"\n## {title}\n", "| field | default | meaning |", "|---|---|---|", *tables[part]])
        for part, (title, _) in PARTS.items()
    ]
    return "\n".join([HEAD.rstrip("\n"), *sections]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
