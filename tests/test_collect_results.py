"""One table of made-up results, with the numbers by hand."""

import csv
import json

import pytest

from experiments import collect_results

pytest_plugins = ["entry_fixtures"]


def write(folder, *, returns, seed=0, play_seed=0, dataset="maze-v0", horizon=5, width=32, success=None):
    """Write the files of a run that played episodes with these returns, as experiments.plan does."""

    def measure(values):
        mean = sum(values) / len(values)
        error = (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5
        return {"mean": mean, "standard_error": error}

    unknown = {"mean": None, "standard_error": None}
    results = {
        "environment": "Maze",
        "dataset": dataset,
        "return": measure(returns),
        "normalized_score": unknown,
        "length": measure([9, 9]),
        "success": unknown if success is None else measure(success),
        "settings": {"workdir": str(folder), "seed": play_seed, "planner": "reward", "plan": {"horizon": horizon}},
    }
    config = {"seed": seed, "dataset": dataset, "model": {"embed_dim": width}, "plan": {"horizon": 15 + seed}}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(config))


def lines(folder):
    return collect_results.markdown(*collect_results.table(collect_results.read(folder)))


def test_runs_that_differ_in_seeds_are_one_row(tmp_path):
    for seed, mean in enumerate((1.0, 2.0, 6.0)):
        write(tmp_path / f"seed={seed}", returns=[mean - 1, mean + 1], seed=seed, play_seed=10 * seed)
    write(tmp_path / "deeper" / "other", returns=[4.0, 8.0], dataset="other-v0", success=[1, 0])
    # Three means 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, error sqrt(7 / 3) = 1.53. One run: error over episodes,
    # sqrt(8 / 2) = 2; success sqrt(0.5 / 2) = 0.5.
    assert lines(tmp_path) == [
        "| dataset | runs | return | each | success | each | length | each |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| other-v0 | 1 | 6.00 ± 2.00 | 6 | 0.50 ± 0.50 | 0.5 | 9.00 ± 0.00 | 9 |",
        "| maze-v0 | 3 | 3.00 ± 1.53 | 1 2 6 |  |  | 9.00 ± 0.00 | 9 9 9 |",
    ]


def test_other_settings_make_rows_and_columns(tmp_path):
    write(tmp_path / "a", returns=[1.0, 3.0], horizon=5)
    write(tmp_path / "b", returns=[2.0, 4.0], horizon=10)
    write(tmp_path / "c", returns=[3.0, 5.0], horizon=10, width=64)
    header, rows = collect_results.table(collect_results.read(tmp_path))
    assert header[:5] == ["dataset", "plan.horizon", "model.embed_dim", "runs", "return"]
    assert [row[:5] for row in rows] == [
        ["maze-v0", 5, 32, 1, 2.0],
        ["maze-v0", 10, 32, 1, 3.0],
        ["maze-v0", 10, 64, 1, 4.0],
    ]
    assert lines(tmp_path)[0].startswith("| dataset | horizon | embed_dim | runs | return | each |")


def test_files_that_compare_policies_give_a_row_for_each(tmp_path):
    for seed in range(2):
        policies = {
            "random": {"success": {"mean": 0.0, "standard_error": 0.0}},
            "planner": {"success": {"mean": 0.5 + seed / 2, "standard_error": 0.1}, "return": {"mean": 7}},
        }
        folder = tmp_path / str(seed)
        folder.mkdir()
        results = {"environment": "rooms", "policies": policies, "settings": {"seed": seed}}
        (folder / "results.json").write_text(json.dumps(results))
    assert lines(tmp_path)[2:] == [
        "| rooms | random | 2 |  |  | 0.00 ± 0.00 | 0 0 |",
        "| rooms | planner | 2 | 7.00 ± 0.00 | 7 7 | 0.75 ± 0.25 | 0.5 1 |",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}'])
def test_a_file_of_something_else_is_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json does not hold results of this project"):
        collect_results.read(tmp_path)


def test_the_command_prints_and_writes_the_table(entry_point, tmp_path):
    collect = entry_point("collect_results")
    write(tmp_path / "runs" / "a", returns=[1.0, 2.0])
    done = collect(f"--workdir={tmp_path}/runs", f"--out={tmp_path}/table.csv")
    assert done.code == 0, done.stderr
    assert "| maze-v0 | 1 | 1.50 ± 0.50 | 1.5 | 9.00 ± 0.00 | 9 |\n" in done.stdout
    header, row = csv.reader((tmp_path / "table.csv").read_text().splitlines())
    cells = dict(zip(header, row, strict=True))
    assert (cells["dataset"], cells["runs"], cells["return"], cells["return error"]) == ("maze-v0", "1", "1.5", "0.5")
    done = collect(f"--workdir={tmp_path}/nothing")
    assert done.code == 2
    assert done.error == (
        f"collect_results: --workdir={tmp_path}/nothing must have files results.json, at any depth; it has none."
    )
