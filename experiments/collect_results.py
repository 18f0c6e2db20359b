"""Make one table of the results.json files below a folder, such as those of a sweep.

python -m experiments.collect_results --workdir=runs/sweep [--out=table.csv]

A row holds the runs that differ in their seeds alone: the mean over the runs, the standard error over them (of a single
run over its episodes), and each run's mean. In front stand the dataset, the policy where a file compares several, and
every other setting that is not the same in all rows, of playing or of training (config.json beside results.json).
"""

import csv
import json
import pathlib

import numpy as np
from absl import flags

from experiments.common import entry, files, run_flags

WORKDIR = run_flags.workdir(help="Folder below which the results lie.", required=True)
OUT = flags.DEFINE_string("out", None, "CSV file for the table, with all digits.")

MEASURES = ("return", "normalized_score", "success", "length")
WHERE = ("workdir", "iql_workdir", "seed", "num_seeds")  # settings in which the runs of a row may differ


def main(_):
    if OUT.value:
        files.result_file(OUT.value)
    results = read(pathlib.Path(WORKDIR.value))
    if not results:
        raise ValueError(f"--workdir={WORKDIR.value} must have files results.json, at any depth; it has none.")
    header, rows = table(results)
    if OUT.value:
        with open(OUT.value, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    for line in markdown(header, rows):
        print(line)


def read(folder: pathlib.Path) -> list[tuple[dict, dict]]:
    """Return (settings, measures) of every policy in every results.json below `folder`; settings are flat.

    Raises ValueError for a file that is not what `plan` or a comparison of policies writes.
    """
    found = []
    for path in sorted(folder.rglob("results.json")):
        try:
            results = json.loads(path.read_text())
            config = json.loads(file.read_text()) if (file := path.with_name("config.json")).exists() else {}
            dataset = {"dataset": results.get("dataset") or results["environment"]}
            training = flatten({name: value for name, value in config.items() if name not in ("plan", "dataset")})
            policies = results.get("policies") or results.get("methods") or {None: results}
            for policy, row in policies.items():
                name = {"policy": policy} if policy else {}
                settings = dataset | name | flatten(results["settings"]) | training
                found.append((settings, {measure: row[measure] for measure in MEASURES if measure in row}))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold results of this project: {error!r}; move it elsewhere.") from error
    return found


def flatten(nested: dict, prefix: str = "") -> dict:
    """Return a dict of dicts as one, with the keys joined by dots, without those of WHERE."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif name not in WHERE:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return flat


def table(results: list[tuple[dict, dict]]) -> tuple[list[str], list[list]]:
    """Return the header and the rows: settings, number of runs, and mean, error and each run of every measure."""
    names = list(dict.fromkeys(name for settings, _ in results for name in settings))
    shown = [name for name in names if name == "dataset" or len({settings.get(name) for settings, _ in results}) > 1]
    groups = {}
    for settings, measures in results:
        groups.setdefault(tuple(settings.get(name) for name in shown), []).append(measures)
    present = [measure for measure in MEASURES if any(_mean(measures, measure) is not None for _, measures in results)]
    header = shown + ["runs"] + [f"{measure}{part}" for measure in present for part in ("", " error", " each")]
    rows = []
    for values, runs in groups.items():
        row = [*values, len(runs)]
        for measure in present:
            row += _average([run for run in runs if _mean(run, measure) is not None], measure)
        rows.append(row)
    return header, rows


def _mean(measures, name):
    return measures.get(name, {}).get("mean")


def _average(runs, measure):
    each = [_mean(run, measure) for run in runs]
    if not each:
        return [None, None, ""]
    error = np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else runs[0][measure]["standard_error"]
    return [float(np.mean(each)), None if error is None else float(error), " ".join(f"{value:.4g}" for value in each)]


def markdown(header: list[str], rows: list[list]) -> list[str]:
    """Return the lines of the table, means and errors in one column; settings by the last part of their name."""
    measures = [name for name in header if f"{name} error" in header]
    settings = header[: header.index("runs")]
    short = [name.split(".")[-1] for name in settings]
    short = [last if short.count(last) == 1 else name for name, last in zip(settings, short, strict=True)]
    lines = [[*short, "runs", *(cell for name in measures for cell in (name, "each"))]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        line = ["" if cells[name] is None else str(cells[name]) for name in [*settings, "runs"]]
        for name in measures:
            mean, error = cells[name], cells[f"{name} error"]
            line.append("" if mean is None else f"{mean:.2f}" + ("" if error is None else f" ± {error:.2f}"))
            line.append(cells[f"{name} each"])
        lines.append(line)
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    entry.run(main)
