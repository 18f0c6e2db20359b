"""The page docs/configuration.md: every field of a configuration with its default and the comment beside it.

python -m experiments.common.config_fields > docs/configuration.md
"""

import inspect
import re

from experiments.configs import base
from tt_jax import iql, iql_training, sequence_planner, training, trajectories, transformer

PARTS = {  # what each part of a configuration is about, and the record whose fields it takes over
    "": ("The run", None),
    "data": ("What is read of a dataset, and its tokens", trajectories.DataConfig),
    "model": ("The transformer", transformer.TransformerConfig),
    "train": ("Training of the transformer", training.TrainConfig),
    "plan": ("Planning; `plan` has a flag `--plan.FIELD` for each", sequence_planner.PlanConfig),
    "iql": ("Implicit Q-Learning", iql.IQLConfig),
    "iql_train": ("Training of IQL", iql_training.IQLTrainConfig),
    "eval": ("Episodes of IQL's policy while it trains", None),
    "table": ("The table of all methods", None),
}
HEAD = """# Fields of the configuration

`--config.PART.FIELD=VALUE` sets a field of `train_tt` and `train_iql`; the values below are those of
`experiments/configs/base.py`, from which every family starts. A field that is not here is refused. This page is made by
`python -m experiments.common.config_fields`.
"""
_FIELD = re.compile(r"^\s*(?:config\.)?([\w.]+)(?:: [^=\n]+)? = .*?  # (.*)$", re.MULTILINE)


def page() -> str:
    """Return the page as Markdown; raises KeyError if a part of the configuration is not in `PARTS`."""
    config = base.get_config()
    tables = {part: [] for part in PARTS}
    own = dict(_FIELD.findall(inspect.getsource(base)))
    comments = {part: dict(_FIELD.findall(inspect.getsource(record))) for part, (_, record) in PARTS.items() if record}
    for name, value in _flatten(config):
        part, _, field = name.rpartition(".")
        comment = own.get(name) or comments.get(part, {}).get(field, "")
        value = "" if value is None else value
        tables[part].append(f"| `{name}` | `{value!r}` | {comment.replace('|', chr(92) + '|')} |")
    sections = [
        "\n".join([f"\n## {title}\n", "| field | default | meaning |", "|---|---|---|", *tables[part]])
        for part, (title, _) in PARTS.items()
    ]
    return "\n".join([HEAD.rstrip("\n"), *sections]) + "\n"


def _flatten(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


if __name__ == "__main__":
    print(page(), end="")
